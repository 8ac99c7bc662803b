"""Entries of the ledger as frames: one row per document and mask, and which entries are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from headcount.analysis.rows import (
    ALL_TASKS,
    NONE,
    ONE_SET,
    OTHER_TASKS,
    OWN,
    RANDOM,
    TASK,
    Scoped,
)
from headcount.analysis.schema import OF_TASK, Column, Table, columns
from headcount.study.jobs import (
    Done,
    Evaluation,
    GradientImportance,
    ImportanceJob,
    Job,
    name_of,
    scores_of_masks,
)
from headcount.study.masksets import (
    AGGREGATE,
    OTHERS,
    ByOneTask,
    BySeveral,
    Grid,
    GridOrder,
    MaskSet,
    RandomCurve,
    Transfer,
)
from headcount.study.masksets import OWN as OWN_DONOR

EVALUATIONS = Table(
    "evaluations", "What was measured: one row per document and mask.",
    columns(
        OF_TASK,
        Column("split", "str", "", "`evaluation`, or `examples` for the oracle's training documents"),
        Column("component", "str", "", "what is removed: `none`, `head`, `ffn` or `both`"),
        Column("order", "str", "", "`none` for the full model; `gradient`, `oracle`: the task's own; `common`: the "
               "one order of all tasks; `uniform`, `uniform common`: the same two where every layer is left one shape; "
               "`random`; `single` for one head or FFN alone off; `grid` for heads and FFNs "
               "together; `transfer` for another task's order"),
        Column("donor_scope", "str", "", "whose order removes: `none`, `own` (the task's), `task` (another task's), "
               "`all tasks` (together), `other tasks` (all but this one, together) or `random`"),
        Column("donor", "str", "", "name of the other task whose order removes; empty where it is no single one's"),
        Column("order_seed", "int64", "", "seed of a random order, else -1"),
        Column("fraction", "float64", "0..1", "share of the heads (or FFNs) that is removed; of the grid, of heads"),
        Column("ffn_fraction", "float64", "0..1", "of the grid, share of the FFNs that is removed"),
        Column("layer", "int64", "", "of what is off alone, else -1"),
        Column("head", "int64", "", "of the head that is off alone, else -1"),
        Column("heads_removed", "int64", "heads", "how many heads are off"),
        Column("ffns_removed", "int64", "FFNs", "how many FFNs are off"),
        Column("parameters_removed", "int64", "parameters", "how many parameters that removes"),
        Column("score", "str", "", "which score ordered what is removed, of the grid that of heads and that of FFNs; "
               "empty where none did"),
        Column("doc_id", "int64", "", "the document's position in its split"),
        Column("passage", "int64", "", "equal for documents that belong together"),
        Column("correct", "float64", "0..1", "the task's metric"),
        Column("gold_loglikelihood", "float64", "nats", "log-likelihood of the gold answer"),
        Column("margin", "float64", "nats", "that less the best other option's; missing where there is one option"),
        Column("prediction", "int64", "", "index of the option that the model takes"),
        Column("gold", "int64", "", "index of the gold option"),
        Column("num_options", "int64", "options", "how many options the document has")),
    "Of what was asked for last, or of the request that `asked` names; what others measured is not among it.",
    further="other metrics of the task, such as acc_norm", written=False)
# What of each row only this room needs: the number of its entry and of its mask there, of how many tasks its order is,
# and which importance it was read from.
_INNER = ("job", "mask_number", "members", "order_of")
# Of a mask's label what an earlier version did not write.
_LABELS = {"component": "none", "order": "none", "order_seed": -1, "fraction": 0.0, "ffn_fraction": 0.0, "layer": -1,
           "head": -1, "heads_removed": 0, "ffns_removed": 0, "parameters_removed": 0}
_DONORS = {AGGREGATE: ALL_TASKS, OTHERS: OTHER_TASKS, OWN_DONOR: OWN}


def current(importance: Iterable[ImportanceJob], model: str) -> Callable[[Job], bool]:
    """Which jobs are of a model, and of its gradient scores as they were last defined.

    Where a model norms what its branches put out, an earlier version took gradient scores before that norm. A folder
    that was begun with it may hold both: then what rests on the earlier scores is passed over, curves too.

    Args:
        importance: The folder's jobs of importance.
        model: The model's fingerprint; two processes may have begun the folder with different ones.
    """
    earlier = {name_of(dataclasses.replace(job, through_norms=None)) for job in importance
               if isinstance(job, GradientImportance) and job.through_norms}

    def chosen(job: Job) -> bool:
        return job.model == model and not (earlier and earlier & {name_of(job), *(need.name for need in job.needs)})

    return chosen


def donor_of(masks: MaskSet) -> Scoped:
    """Whose order a set of masks goes by: one task's, all tasks' together, ..."""
    if isinstance(masks, Transfer):
        scope = TASK if masks.donor_is == TASK else _DONORS.get(masks.donor, TASK)
        return Scoped(scope, masks.donor if scope == TASK else "")
    if isinstance(masks, Grid):
        return Scoped(ALL_TASKS if masks.donor else OWN)
    return Scoped(OWN if isinstance(masks, ByOneTask) else ALL_TASKS if isinstance(masks, BySeveral) else
                  RANDOM if isinstance(masks, RandomCurve) else NONE)


def _shared_by(masks: MaskSet) -> tuple[int, str | None]:
    """How many tasks have a part in the order that masks go by, and how their importance becomes one."""
    order = masks.heads if isinstance(masks, Grid) else masks
    if not isinstance(order, GridOrder | BySeveral):
        return 1, None
    return (1 if isinstance(order.importance, str) else len(order.importance)), order.aggregate


def evaluation_rows(
    entries: Iterable[Done[Evaluation]], aggregate: str, steps: Callable[[Evaluation], list[bool]]
) -> pd.DataFrame:
    """The columns of `Study.evaluations()`, and besides those that only this room needs (`_INNER`).

    Args:
        entries: Evaluation entries.
        aggregate: An aggregate may have been taken of scores first and of ranks later; the last one asked for is shown.
        steps: Which of a job's masks are shown (`headcount.study.shown.Shown.steps`).
    """
    masks: list[dict[str, Any]] = []
    tables: list[pd.DataFrame] = []
    rows: list[np.ndarray] = []
    for number, entry in enumerate(entries):
        job = entry.job
        members, how = _shared_by(job.masks)
        if (how or aggregate) != aggregate:
            continue
        donor = donor_of(job.masks)
        of_job = {"task": job.task, "num_fewshot": job.num_fewshot, "split": job.split,
                  "donor_scope": donor.scope, "donor": donor.task, "score": scores_of_masks(job.masks), "job": number,
                  "members": members, "order_of": " ".join(sorted(job.masks.needs))}
        labels = [{**of_job, **{name: label.get(name, missing) for name, missing in _LABELS.items()},
                   "mask_number": position} for position, label in enumerate(entry.info["masks"])]
        there = np.array(steps(job), bool)
        mask = entry.table["mask"].to_numpy()
        order = np.argsort(mask, kind="stable")
        order = order[mask[order] < len(labels)]
        order = order[there[mask[order]]]
        rows.append(len(masks) + mask[order])
        masks += labels
        tables.append(entry.table if len(order) == len(mask) and (np.diff(order) == 1).all() else
                      entry.table.iloc[order])
    if not tables:
        return EVALUATIONS.frame().assign(**{name: pd.Series(dtype=object) for name in _INNER})
    measured = pd.concat(tables, ignore_index=True).drop(columns="mask")
    labelled = pd.DataFrame(masks).take(np.concatenate(rows)).reset_index(drop=True)
    return EVALUATIONS.frame(pd.concat([labelled, measured], axis=1))


def evaluations_of(rows: pd.DataFrame) -> pd.DataFrame:
    """`Study.evaluations()`: without what only this room needs."""
    return rows.drop(columns=list(_INNER))


def of_one_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the orders of all tasks together one for each number of shots and kind of component, the same for all tasks.

    A folder that tasks were added to has orders of fewer tasks too, and one whose tasks were asked for apart has
    several of as many: what goes by two of them is no one set. Kept is that of the most tasks, on the most tasks. Of
    transfer earlier ones of fewer tasks stay, which may have been measured on more documents.
    """
    together = (rows["donor_scope"] == ALL_TASKS) & rows["order"].isin(["grid", "transfer", *ONE_SET])
    dropped: list[int] = []
    for (order, *_), of_kind in rows[together].groupby(["order", "num_fewshot", "component"]):
        known = of_kind.groupby("order_of").agg(members=("members", "first"), tasks=("task", "nunique"),
                                                first=("task", "min"))
        # Names decide between equals, so that heads and FFNs are of the same tasks.
        best = known.sort_values(["members", "tasks", "first"], ascending=[False, False, True]).iloc[0]
        others = of_kind[of_kind["order_of"] != best.name]
        dropped += others.index[(order != "transfer") | (others["members"] == best["members"])].tolist()
    kept: pd.DataFrame = rows.drop(index=dropped)
    return kept


