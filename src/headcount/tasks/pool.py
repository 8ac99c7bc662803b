"""The documents that shots are drawn from, each of which is itself alone.

lm-eval leaves a document out of its own shots by comparing all fields. That takes duplicates for the document, and does
not know a document again that holds a NaN, which is unequal to itself. Here a document is its number in its split: the
documents of the pool are equal to themselves alone (`Own`), and a document that comes from the pool is handed to
lm-eval's sampler as the pool's. A document of another split is compared by its fields, as lm-eval does.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headcount.errors import OptionError
from headcount.tasks.fewshot import Document

FEWER = "ask for fewer shots with `num_fewshot`"
SHOTS = {"num_fewshot": "--shots"}


class Own(dict[str, Any]):
    """A document that equals no other of its kind, whatever the fields; and any other mapping by its fields."""

    def __eq__(self, other: object) -> bool:
        return self is other if isinstance(other, Own) else super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = object.__hash__  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Pool:
    """Documents that shots are drawn from.

    Attributes:
        documents: The documents.
        numbers: The number of each in its split.
    """

    documents: Sequence[Document]
    numbers: Sequence[int]

    @functools.cached_property
    def _positions(self) -> Mapping[int, int]:
        return {id(doc): position for position, doc in enumerate(self.documents)}

    def position(self, doc: Document) -> int | None:
        """Where a document stands that a sampler drew; of copies that a sampler made, by their fields."""
        if (position := self._positions.get(id(doc))) is not None:
            return position
        return next((i for i, own in enumerate(self.documents) if same(own, doc)), None)

    def places(self, documents: Sequence[Document], *, of_its_split: bool) -> list[frozenset[int]]:
        """Where each document stands in the pool; nowhere if shots come from other documents.

        Args:
            documents: Those of a split.
            of_its_split: Whether the pool was made of the same split; if so, and it holds other documents than these
                (a definition may filter them), they are found again by their fields.
        """
        equal = len(documents) == len(self.documents)
        if equal and all(same(one, other) for one, other in zip(documents, self.documents, strict=True)):
            return [frozenset([position]) for position in range(len(documents))]
        if not of_its_split:
            return [frozenset()] * len(documents)
        known: dict[str, set[int]] = {}
        for position, doc in enumerate(self.documents):
            known.setdefault(_written(doc), set()).add(position)
        return [frozenset(known.get(_written(doc), [position] if equal else [])) for position, doc in
                enumerate(documents)]


@dataclass(frozen=True, eq=False)
class Shots:
    """Stands in for lm-eval's sampler: gives fixed shots, or lm-eval's own draw without one document.

    lm-eval leaves a document out of its own shots only where both come from the test split by name. Here another takes
    its place, drawn apart, so that all other documents keep the shots that lm-eval gives them.

    Attributes:
        pool: What shots are drawn from.
        sampler: lm-eval's own sampler.
        check: Called with each shot before it is used.
        doc_id: The document's position in its split, the seed of the draw apart.
        own: Where the document itself stands in the pool; none of these is drawn.
        fixed: The fixed shots; None where lm-eval draws.
    """

    pool: Pool
    sampler: Any
    check: Callable[[Document], None]
    doc_id: int
    own: Collection[int] = ()
    fixed: Sequence[Document] | None = None

    def sample(self, n: int, eval_doc: Document | None = None) -> Sequence[Document]:
        """So many shots for a document.

        Raises:
            OptionError: If too few other documents are left.
        """
        drawn = self._without_itself(n, eval_doc) if self.fixed is None else list(self.fixed[:n])
        for shot in drawn:
            self.check(shot)
        return drawn

    def _without_itself(self, n: int, eval_doc: Document | None) -> Sequence[Document]:
        pool = self.pool.documents
        itself = pool[min(self.own)] if self.own and eval_doc is not None else eval_doc
        try:
            drawn = list(self.sampler.sample(n, eval_doc=itself))
        except (ValueError, AssertionError) as error:  # as `random` and lm-eval say that there are too few
            raise OptionError(f"fewer than {n} few-shot documents differ from document {self.doc_id}; {FEWER}",
                              fields=SHOTS) from error
        positions = [self.pool.position(shot) for shot in drawn]
        if not any(position in self.own for position in positions):
            return drawn
        kept = [shot for position, shot in zip(positions, drawn, strict=True) if position not in self.own]
        others = [doc for position, doc in enumerate(pool) if position not in self.own and position not in positions]
        wanted = n - len(kept)
        if len(others) < wanted:
            raise OptionError(f"fewer than {n} few-shot documents differ from document {self.doc_id}; {FEWER}",
                              fields=SHOTS)
        return [*kept, *random.Random(self.doc_id).sample(others, wanted)]  # noqa: S311


def same(one: object, other: object) -> bool:
    """Whether two documents hold the same, NaN where the other has NaN among it."""
    return one == other or _written(one) == _written(other)


def _written(doc: object) -> str:
    return json.dumps(doc, sort_keys=True, default=str)
