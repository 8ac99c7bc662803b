"""What is left as the least important components are removed: figures, sentences and tables of pruning curves."""

from __future__ import annotations

from collections.abc import Iterator

import altair as alt
import numpy as np
import pandas as pd

from headcount.analysis.curves import first_differences
from headcount.analysis.rows import COMMON, MEAN, TASK, labelled, labels_of, own_orders
from headcount.analysis.study import Study
from headcount.report import words
from headcount.report.curve_parts import (
    BANDS,
    OF_OWN_ORDER,
    costs_more,
    curve_data,
    curve_marks,
    curve_sentence,
    order_dashes,
    shape_words,
)
from headcount.report.section import Section, Table, mean_first, plain_columns, section, thousandths
from headcount.report.style import COMPONENTS, LEGEND, Chart, dressed, shots_colour
from headcount.report.uniform import uniform_sentence, uniform_tables
from headcount.report.words import COMPONENT_NAMES, better_or_worse, share, shots, signed, told
from headcount.stats.intervals import COSTS_MORE


def task_curves(curves: pd.DataFrame, component: str) -> Chart:
    """Accuracy of every task as one kind of component is removed: small multiples, the mean first."""
    labels = labels_of(curves)
    mean = labels.word(MEAN)
    rows = curve_data(labelled(curves[(curves["component"] == component)], labels))
    tasks = list(dict.fromkeys([*([mean] if (rows["task"] == mean).any() else []), *rows["task"]]))
    x = alt.X("percent:Q", title=f"{COMPONENTS[component]} removed (%)", scale=alt.Scale(domain=[0, 100]))
    base = alt.Chart().encode(x=x)
    band = base.transform_filter(OF_OWN_ORDER).mark_area(opacity=0.15).encode(
        y=alt.Y("low:Q", title="accuracy", scale=alt.Scale(domain=[0, 1])), y2=alt.Y2("high:Q"),
        color=shots_colour(rows))
    line = base.mark_line(strokeWidth=1.8).encode(y=alt.Y("accuracy:Q"), color=shots_colour(rows),
                                                  strokeDash=order_dashes(rows))
    chart = alt.layer(band, line, *curve_marks(base, rows, 16), data=rows).properties(width=180, height=125).facet(
        facet=alt.Facet("task:N", title=None, sort=tasks, header=alt.Header(labelFontSize=12, labelFontWeight="bold")),
        columns=4)
    return dressed(chart).configure_legend(orient="top", **LEGEND)


def common_sentence(study: Study, component: str) -> str:
    """What one set for all tasks costs beside each task's own order, at the most shots and the largest common step."""
    curves = study.curves()
    rows = curves[(curves["component"] == component) & (curves["scope"] == MEAN) & (curves["fraction"] > 0)]
    # Shares of uniform shapes are measured for these to be compared with.
    asked = study.spec.get("common_fractions") or list(rows["fraction"])
    common = rows[(rows["order"] == COMMON) & rows["fraction"].isin(asked)]
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
            f"(95 % interval {words.bounds(row['difference_low'], row['difference_high'], margin)}): "
            f"{told(row['verdict'], margin)}.{beside}{costs_more(study, row, float(row['fraction']))}")


def differences_sentence(study: Study, component: str) -> str:
    """From which step on accuracy is shown to be worse, or better, than the full model's, at the most shots."""
    first = own_orders(first_differences(study.curves()))
    first = first[first["component"] == component]
    if first.empty:
        return ""
    first = first[first["num_fewshot"] == first["num_fewshot"].max()]
    whole, single = first[first["scope"] == MEAN], first[first["scope"] == TASK]
    names, k = COMPONENT_NAMES[component][1], int(first["num_fewshot"].iloc[0])
    said = [f"{_first(whole)} of the {names} on all tasks' documents together"] if len(whole) else []
    said.append(f"on single tasks (not corrected for their number) {_first(single)}" if said or len(single) > 1
                else f"{_first(single)} of the {names} on {first['task'].iloc[0]}")
    return (f"With {shots(k)} accuracy is shown to differ from the full model's (McNemar's paired test over "
            f"documents, p < 0.05, corrected for a curve's steps by Holm's method) {'; '.join(said)}.")


