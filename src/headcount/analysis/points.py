"""Points that are compared document by document: one task's metric under the full model and under every mask of a kind.

Means over tasks are unweighted. Intervals of accuracies and of differences are those of `stats.intervals`, those
documents of a task that share a passage together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from headcount.analysis.rows import MEAN, Scoped, of_task
from headcount.stats import baselines, intervals
from headcount.stats.intervals import Sample
from headcount.stats.paired import mcnemar

# What tells masks of one kind apart: (component, order, fraction) for curves; None is the full model.
Key: TypeAlias = Any
# Averages such as 2/3 differ from themselves in the last bits, depending on how they were summed.
_EQUAL = 1e-9


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
        values: The metric under each mask; several random orders are averaged.
        draws: The same of every random order by itself, in the order of their seeds.
        removed: What each mask removes.
    """

    full: Float[np.ndarray, " doc"]
    passages: Int[np.ndarray, " doc"]
    baseline: float
    values: dict[Key, Float[np.ndarray, " doc"]] = field(default_factory=dict)
    draws: dict[Key, Float[np.ndarray, "draw doc"]] = field(default_factory=dict)
    removed: dict[Key, Removed] = field(default_factory=dict)

    def add(self, key: Key, rows: pd.DataFrame) -> None:
        """Take in one mask's rows, or several orders' that are averaged; not those of only some of the documents.

        Two jobs may have measured the same: a task that was unseen has a random order on the documents of transfer,
        which may be fewer, beside that of its curve.
        """
        seeds, draw = np.unique(rows["order_seed"].to_numpy(), return_inverse=True)
        documents, place = np.unique(rows["doc_id"].to_numpy(), return_inverse=True)
        wide = np.full((len(seeds), len(documents)), np.nan)
        # From the last to the first: of what two jobs measured the first counts.
        wide[draw[::-1], place[::-1]] = rows["correct"].to_numpy(np.float64)[::-1]
        whole = ~np.isnan(wide).any(axis=1)
        if len(documents) < len(self.full) or not whole.any():
            return
        self.draws[key] = wide[whole]
        self.values[key] = self.draws[key].mean(axis=0)
        kept = whole[draw]
        self.removed[key] = Removed(*(float(rows[f"{what}_removed"].to_numpy()[kept].mean())
                                      for what in ("heads", "ffns", "parameters")))

    def metric(self, key: Key) -> Float[np.ndarray, " doc"]:
        """The metric under a mask, of the full model where the key is None."""
        return self.full if key is None else self.values[key]

    def sample(self, values: Float[np.ndarray, "row doc"]) -> Sample:
        """Values of these documents, with their passages."""
        bounded = all(((v >= -_EQUAL) & (v <= 1 + _EQUAL)).all() for v in (self.full, *self.values.values()))
        return Sample(values, self.passages, bounded)


# By number of shots and task.
ByShots: TypeAlias = Mapping[int, Mapping[str, Points]]


