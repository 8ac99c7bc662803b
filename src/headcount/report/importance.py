"""Which heads and FFNs matter, and where they lie: maps, bars, sentences and tables of importance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import altair as alt
import pandas as pd

from headcount.analysis.importance import THIRDS, mean_importance
from headcount.analysis.rows import (
    AGGREGATES,
    MEAN,
    MEAN_OF_RANKS,
    TASK,
    Labels,
    groups,
    labelled,
    most_shots,
    single_tasks,
    summary,
)
from headcount.analysis.scores import name_of
from headcount.analysis.study import Study
from headcount.report import words
from headcount.report.section import Section, Table, mean_first, plain_columns, section
from headcount.report.style import PALETTE, Chart, dressed, of_one_task, shots_column, with_menu
from headcount.report.words import COMPONENT_NAMES, on, score_name, shots

_LISTED = 10  # components at either end of a ranking


def head_map(importance: pd.DataFrame, score: str, *, choose: bool) -> Chart:
    """Importance of every head, layer by head.

    Args:
        importance: `Study.importance()`.
        score: Which gradient score.
        choose: With a menu for the task (for the page); otherwise the mean over tasks, a panel per number of shots.
    """
    of_heads = importance[(importance["component"] == "head") & (importance["method"] == "gradient")]
    beside = "position" if score == "example" else "example"
    rows, other = (_with_mean(of_heads[of_heads["score"] == name]) for name in (score, beside))
    places = ["task", "num_fewshot", "layer", "head"]
    other = other.assign(other=other.groupby(places[:2])["importance"].rank(ascending=False, method="min"))
    rows = rows.merge(other[[*places, "other"]], on=places, how="left")
    rows["rank"] = rows.groupby(places[:2])["importance"].rank(ascending=False, method="min")
    rows["name"] = [name_of("head", layer, head) for layer, head in zip(rows["layer"], rows["head"], strict=True)]
    rows["importance"] = rows["importance"].map(lambda x: float(f"{x:.4g}"))
    # Tasks differ in scale; the colour is the share of the largest, so that panels can be compared.
    largest = rows.groupby(["task", "num_fewshot"])["importance"].transform("max")
    rows["share"] = (rows["importance"] / largest.where(largest > 0, 1)).round(4)
    rows["shots"] = rows["num_fewshot"].map(shots)
    layers, heads = int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1
    size = max(4, min(20, 520 // max(layers, heads)))
    columns = ["task", "shots", "layer", "head", "name", "importance", "share", "stderr", "rank", "other"]
    chart = alt.Chart(rows[columns]).mark_rect().encode(
        x=alt.X("head:O", title="head", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("layer:O", title="layer (0 is next to the input)", sort="descending", axis=alt.Axis(labelOverlap=True)),
        color=alt.Color("share:Q", title=["share of the largest", f"by {score}"],
                        scale=alt.Scale(type="sqrt", scheme="viridis", domain=[0, 1])),
        tooltip=[alt.Tooltip("name:N", title="head"), alt.Tooltip("task:N"), alt.Tooltip("shots:N"),
                 alt.Tooltip("importance:Q", format=".3g"),
                 alt.Tooltip("stderr:Q", title="standard error", format=".2g"),
                 alt.Tooltip("rank:Q", title=f"rank by {score}"), alt.Tooltip("other:Q", title=f"rank by {beside}")],
    ).properties(width=size * heads, height=size * layers)
    return dressed(with_menu(of_one_task(chart, rows, choose).facet(column=shots_column(rows)), rows, choose))


def ffn_bars(importance: pd.DataFrame, scores: Sequence[str], *, choose: bool) -> Chart:
    """Importance of every FFN by layer, a row of panels for each score, the first one above; `choose` as in `head_map`.

    Args:
        importance: `Study.importance()`.
        scores: Which scores, those that were not measured are left out.
        choose: With a menu for the task.
    """
    rows = importance[(importance["component"] == "ffn") & importance["score"].isin(list(scores))]
    rows = _with_mean(rows)
    rows["name"] = [f"L{layer}F" for layer in rows["layer"]]
    rows["shots"] = rows["num_fewshot"].map(shots)
    rows["low"], rows["high"] = rows["importance"] - rows["stderr"], rows["importance"] + rows["stderr"]
    known = {"accuracy": "accuracy lost without it", "gold_loglikelihood": "log-likelihood lost (nats)"}
    titles = {score: known.get(score, "gradient score (nats)") for score in scores}
    width = max(220, min(420, 9 * (int(rows["layer"].max()) + 1)))
    panels = []
    for name, title in titles.items():
        of_score = rows[rows["score"] == name]
        if of_score.empty:
            continue
        x = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
        base = alt.Chart().encode(x=x)
        bars = base.mark_bar(color=PALETTE[0]).properties(name=f"{name}_bars").encode(
            y=alt.Y("importance:Q", title=title),
            tooltip=[alt.Tooltip("name:N", title="FFN"), alt.Tooltip("task:N"), alt.Tooltip("shots:N"),
                     alt.Tooltip("importance:Q", format=".3g"),
                     alt.Tooltip("stderr:Q", title="standard error", format=".2g")])
        errors = base.transform_filter("isValid(datum.stderr)").mark_rule(color="#333").encode(
            y=alt.Y("low:Q"), y2=alt.Y2("high:Q"))
        columns = ["task", "shots", "layer", "name", "importance", "stderr", "low", "high"]
        layered = alt.layer(bars, errors, data=of_score[columns]).properties(width=width, height=150)
        panels.append(of_one_task(layered, rows, choose).facet(column=shots_column(rows))
                      .resolve_scale(y="independent"))
    return dressed(with_menu(alt.vconcat(*panels), rows, choose))


def _with_mean(rows: pd.DataFrame) -> pd.DataFrame:
    if rows["task"].nunique() < 2:
        return rows.copy()
    return labelled(pd.concat([mean_importance(rows), rows.assign(scope=TASK)], ignore_index=True))


def depth_bars(depth: pd.DataFrame) -> Chart:
    """Share of the most important heads in each third of the layers: bars over tasks with intervals, dots for tasks.

    Args:
        depth: `Study.depth()`.
    """
    if depth.empty:
        return None
    shares = {name: (100 * depth[name]).round(1) for name in ("share", "low", "high", "expected")}
    whole = summary(depth)
    data = labelled(depth).assign(shots=depth["num_fewshot"].map(shots), **shares, whole=depth.index.isin(whole.index))
    base = alt.Chart().encode(x=alt.X("third:N", title="third of the layers", sort=list(THIRDS),
                                      axis=alt.Axis(labelAngle=0, ticks=False)))
    title = f"of the top {100 * depth['fraction'].iloc[0]:.0f} % of heads (%)"
    y = alt.Y("share:Q", title=title, scale=alt.Scale(domain=[0, 100]))
    tooltip = [alt.Tooltip("task:N"), alt.Tooltip("shots:N"), alt.Tooltip("third:N"),
               alt.Tooltip("share:Q", title="share (%)"), alt.Tooltip("low:Q"), alt.Tooltip("high:Q"),
               alt.Tooltip("expected:Q", title="of all heads (%)")]
    of_whole = base.transform_filter("datum.whole")
    bars = of_whole.mark_bar(color=PALETTE[5]).encode(y=y, tooltip=tooltip)
    tick = of_whole.mark_tick(thickness=2, color="black", bandSize=52).encode(y=alt.Y("expected:Q", title=title))
    errors = of_whole.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.6).encode(
        y=alt.Y("low:Q", title=title), y2=alt.Y2("high:Q"))
    dots = base.transform_filter("!datum.whole").mark_circle(size=20, color=PALETTE[1], opacity=0.8).encode(
        y=y, tooltip=tooltip)
    name = data.loc[data["whole"], "task"].iloc[0]
    bar = f"{name} over tasks; dots: single tasks" if whole["scope"].iloc[0] in AGGREGATES else name
    words = f"bars: {bar}; lines: share of all heads"
    chart = alt.layer(bars, dots, errors, tick, data=data.drop(columns=["scope", "num_fewshot"])).properties(
        width=alt.Step(64), height=200).facet(column=shots_column(data))
    return dressed(chart.properties(title=alt.TitleParams(words, fontSize=12, fontWeight="normal")))


def depth_sentence(depth: pd.DataFrame) -> str:
    """In which third of the layers the important heads lie, and how much of importance is depth.

    Args:
        depth: `Study.depth()`.
    """
    table = most_shots(depth)
    if table.empty:
        return ""
    rows = summary(table)
    said: list[str] = []
    for _, row in rows.iterrows():
        single = table.loc[(table["scope"] == TASK) & (table["third"] == row["third"]), "share"]
        apart = row["scope"] in AGGREGATES and len(single)
        about = [words.counts(row, 100), f"single tasks {words.span((100 * single).round())}" if apart else ""]
        hedged = words.bracketed(*(f"{words} %" for words in about if words))
        where = f"lie in the {row['third']} third of the layers" if not said else f"in the {row['third']} third"
        said.append(f"{words.percent(row['share'])} {where}{hedged}")
    thirds = [words.percent(e) for e in rows["expected"]]
    holds = (f"each third holds {thirds[0]} of all heads" if len(set(thirds)) == 1 else
             f"these thirds hold {words.listed(thirds)} of all heads")
    return (f"With {words.shots_of(rows)}, of the {rows['important'].iloc[0]} heads "
            f"({words.share(rows['fraction'].iloc[0])}) that matter most {words.on(rows)} {words.listed(said)}; "
            f"{holds}.{_between_layers(table, rows)}")


def _between_layers(table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Which share of the variance of log importance lies between layers, on the summary and on single tasks."""
    share, chance = rows["between_layers"].iloc[0], rows["between_layers_by_chance"].iloc[0]
    if share != share:
        return ""
    single = single_tasks(table)["between_layers"].dropna()
    apart = rows["scope"].iloc[0] in AGGREGATES and len(single)
    hedged = words.bracketed(f"single tasks {words.span((100 * single).round())} %" if apart else "",
                           f"{words.percent(chance)} would without any trend over depth")
    return f" {words.percent(share)} of the variance of log importance lies between layers{hedged}."


