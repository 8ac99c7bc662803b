"""Intervals over documents, and the free fraction.

Every interval is a percentile bootstrap over documents (Efron and Tibshirani 1993): documents are drawn with
replacement, the same draw for every mask, so that differences between masks are paired; for a mean over tasks the
documents of each task are drawn within the task. A draw is a vector of multinomial counts, so that all resampled
means are one matrix product.

The percentile bootstrap knows only what it has seen: where no document changes, its interval has no width, although
with n documents a share of about 3 / n may well change unseen. Callers mark such points and small samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from headcount.errors import OptionError

RESAMPLES = 2000
LEVEL = 0.95
# Fewer documents than this say little by themselves.
FEW_DOCUMENTS = 50


def resampled_means(
    values: Float[np.ndarray, "row doc"], *, seed: int = 0, resamples: int = RESAMPLES
) -> Float[np.ndarray, "row resample"]:
    """Means of every row over documents drawn with replacement, the same draw for all rows.

    Args:
        values: One number per row and document.
        seed: Of the draws.
        resamples: How many draws.

    Raises:
        OptionError: If there are no documents.
    """
    n = values.shape[1]
    if n == 0:
        raise OptionError("an interval needs at least one document")
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.asarray(values @ counts.T / n)


def interval(
    samples: Float[np.ndarray, "row resample"], level: float = LEVEL
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Lower and upper bound of each row's percentile interval."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=1)
    return low, high


def free_fraction(
    fractions: Sequence[float | int], lower_bounds: Sequence[float | int], margin: float | int
) -> float:
    """The largest fraction such that at every step up to it a loss of the margin or more is ruled out.

    Args:
        fractions: The steps, rising; 0 need not be among them.
        lower_bounds: The lower 95 % bound of (pruned - full) at each step.
        margin: The loss to rule out. A bound that equals minus the margin does not: with 50 documents bounds are
            multiples of .02, so that this happens often.

    Returns:
        The fraction; 0 where already the first step may lose so much. Removing nothing is always free.
    """
    free = 0.0
    for fraction, low in zip(fractions, lower_bounds, strict=True):
        # 49/50 - 50/50 and 33/50 - 34/50 lie on two sides of -.02 by their last bits: both count as equal to it.
        if fraction > 0 and not low > -margin + 1e-9:
            break
        free = float(fraction)
    return free


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
    found = _pearson(rankdata(x[draws], axis=1), rankdata(y[draws], axis=1))
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(_pearson(rankdata(x)[None], rankdata(y)[None])[0]), float(low), float(high)


def _pearson(x: Float[np.ndarray, "row component"], y: Float[np.ndarray, "row component"]) -> Float[np.ndarray, " row"]:
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a draw of equal values has no correlation
        return np.asarray((x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1)))


def chance(num_options: Int[np.ndarray, " doc"]) -> float:
    """Expected accuracy of guessing; 0 where there is one option, since then the answer must be produced."""
    return float(np.where(num_options > 1, 1 / num_options, 0.0).mean())


def constant_answer(gold: Int[np.ndarray, " doc"], num_options: Int[np.ndarray, " doc"]) -> float:
    """Accuracy of the best answer that is the same place for every document; NaN where options differ in number."""
    if len(set(num_options.tolist())) != 1 or num_options[0] < 2:
        return float("nan")
    return float(np.bincount(gold).max() / len(gold))
