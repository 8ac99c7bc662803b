"""A study folder as tables: evaluations, importance, pruning curves, free fractions.

Curves pair every pruned model with the full one, document by document. The row group "mean" is the unweighted mean
over tasks, its interval from documents drawn within each task. Several random orders are averaged per document first.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from headcount import stats
from headcount.errors import StudyError
from headcount.ledger import Ledger

MEAN = "mean"
_LABELS = ("component", "order", "order_seed", "fraction", "layer", "head", "heads_removed", "ffns_removed",
           "parameters_removed")
_CURVE = ["task", "num_fewshot", "component", "order", "fraction", "removed", "parameters_removed",
          "parameters_removed_share", "accuracy", "low", "high", "difference", "difference_low", "difference_high",
          "documents", "changed"]
_IMPORTANCE = ["task", "num_fewshot", "component", "layer", "head", "method", "score", "importance", "stderr",
               "num_examples"]
_AGREEMENT = ["task", "num_fewshot", "component", "score", "oracle", "correlation", "low", "high", "components"]


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
        description: study.json: spec, model, anatomy, tasks, versions, command.
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
        ("none", "head", "ffn"); order ("none" for the full model, "gradient", "oracle", "random", or "single" for one
        head or FFN alone off); order_seed (-1 where not random); fraction removed; layer, head (of "single", else -1);
        heads_removed, ffns_removed, parameters_removed (counts); doc_id (position in its split); correct (the task's
        metric, 0..1); gold_loglikelihood and margin (nats; NaN where there is one option); prediction and gold (option
        index); num_options; and further metrics of the task, such as acc_norm.
        """
        return self._evaluations.copy()

    def importance(self) -> pd.DataFrame:
        """One row per component and score.

        Columns: task; num_fewshot; component ("head", "ffn"); layer; head (missing for FFNs); method ("gradient",
        "oracle"); score ("position", "example" in nats; "accuracy" and "gold_loglikelihood" as what is lost);
        importance; stderr (over examples); num_examples.
        """
        return self._importance.copy()

    def agreement(self) -> pd.DataFrame:
        """How well gradient scores rank components as their oracle does: one row per task, shots, component and score.

        Columns: task; num_fewshot; component; score ("position", "example"); oracle ("accuracy" or
        "gold_loglikelihood" lost); correlation (Spearman) with its 95 % interval low, high, over components; components
        (how many both methods scored). The oracle's own noise, few documents and few distinct values, lowers it.
        """
        rows: list[dict[str, Any]] = []
        for (task, k, component), of_task in groups(self._importance, "task", "num_fewshot", "component"):
            wide = of_task.pivot_table(index=["layer", "head"], columns=["method", "score"], values="importance",
                                       dropna=False).dropna(axis=1, how="all")
            for score, lost in itertools.product(("position", "example"), ("accuracy", "gold_loglikelihood")):
                if ("gradient", score) in wide and ("oracle", lost) in wide:
                    both = wide[[("gradient", score), ("oracle", lost)]].dropna().to_numpy()
                    rho, low, high = stats.rank_correlation(both[:, 0], both[:, 1])
                    rows.append({"task": task, "num_fewshot": k, "component": component, "score": score,
                                 "oracle": lost, "correlation": rho, "low": low, "high": high,
                                 "components": len(both)})
        return pd.DataFrame(rows, columns=_AGREEMENT)

    def curves(self) -> pd.DataFrame:
        """One row per task, number of shots, component, order and fraction; task "mean" is the mean over tasks.

        Columns: task; num_fewshot; component; order ("gradient", "oracle", "random"); fraction; removed (how many);
        parameters_removed and parameters_removed_share (of the model; means where several random orders are averaged);
        accuracy with its 95 % interval low, high; difference to the full model with its interval difference_low,
        difference_high; documents; changed (how many documents' metric differs from the full model's). Fraction 0 is
        the full model, repeated for each order; a study without curves has it once, with component and order "none".
        """
        return self._curves.copy()

    def free_fractions(self) -> pd.DataFrame:
        """How much can go: one row per task (and "mean"), number of shots, component and measured order.

        Columns: task; num_fewshot; component; order; free_fraction (NaN where not defined); reason (why not, or
        empty); removed and parameters_removed (at that fraction); accuracy, difference_low, difference_high, changed
        (there; where fraction > 0 and changed is 0 the interval has no width and promises too much); full_accuracy,
        full_low; baseline (the better of chance and the best constant answer).
        """
        return self._free_fractions.copy()

    @functools.cached_property
    def _evaluations(self) -> pd.DataFrame:
        frames = []
        for entry in self._ledger.entries("evaluation"):
            labels = pd.DataFrame([{name: mask.get(name, -1) for name in _LABELS} for mask in entry.info["masks"]])
            labels.insert(0, "mask", range(len(labels)))
            for name in ("split", "num_fewshot", "task"):
                labels.insert(1, name, entry.job[name])
            frames.append(labels.merge(entry.table, on="mask").drop(columns="mask"))
        columns = ["task", "num_fewshot", "split", *_LABELS, "doc_id", "correct"]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)

    @functools.cached_property
    def _importance(self) -> pd.DataFrame:
        frames = []
        for entry in self._ledger.entries("importance"):
            known = {"task": entry.job["task"], "num_fewshot": entry.job["num_fewshot"],
                     "method": entry.job["method"], "num_examples": entry.info["num_examples"]}
            frames.append(entry.table.assign(**known))
        if not frames:
            return pd.DataFrame(columns=_IMPORTANCE)
        table = pd.concat(frames, ignore_index=True)[_IMPORTANCE]
        # Oracles of a sample of heads and of all of them may both be there.
        table = table.drop_duplicates(["task", "num_fewshot", "component", "layer", "head", "method", "score"])
        table["head"] = table["head"].astype("Int64").where(table["component"] == "head")
        return table

    @functools.cached_property
    def distinct_values(self) -> dict[tuple[str, int], int]:
        """How many distinct accuracies each FFN oracle found, by (task, number of shots)."""
        found = {(e.job["task"], e.job["num_fewshot"]): e.info["distinct_values"]
                 for e in self._ledger.entries("importance")
                 if e.job["method"] == "oracle" and e.job.get("component", "ffn") == "ffn"}
        return dict(sorted(found.items()))

    @functools.cached_property
    def truncated(self) -> dict[tuple[str, int], int]:
        """How many requests were cut to fit the window, by (task, number of shots), where any were."""
        found: dict[tuple[str, int], int] = {}
        for entry in self._ledger.entries():
            # Evaluated and training documents have entries of their own: neither may hide the other's count.
            key = (entry.job["task"], entry.job["num_fewshot"])
            found[key] = max(found.get(key, 0), entry.info.get("truncated", 0))
        return {key: n for key, n in sorted(found.items()) if n}

    @functools.cached_property
    def _points(self) -> dict[tuple[int, str], _Points]:
        """The evaluated documents of every (number of shots, task) that has its full model."""
        rows = self._evaluations
        # Under protocol "paper" the FFN oracle's evaluations are of these documents too; they are no curve.
        rows = rows[(rows["split"] == "evaluation") & (rows["order"] != "single")]
        found = {(int(k), str(task)): _points(group) for (k, task), group in groups(rows, "num_fewshot", "task")
                 if (group["order"] == "none").any()}
        order = {name: i for i, name in enumerate(self.spec["tasks"])}
        return dict(sorted(found.items(), key=lambda item: (order.get(item[0][1], len(order)), item[0][0])))

    @functools.cached_property
    def _curves(self) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        for (k, task), points in self._points.items():
            rows += self._rows(task, k, [points])
        for k in sorted({k for k, _ in self._points}):
            of_k = [p for (other, _), p in self._points.items() if other == k]
            if len(of_k) > 1:
                rows += self._rows(MEAN, k, of_k)
        return pd.DataFrame(rows, columns=_CURVE)

    def _rows(self, task: str, k: int, tasks: Sequence[_Points]) -> Iterator[dict[str, Any]]:
        """Curve rows of one task, or of the mean over tasks: points that every task has."""
        keys = [key for key in tasks[0].values if all(key in t.values for t in tasks)]
        # Entries come by file name, a hash: readers get heads before FFNs, and measured orders before random ones.
        keys.sort(key=lambda key: (key[0] != "head", key[1] == "random", key))
        stacked = [np.stack([t.full, *(t.values[key] for key in keys)]) for t in tasks]
        draws = [stats.resampled_means(values, seed=t.seed) for values, t in zip(stacked, tasks, strict=True)]
        samples = np.mean(draws, axis=0)
        means = np.mean([values.mean(axis=1) for values in stacked], axis=0)
        low, high = stats.interval(samples)
        difference_low, difference_high = stats.interval(samples - samples[0])
        parameters = self.description["anatomy"]["parameters"]
        documents = sum(len(t.full) for t in tasks)

        def row(component: str, order: str, fraction: float, i: int) -> dict[str, Any]:
            removed = np.mean([t.removed.get((component, order, fraction), (0, 0)) for t in tasks], axis=0)
            changed = sum(int((values[i] != values[0]).sum()) for values in stacked)
            return dict(zip(_CURVE, (
                task, k, component, order, fraction, int(removed[0]), float(removed[1]),
                float(removed[1]) / parameters, means[i], low[i], high[i], means[i] - means[0], difference_low[i],
                difference_high[i], documents, changed), strict=True))

        curves = dict.fromkeys(key[:2] for key in keys)
        if not curves:
            yield row("none", "none", 0.0, 0)
        for component, order in curves:
            yield row(component, order, 0.0, 0)
            steps = sorted((key[2], i) for i, key in enumerate(keys, 1) if key[:2] == (component, order))
            for fraction, i in steps:
                yield row(component, order, fraction, i)

    @functools.cached_property
    def _free_fractions(self) -> pd.DataFrame:
        curves = self._curves[~self._curves["order"].isin(["random", "none"])]
        rows = [self._free(task, int(k), component, order, curve)
                for (task, k, component, order), curve in groups(curves, "task", "num_fewshot", "component", "order")]
        return pd.DataFrame(rows, columns=["task", "num_fewshot", "component", "order", "free_fraction", "reason",
                                           "removed", "parameters_removed", "accuracy", "difference_low",
                                           "difference_high", "changed", "full_accuracy", "full_low", "baseline"])

    def _free(self, task: str, k: int, component: str, order: str, curve: pd.DataFrame) -> dict[str, Any]:
        full = curve.iloc[0]
        baseline = self.baseline(task, k)
        found = {"task": task, "num_fewshot": k, "component": component, "order": order, "reason": "",
                 "full_accuracy": full["accuracy"], "full_low": full["low"], "baseline": baseline}
        if not full["low"] > baseline:
            reason = (f"the full model's accuracy, {full['accuracy']:.2f} (at least {full['low']:.2f}), is not above "
                      f"{baseline:.2f}, which guessing or a constant answer gets")
            return {**found, "free_fraction": np.nan, "reason": reason}
        free = stats.free_fraction(curve["fraction"].tolist(), curve["difference_low"].tolist(), self.spec["margin"])
        at = curve[curve["fraction"] == free].iloc[0]
        return {**found, "free_fraction": free,
                **{name: at[name] for name in ("removed", "parameters_removed", "accuracy", "difference_low",
                                               "difference_high", "changed")}}

    def baseline(self, task: str, k: int) -> float:
        """What chance, or the best constant answer where that is better, gets; for "mean" the mean over tasks."""
        chosen = [p.baseline for (other, name), p in self._points.items() if other == k and task in (name, MEAN)]
        return float(np.mean(chosen))


