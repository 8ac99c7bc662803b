"""A model without the heads and FFNs that a mask leaves out, proved equal to the masked one, block by block.

The smaller model is its family's class, built without weights and narrowed as its config says
(`headcount.model.narrowed`). Then one block after another gets the rows and columns that stay (`layouts`), and is
given what the masked model's block is given: what both put out, computed in float32 whatever the weights' type, must
agree. So at any moment no more than one block and its smaller twin need to be in memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from headcount.engine.blocks import Block, Call, entered, first, learned
from headcount.engine.step import is_mutable, owned
from headcount.errors import ModelError, listed, named
from headcount.masks import Mask
from headcount.model.contracts import FAILURES, probe_tokens
from headcount.model.devices import device_of
from headcount.model.held import give_back
from headcount.model.hooks import layer_ablated
from headcount.model.load import LoadedModel
from headcount.model.offloaded import offloaded, present
from headcount.model.removed import FORMAT, base_of, name_code, narrowed
from headcount.removal.in_float32 import as_float32, in_float32
from headcount.removal.layouts import Cut, cut, merged


@dataclass(frozen=True, eq=False)
class Plan:
    """What will be removed, before anything is.

    Attributes:
        loaded: The full model.
        mask: What stays.
        blocks: Where the blocks are, by path.
        parts: The model's blocks, and what kinds of output they have.
        cuts: How each block becomes smaller.
        empty: The smaller model, on the meta device.
    """

    loaded: LoadedModel
    mask: Mask
    blocks: str
    parts: Sequence[Block]
    cuts: tuple[Cut, ...]
    empty: PreTrainedModel


def planned(loaded: LoadedModel, mask: Mask) -> Plan:
    """How a model becomes smaller; a pass of two tokens shows what its blocks hand back.

    Raises:
        OptionError: If the mask is of a model of other numbers of heads.
        ModelError: If something of the model is not known to belong to a head or an FFN.
    """
    model, anatomy = loaded.model, loaded.anatomy
    anatomy.check(mask)
    try:
        with torch.no_grad(), _outputs_seen(loaded) as outputs:
            parts = learned(model, anatomy, probe_tokens(model))
    except (NotImplementedError, *FAILURES) as failure:
        elsewhere = "; load it into memory with `device='cpu'`" if offloaded(model) else ""
        raise ModelError(f"{loaded.name} does not run as it is loaded ({named(failure)}){elsewhere}",
                         fields=("device='cpu'",)) from failure
    names = {id(module): name for name, module in model.named_modules()}
    blocks = names[id(anatomy.layers[0].block)].rpartition(".")[0]
    given = [(outputs[id(part.attention)], outputs[id(part.ffn or part.ffn_output)]) for part in anatomy.layers]
    cuts = tuple(cut(part, heads, bool(ffn), model.config, numbers) for part, heads, ffn, numbers in
                 zip(anatomy.layers, mask.heads, mask.ffns, given, strict=True))
    return Plan(loaded, mask, blocks, parts, cuts, _empty(loaded, mask, blocks, cuts))


def check_kind(loaded: LoadedModel) -> None:
    """Refuse what cannot be cut.

    Raises:
        ModelError: If weights are quantised, or lie on several devices.
    """
    model = loaded.model
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise ModelError(f"{loaded.name} is quantised, and rows cannot be cut out of coded weights: remove from the "
                         "model as it was before, and quantise what is left")
    devices = {str(p.device) for p in model.parameters() if not p.is_meta}
    if len(devices) > 1:
        raise ModelError(f"{loaded.name} lies on several devices ({listed(sorted(devices))}): load it on one, or on "
                         "the CPU with `device='cpu'`", fields=("device='cpu'",))


@contextlib.contextmanager
def _outputs_seen(loaded: LoadedModel) -> Iterator[dict[int, int]]:
    """How many values attention and FFN of every layer hand back in a pass; 0: one, by itself."""
    seen: dict[int, int] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen[id(module)] = len(output) if isinstance(output, (tuple, list)) else 0

    with contextlib.ExitStack() as hooks:
        for part in loaded.anatomy.layers:
            for module in (part.attention, part.ffn or part.ffn_output):
                hooks.callback(module.register_forward_hook(keep).remove)
        yield seen


def _empty(loaded: LoadedModel, mask: Mask, blocks: str, cuts: tuple[Cut, ...]) -> PreTrainedModel:
    model = loaded.model
    base = base_of(model)
    before = getattr(model.config, "headcount", None) or {"layers": {}, "ffns": [True] * len(cuts)}
    layers = {str(i): layer for i, one in enumerate(cuts)
              if (layer := merged(before["layers"].get(str(i), {}), one.told))}
    told = {"format": FORMAT, "class": base.__name__, "blocks": blocks, "num_heads": [int(h.sum()) for h in mask.heads],
            "ffns": [bool(f) and was for f, was in zip(mask.ffns, before["ffns"], strict=True)], "layers": layers}
    of_base: Any = base
    made = narrowed(of_base)
    config = made.config_class
    settings = model.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "headcount"):
        settings.pop(name, None)
    new = config(**settings, headcount=told)
    name_code(new, base)
    new._attn_implementation = model.config._attn_implementation
    new.dtype = model.dtype
    with torch.device("meta"):
        empty: PreTrainedModel = made._from_config(new, dtype=model.dtype).eval()
    _as_typed(empty, model, blocks, cuts)
    return empty


def _as_typed(empty: PreTrainedModel, model: PreTrainedModel, blocks: str, cuts: tuple[Cut, ...]) -> None:
    """Give each tensor the type that it has in the model: some families keep a few in float32."""
    types = {name: value.dtype for name, value in tensors(model).items()}
    for name, value in tensors(empty).items():
        source: str | None = name
        if name.startswith(f"{blocks}."):
            number, _, inside = name.removeprefix(f"{blocks}.").partition(".")
            inner = cuts[int(number)].source.get(inside, inside)
            source = None if inner is None else f"{blocks}.{number}.{inner}"
        if source in types and types[source] != value.dtype:
            put(empty, name, value.to(types[source]))


# How far apart two computations of one thing may be, in float32: standard deviations of a block's output, or of the
# range of logits.
TOLERANCE = 1e-4


class Walk:
    """A pass of some tokens through the masked model, block by block, with the smaller block beside each.

    Args:
        plan: What is removed.
        ids: The tokens; they may be any.

    Attributes:
        worst: How far any smaller block was from the masked model's, of those that were passed: of what both put out
            for the same input, the largest difference in standard deviations.
    """

    def __init__(self, plan: Plan, ids: Int[Tensor, "batch pos"]) -> None:
        self.plan, self.ids, self.worst = plan, ids.to(plan.loaded.device), 0.0
        self._blocks = plan.parts

    def blocks(self) -> Iterator[tuple[int, nn.Module]]:
        """The smaller blocks with their weights, one after another, each already compared.

        Raises:
            ModelError: If a smaller block is not the masked model's.
        """
        plan, model = self.plan, self.plan.loaded.model
        inputs = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        with torch.no_grad(), in_float32(model):
            hidden, calls = entered(model, self._blocks, inputs)
            hidden = as_float32(hidden)
            twins, copies = plan.empty.get_submodule(plan.blocks), dict[int, Any]()
            for i, (block, call) in enumerate(zip(self._blocks, map(_precise, calls), strict=True)):
                own = Call(*owned(call, copies))  # before the masked block writes into what it hands to later ones
                masked = self._masked(i, hidden, call)
                twin = twins.get_submodule(str(i))
                fill(twin, plan.cuts[i], block.part.block, hidden.device)
                self._compare(i, twin, hidden, own, masked)
                hidden = masked
                yield i, twin
                if offloaded(model):
                    give_back()

    def _masked(self, number: int, hidden: Tensor, call: Call) -> Tensor:
        plan, part = self.plan, self._blocks[number].part
        with layer_ablated(part, plan.mask.heads[number], bool(plan.mask.ffns[number])):
            try:
                return first(part.block(hidden.clone(), *call.args, **call.kwargs))
            except FAILURES as failure:
                raise not_known(plan.loaded.model, f"block {number} does not run by itself, in float32 "
                                f"({named(failure)})") from failure

    def _compare(self, number: int, twin: nn.Module, hidden: Tensor, call: Call, masked: Tensor) -> None:
        plan = self.plan
        if not plan.cuts[number].told and not any(map(is_mutable, (*call.args, *call.kwargs.values()))):
            return  # the same block, with the same weights, which hands nothing else to later ones
        try:
            with in_float32(twin):
                error = apart(first(twin(hidden.clone(), *call.args, **call.kwargs)), masked)
        except FAILURES as failure:
            raise not_known(plan.loaded.model, f"block {number}, made smaller, does not run "
                            f"({named(failure)})") from failure
        if not error <= TOLERANCE:
            raise not_known(plan.loaded.model, f"block {number}, made smaller, puts out something else than under the "
                            f"mask (by {error:.1e} standard deviations)")
        self.worst = max(self.worst, error)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocabulary"]:
    """Logits at all positions of the plain forward pass, in float32 whatever the weights' type."""
    with in_float32(model):
        found: Tensor = model(input_ids=ids.to(device_of(model)), use_cache=False).logits
    return found.float().cpu()


