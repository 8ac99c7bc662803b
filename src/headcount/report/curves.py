"""What is left as the least important components go: figures, sentences and tables of pruning curves."""

from __future__ import annotations

from collections.abc import Iterator

import altair as alt
import numpy as np
import pandas as pd

from headcount.analysis.curves import COMMON, first_differences, own_orders
from headcount.analysis.points import MEAN
from headcount.analysis.study import Study
from headcount.report import words
from headcount.report.section import Section, Table, mean_first, plain_columns, section, thousandths
from headcount.report.style import COMPONENTS, LEGEND, Chart, dressed, shots_colour
from headcount.report.words import COMPONENT_NAMES, better_or_worse, number_of, share, shots, signed, told
from headcount.stats.intervals import COSTS_MORE, UNKNOWN, WITHIN

_BY = {"gradient": "each task's own order", "oracle": "each task's own order", "common": "one order for all tasks",
       "random": "at random"}
_DASHES = {"each task's own order": [1, 0], "one order for all tasks": [1, 3], "at random": [4, 3]}
_OWN = 'datum.by == "each task\'s own order"'


def headline_figure(curves: pd.DataFrame, free: pd.DataFrame, baselines: dict[int, float]) -> Chart:
    """Mean accuracy as heads, and as FFNs, go: by importance and at random, with intervals and free fractions.

    Args:
        curves: `Study.curves()`.
        free: `Study.free_fractions()`.
        baselines: Chance (or the best constant answer) by number of shots.
    """
    task = summary_task(curves)
    rows = curves[curves["task"] == task]
    panels = [
        _curve_panel(rows[rows["component"] == c], free[(free["task"] == task) & (free["component"] == c)], baselines)
        .properties(width=285, height=240, title=f"{COMPONENTS[c][0].upper()}{COMPONENTS[c][1:]} removed")
        for c in ("head", "ffn") if (rows["component"] == c).any()
    ]
    return dressed(alt.hconcat(*panels))


def task_curves(curves: pd.DataFrame, component: str) -> Chart:
    """Accuracy of every task as one kind of component goes: small multiples, the mean first."""
    rows = _labelled(curves[(curves["component"] == component)])
    tasks = list(dict.fromkeys([*([MEAN] if (rows["task"] == MEAN).any() else []), *rows["task"]]))
    x = alt.X("percent:Q", title=f"{COMPONENTS[component]} removed (%)", scale=alt.Scale(domain=[0, 100]))
    base = alt.Chart().encode(x=x)
    band = base.transform_filter(_OWN).mark_area(opacity=0.15).encode(
        y=alt.Y("low:Q", title="accuracy", scale=alt.Scale(domain=[0, 1])), y2="high:Q", color=shots_colour(rows))
    line = base.mark_line(strokeWidth=1.8).encode(y="accuracy:Q", color=shots_colour(rows), strokeDash=_orders(rows))
    dots = base.mark_circle(size=16, opacity=1).encode(y="accuracy:Q", color=shots_colour(rows),
                                                       tooltip=_curve_tooltip())
    chart = alt.layer(band, line, dots, data=rows).properties(width=180, height=125).facet(
        facet=alt.Facet("task:N", title=None, sort=tasks, header=alt.Header(labelFontSize=12, labelFontWeight="bold")),
        columns=4)
    return dressed(chart).configure_legend(orient="top", **LEGEND)


