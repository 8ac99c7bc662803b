"""Rank correlations of importance scores, how far documents' noise moves them, and how far it lowers them.

An importance score is a mean over N documents: the truth plus noise. Noise lowers rank correlations, so two questions
have two answers. With x, y the measured scores of two tasks (or two numbers of shots):

*What would another study of N documents find?* Spearman's rho of x and y, with an interval for its expectation. The
obvious one, percentiles of rho between bootstrap replicates, is wrong: a replicate carries the noise of x and its own
on top, so its rho is lower, often lower altogether than the estimate. But the *spread* of replicates is about right.
So the interval is centred on the estimate: Fisher's z = atanh(rho) +- 1.96 standard deviations of z over replicates.
In simulated studies (test_stats.py) it covers in 84 to 97 % of cases, least with few documents of heavy-tailed noise;
percentiles in 14 to 96 %.

*What would be found with unlimited documents?* More. `disattenuated` divides out the noise (Spearman 1904), from two
halves of the documents: how well the halves of one task agree says how much of a score is noise. It can exceed 1.

*How much of it is only depth?* Importance changes over the layers, alike on all tasks, and this alone correlates any
two of them. Rho is a mean of products of ranks, so it is the sum of two parts: of the layers' mean ranks
(`layers_alone`), and of what is left of each rank without its layer's mean (`within_layers`).


Paired tests, overlaps of sets, baselines, and marks on results that say little.

Intervals of accuracies and of their differences, and the verdict made of them, are in `headcount.stats.intervals`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtri

from headcount.stats.resampling import LEVEL, RESAMPLES


def ranks(scores: Float[np.ndarray, "*rows component"]) -> Float[np.ndarray, "*rows component"]:
    """Ranks along the last axis, 1 the least; equal scores share the mean of their ranks. A row with NaN is all NaN."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(scores, axis=-1), np.float64)


def spearman(x: Float[np.ndarray, " component"], y: Float[np.ndarray, " component"]) -> float:
    """Spearman's rank correlation; NaN where one of the scores has a single value, or there are less than three."""
    return float(pearson(ranks(x)[None], ranks(y)[None])[0]) if len(x) > 2 else float("nan")


def argsort_correlation(x: Float[np.ndarray, " component"], y: Float[np.ndarray, " component"]) -> float:
    """Spearman's correlation of the two argsort lists, which is what the paper's code calls that of the scores.

    The lists hold positions of components, from least to most important. Two nearly equal scores give lists that agree
    in few places, so the number says little about the scores: near 0 where importance has no trend over the layers,
    and, where it has, what the trend alone gives, however alike the scores are.
    """
    if len(x) < 3:
        return float("nan")
    # Positions are all different: each, counted from 1, is its own rank.
    one, other = (np.argsort(scores, kind="stable")[None] + 1.0 for scores in (x, y))
    return float(pearson(one, other)[0])


def within_layers(
    places: Float[np.ndarray, "*rows component"], layers: Int[np.ndarray, " component"]
) -> Float[np.ndarray, "*rows component"]:
    """Ranks less the mean rank of their layer, which is all that depth says of a component.

    Pearson's correlation of two such arrays is Spearman's partial correlation given the layer. Ranks over the whole
    model, not ranks within each layer: these would make as much of a layer whose heads hardly differ as of one where
    one head does all. Ranks and not scores, since scores span three orders of magnitude, so that a few heads would
    decide.

    Args:
        places: Ranks along the last axis.
        layers: Of every component.

    Returns:
        What is left; exactly 0 where a layer's components share one rank, or there is only one of them.
    """
    _, index, sizes = np.unique(layers, return_inverse=True, return_counts=True)
    by_layer = places[..., np.argsort(index, kind="stable")]
    sums = np.add.reduceat(by_layer, np.cumsum(sizes) - sizes, axis=-1)[..., index]
    # Sums of ranks are exact: no last bits are left that would correlate with those of another score.
    return np.asarray((sizes[index] * places - sums) / sizes[index])