class _Points:
    """The metric of one task's evaluated documents at one number of shots: full model and every curve point."""

    def __init__(self, full: Float[np.ndarray, " doc"], baseline: float, seed: int) -> None:
        self.full, self.baseline, self.seed = full, baseline, seed
        self.values: dict[tuple[str, str, float], Float[np.ndarray, " doc"]] = {}
        self.removed: dict[tuple[str, str, float], tuple[float, float]] = {}


def _points(rows: pd.DataFrame) -> _Points:
    full = rows[rows["order"] == "none"].sort_values("doc_id")
    options, gold = full["num_options"].to_numpy(), full["gold"].to_numpy()
    # NaN where the options differ in number: then chance alone counts.
    baseline = float(np.nanmax([stats.chance(options), stats.constant_answer(gold, options)]))
    # The same documents are drawn for a task at every number of shots, other ones for another task.
    found = _Points(full["correct"].to_numpy(np.float64), baseline, zlib.crc32(str(rows["task"].iloc[0]).encode()))
    for (component, order, fraction), group in groups(rows[rows["order"] != "none"], "component", "order", "fraction"):
        key = (str(component), str(order), float(fraction))
        found.values[key] = group.groupby("doc_id")["correct"].mean().to_numpy(np.float64)
        removed = group["heads_removed" if component == "head" else "ffns_removed"].mean()
        found.removed[key] = (float(removed), float(group["parameters_removed"].mean()))
    return found


