"""What a shape costs: curves that leave every layer the same shape, beside free-form ones that remove as many heads.

Both are measured at the same shares, on the same documents, by the same importance (`headcount.study.shapes`): a
uniform curve by each task's own order beside the free-form one by it, that of all tasks together beside the common
one. They are compared document by document as pruned models are with the full one (`analysis.points`); the steps of a
curve are tested together (Holm).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from headcount.analysis.points import ByShots, Points, compared, finished, removed_by, with_mean
from headcount.analysis.rows import FREE_FORM, Scoped
from headcount.analysis.schema import OF_SCOPE, Column, Table, changes_of, columns, interval_of
from headcount.stats import intervals
from headcount.stats.paired import holm

UNIFORM_COST = Table(
    "uniform_cost", "Heads removed so that every layer keeps the same shape, beside as many that are removed wherever "
    "they are least important: one row per task (and their mean), number of shots, order and fraction.",
    columns(
        OF_SCOPE,
        Column("order", "str", "", "`uniform`: by each task's own order; `uniform common`: by that of all tasks "
               "together, one set for all tasks"),
        Column("fraction", "float64", "0..1", "share of all heads that is removed"),
        Column("removed", "int64", "heads", "how many heads that is, of both"),
        Column("parameters_removed", "float64", "parameters", "how many parameters that removes where every layer "
               "keeps the same shape; on a mean over tasks the mean"),
        Column("free_form_parameters_removed", "float64", "parameters", "and of the free-form curve: keys and values "
               "go with whole KV groups alone"),
        Column("accuracy", "float64", "0..1", "accuracy where every layer keeps the same shape"),
        Column("free_form_accuracy", "float64", "0..1", "accuracy of the free-form curve by the same order"),
        Column("difference", "float64", "-1..1", "accuracy less free_form_accuracy, on the same documents"),
        interval_of("the difference", "-1..1", "difference_low", "difference_high"),
        Column("verdict", "str", "", "what the interval says of a loss of the study's margin against the free-form "
               "curve: `within`, `costs more` or `unknown`, as in curves"),
        Column("p", "float64", "0..1", "exact paired test that as many documents are worse as better, corrected for "
               "the curve's steps (Holm)"),
        Column("documents", "int64", "documents", "evaluated documents, of all tasks together"),
        changes_of()),
    "Of heads alone: a model class has an FFN in every layer or in none. Empty where `uniform` was not asked for.")


def uniform_table(points: ByShots, margin: float) -> pd.DataFrame:
    """`Study.uniform_cost()`.

    Args:
        points: From `headcount.analysis.curves.curve_points`.
        margin: The loss of accuracy that must be ruled out.
    """
    return UNIFORM_COST.frame(
        row for k, of_tasks in points.items() for scoped, members in with_mean(of_tasks, finished(of_tasks))
        for row in _rows(scoped, k, list(members.values()), margin))


def _rows(scoped: Scoped, k: int, tasks: Sequence[Points], margin: float) -> Iterator[dict[str, Any]]:
    shared = set.intersection(*({*t.values} for t in tasks))
    for order, free_form in FREE_FORM.items():
        # Each step with its partner.
        steps = [(key, free) for key in sorted(key for key in shared if key[1] == order) for other in free_form
                 if (free := (key[0], other, key[2])) in shared]
        found = [compared(tasks, [key], to=free)[key] for key, free in steps]
        for (key, free), one, p in zip(steps, found, holm(np.array([one.p for one in found])), strict=True):
            removed, beside = removed_by(tasks, key), removed_by(tasks, free)
            told = {name: value for name, value in vars(one).items() if name not in ("low", "high")}
            yield {**scoped._asdict(), "num_fewshot": k, "order": order, "fraction": key[2],
                   "removed": int(removed.heads), "parameters_removed": removed.parameters,
                   "free_form_parameters_removed": beside.parameters, **told,
                   "free_form_accuracy": one.accuracy - one.difference,
                   "verdict": intervals.verdict(one.difference_low, one.difference_high, margin), "p": p}
