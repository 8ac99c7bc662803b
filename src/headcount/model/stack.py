"""Branches of a sweep in one batch: small batches, many masks, and one call of a block for all of them.

Each branch is so many rows of the batch; heads are gated row by row at the output projection's input, which is computed
once for branches that differ in this layer only. What a block is given beside the hidden state is repeated where it has
a row for each row of the batch: recognised by its first dimension, and left alone where that could be something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headcount.model.anatomy import LayerAnatomy

Call = tuple[tuple[Any, ...], dict[str, Any]]
_PLAIN = (bool, int, float, str, torch.dtype, torch.device)


def can_stack(part: LayerAnatomy, hidden: Tensor, call: Call) -> bool:
    """Whether a block's arguments tell which of them have a row for each row of the batch."""
    if hidden.dim() != 3 or len(hidden) in (hidden.shape[1], part.num_heads, part.num_kv_heads):
        return False
    return all(_is_known(value) for value in (*call[0], *call[1].values()))


def _is_known(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_known, value))
    return value is None or isinstance(value, (Tensor, *_PLAIN))


def tiled(call: Call, times: int, rows: int) -> Call:
    """A block's arguments for so many branches of so many rows each."""
    def tile(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(tile, value))
        if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != rows:
            return value
        if rows == 1:
            return value.expand(times, *value.shape[1:])
        return value.repeat(times, *[1] * (value.dim() - 1))

    args, kwargs = call
    return tuple(map(tile, args)), {name: tile(value) for name, value in kwargs.items()}


def projection_inputs(
    part: LayerAnatomy, hidden: Sequence[Float[Tensor, "batch pos d_model"]], call: Call
) -> list[Float[Tensor, "batch pos features"]]:
    """What the attention's output projection is given, for every branch; nothing after it is computed."""
    if not hidden:
        return []
    caught: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        raise _Enough

    handle = part.out_proj.register_forward_pre_hook(stop)
    rows, length = hidden[0].shape[:2]
    args, kwargs = tiled(call, len(hidden), rows)
    try:
        part.block(torch.cat(list(hidden)), *args, **kwargs)
    except _Enough:
        pass
    finally:
        handle.remove()
    return list(torch.split(caught[0].reshape(len(hidden) * rows, length, -1), rows))


def gated(z: Float[Tensor, "batch pos features"], heads: Bool[np.ndarray, " head"]) -> Float[Tensor, "*_"]:
    """The projection's input without the heads that are false."""
    if heads.all():
        return z
    removed = torch.from_numpy(np.repeat(~heads, z.shape[-1] // len(heads)))
    return z.masked_fill(removed.to(z.device), 0)


def instead(output: Any) -> Callable[..., Any]:
    """A `forward` that puts out what is computed already."""
    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    return forward


class _Enough(Exception):  # noqa: N818
    """Ends a block at its output projection."""