def groups(table: pd.DataFrame, *columns: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """The rows of every combination of values of these columns, in the order in which they first stand there."""
    yield from table.groupby(columns[0] if len(columns) == 1 else list(columns), sort=False)


def name_of(component: str, layer: int, head: object) -> str:
    """`L5H1` for a head, `L5F` for an FFN."""
    return f"L{layer}H{head}" if component == "head" else f"L{layer}F"


def mean_importance(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over tasks of each component's importance, by number of shots, method and score.

    The standard error is that of the mean over these very tasks, whose documents are independent.
    """
    keys = ["num_fewshot", "component", "layer", "head", "method", "score"]
    groups = table.assign(square=table["stderr"] ** 2).groupby(keys, dropna=False, as_index=False, sort=False)
    mean: pd.DataFrame = groups.agg(importance=("importance", "mean"), square=("square", _sum_known),
                                    n=("square", "size"))
    mean["stderr"] = np.sqrt(mean["square"]) / mean["n"]
    return mean.drop(columns=["square", "n"]).assign(task=MEAN)


def _sum_known(values: pd.Series) -> float:
    """NaN where one of them is: an unknown error is not none."""
    return float(values.sum(skipna=False))


def constants(description: Mapping[str, Any]) -> tuple[int, int, int]:
    """Number of heads, of FFNs, and of parameters of a study's model."""
    anatomy = description["anatomy"]
    return sum(anatomy["heads_per_layer"]), len(anatomy["heads_per_layer"]), anatomy["parameters"]
