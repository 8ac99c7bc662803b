"""What importance would have been on other documents: resampled means, halves, and standard errors.

Documents that share a passage are drawn, halved and counted together (a cluster bootstrap).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from headcount.stats.resampling import cluster_sums

# Draws that are kept of an importance: intervals of rank correlations come from their spread.
RESAMPLES = 200


def resampled(
    values: Float[np.ndarray, "doc component"], owners: Int[np.ndarray, " doc"], doc_ids: Int[np.ndarray, " doc"], *,
    name: str, resamples: int = RESAMPLES,
) -> Float[np.ndarray, "resample component"]:
    """Means over documents drawn with replacement, the documents of a passage together (Poisson bootstrap).

    How often a passage is drawn depends on the task and on its first document alone, so that draws are the same at any
    number of shots, although documents that serve as shared shots are missing there.

    Args:
        values: One row per document.
        owners: Passages, from `passages`.
        doc_ids: The documents' positions in their split.
        name: The task's.
        resamples: How many draws.
    """
    weights = np.stack([rng.poisson(1.0, resamples) for rng in _draws(owners, doc_ids, name)])[owners]
    weights[:, weights.sum(0) == 0] = 1  # nothing drawn, of a few documents
    return np.asarray(weights.T @ values / weights.sum(0)[:, None])


def halves(
    values: Float[np.ndarray, "doc component"], owners: Int[np.ndarray, " doc"], doc_ids: Int[np.ndarray, " doc"], *,
    name: str,
) -> Float[np.ndarray, "half=2 component"]:
    """Means over two halves of the documents; NaN where one of them is empty.

    A coin decides for each passage; like the draws of `resampled` it falls alike at any number of shots.
    """
    first = np.array([rng.random() < 0.5 for rng in _draws(owners, doc_ids, name)])[owners]
    if first.all() or not first.any():
        return np.full((2, values.shape[1]), np.nan)
    return np.stack([values[first].mean(0), values[~first].mean(0)])


def _draws(
    owners: Int[np.ndarray, " doc"], doc_ids: Int[np.ndarray, " doc"], name: str
) -> Iterator[np.random.Generator]:
    """A generator for every passage, which depends on the task and on the passage's first document."""
    seed = zlib.crc32(name.encode())
    for owner in range(owners.max() + 1):
        yield np.random.default_rng([seed, int(doc_ids[owners == owner].min())])


def standard_error(
    values: Float[np.ndarray, "doc component"], passages: Int[np.ndarray, " doc"]
) -> Float[np.ndarray, " component"]:
    """Of the mean over documents, those of a passage together; NaN where all are of one passage."""
    apart, _ = cluster_sums((values - values.mean(0)).T, passages)
    passage_count = apart.shape[1]
    if passage_count < 2:
        return np.full(values.shape[1], np.nan)
    return np.asarray(np.sqrt((apart**2).sum(1) * passage_count / (passage_count - 1)) / len(values))
