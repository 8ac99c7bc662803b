"""Does similar importance of two tasks predict what one loses by the other's order? A scatter and its sentence."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import altair as alt
import pandas as pd

from headcount.analysis.prediction import PREDICTION, Predicted, predicted, prediction
from headcount.analysis.rows import most_shots, of_fraction
from headcount.analysis.study import Study
from headcount.report import words
from headcount.report.section import Section, Table, plain_columns, section, thousandths
from headcount.report.style import COMPONENTS, PALETTE, Chart, dressed, shots_column
from headcount.report.words import NAMES, shots

_SHOWN = 0.05  # of p


def prediction_scatter(pairs: pd.DataFrame, component: str) -> Chart:
    """What another task's order costs against how alike the two tasks rank the components; a dot for each pair.

    Args:
        pairs: The table of pairs.
        component: "head" or "ffn".
    """
    rows = of_fraction(pairs[pairs["component"] == component], None)
    data = pd.DataFrame({
        "task": rows["task"], "donor": rows["donor"], "num_fewshot": rows["num_fewshot"],
        "shots": rows["num_fewshot"].map(shots), "correlation": rows["correlation"], "cost": 100 * rows["cost"],
        "low": 100 * rows["cost_low"], "high": 100 * rows["cost_high"], "lost": 100 * rows["lost"]}).round(4)
    x = alt.X("correlation:Q", title="rank correlation of importance", scale=alt.Scale(zero=False, padding=12))
    title = "points lost beyond the own order"
    base = alt.Chart().encode(x=x)
    bars = base.mark_rule(color=PALETTE[0], opacity=0.35).encode(y=alt.Y("low:Q", title=title), y2=alt.Y2("high:Q"))
    dots = base.mark_circle(color=PALETTE[0], size=42, opacity=1).encode(
        y=alt.Y("cost:Q", title=title),
        tooltip=[alt.Tooltip("task:N", title="task"), alt.Tooltip("donor:N", title="pruned by the order of"), "shots:N",
                 alt.Tooltip("correlation:Q", title="rank correlation", format=".2f"),
                 alt.Tooltip("cost:Q", title="points beyond the own order", format="+.1f"),
                 alt.Tooltip("low:Q", title="at least (95 %)", format="+.1f"),
                 alt.Tooltip("high:Q", title="at most (95 %)", format="+.1f"),
                 alt.Tooltip("lost:Q", title="points against the full model", format="+.1f")])
    zero = alt.Chart(pd.DataFrame({"cost": [0.0]})).mark_rule(color="#888", strokeDash=[2, 3]).encode(y=alt.Y("cost:Q"))
    share = f"{100 * rows['fraction'].iloc[0]:.3g} % of {COMPONENTS[component]} removed"
    layers = alt.layer(zero, bars, dots, data=data).properties(width=285, height=240)
    return dressed(layers.facet(column=shots_column(data)).properties(title=share))


def prediction_sentence(pairs: pd.DataFrame, component: str) -> str:
    """Whether tasks that rank the components alike lose less by each other's order, at the most shots."""
    rows = most_shots(of_fraction(pairs[pairs["component"] == component], None))
    if rows.empty:
        return ""
    cost, lost = predicted(rows, "cost"), predicted(rows, "lost")
    beginning = (f"With {words.shots_of(rows)} and {words.share(rows['fraction'].iloc[0])} of the {NAMES[component]} "
                 "removed by another task's order, ")
    if cost.correlation != cost.correlation:
        return f"{beginning}not every pair of tasks is measured, or all lose alike: nothing can be said."
    return (f"{beginning}how alike the two tasks rank the {NAMES[component]} correlates (Spearman, over pairs of "
            f"{cost.tasks} tasks) at {_estimate(cost)} with what is lost beyond the task's own order, and at "
            f"{_estimate(lost)} with what is lost against the full model; {_meaning(cost)}.")


def _estimate(tested: Predicted) -> str:
    """`-0.52 (p = 0.01)`."""
    return words.number(tested.correlation) + words.bracketed(
        words.p_value(tested.p) if tested.p == tested.p else "")


def _meaning(cost: Predicted) -> str:
    """What the test says, in words."""
    if cost.p != cost.p:
        return "three tasks are too few for a test"
    if cost.p >= _SHOWN:
        return "similarity is not shown to predict what another task's order costs"
    direction = "less" if cost.correlation < 0 else "more"
    return f"the more alike two tasks rank them, the {direction} one loses by the other's order"


def sections(study: Study) -> Iterator[Section]:
    """A scatter for heads, and one for FFNs."""
    pairs = prediction(study.transfer(), study.correlations())
    for component, called in NAMES.items():
        if (pairs["component"] == component).any():
            yield section(
                f"prediction_{component}", f"Do tasks that rank alike lose less by each other's order? ({called})",
                functools.partial(prediction_scatter, pairs, component), prediction_sentence(pairs, component),
                "A dot for each pair of a pruned task and the task whose order is used, with the 95 % interval of what "
                "that costs. p: Mantel's test, two-sided, which permutes the tasks, since pairs that share a task are "
                "not independent.")


def tables(study: Study) -> Iterator[Table]:
    """The pairs in numbers."""
    pairs = prediction(study.transfer(), study.correlations())
    if len(pairs):
        rows = thousandths(pairs, "correlation", "low", "high", "lost", "cost", "cost_low", "cost_high")
        yield Table("Similarity and loss", "Every pair of a pruned task and a donor of the order: the rank correlation "
                    "of their importance with its 95 % interval, the accuracy lost against the full model, and the "
                    "cost, which is the accuracy lost beyond the task's own order, with its interval.",
                    plain_columns(rows), (PREDICTION.name, pairs))
