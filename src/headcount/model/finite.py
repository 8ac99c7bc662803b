"""Where a pass first gives no number, and why; looked for only after a NaN or an infinity was seen.

The one offending text goes through the model once more, by itself, with hooks on the parts that the anatomy names. In
the order in which they run, the first counts whose output holds a NaN or an infinity. On the way back it is the first
part whose gradient is a number where it comes in, and none where it goes out. Then why:

    weights    parameters of that part hold NaN or infinities: the checkpoint is damaged.
    overflow   forwards: in double precision the same block (or norm) gives numbers for the same input. Backwards:
               gradients are proportional to the loss, and those of 2^-16 of the loss are numbers.
    neither    the computation has no number there, such as 0/0 in a norm that has no epsilon.

Logits of -inf are legitimate: models mask padded or forbidden tokens out with them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from headcount.errors import few
from headcount.masks import Mask, heads_named
from headcount.model.anatomy import Anatomy, LayerAnatomy
from headcount.model.damage import by_feature, damaged, holds_nan
from headcount.model.devices import device_of
from headcount.model.hooks import ablated, first_output, frozen, scored_only

_SCALED = 2.0**-16
# What a block raises that cannot be copied or run in double precision: offloaded, quantised, or on a device without.
_NO_TWIN = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, KeyError, IndexError)


class Finding(NamedTuple):
    """Where numbers end, why, and what to do.

    Attributes:
        text: To stand behind "..., first in ", without a full stop; arguments stand between backticks.
        fields: These arguments.
    """

    text: str
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Place:
    """A part of the model: what it is called, whose weights may be to blame, and what to run again (with its input)."""

    where: str
    blamed: tuple[nn.Module, ...]
    again: nn.Module | None = None


@dataclass
class _Seen:
    """The first place of a pass that gave no number, and what was seen there."""

    place: _Place | None = None
    infinite: bool = False
    inputs: dict[nn.Module, tuple[Any, Any]] = field(default_factory=dict)

    def take(self, place: _Place, x: Tensor) -> None:
        if self.place is None and not is_finite(x):
            self.place, self.infinite = place, bool(torch.isinf(x).any())


@torch.no_grad()
def first_no_number(
    model: PreTrainedModel, anatomy: Anatomy, ids: Int[np.ndarray, " pos"], mask: Mask | None = None, *,
    scored: Int[np.ndarray, " scored"] | None = None, columns: int | None = None,
) -> Finding | None:
    """Where a forward pass of one text first gives no number, and why; None if all are numbers.

    Args:
        model: In eval mode.
        anatomy: Its heads and FFNs.
        ids: The text.
        mask: What is kept; None: everything.
        scored: Positions whose logits are looked at; None: all.
        columns: How many logits are looked at; None: all.
    """
    seen = _Seen()
    mask = Mask.full(anatomy.heads_per_layer) if mask is None else mask
    with ablated(anatomy, mask):
        with _watched(model, anatomy, seen), _picked(model, scored):
            logits = model(**_inputs(model, ids), use_cache=False).logits[..., :columns]
        seen.take(_Place("what the model makes of its logits", ()), _without_masked(logits))
        if seen.place is None:
            return None
        return _why(model, anatomy, seen.place, seen, lambda again: _twin_is_finite(again, *seen.inputs[again]))


def first_no_gradient(
    model: PreTrainedModel, anatomy: Anatomy, ids: Int[np.ndarray, " pos"], scored: Int[np.ndarray, " target"],
    targets: Int[np.ndarray, " target"],
) -> Finding | None:
    """Where the gradient of a continuation's mean cross-entropy is first no number on its way back; None if nowhere.

    Args:
        model: In eval mode; its forward pass gives numbers.
        anatomy: Its heads and FFNs.
        ids: Context and continuation without its last token.
        scored: The positions at which the targets are predicted.
        targets: The continuation.
    """
    seen = _backward(model, anatomy, ids, scored, targets, 1.0)
    if seen.place is None:
        return None
    scaled = _backward(model, anatomy, ids, scored, targets, _SCALED)
    return _why(model, anatomy, seen.place, seen, lambda _: scaled.place is None)


def is_finite(x: Any) -> bool:
    """Whether a tensor has numbers only; whatever is no tensor of floats has."""
    return not isinstance(x, Tensor) or not x.is_floating_point() or bool(torch.isfinite(x).all())


def _why(
    model: PreTrainedModel, anatomy: Anatomy, place: _Place, seen: _Seen, narrower: Callable[[nn.Module], bool | None]
) -> Finding:
    """The cause at a place; `narrower` tells whether less narrow a type would have done, None where it cannot tell."""
    broken = damaged(place.blamed, model) or damaged(_outside(model, anatomy), model)
    if broken and not holds_nan((*place.blamed, *_outside(model, anatomy))) and _is_narrow(model.dtype):
        name = str(model.dtype).removeprefix("torch.")
        return Finding(f"{place.where}: weights are infinite there, in {few(broken, 'tensors')}, as numbers are "
                       f"that do not fit into {name}: use the type bfloat16 or float32 (`dtype`); if they are infinite "
                       "in those, too, the checkpoint is damaged", ("dtype",))
    if broken:
        return Finding(f"{place.where}: the weights themselves are NaN or infinite there, in "
                       f"{few(broken, 'tensors')}; the checkpoint is damaged: download or convert it again")
    told = narrower(place.again) if place.again is not None else None
    if told if told is not None else seen.infinite:
        return _overflow(place, model.dtype)
    return Finding(f"{place.where}: all weights there are numbers, and it is no overflow"
                   f"{'' if told is None else ', since a wider type gives none either'}: the model computes none here "
                   "(such as 0/0 in a norm); leave out what is named, or repair the model's code")


def _is_narrow(dtype: torch.dtype) -> bool:
    """Whether numbers of ordinary size overflow in a type, as in float16."""
    return torch.finfo(dtype).max < torch.finfo(torch.bfloat16).max


def _overflow(place: _Place, dtype: torch.dtype) -> Finding:
    name = str(dtype).removeprefix("torch.")
    if _is_narrow(dtype):
        return Finding(f"{place.where}: all weights there are numbers, but {name} overflows (its largest number is "
                       f"{torch.finfo(dtype).max:.6g}): use the type bfloat16 or float32 (`dtype`)", ("dtype",))
    return Finding(f"{place.where}: all weights there are numbers, but {name} overflows beyond "
                   f"{torch.finfo(dtype).max:.1g}: weights are far too large, so convert the checkpoint again, or use "
                   "the type float64 (`dtype`)", ("dtype",))


def _twin_is_finite(module: nn.Module, args: Any, kwargs: Any) -> bool | None:
    """Whether a copy of the module in double precision gives numbers; None where there cannot be one."""
    try:
        twin = copy.deepcopy(module).double()
        return is_finite(first_output(twin(*_doubled(args), **_doubled(kwargs))))
    except _NO_TWIN:
        return None


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _doubled(item) for key, item in value.items()}
    return type(value)(map(_doubled, value)) if type(value) in (tuple, list) else value


def _backward(
    model: PreTrainedModel, anatomy: Anatomy, ids: Int[np.ndarray, " pos"], scored: Int[np.ndarray, " target"],
    targets: Int[np.ndarray, " target"], scale: float,
) -> _Seen:
    """The first place on the way back of the loss, times a scale, whose gradient is no number."""
    seen, places = _Seen(), list(_places(model, anatomy))
    with contextlib.ExitStack() as hooks, torch.enable_grad(), frozen(model), _picked(model, scored):
        hooks.callback(model.get_input_embeddings().register_forward_hook(_leaf).remove)
        for module, before, _, _ in places:
            def enter(module: nn.Module, args: Any, kwargs: Any, place: Any = before) -> Any:
                # A copy of its own: what goes back from other readers of the same tensor is not this part's.
                x = _read(args, kwargs)
                if x is None or not x.requires_grad:
                    return None
                own = x.clone()
                own.register_hook(lambda g: seen.take(place(g), g))  # type: ignore[no-untyped-call]
                return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": own})

            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        logits = model(**_inputs(model, ids), use_cache=False).logits[0].float()
        last = _Place("what the model makes of its logits", ())
        logits.register_hook(lambda g: seen.take(last, g))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).to(logits.device))
        (loss * scale).backward()  # type: ignore[no-untyped-call]
    return seen


def _leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


@contextlib.contextmanager
def _watched(model: PreTrainedModel, anatomy: Anatomy, seen: _Seen) -> Iterator[None]:
    """Look at what every part reads and puts out, in the order in which they run; hooks that were there come first."""
    with contextlib.ExitStack() as hooks:
        for module, _, entered, left in _places(model, anatomy):
            def enter(module: nn.Module, args: Any, kwargs: Any, place: Any = entered) -> None:
                x = _read(args, kwargs)
                if seen.place is None and x is not None:
                    seen.take(place(x), x)
                    # A copy: some blocks write into their input.
                    given = ((x.clone(), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x.clone()})
                    seen.inputs[module] = given

            def leave(module: nn.Module, args: Any, output: Any, place: Any = left) -> None:
                y = first_output(output)
                if seen.place is None and isinstance(y, Tensor):
                    shown = _without_masked(y) if module is model.get_output_embeddings() else y  # type: ignore[no-untyped-call]
                    seen.take(place(y), shown)
                    if seen.place is None:
                        seen.inputs.pop(module, None)

            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield


# A module, and the place to blame for what is no number: in the gradient of what it reads, in what it reads, and in
# what it puts out.
_At = Callable[[Tensor], _Place]
_Hooked = tuple[nn.Module, _At, _At, _At]


def _places(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[_Hooked]:
    """All parts of a model that are looked at."""
    names = {module: name for name, module in model.named_modules()}
    outside = tuple(_outside(model, anatomy))
    entry: nn.Module = model.get_input_embeddings()
    exit_: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    first = _at(_Place(f"the embeddings ({names[entry]})", (entry,)))
    yield entry, first, first, first
    for layer, part in enumerate(anatomy.layers):
        yield from _layer_places(part, layer, names, outside)
    for module in outside:
        if _is_norm(module):
            norm = _at(_Place(f"the norm {names[module]}", (module,), module))
            yield module, norm, norm, norm
    last = _at(_Place(f"the output layer ({names[exit_]})", (exit_,)))
    yield exit_, last, _at(_Place("what stands before the output layer", outside)), last


def _layer_places(
    part: LayerAnatomy, layer: int, names: dict[nn.Module, str], outside: tuple[nn.Module, ...]
) -> Iterator[_Hooked]:
    inside = [module for module in part.attention.modules() if module is not part.out_proj]
    heads_blamed = tuple(module for module in inside if not list(module.children()))
    stream = _Place(f"the residual stream of layer {layer}", (), part.block)
    before = stream if layer else _Place("what stands before layer 0", outside)
    attention = _Place(f"the attention of layer {layer}", (*heads_blamed, part.out_proj), part.block)
    ffn = _Place(f"L{layer}F, the FFN of layer {layer}", _ffn_modules(part), part.block)

    def read(z: Tensor) -> _Place:
        return _Place(_of_heads(part, layer, ~torch.isfinite(z).reshape(-1, part.num_heads, part.d_head)),
                      heads_blamed, part.block)

    def written(_: Tensor) -> _Place:
        where = f"the attention's output projection of layer {layer} ({names[part.out_proj]})"
        weight = by_feature(part)
        columns = None if weight is None else ~torch.isfinite(weight).reshape(1, part.num_heads, -1)
        if columns is not None and columns.any() and not columns.any(-1).all():
            where = _of_heads(part, layer, columns)
        return _Place(where, (part.out_proj,), part.block)

    yield part.block, _at(stream), _at(before), _at(stream)
    yield part.attention, _at(attention), _at(stream), _at(attention)
    yield part.out_proj, read, read, written
    for i, module in enumerate(_ffn_modules(part)):
        yield module, _at(ffn), _at(ffn if i else stream), _at(ffn)
    theirs = {*part.attention.modules(), *(m for module in _ffn_modules(part) for m in module.modules())}
    for module in part.block.modules():
        if module not in theirs and _is_norm(module):
            norm = _Place(f"the norm {names[module]} of layer {layer}", (module,), module)
            yield module, _at(norm), _at(stream), _at(norm)


def _at(place: _Place) -> _At:
    return lambda _: place


def _ffn_modules(part: LayerAnatomy) -> tuple[nn.Module, ...]:
    """The FFN's module and its output; where it has none of its own, the block's matrices that are not attention's."""
    if part.ffn is not None:
        return (part.ffn, part.ffn_output) if part.ffn is not part.ffn_output else (part.ffn,)
    attention = set(part.attention.modules())
    loose = [m for m in part.block.children() if hasattr(m, "in_features") and m not in attention]
    return (*(m for m in loose if m is not part.ffn_output), part.ffn_output)


