"""Heads and FFNs pruned jointly: the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from headcount.analysis.points import (
    Points,
    compared,
    finished,
    most_measured,
    points_of,
    removed_by,
    with_mean,
)
from headcount.analysis.rows import ALL_TASKS, OWN, OWN_ORDERS, Scoped, groups
from headcount.analysis.schema import OF_SCOPE, Column, Table, changes_of, columns, interval_of
from headcount.stats import intervals

GRID = Table(
    "grid", "Heads and FFNs pruned jointly: one row per task (and their mean), number of shots and pair of fractions.",
    columns(
        OF_SCOPE,
        Column("heads_fraction", "float64", "0..1", "share of all heads that is removed"),
        Column("ffns_fraction", "float64", "0..1", "share of all FFNs that is removed"),
        Column("heads_removed", "int64", "heads", "how many heads are removed"),
        Column("ffns_removed", "int64", "FFNs", "how many FFNs are removed"),
        Column("parameters_removed_share", "float64", "0..1", "which share of the model's parameters that removes"),
        Column("accuracy", "float64", "0..1", "mean of the task's metric over documents (and tasks)"),
        interval_of("the accuracy"),
        Column("difference", "float64", "-1..1", "accuracy less the full model's, on the same documents"),
        interval_of("the difference", "-1..1", "difference_low", "difference_high"),
        Column("p", "float64", "0..1", "exact paired test that as many documents got worse as better, cell by cell"),
        Column("documents", "int64", "documents", "evaluated documents, of all tasks together"),
        changes_of(),
        Column("verdict", "str", "", "what the interval says of a loss of the margin, cell by cell: `within`, `costs "
               "more` or `unknown`, which it also is where the full model is not above its baseline"),
        Column("within_margin", "bool", "", "whether the verdict is `within`"),
        Column("baseline", "float64", "0..1", "what is had without reading: the better of chance and the best constant "
               "answer"),
        Column("order", "str", "", "by whose order heads and FFNs go: `own`, each task's, or `all tasks`, that of "
               "all tasks together")))


def grid_table(
    evaluations: pd.DataFrame, margin: float, parameters: int, constants: Mapping[str, float],
    above: Mapping[tuple[str, int], bool],
) -> pd.DataFrame:
    """`Study.grid()`: points where one of the two is 0 come from the curves, on the grid's documents.

    Args:
        evaluations: `Study.evaluations()`.
        margin: The loss of accuracy that must be ruled out for a point to be within it.
        parameters: Of the whole model.
        constants: By task, what the best constant answer gets (`stats.baseline`).
        above: By task and number of shots, whether the full model is shown to be above its baseline.
    """
    rows = evaluations[evaluations["split"] == "evaluation"]
    by_shots: dict[int, dict[str, Points]] = {}
    for (task, k), of_task in groups(rows[rows["order"] == "grid"], "task", "num_fewshot"):
        same = rows[(rows["task"] == task) & (rows["num_fewshot"] == k)]
        of_task, full = _measured_alike(of_task), same[same["order"] == "none"]
        if full.empty:
            continue
        points = points_of(of_task, full, constant=constants.get(str(task), 0.0))
        steps = (set(of_task["fraction"]), set(of_task["ffn_fraction"]))
        curves = same[same["order"].isin(OWN_ORDERS) & same["doc_id"].isin(of_task["doc_id"].unique())]
        own = not (of_task["donor_scope"] == ALL_TASKS).any()
        for (component, fraction), of_point in groups(curves, "component", "fraction"):
            if own and fraction in steps[component == "ffn"]:
                points.add((fraction, 0.0) if component == "head" else (0.0, fraction), of_point)
        for (heads, ffns), of_point in groups(of_task, "fraction", "ffn_fraction"):
            points.add((heads, ffns), of_point)
        by_shots.setdefault(int(k), {})[str(task)] = points
    cells = [row for k, of_tasks in sorted(by_shots.items())
             for scoped, members in with_mean(of_tasks, finished(of_tasks))
             for row in _grid_rows(scoped, k, list(members.values()), margin, parameters, above.get((scoped.task, k)))]
    together = (rows.loc[rows["order"] == "grid", "donor_scope"] == ALL_TASKS).any()
    return GRID.frame({**row, "order": ALL_TASKS if together else OWN} for row in cells)


def _grid_rows(
    scoped: Scoped, k: int, tasks: Sequence[Points], margin: float, parameters: int, above: bool | None
) -> list[dict[str, Any]]:
    """Rows of one grid; `above` is None for a mean over tasks, whose own interval says whether it is above."""
    keys = sorted(set.intersection(*({*t.values} for t in tasks)))
    of_keys = compared(tasks, [None, *keys])
    baseline = float(np.mean([t.baseline for t in tasks]))
    # At chance there is nothing to lose: no cell is shown to be within the margin of anything.
    able = of_keys[None].low > baseline if above is None else above
    rows = []
    for key in [None, *keys]:
        one, removed = of_keys[key], removed_by(tasks, key)
        heads, ffns = key or (0.0, 0.0)
        told = intervals.verdict(one.difference_low, one.difference_high, margin) if key else intervals.WITHIN
        rows.append({**scoped._asdict(), "num_fewshot": k, "heads_fraction": heads, "ffns_fraction": ffns,
                     "heads_removed": int(removed.heads), "ffns_removed": int(removed.ffns),
                     "parameters_removed_share": removed.parameters / parameters, **vars(one),
                     "verdict": told if able else intervals.UNKNOWN,
                     "within_margin": able and told == intervals.WITHIN, "baseline": baseline})
    return rows


def _measured_alike(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the documents that all points have: some may have been measured on more of them, or fewer, before.

    Which documents are the first so many, a point that has as many tells: protocol "paper" shuffles them.
    """
    of_each = rows.groupby(["fraction", "ffn_fraction"])["doc_id"].transform("nunique")
    most = most_measured(rows.groupby(["fraction", "ffn_fraction"])["doc_id"].nunique().tolist())
    return rows[rows["doc_id"].isin(rows.loc[of_each == most, "doc_id"]) & (of_each >= most)]


def reachable(cells: pd.DataFrame) -> pd.Series:
    """Which cells of one grid are within the margin, and so is every step of some way to them from the full model."""
    at = list(zip(cells["heads_fraction"], cells["ffns_fraction"], strict=True))
    within = dict(zip(at, cells["within_margin"].astype(bool), strict=True))
    heads, ffns = sorted({h for h, _ in at}), sorted({f for _, f in at})
    reached: set[tuple[float, float]] = set()
    for i, h in enumerate(heads):
        for j, f in enumerate(ffns):
            before = {(heads[i - 1], f)} if i else set()
            before |= {(h, ffns[j - 1])} if j else set()
            if within.get((h, f)) and (not before or before & reached):
                reached.add((h, f))
    return pd.Series([cell in reached for cell in at], index=cells.index, dtype=bool)
