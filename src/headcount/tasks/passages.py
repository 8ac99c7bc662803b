"""Which documents belong together: documents that share a passage are not independent evidence.

Questions about one paragraph (MultiRC, ReCoRD), or twin sentences (WinoGrande), count together in intervals of
accuracy (`headcount.stats.intervals`), and are drawn together where importance is resampled
(`headcount.measure.resampling`). No field of any task is named here: documents belong together where their texts, after
what all texts of the task begin with, share a beginning of at least half of the shorter one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

# Shorter beginnings are shared by chance, as those of single words are.
_SHORTEST = 40
# How an option begins that is written out before the answers: `A. `, `(2) `.
_LABEL = re.compile(r"^\(?[a-z0-9][.):]\s+")


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


def likeness(context: str, answers: Sequence[str]) -> str:
    """What a document is, whatever the case of its letters, its white space, and the order and labels of its options.

    Two documents of equal likeness are one question that was written twice.

    Args:
        context: Its text, without shots, before the right answer.
        answers: All answers that it may have.
    """
    lines = sorted(_LABEL.sub("", line) for line in map(plain, context.splitlines()))
    return "\n".join(filter(None, [*lines, *sorted(map(plain, answers))]))


def plain(text: str) -> str:
    """A text in small letters, with single spaces between its words."""
    return " ".join(text.casefold().split())


def _shared(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
