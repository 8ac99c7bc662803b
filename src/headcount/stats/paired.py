"""Paired tests of two models on the same documents, and their correction for how many there are."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from headcount.stats.resampling import Clusters, cluster_sums


def mcnemar(
    full: Float[np.ndarray, " doc"], pruned: Float[np.ndarray, "row doc"], *, clusters: Clusters | None = None
) -> Float[np.ndarray, " row"]:
    """Exact two-sided paired test that pruning does as much good as harm, one p-value per row.

    Of the documents whose metric differs (b fell, c rose), as many should have fallen as risen: p is the binomial
    probability of a split at least as uneven as b : c (McNemar 1947, in its exact form). The number of documents that
    did not change plays no part, and p is 1 where none did.

    For metrics other than 0/1 (averages over several orders, partial scores) this is the sign test on differences,
    ties left out: it counts how many documents fell, not how far, so that it may differ from the interval of the mean
    difference.

    Args:
        full: The full model's metric.
        pruned: The metric of each pruned model, on the same documents.
        clusters: The passage of each document: a passage then counts once, by the sum of its differences.
    """
    change = pruned - full
    if clusters is not None:
        change, _ = cluster_sums(change, clusters)
    # Averages such as 2/3 differ from themselves in the last bits, depending on how they were summed.
    fell, rose = (change < -1e-9).sum(axis=1), (change > 1e-9).sum(axis=1)
    p = np.ones(len(change))
    if (changed := fell + rose > 0).any():
        from scipy.stats import binom

        p[changed] = np.minimum(1.0, 2 * binom.cdf(np.minimum(fell, rose)[changed], (fell + rose)[changed], 0.5))
    return p


def holm(p: Float[np.ndarray, " point"]) -> Float[np.ndarray, " point"]:
    """p-values corrected for how many there are (Holm 1979), so that those below .05 hold a false one in 5 % of cases.

    The i-th smallest of m, i from 0, is multiplied by m - i, and is no smaller than those before it. NaN stays NaN and
    does not count.
    """
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected
