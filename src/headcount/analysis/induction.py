"""Induction scores as a table, and whether important heads are those that can do induction (Bansal et al. 2023).

Two views. `retained`: heads are removed, the least important first, and what is left of all prefix-matching (copying)
score is counted, beside random orders. `induction_among_important`: how many of the induction heads are in the set of
important ones, beside what chance would put there. Both go by the scores that pruning goes by: over tasks, by their
mean or by the mean of their ranks. Intervals are those of `headcount.stats.resampling.around`, over documents; which
heads do induction, and how well, is taken as known.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from headcount.analysis.scores import (
    PRIMITIVES,
    Places,
    Rows,
    Scores,
    check_lengths,
    layers_of,
    measured,
    name_of,
    places,
    primitive_scores,
    trained_scores,
    with_aggregate,
)
from headcount.analysis.top_sets import by_chance
from headcount.errors import OptionError
from headcount.masks import count
from headcount.stats.resampling import around, interval
from headcount.study.ledger import Entry

_INDUCTION = ["layer", "head", "prefix_matching", "copying", "previous_token", "ov_copying", "induction", "weights",
              "protocol", "sequences"]


def induction_rows(entries: Mapping[str, Entry], thresholds: Mapping[str, float]) -> pd.DataFrame:
    """`Study.induction()`.

    Args:
        entries: By weights.
        thresholds: What an induction head reaches on each primitive; NaN where that is not known.
    """
    if not entries:
        return pd.DataFrame(columns=_INDUCTION)
    table = pd.concat([entry.table.assign(weights=weights, protocol=entry.job["protocol"],
                                          sequences=entry.info["sequences"])
                       for weights, entry in sorted(entries.items(), reverse=True)], ignore_index=True)
    high = np.logical_and.reduce([table[name] >= least for name, least in thresholds.items()])
    # Not known before the control is measured that copying's threshold depends on.
    table["induction"] = pd.array(high, "boolean") if not np.isnan(thresholds["copying"]) else pd.NA
    table["induction"] = table["induction"].astype("boolean")
    ordered: pd.DataFrame = table[[*_INDUCTION, *(c for c in table if c not in _INDUCTION)]]
    return ordered


RETAINED_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DRAWS = 1000
_RETAINED = ["task", "num_fewshot", "primitive", "fraction", "retained", "low", "high", "random_mean", "random_low",
             "random_high"]
_AMONG = ["task", "num_fewshot", "fraction", "important", "induction_heads", "common", "low", "high", "expected",
              "p", "p_fewer", "expected_in_layers", "p_in_layers", "p_fewer_in_layers"]


def retained(
    scores: Scores, primitives: Mapping[str, Float[np.ndarray, " head"]],
    fractions: Sequence[float | int] = RETAINED_FRACTIONS, *, resampled: Rows | None = None, seed: int = 0,
    draws: int = DRAWS, aggregate: str = "mean",
) -> pd.DataFrame:
    """Which share of a primitive's total score is left as the least important heads go.

    Args:
        scores: Importance of all heads by (task, number of shots); their aggregate over tasks, where there are several,
            is added as task "mean" (or "mean of ranks").
        primitives: A score per head, never negative, by name ("prefix_matching", "copying").
        fractions: Shares of heads to remove; `floor(fraction * n)` heads go.
        resampled: Bootstrap replicates of the scores, for the interval.
        seed: Of the random orders.
        draws: How many random orders.
        aggregate: "mean" of the tasks' scores, or of their "ranks".

    Returns:
        Columns: task; num_fewshot; primitive; fraction; retained (0..1; NaN where the total is 0) with its
        95 % interval low, high; random_mean (the share of heads that is left: the expectation of a
        random order); random_low, random_high (what 95 % of random orders leave; the same for every task).

    Raises:
        OptionError: If scores are missing or not of one model's heads, or a primitive is negative somewhere.
    """
    ordered = _places_of_heads(scores, primitives, resampled, aggregate)
    for name, values in primitives.items():
        if values.min(initial=0) < 0:
            raise OptionError(f"a share of {name} can only be told of scores that are never negative")
    rows: list[dict[str, Any]] = []
    for name, values in primitives.items():
        n = len(values)
        gone = [count(fraction, n) for fraction in fractions]
        shuffled = np.random.default_rng(seed).permuted(np.tile(values, (draws, 1)), axis=1)
        low, high = interval(_left(shuffled, gone).T)
        for (task, k), at in ordered.items():
            in_order = np.empty(at.shape)
            np.put_along_axis(in_order, at, values[None], axis=1)
            left = _left(in_order, gone)
            bounds = np.clip(around(left[0], left[1:]), 0, 1)
            rows += [dict(zip(_RETAINED, (task, k, name, fraction, left[0, i], *bounds[:, i], 1 - gone[i] / n, low[i],
                                          high[i]), strict=True)) for i, fraction in enumerate(fractions)]
    return pd.DataFrame(rows, columns=_RETAINED)


def induction_among_important(
    scores: Scores, induction_heads: Bool[np.ndarray, " head"],
    fractions: Sequence[float | int] = (0.1, 0.2, 0.3, 0.5), *, layers: Sequence[int] | None = None,
    resampled: Rows | None = None, aggregate: str = "mean",
) -> pd.DataFrame:
    """How many of the induction heads are among the most important ones.

    Args:
        scores: Importance of all heads by (task, number of shots); their aggregate over tasks, where there are several,
            is added as task "mean" (or "mean of ranks").
        induction_heads: True for every head that is high on both primitives.
        fractions: Sizes of the important set, as shares of all heads: the last `floor(fraction * n)` of the order.
        layers: Of every head.
        resampled: Bootstrap replicates of the scores, for the interval.
        aggregate: "mean" of the tasks' scores, or of their "ranks".

    Returns:
        Columns: task; num_fewshot; fraction; important (heads in the important set); induction_heads (how many there
        are); common (in both) with its 95 % interval low, high; expected (by chance); p (the probability that a random
        set of this size holds at least so many of them, hypergeometric) and p_fewer (at most so many); then
        expected_in_layers, p_in_layers and p_fewer_in_layers, where chance takes as many of each layer as there are
        among the important and among the induction heads. No p is corrected for the number of rows: see `stats.holm`.

    Raises:
        OptionError: If scores are missing or not of one model's heads.
    """
    total, there = len(induction_heads), int(induction_heads.sum())
    everything = _places_of_heads(scores, {"induction": induction_heads.astype(np.float64)}, resampled, aggregate)
    of_layers = None if layers is None else np.asarray(layers)
    rows: list[dict[str, Any]] = []
    for ((task, k), at), fraction in itertools.product(everything.items(), fractions):
        size = count(fraction, total)
        important = at >= total - size
        common = (important & induction_heads).sum(axis=1)
        bounds = np.clip(around(float(common[0]), common[1:].astype(np.float64)), 0, min(size, there))
        rows.append(dict(zip(_AMONG, (task, k, fraction, size, there, int(common[0]), *bounds,
                                          *by_chance(important[0], induction_heads, of_layers)), strict=True)))
    return pd.DataFrame(rows, columns=_AMONG)


def _left(ordered: Float[np.ndarray, "row head"], gone: Sequence[int]) -> Float[np.ndarray, "row step"]:
    """Share of each row's sum that is left when so many of its first go; NaN where the sum is 0."""
    # Summed from the end, so that nothing left is 0 and not a difference of sums.
    sums = np.concatenate([np.cumsum(ordered[:, ::-1], axis=1)[:, ::-1], np.zeros((len(ordered), 1))], axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[:, list(gone)] / sums[:, :1])


