"""A study folder as tables: each is computed when it is first asked for, from the entries, which are read once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from headcount.analysis import documents, frames
from headcount.analysis.choice import Choice, choose
from headcount.analysis.correlations import CORRELATIONS, correlation_table
from headcount.analysis.curves import (
    AGAINST_RANDOM,
    CURVES,
    FREE_FRACTIONS,
    against_random,
    curve_points,
    curve_table,
    free_table,
)
from headcount.analysis.documents import DEGENERATE
from headcount.analysis.frames import EVALUATIONS
from headcount.analysis.grid import GRID, grid_table
from headcount.analysis.importance import (
    AGGREGATE_IMPORTANCE,
    AGREEMENT,
    DEPTH,
    IMPORTANCE,
    ORDERS,
    aggregate_table,
    agreement_table,
    depth_table,
    distinct_values,
    importance_rows,
    orders_table,
)
from headcount.analysis.induction import (
    INDUCTION,
    INDUCTION_AMONG_IMPORTANT,
    RETAINED,
    among_important_table,
    induction_rows,
    retained_table,
    shown_entries,
)
from headcount.analysis.points import Points, finished
from headcount.analysis.removal import (
    REMOVABLE,
    REMOVED,
    Removal,
    measured_points,
    removal_points,
    removed_table,
)
from headcount.analysis.rows import ALL_TASKS, COMMON, FREE_FORM, OWN, OWN_ORDERS, RANDOM
from headcount.analysis.schema import Table
from headcount.analysis.top_sets import TOP_OVERLAPS, TOP_SETS, overlap_table, top_table
from headcount.analysis.transfer import TRANSFER, transfer_table, unshown
from headcount.analysis.uniform import UNIFORM_COST, uniform_table
from headcount.errors import StudyError
from headcount.study.described import check_description
from headcount.study.jobs import Done, Evaluation, ImportanceJob, InductionScores, Job, job_from, name_of
from headcount.study.ledger import Found, Ledger, is_left_over
from headcount.study.masksets import MaskSet
from headcount.study.shapes import shape_of, shares
from headcount.study.shown import Shown, told_apart
from headcount.study.spec import ChoiceSpec, scores_of

# All tables of a study, each the method of this name.
TABLES = (EVALUATIONS, IMPORTANCE, AGGREGATE_IMPORTANCE, DEPTH, ORDERS, AGREEMENT, CURVES, FREE_FRACTIONS,
          AGAINST_RANDOM, UNIFORM_COST, GRID, TRANSFER, CORRELATIONS, TOP_SETS, TOP_OVERLAPS, INDUCTION, RETAINED,
          INDUCTION_AMONG_IMPORTANT, DEGENERATE, REMOVABLE, REMOVED)


class _Entries(NamedTuple):
    """Entries that are shown, by kind."""

    evaluation: list[Done[Evaluation]]
    importance: list[Done[ImportanceJob]]
    induction: list[Done[InductionScores]]


def open_study(folder: str | Path, asked: int | None = None) -> Study:
    """The tables of a study folder, finished or not.

    Each is a method that gives a pandas frame and says what its columns mean: `help(open_study(folder).curves)`; all of
    them stand in docs/tables.md.

    Args:
        folder: The study folder.
        asked: Which of the things that the folder was asked for is shown, 1 the first (`Study.asked`); None: the last.

    Raises:
        StudyError: If there is no study in it, or it was not asked for so many things.
    """
    return Study(Path(folder), asked)


def _gives(table: Table) -> Callable[[Callable[[Study], pd.DataFrame]], Callable[[Study], pd.DataFrame]]:
    """Make a method give its table: computed once, a copy for every reader, described as it is declared."""
    def decorated(compute: Callable[[Study], pd.DataFrame]) -> Callable[[Study], pd.DataFrame]:
        @functools.wraps(compute)
        def method(self: Study) -> pd.DataFrame:
            if table.name not in self._tables:
                self._tables[table.name] = compute(self)
            return self._tables[table.name].copy()

        method.__doc__ = table.docstring()
        return method

    return decorated


class Study:
    """The tables of a study folder: each method named in `TABLES` gives one, and says what its columns mean.

    Attributes:
        folder: Where it is.
        description: study.json: spec, model, anatomy, tasks, versions, commands.
    """

    def __init__(self, folder: Path, asked: int | None = None) -> None:
        self.folder = folder
        self._ledger = Ledger(folder)
        self._tables: dict[str, pd.DataFrame] = {}
        description = self._ledger.read_json("study.json")
        if description is None:
            raise StudyError(f"{folder} has entries, but no study.json; run the study's command again, which writes "
                             "that file anew and finds what is measured" if self._ledger.is_begun() else
                             f"{folder} holds no study (no study.json); name the folder given to `out`",
                             fields=("out",))
        check_description(description, folder / "study.json")
        requests = len(description.get("asked", [{}]))
        if asked is not None and (not isinstance(asked, int) or not 1 <= asked <= requests):
            raise StudyError(f"{folder} was asked for one thing only; leave out `asked`" if requests == 1 else
                             f"{folder} was asked for {requests} different things; `asked` is the number of one of "
                             f"them, from 1 to {requests}, not {asked!r}", fields=("asked",))
        chosen = description["asked"][(asked or 0) - 1] if "asked" in description else {}
        self.description: dict[str, Any] = {**description, **chosen}
        self._shown_request = (asked or len(description.get("asked", ()))) - 1
        self.unknown_entries = 0

    @_gives(EVALUATIONS)
    def evaluations(self) -> pd.DataFrame:
        return frames.evaluations_of(self._evaluations)

    @_gives(IMPORTANCE)
    def importance(self) -> pd.DataFrame:
        return IMPORTANCE.frame(self._importance[IMPORTANCE.names])

    @_gives(AGGREGATE_IMPORTANCE)
    def aggregate_importance(self) -> pd.DataFrame:
        return aggregate_table(self._importance, self.ordering_scores, self.tie_scores)

    @_gives(DEPTH)
    def depth(self) -> pd.DataFrame:
        return depth_table(self._importance, self.spec["head_score"], self._aggregate, self._layers)

    @_gives(ORDERS)
    def orders(self) -> pd.DataFrame:
        return orders_table(self._importance, self.ordering_scores)

    @_gives(AGREEMENT)
    def agreement(self) -> pd.DataFrame:
        return agreement_table(self._importance)

    @_gives(CURVES)
    def curves(self) -> pd.DataFrame:
        return curve_table(self._points, self.description["anatomy"]["parameters"], self.spec["margin"])

    @_gives(FREE_FRACTIONS)
    def free_fractions(self) -> pd.DataFrame:
        return free_table(self.curves(), self._points, self.spec["margin"], self.above_chance)

    @_gives(AGAINST_RANDOM)
    def against_random(self) -> pd.DataFrame:
        return against_random(self._points)

    @_gives(UNIFORM_COST)
    def uniform_cost(self) -> pd.DataFrame:
        return uniform_table(self._points, self.spec["margin"])

    @_gives(GRID)
    def grid(self) -> pd.DataFrame:
        return grid_table(self._shown, self.spec["margin"], self.description["anatomy"]["parameters"],
                          {task: self._constant(task) for task in self.known_tasks}, self.above_chance)

    @_gives(TRANSFER)
    def transfer(self) -> pd.DataFrame:
        return transfer_table(self._shown, list(self.description.get("unseen", ())))

    @_gives(CORRELATIONS)
    def correlations(self) -> pd.DataFrame:
        return correlation_table(self._importance, self.ordering_scores, self.spec["seed"])

    @_gives(TOP_SETS)
    def top_sets(self) -> pd.DataFrame:
        return top_table(self._importance, self.ordering_scores, self.tie_scores)

    @_gives(TOP_OVERLAPS)
    def top_overlaps(self) -> pd.DataFrame:
        return overlap_table(self._importance, self.ordering_scores, self.tie_scores, self.induction(), self._aggregate)

    @_gives(INDUCTION)
    def induction(self) -> pd.DataFrame:
        return induction_rows(self._induction_entries, self.induction_thresholds)

    @_gives(RETAINED)
    def retained(self) -> pd.DataFrame:
        return retained_table(self._importance, self.ordering_scores["head"], self.induction(), self.spec["seed"],
                              self._aggregate)

    @_gives(INDUCTION_AMONG_IMPORTANT)
    def induction_among_important(self) -> pd.DataFrame:
        return among_important_table(self._importance, self.ordering_scores["head"], self.induction(), self._aggregate)

    @_gives(DEGENERATE)
    def degenerate(self) -> pd.DataFrame:
        distinct = self.distinct_values if self.ordering_scores["ffn"] == "accuracy" else {}
        return pd.concat([self.weak_results(), documents.coarse_oracles(distinct, self._layers)], ignore_index=True)

    @_gives(REMOVABLE)
    def removable(self) -> pd.DataFrame:
        return self._removal.table

    @_gives(REMOVED)
    def removed(self) -> pd.DataFrame:
        return removed_table(self._removal, {name_of(entry.job): entry.table for entry in self._entries.importance})

    def mask(
        self, *, free: bool = False, within: float | None = None, parameters: float | None = None,
        heads: float | None = None, ffns: float | None = None, order: str | None = None,
        num_fewshot: int | None = None, uniform: bool = False,
    ) -> Choice:
        """The mask of one measured point, and what the study says of it (`headcount.analysis.choice`).

        One of the ways to choose is given, of a table that `removable` is.

        Args:
            free: The fewest parameters at which a loss of the margin is ruled out, as at every smaller step.
            within: The fewest parameters at which a loss of so many points is ruled out.
            parameters: The most accurate point that leaves at most this share of the parameters.
            heads: This point: the share of heads that is removed.
            ffns: This point: the share of FFNs that is removed.
            order: By whose order parts go: "mean", that of all tasks together (the default where it was measured), or a
                task's name.
            num_fewshot: At this number of shots; by default at the most that the study has.
            uniform: Choose among points that leave every layer one shape (curves of `--uniform`).

        Raises:
            OptionError: If no point is as asked; the message names the nearest, or what there is.
            StudyError: If the study has no pruned model yet.
        """
        return self.choose(ChoiceSpec(free=free, within=within, parameters=parameters, heads=heads, ffns=ffns,
                                      order=order, shots=num_fewshot, uniform=uniform))

    def choose(self, spec: ChoiceSpec) -> Choice:
        """As `mask`, by options that lie in one object, as the command line gives them."""
        return choose(
            self.removable(), spec, tasks=tuple(self.tasks), masks=self._removal.masks, margin=self.spec["margin"],
            model=str(self.model.get("name", "")), identity=str(self.model.get("identity", "")),
            study=self.folder.resolve().name, parameters=self.description["anatomy"]["parameters"])

    def weak_results(self) -> pd.DataFrame:
        """Of `degenerate` what is of the full model's accuracies."""
        return documents.weak_results(self._full_models, self.known_tasks, self.above_chance, self._constant)

    @property
    def spec(self) -> dict[str, Any]:
        """What was asked."""
        return dict(self.description["spec"])

    @property
    def other_requests(self) -> list[str]:
        """What else the folder was asked for, a line each with its number for `open_study(folder, asked=number)`."""
        asked = self.description.get("asked", [])
        return told_apart(asked, self._shown_request) if len(asked) > 1 else []

    @property
    def model(self) -> dict[str, Any]:
        """What is known of the model."""
        return dict(self.description["model"])

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """What is known of each task."""
        return dict(self.description["tasks"])

    @property
    def known_tasks(self) -> dict[str, dict[str, Any]]:
        """What is known of each task, unseen ones (which are only pruned by others' orders) at the end."""
        return self.tasks | dict(self.description.get("unseen", {}))

    @property
    def ordering_scores(self) -> dict[str, str]:
        """Which score orders heads, and which FFNs."""
        return scores_of(self.spec)

    @property
    def tie_scores(self) -> dict[str, str]:
        """Which score decides between components of equal score, where one does; else they go by layer."""
        ties = self.ordering_scores["ffn"] == "accuracy" and self.spec["protocol"] == "sound"
        return {"ffn": "gold_loglikelihood"} if ties else {}

    @functools.cached_property
    def above_chance(self) -> dict[tuple[str, int], bool]:
        """By (task, number of shots), whether the full model is shown to be above its baseline."""
        return documents.above_chance(self._full_models, self._constant)

    @functools.cached_property
    def evaluated(self) -> dict[str, tuple[int, str]]:
        """By task, how many evaluated documents stand for themselves (passages, where some share one), and in words."""
        return documents.evaluated(self._full_models)

    @functools.cached_property
    def truncated(self) -> dict[tuple[str, int], int]:
        """How many requests were cut to fit the window, by (task, number of shots), where any were."""
        return documents.truncated([*self._entries.evaluation, *self._entries.importance])

    @functools.cached_property
    def distinct_values(self) -> dict[tuple[str, int], int]:
        """How many distinct accuracies each FFN oracle has, by (task, number of shots)."""
        return distinct_values(self._entries.importance)

    @functools.cached_property
    def hidden_scores(self) -> list[str]:
        """By which other scores curves in this folder remove heads or FFNs; they are not shown."""
        return frames.hidden_scores((entry.job for entry in self._all_entries), self.ordering_scores)

    @property
    def damaged(self) -> list[str]:
        """Names of damaged entries, which are left out of all tables."""
        return [found.name for found in self._found if found.damage]

    @functools.cached_property
    def versions_apart(self) -> dict[str, list[str]]:
        """Packages of which what is shown was measured with several versions, and these."""
        shown = [entry.info for entries in self._entries for entry in entries]
        seen: dict[str, set[str]] = {}
        for info in shown:
            known = info.get("versions")
            for package, version in (known if isinstance(known, dict) else {}).items():
                seen.setdefault(package, set()).add(str(version))
        return {package: sorted(versions) for package, versions in seen.items() if len(versions) > 1}

    @property
    def unverified(self) -> tuple[int, int]:
        """How many whole entries have no digest, since an earlier version wrote them; and how many are whole."""
        whole = [found for found in self._found if found.entry is not None]
        return sum(not found.verified for found in whole), len(whole)

    @property
    def foreign(self) -> list[str]:
        """Names of files that lie among the entries and are none; what killed processes left is not among them."""
        return [name for name in self._ledger.foreign() if not is_left_over(name)]

    @functools.cached_property
    def unshown(self) -> dict[str, int]:
        """How many measured points of "grid" and "transfer" their tables leave out."""
        return unshown(self._shown, self.grid(), self.transfer())

    @functools.cached_property
    def paper_versions(self) -> set[int]:
        """By which versions of protocol "paper" tasks were measured; the newest is shown. None of protocol "sound"."""
        jobs = [entry.job for entry in self._all_entries] if self.spec["protocol"] == "paper" else []
        return {job.paper_version or 1 for job in jobs if not isinstance(job, InductionScores)}

    @functools.cached_property
    def induction_thresholds(self) -> dict[str, float]:
        """From which score on a head is high on a primitive; NaN where that depends on a control that is not there."""
        copying = self.spec["copying_threshold"]
        if copying is None:
            control = self._induction_entries.get("random")
            copying = float("nan") if control is None else control.table["copying"].max()
        return {"prefix_matching": float(self.spec["prefix_threshold"]), "copying": float(copying)}

    @functools.cached_property
    def induction_notes(self) -> dict[str, Any]:
        """What else is known of the induction scores: reliability, lengths, sequences, notes; empty without them."""
        trained = self._induction_entries.get("trained")
        return dict(trained.info) if trained is not None else {}

    def baseline(self, task: str | None, k: int) -> float:
        """What chance, or the best constant answer where that is better, gets; without a task the mean over tasks."""
        of_tasks = self._points[k]
        return of_tasks[task].baseline if task is not None else float(
            np.mean([points.baseline for points in finished(of_tasks).values()]))

    def finished_tasks(self, k: int) -> list[str]:
        """The tasks whose curves are measured at this number of shots; means over tasks are over these."""
        return list(finished(self._points.get(k, {})))

    @property
    def _layers(self) -> int:
        return len(self.description["anatomy"]["heads_per_layer"])

    @property
    def _aggregate(self) -> str:
        return str(self.spec.get("aggregate", "mean"))

    def _constant(self, task: str) -> float:
        """What the best answer gets that can be given to all documents, 0 if there is none."""
        return float(self.known_tasks[task].get("constant_answer") or 0.0)

    @functools.cached_property
    def _all_entries(self) -> list[Done[Job]]:
        """What the folder holds, whether it is shown or not; what is described in unknown words is counted."""
        known: list[Done[Job]] = []
        self.unknown_entries = 0
        for found in self._found:
            if (entry := found.entry) is None:
                continue
            try:
                known.append(Done(job_from(entry.job), entry.info, entry.table))
            except StudyError:
                self.unknown_entries += 1
        return known

    @functools.cached_property
    def _found(self) -> list[Found]:
        return list(self._ledger.scan())

    @functools.cached_property
    def _entries(self) -> _Entries:
        """What is shown, by kind; by task and number of shots in the study's order: the ledger's is that of hashes.

        Shown is what was asked (`headcount.study.shown`) of the folder's model, as it was last defined: of what
        protocol "paper" measured of tasks only the newest version that the folder has, others are not mixed.
        """
        importance = [entry.job for entry in self._all_entries if isinstance(entry.job, ImportanceJob)]
        is_current = frames.current(importance, self.description["model"]["fingerprint"])
        newest = max(self.paper_versions, default=1)
        place = {task: number for number, task in enumerate(self.tasks)}
        entries = _Entries([], [], [])
        for entry in self._all_entries:
            job = entry.job
            if isinstance(job, InductionScores):
                if is_current(job) and job in self._asked:
                    entries.induction.append(Done(job, entry.info, entry.table))
            elif (job.paper_version or 1) == newest and is_current(job) and job in self._asked:
                if isinstance(job, Evaluation):
                    entries.evaluation.append(Done(job, entry.info, entry.table))
                else:
                    entries.importance.append(Done(job, entry.info, entry.table))

        def in_order(entry: Done[Evaluation] | Done[ImportanceJob]) -> tuple[int, int]:
            return place.get(entry.job.task, len(place)), entry.job.num_fewshot

        entries.evaluation.sort(key=in_order)
        entries.importance.sort(key=in_order)
        return entries

    @functools.cached_property
    def _asked(self) -> Shown:
        """Which entries are part of what was asked."""
        return Shown(self.description, [entry.job for entry in self._all_entries
                                        if isinstance(entry.job, ImportanceJob)])

    @functools.cached_property
    def _induction_entries(self) -> Mapping[str, Done[InductionScores]]:
        """By weights; see `headcount.analysis.induction.shown_entries`."""
        return shown_entries(self._entries.induction, self.spec)

    @functools.cached_property
    def _evaluations(self) -> pd.DataFrame:
        return frames.evaluation_rows(self._entries.evaluation, self._aggregate, self._asked.steps)

    @functools.cached_property
    def _importance(self) -> pd.DataFrame:
        return importance_rows(self._entries.importance)

    @functools.cached_property
    def _full_models(self) -> pd.DataFrame:
        rows = self._evaluations
        return rows[(rows["split"] == "evaluation") & (rows["order"] == "none")
                    & rows["task"].isin(list(self.known_tasks))]

    @functools.cached_property
    def _shown(self) -> pd.DataFrame:
        together = self.spec.get("grid_order") == "mean" and len(self.tasks) > 1
        return frames.shown(self._evaluations, self.ordering_scores, ALL_TASKS if together else OWN)

    @functools.cached_property
    def _points(self) -> dict[int, dict[str, Points]]:
        spec, shaped = self.spec, self._uniform_shares
        fractions = {**{order: [*spec["fractions"], *shaped] for order in OWN_ORDERS},
                     COMMON: [*spec.get("common_fractions", ()), *shaped], **dict.fromkeys(FREE_FORM, shaped),
                     RANDOM: [*spec["fractions"], *spec.get("random_fractions", ())]}
        return curve_points(self._shown, {task: self._constant(task) for task in spec["tasks"]}, fractions)

    @functools.cached_property
    def _uniform_shares(self) -> tuple[float, ...]:
        """The shares that curves of uniform shapes remove, where these were asked for."""
        if not self.spec.get("uniform"):
            return ()
        anatomy = self.description["anatomy"]
        full = shape_of(anatomy["heads_per_layer"], anatomy.get("kv_groups_per_layer", ()))
        return shares(self.spec["fractions"], full)

    @functools.cached_property
    def _removal(self) -> Removal:
        entries = self._entries.evaluation

        def held(job: int, number: int) -> tuple[str | None, MaskSet]:
            return entries[job].info["masks"][number].get("mask"), entries[job].job.masks

        measured = measured_points(self._shown, list(self.tasks), held)
        return removal_points(measured, self._full_models, self.spec["margin"], self.description["anatomy"][
            "parameters"], {task: self._constant(task) for task in self.tasks}, self.above_chance)
