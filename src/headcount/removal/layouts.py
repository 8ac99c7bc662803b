"""Which rows and columns of a family's tensors belong to a head, a KV group or an FFN: all that removal knows of them.

A head takes its rows of the query projection (and of its bias), and its columns of the output projection, whose own
bias stays. Keys and values go with the last head of their group. What else an attention holds is found by its shape:

- a norm as wide as one head is every head's, and stays; one with a row for each head loses rows;
- a norm over all heads at once (OLMo-2) reads removed heads, too: queries and keys stay, and their columns are dropped
  behind it;
- a vector with a number for each head (attention sinks) loses numbers.

Fused projections differ in the order of their rows, and nothing in them says which it is (`_is_by_group`). Attention
of which no head is left is a constant, its output projection's bias. An FFN goes with the norm that feeds it alone; a
norm on its output stays, and makes norm(0) of nothing. Whatever is not known here is refused by name; that what is
known is right is proved on the user's model, block by block (`headcount.removal.slicing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from headcount.errors import ModelError
from headcount.model.anatomy import (
    KEY_NORMS,
    KEYS,
    LATENT_HEADS,
    LATENT_SHARED,
    QUERY_NORMS,
    VALUES,
    LayerAnatomy,
    norms_of,
)
from headcount.model.narrowed import PREFIX, Columns

# Beside queries, what gates each head's output.
_QUERIES = ("q_proj", "gate_proj", "g_proj")
_LATENT_NORMS = ("q_a_layernorm", "kv_a_layernorm")
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")
# Types whose fused projection has a KV group's rows together, and those that have so unless there is one group.
_BY_GROUP = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")
_BY_GROUP_UNLESS_ONE = ("falcon", "gpt_bigcode")
# Numbers that attention carries, and those that it reads off the config.
_HEAD_NUMBERS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads")
_KV_NUMBERS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_SHARE_NUMBERS = ("num_key_value_groups",)
_WIDTH_NUMBERS = ("split_size", "embed_dim", "all_head_size", "hidden_size")
_KV_WIDTH_NUMBERS = ("kv_dim",)
Kept = Int[np.ndarray, " _"]


@dataclass(eq=False)
class Cut:
    """What is left of one block.

    Attributes:
        told: The layer's part of `config.headcount` (`headcount.model.narrowed`).
        kept: By parameter of the block as it was, which of its rows and columns stay, by dimension.
        source: By parameter of the block as it will be, the one of the block as it was that it is made of, where the
            names differ; None where it is made of none: ones, then, that decide nothing.
    """

    told: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, dict[int, Kept]] = field(default_factory=dict)
    source: dict[str, str | None] = field(default_factory=dict)

    def tensor(self, name: str, empty: Tensor, device: torch.device, read: Callable[[str], Tensor]) -> Tensor:
        """The values of a parameter or buffer of the smaller block.

        Args:
            name: Of the tensor, in the smaller block.
            empty: It, on the meta device.
            device: Where the block is.
            read: Gives a tensor of the block as it was, by name.
        """
        source = self.source.get(name, name)
        if source is None or 0 in empty.shape:
            return torch.ones(empty.shape, dtype=empty.dtype, device=device)
        value = read(source)
        for dim, index in self.kept.get(source, {}).items():
            value = value.index_select(dim, torch.from_numpy(index).to(value.device))
        return value.detach().clone(memory_format=torch.contiguous_format)


def cut(
    part: LayerAnatomy, heads: Bool[np.ndarray, " head"], ffn: bool, config: PreTrainedConfig,
    outputs: tuple[int, int] = (2, 0),
) -> Cut:
    """How a block becomes smaller.

    Args:
        part: The block and its parts.
        heads: True for every head that is kept.
        ffn: Whether the FFN is kept.
        config: The model's.
        outputs: How many values attention, and the FFN, hand back; 0: one, by itself.

    Raises:
        ModelError: If the attention or the FFN holds something of which nothing is known here.
    """
    if not heads.all():
        _check_heads(config)
    found = Cut()
    names = {id(module): name for name, module in part.block.named_modules()}
    attention = names[id(part.attention)]
    if not heads.all():
        if heads.any():
            _Attention(part, attention, np.flatnonzero(heads), found, config).cut()
        else:
            _constant(found, part, attention, names[id(part.out_proj)], outputs[0], bias=True)
        found.told["attention"] = attention
    if not ffn:
        _cut_ffn(found, part, names, outputs[1])
    return found


def _check_heads(config: PreTrainedConfig) -> None:
    """Refuse families whose heads depend on how many there are."""
    kind = config.model_type.removeprefix(PREFIX)
    why = ("each head's bias of position (ALiBi) depends on the number of heads"
           if kind in ("bloom", "mpt") or getattr(config, "alibi", False) is True else
           "rows of its fused projection stand in four parts" if kind == "codegen" else "")
    if why:
        raise ModelError(f"heads cannot be removed from a model of type {kind}: {why}; use `format='masked'`",
                         fields=("format='masked'",))


class _Attention:
    """Some heads of one attention cut away."""

    def __init__(self, part: LayerAnatomy, path: str, heads: Kept, found: Cut, config: PreTrainedConfig) -> None:
        self.part, self.path, self.heads, self.found, self.config = part, path, heads, found, config
        of = np.array(part.kv_of_head)
        self.groups, self.kv_of_head = np.unique(of[heads], return_inverse=True)
        shares = np.bincount(self.kv_of_head)
        self.is_even = len({*shares.tolist()}) == 1
        self.share = int(shares[0]) if self.is_even else 1

    def cut(self) -> None:
        out = self.part.out_proj
        for name, module in self.part.attention.named_children():
            if module is out:
                self._columns(name, module)
            else:
                self._child(name, module)
        for name, parameter in self.part.attention.named_parameters(recurse=False):
            if parameter.shape[:1] != (self.part.num_heads,):
                raise self._unknown(name, parameter)
            self._keep(name, 0, self.heads, parameter)
        self._numbers()

    def _child(self, name: str, module: nn.Module) -> None:
        part = self.part
        if not any(True for _ in module.parameters()):
            return
        if name in (*LATENT_SHARED, *_LATENT_NORMS):
            return
        if name in _FUSED:
            self._fused(name, module)
        elif name in (*_QUERIES, *LATENT_HEADS):
            if name == "q_proj" and norms_of(part.attention, QUERY_NORMS, part.num_heads)[0]:
                return
            self._rows(name, module, _rows_of(module, part.num_heads, self.heads, self._unknown(name, module)))
        elif name in (*KEYS, *VALUES):
            if name in KEYS and norms_of(part.attention, KEY_NORMS, part.num_kv_heads)[0]:
                return
            self._rows(name, module, _rows_of(module, part.num_kv_heads, self.groups, self._unknown(name, module)))
        else:
            self._norm(name, module)

    def _head_width(self) -> int:
        """The width of one head's queries or keys, which a norm's weight is compared with."""
        width = getattr(self.part.attention, "head_dim", None)
        return width if isinstance(width, int) else self.part.d_head

    def _norm(self, name: str, module: nn.Module) -> None:
        """A norm of queries or keys."""
        keys = name.startswith("k")
        count = self.part.num_kv_heads if keys else self.part.num_heads
        index = self.groups if keys else self.heads
        for inner, parameter in module.named_parameters():
            if parameter.dim() == 1 and parameter.numel() == self._head_width():
                continue
            if parameter.dim() >= 2 and parameter.shape[0] == count:
                self._keep(f"{name}.{inner}", 0, index, parameter)
            elif parameter.dim() == 1:
                # Columns of the norm's output that are passed on, of which some were dropped before, perhaps.
                runs = module.runs if isinstance(module, Columns) else [(0, parameter.numel())]
                columns = np.concatenate([np.arange(*run) for run in runs])
                if len(columns) % count:
                    raise self._unknown(name, parameter)
                kept = columns.reshape(count, -1)[index].ravel()
                self.found.told.setdefault("columns", {})[self._full(name)] = _runs(kept)
                if not isinstance(module, Columns):
                    self.found.source[f"{self._full(name)}.norm.{inner}"] = f"{self._full(name)}.{inner}"
            else:
                raise self._unknown(name, parameter)

    def _fused(self, name: str, module: nn.Module) -> None:
        """One projection for queries, keys and values: of which rows it consists."""
        part, d = self.part, self.part.d_head
        heads, groups = part.num_heads, part.num_kv_heads
        if _outputs(module) != (heads + 2 * groups) * d:
            raise self._unknown(name, module)
        by_group = _is_by_group(self.config) and groups > 1
        was_split = getattr(part.attention, "kv_of_head", None) is not None
        rows = np.arange(_outputs(module))
        if by_group and not was_split:
            each = rows.reshape(groups, heads // groups + 2, d)
            q, k, v = each[:, :-2].reshape(heads, d), each[:, -2], each[:, -1]
        else:
            of_queries, of_keys, of_values = np.split(rows, [heads * d, (heads + groups) * d])
            q, k, v = of_queries.reshape(heads, d), of_keys.reshape(groups, d), of_values.reshape(groups, d)
        if by_group and self.is_even and not was_split:
            kept = np.concatenate([np.concatenate([q[self.heads[self.kv_of_head == g]].ravel(), k[i], v[i]])
                                   for g, i in enumerate(self.groups)])
        else:
            kept = np.concatenate([q[self.heads].ravel(), k[self.groups].ravel(), v[self.groups].ravel()])
            if by_group:
                self.found.told["split"] = d
        self._rows(name, module, kept)

    def _numbers(self) -> None:
        """Numbers that attention carries or reads off the config."""
        part, attention = self.part, self.part.attention
        heads, groups, d = len(self.heads), len(self.groups), part.d_head
        numbers = {**dict.fromkeys(_HEAD_NUMBERS, (part.num_heads, heads)),
                   **dict.fromkeys(_KV_NUMBERS, (part.num_kv_heads, groups)),
                   **dict.fromkeys(_WIDTH_NUMBERS, (part.num_heads * d, heads * d)),
                   **dict.fromkeys(_KV_WIDTH_NUMBERS, (part.num_kv_heads * d, groups * d))}
        own = {name: new for name, (old, new) in numbers.items() if getattr(attention, name, None) == old}
        own |= {name: self.share for name in _SHARE_NUMBERS if hasattr(attention, name)}
        if "split" in self.found.told:  # every query head gets keys and values of its own then
            own |= {name: heads for name in _KV_NUMBERS if hasattr(attention, name)}
        self.found.told.setdefault("numbers", {}).setdefault(self.path, {}).update(own)
        of_config = {**dict.fromkeys(_HEAD_NUMBERS, heads), **dict.fromkeys(_KV_NUMBERS, groups)}
        self.found.told["config"] = {name: n for name, n in of_config.items() if hasattr(self.config, name)}
        if not self.is_even or "split" in self.found.told:
            if not hasattr(attention, "config"):
                raise ModelError(f"{type(attention).__name__} does not go through transformers' attention interface, "
                                 "so its KV groups cannot keep unlike numbers of heads; use `format='masked'`",
                                 fields=("format='masked'",))
            self.found.told["kv_of_head"] = self.kv_of_head.tolist()

    def _rows(self, name: str, module: nn.Module, rows: Kept) -> None:
        """Outputs of a projection."""
        dim, number = (1, "nf") if hasattr(module, "nx") else (0, "out_features")
        for inner, parameter in module.named_parameters():
            self._keep(f"{name}.{inner}", dim if parameter.dim() > 1 else 0, rows, parameter)
        self._set(name, number, len(rows))

    def _columns(self, name: str, module: nn.Module) -> None:
        """Inputs of the output projection."""
        d = self.part.d_head
        columns = (self.heads[:, None] * d + np.arange(d)).ravel()
        dim, number = (0, "nx") if hasattr(module, "nx") else (1, "in_features")
        self._keep(f"{name}.weight", dim, columns, module.get_parameter("weight"))
        self._set(name, number, len(columns))

    def _keep(self, name: str, dim: int, index: Kept, parameter: Tensor) -> None:
        full = self._full(name)
        shape = list(parameter.shape)
        shape[dim] = len(index)
        self.found.kept.setdefault(full, {})[dim] = index
        self.found.told.setdefault("shapes", {})[full] = shape

    def _set(self, name: str, number: str, value: int) -> None:
        self.found.told.setdefault("numbers", {}).setdefault(self._full(name), {})[number] = value

    def _full(self, name: str) -> str:
        return f"{self.path}.{name}"

    def _unknown(self, name: str, what: nn.Module | Tensor) -> ModelError:
        kind = f"a parameter of shape {tuple(what.shape)}" if isinstance(what, Tensor) else type(what).__name__
        return ModelError(f"heads cannot be removed from {type(self.part.attention).__name__}: which part of {name} "
                          f"({kind}) belongs to a head is not known; use `format='masked'`",
                          fields=("format='masked'",))


def _rows_of(module: nn.Module, count: int, index: Kept, otherwise: ModelError) -> Kept:
    """Rows of a projection whose outputs stand head by head."""
    width, rest = divmod(_outputs(module), count)
    if rest:
        raise otherwise
    return (index[:, None] * width + np.arange(width)).ravel()


def _is_by_group(config: PreTrainedConfig) -> bool:
    """Whether a fused projection has each KV group's rows together; else queries stand before all keys and values."""
    kind = config.model_type.removeprefix(PREFIX)
    return kind in _BY_GROUP or (kind in _BY_GROUP_UNLESS_ONE and not getattr(config, "multi_query", False)) or (
        kind == "falcon" and bool(getattr(config, "new_decoder_architecture", False)))


