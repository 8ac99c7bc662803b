"""Gradient scores of a model whose weights lie in files: forwards block by block, then backwards, each block again.

A plain gradient pass keeps the graph of all layers, and with it all weights. Here the forward pass keeps only what each
block was given. Backwards, block after block is read once more, run once more with gradients, and handed the gradient
of what it put out; it gives the gradients of its heads and its FFN, and that of what it was given, for the block before
it (gradient checkpointing, Chen et al. 2016, https://arxiv.org/abs/1604.06174). So weights are read twice a pass, and
the scores are those of the plain pass: every block is called with the same tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from more_itertools import peekable
from torch import Tensor

from headcount.engine.blocks import first, logits_of_vectors
from headcount.engine.gradients import Scores, gradients_of, layer_scores, loss_of, real_positions
from headcount.engine.pack import Batch
from headcount.engine.step import is_mutable
from headcount.engine.stream import Stream, Waiting, Wave, away, fitting
from headcount.engine.treemask import model_inputs
from headcount.errors import ModelError
from headcount.masks import Mask
from headcount.model.anatomy import Anatomy
from headcount.model.devices import on_device
from headcount.model.held import one_by_one
from headcount.model.hooks import captured
from headcount.model.load import LoadedModel
from headcount.model.norms import LayerNorms

Given = list[Tensor]


def streamed_scores(loaded: LoadedModel, stream: Stream, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Scores]]:
    """Batches with the two scores of every row, in the order given, in passes; parameters should be frozen.

    Args:
        loaded: The model.
        stream: Its streamed schedule.
        batches: Of single rows, each an example; asked for when a pass has room for more.

    Raises:
        ModelError: If a block is cut off from gradients, or blocks hand keys and values to later ones.
    """
    inputs, full = functools.partial(model_inputs, loaded), [Mask.full(loaded.anatomy.heads_per_layer)]
    waiting = peekable(Waiting(batch, inputs, full, len(stream.blocks) + 1) for batch in batches)
    _ = loaded.norms  # found in a pass of its own, which is not to fall between two blocks
    while waiting:
        for wave, one in _one_pass(loaded, stream, waiting):
            heads, ffns = zip(*one[::-1], strict=True)
            yield wave.batch, (torch.cat(heads, -1), torch.cat(ffns, -1))


def _one_pass(
    loaded: LoadedModel, stream: Stream, waiting: peekable[Waiting[Batch]]
) -> list[tuple[Wave[Batch], list[Scores]]]:
    """As many batches as memory lets wait, each with its scores in the layers, the last layer first."""
    with torch.no_grad():
        waves = stream.enter(waiting)
    with fitting(waves):
        given = _forwards(loaded, stream, waves)
        gradients = _of_the_last(loaded, stream, waves, given)
        scores: list[list[Scores]] = [[] for _ in waves]
        for back in one_by_one([block.part.block for block in reversed(stream.blocks)]):
            layer = len(stream.blocks) - 1 - back
            for i, wave in enumerate(waves):
                of_layer, gradients[i] = _backwards(loaded, stream, layer, wave, given[i], gradients[i])
                scores[i].append(of_layer)
    return list(zip(waves, scores, strict=True))


@torch.no_grad()
def _forwards(loaded: LoadedModel, stream: Stream, waves: Sequence[Wave[Batch]]) -> list[Given]:
    """Of each batch the hidden states that each block was given, the last block's output at the end."""
    blocks = stream.blocks
    for call in (call for wave in waves for call in wave.calls):
        if any(map(is_mutable, (*call.args, *call.kwargs.values()))):
            raise ModelError(f"blocks of {loaded.name} hand keys and values to later ones, so that gradients cannot be "
                             "taken block by block: load it into memory with `device='cpu'`", fields=("device='cpu'",))
    given: list[Given] = [[wave.nodes.pop()[1].hidden] for wave in waves]
    for i in one_by_one([block.part.block for block in blocks]):
        for wave, states in zip(waves, given, strict=True):
            call = stream.here(wave.calls[i])
            states.append(away(first(blocks[i].part.block(stream.here(states[i]).clone(), *call.args, **call.kwargs))))
    return given


def _of_the_last(
    loaded: LoadedModel, stream: Stream, waves: Sequence[Wave[Batch]], given: Sequence[Given]
) -> list[Tensor]:
    """Of each batch, the loss's gradient by what the last block put out."""
    output: Any = loaded.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = []
    with stream.at_hand(output), torch.enable_grad():
        for wave, states in zip(waves, given, strict=True):
            last = stream.here(states.pop()).requires_grad_()
            rows, positions = (on_device(x, last.device) for x in (wave.batch.rows, wave.batch.positions))
            logits = logits_of_vectors(loaded.model, stream.blocks, last[rows, positions])
            (gradient,) = torch.autograd.grad(loss_of(logits, wave.batch), last)
            found.append(away(gradient))
    return found


def _backwards(
    loaded: LoadedModel, stream: Stream, layer: int, wave: Wave[Batch], states: Given, gradient: Tensor
) -> tuple[Scores, Tensor]:
    """One block's scores, and the loss's gradient by what the block was given."""
    part, norms = loaded.anatomy.layers[layer], loaded.norms.get(layer, LayerNorms())
    given, call = stream.here(states.pop()).requires_grad_(), stream.here(wave.calls[layer])
    catching = captured(Anatomy((part,), 0), gradients=True, norms={0: norms})
    with torch.enable_grad(), catching as caught:
        put_out = first(part.block(given.clone(), *call.args, **call.kwargs))
        heads = caught.attention.get(0, caught.heads[0])
        longest = int(wave.batch.lengths.max())
        *own, before = gradients_of(put_out, [heads, caught.ffns[0], given], longest, stream.here(gradient), layer)
    return layer_scores(loaded, layer, caught, 0, (own[0], own[1]), real_positions(wave.batch)), away(before)
