"""A study folder as tables: evaluations, importance, pruning curves, free fractions.

Curves pair every pruned model with the full one, document by document. The row group "mean" is the unweighted mean over
tasks, its interval that of a stratified sample (`stats.intervals`). Several random orders are averaged per document
first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from headcount.analysis.correlations import correlation_table
from headcount.analysis.curves import COMMON, OWN_ORDERS, RANDOM, against_random, curve_points, curve_table, free_table
from headcount.analysis.frames import current, evaluated, evaluation_rows, of_one_order, truncated
from headcount.analysis.grid import grid_table
from headcount.analysis.importance import (
    IMPORTANCE,
    aggregate_table,
    agreement_table,
    depth_table,
    distinct_values,
    importance_rows,
    orders_table,
)
from headcount.analysis.induction import among_important_table, induction_rows, retained_table
from headcount.analysis.points import MEAN, Points, compared, finished, groups, points_of
from headcount.analysis.top_sets import overlap_table, top_table
from headcount.analysis.transfer import transfer_table, unshown
from headcount.errors import StudyError
from headcount.stats import intervals
from headcount.stats.baselines import degenerate, few_distinct
from headcount.study.codec import induction_entries
from headcount.study.ledger import Entry, Ledger
from headcount.study.spec import scores_of

_REASONS = ["task", "num_fewshot", "reason"]


def open_study(folder: str | Path) -> Study:
    """Open a study folder, finished or not.

    Raises:
        StudyError: If there is no study in it.
    """
    return Study(Path(folder))


class Study:
    """The tables of a study folder.

    Attributes:
        folder: Where it is.
        description: study.json: spec, model, anatomy, tasks, versions, commands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ledger = Ledger(folder)
        description = self._ledger.read_json("study.json")
        if description is None:
            raise StudyError(f"{folder} holds no study (no study.json); name the folder given to --out")
        self.description: dict[str, Any] = description

    @property
    def spec(self) -> dict[str, Any]:
        """What was asked."""
        return dict(self.description["spec"])

    @property
    def model(self) -> dict[str, Any]:
        """What is known of the model."""
        return dict(self.description["model"])

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """What is known of each task."""
        return dict(self.description["tasks"])

    def evaluations(self) -> pd.DataFrame:
        """One row per document and mask.

        Columns: task; num_fewshot; split ("evaluation", or "examples" for the oracle's training documents); component
        ("none", "head", "ffn", "both"); order ("none" for the full model, "gradient", "oracle", "random", "single" for
        one head or FFN alone off, "grid" for heads and FFNs together, "common" for the one order of all tasks,
        "transfer" for another task's order); donor (of "transfer", "mean" where the grid is by all tasks' order);
        order_seed (-1 where not random); fraction removed (of "grid": of heads), ffn_fraction (of "grid"); layer, head
        (of "single", else -1); score (which score ordered what is removed, of the grid that of heads and that of FFNs;
        empty where none did: curves by several scores may lie in one folder, and tables are of those asked for last);
        heads_removed, ffns_removed, parameters_removed (counts); doc_id (position in its split); passage (equal for
        documents that belong together); correct (the task's metric, 0..1); gold_loglikelihood and margin (nats; NaN
        where there is one option); prediction and gold (option index); num_options; and further metrics of the task,
        such as acc_norm.
        """
        return self._evaluations.drop(columns=["job", "members", "order_of"])

    def importance(self) -> pd.DataFrame:
        """One row per component and score.

        Columns: task; num_fewshot; component ("head", "ffn"); layer; head (missing for FFNs); method ("gradient",
        "oracle"); score ("position", "example" in nats; "accuracy" and "gold_loglikelihood" as what is lost);
        importance; stderr (over examples, those of a passage together); num_examples.
        """
        return self._importance[IMPORTANCE].copy()

    def aggregate_importance(self) -> pd.DataFrame:
        """Importance over tasks: one row per component and score, for their mean and for the mean of their ranks.

        Columns: task ("mean", the paper's aggregate, and "mean of ranks", 0..1; with one task alone that one);
        num_fewshot; component; layer; head; method; score; importance; stderr (of the mean over these very tasks; NaN
        for ranks); rank (1 goes last); rank_low, rank_high, its 95 % interval: after all components that are shown to
        be above it, before all shown to be below, by paired comparisons (`stats.ranks.rank_intervals`). Components
        that a task lacks have none. `--aggregate` says which of the two orders.
        """
        return self._aggregate_importance.copy()

    def depth(self) -> pd.DataFrame:
        """Where the most important fifth of the heads lies, and how much of importance is depth: see `tops.depth`."""
        return self._depth.copy()

    def agreement(self) -> pd.DataFrame:
        """How well gradient scores rank components as their oracle does: one row per task, shots, component and score.

        Columns: task; num_fewshot; component; score ("position", "example"); oracle ("accuracy" or
        "gold_loglikelihood" lost); correlation (Spearman) with its 95 % interval low, high, over components; components
        (how many both methods scored). The oracle's own noise, few documents and few distinct values, lowers it.
        """
        return agreement_table(self._importance)

    def orders(self) -> pd.DataFrame:
        """How reliable the order by every score is: one row per task (and "mean"), shots, component, method and score.

        Columns: those; orders (whether this score orders such components); reliability (share of the variance that is
        not noise, 0..1, `stats.ranks.score_reliability`); distinct (values); components; documents (measured on).
        """
        return orders_table(self._importance, self.ordering_scores)

    def curves(self) -> pd.DataFrame:
        """One row per task, number of shots, component, order and fraction; task "mean" is the mean over tasks.

        Columns: task; num_fewshot; component; order ("gradient", "oracle": each task's own; "common": that of all tasks
        together, which is one set for all tasks; "random"); fraction; removed (how many);
        parameters_removed and parameters_removed_share (of the model; means where several random orders are averaged);
        accuracy with its 95 % interval low, high; difference to the full model with its interval difference_low,
        difference_high (`headcount.stats.intervals`); verdict of it and the margin ("within", "costs more", "unknown");
        p (exact paired test that as many documents got worse as better, corrected for the curve's steps); documents;
        changed (how many documents' metric differs from the full model's), fell, rose; draws (random orders that are
        averaged). Fraction 0 is the full model, repeated for each order; a study without curves has it once, with
        component and order "none".
        """
        return self._curves.copy()

    def free_fractions(self) -> pd.DataFrame:
        """How much can go: one row per task (and "mean"), number of shots, component and measured order.

        Columns: task; num_fewshot; component; order; free_fraction (NaN where not defined), the lower end of a 95 %
        interval for what unlimited documents would show, whose upper end is free_high; reason (why not, or empty);
        removed and parameters_removed (at that fraction); accuracy, difference_low, difference_high, changed (there);
        full_accuracy, full_low; baseline (the better of chance and the best constant answer); tasks (how many the row
        is over), above_chance (on how many of them the full model is shown to be above its baseline),
        above_chance_difference with above_chance_low, above_chance_high (the difference on the mean of those alone, at
        that fraction; both were chosen on these documents); of the next step next_fraction, next_removed,
        next_difference with next_low, next_high, next_verdict and next_documents (how many documents of all tasks
        together would tell, if as large a share of them changed as now; infinite where the loss seen is the margin);
        documents. Order "common" is one set for all tasks, the others are each task's own.
        """
        return self._free_fractions.copy()

    def against_random(self) -> pd.DataFrame:
        """Measured orders beside random ones: one row per task (and "mean"), shots, component, order and fraction.

        Columns: task; num_fewshot; component; order; fraction; accuracy; random (mean accuracy of the random orders),
        draws (how many), draw_low, draw_high (the least and the most accurate of them); difference (accuracy less
        random) with its 95 % interval difference_low, difference_high over documents and draws (NaN for a single draw).
        """
        return self._against_random.copy()

    def grid(self) -> pd.DataFrame:
        """Heads and FFNs pruned jointly: one row per task (and "mean"), number of shots and pair of fractions.

        Columns: task; num_fewshot; heads_fraction, ffns_fraction; heads_removed, ffns_removed (counts);
        parameters_removed_share; accuracy with its 95 % interval low, high; difference to the full model with
        difference_low, difference_high; p (paired test, one by one); documents; changed, fell, rose; verdict ("within",
        "costs more", "unknown"; cell by cell, "unknown" where the full model is not above its baseline); within_margin
        (whether it is "within"); baseline (what guessing, or the best constant answer, gets); order ("own" of each
        task, or "mean", that of all tasks together).
        """
        return self._grid.copy()

    def transfer(self) -> pd.DataFrame:
        """Tasks pruned by other tasks' orders: one row per task (and "mean"), shots, component, donor and fraction.

        Columns: task, the one that is pruned; num_fewshot; component; donor ("none" for the full model at fraction 0,
        "own", another task, "mean" for the aggregate of all tasks, "mean without own", "random"); fraction; accuracy
        with its 95 % interval low, high; difference to the own order (of an unseen task: to the full model) with
        difference_low, difference_high; p (paired test, one by one); documents; changed, fell, rose; unseen. The full
        model has no difference where a task has an order of its own, and no mean where some fractions' means are over
        fewer tasks. On the mean, a donor serves all tasks but itself, so that two donors' means are not over the same
        tasks.
        """
        return self._transfer.copy()

    def correlations(self) -> pd.DataFrame:
        """Spearman's correlation of importance between tasks, and between numbers of shots; one row per ordered pair.

        Columns: component; score (the one that orders it); and those of `analysis.correlations.correlations`: task,
        num_fewshot, other_task, other_shots, correlation with its 95 % interval low, high over documents, ceiling,
        disattenuated, argsort_correlation (what the paper's code computes), correlation_in_layers with in_layers_low,
        in_layers_high, correlation_layers_alone (the part that is only depth), kind ("tasks", "shots", "reliability").
        """
        return self._correlations.copy()

    def top_sets(self) -> pd.DataFrame:
        """How much the top heads, and FFNs, of all tasks have in common.

        Columns: component; and those of `analysis.top_sets.top_sets`: num_fewshot, fraction, size, tasks, common,
        share with its 95 % interval low, high, expected, pair_mean_share, expected_in_layers, pair_share_in_layers.
        """
        return self._top_sets.copy()

    def top_overlaps(self) -> pd.DataFrame:
        """How much the top heads, and FFNs, of two tasks have in common, and the top heads with induction scores.

        Columns: component; and those of `analysis.top_sets.top_overlaps`: task (and the aggregate, for heads), other
        (another task, or "prefix_matching", "copying": the heads highest on it), num_fewshot, fraction, size, common
        with its 95 % interval low, high, expected, p, p_fewer, and for heads expected_in_layers, p_in_layers,
        p_fewer_in_layers.
        """
        return self._top_overlaps.copy()

    def induction(self) -> pd.DataFrame:
        """Induction scores of every head: one row per head and weights.

        Columns: layer; head; prefix_matching, copying, previous_token (means over random texts, with
        prefix_matching_variance, ... over texts); ov_copying (eigenvalue score, -1..1); induction (whether high on
        both prefix matching and copying; missing before the control is measured that copying's threshold depends on);
        weights ("trained", or "random" for the same model with random weights); protocol; sequences (texts).
        """
        return self._induction.copy()

    def retained(self) -> pd.DataFrame:
        """Which share of prefix matching, and of copying, is left as heads go; `headcount.analysis.induction.retained`.

        Columns: task (and the aggregate, "mean" or "mean of ranks"); num_fewshot; primitive; fraction of heads removed;
        retained with its 95 % interval low, high; random_mean, random_low, random_high (of random orders).
        """
        return self._retained.copy()

    def induction_among_important(self) -> pd.DataFrame:
        """How many induction heads are among the important ones; `analysis.induction.induction_among_important`.

        Columns: task (and the aggregate); num_fewshot; fraction; important; induction_heads; common with its 95 %
        interval low, high; expected; p; p_fewer; expected_in_layers; p_in_layers; p_fewer_in_layers.
        """
        return self._among_important.copy()

    @property
    def known_tasks(self) -> dict[str, dict[str, Any]]:
        """What is known of each task, unseen ones (which are only pruned by others' orders) at the end."""
        return self.tasks | dict(self.description.get("unseen", {}))

    def _constant(self, task: str) -> float:
        """What the best answer gets that can be given to all documents, 0 if there is none."""
        return float(self.known_tasks[task].get("constant_answer") or 0.0)

    @property
    def _aggregate(self) -> str:
        return str(self.spec.get("aggregate", "mean"))

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
        found = self._induction_entries.get("trained")
        return dict(found.info) if found is not None else {}

    def degenerate(self) -> pd.DataFrame:
        """What says little: one row per reason. Columns: task; num_fewshot; reason."""
        layers = len(self.description["anatomy"]["heads_per_layer"])
        rows = [{"task": task, "num_fewshot": k, "reason": reason} for (task, k), n in self.distinct_values.items()
                if self.ordering_scores["ffn"] == "accuracy" for reason in few_distinct(n, layers)]
        return pd.concat([self.weak_results(), pd.DataFrame(rows, columns=_REASONS)], ignore_index=True)

    def weak_results(self) -> pd.DataFrame:
        """Of `degenerate` what is of the full model's accuracies."""
        rows = [{"task": task, "num_fewshot": k, "reason": reason}
                for (task, k), full in groups(self._full_models, "task", "num_fewshot")
                for reason in degenerate(
                    full["correct"].to_numpy(np.float64), full["prediction"].to_numpy(),
                    full["num_options"].to_numpy(), clusters=full["passage"].to_numpy(),
                    low=compared([points_of(full, full)], [None])[None].low, above=self.above_chance[str(task), int(k)],
                    constant=self._constant(str(task)),
                    places=self.known_tasks[str(task)].get("constant_places"))]
        return pd.DataFrame(rows, columns=_REASONS)

    @functools.cached_property
    def above_chance(self) -> dict[tuple[str, int], bool]:
        """By (task, number of shots), whether the full model is shown to be above what guessing, or one answer, gets.

        Corrected for how many tasks there are at a number of shots (`intervals.above_baseline`).
        """
        found: dict[tuple[str, int], bool] = {}
        for k, of_k in groups(self._full_models, "num_fewshot"):
            points = {str(task): points_of(full, full, constant=self._constant(str(task)))
                      for task, full in groups(of_k, "task")}
            able = intervals.above_baseline([p.sample(p.full[None]) for p in points.values()],
                                            [p.baseline for p in points.values()])
            found |= {(task, int(k)): one for task, one in zip(points, able, strict=True)}
        return found

    @functools.cached_property
    def evaluated(self) -> dict[str, tuple[int, str]]:
        """By task, how many evaluated documents stand for themselves (passages, where some share one), and in words."""
        return evaluated(self._full_models)

    @functools.cached_property
    def _full_models(self) -> pd.DataFrame:
        rows = self._evaluations
        return rows[(rows["split"] == "evaluation") & (rows["order"] == "none") & rows["task"].isin(self.known_tasks)]

    @functools.cached_property
    def _correlations(self) -> pd.DataFrame:
        return correlation_table(self._importance, self.ordering_scores, self.spec["seed"])

    @functools.cached_property
    def _retained(self) -> pd.DataFrame:
        return retained_table(
            self._importance, self.ordering_scores["head"], self._induction, self.spec["seed"], self._aggregate
        )

    @functools.cached_property
    def _among_important(self) -> pd.DataFrame:
        return among_important_table(
            self._importance, self.ordering_scores["head"], self._induction, self._aggregate
        )

    @functools.cached_property
    def _induction_entries(self) -> dict[str, Entry]:
        """By weights; see `headcount.study.codec.induction_entries`."""
        return induction_entries((entry for entry in self._ledger.entries("induction")
                                  if self._is_of_model(entry.job)), self.spec)

    @functools.cached_property
    def _induction(self) -> pd.DataFrame:
        return induction_rows(self._induction_entries, self.induction_thresholds)

    def _entries(self, kind: str) -> list[Entry]:
        """By task and number of shots, in the study's order: the ledger's is that of hashes."""
        order = {task: number for number, task in enumerate(self.tasks)}
        return sorted((entry for entry in self._ledger.entries(kind) if self._is_of_model(entry.job)),
                      key=lambda entry: (order.get(entry.job["task"], len(order)), entry.job["num_fewshot"]))

    def _is_of_model(self, job: Mapping[str, Any]) -> bool:
        """Whether a job is of the folder's model, and of what it measures as it was last defined.

        Of what protocol "paper" measured of tasks, only the newest version that the folder has: others are not mixed.
        """
        newest = job["kind"] == "induction" or job.get("paper_version", 1) == max(self.paper_versions, default=1)
        return newest and self._is_current(job)

    @functools.cached_property
    def _is_current(self) -> Callable[[Mapping[str, Any]], bool]:
        importance = (job for job, _ in self._ledger.descriptions("importance"))
        return current(importance, self.description["model"]["fingerprint"])

    @functools.cached_property
    def paper_versions(self) -> set[int]:
        """By which versions of protocol "paper" tasks were measured; the newest is shown. None of protocol "sound"."""
        jobs = (job for job, _ in self._ledger.descriptions()) if self.spec["protocol"] == "paper" else ()
        return {job.get("paper_version", 1) for job in jobs if job["kind"] != "induction"}

    @functools.cached_property
    def _evaluations(self) -> pd.DataFrame:
        return evaluation_rows(self._entries("evaluation"), self._aggregate)

    @functools.cached_property
    def _shown(self) -> pd.DataFrame:
        """Of the evaluations those whose orders are by the scores that were asked for last, or by none."""
        rows, by = self._evaluations, self.ordering_scores
        donor = MEAN if self.spec.get("grid_order") == MEAN and len(self.tasks) > 1 else ""
        of_grid = (rows["order"] == "grid") & (rows["score"] == f"{by['head']} {by['ffn']}") & (rows["donor"] == donor)
        shown = (rows["score"] == "") | of_grid | (rows["score"] == rows["component"].map(by))
        return of_one_order(rows[shown])

    @functools.cached_property
    def hidden_scores(self) -> list[str]:
        """By which other scores curves in this folder remove heads or FFNs; they are not shown."""
        rows = self._evaluations
        orders = rows[rows["component"].isin(["head", "ffn"]) & (rows["score"] != "")]
        other = orders["score"] != orders["component"].map(self.ordering_scores)
        return sorted({f"{'heads' if c == 'head' else 'FFNs'} by {score}" for c, score in zip(
            orders.loc[other, "component"], orders.loc[other, "score"], strict=True)})

    @functools.cached_property
    def _importance(self) -> pd.DataFrame:
        return importance_rows(self._entries("importance"))

    @functools.cached_property
    def _aggregate_importance(self) -> pd.DataFrame:
        return aggregate_table(self._importance, self.ordering_scores, self.tie_scores)

    @functools.cached_property
    def _depth(self) -> pd.DataFrame:
        return depth_table(self._importance, self.spec["head_score"], self._aggregate,
                                  len(self.description["anatomy"]["heads_per_layer"]))

    @functools.cached_property
    def _top_sets(self) -> pd.DataFrame:
        return top_table(self._importance, self.ordering_scores, self.tie_scores)

    @functools.cached_property
    def _top_overlaps(self) -> pd.DataFrame:
        return overlap_table(
            self._importance, self.ordering_scores, self.tie_scores, self._induction, self._aggregate
        )

    @functools.cached_property
    def distinct_values(self) -> dict[tuple[str, int], int]:
        """How many distinct accuracies each FFN oracle found, by (task, number of shots)."""
        return distinct_values(self._described("importance"))

    @functools.cached_property
    def truncated(self) -> dict[tuple[str, int], int]:
        """How many requests were cut to fit the window, by (task, number of shots), where any were."""
        return truncated(self._described())

    @functools.cached_property
    def unshown(self) -> dict[str, int]:
        """How many measured points of "grid" and "transfer" their tables leave out."""
        return unshown(self._shown, self._grid, self._transfer)

    def _described(self, kind: str | None = None) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        return [(job, info) for job, info in self._ledger.descriptions(kind) if self._is_of_model(job)]

    @functools.cached_property
    def _points(self) -> dict[int, dict[str, Points]]:
        spec = self.spec
        fractions = {**dict.fromkeys(OWN_ORDERS, spec["fractions"]), COMMON: spec.get("common_fractions", ()),
                     RANDOM: [*spec["fractions"], *spec.get("random_fractions", ())]}
        return curve_points(self._shown, {task: self._constant(task) for task in spec["tasks"]}, fractions)

    @functools.cached_property
    def _curves(self) -> pd.DataFrame:
        return curve_table(self._points, self.description["anatomy"]["parameters"], self.spec["margin"])

    @functools.cached_property
    def _free_fractions(self) -> pd.DataFrame:
        return free_table(self._curves, self._points, self.spec["margin"], self.above_chance)

    @functools.cached_property
    def _against_random(self) -> pd.DataFrame:
        return against_random(self._points)

    @functools.cached_property
    def _grid(self) -> pd.DataFrame:
        return grid_table(self._shown, self.spec["margin"], self.description["anatomy"]["parameters"],
                          {task: self._constant(task) for task in self.known_tasks}, self.above_chance)

    @functools.cached_property
    def _transfer(self) -> pd.DataFrame:
        return transfer_table(self._shown, list(self.description.get("unseen", ())))

    def baseline(self, task: str, k: int) -> float:
        """What chance, or the best constant answer where that is better, gets; for "mean" the mean over tasks."""
        of_tasks = self._points[k]
        return float(np.mean([p.baseline for p in finished(of_tasks).values()]) if task == MEAN
                     else of_tasks[task].baseline)

    def finished_tasks(self, k: int) -> list[str]:
        """The tasks whose curves are measured at this number of shots; means over tasks are over these."""
        return list(finished(self._points.get(k, {})))