@dataclass(frozen=True)
class Compared:
    """A mean over documents (and tasks), and its difference to another; bounds are those of 95 % intervals.

    Attributes:
        fell: How many documents' metric is lower, over all tasks.
        rose: How many documents' metric is higher.
        changed: Both together.
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
    fell: int
    rose: int
    p: float


def points_of(rows: pd.DataFrame, full: pd.DataFrame, *, constant: float = 0.0) -> Points:
    """The documents of one task and number of shots, without masks yet.

    Args:
        rows: Rows of masks; only their documents count.
        full: The full model's rows, of these documents or more.
        constant: What the best answer gets that can be given to all documents (`stats.baseline`).
    """
    full = (full[full["doc_id"].isin(rows["doc_id"].unique())] if len(rows) else full).sort_values("doc_id")
    baseline = baselines.baseline(full["num_options"].to_numpy(), constant)
    return Points(full["correct"].to_numpy(np.float64), full["passage"].to_numpy(np.int64), baseline)


def compared(tasks: Sequence[Points], keys: Sequence[Key], to: Key = None) -> dict[Key, Compared]:
    """Every key's mean over documents and tasks, beside the full model's (key None) or that of `to`.

    Args:
        tasks: Each must have all keys.
        keys: What is compared, None for the full model.
        to: What it is compared to.
    """
    stacked = [np.stack([t.metric(key) for key in keys]) for t in tasks]
    away = [values - t.metric(to) for values, t in zip(stacked, tasks, strict=True)]
    accuracy = intervals.accuracy_interval([t.sample(v) for t, v in zip(tasks, stacked, strict=True)])
    difference = intervals.difference_interval([t.sample(v) for t, v in zip(tasks, away, strict=True)])
    means = np.mean([values.mean(axis=1) for values in stacked], axis=0)
    changes = np.mean([values.mean(axis=1) for values in away], axis=0)
    together = np.concatenate(away, axis=1)
    offsets = np.cumsum([0, *(t.passages.max(initial=0) + 1 for t in tasks)])
    owners = np.concatenate([t.passages + offset for t, offset in zip(tasks, offsets, strict=False)])
    p = mcnemar(np.zeros(together.shape[1]), together, clusters=owners)
    fell, rose = (together < -_EQUAL).sum(axis=1), (together > _EQUAL).sum(axis=1)
    return {key: Compared(float(means[i]), float(accuracy.low[i]), float(accuracy.high[i]), float(changes[i]),
                          float(difference.low[i]), float(difference.high[i]), together.shape[1],
                          int(fell[i] + rose[i]), int(fell[i]), int(rose[i]), float(p[i]))
            for i, key in enumerate(keys)}


def changes(tasks: Sequence[Points], keys: Sequence[Key]) -> list[Sample]:
    """Every task's changes to the full model, a row for each key."""
    return [t.sample(np.stack([t.metric(key) - t.full for key in keys])) for t in tasks]


def removed_by(tasks: Sequence[Points], key: Key) -> Removed:
    """What a mask removes, on the mean over tasks."""
    return Removed(*np.mean([t.removed.get(key, Removed()) for t in tasks], axis=0).tolist())


def finished(of_tasks: Mapping[str, Points]) -> dict[str, Points]:
    """The tasks that a mean is taken over (`most_shared`); of an unfinished study those that are done."""
    taken = most_shared({task: points.values for task, points in of_tasks.items()})
    return {task: points for task, points in of_tasks.items() if task in taken}


def most_shared(of_tasks: Mapping[str, Iterable[Key]]) -> list[str]:
    """The tasks whose means are taken, by the points that each task has.

    A mean has the points that all its tasks have, so one task that is under way would cost the others theirs. Taken
    are as many tasks, those with the most points first, as leave the most: tasks times points that they share.
    """
    most, taken, shared = 0, 0, None
    sets = {task: {*keys} for task, keys in of_tasks.items()}
    names = sorted(sets, key=lambda task: -len(sets[task]))
    for number, task in enumerate(names, 1):
        shared = sets[task] if shared is None else shared & sets[task]
        if number * len(shared) >= most:
            most, taken = number * len(shared), number
    return names[:taken]


def with_mean(
    of_tasks: Mapping[str, Points], together: Mapping[str, Points]
) -> Iterator[tuple[Scoped, Mapping[str, Points]]]:
    """Every task alone, and where there are several those `together` as their mean."""
    yield from ((of_task(task), {task: points}) for task, points in of_tasks.items())
    if len(together) > 1:
        yield Scoped(MEAN), together


def most_measured(documents: Collection[int]) -> int:
    """The number of documents that all points are shown on where they were measured on unlike numbers of them.

    Points of fewer documents are left out, and of the others the first so many documents are taken. Chosen is what
    keeps the most: points times documents.

    Args:
        documents: How many each point was measured on.
    """
    return max(documents, key=lambda n: n * sum(other >= n for other in documents), default=0)

