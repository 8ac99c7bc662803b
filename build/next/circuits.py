"""What a head reads and writes, as matrices, measured on the modules instead of read from their weights.

With e_i the unit vectors, an affine map f is `f(e_i) - f(0)`, row by row, whatever its module is called and however its
weight is stored (GPT-2's is transposed, quantised ones are packed). Where a norm stands in the way, half the difference
`f(e_i) - f(-e_i)` is its gain times e_i (less the mean, for a LayerNorm), its bias gone, all rows to one common scale,
because all e_i have the same length. Three maps make a head's circuit (Elhage et al. 2021, "A Mathematical Framework
for Transformer Circuits"):

    values    residual stream -> the value that a position has for each head, through the norm before attention
    writes    the input of the output projection -> what the block adds to the residual stream for it
    reads     residual stream -> what the output layer is given, through the final norm

A norm's scale is positive and common to all that it is given at a position, so it cancels wherever a head's logits are
compared with one another; what is returned leaves it out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from headcount.errors import ModelError
from headcount.model.gates import layer_ablated
from headcount.model.load import LoadedModel
from headcount.model.sweep import Sweep, first_of

# Unit vectors that pass together, and how long they are: an epsilon in a norm must not matter.
_CHUNK = 128
_LENGTH = 100.0
# Two ways to the same vector must agree in direction.
_COSINE = 0.999


@torch.no_grad()
def writes(loaded: LoadedModel) -> list[Float[Tensor, "features d_model"]]:
    """Per layer, what each input of the output projection adds to the residual stream, up to a positive factor.

    The projection's bias is left out; a norm on the branch's output is in.
    """
    parts = loaded.anatomy.layers
    after = _odd(lambda rows: _block_outputs(loaded, rows), parts[0].d_model, loaded)
    return [_affine(part.out_proj, part.num_heads * part.d_head, loaded) @ matrix
            for part, matrix in zip(parts, after, strict=True)]


@torch.no_grad()
def reads(loaded: LoadedModel) -> Float[Tensor, "d_model d_read"]:
    """How the end of the model hands the residual stream to the output layer, up to a positive factor."""
    sweep = Sweep(loaded.model, loaded.anatomy)
    (matrix,) = _odd(lambda rows: [sweep.read_out(rows)], loaded.anatomy.layers[-1].d_model, loaded)
    return matrix


@torch.no_grad()
def values(loaded: LoadedModel) -> list[Float[Tensor, "d_model features"]]:
    """Per layer, the value of every head from the residual stream before the block, up to a positive factor.

    A position that sees itself alone puts out its own value.

    Raises:
        ModelError: If values are not linear in what is read: where attention has a gate, a sink, a norm of values.
    """
    return _odd(lambda rows: own_values(loaded, rows[:, None]), loaded.anatomy.layers[0].d_model, loaded)


def own_values(
    loaded: LoadedModel, hidden: Float[Tensor, "vector one d_model"]
) -> list[Float[Tensor, "vector features"]]:
    """Per layer, the value of every head at positions that see nothing but themselves; all blocks are given the same.

    It is in the form of the output projection's input: every head's slice one after another.
    """
    caught: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        for part in loaded.anatomy.layers:
            def catch(module: nn.Module, args: Any) -> None:
                caught.append(args[0].reshape(len(hidden), -1))

            hooks.callback(part.out_proj.register_forward_pre_hook(catch).remove)
        each_block(loaded, hidden)
    return caught


def _affine(module: nn.Module, inputs: int, loaded: LoadedModel) -> Float[Tensor, "inputs outputs"]:
    eye = torch.eye(inputs, device=loaded.device, dtype=loaded.model.dtype)
    return torch.cat([(first_of(module(rows[None])) - first_of(module(torch.zeros_like(rows)[None])))[0].float()
                      for rows in torch.split(eye, _CHUNK)])


def _odd(
    f: Callable[[Tensor], list[Tensor]], inputs: int, loaded: LoadedModel
) -> list[Float[Tensor, "inputs outputs"]]:
    """The odd part of each of f's results on unit vectors, as matrices; f treats the rows it is given each alike.

    Raises:
        ModelError: If another vector does not go where a matrix sends it.
    """
    def odd(rows: Tensor) -> list[Tensor]:
        return [(a - b).float() / 2 for a, b in zip(f(rows), f(-rows), strict=True)]

    eye = _LENGTH * torch.eye(inputs, device=loaded.device, dtype=loaded.model.dtype)
    chunks = [odd(rows) for rows in torch.split(eye, _CHUNK)]
    matrices = [torch.cat(parts) / _LENGTH for parts in zip(*chunks, strict=True)]
    probe = _LENGTH * torch.randn(4, inputs, generator=torch.Generator().manual_seed(0)).to(eye)
    for found, matrix in zip(odd(probe), matrices, strict=True):
        expected = probe.float().to(matrix.device) @ matrix
        if float(nn.functional.cosine_similarity(found, expected, dim=-1).min()) < _COSINE:
            raise ModelError(f"{loaded.name} does more between its heads and the residual stream than norm and project")
    return matrices


def _block_outputs(loaded: LoadedModel, rows: Float[Tensor, "vector d_model"]) -> list[Tensor]:
    """What each block adds where its output projection puts out the rows; residual stream and FFN are 0."""
    with contextlib.ExitStack() as hooks:
        for part in loaded.anatomy.layers:
            def project(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                return rows.to(output).reshape(output.shape)

            hooks.callback(part.out_proj.register_forward_hook(project).remove)
            hooks.enter_context(layer_ablated(part, np.ones(part.num_heads, bool), ffn=False))
        return [out[0] for out in each_block(loaded, torch.zeros_like(rows)[None])]


def each_block(
    loaded: LoadedModel, hidden: Float[Tensor, "batch pos d_model"]
) -> list[Float[Tensor, "batch pos d_model"]]:
    """What every block makes of the same hidden states, instead of what the block before it hands on."""
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=loaded.device)
    found: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        own = hidden.to(given).reshape(given.shape)
        return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": own})

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        found.append(first_of(output).reshape(hidden.shape))
        if len(found) == loaded.anatomy.num_layers:
            raise _Done

    with contextlib.ExitStack() as hooks:
        for part in loaded.anatomy.layers:
            hooks.callback(part.block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(part.block.register_forward_hook(leave).remove)
        with contextlib.suppress(_Done):
            loaded.model(input_ids=ids, use_cache=False)
    return found


class _Done(Exception):  # noqa: N818
    """Ends a pass after the last block."""