def _curve_panel(rows: pd.DataFrame, free: pd.DataFrame, baselines: dict[int, float]) -> Chart:
    labelled = _labelled(rows)
    base = alt.Chart(labelled).encode(x=alt.X("percent:Q", title="removed (%)", scale=alt.Scale(domain=[0, 100]),
                                                    axis=alt.Axis(values=list(range(0, 101, 20)))))
    y = alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]))
    band = base.transform_filter(_OWN).mark_area(opacity=0.18).encode(
        y=alt.Y("low:Q", title="accuracy"), y2="high:Q", color=shots_colour(labelled))
    line = base.mark_line(strokeWidth=2).encode(y=y, color=shots_colour(labelled), strokeDash=_orders(labelled))
    dots = base.mark_circle(size=30, opacity=1).encode(y=y, color=shots_colour(labelled), tooltip=_curve_tooltip())
    guess = pd.DataFrame({"accuracy": sorted(set(baselines.values()))[:1]})
    chance = alt.Chart(guess).mark_rule(color="#888", strokeDash=[2, 3]).encode(y="accuracy:Q")
    word = alt.Chart(guess).mark_text(align="left", dx=4, color="#666", fontSize=10).encode(
        y="accuracy:Q", x=alt.datum(100), text=alt.value("guessing"))
    marks = free[free["free_fraction"] > 0].assign(percent=lambda t: 100 * t["free_fraction"], by=lambda t: t[
        "order"].map(_BY), shots=lambda t: t["num_fewshot"].map(shots))
    layers = [band, chance, word, line, dots]
    if len(marks):
        # Filled where each task goes by its own order, hollow where all go by one.
        layers.append(alt.Chart(marks).mark_point(shape="diamond", size=190, filled=True, strokeWidth=2,
                                                  opacity=1).encode(
            fill=alt.condition(_OWN, shots_colour(labelled), alt.value("white")),
            stroke=alt.condition(_OWN, alt.value("black"), shots_colour(labelled)),
            x="percent:Q", y="accuracy:Q", color=shots_colour(labelled),
            tooltip=[alt.Tooltip("percent:Q", title="free (%)"), alt.Tooltip("by:N", title="removed"), "shots:N",
                     alt.Tooltip("accuracy:Q", format=".3f")]))
    return alt.layer(*layers)


def _labelled(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[rows["order"] != "none"]
    columns = ["task", "accuracy", "low", "high", "removed", "parameters_removed", "difference", "difference_low",
               "difference_high", "verdict"]
    return rows[columns].round(4).assign(
        p=rows["p"].map(lambda p: float(f"{p:.2g}")), percent=(100 * rows["fraction"]).round(2),
        by=rows["order"].map(_BY), shots=rows["num_fewshot"].map(shots))


def _orders(rows: pd.DataFrame) -> alt.StrokeDash:
    used = {name: dash for name, dash in _DASHES.items() if (rows["by"] == name).any()}
    return alt.StrokeDash("by:N", title="removed", scale=alt.Scale(domain=list(used), range=list(used.values())),
                          legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=2, symbolSize=300, labelLimit=260))


def _curve_tooltip() -> list[alt.Tooltip]:
    return [alt.Tooltip("task:N"), alt.Tooltip("shots:N"), alt.Tooltip("by:N", title="removed"),
            alt.Tooltip("percent:Q", title="removed (%)"), alt.Tooltip("removed:Q", title="how many"),
            alt.Tooltip("parameters_removed:Q", title="parameters", format=","),
            alt.Tooltip("accuracy:Q", format=".3f"), alt.Tooltip("low:Q", format=".3f"),
            alt.Tooltip("high:Q", format=".3f"), alt.Tooltip("difference:Q", title="to the full model", format="+.3f"),
            alt.Tooltip("difference_low:Q", title="at least (95 %)", format="+.3f"),
            alt.Tooltip("difference_high:Q", title="at most (95 %)", format="+.3f"),
            alt.Tooltip("verdict:N", title="of the margin"),
            alt.Tooltip("p:Q", title="p of the difference", format=".2g")]


def summary_task(curves: pd.DataFrame) -> str:
    """The rows that speak for the study: the mean over tasks, or the only task."""
    return MEAN if (curves["task"] == MEAN).any() else str(curves["task"].iloc[0])


_TASKS_NAMED = 6


def costs_more(study: Study, row: pd.Series, fraction: float) -> str:
    """What one set for all tasks costs at this step on single tasks; those at chance have nothing to lose."""
    curves, k = study.curves(), int(row["num_fewshot"])
    at = curves[(curves["order"] == COMMON) & (curves["component"] == row["component"]) & (curves["task"] != MEAN)
                & (curves["num_fewshot"] == k) & (curves["fraction"] == fraction)]
    at = at[[study.above_chance[str(task), k] for task in at["task"]]]
    if at.empty:
        return ""
    worse = at[at["verdict"] == COSTS_MORE].sort_values("difference")
    shown = worse.head(_TASKS_NAMED)
    names = ", ".join(f"{t} ({signed(d)})" for t, d in zip(shown["task"], shown["difference"], strict=True))
    rest = f" and {len(worse) - len(shown)} more" if len(worse) > len(shown) else ""
    within, unknown = (int((at["verdict"] == v).sum()) for v in (WITHIN, UNKNOWN))
    margin = study.spec["margin"]
    said = [f"on {len(worse)} {told(COSTS_MORE, margin)}: {names}{rest}"] if len(worse) else []
    said += [f"on {within} {told(WITHIN, margin)}"] if within else []
    said += [f"on {unknown} its documents cannot tell"] if unknown else []
    return f" Of the {number_of(len(at), 'task')} above chance, {'; '.join(said)}."


