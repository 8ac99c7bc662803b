"""Which documents are prompted and how many shots stand before each: what is asked, and how the paper's code draws.

Under protocol "sound" shots are drawn as lm-eval draws them, but never the document itself (`headcount.tasks.pool`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headcount.errors import OptionError

# What a split holds: fields by name. Shots are documents, too.
Document = Mapping[str, Any]
# The seed lm-eval gives its few-shot sampler.
LM_EVAL_SEED = 1234
# The paper's code shuffles evaluated documents with a generator of this seed, and draws their shots from it afterwards.
SHUFFLE_SEED = 42


@dataclass(frozen=True)
class FewShot:
    """How many documents of a split are prompted, and with which shots.

    Attributes:
        num_fewshot: How many shots stand before each document.
        limit: The first so many documents; None takes all.
        seed: Of the sampler of shots.
        shared: Whether one draw of shots serves all documents; documents that serve as shots are left out.

    Raises:
        OptionError: If num_fewshot is below 0, or limit below 1.
    """

    num_fewshot: int = 0
    limit: int | None = None
    seed: int = LM_EVAL_SEED
    shared: bool = False

    def __post_init__(self) -> None:
        if self.num_fewshot < 0 or (self.limit is not None and self.limit < 1):
            raise OptionError("num_fewshot is at least 0 and limit at least 1, not "
                              f"{self.num_fewshot} and {self.limit}")

    @property
    def num_shared(self) -> int:
        """How many shots all documents have in common."""
        return self.num_fewshot if self.shared else 0


def papers_draws(
    documents: Sequence[Document], pool: Sequence[Document], few_shot: FewShot, places: Sequence[Collection[int]], *,
    evaluated: bool, excluding: bool,
) -> Iterator[tuple[int, Sequence[Document]]]:
    """Positions of documents in the order of the paper's code, each with its shots.

    Evaluated documents are shuffled, and the generator that shuffled them draws the shots of one after another.
    Training documents are scored in an order that cannot be repeated, so they keep their own; `random`, seeded once,
    draws the shots of one after another, and a document may be drawn for itself.

    Args:
        documents: Those of a split.
        pool: What shots are drawn from.
        few_shot: How many are drawn for each document (none where they are shared), and the seed. With lm-eval's seed,
            the default, shots of evaluated documents are drawn on from where the shuffle ended.
        places: Where each document stands in the pool.
        evaluated: Whether the documents are evaluated, or scored.
        excluding: Whether one shot more is drawn, and what equals the document taken out: where there are no training
            documents. A document with a NaN equals nothing in the paper's code; here it is known by its place, too.
    """
    rnd, order = random.Random(SHUFFLE_SEED), list(range(len(documents)))  # noqa: S311
    if evaluated:
        rnd.shuffle(order)
    if not evaluated or few_shot.seed != LM_EVAL_SEED:
        rnd = random.Random(few_shot.seed)  # noqa: S311
    num_fewshot = few_shot.num_fewshot - few_shot.num_shared
    for position in order:
        drawn = rnd.sample(range(len(pool)), num_fewshot + excluding) if num_fewshot else []
        if excluding:
            drawn = [i for i in drawn if i not in places[position] and pool[i] != documents[position]]
        yield position, [pool[i] for i in drawn[:num_fewshot]]


def questions_together(
    draws: Iterator[tuple[int, Sequence[Document]]], question: Callable[[int], Hashable]
) -> list[tuple[int, Sequence[Document]]]:
    """The same documents, those of a question behind its first one, so that a limit keeps questions whole."""
    drawn, first = list(draws), dict[Hashable, int]()
    for place, (position, _) in enumerate(drawn):
        first.setdefault(question(position), place)
    return sorted(drawn, key=lambda one: first[question(one[0])])
