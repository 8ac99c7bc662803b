"""Norms on what a branch puts out, before it is added to the residual stream (Gemma-2 and -3, OLMo-2, GLM-4, ...).

They are found by comparing tensors in a pass of a few tokens, not by their names: a child of the block that reads what
attention's output projection, or the FFN, has just written. A norm that follows the residual add (OPT-350M) reads
something else. What is kept of a model is which modules these are; what they do is asked when it is needed, since
weights may change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from headcount.model.anatomy import Anatomy, LayerAnatomy
from headcount.model.attention import embedded_tokens
from headcount.model.devices import device_of
from headcount.model.offloaded import present


@dataclass(frozen=True)
class LayerNorms:
    """A layer's norms on the output of attention and of the FFN; None where there is none."""

    attention: nn.Module | None = None
    ffn: nn.Module | None = None


def find_norms(model: PreTrainedModel, anatomy: Anatomy) -> dict[int, LayerNorms]:
    """Norms on branches' output, by layer, for layers that have any; one pass of three tokens tells.

    NaN equals nothing: where the first tokens give no numbers, the first whose embeddings are numbers are taken.
    """
    first = np.arange(3)
    found, numbers = _found(model, anatomy, first)
    if not numbers and not np.array_equal(known := embedded_tokens(model)[:3], first) and len(known):
        found, _ = _found(model, anatomy, known)
    return found


def _found(
    model: PreTrainedModel, anatomy: Anatomy, tokens: Int[np.ndarray, " pos"]
) -> tuple[dict[int, LayerNorms], bool]:
    """The norms, and whether the pass of these tokens gave numbers."""
    by_layer: list[tuple[list[nn.Module], list[nn.Module]]] = [([], []) for _ in anatomy.layers]
    with contextlib.ExitStack() as hooks:
        for part, (attention, ffn) in zip(anatomy.layers, by_layer, strict=True):
            for handle in (*_watch(part, part.out_proj, attention), *_watch(part, part.ffn_output, ffn)):
                hooks.callback(handle.remove)
        ids = torch.from_numpy(tokens)[None].to(device_of(model))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    layers = [LayerNorms(*(next(iter(norm), None) for norm in layer)) for layer in by_layer]
    numbers = not bool(torch.isnan(logits).any())
    return {i: layer for i, layer in enumerate(layers) if layer != LayerNorms()}, numbers


def _watch(
    part: LayerAnatomy, writer: nn.Module, norms: list[nn.Module]
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Put that one of the block's norms into the list that reads exactly what a module of the block has written."""
    written: list[Tensor] = []

    def wrote(module: nn.Module, args: Any, output: Any) -> None:
        # A copy: some blocks add the residual in place.
        written[:] = [(output[0] if isinstance(output, tuple) else output).detach().clone()]

    def normed(module: nn.Module, args: Any) -> None:
        same = written and args and written[0].numel() == args[0].numel()
        if same and torch.equal(written[0], args[0].reshape(written[0].shape)):
            norms[:] = [module]

    yield writer.register_forward_hook(wrote)
    for child in part.block.children():
        own = list(child.parameters(recurse=False))
        if child is not part.attention and child is not writer and own and all(p.dim() == 1 for p in own):
            yield child.register_forward_pre_hook(normed)


@torch.no_grad()
def norm_of_nothing(norm: nn.Module) -> Float[Tensor, " d_model"]:
    """What a norm makes of zeros, in float32: what the removal of its branch leaves."""
    written: Tensor = norm(zeros(norm)[None, None])
    return written.reshape(-1).float()


def zeros(norm: nn.Module) -> Float[Tensor, " d_model"]:
    """Of the size, type and device that the norm works with."""
    with present(norm):
        return torch.zeros_like(next(norm.parameters()).detach())
