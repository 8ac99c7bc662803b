"""Gradient scores of many examples, by the schedule that the model needs: in memory, or block by block from files."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from headcount.engine.forward import Progress, Told, in_memory
from headcount.engine.gradients import Scores, batch_scores
from headcount.engine.pack import Batch
from headcount.engine.stream import stream_of
from headcount.engine.stream_gradients import streamed_scores
from headcount.model.hooks import frozen
from headcount.model.load import LoadedModel
from headcount.model.refetched import refetched


class ExampleScores(NamedTuple):
    """The two scores, "position" and "example" in this order, of every example in nats; heads by layer, then index."""

    heads: Float[np.ndarray, "score=2 example head"]
    ffns: Float[np.ndarray, "score=2 example ffn"]


def example_scores(
    loaded: LoadedModel, packed: Sequence[Batch], num_examples: int, progress: Progress | None = None
) -> ExampleScores:
    """Scores of all heads and FFNs for every example; whether they are numbers is the caller's to look at.

    Args:
        loaded: The model.
        packed: Batches of single rows, each an example.
        num_examples: How many examples they hold.
        progress: Called with the number of tokens after each batch.

    Raises:
        ModelError: If memory is too small for one example.
    """
    heads = np.zeros((2, num_examples, loaded.anatomy.num_heads))
    ffns = np.zeros((2, num_examples, loaded.anatomy.num_layers))
    with frozen(loaded.model):
        measured = []
        for batch, scores in _measured(loaded, packed, progress):
            measured.append((batch.requests[np.unique(batch.rows, return_index=True)[1]], scores))
    # Only now copied to the host: each copy waits for the device.
    for examples, (of_heads, of_ffns) in measured:
        heads[:, examples], ffns[:, examples] = of_heads.cpu().double().numpy(), of_ffns.cpu().double().numpy()
    return ExampleScores(heads, ffns)


def _measured(
    loaded: LoadedModel, packed: Sequence[Batch], progress: Progress | None
) -> Iterator[tuple[Batch, Scores]]:
    stream = stream_of(loaded)
    if stream is None:
        yield from in_memory(packed, functools.partial(_refetching, loaded), Told(progress))
        return
    for batch, scores in streamed_scores(loaded, stream, packed):
        if progress is not None:
            progress(batch.tokens)
        yield batch, scores


def _refetching(loaded: LoadedModel, batch: Batch) -> Scores:
    """A batch's scores; where some weights are offloaded, the graph keeps none of them."""
    with refetched(loaded.model, [part.block for part in loaded.anatomy.layers]):
        return batch_scores(loaded, batch)
