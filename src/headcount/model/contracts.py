"""Proof, on the user's own model, that heads and FFNs are where the anatomy says: contracts of meaning.

1. Identity. With all heads and FFNs gated to 0, every block hands on its input plus the bias of the attention's output
   projection: what is left of a block is what the removal of its heads and FFN leaves. A norm on a branch's output
   (Gemma-2, OLMo-2) turns the bias into norm(bias) and an FFN's zero into norm(0); where the norm follows the residual
   add (OPT-350M), the block is norm(norm(x + bias)). A factor on the branches (Granite) scales the bias, one on the
   whole block (Gemma-4) everything. What a branch adds that is neither attention nor FFN (Gemma-4's per-layer
   embeddings) stays, and is told by the norm that it ends with.
2. Head slice. Slice h of the output projection's input depends on head h's attention probabilities alone: in the
   gradient of slice h, the part of every other head is exactly 0, and its own is not. For this the model runs eager
   attention, a few tokens long, and gets its own kernel back.

Contracts 3, 4 and 5, that the model can be run layer by layer, that requests are scored as it scores them, and that
gradients reach heads and FFNs, are of the engine (`headcount.engine.proof`).

Shapes are not tested: a gate at the wrong place has the right shape (the FFN module's output on BLOOM and MPT).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from headcount.masks import Mask
from headcount.model.anatomy import Anatomy, LayerAnatomy, find_anatomy
from headcount.model.attention import eager
from headcount.model.devices import device_of, doubled
from headcount.model.hooks import ablated, first_output, frozen
from headcount.model.load import LoadedModel
from headcount.model.offloaded import present

PROBE_TOKENS = 8
# Rounding of a few additions, in units of the dtype's precision at the largest value.
_ROUNDINGS = 32
# The last norm of a branch that is neither attention nor FFN.
_OTHER_BRANCHES = ("post_per_layer_input_norm",)
_SMALLEST_SCALE = 1e-3
# What a model raises whose parts are not what they seem to be.
FAILURES = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class ContractResult:
    """Whether a contract holds.

    Args:
        name: What was proved.
        holds: Whether it holds in every layer.
        worst_error: The largest deviation, relative to the values compared; None where none is measured.
        detail: Where and how it fails, or what was seen; may be empty.
    """

    name: str
    holds: bool
    worst_error: float | None
    detail: str


def verify(model: LoadedModel | PreTrainedModel, anatomy: Anatomy | None = None) -> list[ContractResult]:
    """Test the first two contracts in every layer of a model, with one short forward pass each.

    Args:
        model: In eval mode.
        anatomy: What is claimed; by default what `load` or `find_anatomy` found.
    """
    if isinstance(model, LoadedModel):
        anatomy, model = anatomy or model.anatomy, model.model
    anatomy = anatomy or find_anatomy(model)
    ids = probe_tokens(model)
    return [_identity(model, anatomy, ids), _head_slices(model, anatomy, ids)]


def probe_tokens(model: PreTrainedModel) -> Int[Tensor, "batch pos"]:
    """A row of a few random tokens, the same every time."""
    embeddings: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    # Past the first ids, where padding and other special tokens tend to be.
    size = int(embeddings.weight.shape[0])
    return torch.randint(min(10, size // 2), size, (1, PROBE_TOKENS), generator=generator).to(device_of(model))


@dataclass
class _Trace:
    """A block's input and output; its norms in the order they ran, with input and output; other branches' output.

    `times` tells how often the block ran in the pass; tensors are those of the last time.
    """

    times: int
    entered: Tensor
    left: Tensor
    norms: list[tuple[Tensor, Tensor]]
    others: list[Tensor]


def _identity(model: PreTrainedModel, anatomy: Anatomy, ids: Int[Tensor, "batch pos"]) -> ContractResult:
    name = "with all heads and FFNs off, blocks pass their input on"
    nothing = Mask([[False] * n for n in anatomy.heads_per_layer], [False] * anatomy.num_layers)
    try:
        with torch.no_grad(), ablated(anatomy, nothing), _traced(anatomy) as traces:
            model(input_ids=ids, use_cache=False)
    except torch.OutOfMemoryError:  # says nothing of the model
        raise
    except FAILURES as failure:
        # A gate at a wrong place can leave shapes that do not fit.
        return ContractResult(name, False, float("inf"), f"run so, with use_cache=False, blocks failed "
                              f"({type(failure).__name__}: {failure}): its forward takes no such argument, or a head "
                              "or FFN is not where the anatomy says")
    if again := [f"block {i} runs {trace.times} times" for i, trace in sorted(traces.items()) if trace.times > 1]:
        return ContractResult(name, False, float("inf"), f"{again[0]} in one pass: what is removed from it is removed "
                              "each time, so that such layers cannot be measured")
    worst, where = 0.0, -1
    for i, part in enumerate(anatomy.layers):
        error = _identity_error(traces[i], _bias(part.out_proj)) if i in traces else float("inf")
        if not error <= worst:
            worst, where = error, i
    holds = worst <= _ROUNDINGS * torch.finfo(model.dtype).eps
    return ContractResult(name, holds, worst, "" if holds else f"block {where} does more than pass its input on: a "
                          "head or FFN of it is not where the anatomy says, or another part of it adds to the residual "
                          "stream")


@contextlib.contextmanager
def _traced(anatomy: Anatomy) -> Iterator[dict[int, _Trace]]:
    traces: dict[int, _Trace] = {}
    with contextlib.ExitStack() as hooks:
        for i, part in enumerate(anatomy.layers):
            for handle in _trace_block(part, i, traces):
                hooks.callback(handle.remove)
        yield traces


def _trace_block(
    part: LayerAnatomy, index: int, traces: dict[int, _Trace]
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    norms: list[tuple[Tensor, Tensor]] = []
    others: list[Tensor] = []
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # A copy: some blocks add to their input in place.
        entered.append((args[0] if args else kwargs["hidden_states"]).clone())

    def normed(module: nn.Module, args: Any, output: Any) -> None:
        # Not every part with vectors for weights is a norm (a state-space mixer beside attention is none).
        if isinstance(output, Tensor) and args and args[0].numel() == output.numel():
            norms.append((args[0].clone(), output.clone()))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        traces[index] = _Trace(len(entered), entered[-1], first_output(output).clone(), norms, others)

    def beside(module: nn.Module, args: Any, output: Tensor) -> None:
        others.append(output.clone())

    for name, child in part.block.named_children():
        if name in _OTHER_BRANCHES:
            yield child.register_forward_hook(beside)
            continue
        own = list(child.parameters(recurse=False))
        if child is not part.attention and own and all(p.dim() == 1 for p in own):
            yield child.register_forward_hook(normed)
    yield part.block.register_forward_pre_hook(enter, with_kwargs=True)
    yield part.block.register_forward_hook(leave)


def _bias(projection: nn.Module) -> Tensor | None:
    with present(projection):
        bias = getattr(projection, "bias", None)
        return bias.detach().clone() if isinstance(bias, Tensor) else None


def _identity_error(trace: _Trace, bias: Tensor | None) -> float:
    """How far a gated block is from what the first contract says, relative to the largest value in it."""
    out = doubled(trace.left)
    # It may come from the device of the block before.
    x = doubled(trace.entered).to(out)
    b = torch.zeros(x.shape[-1]).to(x) if bias is None else bias.to(x)
    last = trace.norms[-1][1] if trace.norms else None
    if last is not None and last.numel() == out.numel() and torch.equal(last.reshape(out.shape), trace.left):
        # The block ends with a norm: each norm must read what the one before wrote, and the first x + bias.
        expected = [x + b, *(doubled(after) for _, after in trace.norms[:-1])]
        return max(relative_error(doubled(before).reshape(x.shape), e.reshape(x.shape))
                   for (before, _), e in zip(trace.norms, expected, strict=True))
    added = b.expand_as(x)
    norm_of_zero = torch.zeros_like(x)
    for before, after in ((doubled(n[0]), doubled(n[1])) for n in trace.norms if n[0].numel() == x.numel()):
        before, after = before.reshape(x.shape), after.reshape(x.shape)
        if not before.any():
            norm_of_zero = norm_of_zero + after
        elif torch.equal(before, b.expand_as(x)):
            added = after
    norm_of_zero = sum((doubled(other) for other in trace.others), norm_of_zero)
    left_over = out - x - norm_of_zero
    # What the block multiplies its branches with, found by least squares; it cannot hide what depends on x.
    square = (added * added).sum()
    factor = (left_over * added).sum() / square if square > 0 else torch.ones(()).to(x)
    whole = x + norm_of_zero + added
    errors = [relative_error(out, whole), relative_error(out, x + norm_of_zero + factor * added)]
    # A factor of the whole block; a block that hands on nothing (its residual was gated too) is none of it.
    scale = float((out * whole).sum() / (whole * whole).sum())
    return min(*errors, relative_error(out, scale * whole) if abs(scale) > _SMALLEST_SCALE else 1.0)


def relative_error(a: Float[Tensor, "*_"], b: Float[Tensor, "*_"]) -> float:
    """The largest difference of two tensors, relative to the largest value in them; infinite where it is no number."""
    error = float((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-30))
    return float("inf") if error != error else error  # no comparison with NaN holds


def _head_slices(model: PreTrainedModel, anatomy: Anatomy, ids: Int[Tensor, "batch pos"]) -> ContractResult:
    name = "a head's slice depends on its own attention alone"
    try:
        return _slices(name, model, anatomy, ids)
    except torch.OutOfMemoryError:  # says nothing of the model
        raise
    except FAILURES as failure:
        return ContractResult(name, False, float("inf"), "run with eager attention and output_attentions=True, it "
                              f"failed ({type(failure).__name__}: {failure})")


def _slices(name: str, model: PreTrainedModel, anatomy: Anatomy, ids: Int[Tensor, "batch pos"]) -> ContractResult:
    # Layers of which all heads were removed attend to nothing.
    attending = [(layer, part) for layer, part in enumerate(anatomy.layers) if part.num_heads]
    with eager(model), frozen(model), torch.enable_grad(), _differentiable(model):
        # Asked last: two families (Falcon, OpenAI-GPT) hand their probabilities out only then.
        errors = _layer_by_layer(model, anatomy, ids)
        if len(errors) != len(attending):
            errors = _layer_by_layer(model, anatomy, ids, output_attentions=True)
        if len(errors) != len(attending):
            return ContractResult(name, False, float("inf"), "the model hands out no attention probabilities of "
                                  "every layer, or computes them without gradients: it has layers whose attention is "
                                  "not ordinary")
    worst, where = 0.0, ""
    for layer, (error, head) in sorted(errors.items()):
        if not error <= worst:
            worst, where = error, f"L{layer}H{head}"
    return ContractResult(name, worst == 0, worst, "" if worst == 0 else f"{where} is not a head of its own: the "
                          "number of heads or the output projection is wrong, or the model mixes its heads before it"
                          f"{_removed_before(anatomy)}")


def _layer_by_layer(
    model: PreTrainedModel, anatomy: Anatomy, ids: Int[Tensor, "batch pos"], **told: bool
) -> dict[int, tuple[float, int]]:
    """Each layer's error, found as soon as the layer has run; of layers whose attention hands out its probabilities.

    The graph ends with each block, and the model is given no probabilities to keep: no more than one block's weights
    are kept for them.
    """
    found: dict[int, tuple[float, int]] = {}
    seen: list[Tensor] = []
    length = len(ids[0])

    def attended(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple | list):
            return output
        seen[:] = [one for one in output if isinstance(one, Tensor) and one.dim() == 4
                   and one.shape[-2:] == (length, length) and one.requires_grad]
        return type(output)(one.new_empty(0) if any(one is other for other in seen) else one for one in output)

    with _projected(anatomy) as projected, contextlib.ExitStack() as hooks:
        for i, part in enumerate(anatomy.layers):
            def left(module: nn.Module, args: Any, output: Any, layer: int = i) -> Any:
                if len(seen) == 1 and anatomy.layers[layer].num_heads and layer in projected:
                    found[layer] = _layer_error(anatomy.layers[layer], projected.pop(layer), seen[0])
                seen.clear()
                hidden = first_output(output).detach().requires_grad_()
                return type(output)([hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden

            hooks.callback(part.attention.register_forward_hook(attended).remove)
            hooks.callback(part.block.register_forward_hook(left).remove)
        model(input_ids=ids, use_cache=False, **told)
    return found


def _layer_error(
    part: LayerAnatomy, z: Float[Tensor, "*_"], attention: Float[Tensor, "batch head pos pos"]
) -> tuple[float, int]:
    """A layer's worst error, and the head; unlike in `captured` nothing may fail where the anatomy is wrong."""
    pos = attention.shape[-1]
    z = z.reshape(1, pos, -1)
    fits = z.shape[-1] == part.num_heads * part.d_head and attention.shape[1] == part.num_heads
    return _slice_error(z.reshape(1, pos, part.num_heads, -1), attention) if fits else (float("inf"), 0)


