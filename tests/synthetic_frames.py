"""Frames as the analysis of a study gives them, with planted numbers, of any shape."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from headcount.stats.intervals import verdict

TASKS = ("arc_easy", "boolq", "cb", "copa", "hellaswag", "openbookqa", "piqa", "winogrande", "arc_challenge", "multirc",
         "record", "rte", "wic", "wsc")
THRESHOLDS = {"prefix_matching": 0.4, "copying": 0.35}
STEPS = (0.0, 0.2, 0.4, 0.6, 0.8)


def _with_mean(tasks: Sequence[str]) -> list[str]:
    return [*tasks, "mean"] if len(tasks) > 1 else list(tasks)


def grid(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), steps: Sequence[float] = STEPS,
         layers: int = 30, heads: int = 9, reach: float = 0.45) -> pd.DataFrame:
    """Accuracy falls with the distance from the full model; cells nearer than `reach` are within the margin."""
    rows = []
    for (i, task), k in itertools.product(enumerate(_with_mean(tasks)), shots):
        full = 0.45 + 0.03 * (i % 5) + 0.02 * k
        for h, f in itertools.product(steps, steps):
            distance = np.hypot(h / 1.6, f)
            lost = -0.4 * max(0.0, distance - reach * (1 - 0.04 * k)) ** 1.2
            low = lost - 0.015 if distance <= reach else lost - 0.05
            rows.append({
                "task": task, "num_fewshot": k, "heads_fraction": h, "ffns_fraction": f,
                "heads_removed": int(h * layers * heads), "ffns_removed": int(f * layers),
                "parameters_removed_share": 0.25 * h + 0.55 * f, "accuracy": full + lost, "low": full + lost - 0.03,
                "high": full + lost + 0.03, "difference": lost, "difference_low": low, "difference_high": lost + 0.02,
                "documents": 100, "within_margin": low > -0.02, "baseline": 0.25, "order": "own",
                "verdict": verdict(low, lost + 0.02, 0.02)})
    return pd.DataFrame(rows)


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
    return pd.concat(frames, ignore_index=True)


def correlations(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), known: bool = True,
                 seed: int = 0) -> pd.DataFrame:
    """Tasks agree from .3 to .9, a random order with none; each pair both ways; not `known`: all scores were equal."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    names = ("correlation_in_layers", "in_layers_low", "in_layers_high", "correlation_layers_alone")
    inside = {"head": dict(zip(names, (0.55, 0.5, 0.6, 0.63), strict=True)), "ffn": dict.fromkeys(names, np.nan)}

    def add(component: str, kind: str, task: str, k: int, other: str, other_shots: int, rho: float) -> None:
        interval = (np.nan, np.nan) if kind == "reliability" else (rho - 0.08, min(1.0, rho + 0.06))
        for a, i, b, j in dict.fromkeys([(task, k, other, other_shots), (other, other_shots, task, k)]):
            rows.append({"component": component, "score": "position" if component == "head" else "accuracy", "task": a,
                         "num_fewshot": i, "other_task": b, "other_shots": j, "correlation": rho, "low": interval[0],
                         "high": interval[1], "ceiling": np.nan, "argsort_correlation": 0.02, **inside[component],
                         "kind": kind})

    for component in ("head", "ffn"):
        for k in shots:
            for task, other in itertools.combinations(tasks, 2):
                add(component, "tasks", task, k, other, k, rng.uniform(0.3, 0.9))
            for task in tasks:
                for aggregate in ("mean", "mean of ranks")[: 2 * (len(tasks) > 1)]:
                    add(component, "tasks", task, k, aggregate, k, rng.uniform(0.7, 0.95))
                add(component, "tasks", task, k, "random", k, rng.uniform(-0.1, 0.1))
                add(component, "reliability", task, k, task, k, rng.uniform(0.8, 0.97))
            add(component, "reliability", "random", k, "random", k, 1.0)
        for task, (k, other) in itertools.product(_with_mean(tasks), itertools.combinations(shots, 2)):
            add(component, "shots", task, k, task, other, rng.uniform(0.4, 0.9) - 0.05 * abs(k - other))
        for task, k in itertools.product(_with_mean(tasks), shots):
            add(component, "shots", task, k, "random", -1, 0.01)
        add(component, "reliability", "random", -1, "random", -1, 1.0)
    frame = pd.DataFrame(rows)
    return frame if known else frame.assign(correlation=np.nan, low=np.nan, high=np.nan, argsort_correlation=np.nan)


