"""A model without the heads and FFNs that a mask leaves out, proved equal to the masked one, block by block.

The smaller model is its family's class, built without weights and narrowed as its config says
(`headcount.model.narrowed`). Then one block after another gets the rows and columns that stay (`layouts`), and is given
what the masked model's block is given: what both put out must agree. So at any moment no more than one block and its
smaller twin need to be in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from headcount.engine.blocks import Block, Call, entered, first, learned
from headcount.errors import ModelError
from headcount.masks import Mask
from headcount.model.anatomy import LayerAnatomy
from headcount.model.contracts import probe_tokens
from headcount.model.hooks import layer_ablated
from headcount.model.load import LoadedModel
from headcount.model.removed import FORMAT, narrowed
from headcount.removal.layouts import Cut, cut

@dataclass(frozen=True, eq=False)
class Plan:
    """What will be removed, before anything is.

    Attributes:
        loaded: The full model.
        mask: What stays.
        blocks: Where the blocks are, by path.
        cuts: How each block becomes smaller.
        empty: The smaller model, on the meta device.
    """

    loaded: LoadedModel
    mask: Mask
    blocks: str
    cuts: tuple[Cut, ...]
    empty: PreTrainedModel


def planned(loaded: LoadedModel, mask: Mask) -> Plan:
    """How a model becomes smaller; no weight is read.

    Raises:
        OptionError: If the mask is of a model of other numbers of heads.
        ModelError: If something of the model is not known to belong to a head or an FFN.
    """
    loaded.anatomy.check(mask)
    outputs = _outputs(loaded)
    cuts = tuple(cut(part, heads, bool(ffn), loaded.model.config, told)
                 for part, heads, ffn, told in zip(loaded.anatomy.layers, mask.heads, mask.ffns, outputs, strict=True))
    names = {id(module): name for name, module in loaded.model.named_modules()}
    blocks = names[id(loaded.anatomy.layers[0].block)].rpartition(".")[0]
    return Plan(loaded, mask, blocks, cuts, _empty(loaded, mask, blocks, cuts))


def _outputs(loaded: LoadedModel) -> list[tuple[int, int]]:
    """How many values attention and FFN of every layer hand back, seen in a pass of a few tokens; 0: one, by itself."""
    seen: dict[int, Any] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen[id(module)] = len(output) if isinstance(output, (tuple, list)) else 0

    modules = [m for part in loaded.anatomy.layers for m in (part.attention, part.ffn_output)]
    handles = [m.register_forward_hook(keep) for m in modules]
    try:
        with torch.no_grad():
            loaded.model(input_ids=probe_tokens(loaded.model)[:, :2], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [(seen[id(part.attention)], seen[id(part.ffn_output)]) for part in loaded.anatomy.layers]


def _empty(loaded: LoadedModel, mask: Mask, blocks: str, cuts: tuple[Cut, ...]) -> PreTrainedModel:
    model = loaded.model
    base = type(model)
    layers = {str(i): c.told for i, c in enumerate(cuts) if c.told}
    told = {"format": FORMAT, "class": base.__name__, "blocks": blocks, "num_heads": [int(h.sum()) for h in mask.heads],
            "ffns": [bool(f) for f in mask.ffns], "layers": layers}
    made = narrowed(base)
    config: Any = made.config_class
    settings = model.config.to_dict()
    for name in ("model_type", "architectures", "auto_map"):
        settings.pop(name, None)
    new = config(**settings, headcount=told)
    new._attn_implementation = model.config._attn_implementation
    new.dtype = model.dtype
    with torch.device("meta"):
        empty: PreTrainedModel = made._from_config(new, dtype=model.dtype)
    return empty.eval()


def removed_blocks(plan: Plan) -> Iterator[tuple[int, nn.Module, float]]:
    """The smaller blocks with their weights, one after another, and how far each is from the masked model's.

    Of what both put out for the same tokens, the largest difference relative to the spread (standard deviation).
    """
    loaded = plan.loaded
    model, anatomy = loaded.model, loaded.anatomy
    ids = probe_tokens(model)
    inputs = {"input_ids": torch.cat([ids, ids.flip(1)]), "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.long)}
    with torch.no_grad():
        blocks = learned(model, anatomy, ids)
        hidden, calls = entered(model, blocks, inputs)
        twins = plan.empty.get_submodule(plan.blocks)
        for i, (block, call) in enumerate(zip(blocks, calls, strict=True)):
            with layer_ablated(block.part, plan.mask.heads[i], bool(plan.mask.ffns[i])):
                masked = first(_called(block.part.block, hidden, call))
            twin = twins.get_submodule(str(i))
            fill(twin, plan.cuts[i], block.part.block)
            error = _apart(first(_called(twin, hidden, call)), masked)
            hidden = masked
            yield i, twin, error


def _called(block: nn.Module, hidden: Tensor, call: Call) -> Any:
    args, kwargs = copy.copy(call.args), {name: copy.copy(value) for name, value in call.kwargs.items()}
    return block(hidden.clone(), *args, **kwargs)


def _apart(one: Tensor, other: Tensor) -> float:
    a, b = one.double().cpu(), other.double().cpu()
    error = float((a - b).abs().max() / b.std().clamp_min(1e-30))
    return float("inf") if error != error else error


def fill(twin: nn.Module, how: Cut, block: nn.Module) -> None:
    """Give a smaller block on the meta device its weights and buffers, out of the block as it was."""
    with align_module_device(block):
        old = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        wanted = [*twin.named_parameters(), *twin.named_buffers()]
        for name, empty in wanted:
            put(twin, name, how.tensor(name, empty.shape, old))


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Put values in the place of a parameter or buffer of any device."""
    owner, _, last = name.rpartition(".")
    inside = module.get_submodule(owner)
    if last in inside._parameters:
        inside._parameters[last] = nn.Parameter(value, requires_grad=False)
    else:
        inside._buffers[last] = value


def fill_rest(plan: Plan) -> None:
    """Give the smaller model what lies outside the blocks: embeddings, norms, the output layer, all buffers."""
    for name, value in rest(plan):
        put(plan.empty, name, value)
    plan.empty.tie_weights()


def rest(plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers outside the blocks, copied, by name; a tied one once."""
    model = plan.loaded.model
    inside = plan.blocks + "."
    names = [name for name, _ in (*plan.empty.named_parameters(), *plan.empty.named_buffers())]
    for name in names:
        if not name.startswith(inside):
            owner = model.get_submodule(name.rpartition(".")[0])
            with align_module_device(owner):
                yield name, getattr(owner, name.rpartition(".")[2]).detach().clone()
