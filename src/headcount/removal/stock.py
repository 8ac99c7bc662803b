"""Formats that need no code of ours: a stock class of another shape, and the old shape with zeros.

`stock` fits masks that leave every layer the same number of KV groups, every group the same number of heads, and all
FFNs: then the family's own class has the right shape for some config, if it takes the width of a head from the config
and not from the hidden size. Whether it does is found by building it without weights. Llama's class insists that heads
fill the hidden size; Mistral's, without a window, computes the same and does not.

`masked` sets to zero what the gates set to zero: the removed heads' columns of the output projection, and the last
projection of removed FFNs with its bias.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from headcount.errors import OptionError
from headcount.masks import Mask
from headcount.model.contracts import FAILURES
from headcount.model.load import LoadedModel
from headcount.model.read import quiet
from headcount.model.removed import base_of
from headcount.removal.slicing import Plan, Walk, fill_rest, planned, put, tensors

_HEADS = ("num_attention_heads", "n_head", "num_heads", "attention_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
# Of Llama's config what Mistral's has, too; with a bias in its projections there is no such container.
_LLAMA_ALONE = ("attention_bias", "mlp_bias")


def built(plan: Plan) -> PreTrainedModel:
    """A class of transformers of the shape that is left, without weights.

    Raises:
        OptionError: If the mask leaves layers of unlike shapes, or no stock class has this shape, with the reason.
    """
    heads, groups, d_head = _shape(plan)
    wanted = {name: tuple(tensor.shape) for name, tensor in plan.empty.state_dict().items()}
    reasons: list[str] = []
    for base, settings in _candidates(plan, heads, groups, d_head):
        made, reason = _built(base, settings, wanted)
        if made is not None:
            return made
        reasons.append(f"{base.__name__}: {reason}")
    raise OptionError(f"no class of transformers has the shape that is left ({heads} heads of {d_head} in {groups} KV "
                      f"groups; {'; '.join(reasons)}): use `format='transformers'` or `format='masked'`",
                      fields=("format='transformers'", "format='masked'"))


def write_stock(plan: Plan, folder: Path) -> None:
    """Write the smaller model as a class of transformers, by transformers.

    Raises:
        OptionError: As `built` does.
    """
    _filled(plan, built(plan)).save_pretrained(folder)


def _shape(plan: Plan) -> tuple[int, int, int]:
    """Heads, KV groups and the width of a head that every layer has."""
    mask, layers = plan.mask, plan.loaded.anatomy.layers
    if gone := mask.ffns_removed:
        raise OptionError(f"a stock class has an FFN in every layer, and the mask removes that of layer {gone[0]}: use "
                          "`format='transformers'` or `format='masked'`",
                          fields=("format='transformers'", "format='masked'"))
    shapes = []
    for part, kept in zip(layers, mask.heads, strict=True):
        counts = np.bincount(np.array(part.kv_of_head, int)[kept], minlength=part.num_kv_heads)
        shapes.append(tuple(sorted(int(n) for n in counts if n)))
    if () in shapes:
        raise OptionError(f"a stock class has heads in every layer, and the mask leaves none in layer "
                          f"{shapes.index(())}: use `format='transformers'` or `format='masked'`",
                          fields=("format='transformers'", "format='masked'"))
    unlike = [i for i, shape in enumerate(shapes) if shape != shapes[0]]
    if unlike or len({*shapes[0]}) != 1:
        where = f"layers 0 and {unlike[0]} differ" if unlike else "KV groups of layer 0 keep unlike numbers of heads"
        raise OptionError(f"a stock class has layers of one shape, and the mask leaves others ({where}): choose a mask "
                          "of `--uniform` curves, or use `format='transformers'`",
                          fields={"--uniform": "--uniform", "format='transformers'": "--format transformers"})
    if any("columns" in layer.told for layer in plan.cuts):
        raise OptionError("a norm of queries and keys reads all heads at once, so that those of removed heads stay, "
                          "for which a stock class has no place: use `format='transformers'` or `format='masked'`",
                          fields=("format='transformers'", "format='masked'"))
    head_dim = getattr(layers[0].attention, "head_dim", None)
    return sum(shapes[0]), len(shapes[0]), head_dim if isinstance(head_dim, int) else layers[0].d_head


def _candidates(
    plan: Plan, heads: int, groups: int, d_head: int
) -> Iterator[tuple[type[PreTrainedModel], dict[str, Any]]]:
    """Classes that might have the shape, with their settings: the family's own first."""
    model = plan.loaded.model
    base = base_of(model)
    settings = {name: value for name, value in model.config.to_dict().items()
                if name not in ("model_type", "architectures", "auto_map", "headcount")}
    own = {**settings, "head_dim": d_head}
    own |= {name: heads for name in _HEADS if name in settings} | {name: groups for name in _GROUPS if name in settings}
    yield base, own
    if base is LlamaForCausalLM and not any(settings.get(name) for name in _LLAMA_ALONE):
        known = {*MistralConfig().to_dict(), "rope_parameters"} - {"model_type"}
        yield MistralForCausalLM, {**{name: own[name] for name in own if name in known}, "sliding_window": None}


def _built(
    base: type[PreTrainedModel], settings: dict[str, Any], wanted: dict[str, tuple[int, ...]]
) -> tuple[PreTrainedModel | None, str]:
    """The class built without weights, or why it has not the shape."""
    of_base: Any = base
    try:
        with quiet(), torch.device("meta"):
            made: PreTrainedModel = of_base._from_config(of_base.config_class(**settings)).eval()
    except (*FAILURES, StrictDataclassError) as error:
        return None, f"its config takes no such numbers ({' '.join(str(error).split())[:160]})"
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    if shapes == wanted:
        return made, ""
    name = next((name for name in wanted if shapes.get(name) != wanted[name]), next(iter({*shapes} - {*wanted}), ""))
    return None, f"{name} would be {shapes.get(name)} instead of {wanted.get(name)} in it"


def _filled(plan: Plan, made: PreTrainedModel) -> PreTrainedModel:
    """The built model with the smaller model's weights."""
    plan = planned(plan.loaded, plan.mask)  # the other one stays without weights
    for _ in Walk(plan, torch.zeros(1, 2, dtype=torch.long)).blocks():
        pass
    fill_rest(plan)
    made.to(dtype=plan.empty.dtype)  # type: ignore[call-arg]
    for name, value in tensors(plan.empty).items():
        put(made, name, value.detach())
    made.tie_weights()
    made.generation_config = copy.deepcopy(plan.loaded.model.generation_config)
    return made


def write_masked(loaded: LoadedModel, mask: Mask, folder: Path) -> None:
    """Write the model as it was, with zeros in place of what was removed."""
    model = loaded.model
    zeros = dict(_zeros(loaded, mask))
    weights = {name: zeros.get(name, value) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)


def _zeros(loaded: LoadedModel, mask: Mask) -> Iterator[tuple[str, Tensor]]:
    """Tensors with zeros, by name."""
    names = {id(module): name for name, module in loaded.model.named_modules()}
    for part, heads, ffn in zip(loaded.anatomy.layers, mask.heads, mask.ffns, strict=True):
        out: Any = part.out_proj
        if not heads.all():
            weight = out.weight.detach().clone()
            columns = torch.from_numpy(np.repeat(~heads, part.d_head)).to(weight.device)
            (weight if hasattr(out, "nx") else weight.T)[columns] = 0
            yield f"{names[id(out)]}.weight", weight
        if not ffn:
            for name, parameter in part.ffn_output.named_parameters():
                yield f"{names[id(part.ffn_output)]}.{name}", torch.zeros_like(parameter)
