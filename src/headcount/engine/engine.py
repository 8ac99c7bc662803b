"""Batches through the unmodified model: log-likelihoods of targets, and nothing computed that is not needed.

The model's output layer is given the hidden states of scored positions only: a hook gathers them before it, and
whatever the model does to logits afterwards (caps, scales) applies to them as they come out. So a log-likelihood is
`log softmax(logits at the position before)[target]`, summed over a continuation's tokens.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Float, Int
from torch import Tensor

from headcount.engine.pack import Batch, halves
from headcount.engine.proof import verify_sweep
from headcount.engine.sweep import Sweep
from headcount.engine.treemask import TreeMask, model_inputs
from headcount.errors import ModelError
from headcount.masks import Mask
from headcount.model.contracts import ContractResult
from headcount.model.devices import on_device
from headcount.model.hooks import ablated
from headcount.model.load import LoadedModel

T = TypeVar("T")
Progress = Callable[[int], None]
# Log-probability of every target of a batch, and 1 where it is the most probable token.
Targets: TypeAlias = tuple[Float[Tensor, " target"], Int[Tensor, " target"]]
# Logits that are exponentiated at once; on a CPU, what its caches hold.
_EXPONENTIATED = {"cpu": 2**20}


class Likelihoods(NamedTuple):
    """Log-likelihoods (nats) and greedy matches of requests under masks, and the positions that layers computed."""

    loglikelihoods: Float[np.ndarray, "mask request"]
    greedy: Int[np.ndarray, "mask request"]
    layer_tokens: int


_proved: weakref.WeakKeyDictionary[LoadedModel, ContractResult] = weakref.WeakKeyDictionary()
_sweeps: weakref.WeakKeyDictionary[LoadedModel, Sweep] = weakref.WeakKeyDictionary()


def sweep_contract(loaded: LoadedModel) -> ContractResult:
    """Contract 3, tested once per loaded model: whether it can be run layer by layer."""
    if loaded not in _proved:
        _proved[loaded] = verify_sweep(loaded.model, loaded.anatomy)
    return _proved[loaded]


@torch.no_grad()
def loglikelihood(
    loaded: LoadedModel, packed: Sequence[Batch], num_requests: int, progress: Progress | None = None,
    tree_mask: TreeMask = "plain", columns: int | None = None,
) -> tuple[Float[np.ndarray, " request"], Int[np.ndarray, " request"]]:
    """Log-likelihood (nats) of every request, and 1 where greedy decoding would give its continuation.

    Args:
        loaded: The model.
        packed: The batches.
        num_requests: How many requests they hold.
        progress: Called with the number of tokens after each batch.
        tree_mask: How the model takes the mask of a tree.
        columns: The first so many logits are normalised over, and searched for the most probable; None takes all.
    """
    sums = _Sums(1, num_requests)
    for batch, targets in in_memory(packed, lambda batch: target_logprobs(loaded, batch, tree_mask, columns)):
        sums.add([0], batch, targets)
        if progress is not None:
            progress(batch.tokens)
    found, greedy = sums.found()
    return found[0], greedy[0]


@torch.no_grad()
def masked_loglikelihoods(
    loaded: LoadedModel, packed: Sequence[Batch], num_requests: int, masks: Sequence[Mask],
    progress: Progress | None = None, tree_mask: TreeMask = "plain", columns: int | None = None,
) -> Likelihoods:
    """Log-likelihoods of every request under every mask: by layer sweep where the model allows it.

    The arguments are those of `loglikelihood`.
    """
    if len(masks) == 1 or not sweep_contract(loaded).holds:
        found = []
        for mask in masks:
            with ablated(loaded.anatomy, mask):
                found.append(loglikelihood(loaded, packed, num_requests, progress, tree_mask, columns))
        layer_tokens = loaded.anatomy.num_layers * len(masks) * sum(b.tokens for b in packed)
        return Likelihoods(np.stack([x for x, _ in found]), np.stack([g for _, g in found]), layer_tokens)
    # Kept with what it learns of the model's outputs in a pass of its own.
    sweep = _sweeps.setdefault(loaded, Sweep(loaded.model, loaded.anatomy))
    counted = sweep.layer_tokens
    sums = _Sums(len(masks), num_requests)

    def swept(batch: Batch) -> list[tuple[list[int], Targets]]:
        before, found = sweep.layer_tokens, []
        tell = progress or (lambda tokens: None)
        rows, positions, which = _places(batch, loaded.device)
        try:
            for members, logits in sweep.logits(model_inputs(loaded, batch, tree_mask), masks, rows, positions):
                found.append((members, _of_targets(logits, batch, which, columns)))
                tell(batch.tokens * len(members))
        except RuntimeError:  # it will be done again, in halves
            sweep.layer_tokens = before
            tell(-batch.tokens * sum(len(members) for members, _ in found))
            raise
        return found

    for batch, parts in in_memory(packed, swept):
        for members, targets in parts:
            sums.add(members, batch, targets)
    return Likelihoods(*sums.found(), sweep.layer_tokens - counted)


def in_memory(packed: Sequence[Batch], work: Callable[[Batch], T]) -> Iterator[tuple[Batch, T]]:
    """Every batch with what work makes of it; those that memory is too small for are halved, and later ones too.

    A single row, whose requests share a beginning, is halved only when it did not go.

    Raises:
        ModelError: If a single request is too large.
    """
    waiting, limit = list(packed)[::-1], math.inf
    while waiting:
        batch = waiting.pop()
        if batch.tokens > limit and len(batch.lengths) > 1:
            waiting += halves(batch)[::-1]
            continue
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
            waiting += parts[::-1]
            continue
        yield batch, done


class _Sums:
    """Log-likelihoods of requests under masks, added up from targets'; kept where they are computed until the end."""

    def __init__(self, num_masks: int, num_requests: int) -> None:
        self.shape = (num_masks, num_requests)
        self.parts: list[tuple[list[int], Batch, Targets]] = []

    def add(self, masks: list[int], batch: Batch, targets: Targets) -> None:
        self.parts.append((masks, batch, targets))

    def found(self) -> tuple[Float[np.ndarray, "mask request"], Int[np.ndarray, "mask request"]]:
        total, greedy = np.zeros(self.shape), np.ones(self.shape, np.int64)
        for masks, batch, (logprobs, best) in self.parts:
            values, hits = logprobs.cpu().double().numpy(), best.cpu().numpy()
            for i in masks:
                np.add.at(total[i], batch.requests, values)
                np.minimum.at(greedy[i], batch.requests, hits)
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
    rows, positions, which = _places(batch, loaded.device)
    with scored_only(loaded, rows, positions):
        logits = loaded.model(**model_inputs(loaded, batch, tree_mask), use_cache=False).logits[0]
    return _of_targets(logits, batch, which, columns)