def _outside(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[nn.Module]:
    """Modules without children that are in no block, the embeddings of tokens and the output layer left out."""
    blocks = {module for part in anatomy.layers for module in part.block.modules()}
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}  # type: ignore[no-untyped-call]
    for module in model.modules():
        if module not in blocks and module not in ends and not list(module.children()):
            yield module


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return not list(module.children()) and bool(own) and all(p.dim() == 1 for p in own)


def _of_heads(part: LayerAnatomy, layer: int, bad: Bool[Tensor, "row head features"]) -> str:
    gone = torch.nonzero(bad.any(-1).any(0)).flatten().tolist()
    if len(gone) == part.num_heads > 1:
        return f"all heads of layer {layer} (L{layer}H0 to L{layer}H{part.num_heads - 1})"
    return heads_named([(layer, h) for h in gone])


def _read(args: Any, kwargs: Any) -> Tensor | None:
    x = args[0] if args else kwargs.get("hidden_states")
    return x if isinstance(x, Tensor) and x.is_floating_point() else None


def _without_masked(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.isneginf(logits), 0)


def _inputs(model: PreTrainedModel, ids: Int[np.ndarray, " pos"]) -> dict[str, Tensor]:
    # With a position of padding, so that the kernel is given a mask: see `headcount.engine.pack`.
    given = torch.from_numpy(np.append(ids, ids[0]).astype(np.int64))[None].to(device_of(model))
    return {"input_ids": given, "attention_mask": (torch.arange(given.shape[1]) < len(ids))[None].to(given)}


@contextlib.contextmanager
def _picked(model: PreTrainedModel, scored: Int[np.ndarray, " scored"] | None) -> Iterator[None]:
    """Give the output layer these positions of the one text only; None: all."""
    if scored is None:
        yield
        return
    positions = torch.from_numpy(scored)
    with scored_only(model, torch.zeros_like(positions), positions):
        yield
