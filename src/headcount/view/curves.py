"""Pruning curves and free fractions: what is left as the least important heads, or FFNs, go.

Curves pair every pruned model with the full one, document by document (`headcount.view.points`). Steps of a curve are
tested together: p-values are corrected for their number (Holm).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from headcount import stats
from headcount.view.points import MEAN, Points, compared, finished, groups, points_of, removed_by, with_mean

COLUMNS = ["task", "num_fewshot", "component", "order", "fraction", "removed", "parameters_removed",
           "parameters_removed_share", "accuracy", "low", "high", "difference", "difference_low", "difference_high",
           "p", "documents", "changed"]
FREE_COLUMNS = ["task", "num_fewshot", "component", "order", "free_fraction", "free_high", "reason", "removed",
                "parameters_removed", "accuracy", "difference_low", "difference_high", "changed", "full_accuracy",
                "full_low", "baseline", "tasks", "above_chance", "above_chance_difference", "above_chance_low",
                "above_chance_high"]
ByShots = Mapping[int, Mapping[str, Points]]


def curve_points(
    evaluations: pd.DataFrame, tasks: Mapping[str, float], fractions: Collection[float | int]
) -> dict[int, dict[str, Points]]:
    """The evaluated documents of every number of shots and task that has its full model, with all points of curves.

    Args:
        evaluations: `Study.evaluations()`.
        tasks: In the order in which they are wanted, and what the best constant answer to each gets
            (`stats.baseline`); other tasks are left out.
        fractions: Those of curves: a task that was unseen has random orders at transfer's.
    """
    rows = evaluations[(evaluations["split"] == "evaluation") & evaluations["task"].isin(list(tasks))]
    found: dict[int, dict[str, Points]] = {}
    by_key = {(str(task), int(k)): group for (task, k), group in groups(rows, "task", "num_fewshot")}
    for task, k in sorted(by_key, key=lambda key: (list(tasks).index(key[0]), key[1])):
        group = by_key[task, k]
        full = group[group["order"] == "none"]
        curves = group[group["order"].isin(["gradient", "oracle", "random"]) & group["fraction"].isin(list(fractions))]
        if full.empty:
            continue
        points = points_of(curves, full, constant=tasks[task])
        for key, of_key in groups(curves, "component", "order", "fraction"):
            points.add((str(key[0]), str(key[1]), float(key[2])), of_key)
        found.setdefault(k, {})[task] = points
    return dict(sorted(found.items()))


def curve_table(points: ByShots, parameters: int) -> pd.DataFrame:
    """`Study.curves()`; tasks first, then their means, by number of shots."""
    rows: list[dict[str, Any]] = []
    of_means: list[dict[str, Any]] = []
    for k, of_tasks in points.items():
        for task, members in with_mean(of_tasks, finished(of_tasks)):
            (of_means if task == MEAN else rows).extend(_curve_rows(task, k, list(members.values()), parameters))
    order = list(dict.fromkeys(task for of_tasks in points.values() for task in of_tasks))
    rows.sort(key=lambda row: (order.index(row["task"]), row["num_fewshot"]))
    return pd.DataFrame([*rows, *of_means], columns=COLUMNS)


def _curve_rows(task: str, k: int, tasks: Sequence[Points], parameters: int) -> Iterator[dict[str, Any]]:
    """Rows of the points that every task has; heads come before FFNs, measured orders before random ones."""
    keys: list[Any] = [key for key in tasks[0].values if all(key in t.values for t in tasks)]
    keys.sort(key=lambda key: (key[0] != "head", key[1] == "random", key))
    found, _ = compared(tasks, [None, *keys])
    for component, order in dict.fromkeys(key[:2] for key in keys) or [("none", "none")]:
        steps = [None, *(key for key in keys if key[:2] == (component, order))]
        corrected = stats.holm(np.array([np.nan, *(found[key].p for key in steps[1:])]))
        for key, p in zip(steps, corrected, strict=True):
            one, removed = found[key], removed_by(tasks, key)
            yield {"task": task, "num_fewshot": k, "component": component, "order": order,
                   "fraction": key[2] if key else 0.0,
                   "removed": int(removed.heads if component == "head" else removed.ffns),
                   "parameters_removed": removed.parameters,
                   "parameters_removed_share": removed.parameters / parameters, **vars(one), "p": p}


def free_table(curves: pd.DataFrame, points: ByShots, margin: float) -> pd.DataFrame:
    """`Study.free_fractions()`.

    Args:
        curves: `Study.curves()`.
        points: From `curve_points`.
        margin: The loss of accuracy that must be ruled out.
    """
    measured = curves[~curves["order"].isin(["random", "none"])]
    full = curves[(curves["fraction"] == 0) & (curves["task"] != MEAN)].set_index(["task", "num_fewshot"])["low"]
    lows = full[~full.index.duplicated()]
    rows = []
    for (task, k, component, order), curve in groups(measured, "task", "num_fewshot", "component", "order"):
        members = finished(points[k]) if task == MEAN else {task: points[k][task]}
        able = [t for name, t in members.items() if lows[name, k] > t.baseline]
        rows.append({"task": task, "num_fewshot": k, "component": component, "order": order,
                     **_free(curve, list(members.values()), able, margin)})
    return pd.DataFrame(rows, columns=FREE_COLUMNS)


def _free(
    curve: pd.DataFrame, tasks: Sequence[Points], able: Sequence[Points], margin: float
) -> dict[str, Any]:
    full = curve.iloc[0]
    # A tenth of six FFNs is none of them: where nothing is removed nothing is shown to be free.
    curve = curve[(curve["fraction"] == 0) | (curve["removed"] > 0)]
    baseline = float(np.mean([t.baseline for t in tasks]))
    found = {"reason": "", "full_accuracy": full["accuracy"], "full_low": full["low"], "baseline": baseline,
             "tasks": len(tasks), "above_chance": len(able)}
    if not full["low"] > baseline:
        reason = (f"the full model's accuracy, {full['accuracy']:.2f} (at least {full['low']:.2f}), is not shown to be "
                  f"above {baseline:.2f}, which guessing or a constant answer gets")
        return {**found, "free_fraction": np.nan, "reason": reason}
    steps = curve[["component", "order", "fraction"]].itertuples(index=False, name=None)
    _, differences = compared(tasks, [None if key[2] == 0 else key for key in steps])
    free, high = stats.free_fraction_interval(curve["fraction"].tolist(), differences, margin)
    at = curve[curve["fraction"] == free].iloc[0]
    # Tasks at chance have little to lose, and hide in a mean what the others do.
    bounds = [at[name] for name in ("difference", "difference_low", "difference_high")]
    if free > 0 and 0 < len(able) < len(tasks):
        key = (at["component"], at["order"], at["fraction"])
        one = compared(able, [key])[0][key]
        bounds = [one.difference, one.difference_low, one.difference_high]
    if able:
        found |= dict(zip(("above_chance_difference", "above_chance_low", "above_chance_high"), bounds, strict=True))
    return {**found, "free_fraction": free, "free_high": high,
            **{name: at[name] for name in ("removed", "parameters_removed", "accuracy", "difference_low",
                                           "difference_high", "changed")}}