def _removed_before(anatomy: Anatomy) -> str:
    """Says that layers were built for other numbers of heads than the config's, as where heads were removed already."""
    for layer, part in enumerate(anatomy.layers):
        said = getattr(part.attention, "head_dim", None)
        width = part.num_heads * part.d_head
        if isinstance(said, int) and said > 0 and width % said == 0 and width // said != part.num_heads:
            return (f"; layer {layer} holds {width // said} heads of {said}, the config says {part.num_heads} "
                    "(were heads removed before, or are they named otherwise there?)")
    return ""


@contextlib.contextmanager
def _projected(anatomy: Anatomy) -> Iterator[dict[int, Tensor]]:
    """What each layer's output projection reads, inside the graph."""
    projected: dict[int, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for i, part in enumerate(anatomy.layers):
            def hook(module: nn.Module, args: Any, layer: int = i) -> None:
                projected[layer] = args[0]

            hooks.callback(part.out_proj.register_forward_pre_hook(hook).remove)
        yield projected


def _slice_error(
    z: Float[Tensor, "batch pos head d_head"], attention: Float[Tensor, "batch head pos pos"]
) -> tuple[float, int]:
    """The share of a slice's gradient that falls on other heads (1 where none falls on its own), and the worst head."""
    errors = []
    for h in range(z.shape[2]):
        # A random direction, so that nothing cancels in the sum.
        direction = torch.randn(z[:, :, h].shape, generator=torch.Generator().manual_seed(h)).to(z)
        (gradient,) = torch.autograd.grad(z[:, :, h], attention, direction, retain_graph=True, allow_unused=True)
        parts = torch.zeros(z.shape[2]) if gradient is None else gradient.float().abs().sum((0, 2, 3)).cpu()
        own = float(parts[h])
        foreign = float(parts[:h].sum() + parts[h + 1 :].sum())
        # A head that writes nothing, as one whose values were set to zero, depends on nothing.
        idle = own == foreign == 0 and not z[:, :, h].any()
        errors.append(foreign / (own + foreign) if own > 0 and foreign < float("inf") else float(not idle))
    worst = max(range(len(errors)), key=errors.__getitem__)
    return errors[worst], worst


@contextlib.contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Let gradients start at the embeddings, since no parameter asks for any."""
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
