"""Pruning curves and free fractions: what is left as the least important heads, or FFNs, go.

Curves pair every pruned model with the full one, document by document (`analysis.points`). Steps of a curve are
tested together: p-values are corrected for their number (Holm).


Heads and FFNs pruned jointly (the grid), and tasks pruned by the orders of others (transfer).

Which rows of an analysis' tables figures and sentences speak of, and the small tables made from them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from headcount.analysis.points import (
    MEAN,
    Key,
    Points,
    changes,
    compared,
    finished,
    groups,
    points_of,
    removed_by,
    with_mean,
)
from headcount.stats import intervals
from headcount.stats.baselines import NO_INTERVAL
from headcount.stats.paired import holm
from headcount.stats.resampling import LEVEL

COLUMNS = ["task", "num_fewshot", "component", "order", "fraction", "removed", "parameters_removed",
           "parameters_removed_share", "accuracy", "low", "high", "difference", "difference_low", "difference_high",
           "verdict", "p", "documents", "changed", "fell", "rose", "draws"]
FREE_COLUMNS = ["task", "num_fewshot", "component", "order", "free_fraction", "free_high", "reason", "removed",
                "parameters_removed", "accuracy", "difference_low", "difference_high", "changed", "full_accuracy",
                "full_low", "baseline", "tasks", "above_chance", "above_chance_difference", "above_chance_low",
                "above_chance_high", "next_fraction", "next_removed", "next_difference", "next_low", "next_high",
                "next_verdict", "next_documents", "documents"]
AGAINST_RANDOM = ["task", "num_fewshot", "component", "order", "fraction", "accuracy", "random", "draws", "draw_low",
                  "draw_high", "difference", "difference_low", "difference_high"]
# The one order for all tasks, that of their importance together; a task's own orders; draws.
COMMON, OWN_ORDERS, RANDOM = "common", ("gradient", "oracle"), "random"
ByShots = Mapping[int, Mapping[str, Points]]


def curve_points(
    evaluations: pd.DataFrame, tasks: Mapping[str, float], fractions: Mapping[str, Collection[float | int]]
) -> dict[int, dict[str, Points]]:
    """The evaluated documents of every number of shots and task that has its full model, with all points of curves.

    Args:
        evaluations: `Study.evaluations()`, of the scores that are shown.
        tasks: In the order in which they are wanted, and what the best constant answer to each gets
            (`stats.baseline`); other tasks are left out.
        fractions: Those of curves, by order ("gradient", "oracle", "common", "random"): a task that was unseen has
            random orders at transfer's.
    """
    rows = evaluations[(evaluations["split"] == "evaluation") & evaluations["task"].isin(list(tasks))]
    found: dict[int, dict[str, Points]] = {}
    by_key = {(str(task), int(k)): group for (task, k), group in groups(rows, "task", "num_fewshot")}
    for task, k in sorted(by_key, key=lambda key: (list(tasks).index(key[0]), key[1])):
        group = by_key[task, k]
        full = group[group["order"] == "none"]
        wanted = [(group["order"] == order) & group["fraction"].isin(list(steps)) for order, steps in fractions.items()]
        curves = group[np.logical_or.reduce(wanted)]
        if full.empty:
            continue
        points = points_of(curves, full, constant=tasks[task])
        for key, of_key in groups(curves, "component", "order", "fraction"):
            points.add((str(key[0]), str(key[1]), float(key[2])), of_key)
        found.setdefault(k, {})[task] = points
    return dict(sorted(found.items()))


def curve_table(points: ByShots, parameters: int, margin: float) -> pd.DataFrame:
    """`Study.curves()`; tasks first, then their means, by number of shots."""
    rows: list[dict[str, Any]] = []
    of_means: list[dict[str, Any]] = []
    for k, of_tasks in points.items():
        for task, members in with_mean(of_tasks, finished(of_tasks)):
            (of_means if task == MEAN else rows).extend(
                _curve_rows(task, k, list(members.values()), parameters, margin))
    order = list(dict.fromkeys(task for of_tasks in points.values() for task in of_tasks))
    rows.sort(key=lambda row: (order.index(row["task"]), row["num_fewshot"]))
    return pd.DataFrame([*rows, *of_means], columns=COLUMNS)


def _curve_rows(
    task: str, k: int, tasks: Sequence[Points], parameters: int, margin: float
) -> Iterator[dict[str, Any]]:
    """Rows of the points that every task has; heads before FFNs, own orders before the common one and random ones."""
    keys: list[Any] = [key for key in tasks[0].values if all(key in t.values for t in tasks)]
    keys.sort(key=lambda key: (key[0] != "head", key[1] == RANDOM, key[1] == COMMON, key))
    found = compared(tasks, [None, *keys])
    for component, order in dict.fromkeys(key[:2] for key in keys) or [("none", "none")]:
        steps = [None, *(key for key in keys if key[:2] == (component, order))]
        corrected = holm(np.array([np.nan, *(found[key].p for key in steps[1:])]))
        for key, p in zip(steps, corrected, strict=True):
            one, removed = found[key], removed_by(tasks, key)
            yield {"task": task, "num_fewshot": k, "component": component, "order": order,
                   "fraction": key[2] if key else 0.0,
                   "removed": int(removed.heads if component == "head" else removed.ffns),
                   "parameters_removed": removed.parameters,
                   "parameters_removed_share": removed.parameters / parameters, **vars(one), "p": p,
                   "verdict": intervals.verdict(one.difference_low, one.difference_high, margin),
                   "draws": min((len(t.draws[key]) for t in tasks), default=1) if key else 1}


def free_table(
    curves: pd.DataFrame, points: ByShots, margin: float, above: Mapping[tuple[str, int], bool]
) -> pd.DataFrame:
    """`Study.free_fractions()`.

    Args:
        curves: `Study.curves()`.
        points: From `curve_points`.
        margin: The loss of accuracy that must be ruled out.
        above: By task and number of shots, whether the full model is shown to be above its baseline.
    """
    measured = curves[~curves["order"].isin([RANDOM, "none"])]
    rows = []
    for (task, k, component, order), curve in groups(measured, "task", "num_fewshot", "component", "order"):
        members = finished(points[k]) if task == MEAN else {task: points[k][task]}
        able = [t for name, t in members.items() if above[name, k]]
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
             "tasks": len(tasks), "above_chance": len(able), "documents": full["documents"]}
    if np.isnan(full["low"]):
        return {**found, "free_fraction": np.nan, "reason": NO_INTERVAL}
    if not (full["low"] > baseline if len(tasks) > 1 else able):
        bound = f" (at least {full['low']:.2f})" if len(tasks) > 1 else ""
        corrected = "" if len(tasks) > 1 else " (an exact test, corrected for the number of tasks)"
        reason = (f"the full model's accuracy, {full['accuracy']:.2f}{bound}, is not shown to be above {baseline:.2f}, "
                  f"which guessing or a constant answer gets{corrected}")
        return {**found, "free_fraction": np.nan, "reason": reason}
    keys = [None if key[2] == 0 else key
            for key in curve[["component", "order", "fraction"]].itertuples(index=False, name=None)]
    steps = changes(tasks, keys)
    free, high = intervals.free_fraction_interval(curve["fraction"].tolist(), steps, margin)
    at = curve[curve["fraction"] == free].iloc[0]
    # Tasks at chance have little to lose, and hide in a mean what the others do.
    bounds = [at[name] for name in ("difference", "difference_low", "difference_high")]
    if free > 0 and 0 < len(able) < len(tasks):
        key = (at["component"], at["order"], at["fraction"])
        one = compared(able, [key])[key]
        bounds = [one.difference, one.difference_low, one.difference_high]
    if able:
        found |= dict(zip(("above_chance_difference", "above_chance_low", "above_chance_high"), bounds, strict=True))
    further = curve["fraction"] > free
    if further.any():
        following, needed = curve[further].iloc[0], intervals.documents_needed(steps, margin)[int((~further).sum())]
        found |= {f"next_{name}": following[column] for name, column in (
            ("fraction", "fraction"), ("removed", "removed"), ("difference", "difference"), ("low", "difference_low"),
            ("high", "difference_high"), ("verdict", "verdict"))} | {"next_documents": needed}
    return {**found, "free_fraction": free, "free_high": high,
            **{name: at[name] for name in ("removed", "parameters_removed", "accuracy", "difference_low",
                                           "difference_high", "changed")}}


def against_random(points: ByShots) -> pd.DataFrame:
    """`Study.against_random()`: measured orders beside random ones, paired over documents and over draws."""
    rows = []
    for k, of_tasks in points.items():
        for task, members in with_mean(of_tasks, finished(of_tasks)):
            tasks = list(members.values())
            shared = set.intersection(*({*t.values} for t in tasks))
            for component, order, fraction in sorted(key for key in shared if key[1] != RANDOM):
                random = (component, RANDOM, fraction)
                if random in shared:
                    rows.append({"task": task, "num_fewshot": k, "component": component, "order": order,
                                 "fraction": fraction, **_beside(tasks, (component, order, fraction), random)})
    return pd.DataFrame(rows, columns=AGAINST_RANDOM)


def _beside(tasks: Sequence[Points], key: Key, random: Key) -> dict[str, Any]:
    """A measured order less the mean of random ones.

    Its interval has two parts whose distances to the estimate are added in squares: that over documents, of the
    differences to the draws' mean (`intervals.difference_interval`), and that over draws, Student's for the mean of
    one difference per draw. All tasks have the same draws, so that a draw's difference is one of the mean over tasks.
    """
    away = intervals.difference_interval([t.sample((t.values[key] - t.values[random])[None]) for t in tasks])
    draws = min(len(t.draws[random]) for t in tasks)
    of_draws = np.mean([t.draws[random][:draws].mean(axis=1) for t in tasks], axis=0)
    accuracy = float(np.mean([t.values[key].mean() for t in tasks]))
    difference = accuracy - float(np.mean([t.values[random].mean() for t in tasks]))
    # One draw tells nothing of others.
    reach = float(student.ppf((1 + LEVEL) / 2, draws - 1) * of_draws.std(ddof=1) / draws**0.5) if draws > 1 \
        else np.nan
    low, high = (float(np.hypot(bound[0] - difference, reach)) for bound in away)
    return {"accuracy": accuracy, "random": accuracy - difference, "draws": draws, "draw_low": float(of_draws.min()),
            "draw_high": float(of_draws.max()), "difference": difference,
            "difference_low": max(-1.0, difference - low) if draws > 1 else np.nan,
            "difference_high": min(1.0, difference + high) if draws > 1 else np.nan}


OWN = "own"


def first_differences(curves: pd.DataFrame) -> pd.DataFrame:
    """The first step of every measured curve at which accuracy differs from the full model's: p < .05 as corrected.

    Columns: task; num_fewshot; component; order; fraction (NaN where no step does); difference (there).
    """
    keys = ["task", "num_fewshot", "component", "order"]
    steps = curves[(curves["fraction"] > 0) & ~curves["order"].isin([RANDOM, "none"])]
    differs = steps[steps["p"] < 0.05].drop_duplicates(keys)[[*keys, "fraction", "difference"]]
    found: pd.DataFrame = steps[keys].drop_duplicates().merge(differs, on=keys, how="left")
    return found


def own_orders(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each task's own order: neither the common one nor random ones."""
    return table[table["order"].isin(OWN_ORDERS)]
