"""Batches through the unmodified model: log-likelihoods of targets, and nothing computed that is not needed.

The model's output layer is given the hidden states of scored positions only: a hook gathers them before it, and
whatever the model does to logits afterwards (caps, scales) applies to them as they come out. So a log-likelihood is
`log softmax(logits at the position before)[target]`, summed over a continuation's tokens.

Nothing here remembers anything of a model: what is found out about one is its `Engine`'s (`headcount.engine.engine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Float, Int
from torch import Tensor

from headcount.engine.pack import Batch, halves
from headcount.engine.treemask import TreeMask, model_inputs
from headcount.errors import ModelError
from headcount.model.devices import on_device
from headcount.model.hooks import scored_only
from headcount.model.load import LoadedModel

T = TypeVar("T")
Progress = Callable[[int], None]
# Log-probability of every target of a batch, and 1 where it is the most probable token.
Targets: TypeAlias = tuple[Float[Tensor, " target"], Int[Tensor, " target"]]
# Logits that are exponentiated at once; on a CPU, what its caches hold.
_EXPONENTIATED = {"cpu": 2**20}


class Told:
    """Tells progress in tokens of the batches as they were planned; what was told is never taken back.

    A batch that memory is too small for is done again in halves, which take over its share: what was told of it before
    is not told again. So the sum is that of the planned batches, times the masks.

    Args:
        progress: Called with so many more tokens.
        num_masks: Under how many masks each batch runs.
    """

    def __init__(self, progress: Progress | None = None, num_masks: int = 1) -> None:
        self._progress = progress
        self._num_masks = num_masks
        self._before = self._share = self._sum = 0

    def begin(self, share: int) -> None:
        """A batch begins that stands for so many of the planned tokens."""
        self._share = share

    def done_for(self, num_masks: int) -> None:
        """So many masks of the batch that began are done."""
        reached = self._before + self._share * num_masks
        if self._progress is not None and reached > self._sum:
            self._progress(reached - self._sum)
        self._sum = max(self._sum, reached)

    def end(self) -> None:
        """The batch that began is done for good."""
        self.done_for(self._num_masks)
        self._before += self._share * self._num_masks


@torch.no_grad()
def plain_loglikelihoods(
    loaded: LoadedModel, packed: Sequence[Batch], num_requests: int, *, tree_mask: TreeMask = "plain",
    columns: int | None = None, progress: Progress | None = None,
) -> tuple[Float[np.ndarray, " request"], Int[np.ndarray, " request"]]:
    """Log-likelihood (nats) of every request in one plain pass, and 1 where greedy decoding would continue so.

    Args:
        loaded: The model; gates that are open on it count.
        packed: The batches.
        num_requests: How many requests they hold.
        tree_mask: How the model takes the mask of a tree.
        columns: The first so many logits are normalised over, and searched for the most probable; None takes all.
        progress: Called with the number of tokens after each batch.
    """
    sums = Sums(1, num_requests)
    for batch, targets in in_memory(
        packed, lambda batch: target_logprobs(loaded, batch, tree_mask, columns), Told(progress)
    ):
        sums.add([0], batch, targets)
    values, greedy = sums.totals()
    return values[0], greedy[0]


def in_memory(
    packed: Sequence[Batch], work: Callable[[Batch], T], told: Told | None = None
) -> Iterator[tuple[Batch, T]]:
    """Every batch with what work makes of it; those that memory is too small for are halved, and later ones too.

    A single row, whose requests share a beginning, is halved only when it did not go.

    Args:
        packed: The batches.
        work: What is done with each.
        told: Told of progress; work may tell it of masks that are done before the batch is.

    Raises:
        ModelError: If a single request is too large.
    """
    told = told or Told()
    # Each with the planned tokens that it stands for.
    waiting, limit = [(batch, batch.tokens) for batch in packed][::-1], math.inf
    while waiting:
        batch, share = waiting.pop()
        if batch.tokens > limit and len(batch.lengths) > 1:
            waiting += _shared_out(halves(batch), share)[::-1]
            continue
        told.begin(share)
        try:
            done = work(batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            parts = halves(batch)
            if len(parts) == 1:
                raise ModelError(f"memory is too small for one prompt of {batch.tokens} tokens; take fewer shots, "
                                 f"or another device ({error})") from error
            limit = batch.tokens // 2
            waiting += _shared_out(parts, share)[::-1]
            continue
        told.end()
        yield batch, done


def _shared_out(parts: Sequence[Batch], share: int) -> list[tuple[Batch, int]]:
    """Parts of a batch, each with its part of the planned tokens that the batch stands for."""
    ends = np.cumsum([part.tokens for part in parts])
    shares = np.diff(ends * share // ends[-1], prepend=0)
    return [(part, int(own)) for part, own in zip(parts, shares, strict=True)]


class Sums:
    """Log-likelihoods of requests under masks, added up from targets'; kept where they are computed until the end."""

    def __init__(self, num_masks: int, num_requests: int) -> None:
        self.shape = (num_masks, num_requests)
        self.parts: list[tuple[list[int], Batch, Targets]] = []

    def add(self, masks: list[int], batch: Batch, targets: Targets) -> None:
        """Take in the targets of a batch, which are the same under these masks (by index)."""
        self.parts.append((masks, batch, targets))

    def totals(self) -> tuple[Float[np.ndarray, "mask request"], Int[np.ndarray, "mask request"]]:
        """Log-likelihoods in nats, and 1 where every target is the most probable token."""
        total, greedy = np.zeros(self.shape), np.ones(self.shape, np.int64)
        if not self.parts:
            return total, greedy
        # Each copy to the host waits for the device: one for all.
        logprobs, best = (torch.cat(of).cpu() for of in zip(*(targets for *_, targets in self.parts), strict=True))
        ends = np.cumsum([len(batch.targets) for _, batch, _ in self.parts])[:-1]
        for (masks, batch, _), values, hits in zip(
            self.parts, np.split(logprobs.double().numpy(), ends), np.split(best.numpy(), ends), strict=True
        ):
            for i in masks:
                np.add.at(total[i], batch.requests, values)
                np.minimum.at(greedy[i], batch.requests, hits)
        greedy[np.isnan(total)] = 0  # the largest of logits that are no numbers is any
        return total, greedy


