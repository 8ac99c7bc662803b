"""Gradient scores of heads and FFNs, example by example: one forward and one backward pass through activations.

With z[l,h,t] the slice h of the input of layer l's attention output projection at position t, and L_n the mean
cross-entropy (nats) of example n's continuation, over the T_n positions that the model reads,

    example:   abs(sum_t z[l,h,t] . dL_n/dz[l,h,t])            (Bansal et al. 2023, equation 8)
    position:  1/T_n sum_t abs(z[l,h,t] . dL_n/dz[l,h,t])      (their released code)

For an FFN z is the output of its down-projection. Every example is a row of its own, because abs does not pass through
a sum over examples; the loss is summed over rows, so that no score depends on the batch. Parameters are frozen.

A norm on a branch's output (Gemma-2 and -3, OLMo-2 and -3, GLM-4, EXAONE-4, ...) takes its length away before it is
added to the residual stream. Then z . dL/dz is 0 but for rounding for the FFN, and adds up to 0 over a layer's heads.
There the product is of dL/dy, with y = norm(u) what the residual stream is given, and of what removal takes from y:

    FFN:   (y - norm(0)) . dL/dy            norm(0), a norm's bias, is what removal leaves
    head:  (y - norm(u - c[h])) . dL/dy     u = sum_h c[h] + bias, c[h] = W_O[h] z[h] what head h writes

Both are the first-order change of the loss from y on, as z . dL/dz is from z on where no norm follows; only the norm is
taken as it is, not by its derivative. So a head that writes little next to its branch has its z . dL/dz, and one that
is its whole branch has the branch's score, where the derivative says 0. To hold the norm's scale fast instead, whose
parts add up to the branch's score, ranks the heads of Gemma-3-270M less like their oracle (docs/design.md). Gradients
of lower layers pass the norm itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headcount.engine.pack import Batch
from headcount.engine.treemask import model_inputs
from headcount.errors import ModelError, few
from headcount.model.anatomy import LayerAnatomy
from headcount.model.circuits import parts_behind_norm
from headcount.model.devices import on_device
from headcount.model.hooks import Activations, captured, scored_only
from headcount.model.load import LoadedModel
from headcount.model.norms import LayerNorms, norm_of_nothing

Scores = tuple[Float[Tensor, "score example head"], Float[Tensor, "score example ffn"]]


def batch_scores(loaded: LoadedModel, batch: Batch) -> Scores:
    """The two scores of every row of a batch; parameters should be frozen."""
    rows, positions = on_device(batch.rows, loaded.device), on_device(batch.positions, loaded.device)
    catching = captured(loaded.anatomy, gradients=True, norms=loaded.norms)
    with torch.enable_grad(), catching as caught, scored_only(loaded.model, rows, positions):
        logits = loaded.model(**model_inputs(loaded, batch), use_cache=False).logits[0]
        # Heads behind a norm are reached from what it wrote.
        attention = [caught.attention.get(layer, z) for layer, z in enumerate(caught.heads)]
        gradients = gradients_of(loss_of(logits, batch), [*attention, *caught.ffns], int(batch.lengths.max()))
    layers = len(caught.heads)
    real = real_positions(batch)
    parts = [layer_scores(loaded, layer, caught, layer, (gradients[layer], gradients[layers + layer]), real)
             for layer in range(layers)]
    # Where layers lie on several devices, the scores are brought together on the last one.
    heads, ffns = ([one.to(logits.device) for one in of] for of in zip(*parts, strict=True))
    return torch.cat(heads, -1), torch.cat(ffns, -1)


def loss_of(logits: Float[Tensor, "target vocabulary"], batch: Batch) -> Float[Tensor, ""]:
    """The mean cross-entropy over each example's targets, summed over examples: rows do not touch one another."""
    targets = on_device(batch.targets, logits.device)
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    weights = 1 / on_device(np.bincount(batch.rows)[batch.rows], losses.device).to(losses)
    return (losses * weights).sum()