def _first(steps: pd.DataFrame) -> str:
    """`first at 20 % (worse)`, `first at 10 to 30 % (3 worse, 1 better; 2 of 6 at no step)`, `at no step`."""
    known = steps.dropna(subset=["fraction"])
    if known.empty:
        return "at no step"
    least, most = known["fraction"].min(), known["fraction"].max()
    span = share(most) if least == most else f"{100 * least:.3g} to {share(most)}"
    worse, never = int((known["difference"] < 0).sum()), len(steps) - len(known)
    if len(steps) == 1:
        return f"first at {span} ({better_or_worse(known['difference'].iloc[0])})"
    counts = [f"{n} {word}" for n, word in ((worse, "worse"), (len(known) - worse, "better")) if n]
    rest = f"; {never} of {len(steps)} at no step" if never else ""
    return f"first at {span} ({', '.join(counts)}{rest})"


def sections(study: Study) -> Iterator[Section]:
    """Every task's curves, of heads and of FFNs."""
    curves = study.curves()
    pruned = curves[curves["component"] != "none"]
    if (pruned["component"] == "head").any():
        yield section("head_curves", "Pruning heads, task by task", lambda: task_curves(pruned, "head"),
                       _by_task(study, "head"), differences_sentence(study, "head"),
                       common_sentence(study, "head"), uniform_sentence(study.uniform_cost()),
                       shape_words(pruned), BANDS)
    if (pruned["component"] == "ffn").any():
        yield section("ffn_curves", "Pruning FFNs, task by task", lambda: task_curves(pruned, "ffn"),
                       _by_task(study, "ffn"), differences_sentence(study, "ffn"),
                       common_sentence(study, "ffn"), curve_sentence(study, "ffn"), BANDS)


def _by_task(study: Study, component: str) -> str:
    """How the free fraction differs between tasks, at the most shots at which it is defined, and what else is shown."""
    free = own_orders(study.free_fractions())
    free = free[(free["scope"] == TASK) & (free["component"] == component)]
    defined = free[free["free_fraction"].notna()]
    if defined.empty:
        return ("The full model is not shown to be above a baseline on any task, so no free fraction is defined."
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
    return f" (the median task would need {finite.median():,.0f} documents, if as large a share of them changed)"


def _bound(row: pd.Series, last: float) -> str:
    """`up to 30 %`, and `90 % or more` where the curve ends there."""
    bound = words.share(row["free_high"])
    return f"{bound} or more" if row["free_high"] >= last else f"up to {bound}"


def _free_with_bound(row: pd.Series, last: float) -> str:
    """`10 % (unlimited documents might show up to 30 %)`."""
    more = row["free_high"] > row["free_fraction"] or row["free_high"] >= last
    return words.share(row["free_fraction"]) + (
        f" (unlimited documents might show {_bound(row, last)})" if more else "")


def tables(study: Study) -> Iterator[Table]:
    """Measured orders beside random ones, and accuracy along the curves."""
    beside = mean_first(study.against_random())
    if len(beside):
        rows = thousandths(beside, "accuracy", "random", "draw_low", "draw_high", "difference", "difference_low",
                            "difference_high")
        yield Table("Importance beside random orders", "Accuracy by the measured order and by random ones (their "
                    "mean, the least and the most accurate draw); the difference of the two, paired over documents "
                    "and draws, with its 95 % interval.", plain_columns(rows))
    yield from uniform_tables(study)
    curves = study.curves()
    pruned = curves[(curves["fraction"] > 0)]
    if len(pruned):
        wide = labelled(pruned).assign(percent=[f"{100 * f:.3g} %" for f in pruned["fraction"]]).pivot_table(
            index=["task", "num_fewshot", "component", "order"], columns="percent", values="accuracy", sort=False)
        yield Table("Accuracy along the curves", "Columns: the share removed; rows: the measured "
                    "orders and the random ones.",
                    plain_columns(wide.reset_index()))