def shown(rows: pd.DataFrame, scores: Mapping[str, str], grid_order: str) -> pd.DataFrame:
    """Of the evaluations those whose orders are by the scores that were asked for last, or by none.

    Args:
        rows: From `evaluation_rows`.
        scores: Which score orders heads, and which FFNs.
        grid_order: The donor's scope by which the grid was asked for last.
    """
    of_grid = (rows["order"] == "grid") & (rows["score"] == f"{scores['head']} {scores['ffn']}") & (
        rows["donor_scope"] == grid_order)
    by_score = [(rows["component"] == component) & (rows["score"] == score) for component, score in scores.items()]
    return of_one_order(rows[np.logical_or.reduce([rows["score"] == "", of_grid, *by_score])])


def hidden_scores(jobs: Iterable[Job], scores: Mapping[str, str]) -> list[str]:
    """By which other scores the folder's curves remove heads or FFNs, in words.

    Args:
        jobs: All that the folder has entries of.
        scores: Which score orders heads, and which FFNs.
    """
    measured = {(job.masks.component, scores_of_masks(job.masks)) for job in jobs
                if isinstance(job, Evaluation) and isinstance(job.masks, ByOneTask | BySeveral)}
    return sorted(f"{'heads' if component == 'head' else 'FFNs'} by {score}" for component, score in measured
                  if score != scores[component])
