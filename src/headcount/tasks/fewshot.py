"""Shots, drawn as lm-eval draws them, but for the document itself, or as the paper's code draws them."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The seed lm-eval gives its few-shot sampler.
LM_EVAL_SEED = 1234
# The paper's code shuffles evaluated documents with a generator of this seed, and draws their shots from it afterwards.
SHUFFLE_SEED = 42


@dataclass(frozen=True, eq=False)
class Shots:
    """Stands in for lm-eval's sampler: gives fixed shots, or lm-eval's own draw without one document.

    lm-eval leaves a document out of its own shots only where both come from the test split by name. Here another takes
    its place, drawn apart, so that all other documents keep the shots that lm-eval gives them.
    """

    shots: Sequence[Any]
    excluded: Mapping[str, Any] | None
    doc_id: int
    sampler: Any

    def sample(self, n: int, eval_doc: Any = None) -> Sequence[Any]:
        """So many shots for a document."""
        drawn = list(self.shots[:n] or self.sampler.sample(n, eval_doc=eval_doc))
        if self.excluded is None or self.excluded not in drawn:
            return drawn
        kept = [doc for doc in drawn if doc != self.excluded]
        others = [doc for doc in self.sampler.df if doc != self.excluded and doc not in kept]
        return [*kept, *random.Random(self.doc_id).sample(others, n - len(kept))]  # noqa: S311


def papers_draws(
    documents: Sequence[Any], pool: Sequence[Any], num_fewshot: int, *, evaluated: bool, seed: int | None,
    excluding: bool,
) -> Iterator[tuple[int, Sequence[Any]]]:
    """Positions of documents in the order of the paper's code, each with its shots.

    Evaluated documents are shuffled, and the generator that shuffled them draws the shots of one after another.
    Training documents are scored in an order that cannot be repeated, so they keep their own; `random`, seeded once,
    draws the shots of one after another, and a document may be drawn for itself.

    Args:
        documents: Those of a split.
        pool: What shots are drawn from.
        num_fewshot: How many.
        evaluated: Whether the documents are evaluated, or scored.
        seed: Of the draws; None draws those of evaluated documents on from where the shuffle ended.
        excluding: Whether one shot more is drawn, and what equals the document taken out: where there are no training
            documents.
    """
    rnd, order = random.Random(SHUFFLE_SEED), list(range(len(documents)))  # noqa: S311
    if evaluated:
        rnd.shuffle(order)
    if seed is not None:
        rnd = random.Random(seed)  # noqa: S311
    for position in order:
        drawn = [pool[i] for i in rnd.sample(range(len(pool)), num_fewshot + excluding)] if num_fewshot else []
        kept = [shot for shot in drawn if shot != documents[position]] if excluding else drawn
        yield position, kept[:num_fewshot]


def questions_together(
    draws: Iterator[tuple[int, Sequence[Any]]], question: Callable[[int], Hashable]
) -> list[tuple[int, Sequence[Any]]]:
    """The same documents, those of a question behind its first one: the first so many hold whole questions."""
    found, first = list(draws), dict[Hashable, int]()
    for place, (position, _) in enumerate(found):
        first.setdefault(question(position), place)
    return sorted(found, key=lambda one: first[question(one[0])])