def layers_alone(
    x: Float[np.ndarray, " component"], y: Float[np.ndarray, " component"], layers: Int[np.ndarray, " component"]
) -> float:
    """The part of Spearman's correlation that knowing each component's layer gives.

    It is what rho is on average once the components of every layer have swapped their scores at random: the product of
    the layers' mean ranks, over the standard deviations of all ranks. The rest of rho is found within layers. Of a
    score with itself it is the share of the ranks' variance that lies between layers.

    Args:
        x: Ranks of one score.
        y: Of the other.
        layers: Of every component.
    """
    rest = (within_layers(x, layers) * within_layers(y, layers)).sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(pearson(x[None], y[None])[0]) - float(rest / (len(x) * x.std() * y.std()))


def between_layers(scores: Float[np.ndarray, " component"], layers: Int[np.ndarray, " component"]) -> float:
    """Share of the variance of log scores that lies between layers (1 minus the variance around the layers' means).

    Logarithms, since importance spans orders of magnitude. Scores without any trend over L layers have
    (L - 1) / (n - 1) of it on average. NaN where a score is not positive, there is one value, or one component a layer.

    Args:
        scores: Importance.
        layers: Of every component.
    """
    if len(scores) == 0 or not scores.min() > 0 or len(np.unique(layers)) == len(layers) or np.ptp(scores) == 0:
        return float("nan")
    logs = np.log(scores)
    return float(1 - np.square(within_layers(logs, layers)).mean() / logs.var())


def rank_intervals(
    scores: Float[np.ndarray, " component"], resampled: Float[np.ndarray, "resample component"],
    measured: Int[np.ndarray, " component"], level: float = LEVEL,
) -> tuple[Float[np.ndarray, " component"], Float[np.ndarray, " component"]]:
    """Which ranks each component may have with unlimited documents, by comparing it with every other one.

    One component is shown to be above another where their difference, paired by documents, is more than 1.96 standard
    deviations (over draws of documents) above 0. The first rank left to a component comes after all that are shown to
    be above it, the last one before all that are shown to be below. So the ranges hold the measured ranks, and can all
    be true at once (Mohamad et al. 2022; Klein, Wright and Wieczorek 2020; Mogstad et al. 2024 use such comparisons).

    Comparisons are not corrected for how many they are: the bounds are of one rank, not of all at once. A wrong
    statement spoils a range only where no other comparison that it might have stated is missed, so that in simulated
    studies ranges hold the true rank in 97 % of cases and more, and in 93 % and more of the five that rank highest
    (test_tops.py); all ranges at once hold in 0 to 80 %. Bounds that hold all at once (Holm) would be two to six times
    as wide. Means of ranks over tasks are worse off where components hardly differ: 93 %, of the first five 89 %.

    Args:
        scores: Importance, as measured.
        resampled: The same of every draw of documents.
        measured: The rank of every component, 1 for the highest; it says in which order equal scores stand.
        level: Of each comparison.

    Returns:
        First and last rank; NaN where there are fewer than two draws.
    """
    n = len(scores)
    if len(resampled) < 2:
        return np.full(n, np.nan), np.full(n, np.nan)
    covariances = np.atleast_2d(np.cov(resampled, rowvar=False))
    variances = np.diag(covariances)
    low, high = measured.astype(np.float64), measured.astype(np.float64)
    reach = float(ndtri((1 + level) / 2))
    for i in range(n):  # row by row: a model of 66 billion parameters has 4,608 heads
        deviations = np.sqrt(np.maximum(variances + variances[i] - 2 * covariances[i], 0))
        apart = np.abs(scores - scores[i]) > reach * deviations
        low[i] = min(low[i], 1 + (apart & (scores > scores[i])).sum())
        high[i] = max(high[i], n - (apart & (scores < scores[i])).sum())
    return low, high


