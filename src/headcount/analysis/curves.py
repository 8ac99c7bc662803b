"""Pruning curves and free fractions: what is left as the least important heads, or FFNs, go.

Curves pair every pruned model with the full one, document by document (`analysis.points`). Means over tasks are
unweighted, their intervals those of a stratified sample (`stats.intervals`); several random orders are averaged per
document first. Steps of a curve are tested together: p-values are corrected for their number (Holm).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from headcount.analysis.points import (
    ByShots,
    Key,
    Points,
    changes,
    compared,
    finished,
    points_of,
    removed_by,
    with_mean,
)
from headcount.analysis.rows import COMMON, MEAN, RANDOM, TASK, UNIFORM, UNIFORM_COMMON, Scoped, groups
from headcount.analysis.schema import (
    COMPONENT,
    OF_SCOPE,
    Column,
    Table,
    changes_of,
    columns,
    interval_of,
)
from headcount.stats import intervals
from headcount.stats.baselines import NO_INTERVAL
from headcount.stats.paired import holm
from headcount.stats.resampling import LEVEL

_ONE_SHAPE = "`uniform`, `uniform common`: by the same two, heads that leave every layer the same shape"
_ORDER = Column("order", "str", "", "`gradient` or `oracle`: each task's own, by that importance; `common`: that of "
                f"all tasks together, one set for all tasks; {_ONE_SHAPE}")
_FRACTION = Column("fraction", "float64", "0..1", "share of all heads, or FFNs, that is removed")
_VERDICT = ("`within` (a loss of the margin is ruled out), `costs more` (a loss of more than the margin is shown) "
            "or `unknown`")
CURVES = Table(
    "curves", "Pruning curves: one row per task (and their mean), number of shots, component, order and fraction.",
    columns(
        OF_SCOPE,
        Column("component", "str", "", "`head` or `ffn`; `none` in a study without curves"),
        Column("order", "str", "", "`gradient` or `oracle`: each task's own, by that importance; `common`: that of "
               f"all tasks together; {_ONE_SHAPE}; `random`; `none` in a study without curves"),
        Column("fraction", "float64", "0..1", "share of all heads, or FFNs, that is removed; 0 is the full model"),
        Column("removed", "int64", "components", "how many heads, or FFNs, are removed"),
        Column("parameters_removed", "float64", "parameters", "how many parameters that removes; the mean where "
               "several random orders are averaged"),
        Column("parameters_removed_share", "float64", "0..1", "which share of the model's parameters that is"),
        Column("accuracy", "float64", "0..1", "mean of the task's metric over documents (and tasks)"),
        interval_of("the accuracy"),
        Column("difference", "float64", "-1..1", "accuracy less the full model's, on the same documents"),
        interval_of("the difference", "-1..1", "difference_low", "difference_high"),
        Column("verdict", "str", "", f"what the interval says of a loss of the study's margin: {_VERDICT}"),
        Column("p", "float64", "0..1", "exact paired test that as many documents got worse as better, corrected for "
               "the curve's steps (Holm); missing at fraction 0"),
        Column("documents", "int64", "documents", "evaluated documents, of all tasks together"),
        changes_of(),
        Column("draws", "int64", "orders", "random orders that are averaged; 1 of other orders")),
    "Fraction 0 is repeated for each order; a study without curves has it once, with component and order `none`.")
FREE_FRACTIONS = Table(
    "free_fractions", "How much can go: one row per task (and their mean), number of shots, component and measured "
    "order.",
    columns(
        OF_SCOPE, COMPONENT, _ORDER,
        Column("free_fraction", "float64", "0..1", "the largest share with a loss of the margin ruled out at every "
               "step up to it; missing where it is not defined"),
        Column("free_high", "float64", "0..1", "how much unlimited documents might show: with free_fraction the 95 % "
               "interval"),
        Column("reason", "str", "", "why it is not defined; empty where it is"),
        Column("removed", "float64", "components", "heads, or FFNs, removed at the free fraction"),
        Column("parameters_removed", "float64", "parameters", "parameters removed there"),
        Column("accuracy", "float64", "0..1", "accuracy there"),
        interval_of("the difference to the full model there", "-1..1", "difference_low", "difference_high"),
        Column("changed", "float64", "documents", "documents whose metric differs there"),
        Column("full_accuracy", "float64", "0..1", "accuracy of the full model"),
        Column("full_low", "float64", "0..1", "lower bound of its 95 % interval"),
        Column("baseline", "float64", "0..1", "what is had without reading: the better of chance and the best constant "
               "answer"),
        Column("tasks", "int64", "tasks", "how many tasks the row is over"),
        Column("above_chance", "int64", "tasks", "on how many of them the full model is shown to be above its "
               "baseline"),
        Column("above_chance_difference", "float64", "-1..1", "difference at the free fraction on the mean of those "
               "alone; tasks and share were chosen on these documents"),
        interval_of("it", "-1..1", "above_chance_low", "above_chance_high"),
        Column("next_fraction", "float64", "0..1", "the next step; missing where there is none"),
        Column("next_removed", "float64", "components", "heads, or FFNs, removed there"),
        Column("next_difference", "float64", "-1..1", "difference to the full model there"),
        interval_of("it", "-1..1", "next_low", "next_high"),
        Column("next_verdict", "str", "", f"what the interval says there: {_VERDICT}"),
        Column("next_documents", "float64", "documents", "how many documents of all tasks together would tell, if as "
               "large a share of them changed; infinite where the loss seen is the margin"),
        Column("documents", "int64", "documents", "evaluated documents, of all tasks together")))
AGAINST_RANDOM = Table(
    "against_random", "Measured orders beside random ones: one row per task (and their mean), number of shots, "
    "component, order and fraction.",
    columns(
        OF_SCOPE, COMPONENT, _ORDER, _FRACTION,
        Column("accuracy", "float64", "0..1", "accuracy by the measured order"),
        Column("random", "float64", "0..1", "mean accuracy of the random orders"),
        Column("draws", "int64", "orders", "how many random orders"),
        Column("draw_low", "float64", "0..1", "accuracy of the least accurate of them"),
        Column("draw_high", "float64", "0..1", "accuracy of the most accurate of them"),
        Column("difference", "float64", "-1..1", "accuracy less random"),
        interval_of("the difference, over documents and draws; missing for a single draw", "-1..1", "difference_low",
                    "difference_high")))


def curve_points(
    evaluations: pd.DataFrame, tasks: Mapping[str, float], fractions: Mapping[str, Collection[float | int]]
) -> dict[int, dict[str, Points]]:
    """The evaluated documents of every number of shots and task that has its full model, with all points of curves.

    Args:
        evaluations: `Study.evaluations()`, of the scores that are shown.
        tasks: In the order in which they are wanted, and what the best constant answer to each gets
            (`stats.baseline`); other tasks are left out.
        fractions: Those of curves, by order ("gradient", "oracle", "common", "random", ...): a task that was unseen
            has random orders at transfer's.
    """
    rows = evaluations[(evaluations["split"] == "evaluation") & evaluations["task"].isin(list(tasks))]
    by_shots: dict[int, dict[str, Points]] = {}
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
        by_shots.setdefault(k, {})[task] = points
    return dict(sorted(by_shots.items()))


def curve_table(points: ByShots, parameters: int, margin: float) -> pd.DataFrame:
    """`Study.curves()`; tasks first, then their means, by number of shots."""
    rows: list[dict[str, Any]] = []
    of_means: list[dict[str, Any]] = []
    for k, of_tasks in points.items():
        for scoped, members in with_mean(of_tasks, finished(of_tasks)):
            (rows if scoped.scope == TASK else of_means).extend(
                _curve_rows(scoped, k, list(members.values()), parameters, margin))
    order = list(dict.fromkeys(task for of_tasks in points.values() for task in of_tasks))
    rows.sort(key=lambda row: (order.index(row["task"]), row["num_fewshot"]))
    return CURVES.frame([*rows, *of_means])


def _curve_rows(
    scoped: Scoped, k: int, tasks: Sequence[Points], parameters: int, margin: float
) -> Iterator[dict[str, Any]]:
    """Rows of the points that every task has; heads before FFNs, own orders before the common one and random ones."""
    keys: list[Any] = [key for key in tasks[0].values if all(key in t.values for t in tasks)]
    last = (COMMON, UNIFORM, UNIFORM_COMMON, RANDOM)
    keys.sort(key=lambda key: (key[0] != "head", last.index(key[1]) + 1 if key[1] in last else 0, key))
    of_keys = compared(tasks, [None, *keys])
    for component, order in dict.fromkeys(key[:2] for key in keys) or [("none", "none")]:
        steps = [None, *(key for key in keys if key[:2] == (component, order))]
        corrected = holm(np.array([np.nan, *(of_keys[key].p for key in steps[1:])]))
        for key, p in zip(steps, corrected, strict=True):
            one, removed = of_keys[key], removed_by(tasks, key)
            yield {**scoped._asdict(), "num_fewshot": k, "component": component, "order": order,
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
    for (scope, task, k, component, order), curve in groups(
            measured, "scope", "task", "num_fewshot", "component", "order"):
        members = finished(points[k]) if scope == MEAN else {task: points[k][task]}
        able = [t for name, t in members.items() if above[name, k]]
        rows.append({"scope": scope, "task": task, "num_fewshot": k, "component": component, "order": order,
                     **_free(curve, list(members.values()), able, margin)})
    return FREE_FRACTIONS.frame(rows)


def _free(
    curve: pd.DataFrame, tasks: Sequence[Points], able: Sequence[Points], margin: float
) -> dict[str, Any]:
    full = curve.iloc[0]
    # A tenth of six FFNs is none of them: where nothing is removed nothing is shown to be free.
    curve = curve[(curve["fraction"] == 0) | (curve["removed"] > 0)]
    baseline = float(np.mean([t.baseline for t in tasks]))
    free_row = {"reason": "", "full_accuracy": full["accuracy"], "full_low": full["low"], "baseline": baseline,
             "tasks": len(tasks), "above_chance": len(able), "documents": full["documents"]}
    if np.isnan(full["low"]):
        return {**free_row, "free_fraction": np.nan, "reason": NO_INTERVAL}
    if not (full["low"] > baseline if len(tasks) > 1 else able):
        bound = f" (at least {full['low']:.2f})" if len(tasks) > 1 else ""
        corrected = "" if len(tasks) > 1 else " (an exact test, corrected for the number of tasks)"
        reason = (f"the full model's accuracy, {full['accuracy']:.2f}{bound}, is not shown to be above {baseline:.2f}, "
                  f"which guessing or a constant answer gets{corrected}")
        return {**free_row, "free_fraction": np.nan, "reason": reason}
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
        free_row |= dict(zip(("above_chance_difference", "above_chance_low", "above_chance_high"), bounds, strict=True))
    further = curve["fraction"] > free
    if further.any():
        following, needed = curve[further].iloc[0], intervals.documents_needed(steps, margin)[int((~further).sum())]
        free_row |= {f"next_{name}": following[column] for name, column in (
            ("fraction", "fraction"), ("removed", "removed"), ("difference", "difference"), ("low", "difference_low"),
            ("high", "difference_high"), ("verdict", "verdict"))} | {"next_documents": needed}
    return {**free_row, "free_fraction": free, "free_high": high,
            **{name: at[name] for name in ("removed", "parameters_removed", "accuracy", "difference_low",
                                           "difference_high", "changed")}}


def against_random(points: ByShots) -> pd.DataFrame:
    """`Study.against_random()`: measured orders beside random ones, paired over documents and over draws."""
    rows = []
    for k, of_tasks in points.items():
        for scoped, members in with_mean(of_tasks, finished(of_tasks)):
            tasks = list(members.values())
            shared = set.intersection(*({*t.values} for t in tasks))
            keys = sorted(key for key in shared if key[1] != RANDOM and (key[0], RANDOM, key[2]) in shared)
            for (component, order, fraction), beside in zip(keys, _beside(tasks, keys), strict=True):
                rows.append({**scoped._asdict(), "num_fewshot": k, "component": component, "order": order,
                             "fraction": fraction, **beside})
    return AGAINST_RANDOM.frame(rows)


def _beside(tasks: Sequence[Points], keys: Sequence[Key]) -> Iterator[dict[str, Any]]:
    """Measured orders, each less the mean of random ones that remove as many.

    Its interval has two parts whose distances to the estimate are added in squares: that over documents, of the
    differences to the draws' mean (`intervals.difference_interval`), and that over draws, Student's for the mean of
    one difference per draw. All tasks have the same draws, so that a draw's difference is one of the mean over tasks.
    """
    if not keys:
        return
    randoms = [(component, RANDOM, fraction) for component, _, fraction in keys]
    away = intervals.difference_interval([
        t.sample(np.stack([t.values[key] - t.values[random] for key, random in zip(keys, randoms, strict=True)]))
        for t in tasks])
    for key, random, *bounds in zip(keys, randoms, *away, strict=True):
        draws = min(len(t.draws[random]) for t in tasks)
        of_draws = np.mean([t.draws[random][:draws].mean(axis=1) for t in tasks], axis=0)
        accuracy = float(np.mean([t.values[key].mean() for t in tasks]))
        difference = accuracy - float(np.mean([t.values[random].mean() for t in tasks]))
        # One draw tells nothing of others.
        reach = float(stdtrit(draws - 1, (1 + LEVEL) / 2) * of_draws.std(ddof=1) / draws**0.5) if draws > 1 \
            else np.nan
        low, high = (float(np.hypot(bound - difference, reach)) for bound in bounds)
        yield {"accuracy": accuracy, "random": accuracy - difference, "draws": draws,
               "draw_low": float(of_draws.min()), "draw_high": float(of_draws.max()), "difference": difference,
               "difference_low": max(-1.0, difference - low) if draws > 1 else np.nan,
               "difference_high": min(1.0, difference + high) if draws > 1 else np.nan}


def first_differences(curves: pd.DataFrame) -> pd.DataFrame:
    """The first step of every measured curve at which accuracy differs from the full model's: p < .05 as corrected.

    Columns: scope; task; num_fewshot; component; order; fraction (NaN where no step does); difference (there).
    """
    keys = ["scope", "task", "num_fewshot", "component", "order"]
    steps = curves[(curves["fraction"] > 0) & ~curves["order"].isin([RANDOM, "none"])]
    differs = steps[steps["p"] < 0.05].drop_duplicates(keys)[[*keys, "fraction", "difference"]]
    first: pd.DataFrame = steps[keys].drop_duplicates().merge(differs, on=keys, how="left")
    return first
