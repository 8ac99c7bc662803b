"""Heads and FFNs pruned jointly: the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from headcount.analysis.curves import OWN, OWN_ORDERS
from headcount.analysis.points import (
    MEAN,
    Points,
    compared,
    finished,
    groups,
    most_measured,
    points_of,
    removed_by,
    with_mean,
)
from headcount.stats import intervals

GRID = ["task", "num_fewshot", "heads_fraction", "ffns_fraction", "heads_removed", "ffns_removed",
        "parameters_removed_share", "accuracy", "low", "high", "difference", "difference_low", "difference_high", "p",
        "documents", "changed", "fell", "rose", "verdict", "within_margin", "baseline", "order"]


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
        own = not (of_task["donor"] == MEAN).any()
        for (component, fraction), of_point in groups(curves, "component", "fraction"):
            if own and fraction in steps[component == "ffn"]:
                points.add((fraction, 0.0) if component == "head" else (0.0, fraction), of_point)
        for (heads, ffns), of_point in groups(of_task, "fraction", "ffn_fraction"):
            points.add((heads, ffns), of_point)
        by_shots.setdefault(int(k), {})[str(task)] = points
    found = [row for k, of_tasks in sorted(by_shots.items())
             for task, members in with_mean(of_tasks, finished(of_tasks))
             for row in _grid_rows(task, k, list(members.values()), margin, parameters, above.get((task, k)))]
    together = (rows.loc[rows["order"] == "grid", "donor"] == MEAN).any()
    return pd.DataFrame(found, columns=[c for c in GRID if c != "order"]).assign(order=MEAN if together else OWN)


def _grid_rows(
    task: str, k: int, tasks: Sequence[Points], margin: float, parameters: int, above: bool | None
) -> list[dict[str, Any]]:
    """Rows of one grid; `above` is None for a mean over tasks, whose own interval says whether it is above."""
    keys = sorted(set.intersection(*({*t.values} for t in tasks)))
    found = compared(tasks, [None, *keys])
    baseline = float(np.mean([t.baseline for t in tasks]))
    # At chance there is nothing to lose: no cell is shown to be within the margin of anything.
    able = found[None].low > baseline if above is None else above
    rows = []
    for key in [None, *keys]:
        one, removed = found[key], removed_by(tasks, key)
        heads, ffns = key or (0.0, 0.0)
        told = intervals.verdict(one.difference_low, one.difference_high, margin) if key else intervals.WITHIN
        rows.append({"task": task, "num_fewshot": k, "heads_fraction": heads, "ffns_fraction": ffns,
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
    found: set[tuple[float, float]] = set()
    for i, h in enumerate(heads):
        for j, f in enumerate(ffns):
            before = {(heads[i - 1], f)} if i else set()
            before |= {(h, ffns[j - 1])} if j else set()
            if within.get((h, f)) and (not before or before & found):
                found.add((h, f))
    return pd.Series([cell in found for cell in at], index=cells.index, dtype=bool)