def score_reliability(
    importance: Float[np.ndarray, " component"], stderr: Float[np.ndarray, " component"]
) -> float:
    """Which share of a score's variance over components is not noise: what it would correlate with itself, remeasured.

    1 - mean(stderr^2) / variance, the definition of a reliability (Spearman 1904; Lord and Novick 1968): what is
    measured varies by what is true and by noise, and the standard errors say by how much noise. Unlike halves'
    agreement it needs no halves, so it can be told of every score, means over tasks included. Below .5 more than half
    of an order's differences is noise. Errors that components share (documents that weigh more on all of them) count as
    noise, although they change no order: it is then too low.

    Args:
        importance: A score of every component.
        stderr: Its standard errors.

    Returns:
        Between 0 and 1; 0 where all components have one value; NaN where an error is unknown or there is one component.
    """
    if len(importance) < 2 or not (np.isfinite(importance).all() and np.isfinite(stderr).all()):
        return float("nan")
    variance = float(importance.var(ddof=1))
    return float(np.clip(1 - np.mean(stderr**2) / variance, 0, 1)) if variance > 0 else 0.0


def document_interval(
    rho: float, resampled: Float[np.ndarray, " resample"], components: int, level: float = LEVEL
) -> tuple[float, float]:
    """Interval over documents of a rank correlation: centred on it, as wide as replicates spread.

    It is for the expectation of rho between scores of as many documents as these, on these very components (see the
    head of this file for why it is centred, and how often it covers). Where both scores come from the same documents
    (two numbers of shots of one task), noise that they share is part of that expectation, and the replicates must be
    of the same draws.

    Args:
        rho: The correlation of the two means over all documents.
        resampled: The correlation of the two means over each draw of documents.
        components: How many components were ranked: z is bounded by the correlation halfway between 1 and the largest
            one below, of lists that differ in one swap of neighbours.
        level: Of the interval.

    Returns:
        Lower and upper bound; NaN where rho is NaN, fewer than two replicates have a correlation, or more than one in
        twenty has none: single documents then decide all (an oracle with one right answer), and replicates that hold
        them are all alike.
    """
    known = resampled[~np.isnan(resampled)]
    if np.isnan(rho) or len(known) < max(2, level * len(resampled)):
        return float("nan"), float("nan")
    most = 1 - 6 / (components * (components**2 - 1))
    spread = float(np.arctanh(np.clip(known, -most, most)).std(ddof=1))
    centre, reach = float(np.arctanh(np.clip(rho, -most, most))), float(ndtri((1 + level) / 2)) * spread
    return min(rho, float(np.tanh(centre - reach))), max(rho, float(np.tanh(centre + reach)))


def reliability(half_correlation: float) -> float:
    """What a score would correlate with itself measured on as many other documents (Spearman 1910, Brown 1910).

    Args:
        half_correlation: The correlation of the means of two halves of the documents.

    Returns:
        `2 r / (1 + r)`: all documents are twice a half. Halves that do not agree stay as they are. In simulated
        studies within .01, and .03 too high where noise has very heavy tails.
    """
    return 2 * half_correlation / (1 + half_correlation) if half_correlation > 0 else half_correlation


def ceiling(reliability_x: float, reliability_y: float) -> float:
    """The most that two scores can be expected to correlate, given their noise: sqrt of the product of reliabilities.

    For scores of different documents: noise of the same documents is shared, and may lift rho above this. NaN where a
    reliability is not positive.
    """
    return float(np.sqrt(reliability_x * reliability_y)) if min(reliability_x, reliability_y) > 0 else float("nan")


def disattenuated(
    x: Float[np.ndarray, "half=2 component"], y: Float[np.ndarray, "half=2 component"]
) -> float:
    """Estimate of the rank correlation that would be found with unlimited documents (Spearman 1904).

    `mean(rho(x1, y2), rho(x2, y1)) / sqrt(rho(x1, x2) rho(y1, y2))` of the halves' means. Both sides of the fraction
    are of halves, so their noise cancels. Only unlike halves of x and y are compared, so it holds as well where x and
    y come from the same documents and share their noise, if halves are the same documents in both. The formula is
    exact for Pearson's correlation; with ranks it was within .01 of the truth where reliabilities are .8 and more
    (simulated), and too high by .1 at .7 with 30 components, where it scatters widely.

    Args:
        x: Ranks of one score's means over the two halves of the documents.
        y: Those of the other.

    Returns:
        The estimate, above 1 by chance at times; NaN where the halves of one score do not agree at all.
    """
    agreed = pearson(np.stack([x[0], y[0]]), np.stack([x[1], y[1]]))
    if not agreed.min() > 0:
        return float("nan")
    return float(pearson(x, y[::-1]).mean() / np.sqrt(agreed.prod()))


