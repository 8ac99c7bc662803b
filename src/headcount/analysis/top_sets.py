"""Sets of the most important components: what tasks share, and what else is high in them.

Everything takes the scores of one kind of component, one array per (task, number of shots), and where they are known
their means over resampled documents; intervals are those of `headcount.stats.resampling.around`, over documents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from headcount.analysis.scores import (
    Rows,
    Scores,
    bounds_around,
    by_shots,
    check_lengths,
    concatenated,
    known_places,
    layers_of,
    ordered,
    places,
    primitive_scores,
    scored,
    trained_scores,
    with_aggregate,
)
from headcount.masks import count
from headcount.stats.sets import hypergeometric_overlap, overlap_within

FRACTIONS = (0.1, 0.2, 0.3)
_TOP = ["num_fewshot", "fraction", "size", "tasks", "common", "share", "low", "high", "expected", "pair_mean_share",
        "expected_in_layers", "pair_share_in_layers"]
_OVERLAP = ["task", "other", "num_fewshot", "fraction", "size", "common", "low", "high", "expected", "p", "p_fewer",
            "expected_in_layers", "p_in_layers", "p_fewer_in_layers"]


def top_sets(
    scores: Scores, fractions: Sequence[float | int] = FRACTIONS, *, layers: Sequence[int] | None = None,
    resampled: Rows | None = None,
) -> pd.DataFrame:
    """How much the most important components of different tasks have in common.

    Args:
        scores: Importance by (task, number of shots). Components that one of them lacks are left out of all.
        fractions: Sizes of the top sets, as shares of all components.
        layers: Of every component, where a layer has several.
        resampled: Bootstrap replicates of each, for the interval.

    Returns:
        One row per number of shots that two tasks or more have, and fraction that is one component or more. Columns:
        num_fewshot; fraction; size (of each top set); tasks (how many); common (components in the top set of *every*
        task); share (common / size) with its 95 % interval low, high; expected (how many random top sets would have in
        common, n * (size / n)^tasks); pair_mean_share (mean over pairs of tasks of their common share; of random sets
        size / n); expected_in_layers and pair_share_in_layers: common and pair_mean_share of random sets with as many
        components of each layer as the measured ones have. Single pairs: `top_overlaps`.

    Raises:
        OptionError: If the arrays are not of one model's components.
    """
    found, n = known_places(scores, resampled)
    of_layers = None if layers is None else np.asarray(layers)[scored(scores)]
    rows = list[dict[str, Any]]()
    for k, tasks in by_shots(scores).items():
        for fraction in fractions:
            size = count(fraction, n)
            if len(tasks) < 2 or size == 0:
                continue
            tops = _together([found[task, k] >= n - size for task in tasks])
            shares = tops.all(axis=0).sum(axis=1) / size
            pairs = [int((a & b).sum()) / size for a, b in itertools.combinations(tops[:, 0], 2)]
            rows.append(dict(zip(_TOP, (k, fraction, size, len(tasks), round(shares[0] * size), shares[0],
                                        *bounds_around(shares, 1), n * (size / n) ** len(tasks), float(np.mean(pairs)),
                                        *_expected_in_layers(tops[:, 0], of_layers)), strict=True)))
    return pd.DataFrame(rows, columns=_TOP)


def _expected_in_layers(
    sets: Bool[np.ndarray, "task component"], layers: Int[np.ndarray, " component"] | None
) -> tuple[float, float]:
    """What such sets have in common, and two of them on average share, if only each layer's number is as measured."""
    if layers is None:
        return math.nan, math.nan
    held = np.array([[(one & (layers == layer)).sum() for layer in np.unique(layers)] for one in sets])
    total = np.unique(layers, return_counts=True)[1]
    pairs = [(a * b / total).sum() / a.sum() for a, b in itertools.combinations(held, 2)]
    return float((total * np.prod(held / total, axis=0)).sum()), float(np.mean(pairs))


