"""Gates: heads and FFNs switched off, or watched, by hooks on the untouched model.

A head is the slice of the out-projection's *input* that it fills; an FFN is the *output* of its down projection
(gating the FFN module's output is wrong on BLOOM and MPT, which add the residual inside). Hooks act out of place and
are gone when the `with` block ends, however it ends. Zeros are written, not multiplied in, so that a NaN or an
infinity of a removed component cannot leak.

For gradients, a tensor that no parameter asks gradients of is made a leaf where it is caught: with all parameters
`frozen`, one forward and one backward pass for all heads and FFNs costs about two forward passes, not the four of
Michel et al. (2019), whose gradient importance (activation x gradient) this serves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from headcount.masks import Mask
from headcount.model.anatomy import Anatomy, LayerAnatomy
from headcount.model.devices import on_device
from headcount.model.norms import LayerNorms


def first_output(output: Any) -> Any:
    """What a module puts out; of a tuple or list, as blocks and attention give, its first member."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


@contextlib.contextmanager
def ablated(anatomy: Anatomy, mask: Mask) -> Iterator[None]:
    """Run the model without the heads and FFNs that the mask leaves out; layers that keep all are not touched.

    Raises:
        OptionError: If the mask describes a model of other numbers of heads.
    """
    anatomy.check(mask)
    with contextlib.ExitStack() as layers:
        for part, heads, ffn in zip(anatomy.layers, mask.heads, mask.ffns, strict=True):
            layers.enter_context(layer_ablated(part, heads, bool(ffn)))
        yield


@contextlib.contextmanager
def layer_ablated(part: LayerAnatomy, heads: Bool[np.ndarray, " head"], ffn: bool) -> Iterator[None]:
    """Run one layer without the heads that are false, and without its FFN where that is false."""
    with contextlib.ExitStack() as hooks:
        if not heads.all():
            gate = _head_gate(np.repeat(~heads, part.d_head))
            hooks.callback(part.out_proj.register_forward_pre_hook(gate).remove)
        if not ffn:
            for handle in _ffn_gate(part):
                hooks.callback(handle.remove)
        yield


@contextlib.contextmanager
def scored_only(
    model: PreTrainedModel, rows: Int[Tensor, " scored"], positions: Int[Tensor, " scored"]
) -> Iterator[None]:
    """Give the output layer the hidden states of these positions only, as one row."""

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), positions.to(hidden.device)][None], *args[1:])

    output_layer: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    handle = output_layer.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Run the model without the gates that are open on it, which come back afterwards; others' hooks stay."""
    both = [hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    before = [(hooks, dict(hooks)) for hooks in both
              if any(getattr(hook, "__module__", "") == __name__ for hook in hooks.values())]
    try:
        for hooks, all_hooks in before:
            for key, hook in all_hooks.items():
                if getattr(hook, "__module__", "") == __name__:
                    del hooks[key]
        yield
    finally:
        for hooks, all_hooks in before:
            # What others have added meanwhile (transformers watches attention so) stays, behind what was there.
            added = {key: hook for key, hook in hooks.items() if key not in all_hooks}
            hooks.clear()
            hooks.update(all_hooks | added)


@dataclass
class Activations:
    """What the last forward pass put out, layer by layer; inside the graph where gradients were asked for.

    Shapes: `heads` per layer "batch pos head d_head", the input of the output projection as it was passed on; `ffns`
    per layer "batch pos d_model"; `attention` alike, what a norm on attention's output put out, of layers that have one
    and where norms were named.
    """

    heads: list[Tensor] = field(default_factory=list)
    ffns: list[Tensor] = field(default_factory=list)
    attention: dict[int, Tensor] = field(default_factory=dict)


@contextlib.contextmanager
def captured(
    anatomy: Anatomy, *, gradients: bool, norms: Mapping[int, LayerNorms] | None = None
) -> Iterator[Activations]:
    """Catch every head's and FFN's output during one forward pass; a further pass replaces what was caught.

    Gates that were opened before are seen, later ones are not. With `gradients`, what is passed on is made of the
    tensors that are caught, so `torch.autograd.grad(loss, [*activations.heads, *activations.ffns])` works, also where
    all parameters are frozen. Without, they are detached.

    Args:
        anatomy: Where heads and FFNs are.
        gradients: Whether what is caught is to be inside the graph.
        norms: Norms on branches' output, by layer: an FFN's output is then what its norm makes of it, which is what the
            residual stream is given, and attention's is caught too.
    """
    norms = norms or {}
    activations = Activations()
    # Layers in which blocks run their FFN beside or before attention still fill their own place.
    shapes: list[tuple[int, int]] = [(0, 0)] * anatomy.num_layers

    def restart(module: nn.Module, args: Any, kwargs: Any) -> None:
        activations.heads = [torch.empty(0)] * anatomy.num_layers
        activations.ffns = [torch.empty(0)] * anatomy.num_layers
        activations.attention = {}

    with contextlib.ExitStack() as hooks:
        first = anatomy.layers[0].block
        hooks.callback(first.register_forward_pre_hook(restart, with_kwargs=True).remove)
        for i, part in enumerate(anatomy.layers):
            for handle in _capture_layer(part, norms.get(i, LayerNorms()), i, activations, shapes, gradients):
                hooks.callback(handle.remove)
        yield activations


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Ask no gradients of any parameter; each gets its own setting back."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)


def _head_gate(removed: Bool[np.ndarray, " features"]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    gate = functools.cache(functools.partial(on_device, removed))

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].masked_fill(gate(args[0].device), 0), *args[1:])

    return hook


