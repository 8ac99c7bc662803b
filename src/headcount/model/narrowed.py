"""Modules of a transformers model made smaller, as its config says: what is left when heads and FFNs are removed.

A model is first built by its family's own class, at full size, and then narrowed before it gets weights: on the meta
device, in any type, under any device map. `config.headcount["layers"]` says, layer by layer and by paths in the block,

    shapes     the shape of every parameter that is smaller; null where it is gone
    numbers    numbers that modules carry, such as how many heads they have
    config     numbers that the attention reads off the model's config
    kv_of_head which KV group each query head reads, where groups have unlike numbers of heads, or had once
    columns    of a norm over all heads, which columns of its output belong to heads that are kept
    split      width of a head, where a fused projection is not taken apart by its family's rule (Falcon)
    identity   norms that fed nothing but the removed FFN
    gone       projections of the removed FFN: their numbers of inputs and outputs
    constant   attention without a head, or an FFN, that is gone as a whole

This file's text goes along with a removed checkpoint, so that transformers can load it without headcount; headcount
itself uses it from here. It needs torch and transformers alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "headcount_"


class LayerConfig:
    """The model's config, as one layer's attention reads it: with its own numbers of heads.

    Args:
        config: The model's; what is set there later, such as the kernel, is seen here.
        numbers: What differs in this layer.
        gathers: Whether query heads share keys and values unevenly: attention goes by `gathering`, then.
    """

    def __init__(self, config: PreTrainedConfig, numbers: Mapping[str, int], gathers: bool) -> None:
        self._config, self._numbers, self._gathers = config, dict(numbers), gathers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_numbers" not in self.__dict__:
            raise AttributeError(name)
        return self._numbers[name] if name in self._numbers else getattr(self._config, name)

    @property
    def _attn_implementation(self) -> Any:
        kernel = self._config._attn_implementation
        return gathering(kernel) if self._gathers and kernel is not None else kernel


def gathering(kernel: str) -> str:
    """The name of an attention function, registered with transformers, that gives each query head its KV group.

    Args:
        kernel: The function that then computes attention, with one query head per key.
    """
    name = PREFIX + kernel
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(_gather, kernel))
    return name


def _gather(
    kernel: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    family = vars(sys.modules[type(module).__module__])
    function = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, family["eager_attention_forward"])
    index = module.kv_of_head
    return function(module, query, key[:, index], value[:, index], attention_mask, **kwargs)


class Gone(nn.Linear):
    """A projection of which nothing but the bias is left: it puts that out, or zeros, whatever comes in.

    Its weight is no parameter, and decides nothing. It is one column or row of ones, so that the family's own class
    meets a size that it does not expect, and tools that divide by the norm of weights do not divide by zero.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        ones = torch.ones_like(self.weight.detach())
        del self.weight
        self.register_buffer("weight", ones)

    def forward(self, hidden: Tensor) -> Tensor:
        """The same at every position."""
        zeros = hidden.new_zeros(*hidden.shape[:-1], self.out_features)
        return zeros if self.bias is None else zeros + self.bias.to(hidden.dtype)


class Constant(nn.Module):
    """Stands where attention without heads, or a whole FFN, was: puts out its projection's bias, or nothing.

    Keys and values of width one keep the length of the cache, which generation reads off any layer.

    Args:
        projection: What the projection is called that put out the part's output.
        width: Of the residual stream.
        bias: Whether the projection has one.
        outputs: How many values the part hands back; all but the first are None. 0: the output by itself.
        layer: The layer's number, of attention; None of an FFN.
        guard: Path of a parameter that the part had: an empty one of this name keeps the family's own class, which
            would fill in random weights for what it misses, from loading the checkpoint. Empty: none.
    """

    def __init__(
        self, projection: str, width: int, bias: bool, outputs: int, layer: int | None, guard: str = ""
    ) -> None:
        super().__init__()
        *path, last = guard.split(".")
        if last:
            holder: nn.Module = self
            for name in path:
                holder.add_module(name, nn.Module())
                holder = holder.get_submodule(name)
            holder.register_parameter(last, nn.Parameter(torch.zeros(0)))
        self.outputs, self.layer_idx, self.projection = outputs, layer, projection
        self.add_module(projection, Gone(1, width, bias))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The constant, at every position."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if self.layer_idx is not None:
            for value in (*args[1:], *kwargs.values()):
                if isinstance(value, Cache):
                    nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
                    value.update(nothing, nothing, self.layer_idx)
        projection = self.get_submodule(self.projection)
        # What an adapter or a quantiser put in its place multiplies what it is given.
        nothing = hidden[..., :0] if type(projection) is Gone else torch.zeros_like(hidden[..., :1])
        output = projection(nothing)
        return (output, *[None] * (self.outputs - 1)) if self.outputs else output


