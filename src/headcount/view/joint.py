"""Heads and FFNs pruned jointly (the grid), and tasks pruned by the orders of others (transfer)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from headcount import intervals
from headcount.view.curves import OWN_ORDERS, RANDOM
from headcount.view.points import (
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

GRID = ["task", "num_fewshot", "heads_fraction", "ffns_fraction", "heads_removed", "ffns_removed",
        "parameters_removed_share", "accuracy", "low", "high", "difference", "difference_low", "difference_high", "p",
        "documents", "changed", "fell", "rose", "verdict", "within_margin", "baseline", "order"]
TRANSFER = ["task", "num_fewshot", "component", "donor", "fraction", "accuracy", "low", "high", "difference",
            "difference_low", "difference_high", "p", "documents", "changed", "fell", "rose", "unseen"]
OWN = "own"


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


def transfer_table(evaluations: pd.DataFrame, unseen: Sequence[str]) -> pd.DataFrame:
    """`Study.transfer()`: differences are to the task's own order, of an unseen task to the full model.

    Args:
        evaluations: `Study.evaluations()`.
        unseen: Tasks that have no order of their own.
    """
    rows = evaluations[evaluations["split"] == "evaluation"]
    moved = rows[rows["order"] == "transfer"]
    found: list[dict[str, Any]] = []
    for (k, component), of_kind in groups(moved, "num_fewshot", "component"):
        by_fraction: dict[float, dict[str, Points]] = {}
        for task, of_task in groups(of_kind, "task"):
            same = rows[(rows["task"] == task) & (rows["num_fewshot"] == k)]
            if not (same["order"] == "none").any():
                continue
            points = _transfer_points(_largest_jobs(of_task), same, component)
            for fraction in dict.fromkeys(key[1] for key in points.values):
                by_fraction.setdefault(fraction, {})[str(task)] = points
        found += _all_rows(by_fraction, unseen, int(k), component)
    table = pd.DataFrame(found, columns=TRANSFER).drop_duplicates(TRANSFER[:5])
    # The full model stands there once, for all fractions: there is no one order of the task's own to compare it with.
    apart = (table["donor"] == "none") & ~table["unseen"].astype(bool)
    table.loc[apart, ["difference", "difference_low", "difference_high", "p"]] = np.nan
    for name in ("changed", "fell", "rose"):
        table[name] = table[name].astype("Int64").mask(apart)
    return table.sort_values(["num_fewshot", "component"], kind="stable", ignore_index=True)


def _all_rows(
    by_fraction: Mapping[float, Mapping[str, Points]], unseen: Sequence[str], k: int, component: str
) -> Iterator[dict[str, Any]]:
    """Rows of every task, and of the mean over those that are done at each fraction."""
    known = {fraction: {task: points for task, points in of_tasks.items()
                        if task not in unseen and (OWN, fraction) in points.values}
             for fraction, of_tasks in sorted(by_fraction.items())}
    together = {fraction: _all_pairs(of_tasks, fraction) for fraction, of_tasks in known.items()}
    alike = len({frozenset(tasks) for tasks in together.values() if len(tasks) > 1}) < 2
    for fraction, of_tasks in known.items():
        for task, members in with_mean(of_tasks, together[fraction]):
            rows = _transfer_rows(task, k, component, fraction, members, unseen=False)
            # Where fewer tasks are done at some fractions, there is no one mean of the full model.
            yield from (row for row in rows if alike or task != MEAN or row["donor"] != "none")
        for task in (t for t in by_fraction[fraction] if t in unseen):
            yield from _transfer_rows(task, k, component, fraction, {task: by_fraction[fraction][task]}, unseen=True)


def _transfer_points(moved: pd.DataFrame, same: pd.DataFrame, component: str) -> Points:
    """The documents of one task, with what is left by (donor, fraction); its own and random orders from the curves."""
    points = points_of(moved, same[same["order"] == "none"])
    alike = same[(same["component"] == component) & same["doc_id"].isin(moved["doc_id"].unique())
                 & same["fraction"].isin(moved["fraction"].unique())]
    for name, orders in ((OWN, OWN_ORDERS), (RANDOM, [RANDOM])):
        for fraction, of_step in groups(alike[alike["order"].isin(orders)], "fraction"):
            points.add((name, fraction), of_step)
    for (donor, fraction), of_step in groups(moved, "donor", "fraction"):
        points.add((donor, fraction), of_step)
    return points


def _transfer_rows(
    task: str, k: int, component: str, fraction: float, tasks: Mapping[str, Points], *, unseen: bool
) -> list[dict[str, Any]]:
    own = None if unseen else (OWN, fraction)
    keys = [None, *dict.fromkeys(key for t in tasks.values() for key in t.values if key[1] == fraction)]
    shared = [key for key in keys if key is None or all(key in t.values for t in tasks.values())]
    found = compared(list(tasks.values()), shared, to=own)
    for key in (key for key in keys if key not in shared):
        # A task is no donor to itself: on the mean it is one to all others, or not yet.
        others = {name: t for name, t in tasks.items() if key in t.values}
        if {*tasks} - {*others} == {key[0]}:
            found |= compared(list(others.values()), [key], to=own)
    return [{"task": task, "num_fewshot": k, "component": component, "donor": key[0] if key else "none",
             "fraction": fraction if key else 0.0, **vars(found[key]), "unseen": unseen}
            for key in keys if key in found]


def _all_pairs(of_tasks: Mapping[str, Points], fraction: float) -> dict[str, Points]:
    """Tasks each of which was pruned by the order of every other, at this fraction; unfinished ones are left out."""
    found = dict(of_tasks)
    while found:
        lacking = {task: sum((other, fraction) not in points.values for other in found if other != task)
                   for task, points in found.items()}
        worst = max(lacking, key=lambda task: lacking[task])
        if not lacking[worst]:
            break
        del found[worst]
    return found


def unshown(evaluations: pd.DataFrame, grid: pd.DataFrame, transfer: pd.DataFrame) -> dict[str, int]:
    """How many points were measured that are in neither table: on fewer documents, or there is nothing beside them."""
    rows = evaluations[evaluations["split"] == "evaluation"]
    keys = ["task", "num_fewshot", "fraction"]
    cells = grid.rename(columns={"heads_fraction": "fraction", "ffns_fraction": "ffn_fraction"})
    found = {}
    for order, table, more in (("grid", cells, ["ffn_fraction"]), ("transfer", transfer, ["component", "donor"])):
        measured = set(rows.loc[rows["order"] == order, [*keys, *more]].itertuples(index=False, name=None))
        found[order] = len(measured - set(table[[*keys, *more]].itertuples(index=False, name=None)))
    return {order: n for order, n in found.items() if n}


def _measured_alike(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the documents that all points have: some may have been measured on more of them, or fewer, before.

    Which documents are the first so many, a point that has as many tells: protocol "paper" shuffles them.
    """
    of_each = rows.groupby(["fraction", "ffn_fraction"])["doc_id"].transform("nunique")
    most = most_measured(rows.groupby(["fraction", "ffn_fraction"])["doc_id"].nunique().tolist())
    return rows[rows["doc_id"].isin(rows.loc[of_each == most, "doc_id"]) & (of_each >= most)]


def _largest_jobs(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every donor and fraction one job's rows: one of enough documents, and of aggregates that of the most tasks."""
    by_step = [[job for _, job in groups(of_step, "job")] for _, of_step in groups(rows, "donor", "fraction")]
    enough = most_measured([max(map(len, jobs)) for jobs in by_step])
    fit = [[job for job in jobs if len(job) >= enough] for jobs in by_step]
    kept = [max(jobs, key=lambda job: (job["members"].iloc[0], len(job))) for jobs in fit if jobs]
    shared = set.intersection(*({*job["doc_id"]} for job in kept))
    together = pd.concat(kept)
    return together[together["doc_id"].isin(shared)]
