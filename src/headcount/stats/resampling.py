"""What draws of documents say of a number: documents of a passage together, and intervals by the spread of draws."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtri

from headcount.errors import OptionError

RESAMPLES = 2000
LEVEL = 0.95
# A number for each document; those of one passage share it.
Clusters = Int[np.ndarray, " _"]


def cluster_sums(
    values: Float[np.ndarray, "row doc"], clusters: Clusters
) -> tuple[Float[np.ndarray, "row cluster"], Int[np.ndarray, " cluster"]]:
    """Sum of every row over the documents of each cluster, and how many these are; clusters by rising number.

    Raises:
        OptionError: If there is not one cluster for each document.
    """
    if clusters.shape != values.shape[1:]:
        raise OptionError(f"each document has one cluster: {values.shape[1]} documents, {clusters.size} clusters")
    _, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    return np.add.reduceat(values[:, np.argsort(index, kind="stable")], starts, axis=1), sizes


def interval(
    samples: Float[np.ndarray, "row resample"], level: float = LEVEL
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Lower and upper end of what the middle `level` of each row's samples is."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=1)
    return low, high


def around(
    value: Float[np.ndarray, "..."] | float, resampled: Float[np.ndarray, "resample ..."], level: float = LEVEL
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Interval of what orders of noisy scores give (shares of sets, of scores): centred, as wide as replicates spread.

    A replicate of such scores carries their noise and its own on top, so that its order is further from the truth than
    the measured one, and percentiles would be of something else (see `stats.ranks`). The interval is the value plus
    and minus 1.96 standard deviations over replicates. It is for the expectation in studies of as many documents, not
    for what unlimited documents would show. In simulated studies it covers in 84 to 97 % of cases, least with noisy
    scores (test_tops.py); not so the rank of a single component, whose interval is by pairs (`ranks.rank_intervals`).

    Args:
        value: What was measured.
        resampled: The same of every draw of documents.
        level: Of the interval.

    Returns:
        Lower and upper bound; NaN where there are fewer than two draws.
    """
    if len(resampled) < 2:
        unknown = np.full(np.shape(value), np.nan)
        return unknown, unknown
    reach = float(ndtri((1 + level) / 2)) * resampled.std(axis=0, ddof=1)
    return np.asarray(value - reach), np.asarray(value + reach)