class Columns(nn.Module):
    """A norm over all heads, of whose output the columns of removed heads are dropped.

    Args:
        norm: The norm; it reads all heads, since its scale depends on them.
        runs: Of each stretch that is kept the first column, and the one behind the last.
    """

    def __init__(self, norm: nn.Module, runs: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.norm, self.runs = norm, [tuple(run) for run in runs]

    def forward(self, hidden: Tensor) -> Tensor:
        """The kept heads' columns."""
        normed = self.norm(hidden)
        return torch.cat([normed[..., a:b] for a, b in self.runs], dim=-1)


def split_heads(head_dim: int, kv_of_head: Sequence[int], fused: Tensor) -> tuple[Tensor, ...]:
    """Falcon's fused projection taken apart where groups have unlike numbers of heads: queries, keys, values.

    Args:
        head_dim: Width of a head.
        kv_of_head: The KV group of each query head. Query heads stand first, then all keys, then all values.
        fused: What the projection put out, "batch pos width".
    """
    queries, groups = len(kv_of_head), max(kv_of_head) + 1
    heads = fused.view(*fused.shape[:2], -1, head_dim)
    keys, values = heads[:, :, queries : queries + groups], heads[:, :, queries + groups :]
    return heads[:, :, :queries], keys[:, :, kv_of_head], values[:, :, kv_of_head]


def narrow(model: nn.Module, told: Mapping[str, Any]) -> None:
    """Make a model that was just built as small as its config says.

    Args:
        model: Of the family's class, at full size.
        told: `config.headcount`.
    """
    blocks = model.get_submodule(told["blocks"])
    for number, layer in told["layers"].items():
        _narrow_block(blocks.get_submodule(number), layer, int(number))


def _narrow_block(block: nn.Module, told: Mapping[str, Any], number: int) -> None:
    for path in told.get("identity", ()):
        _put(block, path, nn.Identity())
    for path, (inputs, width) in told.get("gone", {}).items():
        _put(block, path, _like(Gone(inputs, width, bias=False), block))
    for path, (projection, width, bias, outputs, *guard) in told.get("constant", {}).items():
        of_layer = number if path == told.get("attention") else None
        made = Constant(projection, width, bias, outputs, of_layer, *guard)
        _put(block, path, _like(made, block))
    for path, shape in told.get("shapes", {}).items():
        _resize(block, path, shape)
    for path, numbers in told.get("numbers", {}).items():
        for name, value in numbers.items():
            setattr(block.get_submodule(path), name, value)
    for path, runs in told.get("columns", {}).items():
        _put(block, path, Columns(block.get_submodule(path), runs))
    if "config" not in told:
        return
    attention: Any = block.get_submodule(told["attention"])
    shares, split = told.get("kv_of_head"), told.get("split")
    if hasattr(attention, "config"):
        attention.config = LayerConfig(attention.config, told["config"], shares is not None and split is None)
    if shares is not None:
        attention.kv_of_head = shares
    if split is not None and shares is not None:
        attention._split_heads = functools.partial(split_heads, split, shares)


def _like(module: nn.Module, block: nn.Module) -> nn.Module:
    """A module of the device and type of a block."""
    parameter = next(block.parameters())
    return module.to(parameter.device, parameter.dtype)


def _resize(block: nn.Module, path: str, shape: Sequence[int] | None) -> None:
    """A parameter of this shape, with the first of the old one's values."""
    owner, _, name = path.rpartition(".")
    module, old = block.get_submodule(owner), block.get_parameter(path)
    setattr(module, name, None)
    if shape is not None:
        # Without values there is nothing to cut out, which on the meta device takes most of the time.
        kept = old.new_empty(shape) if old.is_meta else old.detach()[tuple(slice(0, n) for n in shape)].clone()
        setattr(module, name, nn.Parameter(kept, requires_grad=old.requires_grad))


def _put(block: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(block.get_submodule(owner), name, module)
