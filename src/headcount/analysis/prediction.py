"""Does the likeness of two tasks' importance predict what one of them loses by the other's order?

Nothing new is measured: for every pair of a pruned task and the donor of the order, the rank correlation of their
importance (`headcount.analysis.correlations`) stands beside the accuracy lost (`headcount.analysis.transfer`). Pairs
share their tasks, so that their number is no number of observations: whether the two go together is tested by giving
the tasks each other's places in one of the two matrices (Mantel 1967, `headcount.stats.ranks.mantel`).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from headcount.analysis.rows import NONE, TASK
from headcount.analysis.schema import COMPONENT, OF_TASK, Column, Table, columns, interval_of
from headcount.stats.ranks import mantel

PREDICTION = Table(
    "prediction", "Pairs of tasks: how alike they rank the components, and what one loses by the order of the other; "
    "one row per pruned task, donor, number of shots, component and fraction.",
    columns(
        COMPONENT, OF_TASK,
        Column("donor", "str", "", "name of the task whose order removes"),
        Column("fraction", "float64", "0..1", "share of all heads, or FFNs, that is removed"),
        Column("correlation", "float64", "-1..1", "Spearman's correlation of the two tasks' importance"),
        interval_of("the correlation", "-1..1"),
        Column("lost", "float64", "-1..1", "accuracy of the full model less that by the donor's order"),
        Column("cost", "float64", "-1..1", "accuracy by the task's own order less that by the donor's"),
        interval_of("the cost", "-1..1", "cost_low", "cost_high")))


class Predicted(NamedTuple):
    """How the likeness of importance goes with a loss, over pairs of tasks.

    Attributes:
        correlation: Spearman's, over pairs; negative where alike tasks lose less.
        p: Mantel's test, two-sided; NaN where too few tasks are there for it.
        tasks: How many tasks.
    """

    correlation: float
    p: float
    tasks: int


def prediction(transfer: pd.DataFrame, correlations: pd.DataFrame) -> pd.DataFrame:
    """The table of pairs, from two tables of a study; its columns are those of `PREDICTION`."""
    full = transfer[(transfer["scope"] == TASK) & (transfer["donor_scope"] == NONE)]
    pruned = transfer[(transfer["scope"] == TASK) & (transfer["donor_scope"] == TASK) & ~transfer["unseen"]]
    pairs = correlations[(correlations["kind"] == "tasks") & (correlations["scope"] == TASK)
                         & (correlations["other_scope"] == TASK)].rename(columns={"other_task": "donor"})
    of_task = ["component", "num_fewshot", "task"]
    rows = pruned.merge(full[[*of_task, "accuracy"]], on=of_task, suffixes=("", "_full")).merge(
        pairs[[*of_task, "donor", "correlation", "low", "high"]], on=[*of_task, "donor"], suffixes=("_accuracy", ""))
    rows = rows.assign(lost=rows["accuracy_full"] - rows["accuracy"], cost=-rows["difference"],
                       cost_low=-rows["difference_high"], cost_high=-rows["difference_low"])
    return PREDICTION.frame(rows[PREDICTION.names])


def predicted(pairs: pd.DataFrame, loss: str) -> Predicted:
    """How likeness goes with a loss ("lost" or "cost") over pairs of one component, number of shots and fraction."""
    tasks = sorted({*pairs["task"], *pairs["donor"]})
    alike, losses = (_matrix(pairs, tasks, name) for name in ("correlation", loss))
    return Predicted(*mantel(alike, losses), len(tasks))


def _matrix(pairs: pd.DataFrame, tasks: list[str], name: str) -> Float[np.ndarray, "task task"]:
    """A column of pairs as a square, rows the pruned tasks; NaN where a pair is not there."""
    at = {(task, donor): value for task, donor, value in zip(pairs["task"], pairs["donor"], pairs[name], strict=True)}
    values = [at.get(pair, np.nan) for pair in itertools.product(tasks, tasks)]
    return np.array(values, np.float64).reshape(len(tasks), len(tasks))
