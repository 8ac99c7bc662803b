"""What is known of the evaluated documents: how many there are, and where the full model's result says little."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from headcount.analysis.points import compared, points_of
from headcount.analysis.rows import groups
from headcount.analysis.schema import OF_TASK, Column, Table, columns
from headcount.stats import intervals
from headcount.stats.baselines import degenerate, few_distinct
from headcount.study.jobs import Done, Evaluation, ImportanceJob

DEGENERATE = Table(
    "degenerate", "What says little, and why: one row per task, number of shots and reason.",
    columns(OF_TASK, Column("reason", "str", "", "why, in words")))


def above_chance(full_models: pd.DataFrame, constant: Callable[[str], float]) -> dict[tuple[str, int], bool]:
    """By (task, number of shots), whether the full model is shown to be above what guessing, or one answer, gets.

    Corrected for how many tasks there are at a number of shots (`intervals.above_baseline`).

    Args:
        full_models: The full model's rows of evaluations.
        constant: By task, what the best answer gets that can be given to all documents.
    """
    above: dict[tuple[str, int], bool] = {}
    for k, of_k in groups(full_models, "num_fewshot"):
        points = {str(task): points_of(full, full, constant=constant(str(task))) for task, full in groups(of_k, "task")}
        able = intervals.above_baseline([p.sample(p.full[None]) for p in points.values()],
                                        [p.baseline for p in points.values()])
        above |= {(task, int(k)): one for task, one in zip(points, able, strict=True)}
    return above


def weak_results(
    full_models: pd.DataFrame, tasks: Mapping[str, Mapping[str, Any]], above: Mapping[tuple[str, int], bool],
    constant: Callable[[str], float],
) -> pd.DataFrame:
    """Of `Study.degenerate()` what is of the full model's accuracies.

    Args:
        full_models: The full model's rows of evaluations.
        tasks: What is known of each task.
        above: From `above_chance`.
        constant: As there.
    """
    return DEGENERATE.frame(
        {"task": task, "num_fewshot": k, "reason": reason}
        for (task, k), full in groups(full_models, "task", "num_fewshot")
        for reason in degenerate(
            full["correct"].to_numpy(np.float64), full["prediction"].to_numpy(), full["num_options"].to_numpy(),
            clusters=full["passage"].to_numpy(), low=compared([points_of(full, full)], [None])[None].low,
            above=above[str(task), int(k)], constant=constant(str(task)),
            places=tasks[str(task)].get("constant_places")))


def coarse_oracles(distinct: Mapping[tuple[str, int], int], components: int) -> pd.DataFrame:
    """Of `Study.degenerate()` what is of FFN oracles that found few distinct accuracies."""
    return DEGENERATE.frame({"task": task, "num_fewshot": k, "reason": reason} for (task, k), n in distinct.items()
                            for reason in few_distinct(n, components))


def evaluated(full_models: pd.DataFrame) -> dict[str, tuple[int, str]]:
    """By task, how many documents stand for themselves (passages, where some share one), and in words."""
    counts = {}
    for task, of_task in groups(full_models, "task"):
        documents, passages = of_task["doc_id"].nunique(), of_task["passage"].nunique()
        counts[str(task)] = (passages, str(documents) if passages == documents else
                             f"{documents} of {passages} passages")
    return counts


def truncated(entries: Iterable[Done[Evaluation] | Done[ImportanceJob]]) -> dict[tuple[str, int], int]:
    """How many requests were cut to fit the window, by (task, number of shots), where any were."""
    most: dict[tuple[str, int], int] = {}
    for entry in entries:
        # Evaluated and training documents have entries of their own: neither may hide the other's count.
        key = (entry.job.task, entry.job.num_fewshot)
        most[key] = max(most.get(key, 0), entry.info.get("truncated", 0))
    return {key: n for key, n in sorted(most.items()) if n}