def not_known(model: PreTrainedModel, why: str) -> ModelError:
    """Physical removal is refused for this model, and the format that always works is offered."""
    return ModelError(f"what the mask leaves out cannot be removed from {type(model).__name__}: {why}; use "
                      "`format='masked'`, which sets weights to zero", fields=("format='masked'",))


def apart(one: Float[Tensor, "*_"], other: Float[Tensor, "*_"]) -> float:
    """The largest difference of two tensors, in standard deviations of the second; infinite where it is no number."""
    return _apart(one, other, lambda known: known.std())


def logits_apart(one: Float[Tensor, "*_"], other: Float[Tensor, "*_"]) -> float:
    """The same of logits, as a share of their range: the largest less the smallest of the second."""
    return _apart(one, other, lambda known: known.max() - known.min())


def _apart(one: Tensor, other: Tensor, spread: Callable[[Tensor], Tensor]) -> float:
    a, b = one.detach().double().cpu(), other.detach().double().cpu()
    known = torch.isfinite(b)  # -inf where a model masks tokens out
    if not torch.equal(known, torch.isfinite(a)):
        return float("inf")
    error = float((a[known] - b[known]).abs().max() / spread(b[known]).clamp_min(1e-30)) if known.any() else 0.0
    return float("inf") if error != error else error


def _precise(call: Call) -> Call:
    """The same arguments in float32."""
    return Call(as_float32(call.args), {name: as_float32(value) for name, value in call.kwargs.items()})


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied one once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Those of them that a checkpoint holds."""
    kept = {*model.state_dict()}
    return {name: value for name, value in tensors(model).items() if name in kept}


def fill(twin: nn.Module, how: Cut, block: nn.Module, device: torch.device) -> None:
    """Give a smaller block on the meta device its weights and buffers, out of the block as it was."""
    for name, empty in tensors(twin).items():
        put(twin, name, how.tensor(name, empty, device, functools.partial(read, block)))


def read(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its path, fetched where it lies on the disk."""
    owner, _, last = name.rpartition(".")
    inside = module.get_submodule(owner)
    with present(inside):
        value: Tensor = getattr(inside, last)
        return value.detach()


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
    model, inside = plan.loaded.model, plan.blocks + "."
    for name in tensors(plan.empty):
        if not name.startswith(inside):
            yield name, read(model, name).clone()
