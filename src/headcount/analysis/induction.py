"""Induction scores as a table, and whether important heads are those that can do induction (Bansal et al. 2023).

Two views. `retained`: heads are removed, the least important first, and what is left of all prefix-matching (copying)
score is counted, beside random orders. `induction_among_important`: how many of the induction heads are in the set of
important ones, beside what chance would put there. Both go by the scores that pruning goes by: over tasks, by their
mean or by the mean of their ranks. Intervals are those of `headcount.stats.resampling.around`, over documents; which
heads do induction, and how well, is taken as known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from headcount.analysis.schema import OF_SCOPE, Column, Table, columns, interval_of
from headcount.analysis.scores import (
    OF_CHANCE,
    PRIMITIVES,
    Places,
    Rows,
    Scores,
    by_chance,
    check_lengths,
    layers_of,
    measured,
    name_of,
    places,
    primitive_scores,
    trained_scores,
    with_aggregate,
)
from headcount.errors import OptionError
from headcount.masks import count
from headcount.stats.resampling import around, interval
from headcount.study.jobs import Done, InductionScores
from headcount.study.spec import INDUCTION_TEXTS

RETAINED_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DRAWS = 1000
INDUCTION = Table(
    "induction", "Induction scores: one row per head and weights.",
    columns(
        Column("layer", "int64", "", "number of the layer, from 0"),
        Column("head", "int64", "", "number of the head in its layer, from 0"),
        Column("prefix_matching", "float64", "0..1", "attention to what followed earlier occurrences of the token at "
               "hand, mean over random texts"),
        Column("copying", "float64", "0..1", "how much what the head writes raises the token it attends to, mean over "
               "random texts"),
        Column("previous_token", "float64", "0..1", "attention to the previous token, mean over random texts"),
        Column("ov_copying", "float64", "-1..1", "eigenvalue score of the head's OV circuit"),
        Column("induction", "boolean", "", "whether high on both prefix matching and copying; missing before the "
               "control is measured that copying's threshold depends on"),
        Column("weights", "str", "", "`trained`, or `random` for the same model with random weights"),
        Column("protocol", "str", "", "`sound` or `paper`"),
        Column("sequences", "int64", "texts", "how many random texts"),
        Column("prefix_matching_variance", "float64", "", "variance of prefix_matching over texts"),
        Column("copying_variance", "float64", "", "variance of copying over texts"),
        Column("previous_token_variance", "float64", "", "variance of previous_token over texts")))
RETAINED = Table(
    "retained", "Which share of prefix matching, and of copying, is left as heads go by importance: one row per task "
    "(and the aggregate), number of shots, primitive and fraction.",
    columns(
        OF_SCOPE,
        Column("primitive", "str", "", "`prefix_matching` or `copying`"),
        Column("fraction", "float64", "0..1", "share of the heads that is removed, the least important first"),
        Column("retained", "float64", "0..1", "share of the primitive's total score that the others hold; missing "
               "where the total is 0"),
        interval_of("it, over documents"),
        Column("random_mean", "float64", "0..1", "share of heads that is left: the expectation of a random order"),
        Column("random_low", "float64", "0..1", "95 % of random orders leave at least this"),
        Column("random_high", "float64", "0..1", "and at most this")))
INDUCTION_AMONG_IMPORTANT = Table(
    "induction_among_important", "How many induction heads are among the important ones: one row per task (and the "
    "aggregate), number of shots and fraction.",
    columns(
        OF_SCOPE,
        Column("fraction", "float64", "0..1", "size of the set of important heads, as a share of all heads"),
        Column("important", "int64", "heads", "how many that is"),
        Column("induction_heads", "int64", "heads", "how many induction heads there are"),
        Column("common", "int64", "heads", "how many are both"),
        interval_of("it, over documents", "heads"),
        OF_CHANCE))


def shown_entries(
    entries: Iterable[Done[InductionScores]], spec: Mapping[str, Any]
) -> dict[str, Done[InductionScores]]:
    """The model's own induction scores and those of random weights, by weights, of all that a folder holds.

    Of several lengths and numbers of texts those that were asked for last, else the most texts. Copying depends on the
    lengths, so a control of other texts than the model's would set a wrong threshold: it is left out.

    Args:
        entries: Induction entries of one model.
        spec: What was asked last.
    """
    asked = _texts(sorted(spec.get("induction_lengths") or ()), spec.get("induction_seeds"), spec["seed"],
                   spec["protocol"])
    by_rank = sorted(entries, key=lambda entry: (_texts_of(entry.job) == asked, entry.info["sequences"]))
    own = [entry for entry in by_rank if entry.job.weights == "trained"]
    shown = _texts_of(own[-1].job) if own else asked
    return {entry.job.weights: entry for entry in by_rank if _texts_of(entry.job) == shown}


def _texts_of(job: InductionScores) -> tuple[Any, ...]:
    return _texts(job.lengths or (), job.seeds, job.seed, job.protocol)


def _texts(lengths: Sequence[int], seeds: int | None, seed: int, protocol: str) -> tuple[Any, ...]:
    """What tells the texts of two induction jobs apart."""
    return list(lengths), seeds or INDUCTION_TEXTS[protocol][1], seed, protocol


def induction_rows(entries: Mapping[str, Done[InductionScores]], thresholds: Mapping[str, float]) -> pd.DataFrame:
    """`Study.induction()`.

    Args:
        entries: By weights.
        thresholds: What an induction head reaches on each primitive; NaN where that is not known.
    """
    if not entries:
        return INDUCTION.frame()
    table = pd.concat([entry.table.assign(weights=weights, protocol=entry.job.protocol,
                                          sequences=entry.info["sequences"])
                       for weights, entry in sorted(entries.items(), reverse=True)], ignore_index=True)
    high = np.logical_and.reduce([table[name] >= least for name, least in thresholds.items()])
    # Not known before the control is measured that copying's threshold depends on.
    known = not np.isnan(thresholds["copying"])
    return INDUCTION.frame(table.assign(induction=pd.array(high if known else [pd.NA] * len(table), "boolean")))


def retained(
    scores: Scores, primitives: Mapping[str, Float[np.ndarray, " head"]],
    fractions: Sequence[float | int] = RETAINED_FRACTIONS, *, resampled: Rows | None = None, seed: int = 0,
    draws: int = DRAWS, aggregate: str = "mean",
) -> pd.DataFrame:
    """Which share of a primitive's total score is left as the least important heads go.

    Args:
        scores: Importance of all heads by (task, number of shots); their aggregate over tasks, where there are several,
            is added as scope "mean" (or "mean of ranks").
        primitives: A score per head, never negative, by name ("prefix_matching", "copying").
        fractions: Shares of heads to remove; `floor(fraction * n)` heads go.
        resampled: Bootstrap replicates of the scores, for the interval.
        seed: Of the random orders.
        draws: How many random orders.
        aggregate: "mean" of the tasks' scores, or of their "ranks".

    Returns:
        The table `RETAINED`; the band of random orders is the same for every task.

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
        for (scoped, k), at in ordered.items():
            in_order = np.empty(at.shape)
            np.put_along_axis(in_order, at, values[None], axis=1)
            left = _left(in_order, gone)
            bounds = np.clip(around(left[0], left[1:]), 0, 1)
            rows += [{**scoped._asdict(), "num_fewshot": k, "primitive": name, "fraction": fraction,
                      "retained": left[0, i], "low": bounds[0, i], "high": bounds[1, i],
                      "random_mean": 1 - gone[i] / n, "random_low": low[i], "random_high": high[i]}
                     for i, fraction in enumerate(fractions)]
    return RETAINED.frame(rows)


