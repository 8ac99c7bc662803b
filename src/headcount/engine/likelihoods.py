"""Log-likelihoods of packed requests under masks: what is wanted of an engine, what it gives, and those by streaming.

Where a model's weights lie in files, what several jobs want shares readings of them. Their batches follow one another
into passes (`headcount.engine.stream`), and a job's log-likelihoods are given as soon as its last batch is done.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from more_itertools import peekable

from headcount.engine.blocks import Inputs
from headcount.engine.forward import Progress, Sums, logprobs_of, places_of
from headcount.engine.layout import Layout
from headcount.engine.pack import Batch
from headcount.engine.stream import Stream, Waiting, fitting
from headcount.engine.treemask import model_inputs
from headcount.masks import Mask
from headcount.model.load import LoadedModel


@dataclass(frozen=True, eq=False)
class Packed:
    """Requests laid out for a model, ready for any number of masks.

    Attributes:
        batches: What the model reads.
        layout: How the requests are laid out.
        num_requests: How many they are.
    """

    batches: tuple[Batch, ...]
    layout: Layout
    num_requests: int

    @property
    def tokens(self) -> int:
        """Positions that one forward pass over all requests computes, padding included."""
        return sum(batch.tokens for batch in self.batches)


class Likelihoods(NamedTuple):
    """Log-likelihoods (nats) and greedy matches of requests under masks, and the positions that layers computed."""

    loglikelihoods: Float[np.ndarray, "mask request"]
    greedy: Int[np.ndarray, "mask request"]
    layer_tokens: int


@dataclass(frozen=True, eq=False)
class Wanted:
    """Requests whose log-likelihoods are wanted under masks.

    Attributes:
        packed: The requests, laid out.
        masks: What is kept, one row of results each.
        columns: The first so many logits are normalised over, and searched for the most probable; None takes all.
        progress: Called with so many more tokens, of all masks together.
    """

    packed: Packed
    masks: Sequence[Mask]
    columns: int | None = None
    progress: Progress | None = None


@dataclass(eq=False)
class _Begun:
    """One of them, of which batches have entered a pass.

    Attributes:
        wanted: Which.
        sums: What is known of it.
        left: How many of its batches are not done.
        layer_tokens: Positions that blocks computed for it.
        done: Tokens of its batches that are done, times masks.
        told: What of them progress was told.
    """

    wanted: Wanted
    sums: Sums
    left: int
    layer_tokens: int = 0
    done: int = 0
    told: int = 0

    def tell(self, in_pass: int, share: float) -> None:
        """Tell progress, where so many tokens are in the pass that is this far."""
        done = self.done + int(in_pass * share)
        if self.wanted.progress is not None and done > self.told:
            self.wanted.progress(done - self.told)
        self.told = done


@dataclass(frozen=True, eq=False)
class _Of:
    """A batch, and whose it is."""

    begun: _Begun
    batch: Batch

    @property
    def tokens(self) -> int:
        """How many positions it has."""
        return self.batch.tokens


def streamed_likelihoods(loaded: LoadedModel, stream: Stream, wanted: Iterable[Wanted]) -> Iterator[Likelihoods]:
    """Log-likelihoods of each, in the order given; it is asked for when a pass has room for more.

    Args:
        loaded: The model.
        stream: Its streamed schedule.
        wanted: What is wanted of it.
    """
    begun: deque[_Begun] = deque()

    def batches() -> Iterator[Waiting[_Of]]:
        for one in wanted:
            begun.append(job := _Begun(one, Sums(len(one.masks), one.packed.num_requests), len(one.packed.batches)))
            inputs = functools.partial(_inputs, loaded)
            yield from (Waiting(_Of(job, batch), inputs, one.masks, len({*one.masks})) for batch in one.packed.batches)

    waiting = peekable(batches())
    while waiting:
        _one_pass(loaded, stream, waiting)
        while begun and begun[0].left == 0:
            job = begun.popleft()
            yield Likelihoods(*job.sums.totals(), job.layer_tokens)


def _inputs(loaded: LoadedModel, of: _Of) -> Inputs:
    return model_inputs(loaded, of.batch, of.begun.wanted.packed.layout.tree_mask)


@torch.no_grad()
def _one_pass(loaded: LoadedModel, stream: Stream, waiting: peekable[Waiting[_Of]]) -> None:
    """Take as many batches as memory lets wait through all blocks, and add what comes out to what is known of each."""
    waves = stream.enter(waiting)
    tokens: dict[_Begun, int] = {}
    for wave in waves:
        job = wave.batch.begun
        tokens[job] = tokens.get(job, 0) + wave.batch.tokens * len(wave.masks)
    with fitting(waves):
        for layer in stream.through(waves):
            for job, in_pass in tokens.items():
                job.tell(in_pass, (layer + 1) / len(stream.blocks))
        for job, in_pass in tokens.items():
            job.done += in_pass
        places = [places_of(wave.batch.batch, loaded.device) for wave in waves]
        logits = stream.leave(waves, [(rows, positions) for rows, positions, _ in places])
        for wave, (_, _, which), of_wave in zip(waves, places, logits, strict=True):
            job, batch = wave.batch.begun, wave.batch.batch
            job.layer_tokens += wave.layer_tokens
            job.left -= 1
            for members, some in of_wave:
                job.sums.add(members, batch, logprobs_of(some, batch, which, job.wanted.columns))
