"""Tasks pruned by the orders of other tasks, and of all tasks together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from headcount.analysis.points import Points, compared, most_measured, points_of, with_mean
from headcount.analysis.rows import MEAN, NONE, OWN, OWN_ORDERS, RANDOM, TASK, Scoped, groups, of_scope, summary
from headcount.analysis.schema import COMPONENT, OF_SCOPE, Column, Table, changes_of, columns, interval_of

TRANSFER = Table(
    "transfer", "Tasks pruned by other tasks' orders: one row per task (and their mean), number of shots, component, "
    "donor and fraction.",
    columns(
        OF_SCOPE, COMPONENT,
        Column("donor_scope", "str", "", "whose order removes: `none` (the full model), `own` (the task's), `task` "
               "(another task's), `all tasks` (together), `other tasks` (all but this one, together) or `random`"),
        Column("donor", "str", "", "name of the other task whose order removes; empty where it is no single one's"),
        Column("fraction", "float64", "0..1", "share of all heads, or FFNs, that is removed; 0 is the full model"),
        Column("accuracy", "float64", "0..1", "mean of the task's metric over documents (and tasks)"),
        interval_of("the accuracy"),
        Column("difference", "float64", "-1..1", "accuracy less that by the task's own order; of an unseen task, less "
               "the full model's"),
        interval_of("the difference", "-1..1", "difference_low", "difference_high"),
        Column("p", "float64", "0..1", "exact paired test that as many documents are worse as better, one by one"),
        Column("documents", "int64", "documents", "evaluated documents, of all tasks together"),
        changes_of("Int64"),
        Column("unseen", "bool", "", "whether the task had no part in any order")),
    "The full model has no difference where a task has an order of its own, and no mean where some fractions' means "
    "are over fewer tasks. On the mean, a donor serves all tasks but itself, so that two donors' means are not over "
    "the same tasks.")
_KEYS = ["scope", "task", "num_fewshot", "component", "donor_scope", "donor", "fraction"]
_OWN, _RANDOM = Scoped(OWN), Scoped(RANDOM)


def transfer_table(evaluations: pd.DataFrame, unseen: Sequence[str]) -> pd.DataFrame:
    """`Study.transfer()`: differences are to the task's own order, of an unseen task to the full model.

    Args:
        evaluations: `Study.evaluations()`.
        unseen: Tasks that have no order of their own.
    """
    rows = evaluations[evaluations["split"] == "evaluation"]
    moved = rows[rows["order"] == "transfer"]
    all_rows: list[dict[str, Any]] = []
    for (k, component), of_kind in groups(moved, "num_fewshot", "component"):
        by_fraction: dict[float, dict[str, Points]] = {}
        for task, of_task in groups(of_kind, "task"):
            same = rows[(rows["task"] == task) & (rows["num_fewshot"] == k)]
            if not (same["order"] == "none").any():
                continue
            points = _transfer_points(_largest_jobs(of_task), same, component)
            for fraction in dict.fromkeys(key[1] for key in points.values):
                by_fraction.setdefault(fraction, {})[str(task)] = points
        all_rows += _all_rows(by_fraction, unseen, int(k), component)
    table = TRANSFER.frame(all_rows).drop_duplicates(_KEYS)
    # The full model stands there once, for all fractions: there is no one order of the task's own to compare it with.
    apart = (table["donor_scope"] == NONE) & ~table["unseen"]
    table.loc[apart, ["difference", "difference_low", "difference_high", "p"]] = np.nan
    for name in ("changed", "fell", "rose"):
        table[name] = table[name].mask(apart)
    return table.sort_values(["num_fewshot", "component"], kind="stable", ignore_index=True)


def _all_rows(
    by_fraction: Mapping[float, Mapping[str, Points]], unseen: Sequence[str], k: int, component: str
) -> Iterator[dict[str, Any]]:
    """Rows of every task, and of the mean over those that are done at each fraction."""
    known = {fraction: {task: points for task, points in of_tasks.items()
                        if task not in unseen and (_OWN, fraction) in points.values}
             for fraction, of_tasks in sorted(by_fraction.items())}
    together = {fraction: _all_pairs(of_tasks, fraction) for fraction, of_tasks in known.items()}
    alike = len({frozenset(tasks) for tasks in together.values() if len(tasks) > 1}) < 2
    for fraction, of_tasks in known.items():
        for scoped, members in with_mean(of_tasks, together[fraction]):
            rows = _transfer_rows(scoped, k, component, fraction, members, unseen=False)
            # Where fewer tasks are done at some fractions, there is no one mean of the full model.
            yield from (row for row in rows if alike or scoped.scope != MEAN or row["donor_scope"] != NONE)
        for task in (t for t in by_fraction[fraction] if t in unseen):
            yield from _transfer_rows(Scoped(TASK, task), k, component, fraction, {task: by_fraction[fraction][task]},
                                      unseen=True)


def _transfer_points(moved: pd.DataFrame, same: pd.DataFrame, component: str) -> Points:
    """The documents of one task, with what is left by (donor, fraction); its own and random orders from the curves."""
    points = points_of(moved, same[same["order"] == "none"])
    alike = same[(same["component"] == component) & same["doc_id"].isin(moved["doc_id"].unique())
                 & same["fraction"].isin(moved["fraction"].unique())]
    for donor, orders in ((_OWN, OWN_ORDERS), (_RANDOM, [RANDOM])):
        for fraction, of_step in groups(alike[alike["order"].isin(orders)], "fraction"):
            points.add((donor, fraction), of_step)
    for (scope, task, fraction), of_step in groups(moved, "donor_scope", "donor", "fraction"):
        points.add((Scoped(scope, task), fraction), of_step)
    return points


def _transfer_rows(
    scoped: Scoped, k: int, component: str, fraction: float, tasks: Mapping[str, Points], *, unseen: bool
) -> list[dict[str, Any]]:
    own = None if unseen else (_OWN, fraction)
    keys = [None, *dict.fromkeys(key for t in tasks.values() for key in t.values if key[1] == fraction)]
    shared = [key for key in keys if key is None or all(key in t.values for t in tasks.values())]
    of_keys = compared(list(tasks.values()), shared, to=own)
    for key in (key for key in keys if key not in shared):
        # A task is no donor to itself: on the mean it is one to all others, or not yet.
        others = {name: t for name, t in tasks.items() if key in t.values}
        if {*tasks} - {*others} == {key[0].task}:
            of_keys |= compared(list(others.values()), [key], to=own)
    rows = []
    for key in (key for key in keys if key in of_keys):
        donor = key[0] if key else Scoped(NONE)
        rows.append({**scoped._asdict(), "num_fewshot": k, "component": component, "donor_scope": donor.scope,
                     "donor": donor.task, "fraction": fraction if key else 0.0, **vars(of_keys[key]), "unseen": unseen})
    return rows


def _all_pairs(of_tasks: Mapping[str, Points], fraction: float) -> dict[str, Points]:
    """Tasks each of which was pruned by the order of every other, at this fraction; unfinished ones are left out."""
    done = dict(of_tasks)
    while done:
        lacking = {task: sum((Scoped(TASK, other), fraction) not in points.values for other in done if other != task)
                   for task, points in done.items()}
        worst = max(lacking, key=lambda task: lacking[task])
        if not lacking[worst]:
            break
        del done[worst]
    return done


def unshown(evaluations: pd.DataFrame, grid: pd.DataFrame, transfer: pd.DataFrame) -> dict[str, int]:
    """How many points were measured that are in neither table: on fewer documents, or there is nothing beside them."""
    rows = evaluations[evaluations["split"] == "evaluation"]
    keys = ["task", "num_fewshot", "fraction"]
    cells = grid.rename(columns={"heads_fraction": "fraction", "ffns_fraction": "ffn_fraction"})
    left_out = {}
    for order, table, more in (("grid", cells, ["ffn_fraction"]),
                               ("transfer", transfer, ["component", "donor_scope", "donor"])):
        measured = set(rows.loc[rows["order"] == order, [*keys, *more]].drop_duplicates().itertuples(
            index=False, name=None))
        left_out[order] = len(measured - set(table[[*keys, *more]].itertuples(index=False, name=None)))
    return {order: n for order, n in left_out.items() if n}


def _largest_jobs(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every donor and fraction one job's rows: one of enough documents, and of aggregates that of the most tasks."""
    by_step = [[job for _, job in groups(of_step, "job")]
               for _, of_step in groups(rows, "donor_scope", "donor", "fraction")]
    enough = most_measured([max(map(len, jobs)) for jobs in by_step])
    fit = [[job for job in jobs if len(job) >= enough] for jobs in by_step]
    kept = [max(jobs, key=lambda job: (job["members"].iloc[0], len(job))) for jobs in fit if jobs]
    shared = set.intersection(*({*job["doc_id"]} for job in kept))
    together = pd.concat(kept)
    return together[together["doc_id"].isin(shared)]


def transferred(transfer: pd.DataFrame, component: str, *, unseen: bool) -> pd.DataFrame:
    """The rows of heads, or FFNs, and of tasks that have an order of their own, or have none."""
    return transfer[(transfer["component"] == component) & (transfer["unseen"] == unseen)]


def over_recipients(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per donor: the given mean over recipients, the only recipient, or the mean taken here, without interval.

    Args:
        rows: Of one number of shots and one fraction.
    """
    if rows.loc[rows["scope"] == TASK, "task"].nunique() == 1 or len(of_scope(rows, MEAN)):
        return summary(rows)
    columns = ["num_fewshot", "fraction", "accuracy", "difference"]
    mean: pd.DataFrame = rows.groupby(["donor_scope", "donor"], sort=False, as_index=False)[columns].mean()
    return mean.assign(scope=MEAN, task="", difference_low=np.nan, difference_high=np.nan)