def induction_among_important(
    scores: Scores, induction_heads: Bool[np.ndarray, " head"],
    fractions: Sequence[float | int] = (0.1, 0.2, 0.3, 0.5), *, layers: Sequence[int] | None = None,
    resampled: Rows | None = None, aggregate: str = "mean",
) -> pd.DataFrame:
    """How many of the induction heads are among the most important ones.

    Args:
        scores: Importance of all heads by (task, number of shots); their aggregate over tasks, where there are several,
            is added as scope "mean" (or "mean of ranks").
        induction_heads: True for every head that is high on both primitives.
        fractions: Sizes of the important set, as shares of all heads: the last `floor(fraction * n)` of the order.
        layers: Of every head.
        resampled: Bootstrap replicates of the scores, for the interval.
        aggregate: "mean" of the tasks' scores, or of their "ranks".

    Returns:
        The table `INDUCTION_AMONG_IMPORTANT`. No p is corrected for the number of rows: see `stats.holm`.

    Raises:
        OptionError: If scores are missing or not of one model's heads.
    """
    total, there = len(induction_heads), int(induction_heads.sum())
    everything = _places_of_heads(scores, {"induction": induction_heads.astype(np.float64)}, resampled, aggregate)
    of_layers = None if layers is None else np.asarray(layers)
    rows: list[dict[str, Any]] = []
    for ((scoped, k), at), fraction in itertools.product(everything.items(), fractions):
        size = count(fraction, total)
        important = at >= total - size
        common = (important & induction_heads).sum(axis=1)
        low, high = np.clip(around(float(common[0]), common[1:].astype(np.float64)), 0, min(size, there))
        rows.append({**scoped._asdict(), "num_fewshot": k, "fraction": fraction, "important": size,
                     "induction_heads": there, "common": int(common[0]), "low": low, "high": high,
                     **by_chance(important[0], induction_heads, of_layers)})
    return INDUCTION_AMONG_IMPORTANT.frame(rows)


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
    known = measured(importance, "head", score)
    trained = trained_scores(induction, known.scores)
    if trained is None:
        return retained({}, {}, seed=seed)
    return retained(
        known.scores, primitive_scores(trained), resampled=known.resampled, seed=seed, aggregate=aggregate
    )


