"""Importance of heads and FFNs: by gradient, all at once, and by oracle, one ablation each.

Gradient: the mean over training examples of the scores "example" and "position" of every head and FFN, whose formulas
stand in `headcount.engine.gradients`. The paper's code (protocol "paper") divides sums over all examples by the number
of positions of all examples, and in the last layer by the number of continuation tokens instead (`paper_weights`).

Oracle: I[l] = P(full) - P(without FFN l) on the same documents, P the task's metric, and the same for one head off;
beside it the mean gold log-likelihood that is lost. Either can be what orders (`order_of`).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from headcount.engine.encode import Request, encode
from headcount.engine.engine import Engine
from headcount.engine.examples import Examples, ExampleScores
from headcount.engine.forward import Progress
from headcount.engine.pack import Budget
from headcount.errors import ModelError, OptionError
from headcount.masks import Component, Mask, all_heads, mask_named, removal_order
from headcount.measure.evaluate import document_named, prepare, score
from headcount.measure.finite import finite_gradients
from headcount.measure.resampling import halves, resampled, standard_error
from headcount.model.load import LoadedModel
from headcount.results import Evaluations, Importance, Score
from headcount.tasks.fewshot import LM_EVAL_SEED, FewShot
from headcount.tasks.task import Prompt, Split, Task


def head_importance(
    loaded: LoadedModel,
    task: Task,
    *,
    method: str = "gradient",
    heads: Sequence[tuple[int, int]] | None = None,
    num_fewshot: int = 0,
    limit: int | None = 2500,
    seed: int = LM_EVAL_SEED,
    shared_shots: bool = False,
    trees: bool | None = None,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> Importance:
    """Importance of every head by "gradient" (see `gradient_importance`) or "oracle" (see `oracle_importance`).

    Args:
        loaded: The model.
        task: From `get_tasks`.
        method: "gradient" or "oracle".
        heads: Which heads the oracle scores, as (layer, head); None: all.
        num_fewshot: Shots before each document.
        limit: The first so many documents (the paper's 2,500); None takes all.
        seed: Of the sampler of shots.
        shared_shots: Whether one draw of shots serves all documents; those that serve as shots are left out.
        trees: For the oracle, whether prompts share their prefixes in token trees; None asks the engine's probe.
        budget: How long rows and how large batches may be; None measures the device.
        progress: Called with the number of tokens after each batch.

    Raises:
        OptionError: For another method, and for options of the oracle with gradients.
    """
    few_shot = FewShot(num_fewshot, limit, seed, shared_shots)
    if method == "oracle":
        return oracle_importance(loaded, task, few_shot, component="head", heads=heads, trees=trees, budget=budget,
                                 progress=progress)
    _check_method(method, heads=heads, trees=trees)
    return gradient_importance(loaded, task, few_shot, budget=budget, progress=progress)["head"]


def ffn_importance(
    loaded: LoadedModel,
    task: Task,
    *,
    method: str = "oracle",
    num_fewshot: int = 0,
    limit: int | None = 2500,
    seed: int = LM_EVAL_SEED,
    shared_shots: bool = False,
    trees: bool | None = None,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> Importance:
    """Importance of every FFN by "oracle" (see `oracle_importance`) or "gradient" (see `gradient_importance`).

    Args:
        loaded: The model.
        task: From `get_tasks`.
        method: "oracle" or "gradient".
        num_fewshot: As in `head_importance`, like the further options.
        limit: The first so many documents (the paper's 2,500); None takes all.
        seed: Of the sampler of shots.
        shared_shots: Whether one draw of shots serves all documents; those that serve as shots are left out.
        trees: For the oracle, whether prompts share their prefixes in token trees.
        budget: How long rows and how large batches may be.
        progress: Called with the number of tokens after each batch.

    Raises:
        OptionError: For another method, and for options of the oracle with gradients.
    """
    few_shot = FewShot(num_fewshot, limit, seed, shared_shots)
    if method == "oracle":
        return oracle_importance(loaded, task, few_shot, component="ffn", trees=trees, budget=budget,
                                 progress=progress)
    _check_method(method, heads=None, trees=trees)
    return gradient_importance(loaded, task, few_shot, budget=budget, progress=progress)["ffn"]


def _check_method(method: str, *, heads: Sequence[tuple[int, int]] | None, trees: bool | None) -> None:
    """Refuse any method but "gradient", and with it what only the oracle takes."""
    if method != "gradient":
        raise OptionError(f"importance is measured by 'oracle' or 'gradient', not {method!r}")
    if heads is not None or trees is not None:
        raise OptionError(f"{'heads' if heads is not None else 'trees'} is an argument of method='oracle'; gradients "
                          "score all heads at once and use no token trees: leave it out")


def gradient_importance(
    loaded: LoadedModel,
    task: Task,
    few_shot: FewShot,
    *,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> dict[Component, Importance]:
    """Gradient importance of all heads and all FFNs of a model, from one backward pass per batch.

    Args:
        loaded: The model.
        task: From `get_tasks`; its training documents are used.
        few_shot: How many training documents, and which shots stand before each.
        budget: How large batches may be; None measures the device.
        progress: Called with the number of tokens after each batch.

    Returns:
        Importance of heads under "head" and of FFNs under "ffn", scores "position" and "example" in nats.
    """
    return next(gradient_importances(loaded, [Learning(task, few_shot, progress)], budget=budget))


class Learning(NamedTuple):
    """A task on whose training documents importance is wanted, how many and with which shots, and who is told."""

    task: Task
    few_shot: FewShot
    progress: Progress | None = None


def gradient_importances(
    loaded: LoadedModel, wanted: Iterable[Learning], *, budget: Budget | None = None
) -> Iterator[dict[Component, Importance]]:
    """The same of several tasks, in the order given; they share readings of weights that lie in files.

    Args:
        loaded: The model.
        wanted: The tasks; asked for when there is room for more.
        budget: How large batches may be; None measures the device.
    """
    engine, begun = Engine.of(loaded), deque[tuple[Learning, list[Prompt], list[Request]]]()

    def asked() -> Iterator[Examples]:
        for one in wanted:
            prompts = one.task.prompts("examples", one.few_shot, chat=loaded.chat)
            requests = encode(loaded.tokenizer, [p.pairs[p.gold] for p in prompts], loaded.max_length,
                              apart=one.task.protocol == "paper")
            begun.append((one, prompts, requests))
            yield engine.examples(requests, budget, one.progress)

    for measured in engine.gradients_of(asked()):
        yield _importances(loaded, *begun.popleft(), measured)


def _importances(
    loaded: LoadedModel, learning: Learning, prompts: Sequence[Prompt], requests: Sequence[Request],
    measured: ExampleScores,
) -> dict[Component, Importance]:
    """Importance of heads and FFNs from the scores of every example."""
    task, few_shot, _ = learning
    heads, ffns = finite_gradients(
        loaded, measured, requests,
        lambda i: document_named(task.name, few_shot.num_fewshot, "examples", prompts[i].doc_id))
    if task.protocol == "paper":
        heads[0] *= paper_weights(requests, loaded.anatomy.heads_per_layer)

    owners, doc_ids = task.passages("examples", prompts), np.array([p.doc_id for p in prompts], np.int64)
    known = functools.partial(_importance_of, task.name, few_shot.num_fewshot, method="gradient",
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


def oracle_importance(
    loaded: LoadedModel,
    task: Task,
    few_shot: FewShot,
    *,
    component: Component = "ffn",
    heads: Sequence[tuple[int, int]] | None = None,
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
        few_shot: How many documents, and which shots stand before each.
        component: Whether heads or FFNs are scored.
        heads: Which heads, as (layer, head); None scores all. Others have NaN for a score.
        trees: Whether prompts share their prefixes in token trees.
        budget: How long rows and how large batches may be.
        progress: Called with the number of tokens after each batch.
    """
    full = Mask.full(loaded.anatomy.heads_per_layer)
    chosen = all_heads(loaded.anatomy.heads_per_layer) if heads is None else list(heads)
    singles = ([full.without_heads([head]) for head in chosen] if component == "head"
               else [full.without_ffns([layer]) for layer in range(loaded.anatomy.num_layers)])
    split: Split = "evaluation" if task.protocol == "paper" else "examples"
    prepared = prepare(loaded, task, few_shot, split=split, trees=trees, budget=budget)
    return oracle_from(score(loaded, prepared, [full, *singles], progress=progress), component)


def oracle_from(measured: Evaluations, component: Component = "ffn") -> Importance:
    """Oracle importance from evaluations whose first mask is the full model and all others lack one head (FFN) each."""
    _check_numbers(measured)
    n, counts = len(measured.doc_ids), measured.masks[0].heads_per_layer
    places = {tuple(head): i for i, head in enumerate(all_heads(counts))}
    where = [places[tuple(*mask.heads_removed)] if component == "head" else int(*mask.ffns_removed)
             for mask in measured.masks[1:]]

    def lost(values: Float[np.ndarray, "mask doc"]) -> Float[np.ndarray, "doc component"]:
        losses = np.full((n, len(places) if component == "head" else len(counts)), np.nan)
        losses[:, where] = (values[0] - values[1:]).T
        return losses

    return _importance_of(
        measured.task, measured.num_fewshot, component=component, method="oracle", heads_per_layer=counts,
        scores={"accuracy": lost(measured.correct), "gold_loglikelihood": lost(measured.gold_loglikelihood)},
        owners=np.arange(n) if measured.passages is None else measured.passages, doc_ids=measured.doc_ids,
        truncated=measured.truncated)


def _check_numbers(measured: Evaluations) -> None:
    for what, values in ((measured.metric, measured.correct), ("gold log-likelihood", measured.gold_loglikelihood)):
        for mask, document in np.argwhere(~np.isfinite(values))[:1]:
            under = mask_named(measured.masks[mask])
            raise ModelError(f"the {what} of document {measured.doc_ids[document]} of task {measured.task!r} "
                             f"({measured.num_fewshot}-shot){under and f' {under}'} is no number, and so would be the "
                             "importance: headcount evaluate says where it comes from")


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
