"""Which documents belong together: those that share a passage are no independent evidence.

Questions about one paragraph (MultiRC, ReCoRD), or twin sentences (WinoGrande), count together in intervals of
accuracy (`headcount.intervals`), and are drawn together where importance is resampled (a cluster bootstrap). No field
of any task is named here: documents belong together where their texts, after what all texts of the task begin with,
share a beginning of at least half of the shorter one.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

# Draws that are kept of an importance: intervals of rank correlations come from their spread.
RESAMPLES = 200
# Shorter beginnings are shared by chance, as those of single words are.
_SHORTEST = 40


def passages(texts: Sequence[str]) -> Int[np.ndarray, " doc"]:
    """A number for every text, equal for those that share a passage, counted up from 0 in the order of the texts."""
    # What all texts share is what the first and the last of them in order share.
    template = _shared(min(texts), max(texts)) if len(set(texts)) > 1 else 0
    owner = np.arange(len(texts))
    # Sorted, texts that share a beginning are neighbours.
    order = sorted(range(len(texts)), key=texts.__getitem__)
    for before, after in itertools.pairwise(order):
        a, b = texts[before][template:], texts[after][template:]
        if _shared(a, b) >= max(_SHORTEST, min(len(a), len(b)) / 2):
            owner[after] = owner[before]
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(int(o), len(numbers)) for o in owner], np.int64)


def _shared(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