def columns_of(loaded: LoadedModel) -> int:
    """How many of the logits belong to a token of the tokenizer, those of the first ids (OPT: 50,265 of 50,272).

    The paper's code evaluates by these alone. `len(tokenizer)` is less where a tokenizer skips ids.
    """
    return max(len(loaded.tokenizer), 1 + max(loaded.tokenizer.get_vocab().values(), default=0))


def target_logprobs(
    loaded: LoadedModel, batch: Batch, tree_mask: TreeMask = "plain", columns: int | None = None
) -> Targets:
    """Log-probability of every target of a batch, and 1 where it is the most probable token."""
    rows, positions, which = places_of(batch, loaded.device)
    with scored_only(loaded.model, rows, positions):
        logits = loaded.model(**model_inputs(loaded, batch, tree_mask), use_cache=False).logits[0]
    return logprobs_of(logits, batch, which, columns)


def places_of(
    batch: Batch, device: torch.device
) -> tuple[Int[Tensor, " place"], Int[Tensor, " place"], Int[np.ndarray, " target"]]:
    """Rows and positions whose logits are wanted, and each target's among them: one-token options share one."""
    places, which = np.unique(np.stack([batch.rows, batch.positions]), axis=1, return_inverse=True)
    rows, positions = (on_device(p, device) for p in places)
    return rows, positions, which.reshape(-1)


def logprobs_of(
    logits: Float[Tensor, "place vocabulary"], batch: Batch, which: Int[np.ndarray, " target"],
    columns: int | None = None,
) -> Targets:
    """Log-probability of every target of a batch, and 1 where it is the most probable token, from logits of places."""
    logits = logits[:, :columns]
    targets, index = on_device(batch.targets, logits.device), on_device(which, logits.device)
    # A few places at a time: all of them in float32, and exponentiated, would take twice the logits' memory.
    parts = torch.split(logits, max(1, _EXPONENTIATED.get(logits.device.type, 2**26) // logits.shape[1]))
    normaliser = torch.cat([part.float().logsumexp(-1) for part in parts])
    best = torch.cat([part.argmax(-1) for part in parts])
    return logits[index, targets].float() - normaliser[index], (best[index] == targets).long()
