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
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headcount.engine.forward import Progress, Told, in_memory
from headcount.engine.pack import Batch
from headcount.engine.treemask import model_inputs
from headcount.errors import ModelError, few
from headcount.model.circuits import parts_behind_norm
from headcount.model.devices import on_device
from headcount.model.hooks import Activations, captured, frozen, scored_only
from headcount.model.load import LoadedModel
from headcount.model.norms import norm_of_nothing


class ExampleScores(NamedTuple):
    """The two scores, "position" and "example" in this order, of every example in nats; heads by layer, then index."""

    heads: Float[np.ndarray, "score=2 example head"]
    ffns: Float[np.ndarray, "score=2 example ffn"]


def example_scores(
    loaded: LoadedModel, packed: Sequence[Batch], num_examples: int, progress: Progress | None = None
) -> ExampleScores:
    """Scores of all heads and FFNs for every example; whether they are numbers is the caller's to look at.

    Args:
        loaded: The model.
        packed: Batches of single rows, each an example.
        num_examples: How many examples they hold.
        progress: Called with the number of tokens after each batch.

    Raises:
        ModelError: If memory is too small for one example.
    """
    heads = np.zeros((2, num_examples, loaded.anatomy.num_heads))
    ffns = np.zeros((2, num_examples, loaded.anatomy.num_layers))
    with frozen(loaded.model):
        measured = []
        for batch, scores in in_memory(packed, lambda batch: batch_scores(loaded, batch), Told(progress)):
            measured.append((batch.requests[np.unique(batch.rows, return_index=True)[1]], scores))
    # Only now copied to the host: each copy waits for the device.
    for examples, (of_heads, of_ffns) in measured:
        heads[:, examples], ffns[:, examples] = of_heads.cpu().double().numpy(), of_ffns.cpu().double().numpy()
    return ExampleScores(heads, ffns)


def batch_scores(
    loaded: LoadedModel, batch: Batch
) -> tuple[Float[Tensor, "score example head"], Float[Tensor, "score example ffn"]]:
    """The two scores of every row of a batch; parameters should be frozen."""
    rows, positions = on_device(batch.rows, loaded.device), on_device(batch.positions, loaded.device)
    catching = captured(loaded.anatomy, gradients=True, norms=loaded.norms)
    with torch.enable_grad(), catching as caught, scored_only(loaded.model, rows, positions):
        logits = loaded.model(**model_inputs(loaded, batch), use_cache=False).logits[0].float()
        targets = on_device(batch.targets, logits.device)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        # Mean over each example's targets, then the sum over examples: rows do not touch one another.
        weights = 1 / on_device(np.bincount(batch.rows)[batch.rows], losses.device).to(losses)
        # Heads behind a norm are reached from what it wrote.
        attention = [caught.attention.get(layer, z) for layer, z in enumerate(caught.heads)]
        gradients = _gradients((losses * weights).sum(), [*attention, *caught.ffns], int(batch.lengths.max()))
    mask = np.arange(batch.ids.shape[1])[None] < batch.lengths[:, None]
    real = functools.cache(functools.partial(on_device, mask))
    layers = len(caught.heads)
    of_heads = (_head_parts(loaded, caught, layer, g) for layer, g in enumerate(gradients[:layers]))
    of_ffns = (_ffn_parts(loaded, caught, layer, g) for layer, g in enumerate(gradients[layers:]))
    # Where layers lie on several devices, the scores are brought together on the last one.
    heads, ffns = ([_reduce(p, real(p.device)).to(logits.device) for p in parts] for parts in (of_heads, of_ffns))
    return torch.cat(heads, -1), torch.cat(ffns, -1)


def _gradients(loss: Float[Tensor, ""], of: Sequence[Tensor], length: int) -> tuple[Tensor, ...]:
    """Gradients of heads' and FFNs' outputs, layer by layer.

    Raises:
        ModelError: Where the model cuts them, as it may for long texts alone.
    """
    found: Sequence[Tensor | None] = [None] * len(of)
    reached = [i for i, tensor in enumerate(of) if tensor.requires_grad]
    if loss.requires_grad and reached:
        given = dict(zip(reached, torch.autograd.grad(loss, [of[i] for i in reached], allow_unused=True), strict=True))
        found = [given.get(i) for i in range(len(of))]
    # A layer that has lost all its heads has none to score.
    found = [torch.zeros_like(tensor) if not tensor.numel() else known for tensor, known in zip(of, found, strict=True)]
    cut = [("heads" if i < len(of) // 2 else "FFN") + f" of layer {i % (len(of) // 2)}"
           for i, gradient in enumerate(found) if gradient is None]
    if cut:
        raise ModelError(f"no gradient reaches the {few(cut)} where texts have {length} tokens: the model cuts it, and "
                         "cannot be scored by gradients")
    return tuple(gradient for gradient in found if gradient is not None)


def _head_parts(
    loaded: LoadedModel, caught: Activations, layer: int, gradient: Float[Tensor, "batch pos *_"]
) -> Float[Tensor, "batch pos head"]:
    z = caught.heads[layer].detach()
    norm = loaded.norms[layer].attention if layer in caught.attention else None
    if norm is None:
        return (z.float() * gradient.float()).sum(-1)
    return parts_behind_norm(loaded.anatomy.layers[layer], norm, z, caught.attention[layer].detach(), gradient)


def _ffn_parts(
    loaded: LoadedModel, caught: Activations, layer: int, gradient: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos 1"]:
    z = caught.ffns[layer].detach().float()
    norm = loaded.norms[layer].ffn if layer in loaded.norms else None
    if norm is not None:
        # Without the FFN, a norm that has a bias still writes that.
        z = z - norm_of_nothing(norm).to(z.device)
    return (z * gradient.float()).sum(-1, keepdim=True)


def _reduce(
    products: Float[Tensor, "batch pos component"], real: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "score batch component"]:
    # Written, not multiplied: what stands on padding need not be a number.
    products = products.masked_fill(~real[..., None], 0)
    position = products.abs().sum(1) / real.to(products).sum(1)[:, None]
    example = products.sum(1).abs()
    return torch.stack([position, example])
