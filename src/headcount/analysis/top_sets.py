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

from headcount.analysis.rows import Scoped, of_task
from headcount.analysis.schema import COMPONENT, NUM_FEWSHOT, OF_SCOPE, Column, Table, columns, interval_of
from headcount.analysis.scores import (
    OF_CHANCE,
    Rows,
    Scores,
    bounds_around,
    by_chance,
    by_shots,
    check_lengths,
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

FRACTIONS = (0.1, 0.2, 0.3)
_FRACTION = Column("fraction", "float64", "0..1", "size of the top sets, as a share of all components")
TOP_SETS = Table(
    "top_sets", "What the top heads, and FFNs, of all tasks have in common: one row per component, number of shots "
    "that two tasks or more have, and fraction that is one component or more.",
    columns(
        COMPONENT, NUM_FEWSHOT, _FRACTION,
        Column("size", "int64", "components", "size of each top set"),
        Column("tasks", "int64", "tasks", "how many tasks"),
        Column("common", "int64", "components", "how many are in the top set of every task"),
        Column("share", "float64", "0..1", "common over size"),
        interval_of("the share, over documents"),
        Column("expected", "float64", "components", "how many random top sets would have in common, n (size/n)^tasks"),
        Column("pair_mean_share", "float64", "0..1", "mean over pairs of tasks of their common share; of random sets "
               "size/n"),
        Column("expected_in_layers", "float64", "components", "as `expected`, of random sets with as many components "
               "of each layer as the measured ones; missing for FFNs"),
        Column("pair_share_in_layers", "float64", "0..1", "`pair_mean_share` of such sets")))
TOP_OVERLAPS = Table(
    "top_overlaps", "What the top heads, and FFNs, of one task have in common with those of another, and the top heads "
    "with the heads highest on an induction score: one row per component, pair, number of shots and fraction.",
    columns(
        COMPONENT, OF_SCOPE,
        Column("other_scope", "str", "", "what the top set is held against: `task`, `prefix_matching` or `copying`"),
        Column("other_task", "str", "", "name of the other task; empty where it is an induction score"),
        _FRACTION,
        Column("size", "int64", "components", "size of either set"),
        Column("common", "int64", "components", "how many are in both"),
        interval_of("the number in common, over documents", "components"),
        OF_CHANCE),
    "The scope `mean` (or `mean of ranks`) is held against induction scores alone.")


def top_sets(
    scores: Scores, fractions: Sequence[float | int] = FRACTIONS, *, layers: Sequence[int] | None = None,
    resampled: Rows | None = None, component: str = "",
) -> pd.DataFrame:
    """How much the most important components of different tasks have in common.

    Args:
        scores: Importance by (task, number of shots). Components that one of them lacks are left out of all.
        fractions: Sizes of the top sets, as shares of all components.
        layers: Of every component, where a layer has several.
        resampled: Bootstrap replicates of each, for the interval.
        component: Heads or FFNs, for the table.

    Returns:
        The table `TOP_SETS`. Single pairs: `top_overlaps`.

    Raises:
        OptionError: If the arrays are not of one model's components.
    """
    at, n = known_places(scores, resampled)
    of_layers = None if layers is None else np.asarray(layers)[scored(scores)]
    rows = list[dict[str, Any]]()
    for k, tasks in by_shots(scores).items():
        for fraction in fractions:
            size = count(fraction, n)
            if len(tasks) < 2 or size == 0:
                continue
            tops = _together([at[task, k] >= n - size for task in tasks])
            shares = tops.all(axis=0).sum(axis=1) / size
            low, high = bounds_around(shares, 1)
            pairs = [int((a & b).sum()) / size for a, b in itertools.combinations(tops[:, 0], 2)]
            expected, pair_share = _expected_in_layers(tops[:, 0], of_layers)
            rows.append({"component": component, "num_fewshot": k, "fraction": fraction, "size": size,
                         "tasks": len(tasks), "common": round(shares[0] * size), "share": shares[0], "low": low,
                         "high": high, "expected": n * (size / n) ** len(tasks),
                         "pair_mean_share": float(np.mean(pairs)), "expected_in_layers": expected,
                         "pair_share_in_layers": pair_share})
    return TOP_SETS.frame(rows)


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
    aggregate: str = "mean", component: str = "",
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
        component: Heads or FFNs, for the table.

    Returns:
        The table `TOP_OVERLAPS`. No p is corrected for the number of rows: see `stats.holm`.

    Raises:
        OptionError: If the arrays are not of one model's components.
    """
    check_lengths(scores, others)
    everything, draws = with_aggregate(scores, resampled, aggregate)
    single = {of_task(task) for task, _ in scores}
    if not others:
        everything, draws = ({key: values for key, values in table.items() if key[0] in single}
                             for table in (everything, draws))
    at, n = known_places(everything, draws)
    there = scored(scores)
    fixed = {Scoped(name): places({("", 0): values[there]})["", 0] for name, values in (others or {}).items()}
    of_layers = None if layers is None else np.asarray(layers)[there]
    rows = list[dict[str, Any]]()
    for k, names in by_shots(everything).items():
        pairs = [(a, b, at[b, k]) for a, b in itertools.combinations([name for name in names if name in single], 2)]
        pairs += [(task, other, of_other) for task in names for other, of_other in fixed.items()]
        for (a, b, of_b), fraction in itertools.product(pairs, fractions):
            if size := count(fraction, n):
                of_a, high = at[a, k] >= n - size, of_b >= n - size
                fit = len(of_a) if b in fixed else min(len(of_a), len(of_b))  # other scores have no draws
                common = (of_a[:fit] & high[:fit]).sum(axis=1)
                low, most = bounds_around(common, size)
                rows.append({"component": component, **a._asdict(), "num_fewshot": k, "other_scope": b.scope,
                             "other_task": b.task, "fraction": fraction, "size": size, "common": int(common[0]),
                             "low": low, "high": most, **by_chance(of_a[0], high[0], of_layers)})
    return TOP_OVERLAPS.frame(rows)


def _together(tops: Sequence[Bool[np.ndarray, "_ component"]]) -> Bool[np.ndarray, "task row component"]:
    rows = min(map(len, tops))
    return np.stack([top[:rows] for top in tops])


def top_table(importance: pd.DataFrame, scores: Mapping[str, str], ties: Mapping[str, str]) -> pd.DataFrame:
    """`Study.top_sets()`; `scores` and `ties` as above."""
    tables = []
    for component, score in scores.items():
        known = ordered(importance, component, score, ties.get(component))
        layers = layers_of(importance, score) if component == "head" else None
        tables.append(top_sets(known.scores, layers=layers, resampled=known.resampled, component=component))
    return pd.concat(tables, ignore_index=True)


def overlap_table(
    importance: pd.DataFrame, scores: Mapping[str, str], ties: Mapping[str, str], induction: pd.DataFrame,
    aggregate: str,
) -> pd.DataFrame:
    """`Study.top_overlaps()`; `scores` and `ties` as above."""
    tables = []
    for component, score in scores.items():
        known = ordered(importance, component, score, ties.get(component))
        trained = trained_scores(induction, known.scores) if component == "head" else None
        others = primitive_scores(trained) if trained is not None else None
        layers = layers_of(importance, score) if component == "head" else None
        tables.append(top_overlaps(known.scores, others, layers=layers, resampled=known.resampled, aggregate=aggregate,
                                   component=component))
    return pd.concat(tables, ignore_index=True)