def random_band(components: int, level: float = LEVEL) -> float:
    """The share `level` of random orders correlate with any given one by less than this, either way.

    Over permutations Spearman's rho has mean 0 and variance 1 / (n - 1), and is near normal for n >= 10.
    """
    return min(1.0, float(ndtri((1 + level) / 2)) / np.sqrt(components - 1)) if components > 1 else 1.0


def rank_correlation(
    x: Float[np.ndarray, " component"], y: Float[np.ndarray, " component"], *, seed: int = 0,
    resamples: int = RESAMPLES, level: float = LEVEL,
) -> tuple[float, float, float]:
    """Spearman's correlation of two scores, with a percentile interval over components drawn with replacement.

    NaN where one of the scores has a single value, or there are fewer than three components.
    """
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    drawn = pearson(_ranks_of_draws(x, draws), _ranks_of_draws(y, draws))
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(pearson(ranks(x)[None], ranks(y)[None])[0]), float(low), float(high)


def _ranks_of_draws(
    scores: Float[np.ndarray, " component"], draws: Int[np.ndarray, "draw component"]
) -> Float[np.ndarray, "draw component"]:
    """`ranks(scores[draws])` without sorting every draw: a value's rank is told by how many of a draw lie below it."""
    values, of_component = np.unique(scores, return_inverse=True)
    drawn = of_component[draws]
    rows = np.arange(len(draws))[:, None]
    counts = np.bincount((drawn + len(values) * rows).ravel(), minlength=len(values) * len(draws))
    counts = counts.reshape(len(draws), len(values))
    return np.asarray((counts.cumsum(1) - (counts - 1) / 2)[rows, drawn])


def pearson(x: Float[np.ndarray, "row component"], y: Float[np.ndarray, "row component"]) -> Float[np.ndarray, " row"]:
    """Pearson's correlation of each row of x and y, NaN where one is constant; of ranks it is Spearman's."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a draw of equal values has no correlation
        return np.asarray((x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1)))


def mantel(
    x: Float[np.ndarray, "thing thing"], y: Float[np.ndarray, "thing thing"], *, permutations: int = 5000,
    seed: int = 0,
) -> tuple[float, float]:
    """Spearman's correlation of two matrices between the same things, and Mantel's test of it (Mantel 1967).

    Cells of a row, or of a column, share a thing, so they are no independent pairs. Under the null hypothesis the
    things of one matrix could as well have each other's places: p is the share of such permutations (of rows and
    columns together) whose correlation is at least as far from 0. All permutations of seven things and fewer are
    tried, else so many random ones. Matrices need not be symmetric; the diagonal does not count.

    Args:
        x: One matrix.
        y: The other.
        permutations: How many random ones, where there are too many to try all.
        seed: Of these.

    Returns:
        The correlation and the two-sided p. NaN where a cell off the diagonal is missing, there are fewer than three
        things, or one matrix has a single value; p besides for three things, whose six orders can show nothing.
    """
    n = len(x)
    off = ~np.eye(n, dtype=bool)
    if n < 3 or not np.isfinite(x[off]).all() or not np.isfinite(y[off]).all():
        return float("nan"), float("nan")
    rho = spearman(x[off], y[off])
    if np.isnan(rho) or n == 3:
        return rho, float("nan")
    rng = np.random.default_rng(seed)
    random = itertools.chain([range(n)], (rng.permutation(n).tolist() for _ in range(permutations - 1)))
    orders: Iterable[Sequence[int]] = itertools.permutations(range(n)) if n <= 7 else random
    ranked = ranks(x[off])[None]
    square = np.zeros((n, n))
    square[off] = ranks(y[off])
    moved = np.stack([square[np.ix_(order, order)][off] for order in orders])
    # An order that leaves all in place differs in the last bits from the correlation above.
    return rho, float((np.abs(pearson(ranked.repeat(len(moved), 0), moved)) >= abs(rho) - 1e-12).mean())