def curve_sentence(study: Study, component: str) -> str:
    """What importance leaves more than random orders do, near half of the components, at the most shots."""
    table = own_orders(study.against_random())
    task = MEAN if (table["task"] == MEAN).any() else study.spec["tasks"][0]
    rows = table[(table["task"] == task) & (table["component"] == component)]
    if rows.empty:
        return ""
    rows = rows[rows["num_fewshot"] == rows["num_fewshot"].max()]
    row = rows.loc[min(rows.index, key=lambda i: (round(abs(rows["fraction"][i] - 0.5), 9), rows["fraction"][i]))]
    known = row["difference_low"] == row["difference_low"]
    if row["draws"] > 1 and not known:
        shown = "there is no interval"
    elif not known:
        shown = "one draw cannot tell whether that is more than chance: ask for several with --random-orders"
    elif row["difference_low"] > 0 or row["difference_high"] < 0:
        shown = f"the order is shown to be {better_or_worse(row['difference'])} than a random one"
    else:
        shown = "the order is not shown to be better than a random one, nor worse"
    interval = (f", {signed(row['difference_low'])} to {signed(row['difference_high'])} (95 %, paired over documents "
                "and draws)") if known else ""
    spread = f" (single draws {row['draw_low']:.2f} to {row['draw_high']:.2f})" if row["draws"] > 1 else ""
    orders = f"{row['draws']} random orders {row['random']:.2f} on average" if row["draws"] > 1 else (
        f"a random one {row['random']:.2f}")
    names = COMPONENT_NAMES[component][1]
    return (f"With {shots(int(row['num_fewshot']))} and {share(row['fraction'])} of the {names} removed, the "
            f"measured order leaves {row['accuracy']:.2f}, {orders}{spread}: {signed(row['difference'])} points"
            f"{interval}; {shown}.")


def common_sentence(study: Study, component: str) -> str:
    """What one set for all tasks costs beside each task's own order, at the most shots and the largest common step."""
    curves = study.curves()
    rows = curves[(curves["component"] == component) & (curves["task"] == MEAN) & (curves["fraction"] > 0)]
    common = rows[rows["order"] == COMMON]
    if common.empty:
        return ""
    common = common[common["num_fewshot"] == common["num_fewshot"].max()]
    row = common.loc[common["fraction"].idxmax()]
    if np.isnan(row["difference_low"]):
        return ""
    own = own_orders(rows[(rows["num_fewshot"] == row["num_fewshot"]) & (rows["fraction"] == row["fraction"])])
    beside = f" Each task's own order leaves {own['accuracy'].iloc[0]:.2f}." if len(own) else ""
    margin = study.spec["margin"]
    return (f"One set of {share(row['fraction'])} of the {COMPONENT_NAMES[component][1]} for all tasks leaves a mean "
            f"accuracy of {row['accuracy']:.2f}, {signed(row['difference'])} points against the full model "
            f"({words.bounds(row['difference_low'], row['difference_high'], margin)}): {told(row['verdict'], margin)}."
            f"{beside}{costs_more(study, row, float(row['fraction']))}")


def differences_sentence(study: Study, component: str) -> str:
    """From which step on accuracy is shown to be worse, or better, than the full model's, at the most shots."""
    found = own_orders(first_differences(study.curves()))
    found = found[found["component"] == component]
    if found.empty:
        return ""
    found = found[found["num_fewshot"] == found["num_fewshot"].max()]
    whole, single = found[found["task"] == MEAN], found[found["task"] != MEAN]
    names, k = COMPONENT_NAMES[component][1], int(found["num_fewshot"].iloc[0])
    said = [f"{_first(whole)} of the {names} on all tasks' documents together"] if len(whole) else []
    said.append(f"on single tasks (not corrected for how many they are) {_first(single)}" if said or len(single) > 1
                else f"{_first(single)} of the {names} on {found['task'].iloc[0]}")
    return (f"With {shots(k)} accuracy is shown to be another than the full model's (McNemar's paired test over "
            f"documents, p < 0.05, corrected for a curve's steps by Holm's method) {'; '.join(said)}.")


