"""Gradient scores of many examples, by the schedule that the model needs: in memory, or block by block from files."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from headcount.engine.forward import Progress, Told, in_memory
from headcount.engine.gradients import Scores, batch_scores
from headcount.engine.pack import Batch
from headcount.engine.stream import Stream, stream_of
from headcount.engine.stream_gradients import streamed_scores
from headcount.model.hooks import frozen
from headcount.model.load import LoadedModel
from headcount.model.refetched import refetched

# A batch and its two scores; without shapes, since each batch has its own number of examples.
_Scored = tuple[Batch, tuple[Tensor, Tensor]]


class ExampleScores(NamedTuple):
    """The two scores, "position" and "example" in this order, of every example in nats; heads by layer, then index."""

    heads: Float[np.ndarray, "score=2 example head"]
    ffns: Float[np.ndarray, "score=2 example ffn"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples whose scores are wanted.

    Attributes:
        batches: Of single rows, each an example.
        number: How many examples they hold.
        progress: Called with the number of tokens after each batch.
    """

    batches: Sequence[Batch]
    number: int
    progress: Progress | None = None


def example_scores(loaded: LoadedModel, wanted: Iterable[Examples]) -> Iterator[ExampleScores]:
    """Of each the scores of all heads and FFNs for every example; whether they are numbers is the caller's to look at.

    Where weights are read block by block, what is wanted shares readings of them: it is asked for as there is room.

    Args:
        loaded: The model.
        wanted: The examples.

    Raises:
        ModelError: If memory is too small for one example.
    """
    stream = stream_of(loaded)
    if stream is not None:
        yield from _streamed(loaded, stream, wanted)
        return
    for one in wanted:
        with frozen(loaded.model):
            scored = [*in_memory(one.batches, functools.partial(_refetching, loaded), Told(one.progress))]
        yield _on_host(loaded, one.number, scored)


def _streamed(loaded: LoadedModel, stream: Stream, wanted: Iterable[Examples]) -> Iterator[ExampleScores]:
    begun: deque[tuple[Examples, list[_Scored]]] = deque()

    def batches() -> Iterator[Batch]:
        for one in wanted:
            begun.append((one, []))
            yield from one.batches

    with frozen(loaded.model):
        for batch, scores in streamed_scores(loaded, stream, batches()):
            one, scored = begun[0]
            scored.append((batch, scores))
            if one.progress is not None:
                one.progress(batch.tokens)
            if len(scored) == len(one.batches):
                begun.popleft()
                yield _on_host(loaded, one.number, scored)


def _on_host(loaded: LoadedModel, number: int, scored: Sequence[_Scored]) -> ExampleScores:
    """Scores in the order of examples; they are copied to the host only here, since each copy waits for the device."""
    heads = np.zeros((2, number, loaded.anatomy.num_heads))
    ffns = np.zeros((2, number, loaded.anatomy.num_layers))
    for batch, (of_heads, of_ffns) in scored:
        examples = batch.requests[np.unique(batch.rows, return_index=True)[1]]
        heads[:, examples], ffns[:, examples] = of_heads.cpu().double().numpy(), of_ffns.cpu().double().numpy()
    return ExampleScores(heads, ffns)


def _refetching(loaded: LoadedModel, batch: Batch) -> Scores:
    """A batch's scores; where some weights are offloaded, the graph keeps none of them."""
    with refetched(loaded.model, [part.block for part in loaded.anatomy.layers]):
        return batch_scores(loaded, batch)