def _ffn_gate(part: LayerAnatomy) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Zeros for the FFN's output; an FFN whose input is known is given no positions, and computes nothing."""
    shape: tuple[int, ...] | None = None

    def starve(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal shape
        shape = tuple(args[0].shape[:-1])
        return (args[0][..., :0, :], *args[1:])

    def gate(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # A block of experts may put out its routing too.
        first = output[0] if isinstance(output, tuple) else output
        zeros = first.new_zeros(first.shape if shape is None else (*shape, first.shape[-1]))
        return (zeros, *output[1:]) if isinstance(output, tuple) else zeros

    if part.ffn_input is not None:
        yield part.ffn_input.register_forward_pre_hook(starve)
    yield part.ffn_output.register_forward_hook(gate)


def _capture_layer(
    part: LayerAnatomy, norms: LayerNorms, index: int, activations: Activations, shapes: list[tuple[int, int]],
    gradients: bool,
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Several residual streams, where there are such (Hunyuan-4), stand behind the positions.
        hidden = args[0] if args else kwargs["hidden_states"]
        shapes[index] = (hidden.shape[0], hidden.shape[1])

    def head(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        activations.heads[index] = _caught(args[0], (*shapes[index], part.num_heads, part.d_head), gradients)
        return (activations.heads[index].reshape(args[0].shape), *args[1:]) if gradients else args

    def branch(caught: list[Tensor] | dict[int, Tensor], module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        caught[index] = _caught(first, (*shapes[index], part.d_model), gradients)
        # A copy goes on, since some blocks add the residual to it in place (Falcon).
        passed = (caught[index] if gradients else first).reshape(first.shape).clone()
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    yield part.block.register_forward_pre_hook(enter, with_kwargs=True)
    yield part.out_proj.register_forward_pre_hook(head)
    if norms.attention is not None:
        yield norms.attention.register_forward_hook(lambda *call: branch(activations.attention, *call))
    last = part.ffn_output if norms.ffn is None else norms.ffn
    yield last.register_forward_hook(lambda *call: branch(activations.ffns, *call))


def _caught(x: Float[Tensor, "*_"], shape: tuple[int, ...], gradients: bool) -> Float[Tensor, "*_"]:
    if not gradients:
        return x.detach().reshape(shape)
    # A leaf of the right shape, or a node of the graph: either way what is passed on is computed from it.
    return x.reshape(shape) if x.requires_grad else x.detach().reshape(shape).requires_grad_()