def importance_sentence(study: Study, component: str) -> str:
    """Which components matter most over tasks, at the most shots, how sure their ranks are, and where they lie."""
    ranked = ranking(study, component)
    if ranked.empty:
        return ""
    ranked = ranked[ranked["num_fewshot"] == ranked["num_fewshot"].max()]
    beginning = f"With {shots(int(ranked['num_fewshot'].iloc[0]))}"
    where = on(ranked)
    top = ranked[ranked["useful"]].head(5 if component == "head" else 3)
    score = score_name(study.ordering_scores[component])
    if top.empty:
        return (f"{beginning}, {where}, no {COMPONENT_NAMES[component][0]} is of use by {score} when it alone is "
                "switched off.")
    tenth = ranked.head(max(1, len(ranked) // 10))
    layers = len(study.description["anatomy"]["heads_per_layer"])
    known = top["rank_low"].notna().all()
    names = ", ".join(f"{row['name']} ({row['rank_low']:.0f} to {row['rank_high']:.0f})" if known else str(row["name"])
                      for _, row in top.iterrows())
    ranks = (" (in brackets the ranks that the documents leave open: after all that are shown to matter more, before "
             "all that are shown to matter less)" if known else "")
    middle = (f"; the median layer of the top tenth is layer {tenth['layer'].median():.0f} (they are numbered 0 to "
              f"{layers - 1})")
    first = top.iloc[0]
    called = (f"{first['name']} is head {first['head']:.0f} of layer {first['layer']:.0f}" if component == "head" else
              f"{first['name']} is the FFN of layer {first['layer']:.0f}")
    return (f"{beginning}, {where}, the most important {COMPONENT_NAMES[component][1]} by {score} are "
            f"{names}{ranks}{middle}. {called}.")


def ranking(study: Study, component: str) -> pd.DataFrame:
    """Components by importance over tasks, the most important first, with their names; by number of shots."""
    table = study.aggregate_importance()
    rows = table[(table["component"] == component) & (table["score"] == study.ordering_scores[component])]
    # Ranks are never negative: whether a component is of use is told by its mean score.
    places = ["num_fewshot", "layer", "head"]
    useful = rows[rows["scope"] != MEAN_OF_RANKS].assign(useful=rows["importance"] > 0)[[*places, "useful"]]
    left_out = MEAN if study.spec.get("aggregate") == "ranks" else MEAN_OF_RANKS
    rows = rows[rows["scope"] != left_out].merge(useful, on=places)
    names = [name_of(component, layer, head) for layer, head in zip(rows["layer"], rows["head"], strict=True)]
    return rows.assign(name=names).sort_values(["num_fewshot", "rank"])


def sections(study: Study) -> Iterator[Section]:
    """Maps of heads, where they lie, and bars of FFNs."""
    importance, score = study.importance(), study.ordering_scores["head"]
    mean = Labels(frozenset(study.tasks)).word(MEAN)
    if (importance["component"] == "head").any():
        yield section(
            "head_map", "Which heads matter", lambda: head_map(importance, score, choose=True),
            importance_sentence(study, "head"), f"The colour is a head's importance by "
            f"{words.score_name(score)} as a share of the largest in its panel ('{mean}' is the mean of the tasks' "
            "scores); point at a head for its value, and for its rank by either gradient score.",
            static=lambda: head_map(importance, score, choose=False))
        yield section(
            "depth", "Where important heads lie", lambda: depth_bars(study.depth()),
            depth_sentence(study.depth()), "Bars: all tasks together, with 95 % intervals over documents where "
            "they are known; dots: single tasks; short lines: the share of all heads that a third of the layers holds.")
    if (importance["component"] == "ffn").any():
        by = study.ordering_scores["ffn"]
        bars = list(dict.fromkeys([by, "gold_loglikelihood", "accuracy", score]))
        yield section(
            "ffn_bars", "Which FFNs matter", lambda: ffn_bars(importance, bars, choose=True),
            importance_sentence(study, "ffn"), _bars(study), "Lines: plus and minus one standard error; "
            "every panel has its own scale.", static=lambda: ffn_bars(importance, bars, choose=False))


def _bars(study: Study) -> str:
    """What the bars of FFNs are."""
    importance = study.importance()
    if not ((importance["component"] == "ffn") & (importance["score"] == "accuracy")).any():
        return "Bars: the gradient score."
    documents = "evaluated" if study.spec["protocol"] == "paper" else "training"
    by = words.score_name(study.ordering_scores["ffn"])
    return (f"The top row shows {by}, which orders the FFNs here; the other scores are below. What is lost is measured "
            f"on {documents} documents with one FFN switched off.")


def orders_tables(study: Study) -> Iterator[Table]:
    """How reliable the orders by each score are."""
    orders = study.orders()
    if orders.empty:
        return
    keys = ["scope", "task", "num_fewshot", "component"]
    known = orders.assign(
        score=orders["score"].replace("gold_loglikelihood", "gold log-likelihood") + " (" + orders["method"] + ")",
        reliability=[f"{x:.2f}" if x == x else "not known" for x in orders["reliability"]])
    others = known[~known["orders"]].assign(others=lambda t: t["score"] + " " + t["reliability"]).groupby(
        keys, as_index=False)["others"].agg("; ".join)
    frame = mean_first(known[known["orders"]].merge(others, on=keys, how="left").fillna({"others": ""}))
    yield Table("How reliable the orders are", "Reliability: the share of a score's variance over heads, or FFNs, that "
                "is not noise from the choice of documents (1 minus the mean squared standard error over the "
                "variance). Below 0.5, most of the differences between them are noise, and so is most of their "
                "order.", plain_columns(
                    frame[[*keys, "score", "reliability", "distinct", "components", "documents", "others"]].rename(
                        columns={"distinct": "distinct values", "others": "reliability of other scores"})))


def agreement_tables(study: Study) -> Iterator[Table]:
    """How alike gradient and oracle rank components."""
    agreement = study.agreement()
    if agreement.empty:
        return
    known = agreement["correlation"].notna()
    frame = agreement.copy()
    frame["what is lost"] = agreement["oracle"].replace("gold_loglikelihood", "gold log-likelihood")
    frame["Spearman"] = [f"{x:.2f}" if k else "all equal" for x, k in zip(agreement["correlation"], known, strict=True)]
    frame["95 % interval"] = [f"{a:.2f} to {b:.2f}" if k else ""
                              for a, b, k in zip(agreement["low"], agreement["high"], known, strict=True)]
    columns = ["task", "num_fewshot", "component", "score", "what is lost", "Spearman", "95 % interval", "components"]
    yield Table("Gradient and oracle", "How alike components rank by the gradient's score and by what is lost without "
                "each of them alone; intervals over components. Few documents, and few distinct values of what is "
                "lost, lower the correlation.", plain_columns(frame[columns]))


def tables(study: Study) -> Iterator[Table]:
    """How reliable orders are, gradient beside oracle, and the most and the least important components."""
    yield from orders_tables(study)
    yield from agreement_tables(study)
    for component, title in (("head", "heads"), ("ffn", "FFNs")):
        ranked = ranking(study, component)
        for k, of_k in groups(ranked, "num_fewshot"):
            most, least = of_k.head(_LISTED), of_k.tail(_LISTED)[::-1]
            frame = pd.DataFrame({"rank": range(1, len(most) + 1), "most important": most["name"].tolist(),
                                  "importance": most["importance"].tolist(), "least important": least["name"].tolist(),
                                  "importance ": least["importance"].tolist()})
            what = on(of_k)
            yield Table(f"Most and least important {title}, {words.shots(int(k))}",
                        f"{what[0].upper()}{what[1:]}.", frame)
