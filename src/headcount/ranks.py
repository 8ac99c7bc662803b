"""Rank correlations of importance scores, how far documents' noise moves them, and how far it lowers them.

An importance score is a mean over N documents: the truth plus noise. Noise lowers rank correlations, so two questions
have two answers. With x, y the measured scores of two tasks (or two numbers of shots):

*What would another study of N documents find?* Spearman's rho of x and y, with an interval for its expectation. The
obvious one, percentiles of rho between bootstrap replicates, is wrong: a replicate carries the noise of x and its own
on top, so its rho is lower, often lower altogether than the estimate. But the *spread* of replicates is about right.
So the interval is centred on the estimate: Fisher's z = atanh(rho) +- 1.96 standard deviations of z over replicates.
In simulated studies (test_stats.py) it covers in 84 to 97 % of cases, least with few documents of heavy-tailed noise;
percentiles in 14 to 96 %.

*What would endless documents find?* More. `disattenuated` divides out the noise (Spearman 1904), from two halves of
the documents: how well the halves of one task agree says how much of a score is noise. It can exceed 1.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.stats import norm, rankdata

from headcount.stats import LEVEL, pearson


def ranks(scores: Float[np.ndarray, "*rows component"]) -> Float[np.ndarray, "*rows component"]:
    """Ranks along the last axis, 1 the least; equal scores share the mean of their ranks. A row with NaN is all NaN."""
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
    lists = [np.argsort(scores, kind="stable").astype(np.float64) for scores in (x, y)]
    return spearman(*lists)


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
    centre, reach = float(np.arctanh(np.clip(rho, -most, most))), float(norm.ppf((1 + level) / 2)) * spread
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
    """Estimate of the rank correlation that endless documents would give (Spearman 1904).

    `mean(rho(x1, y2), rho(x2, y1)) / sqrt(rho(x1, x2) rho(y1, y2))` of the halves' means. Both sides of the fraction
    are of halves, so their noise cancels. Only unlike halves of x and y are compared, so it holds as well where x and
    y come from the same documents and share their noise, if halves are the same documents in both. The formula is
    exact for Pearson's correlation; with ranks it was within .01 of the truth where reliabilities are .8 and more
    (simulated), and too high by .1 at .7 with 30 components, where it scatters widely.

    Args:
        x: Means of one score over the two halves of the documents.
        y: Those of the other.

    Returns:
        The estimate, above 1 by chance at times; NaN where the halves of one score do not agree at all.
    """
    rx, ry = ranks(x), ranks(y)
    agreed = pearson(np.stack([rx[0], ry[0]]), np.stack([rx[1], ry[1]]))
    if not agreed.min() > 0:
        return float("nan")
    return float(pearson(rx, ry[::-1]).mean() / np.sqrt(agreed.prod()))


def random_band(components: int, level: float = LEVEL) -> float:
    """The share `level` of random orders correlate with any given one by less than this, either way.

    Over permutations Spearman's rho has mean 0 and variance 1 / (n - 1), and is near normal for n >= 10.
    """
    return min(1.0, float(norm.ppf((1 + level) / 2)) / np.sqrt(components - 1)) if components > 1 else 1.0