def _first(steps: pd.DataFrame) -> str:
    """`first at 20 % (worse)`, `first at 10 to 30 % (3 worse, 1 better; 2 of 6 at no step)`, `at no step`."""
    known = steps.dropna(subset=["fraction"])
    if known.empty:
        return "at no step"
    least, most = share(known["fraction"].min()), share(known["fraction"].max())
    span = least if least == most else f"{least.removesuffix(' %')} to {most}"
    worse, never = int((known["difference"] < 0).sum()), len(steps) - len(known)
    if len(steps) == 1:
        return f"first at {span} ({better_or_worse(known['difference'].iloc[0])})"
    counts = [f"{n} {word}" for n, word in ((worse, "worse"), (len(known) - worse, "better")) if n]
    rest = f"; {never} of {len(steps)} at no step" if never else ""
    return f"first at {span} ({', '.join(counts)}{rest})"


BANDS = "Bands are 95 % intervals over documents; point at a mark for its numbers."


def sections(study: Study) -> Iterator[Section]:
    """Every task's curves, of heads and of FFNs."""
    curves = study.curves()
    pruned = curves[curves["component"] != "none"]
    if (pruned["component"] == "head").any():
        yield section("head_curves", "Pruning heads, task by task", lambda: task_curves(pruned, "head"),
                       _by_task(study, "head"), differences_sentence(study, "head"),
                       common_sentence(study, "head"), BANDS)
    if (pruned["component"] == "ffn").any():
        yield section("ffn_curves", "Pruning FFNs, task by task", lambda: task_curves(pruned, "ffn"),
                       _by_task(study, "ffn"), differences_sentence(study, "ffn"),
                       common_sentence(study, "ffn"), curve_sentence(study, "ffn"), BANDS)


def _by_task(study: Study, component: str) -> str:
    """How the free fraction differs between tasks, at the most shots at which it is defined, and what else is shown."""
    free = own_orders(study.free_fractions())
    free = free[(free["task"] != MEAN) & (free["component"] == component)]
    defined = free[free["free_fraction"].notna()]
    if defined.empty:
        return ("The full model is on no task shown to be above a baseline, so that no free fraction is defined."
                if len(free) else "")
    free = defined[defined["num_fewshot"] == defined["num_fewshot"].max()].sort_values(
        ["free_fraction", "free_high"], kind="stable")
    shots, names = words.shots(int(free["num_fewshot"].iloc[0])), {"head": "heads", "ffn": "FFNs"}[component]
    curves = study.curves()
    last = float(curves.loc[curves["component"] == component, "fraction"].max())
    some, none = free[free["free_fraction"] > 0], free[free["free_fraction"] == 0]
    if len(some):
        least, most = some.iloc[0], some.iloc[-1]
        ends = f"{_free_with_bound(least, last)} on {least['task']}"
        if len(some) > 1:
            ends += f" to {_free_with_bound(most, last)} on {most['task']}"
        of = words.number_of(len(free), "task")
        said = f"a share of the {names} is shown to be free on {len(some)} of {of}: {ends}"
    else:
        said = f"no share of the {names} is shown to be free on any of {words.number_of(len(free), 'task')}"
    if len(none):
        loses = none["next_verdict"] == COSTS_MORE
        counts = [f"{what} on {n}" for n, what in (
            (int(loses.sum()), words.told(COSTS_MORE, study.spec["margin"])),
            (int((~loses).sum()), "these documents cannot tell")) if n]
        beginning = "; at the first step of the others " if len(some) else ": at the first step "
        said += beginning + words.listed(counts) + _enough(none[~loses])
    return f"With {shots} {said}."


def _enough(unknown: pd.DataFrame) -> str:
    """How many documents would tell on the tasks where these cannot."""
    known = unknown["next_documents"].dropna()
    finite = known[known < float("inf")]
    if finite.empty:
        return ""
    return f" ({finite.median():,.0f} documents a task would, in the median, if as large a share of them changed)"