def _places(
    batch: Batch, device: torch.device
) -> tuple[Int[Tensor, " place"], Int[Tensor, " place"], Int[np.ndarray, " target"]]:
    """Rows and positions whose logits are wanted, and each target's among them: one-token options share one."""
    places, which = np.unique(np.stack([batch.rows, batch.positions]), axis=1, return_inverse=True)
    rows, positions = (on_device(p, device) for p in places)
    return rows, positions, which.reshape(-1)


def _of_targets(
    logits: Float[Tensor, "place vocabulary"], batch: Batch, which: Int[np.ndarray, " target"],
    columns: int | None = None,
) -> Targets:
    logits = logits[:, :columns]
    targets, index = on_device(batch.targets, logits.device), on_device(which, logits.device)
    # A few places at a time: all of them in float32, and exponentiated, would take twice the logits' memory.
    parts = torch.split(logits, max(1, _EXPONENTIATED.get(logits.device.type, 2**26) // logits.shape[1]))
    normaliser = torch.cat([part.float().logsumexp(-1) for part in parts])
    best = torch.cat([part.argmax(-1) for part in parts])
    return logits[index, targets].float() - normaliser[index], (best[index] == targets).long()


@contextlib.contextmanager
def scored_only(
    loaded: LoadedModel, rows: Int[Tensor, " scored"], positions: Int[Tensor, " scored"]
) -> Iterator[None]:
    """Give the output layer the scored positions' hidden states only, as one row."""

    def gather(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), positions.to(hidden.device)][None], *args[1:])

    output_layer: torch.nn.Module = loaded.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    handle = output_layer.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