def among_important_table(
    importance: pd.DataFrame, score: str, induction: pd.DataFrame, aggregate: str
) -> pd.DataFrame:
    """`Study.induction_among_important()`; empty where it is not known which heads are induction heads."""
    known = measured(importance, "head", score)
    trained = trained_scores(induction, known.scores)
    if trained is None or trained["induction"].isna().any():
        return induction_among_important({}, np.zeros(0, bool))
    chosen: Bool[np.ndarray, " head"] = trained["induction"].to_numpy(bool)
    return induction_among_important(known.scores, chosen, layers=layers_of(importance, score),
                                     resampled=known.resampled, aggregate=aggregate)


def induction_heads(induction: pd.DataFrame) -> pd.DataFrame:
    """The induction heads with their names, those highest on the lower of their two scores first."""
    heads = induction[induction["induction"].fillna(False)]
    names = [name_of("head", layer, head) for layer, head in zip(heads["layer"], heads["head"], strict=True)]
    lower = heads[list(PRIMITIVES)].min(axis=1)
    return heads.assign(name=names).loc[lower.sort_values(ascending=False, kind="stable").index]


def borderline(induction: pd.DataFrame, thresholds: Mapping[str, float]) -> int:
    """How many heads a change of one standard error would make induction heads, or no longer such.

    The error of a mean over texts of several lengths, taken as if these were drawn too: it is rather too large.
    """
    scores = induction[list(PRIMITIVES)].to_numpy(float) - np.array([thresholds[p] for p in PRIMITIVES])
    variances = induction[[f"{p}_variance" for p in PRIMITIVES]].to_numpy(float)
    errors = np.sqrt(variances / induction[["sequences"]].to_numpy(float))
    up, down = (scores + errors >= 0).all(axis=1), (scores - errors >= 0).all(axis=1)
    return int((up != down).sum())