def _bound(row: pd.Series, last: float) -> str:
    """`30 %`, and `90 % or more` where the curve ends there."""
    return f"{words.share(row['free_high'])}{' or more' if row['free_high'] >= last else ''}"


def _free_with_bound(row: pd.Series, last: float) -> str:
    """`10 % (unlimited documents might show up to 30 %)`."""
    more = row["free_high"] > row["free_fraction"] or row["free_high"] >= last
    return words.share(row["free_fraction"]) + (
        f" (unlimited documents might show up to {_bound(row, last)})" if more else "")


def free_fractions_table(study: Study, free: pd.DataFrame) -> Table:
    """How much can go, each task by its own order and all by one, and what is known of the next step."""
    margin = study.spec["margin"]
    keys = ["task", "num_fewshot", "component", "order"]
    first = free[keys].merge(first_differences(study.curves()), on=keys, how="left")
    frame = thousandths(free, "accuracy").assign(
        component=free["component"].replace({"head": "heads", "ffn": "FFNs"}),
        removed_by=["one order" if order == COMMON else "own order" for order in free["order"]],
        free=[words.share(f) if f == f else "not defined" for f in free["free_fraction"]],
        at_most=[words.share(f) if f == f else "" for f in free["free_high"]],
        interval=[words.bounds(low, high, margin) if fraction > 0 else "" for fraction, low, high in zip(
            free["free_fraction"], free["difference_low"], free["difference_high"], strict=True)],
        next_step=[f"{words.share(f)}: {words.bounds(low, high, margin)}" if f == f else "" for f, low, high
                   in zip(free["next_fraction"], free["next_low"], free["next_high"], strict=True)],
        there=[_next(row) for _, row in free.iterrows()],
        differs_at=[f"{words.share(f)} ({words.better_or_worse(d)})" if f == f else "no step" for f, d in zip(
            first["fraction"], first["difference"], strict=True)])
    columns = ["task", "num_fewshot", "component", "removed_by", "free", "at_most", "accuracy", "interval", "next_step",
               "there", "differs_at"]
    return Table(
        "Free fractions", f"Free: the largest share at which {words.told(WITHIN, margin)}, as at every step up to it; "
        "unlimited documents might show more, up to 'at most' (both are the ends of a 95 % interval); not defined "
        "where the full model is not shown to be above guessing or a constant answer. Removed by each task's own "
        "order, or by one order for all tasks. Accuracy at the free share, and the 95 % interval of its difference to "
        "the full model in points. Next step: the same of the first step that is not free. There: whether it is shown "
        "to cost more than the margin, or these documents cannot tell, and how many in all would, if as large a share "
        "of them changed. 'Differs at': the first step at which accuracy is shown to be better or worse than the full "
        "model's (McNemar's exact test, p < 0.05, corrected for the curve's steps by Holm's method).",
        plain_columns(frame[columns]))


def _next(row: pd.Series) -> str:
    """`costs more`; `cannot tell (about 1,900 documents would)`."""
    if row["next_verdict"] != row["next_verdict"]:
        return ""
    if row["next_verdict"] != UNKNOWN:
        return str(row["next_verdict"])
    needed = words.about(row["next_documents"])
    return f"cannot tell ({needed} would)" if needed else "cannot tell"


def tables(study: Study) -> Iterator[Table]:
    """Measured orders beside random ones, and accuracy along the curves."""
    beside = mean_first(study.against_random())
    if len(beside):
        rows = thousandths(beside, "accuracy", "random", "draw_low", "draw_high", "difference", "difference_low",
                            "difference_high")
        yield Table("Importance beside random orders", "Accuracy by the measured order and by random ones (their "
                    "mean, the least and the most accurate draw); the difference of the two, paired over documents "
                    "and draws, with its 95 % interval.", plain_columns(rows))
    curves = study.curves()
    pruned = curves[(curves["fraction"] > 0)]
    if len(pruned):
        wide = pruned.assign(percent=[f"{100 * f:.3g} %" for f in pruned["fraction"]]).pivot_table(
            index=["task", "num_fewshot", "component", "order"], columns="percent", values="accuracy", sort=False)
        yield Table("Accuracy along the curves", "Share removed across; the measured orders and the random one.",
                    plain_columns(wide.reset_index()))
