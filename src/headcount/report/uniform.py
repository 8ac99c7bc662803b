"""What a shape costs, in words and as a table: curves that leave every layer the same shape beside free-form ones."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from headcount.analysis.rows import UNIFORM, UNIFORM_COMMON, groups, mean_or_first, most_shots, of_fraction
from headcount.analysis.study import Study
from headcount.report import words
from headcount.report.section import Table, mean_first, plain_columns, thousandths
from headcount.report.words import better_or_worse, share, signed

_BY = {UNIFORM: "by each task's own order", UNIFORM_COMMON: "by one order for all tasks"}
# Of more steps a sentence tells the first, that nearest to one half, and the last.
_STEPS_TOLD = 4


def uniform_sentence(cost: pd.DataFrame) -> str:
    """What one shape for every layer costs, at the most shots, on the mean over tasks (or the first task).

    Args:
        cost: `Study.uniform_cost()`, or some of its rows.
    """
    rows = mean_or_first(most_shots(cost))
    if rows.empty:
        return ""
    of_each = dict(groups(rows, "order"))
    differences = "; ".join(f"{_BY[order]} {_steps(of_order)}" for order, of_order in of_each.items())
    where = words.on(rows).removeprefix("on ")
    return ("What it costs that every layer keeps the same shape (as many KV groups, as many heads in each), beside as "
            f"many heads removed wherever they are least important, with {words.shots_of(rows)} on {where}: "
            f"{differences} (points of accuracy, paired over documents, 95 % intervals). {_shown(of_each)} Of heads "
            "alone: a model class has an FFN in every layer or in none.")


def _steps(rows: pd.DataFrame) -> str:
    """`-1.2 (-3.0 to +0.5) at 33.3 %, ...`."""
    if len(rows) > _STEPS_TOLD:
        rows = pd.concat([rows.iloc[[0]], of_fraction(rows, None), rows.iloc[[-1]]]).drop_duplicates("fraction")
    return ", ".join(f"{words.points(row)} at {share(row['fraction'])}" for _, row in rows.iterrows())


def _shown(of_each: dict[str, pd.DataFrame]) -> str:
    """At which steps a difference is shown."""
    test = "exact paired test, p < 0.05, corrected for a curve's steps by Holm's method"
    said = []
    for order, rows in of_each.items():
        for worse in (True, False):
            differ = rows[(rows["p"] < 0.05) & ((rows["difference"] < 0) == worse)]
            if len(differ):
                at = words.listed([share(fraction) for fraction in differ["fraction"]])
                said.append(f"{better_or_worse(-1 if worse else 1)} at {at} {_BY[order]}")
    if not said:
        return f"At no step these documents show a difference ({test})."
    return f"It is shown to be {'; '.join(said)} ({test})."


def uniform_tables(study: Study) -> Iterator[Table]:
    """Every step of the uniform curves beside its free-form partner."""
    cost = mean_first(study.uniform_cost())
    if cost.empty:
        return
    margin = study.spec["margin"]
    frame = thousandths(cost, "accuracy", "free_form_accuracy").assign(
        removed_by=cost["order"].map({UNIFORM: "own order", UNIFORM_COMMON: "one order"}),
        share_removed=[share(fraction) for fraction in cost["fraction"]],
        difference=[signed(x) for x in cost["difference"]],
        interval=[words.bounds(low, high, margin) if low == low else "" for low, high in zip(
            cost["difference_low"], cost["difference_high"], strict=True)],
        p=[words.p_number(p) for p in cost["p"]])
    yield Table(
        "Every layer of the same shape", "Heads removed so that every layer keeps as many KV groups, and every group "
        "as many heads, beside as many heads removed wherever they are least important (free form), by each task's own "
        "order or by one for all tasks. Parameters: how many go; keys and values go with whole groups alone. "
        "Difference of accuracy to the free form in points, paired over documents, with its 95 % interval; the verdict "
        f"on a loss of {words.points_of(margin)} against it; p of an exact paired test, corrected for a curve's steps.",
        plain_columns(frame[["scope", "task", "num_fewshot", "removed_by", "share_removed", "removed",
                             "parameters_removed", "free_form_parameters_removed", "accuracy", "free_form_accuracy",
                             "difference", "interval", "verdict", "p", "documents"]]))