def real_positions(batch: Batch) -> Callable[[torch.device], Bool[Tensor, "batch pos"]]:
    """Which positions are no padding, on any device."""
    mask = np.arange(batch.ids.shape[1])[None] < batch.lengths[:, None]
    return functools.cache(functools.partial(on_device, mask))


def layer_scores(
    loaded: LoadedModel, layer: int, caught: Activations, place: int, gradients: tuple[Tensor, Tensor],
    real: Callable[[torch.device], Bool[Tensor, "batch pos"]],
) -> Scores:
    """Both scores of one layer's heads and of its FFN.

    Args:
        loaded: The model.
        layer: Which of its layers.
        caught: What the layer put out.
        place: Where that stands in it.
        gradients: Of the loss, by what heads and the FFN put out.
        real: From `real_positions`.
    """
    norms = loaded.norms.get(layer, LayerNorms())
    heads, ffn = gradients
    of_heads = _head_parts(loaded.anatomy.layers[layer], norms, caught, place, heads)
    of_ffn = _ffn_parts(norms, caught.ffns[place], ffn)
    return _reduce(of_heads, real(of_heads.device)), _reduce(of_ffn, real(of_ffn.device))


def gradients_of(
    loss: Float[Tensor, "*_"], of: Sequence[Tensor], length: int, by: Tensor | None = None, layer: int | None = None
) -> tuple[Tensor, ...]:
    """Gradients of heads' outputs of every layer, and then of FFNs'.

    Args:
        loss: What is differentiated.
        of: By what: as many heads' outputs as FFNs'; of one layer alone, what it was given may stand behind the two.
        length: Of the longest text.
        by: The gradient of what `loss` is a part of, where it is no single number.
        layer: Which layer it is, where it is one alone.

    Raises:
        ModelError: Where the model cuts them, as it may for long texts alone.
    """
    found: Sequence[Tensor | None] = [None] * len(of)
    reached = [i for i, tensor in enumerate(of) if tensor.requires_grad]
    if loss.requires_grad and reached:
        given = dict(zip(reached, torch.autograd.grad(loss, [of[i] for i in reached], by, allow_unused=True),
                         strict=True))
        found = [given.get(i) for i in range(len(of))]
    # A layer that has lost all its heads has none to score.
    found = [torch.zeros_like(tensor) if not tensor.numel() else known for tensor, known in zip(of, found, strict=True)]
    layers = 1 if layer is not None else len(of) // 2
    cut = [("heads" if i < layers else "FFN") + f" of layer {layer if layer is not None else i % layers}"
           for i, gradient in enumerate(found[: 2 * layers]) if gradient is None]
    if cut:
        raise ModelError(f"no gradient reaches the {few(cut)} where texts have {length} tokens: the model cuts it, and "
                         "cannot be scored by gradients")
    return tuple(torch.zeros_like(tensor) if gradient is None else gradient
                 for tensor, gradient in zip(of, found, strict=True))


def _head_parts(
    part: LayerAnatomy, norms: LayerNorms, caught: Activations, place: int, gradient: Float[Tensor, "batch pos *_"]
) -> Float[Tensor, "batch pos head"]:
    z = caught.heads[place].detach()
    norm = norms.attention if place in caught.attention else None
    if norm is None:
        return (z.float() * gradient.float()).sum(-1)
    return parts_behind_norm(part, norm, z, caught.attention[place].detach(), gradient)


def _ffn_parts(
    norms: LayerNorms, ffn: Float[Tensor, "batch pos d_model"], gradient: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos 1"]:
    z = ffn.detach().float()
    if norms.ffn is not None:
        # Without the FFN, a norm that has a bias still writes that.
        z = z - norm_of_nothing(norms.ffn).to(z.device)
    return (z * gradient.float()).sum(-1, keepdim=True)


def _reduce(
    products: Float[Tensor, "batch pos component"], real: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "score batch component"]:
    # Written, not multiplied: what stands on padding need not be a number.
    products = products.masked_fill(~real[..., None], 0)
    position = products.abs().sum(1) / real.to(products).sum(1)[:, None]
    example = products.sum(1).abs()
    return torch.stack([position, example])
