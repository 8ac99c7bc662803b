"""Do tasks, and numbers of shots, need the same components? Matrices and dots of rank correlations."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import altair as alt
import numpy as np
import pandas as pd

from headcount.analysis.correlations import (
    alike_together,
    between_shots,
    between_single_tasks,
    noise,
    noise_by_shots,
)
from headcount.analysis.rows import (
    MEAN,
    MEAN_OF_RANKS,
    RANDOM,
    TASK,
    Labels,
    labelled,
    labels_of,
    mean_or_first,
    most_shots,
    of_score,
    single_tasks,
)
from headcount.analysis.study import Study
from headcount.report import words
from headcount.report.matrix import hundredths, matrix
from headcount.report.section import Section, Table, section
from headcount.report.sets import top_sets_sentence
from headcount.report.style import COMPONENTS, LEGEND, PALETTE, SHAPES, Chart, dressed
from headcount.report.words import NAMES, SINGULAR, known, shots


def task_matrix(correlations: pd.DataFrame, component: str, *, score: str | None = None) -> Chart:
    """Rank correlation of importance between tasks, a panel per number of shots; the diagonal is each task's own.

    Panels of scores that are mostly noise are pale, and the title says so.

    Args:
        correlations: One row per pair; each pair once is enough.
        component: "head" or "ffn".
        score: Which score of importance; the first in the table by default.
    """
    rows = of_score(correlations, component, score)
    rows = rows[rows["kind"].isin(["tasks", "reliability"]) & (rows["num_fewshot"] >= 0)]
    if rows.empty:
        return None
    turned = rows.rename(columns={"task": "other_task", "other_task": "task", "scope": "other_scope",
                                  "other_scope": "scope"})
    rows = pd.concat([rows, turned]).drop_duplicates(["scope", "task", "other_scope", "other_task", "num_fewshot"])
    labels, neighbours, noisy = labels_of(rows), alike_together(rows), noise_by_shots(rows)
    rows = labelled(rows, labels)
    names = labels.tasks_first([*neighbours, *rows["task"], *rows["other_task"]])
    tooltip = [alt.Tooltip("row:N", title="task"), alt.Tooltip("column:N", title="and"), alt.Tooltip("shots:N"),
               alt.Tooltip("kind:N", title="what"), alt.Tooltip("value:Q", title="Spearman", format=".3f"),
               alt.Tooltip("interval:N", title="95 % interval"), alt.Tooltip("alone:N", title="layers alone give"),
               alt.Tooltip("inside:N", title="within layers"),
               alt.Tooltip("argsort:N", title="the paper's argsort variant")]
    cells = pd.DataFrame({
        "row": rows["task"], "column": rows["other_task"], "num_fewshot": rows["num_fewshot"],
        "shots": rows["num_fewshot"].map(shots),
        "kind": rows["kind"].map({"tasks": "two orders", "reliability": "itself, on other documents"}),
        "value": rows["correlation"].round(4), "low": rows["low"].round(4), "high": rows["high"].round(4),
        "interval": [words.within(a, b) for a, b in zip(rows["low"], rows["high"], strict=True)],
        "alone": rows["correlation_layers_alone"].map(words.known), "inside": [
            words.known(r) + words.bracketed(words.within(a, b) if a == a else "")
            for r, a, b in zip(rows["correlation_in_layers"], rows["in_layers_low"], rows["in_layers_high"],
                               strict=True)],
        "argsort": rows["argsort_correlation"].map(words.known), "framed": rows["kind"] == "reliability",
        "pale": rows["num_fewshot"].isin(list(noisy))})
    title = f"rank correlation of the importance of {COMPONENTS[component]}; framed: reliability"
    chart = matrix(cells, names, names, hundredths, title, 1.0, tooltip, ("", ""), bold=labels.summaries)
    lines = words.noisy(noisy, rows["num_fewshot"].nunique())
    return chart.properties(title=[f"{line[0].upper()}{line[1:]}" for line in lines]) if noisy else chart


def shots_dots(correlations: pd.DataFrame, *, scores: Mapping[str, str] | None = None) -> Chart:
    """How alike two numbers of shots rank the components of each task: Spearman's correlation with its interval.

    A panel of scores that are mostly noise is pale, and says so.

    Args:
        correlations: One row per pair.
        scores: Which score of importance by kind of component; the first in the table by default.
    """
    panels, labels = [], labels_of(correlations)
    for component, title in COMPONENTS.items():
        of_component = of_score(correlations, component, (scores or {}).get(component))
        rows = between_shots(of_component)
        if rows["correlation"].notna().any():
            reason = noise(of_component[of_component["kind"].isin(["shots", "reliability"])])
            words = alt.TitleParams(f"{title[0].upper()}{title[1:]}", subtitle=reason)
            random = _beside_random(of_component, rows, labels)
            panels.append(_shots_panel(rows, random, labels, pale=bool(reason)).properties(
                title=words if reason else words.text, width=330))
    if not panels:
        return None
    return dressed(alt.hconcat(*panels)).configure_legend(orient="top", **LEGEND)


def _beside_random(rows: pd.DataFrame, shown: pd.DataFrame, labels: Labels) -> pd.DataFrame:
    """A random order held against the mean over tasks (or the first shown), a row per number of shots."""
    scope, task = mean_or_first(shown)[["scope", "task"]].iloc[0]
    rows = rows[(rows["kind"] == "shots") & (rows["scope"] == scope) & (rows["task"] == task)
                & (rows["other_scope"] == RANDOM)]
    pairs = [f"{label}, {shots(k)}, and a random order" for label, k in zip(
        labels.column(rows["scope"], rows["task"]), rows["num_fewshot"], strict=True)]
    named = rows.assign(task=f"{labels.word(RANDOM)} order", pair=pairs)
    return named[["task", "pair", "correlation", "low", "high"]].round(4)


def _shots_panel(rows: pd.DataFrame, random: pd.DataFrame, labels: Labels, *, pale: bool) -> Chart:
    rows = labelled(rows, labels).sort_values(["num_fewshot", "other_shots"], kind="stable")
    data = pd.DataFrame({"task": rows["task"], "correlation": rows["correlation"], "low": rows["low"],
                         "high": rows["high"], "pair": [f"{shots(a)} and {shots(b)}" for a, b in zip(
                             rows["num_fewshot"], rows["other_shots"], strict=True)],
                         "inside": rows["correlation_in_layers"].map(known),
                         "alone": rows["correlation_layers_alone"].map(known)}).round(4)
    pairs, tasks = list(dict.fromkeys(data["pair"])), labels.tasks_first(rows["task"])
    summaries = [name for name in tasks if name in (labels.word(MEAN), labels.word(MEAN_OF_RANKS))]
    low = np.floor(5 * min(0.0, float(data[["low", "correlation"]].min().min()), float(random["low"].min()))) / 5
    y = alt.Y("task:N", title=None, scale=alt.Scale(paddingInner=0.25),
              sort=[*summaries, *(t for t in tasks if t not in summaries), f"{labels.word(RANDOM)} order"],
              axis=alt.Axis(domain=False, ticks=False, grid=True, labelFontWeight=alt.ExprRef(
                  expr=f"indexof({summaries}, datum.label) >= 0 ? 'bold' : 'normal'")))
    base = alt.Chart(data).encode(y=y, yOffset=alt.YOffset("pair:N", scale=alt.Scale(domain=pairs)))
    colour = alt.Color("pair:N", title=None, scale=alt.Scale(domain=pairs, range=PALETTE[: len(pairs)]))
    shape = alt.Shape("pair:N", title=None, scale=alt.Scale(domain=pairs, range=SHAPES[: len(pairs)]))
    x = alt.X("correlation:Q", title="rank correlation of importance", scale=alt.Scale(domain=[low, 1]),
              axis=alt.Axis(labelFlush=False))
    opacity = 0.25 if pale else 1
    dots = base.mark_point(filled=True, size=42, opacity=opacity).encode(
        x=x, color=colour, shape=shape,
        tooltip=[alt.Tooltip("task:N"), alt.Tooltip("pair:N", title="shots"),
                 alt.Tooltip("correlation:Q", format=".3f"),
                 alt.Tooltip("low:Q", title="95 % interval from", format=".3f"),
                 alt.Tooltip("high:Q", title="to", format=".3f"),
                 alt.Tooltip("alone:N", title="layers alone give"), alt.Tooltip("inside:N", title="within layers")])
    lines = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.6, opacity=opacity).encode(
        x=alt.X("low:Q"), x2=alt.X2("high:Q"), color=colour)
    # All in the middle of their row; without an offset of their own rows would be no higher than one of them.
    grey = alt.Chart(random.assign(offset=pairs[len(pairs) // 2])).encode(y=y, yOffset=alt.YOffset(
        "offset:N", scale=alt.Scale(domain=pairs)))
    band = grey.mark_rule(color="#bbb", strokeWidth=5).encode(x=alt.X("low:Q"), x2=alt.X2("high:Q"))
    beside = grey.mark_tick(color="#555", thickness=2).encode(
        x=x, tooltip=[alt.Tooltip("pair:N", title="what"), alt.Tooltip("correlation:Q", format=".3f"),
                      alt.Tooltip("low:Q", title="95 % of random orders from", format=".3f"),
                      alt.Tooltip("high:Q", title="to", format=".3f")])
    return alt.layer(band, beside, lines, dots).properties(height=alt.Step(max(8, 22 // max(1, len(pairs)))))


def tasks_sentence(correlations: pd.DataFrame, component: str, *, score: str | None = None) -> str:
    """How alike tasks rank the components: the median pair, the most unlike and the most alike.

    Args:
        correlations: One row per pair of tasks, or of numbers of shots.
        component: "head" or "ffn".
        score: Which score of importance; the first in the table by default.
    """
    rows = of_score(correlations, component, score)
    rows = rows[rows["kind"].isin(["tasks", "reliability"]) & rows["correlation"].notna()]
    numbers = rows.loc[rows["num_fewshot"] >= 0, "num_fewshot"].nunique()
    noisy = "; ".join(words.noisy(noise_by_shots(rows), numbers))
    rows = most_shots(rows)
    between = rows[rows["kind"] == "tasks"]
    pairs = between_single_tasks(between)
    # Each pair once: tables may hold both ways round.
    once = [a < b if ((pairs["task"] == b) & (pairs["other_task"] == a)).any() else a != b
            for a, b in zip(pairs["task"], pairs["other_task"], strict=True)]
    pairs = pairs[pd.Series(once, index=pairs.index, dtype=bool)].sort_values("correlation", kind="stable")
    if pairs.empty:
        return ""
    least, most = pairs.iloc[0], pairs.iloc[-1]
    beginning = f"With {words.shots_of(rows)}, two tasks' importance of {NAMES[component]} correlates (Spearman) at "
    if len(pairs) == 1:
        said = [f"{beginning}{words.estimate(least)}"]
    else:
        known = pairs["low"].notna()
        above = f"; {(pairs['low'] > 0).sum()} of {known.sum()} intervals lie above 0" if known.any() else ""
        said = [f"{beginning}{words.number(pairs['correlation'].median())} (median of {len(pairs)} pairs), from "
                f"{words.estimate(least)} for {least['task']} and {least['other_task']} to {words.estimate(most)} for "
                f"{most['task']} and {most['other_task']}{above}"]
    own = single_tasks(rows).query("kind == 'reliability'")["correlation"]
    random = between.loc[(between["scope"] == TASK) & (between["other_scope"] == RANDOM), "correlation"]
    said += ["one task's with itself, measured on other documents, at "
             f"{words.number(own.median())}"] if len(own) else []
    said += [f"a random order with a task's at {words.number(random.median())}"] if len(random) else []
    return (f"{_first_of_all(noisy)}{'; '.join(said)}.{_only_depth(pairs, component, 'two tasks agree')}"
            f"{_argsorts(pairs)}")


def _first_of_all(noisy: str) -> str:
    """That scores are mostly noise comes before all that is said of them."""
    return f"{noisy[0].upper()}{noisy[1:]}. " if noisy else ""


def _only_depth(pairs: pd.DataFrame, component: str, agree: str) -> str:
    """Which part of a correlation is only depth, and what there is within layers, with its interval or how many."""
    known = pairs[pairs["correlation_in_layers"].notna()]
    if known.empty:
        return ""
    alone, inside = (words.number(known[f"correlation_{name}"].median()) for name in ("layers_alone", "in_layers"))
    low, high, n = known["in_layers_low"], known["in_layers_high"], known["in_layers_low"].notna().sum()
    if len(known) == 1:
        hedged = words.bracketed(words.within(low.iloc[0], high.iloc[0]) if n else "")
    else:
        hedged = words.bracketed("median", f"{(low > 0).sum()} of {n} intervals lie above 0" if n else "")
    return (f" Knowing a {SINGULAR[component]}'s layer alone gives a correlation of {alone}; within layers {agree} "
            f"at {inside}{hedged}.")


def _argsorts(pairs: pd.DataFrame) -> str:
    argsorts = pairs["argsort_correlation"].dropna()
    return (f" The paper's argsort variant of the correlation is {words.number(argsorts.median())}"
            f"{' (median)' if len(argsorts) > 1 else ''}." if len(argsorts) else "")


def shots_sentence(correlations: pd.DataFrame, component: str, *, score: str | None = None) -> str:
    """How alike the fewest and the most shots rank the components; arguments as in `tasks_sentence`."""
    rows = of_score(correlations, component, score)
    rows = rows[rows["correlation"].notna()]
    noisy = noise(rows[rows["kind"].isin(["shots", "reliability"])])
    pairs = between_shots(rows)
    if pairs.empty:
        return ""
    few, many = int(pairs["num_fewshot"].min()), int(pairs["other_shots"].max())
    pairs = pairs[(pairs["num_fewshot"] == few) & (pairs["other_shots"] == many)]
    mean, single = pairs[pairs["scope"] == MEAN], single_tasks(pairs).sort_values("correlation")
    said = [f"{words.estimate(mean.iloc[0])} for the mean over tasks"] if len(mean) else []
    if len(single):
        least, most = single.iloc[0], single.iloc[-1]
        ends = [words.estimate(end, f" on {end['task']}") for end in (least, most)]
        said.append(f"from {ends[0]} to {ends[1]} for single tasks" if len(single) > 1 else ends[0])
    if not said:
        return ""
    return (f"{_first_of_all(noisy)}Importance of {NAMES[component]} with {shots(few)} and with {shots(many)} "
            f"correlates (Spearman) at {', '.join(said)}."
            f"{_only_depth(mean if len(mean) else single, component, 'they agree')}{_argsorts(single)}"
            f"{_beyond_noise(single)}")


def _beyond_noise(single: pd.DataFrame) -> str:
    """On how many tasks two numbers of shots agree less than scores so noisy can (the root of both reliabilities).

    That is no test: in simulated studies of equal orders noise alone put 7 to 16 % of such intervals below the ceiling
    where it was small, up to 46 % where it had heavy tails, and none where both scores share it (test_relations.py).
    """
    both = single[single["ceiling"].notna() & single["high"].notna()]
    if both.empty:
        return ""
    apart = int((both["high"] < both["ceiling"]).sum())
    if len(both) == 1:
        return (" The interval lies below what scores so noisy could reach: the order seems to change, though noise "
                "alone puts about one interval in ten there." if apart else
                " The scores' noise alone could account for that.")
    if apart:
        return (f" On {apart} of {len(both)} tasks the interval lies below what scores so noisy could reach; noise "
                "alone puts about one interval in ten there.")
    return (f" On none of {len(both)} tasks does the interval lie below what scores so noisy could reach: noise could "
            "account for all differences.")


def sections(study: Study) -> Iterator[Section]:
    """Matrices between tasks, and dots between numbers of shots."""
    table, top = study.correlations(), study.top_sets()
    words = {"head": "heads", "ffn": "FFNs"}
    for component, score in study.ordering_scores.items():
        rows = table[(table["component"] == component) & (table["kind"] == "tasks")] if len(table) else table
        if len(rows[(rows["scope"] != RANDOM) & (rows["other_scope"] != RANDOM)]):
            yield section(
                f"cross_task_{component}", f"Do tasks need the same {words[component]}?",
                functools.partial(task_matrix, table, component, score=score),
                tasks_sentence(table, component, score=score),
                top_sets_sentence(top[top["component"] == "head"]) if component == "head" else "",
                "Spearman's correlation of importance; the diagonal is what a score would correlate with itself if it "
                "were measured again on as many other documents. Panels of scores that are mostly noise are pale. A "
                "mean that is compared with a task leaves this task out. Three tasks or more are arranged so that "
                "tasks which rank alike are neighbours.")
    if len(table) and (table["kind"] == "shots").any():
        yield section("cross_shot", "Does the order depend on the number of shots?",
                       lambda: shots_dots(table, scores=study.ordering_scores),
                       *(shots_sentence(table, c, score=s) for c, s in study.ordering_scores.items()),
                       "Grey: a random order compared with the scores of each number of shots, and the band that holds "
                       "95 % of random orders. Pale: scores that are mostly noise.")


def tables(study: Study) -> Iterator[Table]:
    """None: tables/correlations.csv has all of them."""
    yield from ()