def transfer(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5),
             fractions: Sequence[float] = (0.3, 0.5, 0.7), unseen: Sequence[str] = ("mathqa", "lambada_openai"),
             component: str = "head", seed: int = 0) -> pd.DataFrame:
    """The i-th task's order loses i points more than the best; unseen tasks are compared with the full model."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []

    def add(task: str, k: int, donor: str, fraction: float, accuracy: float, difference: float, new: bool) -> None:
        rows.append({"task": task, "num_fewshot": k, "component": component, "donor": donor, "fraction": fraction,
                     "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "difference": difference,
                     "difference_low": difference - 0.015, "difference_high": difference + 0.015, "documents": 100,
                     "unseen": new})

    donors = {name: -0.01 * i for i, name in enumerate(tasks)}
    aggregates = {"mean": 0.005, "mean without own": 0.0} if len(tasks) > 1 else {}
    for k, fraction in itertools.product(shots, fractions):
        for task in _with_mean(tasks):
            own = 0.75 - 0.4 * fraction + 0.01 * k
            noise = 0.0 if task == "mean" else 0.02
            for donor, loss in {"own": 0.0, **donors, **aggregates, "random": -0.2}.items():
                if donor != task or task == "mean":
                    difference = loss + (rng.normal(0, noise) if donor != "own" else 0.0)
                    add(task, k, donor, fraction, own + difference, difference, False)
        for task in unseen:
            add(task, k, "mean", fraction, 0.5 - 0.3 * fraction, -0.3 * fraction, True)
            add(task, k, "random", fraction, 0.35 - 0.3 * fraction, -0.15 - 0.3 * fraction, True)
    for task, k in itertools.product([*_with_mean(tasks), *unseen], shots):
        add(task, k, "none", 0.0, 0.5, 0.0, task in unseen)
    return pd.DataFrame(rows)


def retained(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), seed: int = 0) -> pd.DataFrame:
    """Important heads carry the primitives; random orders keep as much as they leave heads."""
    rng = np.random.default_rng(seed)
    rows = []
    for task, k in itertools.product(_with_mean(tasks), shots):
        bend = 2.5 + 0.1 * k + (0.0 if task == "mean" else rng.normal(0, 0.5))
        for primitive, fraction in itertools.product(("prefix_matching", "copying"), np.arange(0.1, 1, 0.1).round(1)):
            bent = bend if primitive == "prefix_matching" else 1.1
            rows.append({"task": task, "num_fewshot": k, "primitive": primitive, "fraction": float(fraction),
                         "retained": 1 - fraction**bent, "low": 0.98 * (1 - fraction**bent),
                         "high": min(1.0, 1.01 * (1 - fraction**bent)), "random_mean": 1 - fraction,
                         "random_low": 1 - fraction - 0.06,
                         "random_high": min(1.0, 1 - fraction + 0.06)})
    return pd.DataFrame(rows)


def among_important(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), heads: int = 270,
                    circuits: int = 8) -> pd.DataFrame:
    """Three quarters of the induction heads are in the top fifth of the mean; of task i two thirds, less for later."""
    rows = []
    for (i, task), k, fraction in itertools.product(enumerate(_with_mean(tasks)), shots, (0.1, 0.2, 0.3)):
        common = int(0.75 * circuits) if task == "mean" else max(0, int(0.66 * circuits) - i)
        rows.append({"task": task, "num_fewshot": k, "fraction": fraction, "important": int(fraction * heads),
                     "induction_heads": circuits, "common": common, "low": max(0, common - 1),
                     "high": min(circuits, common + 1), "expected": circuits * fraction,
                     "p": 0.0004 if task == "mean" else 0.04, "p_fewer": 0.9, "expected_in_layers": 3.2,
                     "p_in_layers": 0.02, "p_fewer_in_layers": 0.95})
    return pd.DataFrame(rows)


def top_sets(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), heads: int = 270) -> pd.DataFrame:
    rows = []
    for k, fraction in itertools.product(shots, (0.1, 0.2, 0.3)):
        size = int(fraction * heads)
        common = int(0.3 * size)
        rows.append({"num_fewshot": k, "fraction": fraction, "size": size, "tasks": len(tasks), "common": common,
                     "share": common / size, "low": (common - 2) / size, "high": (common + 2) / size,
                         "expected": heads * fraction ** len(tasks), "pair_mean_share": 0.61,
                         "expected_in_layers": 5.1, "pair_share_in_layers": 0.44})
    return pd.DataFrame(rows)


def top_overlaps(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), heads: int = 270) -> pd.DataFrame:
    """Pairs of tasks share half of their top heads; a fifth of those of the mean match prefixes, none copies."""
    rows = []
    for k, fraction in itertools.product(shots, (0.1, 0.2, 0.3)):
        size = int(fraction * heads)
        pairs = [(a, b, 0.5) for a, b in itertools.combinations(tasks, 2)]
        pairs += [(task, "prefix_matching", 0.2) for task in _with_mean(tasks)]
        pairs += [(task, "copying", 0.0) for task in _with_mean(tasks)]
        for task, other, share in pairs:
            common = int(share * size)
            rows.append({"component": "head", "task": task, "other": other, "num_fewshot": k, "fraction": fraction,
                         "size": size, "common": common, "low": max(0, common - 2), "high": common + 2,
                         "expected": size * fraction, "p": 0.001 if share == 0.5 else 0.6,
                         "p_fewer": 0.0002 if share == 0 else 0.55, "expected_in_layers": 6.3, "p_in_layers": 0.1,
                         "p_fewer_in_layers": 0.95})
    return pd.DataFrame(rows)


def depth(tasks: Sequence[str] = TASKS[:8], shots: Sequence[int] = (0, 1, 5), known: bool = True) -> pd.DataFrame:
    """Important heads lie in the middle third."""
    rows = []
    for task, k in itertools.product(_with_mean(tasks), shots):
        for third, share in (("early", 0.1), ("middle", 0.75), ("late", 0.15)):
            rows.append({"task": task, "num_fewshot": k, "fraction": 0.2, "third": third, "share": share,
                         "low": share - 0.05 if known else np.nan, "high": share + 0.05 if known else np.nan,
                         "expected": 1 / 3, "important": 54, "between_layers": 0.76,
                         "between_layers_by_chance": 29 / 269})
    return pd.DataFrame(rows)


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
    return pd.concat(frames, ignore_index=True)
