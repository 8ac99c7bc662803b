"""Tasks pruned by the orders of other tasks, and of all tasks together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from headcount.analysis.curves import OWN, OWN_ORDERS, RANDOM
from headcount.analysis.points import MEAN, Points, compared, groups, most_measured, points_of, with_mean
from headcount.analysis.rows import summary

TRANSFER = ["task", "num_fewshot", "component", "donor", "fraction", "accuracy", "low", "high", "difference",
            "difference_low", "difference_high", "p", "documents", "changed", "fell", "rose", "unseen"]


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


def _largest_jobs(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every donor and fraction one job's rows: one of enough documents, and of aggregates that of the most tasks."""
    by_step = [[job for _, job in groups(of_step, "job")] for _, of_step in groups(rows, "donor", "fraction")]
    enough = most_measured([max(map(len, jobs)) for jobs in by_step])
    fit = [[job for job in jobs if len(job) >= enough] for jobs in by_step]
    kept = [max(jobs, key=lambda job: (job["members"].iloc[0], len(job))) for jobs in fit if jobs]
    shared = set.intersection(*({*job["doc_id"]} for job in kept))
    together = pd.concat(kept)
    return together[together["doc_id"].isin(shared)]


def transferred(transfer: pd.DataFrame, component: str, *, unseen: bool) -> pd.DataFrame:
    """The rows of heads, or FFNs, and of tasks that have an order of their own, or have none."""
    return transfer[(transfer["component"] == component) & (transfer["unseen"].astype(bool) == unseen)]


def over_recipients(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per donor: the given mean over recipients, the only recipient, or the mean taken here, without interval.

    Args:
        rows: Of one number of shots and one fraction.
    """
    names = [t for t in dict.fromkeys(rows["task"]) if t != MEAN]
    if len(names) == 1 or (rows["task"] == MEAN).any():
        return summary(rows)
    columns = ["num_fewshot", "fraction", "accuracy", "difference"]
    mean: pd.DataFrame = rows.groupby("donor", sort=False, as_index=False)[columns].mean()
    return mean.assign(task=MEAN, difference_low=np.nan, difference_high=np.nan)
