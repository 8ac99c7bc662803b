"""Points that are compared document by document: one task's metric under the full model and under every mask of a kind.

Means over tasks are unweighted; their intervals come from documents drawn within each task, those of a passage
together. A task's documents are drawn alike at every number of shots, and other ones for another task.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from headcount import stats

MEAN = "mean"
# What tells masks of one kind apart: (component, order, fraction) for curves; None is the full model.
Key: TypeAlias = Any


class Removed(NamedTuple):
    """How many heads, FFNs and parameters a mask removes; means over several random orders."""

    heads: float = 0.0
    ffns: float = 0.0
    parameters: float = 0.0


@dataclass(eq=False)
class Points:
    """One task's documents at one number of shots.

    Attributes:
        full: The full model's metric.
        passages: Equal numbers for documents of one passage.
        baseline: What guessing, or the best constant answer, gets.
        seed: Of the draws of documents.
        values: The metric under each mask; several random orders are averaged.
        removed: What each mask removes.
    """

    full: Float[np.ndarray, " doc"]
    passages: Int[np.ndarray, " doc"]
    baseline: float
    seed: int
    values: dict[Key, Float[np.ndarray, " doc"]] = field(default_factory=dict)
    removed: dict[Key, Removed] = field(default_factory=dict)

    def add(self, key: Key, rows: pd.DataFrame) -> None:
        """Take in one mask's rows, or several orders' that are averaged; not those of only some of the documents.

        Two jobs may have measured the same: a task that was unseen has a random order on the documents of transfer,
        which may be fewer, beside that of its curve.
        """
        rows = rows.drop_duplicates(["order_seed", "doc_id"])
        if rows["doc_id"].nunique() < len(self.full):
            return
        self.values[key] = rows.groupby("doc_id")["correct"].mean().to_numpy(np.float64)
        self.removed[key] = Removed(*(float(rows[f"{what}_removed"].mean())
                                      for what in ("heads", "ffns", "parameters")))


@dataclass(frozen=True)
class Compared:
    """A mean over documents (and tasks), and its difference to another; bounds are those of 95 % intervals.

    Attributes:
        changed: How many documents' metric differs.
        p: Exact paired test that as many documents fell as rose (`stats.mcnemar`), over all tasks' documents.
    """

    accuracy: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    documents: int
    changed: int
    p: float


def points_of(rows: pd.DataFrame, full: pd.DataFrame, *, constant: float = 0.0) -> Points:
    """The documents of one task and number of shots, without masks yet.

    Args:
        rows: Rows of masks; only their documents count.
        full: The full model's rows, of these documents or more.
        constant: What the best answer gets that can be given to all documents (`stats.baseline`).
    """
    full = (full[full["doc_id"].isin(rows["doc_id"].unique())] if len(rows) else full).sort_values("doc_id")
    baseline = stats.baseline(full["num_options"].to_numpy(), constant)
    return Points(full["correct"].to_numpy(np.float64), full["passage"].to_numpy(np.int64), baseline,
                  zlib.crc32(str(full["task"].iloc[0]).encode()))


def compared(
    tasks: Sequence[Points], keys: Sequence[Key], to: Key = None
) -> tuple[dict[Key, Compared], Float[np.ndarray, "key resample"]]:
    """Every key's mean over documents and tasks, beside the full model's (key None) or that of `to`.

    Args:
        tasks: Each must have all keys.
        keys: What is compared, None for the full model.
        to: What it is compared to.

    Returns:
        What was found, and the differences of resampled documents, in the order of the keys.
    """
    wanted = [to, *keys]
    stacked = [np.stack([t.full if key is None else t.values[key] for key in wanted]) for t in tasks]
    samples = np.mean([stats.resampled_means(values, clusters=t.passages, seed=t.seed)
                       for values, t in zip(stacked, tasks, strict=True)], axis=0)
    means = np.mean([values.mean(axis=1) for values in stacked], axis=0)
    low, high = stats.interval(samples)
    differences = samples - samples[0]
    difference_low, difference_high = stats.interval(differences)
    offsets = np.cumsum([0, *(t.passages.max(initial=0) + 1 for t in tasks)])
    together = np.concatenate(stacked, axis=1)
    owners = np.concatenate([t.passages + offset for t, offset in zip(tasks, offsets, strict=False)])
    p = stats.mcnemar(together[0], together, clusters=owners)
    changed = (~np.isclose(together, together[0], rtol=0, atol=1e-9)).sum(axis=1)
    found = {key: Compared(float(means[i]), float(low[i]), float(high[i]), float(means[i] - means[0]),
                           float(difference_low[i]), float(difference_high[i]), together.shape[1], int(changed[i]),
                           float(p[i])) for i, key in enumerate(wanted) if i}
    return found, differences[1:]


def removed_by(tasks: Sequence[Points], key: Key) -> Removed:
    """What a mask removes, on the mean over tasks."""
    return Removed(*np.mean([t.removed.get(key, Removed()) for t in tasks], axis=0).tolist())


def finished(of_tasks: Mapping[str, Points]) -> dict[str, Points]:
    """The tasks that a mean is taken over; of an unfinished study those that are done.

    A mean has the points that all its tasks have, so one task that is under way would cost the others theirs. Taken
    are as many tasks, those with the most points first, as leave the most: tasks times points that they share.
    """
    most, taken, shared = 0, 0, None
    names = sorted(of_tasks, key=lambda task: -len(of_tasks[task].values))
    for number, task in enumerate(names, 1):
        keys = {*of_tasks[task].values}
        shared = keys if shared is None else shared & keys
        if number * len(shared) >= most:
            most, taken = number * len(shared), number
    return {task: points for task, points in of_tasks.items() if task in names[:taken]}


def with_mean(
    of_tasks: Mapping[str, Points], together: Mapping[str, Points]
) -> Iterator[tuple[str, Mapping[str, Points]]]:
    """Every task alone, and where there are several those `together` as "mean"."""
    yield from ((task, {task: points}) for task, points in of_tasks.items())
    if len(together) > 1:
        yield MEAN, together


def most_measured(documents: Collection[int]) -> int:
    """The number of documents that all points are shown on where they were measured on unlike numbers of them.

    Points of fewer documents are left out, and of the others the first so many documents are taken. Chosen is what
    keeps the most: points times documents.

    Args:
        documents: How many each point was measured on.
    """
    return max(documents, key=lambda n: n * sum(other >= n for other in documents), default=0)


def groups(table: pd.DataFrame, *columns: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """The rows of every combination of values of these columns, in the order in which they first stand there."""
    yield from table.groupby(columns[0] if len(columns) == 1 else list(columns), sort=False)
