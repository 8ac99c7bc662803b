"""Importance of heads and FFNs: by gradient, all at once, and by oracle, one ablation each.

Gradient (Michel et al. 2019, who have `example` too; Molchanov et al. 2017): with z[l,h,t] the slice h of the input of
layer l's attention output projection at position t, and L_n the mean cross-entropy (nats) of example n's gold
continuation,

    example:   I[l,h] = 1/N sum_n abs(sum_t z[l,h,t] . dL_n/dz[l,h,t])            (Bansal et al. 2023, equation 8)
    position:  I[l,h] = 1/N sum_n 1/T_n sum_t abs(z[l,h,t] . dL_n/dz[l,h,t])      (their released code)

over the T_n positions that the model reads. The paper's code (protocol "paper") divides sums over all examples by the
number of positions of all examples, and in the last layer by the number of continuation tokens instead.

For an FFN z is the output of its down-projection. Every example is a row of its own, because abs does not pass through
a sum over examples; the loss is summed over rows, so that no score depends on the batch. Parameters are frozen: one
forward pass and one backward pass through activations alone.

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

Oracle: I[l] = P(full) - P(without FFN l) on the same documents, P the task's metric, and the same for one head off;
beside it the mean gold log-likelihood that is lost. Either can be what orders (`order_of`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headcount.engine.budget import budget_of
from headcount.engine.encode import Request, encode
from headcount.engine.engine import Progress, in_memory, scored_only
from headcount.engine.pack import Batch, Budget, batches, pack
from headcount.engine.treemask import model_inputs
from headcount.errors import ModelError, OptionError
from headcount.masks import Component, Mask, all_heads, removal_order
from headcount.measure.evaluate import evaluate
from headcount.measure.resampling import halves, resampled, standard_error
from headcount.model.circuits import parts_behind_norm
from headcount.model.devices import on_device
from headcount.model.hooks import Activations, captured, frozen
from headcount.model.load import LoadedModel
from headcount.model.norms import norm_of_nothing
from headcount.results import Evaluations, Importance, Score
from headcount.tasks.fewshot import LM_EVAL_SEED
from headcount.tasks.task import Split, Task


def head_importance(loaded: LoadedModel, task: Task, *, method: str = "gradient", **options: object) -> Importance:
    """Importance of every head by "gradient" (see `gradient_importance`) or "oracle" (see `oracle_importance`).

    Raises:
        OptionError: For another method.
    """
    return _importance(loaded, task, "head", method, options)


def ffn_importance(loaded: LoadedModel, task: Task, *, method: str = "oracle", **options: object) -> Importance:
    """Importance of every FFN by "oracle" (see `oracle_importance`) or "gradient" (see `gradient_importance`).

    Raises:
        OptionError: For another method.
    """
    return _importance(loaded, task, "ffn", method, options)


def _importance(
    loaded: LoadedModel, task: Task, component: Component, method: str, options: Mapping[str, Any]
) -> Importance:
    if method == "oracle":
        return oracle_importance(loaded, task, component=component, **options)
    if method == "gradient":
        return gradient_importance(loaded, task, **options)[component]
    raise OptionError(f"importance is measured by 'oracle' or 'gradient', not {method!r}")


def gradient_importance(
    loaded: LoadedModel,
    task: Task,
    *,
    num_fewshot: int = 0,
    limit: int | None = 2500,
    seed: int = LM_EVAL_SEED,
    shared_shots: bool = False,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> dict[Component, Importance]:
    """Gradient importance of all heads and all FFNs of a model, from one backward pass per batch.

    Args:
        loaded: The model.
        task: From `get_tasks`; its training documents are used.
        num_fewshot: Shots before each example.
        limit: The first so many training documents (the paper's 2,500); None takes all.
        seed: Of the sampler of shots.
        shared_shots: Whether one draw of shots serves all examples; those documents are left out.
        budget: How large batches may be; None asks `budget_of`, which looks at the device's memory.
        progress: Called with the number of tokens after each batch.

    Returns:
        Importance of heads under "head" and of FFNs under "ffn", scores "position" and "example" in nats.
    """
    prompts = task.prompts("examples", num_fewshot=num_fewshot, limit=limit, seed=seed, shared_shots=shared_shots,
                           chat=loaded.chat)
    paper = task.protocol == "paper"
    requests = encode(loaded.tokenizer, [p.pairs[p.gold] for p in prompts], loaded.max_length, apart=paper)
    heads, ffns = example_scores(loaded, requests, budget=budget, progress=progress)
    if paper:
        heads[0] *= paper_weights(requests, loaded.anatomy.heads_per_layer)

    owners, doc_ids = task.passages("examples", prompts), np.array([p.doc_id for p in prompts], np.int64)
    known = functools.partial(_importance_of, task.name, num_fewshot, method="gradient",
                              heads_per_layer=loaded.anatomy.heads_per_layer, owners=owners, doc_ids=doc_ids,
                              truncated=sum(r.truncated for r in requests))
    return {"head": known(component="head", scores={"position": heads[0], "example": heads[1]}),
            "ffn": known(component="ffn", scores={"position": ffns[0], "example": ffns[1]})}


def _importance_of(
    task: str, num_fewshot: int, *, component: Component, method: Literal["gradient", "oracle"],
    heads_per_layer: tuple[int, ...], scores: Mapping[Score, Float[np.ndarray, "doc component"]],
    owners: Int[np.ndarray, " doc"], doc_ids: Int[np.ndarray, " doc"], truncated: int,
) -> Importance:
    """Means over documents of their scores, standard errors, halves and resampled means."""
    n = len(doc_ids)
    return Importance(
        task, num_fewshot, component, method, heads_per_layer,
        {kind: x.mean(0) for kind, x in scores.items()},
        {kind: standard_error(x, owners) for kind, x in scores.items()},
        n, truncated,
        {kind: halves(x, owners, doc_ids, name=task) for kind, x in scores.items()},
        {kind: resampled(x, owners, doc_ids, name=task) for kind, x in scores.items()})


def paper_weights(requests: Sequence[Request], heads_per_layer: Sequence[int]) -> Float[np.ndarray, "example head"]:
    """What turns each example's mean over positions into its share of the paper's sums over all examples.

    Of N examples, T_n / mean(T) where T_n are the positions of example n; in the last layer T_n / mean(C), with C_n the
    tokens of its continuation.
    """
    positions = np.array([len(r.ids) for r in requests], float)
    targets = np.array([len(r.targets) for r in requests], float)
    last = len(heads_per_layer) - 1
    weights = [positions / (targets if layer == last else positions).mean() for layer in range(last + 1)]
    return np.repeat(np.stack(weights, axis=1), heads_per_layer, axis=1)


def example_scores(
    loaded: LoadedModel, requests: Sequence[Request], *, budget: Budget | None = None,
    progress: Progress | None = None,
) -> tuple[Float[np.ndarray, "score example head"], Float[np.ndarray, "score example ffn"]]:
    """The two scores, "position" and "example", of every example; heads run by layer, then index."""
    n = len(requests)
    heads = np.zeros((2, n, loaded.anatomy.num_heads))
    ffns = np.zeros((2, n, loaded.anatomy.num_layers))
    budget = budget or budget_of(loaded)
    packed = batches(pack([[r] for r in requests], budget, trees=False), budget, gradients=True)
    with frozen(loaded.model):
        measured = []
        for batch, scores in in_memory(packed, lambda batch: _batch_scores(loaded, batch)):
            measured.append((batch.requests[np.unique(batch.rows, return_index=True)[1]], scores))
            if progress is not None:
                progress(batch.tokens)
    # Only now copied to the host: each copy waits for the device.
    for examples, (of_heads, of_ffns) in measured:
        heads[:, examples], ffns[:, examples] = of_heads.cpu().double().numpy(), of_ffns.cpu().double().numpy()
    if not np.isfinite(heads).all() or not np.isfinite(ffns).all():
        raise ModelError(f"gradients overflow in {str(loaded.model.dtype).removeprefix('torch.')}; use --dtype "
                         "bfloat16 or float32")
    return heads, ffns


def _batch_scores(
    loaded: LoadedModel, batch: Batch
) -> tuple[Float[Tensor, "score example head"], Float[Tensor, "score example ffn"]]:
    rows, positions = on_device(batch.rows, loaded.device), on_device(batch.positions, loaded.device)
    caught = captured(loaded.anatomy, gradients=True, norms=loaded.norms)
    with torch.enable_grad(), caught as found, scored_only(loaded, rows, positions):
        logits = loaded.model(**model_inputs(loaded, batch), use_cache=False).logits[0].float()
        targets = on_device(batch.targets, logits.device)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        # Mean over each example's targets, then the sum over examples: rows do not touch one another.
        weights = 1 / on_device(np.bincount(batch.rows)[batch.rows], losses.device).to(losses)
        # Heads behind a norm are reached from what it wrote.
        attention = [found.attention.get(layer, z) for layer, z in enumerate(found.heads)]
        gradients = torch.autograd.grad((losses * weights).sum(), [*attention, *found.ffns])
    mask = np.arange(batch.ids.shape[1])[None] < batch.lengths[:, None]
    real = functools.cache(functools.partial(on_device, mask))
    layers = len(found.heads)
    of_heads = (_head_parts(loaded, found, layer, g) for layer, g in enumerate(gradients[:layers]))
    of_ffns = (_ffn_parts(loaded, found, layer, g) for layer, g in enumerate(gradients[layers:]))
    # Where layers lie on several devices, the scores are brought together on the last one.
    heads, ffns = ([_reduce(p, real(p.device)).to(logits.device) for p in parts] for parts in (of_heads, of_ffns))
    return torch.cat(heads, -1), torch.cat(ffns, -1)


def _head_parts(
    loaded: LoadedModel, found: Activations, layer: int, gradient: Float[Tensor, "batch pos *_"]
) -> Float[Tensor, "batch pos head"]:
    z = found.heads[layer].detach()
    norm = loaded.norms[layer].attention if layer in found.attention else None
    if norm is None:
        return (z.float() * gradient.float()).sum(-1)
    return parts_behind_norm(loaded.anatomy.layers[layer], norm, z, found.attention[layer].detach(), gradient)


def _ffn_parts(
    loaded: LoadedModel, found: Activations, layer: int, gradient: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos 1"]:
    z = found.ffns[layer].detach().float()
    norm = loaded.norms[layer].ffn if layer in loaded.norms else None
    if norm is not None:
        # Without the FFN, a norm that has a bias still writes that.
        z = z - norm_of_nothing(norm).to(z.device)
    return (z * gradient.float()).sum(-1, keepdim=True)


def _reduce(
    products: Float[Tensor, "batch pos component"], real: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "score batch component"]:
    weight = real.to(products)[..., None]
    position = (products.abs() * weight).sum(1) / weight.sum(1)
    example = (products * weight).sum(1).abs()
    return torch.stack([position, example])


def oracle_importance(
    loaded: LoadedModel,
    task: Task,
    *,
    component: Component = "ffn",
    heads: Sequence[tuple[int, int]] | None = None,
    num_fewshot: int = 0,
    limit: int | None = 2500,
    seed: int = LM_EVAL_SEED,
    shared_shots: bool = False,
    trees: bool | None = None,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> Importance:
    """What the task's metric loses, on training documents, when one head or FFN is off.

    All FFNs cost about half a forward pass each, all heads together about H(L+1)/2 with H heads a layer. Under protocol
    "paper" it is measured on the evaluated documents, as in the paper's code.

    Args:
        loaded: The model.
        task: From `get_tasks`.
        component: Whether heads or FFNs are scored.
        heads: Which heads, as (layer, head); None scores all. Others have NaN for a score.
        num_fewshot: As in `evaluate`, like the further options.
        limit: The first so many documents; None takes all.
        seed: Of the sampler of shots.
        shared_shots: Whether one draw of shots serves all documents.
        trees: Whether prompts share their prefixes in token trees.
        budget: How long rows and how large batches may be.
        progress: Called with the number of tokens after each batch.
    """
    full = Mask.full(loaded.anatomy.heads_per_layer)
    chosen = all_heads(loaded.anatomy.heads_per_layer) if heads is None else list(heads)
    singles = ([full.without_heads([head]) for head in chosen] if component == "head"
               else [full.without_ffns([layer]) for layer in range(loaded.anatomy.num_layers)])
    split: Split = "evaluation" if task.protocol == "paper" else "examples"
    measured = evaluate(loaded, task, [full, *singles], num_fewshot=num_fewshot, limit=limit, split=split, seed=seed,
                        shared_shots=shared_shots, trees=trees, budget=budget, progress=progress)
    return oracle_from(measured, component)


def oracle_from(measured: Evaluations, component: Component = "ffn") -> Importance:
    """Oracle importance from evaluations whose first mask is the full model and all others lack one head (FFN) each."""
    n, counts = len(measured.doc_ids), measured.masks[0].heads_per_layer
    places = {tuple(head): i for i, head in enumerate(all_heads(counts))}
    where = [places[tuple(*mask.heads_removed)] if component == "head" else int(*mask.ffns_removed)
             for mask in measured.masks[1:]]

    def lost(values: Float[np.ndarray, "mask doc"]) -> Float[np.ndarray, "doc component"]:
        found = np.full((n, len(places) if component == "head" else len(counts)), np.nan)
        found[:, where] = (values[0] - values[1:]).T
        return found

    return _importance_of(
        measured.task, measured.num_fewshot, component=component, method="oracle", heads_per_layer=counts,
        scores={"accuracy": lost(measured.correct), "gold_loglikelihood": lost(measured.gold_loglikelihood)},
        owners=np.arange(n) if measured.passages is None else measured.passages, doc_ids=measured.doc_ids,
        truncated=measured.truncated)


def order_of(importance: Importance, score: Score | None = None) -> list[int]:
    """From the least to the most important component, as positions in `importance.positions`.

    Args:
        importance: Heads or FFNs.
        score: For gradient importance "example" (default, the paper's equation 8) or "position" (its code's); for the
            oracle "gold_loglikelihood" (default) or "accuracy", with ties in the order of layers, as the paper's code
            has it.
    """
    default: Score = "gold_loglikelihood" if importance.method == "oracle" else "example"
    return removal_order(importance.scores[score or default])
