"""Frames as the analysis of a study gives them, with planted numbers, of any shape.

They are built through the tables' declarations: a fake has the columns of the real table, and what is not planted is
missing, or 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from headcount.analysis.correlations import CORRELATIONS
from headcount.analysis.grid import GRID
from headcount.analysis.importance import DEPTH, IMPORTANCE
from headcount.analysis.induction import INDUCTION, INDUCTION_AMONG_IMPORTANT, RETAINED
from headcount.analysis.schema import Table
from headcount.analysis.top_sets import TOP_OVERLAPS, TOP_SETS
from headcount.analysis.transfer import TRANSFER
from headcount.stats.intervals import verdict

TASKS = ("arc_easy", "boolq", "cb", "copa", "hellaswag", "openbookqa", "piqa", "winogrande", "arc_challenge", "multirc",
         "record", "rte", "wic", "wsc")
THRESHOLDS = {"prefix_matching": 0.4, "copying": 0.35}
STEPS = (0.0, 0.2, 0.4, 0.6, 0.8)


# What stands where nothing was planted.
_BLANK = {"str": "", "int64": 0, "float64": np.nan, "bool": False, "Int64": pd.NA, "boolean": pd.NA}
MEAN = ("mean", "")


def planted(table: Table, rows: Sequence[Mapping[str, object]] | pd.DataFrame) -> pd.DataFrame:
    """A table of planted rows; what they leave out is missing, or 0."""
    given = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows)
    blank = {column.name: _BLANK[column.dtype] for column in table.columns if column.name not in given}
    return table.frame(given.assign(**blank))


def _with_mean(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """Scope and task of every task, and of their mean where there are several."""
    return [*(("task", task) for task in tasks), *([MEAN] if len(tasks) > 1 else [])]


def grid(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), steps: Sequence[float] = STEPS,
         layers: int = 30, heads: int = 9, reach: float = 0.45) -> pd.DataFrame:
    """Accuracy falls with the distance from the full model; cells nearer than `reach` are within the margin."""
    rows = []
    for (i, (scope, task)), k in itertools.product(enumerate(_with_mean(tasks)), shots):
        full = 0.45 + 0.03 * (i % 5) + 0.02 * k
        for h, f in itertools.product(steps, steps):
            distance = np.hypot(h / 1.6, f)
            lost = -0.4 * max(0.0, distance - reach * (1 - 0.04 * k)) ** 1.2
            low = lost - 0.015 if distance <= reach else lost - 0.05
            rows.append({
                "scope": scope, "task": task, "num_fewshot": k, "heads_fraction": h, "ffns_fraction": f,
                "heads_removed": int(h * layers * heads), "ffns_removed": int(f * layers),
                "parameters_removed_share": 0.25 * h + 0.55 * f, "accuracy": full + lost, "low": full + lost - 0.03,
                "high": full + lost + 0.03, "difference": lost, "difference_low": low, "difference_high": lost + 0.02,
                "documents": 100, "within_margin": low > -0.02, "baseline": 0.25, "order": "own",
                "verdict": verdict(low, lost + 0.02, 0.02)})
    return planted(GRID, rows)


def induction(layers: int = 30, heads: int = 9, random: bool = True, circuits: int = 8, seed: int = 0) -> pd.DataFrame:
    """`circuits` induction heads in the second half of the depth; random weights have none."""
    rng = np.random.default_rng(seed)
    frames = []
    for weights in ("trained", "random")[: 1 + random]:
        n = layers * heads
        layer, head = np.divmod(np.arange(n), heads)
        prefix, copying = rng.beta(0.6, 18, n), 0.08 + 0.5 * rng.beta(2, 7, n)
        if weights == "trained":
            at = rng.choice(np.arange(n // 2, n), circuits, replace=False)
            prefix[at], copying[at] = rng.uniform(0.5, 0.95, circuits), rng.uniform(0.4, 0.8, circuits)
            high = rng.choice(np.arange(n // 3, n), circuits // 2, replace=False)
            prefix[high] = np.maximum(prefix[high], rng.uniform(0.3, 0.8, circuits // 2))
        else:
            prefix, copying = prefix * 0.2, 0.1 + 0.02 * rng.random(n)
        frames.append(pd.DataFrame({
            "layer": layer, "head": head, "prefix_matching": prefix, "prefix_matching_variance": 0.001,
            "copying": copying, "copying_variance": 0.002, "previous_token": rng.beta(0.5, 10, n),
            "ov_copying": rng.uniform(-1, 1, n),
            "induction": pd.array((prefix >= THRESHOLDS["prefix_matching"]) & (copying >= THRESHOLDS["copying"]),
                                  "boolean"),
            "weights": weights, "protocol": "sound", "sequences": 98}))
    return planted(INDUCTION, pd.concat(frames, ignore_index=True))


def correlations(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), known: bool = True,
                 seed: int = 0) -> pd.DataFrame:
    """Tasks agree from .3 to .9, a random order with none; each pair both ways; not `known`: all scores were equal."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    names = ("correlation_in_layers", "in_layers_low", "in_layers_high", "correlation_layers_alone")
    inside = {"head": dict(zip(names, (0.55, 0.5, 0.6, 0.63), strict=True)), "ffn": dict.fromkeys(names, np.nan)}

    def add(component: str, kind: str, one: tuple[str, str], k: int, other: tuple[str, str], other_shots: int,
            rho: float) -> None:
        interval = (np.nan, np.nan) if kind == "reliability" else (rho - 0.08, min(1.0, rho + 0.06))
        for (scope, a), i, (other_scope, b), j in dict.fromkeys([(one, k, other, other_shots),
                                                                 (other, other_shots, one, k)]):
            rows.append({"component": component, "score": "position" if component == "head" else "accuracy",
                         "scope": scope, "task": a, "num_fewshot": i, "other_scope": other_scope, "other_task": b,
                         "other_shots": j, "correlation": rho, "low": interval[0], "high": interval[1],
                         "argsort_correlation": 0.02, **inside[component], "kind": kind})

    single, random = _with_mean(tasks)[: len(tasks)], ("random", "")
    for component in ("head", "ffn"):
        for k in shots:
            for task, other in itertools.combinations(single, 2):
                add(component, "tasks", task, k, other, k, rng.uniform(0.3, 0.9))
            for task in single:
                for aggregate in ("mean", "mean of ranks")[: 2 * (len(tasks) > 1)]:
                    add(component, "tasks", task, k, (aggregate, ""), k, rng.uniform(0.7, 0.95))
                add(component, "tasks", task, k, random, k, rng.uniform(-0.1, 0.1))
                add(component, "reliability", task, k, task, k, rng.uniform(0.8, 0.97))
            add(component, "reliability", random, k, random, k, 1.0)
        for task, (k, other_shots) in itertools.product(_with_mean(tasks), itertools.combinations(shots, 2)):
            add(component, "shots", task, k, task, other_shots, rng.uniform(0.4, 0.9) - 0.05 * abs(k - other_shots))
        for task, k in itertools.product(_with_mean(tasks), shots):
            add(component, "shots", task, k, random, -1, 0.01)
        add(component, "reliability", random, -1, random, -1, 1.0)
    frame = planted(CORRELATIONS, rows)
    return frame if known else frame.assign(correlation=np.nan, low=np.nan, high=np.nan, argsort_correlation=np.nan)