def _runs(columns: Kept) -> list[list[int]]:
    """Stretches of neighbouring columns: the first, and the one behind the last."""
    breaks = np.flatnonzero(np.diff(columns) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(columns, breaks)]


def _constant(found: Cut, part: LayerAnatomy, path: str, projection: str, outputs: int, *, bias: bool) -> None:
    """A part that is gone as a whole; the bias of its projection may stay."""
    module = part.block.get_submodule(projection)
    name = projection.removeprefix(f"{path}.")
    bias = bias and getattr(module, "bias", None) is not None
    found.told.setdefault("constant", {})[path] = [name, part.d_model, bias, outputs]
    found.source[f"{path}.{name}.weight"] = None
    if bias:
        found.source[f"{path}.{name}.bias"] = f"{projection}.bias"


def _cut_ffn(found: Cut, part: LayerAnatomy, names: Mapping[int, str], outputs: int) -> None:
    output = names[id(part.ffn_output)]
    if part.ffn_norm is not None:
        found.told.setdefault("identity", []).append(names[id(part.ffn_norm)])
    if part.routed:
        guard = next((name for name, p in part.ffn_output.named_parameters() if p.dim() > 1), "")
        found.told.setdefault("constant", {})[output] = ["down_proj", part.d_model, False, outputs, guard]
        found.source |= {f"{output}.down_proj.weight": None, f"{output}.{guard}": None}
        return
    down: Any = part.ffn_output
    inside = part.ffn or part.block
    linear = {name: m for name, m in inside.named_children() if hasattr(m, "in_features") or hasattr(m, "nx")}
    if down not in linear.values():
        raise ModelError(f"the FFN of {type(part.block).__name__} cannot be removed: what of it ends in {output} is "
                         "not known; use `format='masked'`", fields=("format='masked'",))
    others = sum(1 for _ in inside.parameters()) > sum(1 for m in linear.values() for _ in m.parameters())
    if part.ffn is not None and (others or any(hasattr(m, "nx") for m in linear.values())):
        _constant(found, part, names[id(part.ffn)], output, outputs, bias=False)
        return
    for module in linear.values():
        outputs_of, inputs_of = module.weight.shape  # type: ignore[misc]
        # Gates and what they gate may be one projection, whose outputs are taken apart.
        sizes = [1, outputs_of] if module is down else [inputs_of, max(1, outputs_of // down.weight.shape[1])]
        found.told.setdefault("gone", {})[names[id(module)]] = sizes
        found.source[f"{names[id(module)]}.weight"] = None


def merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer's config says after something more was removed from a layer that was smaller already.

    Args:
        before: What it said.
        now: What the second removal says, of the layer as it was then.
    """
    if not now:
        return dict(before)
    gone = (*now.get("constant", {}),)
    stays: dict[str, Any] = {name: value for name, value in before.items() if name in ("attention", "identity")}
    if "attention" not in now:
        stays |= {name: before[name] for name in ("config", "kv_of_head", "split") if name in before}
    for name in ("shapes", "numbers", "columns", "gone", "constant"):
        stays[name] = {path: value for path, value in before.get(name, {}).items()
                       if not any(path == part or path.startswith(f"{part}.") for part in gone)}
    both = {**stays, **now}
    for name in ("shapes", "columns", "gone", "constant"):
        both[name] = stays[name] | now.get(name, {})
    numbers = now.get("numbers", {})
    both["numbers"] = {path: stays["numbers"].get(path, {}) | numbers.get(path, {})
                       for path in (*stays["numbers"], *(path for path in numbers if path not in stays["numbers"]))}
    both["identity"] = sorted({*stays.get("identity", ()), *now.get("identity", ())})
    return {name: value for name, value in both.items() if value not in ({}, [])}


def _outputs(module: Any) -> int:
    return int(module.nf if hasattr(module, "nf") else module.out_features)