def top_overlaps(
    scores: Scores, others: Mapping[str, Float[np.ndarray, " component"]] | None = None,
    fractions: Sequence[float | int] = FRACTIONS, *, layers: Sequence[int] | None = None, resampled: Rows | None = None,
    aggregate: str = "mean",
) -> pd.DataFrame:
    """What the most important components of one task have in common with those of another, or with other top sets.

    Args:
        scores: Importance by (task, number of shots). Components that one of them lacks are left out of all.
        others: Other scores of the same components, by name ("prefix_matching"). Each task's top set is held against
            the components highest on them, and so is that of the aggregate.
        fractions: Sizes of both sets, as shares of all components.
        layers: Of every component, where a layer has several.
        resampled: Bootstrap replicates of each, for the interval.
        aggregate: "mean" of the tasks' scores, or of their "ranks".

    Returns:
        One row per number of shots, pair and fraction that is one component or more. Columns: task; other (a task, or a
        name of `others`); num_fewshot; fraction; size (of either set); common, with its 95 % interval low, high;
        expected (by chance); p (the probability that a random set has at least so many in common, hypergeometric),
        p_fewer (at most so many); and expected_in_layers, p_in_layers, p_fewer_in_layers, where chance takes as many of
        each layer as there are in the two sets. No p is corrected for the number of rows: see `stats.holm`.

    Raises:
        OptionError: If the arrays are not of one model's components.
    """
    check_lengths(scores, others)
    everything, draws = with_aggregate(scores, resampled, aggregate) if others else (scores, resampled)
    found, n = known_places(everything, draws)
    there = scored(scores)
    fixed = {name: places({(name, 0): values[there]})[name, 0] for name, values in (others or {}).items()}
    of_layers = None if layers is None else np.asarray(layers)[there]
    rows = list[dict[str, Any]]()
    tasks = by_shots(scores)
    for k, names in by_shots(everything).items():
        pairs = [(a, b, found[b, k]) for a, b in itertools.combinations(tasks[k], 2)]
        pairs += [(task, other, of_other) for task in names for other, of_other in fixed.items()]
        for (a, b, of_b), fraction in itertools.product(pairs, fractions):
            if size := count(fraction, n):
                of_a, high = found[a, k] >= n - size, of_b >= n - size
                fit = len(of_a) if b in fixed else min(len(of_a), len(of_b))  # other scores have no draws
                common = (of_a[:fit] & high[:fit]).sum(axis=1)
                rows.append(dict(zip(_OVERLAP, (a, b, k, fraction, size, int(common[0]), *bounds_around(common, size),
                                                *by_chance(of_a[0], high[0], of_layers)), strict=True)))
    return pd.DataFrame(rows, columns=_OVERLAP)


def by_chance(
    one: Bool[np.ndarray, " component"], other: Bool[np.ndarray, " component"],
    layers: Int[np.ndarray, " component"] | None,
) -> tuple[float, ...]:
    """What random sets have in common, and how likely at least, and at most, so many are; then within layers."""
    more, fewer, expected = hypergeometric_overlap(len(one), int(one.sum()), int(other.sum()),
                                                         int((one & other).sum()))
    if layers is None:
        return expected, more, fewer, math.nan, math.nan, math.nan
    more_there, fewer_there, expected_there = overlap_within(layers, one, other)
    return expected, more, fewer, expected_there, more_there, fewer_there


def _together(tops: Sequence[Bool[np.ndarray, "_ component"]]) -> Bool[np.ndarray, "task row component"]:
    rows = min(map(len, tops))
    return np.stack([top[:rows] for top in tops])


def top_table(importance: pd.DataFrame, scores: Mapping[str, str], ties: Mapping[str, str]) -> pd.DataFrame:
    """`Study.top_sets()`; `scores` and `ties` as above."""
    found = []
    for component, score in scores.items():
        known = ordered(importance, component, score, ties.get(component))
        layers = layers_of(importance, score) if component == "head" else None
        found.append(top_sets(known.scores, layers=layers, resampled=known.resampled).assign(component=component))
    return concatenated(found)


def overlap_table(
    importance: pd.DataFrame, scores: Mapping[str, str], ties: Mapping[str, str], induction: pd.DataFrame,
    aggregate: str,
) -> pd.DataFrame:
    """`Study.top_overlaps()`; `scores` and `ties` as above."""
    found = []
    for component, score in scores.items():
        known = ordered(importance, component, score, ties.get(component))
        trained = trained_scores(induction, known.scores) if component == "head" else None
        others = primitive_scores(trained) if trained is not None else None
        layers = layers_of(importance, score) if component == "head" else None
        found.append(top_overlaps(known.scores, others, layers=layers, resampled=known.resampled,
                                       aggregate=aggregate).assign(component=component))
    return concatenated(found)
