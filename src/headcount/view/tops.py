"""Sets of the most important components: what tasks share, what else is high in them, and in which layers they lie.

A top set holds the last `floor(fraction * n)` components of the order of removal, those that pruning keeps longest.
Everything takes the scores of one kind of component, one array per (task, number of shots), and where they are known
their means over resampled documents; intervals are those of `headcount.stats.around`, over documents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from headcount import ranks, stats
from headcount.masks import count, removal_order
from headcount.view.points import MEAN
from headcount.view.relations import MEAN_OF_RANKS, Key, Rows, Scores, by_shots, check, scored

FRACTIONS = (0.1, 0.2, 0.3)
TOP = 0.2  # the share that is called the most important
THIRDS = ("early", "middle", "late")
_TOP = ["num_fewshot", "fraction", "size", "tasks", "common", "share", "low", "high", "expected", "pair_mean_share",
        "expected_in_layers", "pair_share_in_layers"]
_OVERLAP = ["task", "other", "num_fewshot", "fraction", "size", "common", "low", "high", "expected", "p", "p_fewer",
            "expected_in_layers", "p_in_layers", "p_fewer_in_layers"]
_DEPTH = ["task", "num_fewshot", "fraction", "third", "share", "low", "high", "expected", "important", "between_layers",
          "between_layers_by_chance"]
# The place of every component in orders of removal, 0 the first to go: row 0 as measured, then of every draw.
Places = Mapping[Key, Int[np.ndarray, "row component"]]


def places(scores: Scores, resampled: Rows | None = None) -> dict[Key, Int[np.ndarray, "row component"]]:
    """Where each component stands in the order of removal, as measured and of every draw of documents.

    Args:
        scores: Importance by (task, number of shots); no component may lack one.
        resampled: Bootstrap replicates of each.

    Returns:
        By (task, number of shots): 0 for the first to go, in a row for what was measured and one per replicate.

    Raises:
        OptionError: If the arrays are not of one model's components.
    """
    check(scores, resampled)
    return {key: placed(np.concatenate([values[None], (resampled or {}).get(key, np.empty((0, len(values))))]))
            for key, values in scores.items()}


def placed(
    scores: Float[np.ndarray, "row component"], ties: Float[np.ndarray, "row component"] | None = None
) -> Int[np.ndarray, "row component"]:
    """Where each component stands in the order of removal that a row gives, 0 for the first to go.

    Args:
        scores: What decides; row 0, which was measured, is rounded as in pruning (`headcount.masks.removal_order`).
        ties: What decides between equal ones; last comes the component's number.
    """
    further = (ties,) if ties is not None else ()
    measured = np.array([removal_order(*(values[0] for values in (scores, *further)))], np.int64)
    # The last key decides.
    drawn = np.lexsort([values[1:] for values in (*further, scores)], axis=-1)
    found = np.empty(scores.shape, np.int64)
    np.put_along_axis(found, np.concatenate([measured.reshape(1, -1), drawn]), np.arange(scores.shape[1])[None], axis=1)
    return found


def with_aggregate(
    scores: Scores, resampled: Rows | None = None, aggregate: str = "mean"
) -> tuple[dict[Key, Float[np.ndarray, " component"]], dict[Key, Float[np.ndarray, "resample component"]]]:
    """Scores and replicates of the tasks, and of their aggregate where there are several: "mean" or "mean of ranks".

    Args:
        scores: Importance by (task, number of shots). An aggregate has no number for components that one of them lacks.
        resampled: Bootstrap replicates of each; an aggregate has them where all its tasks have.
        aggregate: "mean" of the tasks' scores, or of their "ranks".
    """
    found, draws = dict(scores), dict(resampled or {})
    there = scored(scores)
    for k, tasks in by_shots(scores).items():
        if len(tasks) > 1:
            fit = min(len(draws.get((task, k), ())) for task in tasks)
            rows = np.stack([np.concatenate([scores[task, k][None], draws.get((task, k), scores[task, k][None])[:fit]])
                             for task in tasks])
            whole = np.full(rows.shape[1:], np.nan)
            known = rows[..., there]
            whole[:, there] = mean_of_places(known) if aggregate == "ranks" else known.mean(axis=0)
            key = (MEAN_OF_RANKS if aggregate == "ranks" else MEAN, k)
            found[key] = whole[0]
            if fit:
                draws[key] = whole[1:]
    return found, draws


def mean_of_places(
    scores: Float[np.ndarray, "task row component"], ties: Float[np.ndarray, "task row component"] | None = None
) -> Float[np.ndarray, "row component"]:
    """Mean over tasks of each component's place in the order of removal, which is what `--aggregate ranks` prunes by.

    Args:
        scores: What decides; row 0 was measured.
        ties: What decides between equal ones.
    """
    return np.asarray(np.mean([placed(own, None if ties is None else ties[i]) for i, own in enumerate(scores)], axis=0))


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
    found, n = _known_places(scores, resampled)
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
                                        *_around(shares, 1), n * (size / n) ** len(tasks), float(np.mean(pairs)),
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
    check(scores, others)
    everything, draws = with_aggregate(scores, resampled, aggregate) if others else (scores, resampled)
    found, n = _known_places(everything, draws)
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
                rows.append(dict(zip(_OVERLAP, (a, b, k, fraction, size, int(common[0]), *_around(common, size),
                                                *by_chance(of_a[0], high[0], of_layers)), strict=True)))
    return pd.DataFrame(rows, columns=_OVERLAP)


def by_chance(
    one: Bool[np.ndarray, " component"], other: Bool[np.ndarray, " component"],
    layers: Int[np.ndarray, " component"] | None,
) -> tuple[float, ...]:
    """What random sets have in common, and how likely at least, and at most, so many are; then within layers."""
    more, fewer, expected = stats.hypergeometric_overlap(len(one), int(one.sum()), int(other.sum()),
                                                         int((one & other).sum()))
    if layers is None:
        return expected, more, fewer, math.nan, math.nan, math.nan
    more_there, fewer_there, expected_there = stats.overlap_within(layers, one, other)
    return expected, more, fewer, expected_there, more_there, fewer_there


def depth(
    scores: Scores, layers: Sequence[int], *, num_layers: int | None = None, resampled: Rows | None = None,
    aggregate: str = "mean", fraction: float = TOP,
) -> pd.DataFrame:
    """Share of the most important components in each third of the layers; a layer counts to the one its middle is in.

    Args:
        scores: Importance by (task, number of shots). Components that one of them lacks are left out of all.
        layers: Of every component.
        num_layers: Of the whole model; as many as these components lie in unless told.
        resampled: Bootstrap replicates of each, for the interval.
        aggregate: "mean" of the tasks' scores, or of their "ranks".
        fraction: Which share counts as the most important; one component at least.

    Returns:
        Columns: task (and the aggregate); num_fewshot; fraction; third ("early", "middle", "late"); share with its 95 %
        interval low, high; expected (the third's share of all components); important (how many the most important are);
        and, alike for the three thirds, between_layers (share of the variance of log importance that lies between
        layers, `headcount.ranks.between_layers`) and between_layers_by_chance (of scores that have no trend).
    """
    everything, draws = with_aggregate(scores, resampled, aggregate)
    found, n = _known_places(everything, draws)
    there = scored(scores)
    at = np.asarray(layers)[there]
    third = (2 * at + 1) * 3 // (2 * (num_layers or max(layers, default=0) + 1))
    by_chance = (len(np.unique(at)) - 1) / max(n - 1, 1)
    size = max(1, count(fraction, n))
    rows = list[dict[str, Any]]()
    for ((task, k), of_task), (i, name) in itertools.product(found.items(), enumerate(THIRDS)):
        if (third == i).any():
            shares = ((of_task >= n - size) & (third == i)).sum(axis=1) / size
            between = ranks.between_layers(everything[task, k][there], at)
            rows.append(dict(zip(_DEPTH, (task, k, fraction, name, shares[0], *_around(shares, 1),
                                          float((third == i).mean()), size, between,
                                          by_chance if between == between else math.nan), strict=True)))
    return pd.DataFrame(rows, columns=_DEPTH)


def _known_places(scores: Scores, resampled: Rows | None) -> tuple[Places, int]:
    """Places among the components that all of these have scored, and how many these are."""
    check(scores, resampled)
    there = scored(scores)
    return places({key: values[there] for key, values in scores.items()},
                  {key: values[:, there] for key, values in (resampled or {}).items()}), int(there.sum())


def _together(tops: Sequence[Bool[np.ndarray, "_ component"]]) -> Bool[np.ndarray, "task row component"]:
    rows = min(map(len, tops))
    return np.stack([top[:rows] for top in tops])


def _around(found: Float[np.ndarray, " row"] | Int[np.ndarray, " row"], most: float | int) -> Iterator[float]:
    """The interval of row 0 by the spread of the others, between 0 and `most`."""
    for bound in stats.around(float(found[0]), found[1:].astype(np.float64)):
        yield float(np.clip(bound, 0, most))