def _places_of_heads(
    scores: Scores, heads: Mapping[str, Float[np.ndarray, " head"]], resampled: Rows | None, aggregate: str
) -> Places:
    """Places of the tasks and their aggregate, once they are known to be of the heads that the primitives score."""
    check_lengths(scores, heads)
    if not all(np.isfinite(values).all() for values in (*scores.values(), *heads.values())):
        raise OptionError("an order of all heads needs a score for each of them")
    return places(*with_aggregate(scores, resampled, aggregate))


def retained_table(
    importance: pd.DataFrame, score: str, induction: pd.DataFrame, seed: int, aggregate: str
) -> pd.DataFrame:
    """`Study.retained()`."""
    found = measured(importance, "head", score)
    trained = trained_scores(induction, found.scores)
    if trained is None:
        return retained({}, {}, seed=seed)
    return retained(
        found.scores, primitive_scores(trained), resampled=found.resampled, seed=seed, aggregate=aggregate
    )


def among_important_table(
    importance: pd.DataFrame, score: str, induction: pd.DataFrame, aggregate: str
) -> pd.DataFrame:
    """`Study.induction_among_important()`; empty where it is not known which heads are induction heads."""
    found = measured(importance, "head", score)
    trained = trained_scores(induction, found.scores)
    if trained is None or trained["induction"].isna().any():
        return induction_among_important({}, np.zeros(0, bool))
    chosen: Bool[np.ndarray, " head"] = trained["induction"].to_numpy(bool)
    return induction_among_important(found.scores, chosen, layers=layers_of(importance, score),
                                             resampled=found.resampled, aggregate=aggregate)


def induction_heads(induction: pd.DataFrame) -> pd.DataFrame:
    """The induction heads with their names, those highest on the lower of their two scores first."""
    found = induction[induction["induction"].fillna(False)]
    names = [name_of("head", layer, head) for layer, head in zip(found["layer"], found["head"], strict=True)]
    lower = found[list(PRIMITIVES)].min(axis=1)
    return found.assign(name=names).loc[lower.sort_values(ascending=False, kind="stable").index]


def borderline(induction: pd.DataFrame, thresholds: Mapping[str, float]) -> int:
    """How many heads a change of one standard error would make induction heads, or no longer such.

    The error of a mean over texts of several lengths, taken as if these were drawn too: it is rather too large.
    """
    scores = induction[list(PRIMITIVES)].to_numpy(float) - np.array([thresholds[p] for p in PRIMITIVES])
    variances = induction[[f"{p}_variance" for p in PRIMITIVES]].to_numpy(float)
    errors = np.sqrt(variances / induction[["sequences"]].to_numpy(float))
    up, down = (scores + errors >= 0).all(axis=1), (scores - errors >= 0).all(axis=1)
    return int((up != down).sum())
