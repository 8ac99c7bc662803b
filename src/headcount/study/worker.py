"""Jobs done: what an executor calls, here or elsewhere.

`Worker.entries` takes jobs of one kind and a way to read the entries that they need, and gives of each the rows of its
result and what is known besides; it writes nothing. What jobs of one task and number of shots share, their encoded
prompts, is kept from one job to the next. Where weights lie in files they are read for all of the jobs together.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from more_itertools import peekable

from headcount.study.codec import evaluation_table, evaluations_from, importance_table, induction_table
from headcount.study.jobs import (
    Evaluation,
    GradientImportance,
    HeadOracle,
    InductionScores,
    Job,
    Need,
    OracleImportance,
)
from headcount.study.ledger import Entry
from headcount.study.masksets import Labelled
from headcount.study.plan import GRADIENT_PASSES, PlannedJob
from headcount.study.prepare import Plan

if TYPE_CHECKING:
    from headcount.measure.evaluate import Prepared

Read: TypeAlias = Callable[[Need], Entry]
# What a result depends on, and what is compared between processes that share a study.
PACKAGES = ("headcount", "torch", "transformers", "lm_eval", "tokenizers", "numpy")


class Result(NamedTuple):
    """What a job's entry will hold: its rows, and what is known besides."""

    table: pd.DataFrame
    info: dict[str, Any]


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


class Worker:
    """Does jobs with a model that is in memory.

    Args:
        plan: The study.
        progress: Called with so many more tokens, as planned.
    """

    def __init__(self, plan: Plan, progress: Callable[[float], None]) -> None:
        self.plan = plan
        self.progress = progress
        self._versions = versions()
        self._prepared: dict[tuple[str, int], dict[tuple[str, int], Prepared]] = {}

    def entries(self, planned: Iterable[PlannedJob], read: Read) -> Iterator[Result]:
        """The results of jobs of one kind, in the order given, as soon as they are known.

        Args:
            planned: The jobs; the next is asked for when it begins.
            read: Gives the entry of a need.
        """
        jobs = peekable(planned)
        kind = type(jobs.peek().job)
        done = (self._evaluations(jobs, read) if kind is Evaluation else
                self._gradients(jobs) if kind is GradientImportance else (self._other(one.job, read) for one in jobs))
        started = time.monotonic()
        for result in done:
            known = {"seconds": round(time.monotonic() - started, 3), "versions": self._versions}
            yield Result(result.table, result.info | known)
            started = time.monotonic()

    def _other(self, job: Job, read: Read) -> Result:
        if isinstance(job, InductionScores):
            return self._induction(job)
        if not isinstance(job, OracleImportance | HeadOracle):
            raise TypeError(f"{type(job).__name__} is done with its like")
        return self._oracle(job, read)

    def _evaluations(self, jobs: Iterable[PlannedJob], read: Read) -> Iterator[Result]:
        from headcount.measure.evaluate import Scoring, scores

        anatomy = self.plan.loaded.anatomy
        begun: deque[Labelled] = deque()

        def wanted() -> Iterator[Scoring]:
            for planned in jobs:
                job: Any = planned.job
                labelled = job.masks.masks(anatomy.heads_per_layer, [read(need).table for need in job.needs])
                begun.append(labelled)
                prepared = self._prompts(job)
                per_token = planned.tokens / max(1, prepared.tokens * len(labelled))
                yield Scoring(prepared, [mask for mask, _ in labelled], self._told(per_token))

        for measured in scores(self.plan.loaded, wanted()):
            yield Result(evaluation_table(measured), {
                "metric": measured.metric,
                "truncated": measured.truncated,
                "tokens": measured.tokens,
                "layer_tokens": measured.layer_tokens,
                "masks": [{**dataclasses.asdict(label), "heads_removed": len(mask.heads_removed),
                           "ffns_removed": len(mask.ffns_removed),
                           "parameters_removed": anatomy.parameters_removed(mask),
                           "mask": mask.to_json()} for mask, label in begun.popleft()],
            })

    def _told(self, per_token: float) -> Callable[[int], None]:
        """Tells progress in planned tokens, so many for each that was computed."""
        return lambda computed: self.progress(computed * per_token)

    def _prompts(self, job: Evaluation) -> Prepared:
        """The job's prompts, encoded and packed; those of another task or number of shots are forgotten."""
        from headcount.measure.evaluate import prepare

        of_task = self._prepared.get((job.task, job.num_fewshot), {})
        self._prepared = {(job.task, job.num_fewshot): of_task}
        if (job.split, job.documents) not in of_task:
            of_task[job.split, job.documents] = prepare(
                self.plan.loaded, self.plan.tasks[job.task], self.plan.few_shot(job.num_fewshot, job.documents),
                split=job.split, budget=self.plan.budget)
        return of_task[job.split, job.documents]

    def _gradients(self, jobs: Iterable[PlannedJob]) -> Iterator[Result]:
        from headcount.measure.importance import Learning, gradient_importances

        wanted = (Learning(self.plan.tasks[job.task], self.plan.few_shot(job.num_fewshot, job.documents),
                           self._told(float(GRADIENT_PASSES)))
                  for planned in jobs if isinstance(job := planned.job, GradientImportance))
        for importance in gradient_importances(self.plan.loaded, wanted, budget=self.plan.budget):
            table = pd.concat([importance_table(importance["head"]), importance_table(importance["ffn"])],
                              ignore_index=True)
            yield Result(table, {"num_examples": importance["head"].num_examples,
                                 "truncated": importance["head"].truncated})

    def _oracle(self, job: OracleImportance | HeadOracle, read: Read) -> Result:
        from headcount.measure.importance import oracle_from

        component = "head" if isinstance(job, HeadOracle) else "ffn"
        entries = [read(need) for need in job.needs]
        measured = evaluations_from([e.table for e in entries], [e.info for e in entries], entries[0].job)
        importance = oracle_from(measured, component)  # type: ignore[arg-type]
        accuracy = importance.scores["accuracy"]
        distinct = len(np.unique(accuracy[np.isfinite(accuracy)]))
        return Result(importance_table(importance), {"num_examples": importance.num_examples,
                                                     "distinct_values": distinct})

    def _induction(self, job: InductionScores) -> Result:
        from headcount.measure.control import randomised
        from headcount.measure.induction import induction_scores

        loaded = self.plan.loaded if job.weights == "trained" else randomised(self.plan.loaded, job.seed)
        protocol: Any = job.protocol
        scores = induction_scores(loaded, lengths=job.lengths, seeds=job.seeds, seed=job.seed, protocol=protocol,
                                  progress=lambda n: self.progress(float(n)))
        info: Mapping[str, Any] = {
            "sequences": scores.sequences, "lengths": list(scores.lengths), "repeats": scores.repeats,
            "reliability": dict(scores.reliability), "notes": list(scores.notes)}
        if loaded is not self.plan.loaded:
            del loaded
            gc.collect()  # a model's modules and hooks hold one another, and its files may be large
        return Result(induction_table(scores), dict(info))