def transfer(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5),
             fractions: Sequence[float] = (0.3, 0.5, 0.7), unseen: Sequence[str] = ("mathqa", "lambada_openai"),
             component: str = "head", seed: int = 0) -> pd.DataFrame:
    """The i-th task's order loses i points more than the best; unseen tasks are compared with the full model."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []

    def add(one: tuple[str, str], k: int, donor: tuple[str, str], fraction: float, accuracy: float, difference: float,
            new: bool) -> None:
        rows.append({"scope": one[0], "task": one[1], "num_fewshot": k, "component": component,
                     "donor_scope": donor[0], "donor": donor[1], "fraction": fraction, "accuracy": accuracy,
                     "low": accuracy - 0.05, "high": accuracy + 0.05, "difference": difference,
                     "difference_low": difference - 0.015, "difference_high": difference + 0.015, "documents": 100,
                     "unseen": new})

    donors = {("task", name): -0.01 * i for i, name in enumerate(tasks)}
    aggregates = {("all tasks", ""): 0.005, ("other tasks", ""): 0.0} if len(tasks) > 1 else {}
    own_order = ("own", "")
    for k, fraction in itertools.product(shots, fractions):
        for one in _with_mean(tasks):
            own = 0.75 - 0.4 * fraction + 0.01 * k
            noise = 0.0 if one == MEAN else 0.02
            for donor, loss in {own_order: 0.0, **donors, **aggregates, ("random", ""): -0.2}.items():
                if donor != one or one == MEAN:
                    difference = loss + (rng.normal(0, noise) if donor != own_order else 0.0)
                    add(one, k, donor, fraction, own + difference, difference, False)
        for task in unseen:
            add(("task", task), k, ("all tasks", ""), fraction, 0.5 - 0.3 * fraction, -0.3 * fraction, True)
            add(("task", task), k, ("random", ""), fraction, 0.35 - 0.3 * fraction, -0.15 - 0.3 * fraction, True)
    for one, k in itertools.product([*_with_mean(tasks), *(("task", task) for task in unseen)], shots):
        add(one, k, ("none", ""), 0.0, 0.5, 0.0, one[1] in unseen)
    return planted(TRANSFER, rows)


def retained(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), seed: int = 0) -> pd.DataFrame:
    """Important heads carry the primitives; random orders keep as much as they leave heads."""
    rng = np.random.default_rng(seed)
    rows = []
    for (scope, task), k in itertools.product(_with_mean(tasks), shots):
        bend = 2.5 + 0.1 * k + (0.0 if scope == "mean" else rng.normal(0, 0.5))
        for primitive, fraction in itertools.product(("prefix_matching", "copying"), np.arange(0.1, 1, 0.1).round(1)):
            bent = bend if primitive == "prefix_matching" else 1.1
            rows.append({"scope": scope, "task": task, "num_fewshot": k, "primitive": primitive,
                         "fraction": float(fraction),
                         "retained": 1 - fraction**bent, "low": 0.98 * (1 - fraction**bent),
                         "high": min(1.0, 1.01 * (1 - fraction**bent)), "random_mean": 1 - fraction,
                         "random_low": 1 - fraction - 0.06,
                         "random_high": min(1.0, 1 - fraction + 0.06)})
    return planted(RETAINED, rows)


def among_important(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), heads: int = 270,
                    circuits: int = 8) -> pd.DataFrame:
    """Three quarters of the induction heads are in the top fifth of the mean; of task i two thirds, less for later."""
    rows = []
    for (i, (scope, task)), k, fraction in itertools.product(enumerate(_with_mean(tasks)), shots, (0.1, 0.2, 0.3)):
        common = int(0.75 * circuits) if scope == "mean" else max(0, int(0.66 * circuits) - i)
        rows.append({"scope": scope, "task": task, "num_fewshot": k, "fraction": fraction,
                     "important": int(fraction * heads),
                     "induction_heads": circuits, "common": common, "low": max(0, common - 1),
                     "high": min(circuits, common + 1), "expected": circuits * fraction,
                     "p": 0.0004 if scope == "mean" else 0.04, "p_fewer": 0.9, "expected_in_layers": 3.2,
                     "p_in_layers": 0.02, "p_fewer_in_layers": 0.95})
    return planted(INDUCTION_AMONG_IMPORTANT, rows)


def top_sets(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), heads: int = 270) -> pd.DataFrame:
    rows = []
    for k, fraction in itertools.product(shots, (0.1, 0.2, 0.3)):
        size = int(fraction * heads)
        common = int(0.3 * size)
        rows.append({"component": "head", "num_fewshot": k, "fraction": fraction, "size": size, "tasks": len(tasks),
                     "common": common,
                     "share": common / size, "low": (common - 2) / size, "high": (common + 2) / size,
                         "expected": heads * fraction ** len(tasks), "pair_mean_share": 0.61,
                         "expected_in_layers": 5.1, "pair_share_in_layers": 0.44})
    return planted(TOP_SETS, rows)


def top_overlaps(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), heads: int = 270) -> pd.DataFrame:
    """Pairs of tasks share half of their top heads; a fifth of those of the mean match prefixes, none copies."""
    rows = []
    for k, fraction in itertools.product(shots, (0.1, 0.2, 0.3)):
        size = int(fraction * heads)
        pairs = [(a, b, 0.5) for a, b in itertools.combinations(_with_mean(tasks)[: len(tasks)], 2)]
        pairs += [(task, ("prefix_matching", ""), 0.2) for task in _with_mean(tasks)]
        pairs += [(task, ("copying", ""), 0.0) for task in _with_mean(tasks)]
        for (scope, task), (other_scope, other), share in pairs:
            common = int(share * size)
            rows.append({"component": "head", "scope": scope, "task": task, "other_scope": other_scope,
                         "other_task": other, "num_fewshot": k, "fraction": fraction,
                         "size": size, "common": common, "low": max(0, common - 2), "high": common + 2,
                         "expected": size * fraction, "p": 0.001 if share == 0.5 else 0.6,
                         "p_fewer": 0.0002 if share == 0 else 0.55, "expected_in_layers": 6.3, "p_in_layers": 0.1,
                         "p_fewer_in_layers": 0.95})
    return planted(TOP_OVERLAPS, rows)


def depth(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), known: bool = True) -> pd.DataFrame:
    """Important heads lie in the middle third."""
    rows = []
    for (scope, task), k in itertools.product(_with_mean(tasks), shots):
        for third, share in (("early", 0.1), ("middle", 0.75), ("late", 0.15)):
            rows.append({"scope": scope, "task": task, "num_fewshot": k, "fraction": 0.2, "third": third,
                         "share": share,
                         "low": share - 0.05 if known else np.nan, "high": share + 0.05 if known else np.nan,
                         "expected": 1 / 3, "important": 54, "between_layers": 0.76,
                         "between_layers_by_chance": 29 / 269})
    return planted(DEPTH, rows)


def importance(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), layers: int = 30, heads: int = 9,
               seed: int = 0) -> pd.DataFrame:
    """Heads of the middle matter most."""
    rng = np.random.default_rng(seed)
    layer, head = np.divmod(np.arange(layers * heads), heads)
    frames = []
    for task, k in itertools.product(tasks, shots):
        hill = np.exp(-(((layer - layers * (0.5 + 0.01 * k)) / (0.3 * layers)) ** 2))
        frames.append(pd.DataFrame({
            "task": task, "num_fewshot": k, "component": "head", "layer": layer, "head": head, "method": "gradient",
            "score": "position", "importance": 0.01 * hill * rng.lognormal(0, 0.6, len(layer)), "stderr": 0.001,
            "num_examples": 100}))
    return planted(IMPORTANCE, pd.concat(frames, ignore_index=True))
