"""Scoring: log-likelihoods of requests, and a task's metric, for many masks.

For each mask the batches of token trees run through the unmodified model under hooks (`model.gates`). The model's
output layer is given the hidden states of scored positions only: a hook gathers them before it, and whatever the model
does to logits afterwards (caps, scales) applies to them as they come out. So a log-likelihood is
`log softmax(logits at the position before)[target]`, summed over a continuation's tokens.

Whether trees are right for a model is found out, not looked up: `probe` scores one random tree both ways.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig

from headcount.errors import OptionError
from headcount.masks import Mask
from headcount.measure.encoding import Request, encode
from headcount.measure.packing import Batch, batches, pack
from headcount.measure.tasks import LM_EVAL_SEED, Prompt, Split, Task
from headcount.model.gates import ablated
from headcount.model.load import LoadedModel
from headcount.results import Evaluations

# Rows of several documents up to this length, and batches up to this many tokens, were fastest on two CPU cores.
ROW_TOKENS = 256
BATCH_TOKENS = 2048
# Trees and single rows must agree in log-likelihood, in nats: relative to what the type can hold.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.3, torch.float16: 0.05}

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Layout:
    """How requests are laid out for a model.

    Attributes:
        trees: Whether requests share prefixes in token trees; otherwise each is a row of its own.
        reason: Why.
        tree_depth: Requests longer than this are rows of their own (the smallest attention window), or None.
    """

    trees: bool
    reason: str
    tree_depth: int | None = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """A task's documents, encoded and packed, ready for any number of masks.

    Attributes:
        task: The task.
        num_fewshot: How many shots stand before each document.
        prompts: The documents.
        counts: How many requests each document has; requests follow one another in this order.
        batches: What the model reads.
        truncated: How many requests lost their beginning.
    """

    task: Task
    num_fewshot: int
    prompts: tuple[Prompt, ...]
    counts: tuple[int, ...]
    batches: tuple[Batch, ...]
    truncated: int

    @property
    def tokens(self) -> int:
        """Positions that one forward pass over all documents computes."""
        return sum(b.tokens for b in self.batches)


def evaluate(
    loaded: LoadedModel,
    task: Task,
    masks: Sequence[Mask] | None = None,
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
    split: Split = "evaluation",
    seed: int = LM_EVAL_SEED,
    shared_shots: bool = False,
    trees: bool | None = None,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Evaluations:
    """Measure a task under each mask.

    Args:
        loaded: The model.
        task: From `get_tasks`.
        masks: What is kept, one result per mask; None measures the full model.
        num_fewshot: Shots before each document.
        limit: The first so many documents; None takes all.
        split: "evaluation", or "examples" for the documents importance is measured on.
        seed: Of the sampler of shots.
        shared_shots: Whether one draw of shots serves all documents.
        trees: Whether prompts share their prefixes in token trees; None asks `layout`.
        row_tokens: A row takes further documents up to this many tokens.
        batch_tokens: A batch takes further rows up to this many tokens.
        progress: Called with the number of tokens after each batch.

    Returns:
        Metric, gold log-likelihood, margin and prediction per mask and document.
    """
    prepared = prepare(loaded, task, num_fewshot=num_fewshot, limit=limit, split=split, seed=seed,
                       shared_shots=shared_shots, trees=trees, row_tokens=row_tokens, batch_tokens=batch_tokens)
    return score(loaded, prepared, masks or [Mask.full(loaded.anatomy.heads_per_layer)], progress=progress)


def prepare(
    loaded: LoadedModel,
    task: Task,
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
    split: Split = "evaluation",
    seed: int = LM_EVAL_SEED,
    shared_shots: bool = False,
    trees: bool | None = None,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> Prepared:
    """Build, encode and pack a task's prompts; the options are those of `evaluate`."""
    if min(row_tokens, batch_tokens) < 1:
        raise OptionError(f"rows and batches hold at least one token, not {min(row_tokens, batch_tokens)}")
    prompts = task.prompts(split, num_fewshot=num_fewshot, limit=limit, seed=seed, shared_shots=shared_shots)
    requests = encode(loaded.tokenizer, [pair for p in prompts for pair in p.pairs], loaded.max_length)
    counts = [len(p.pairs) for p in prompts]
    by_document = [requests[end - n : end] for n, end in zip(counts, np.cumsum(counts), strict=True)]
    chosen = layout(loaded) if trees is None else Layout(trees, "asked for")
    rows = pack(by_document, row_tokens=row_tokens, trees=chosen.trees, tree_depth=chosen.tree_depth)
    return Prepared(task, num_fewshot, tuple(prompts), tuple(counts), tuple(batches(rows, batch_tokens)),
                    sum(r.truncated for r in requests))


def score(
    loaded: LoadedModel, prepared: Prepared, masks: Sequence[Mask], *, progress: Progress | None = None
) -> Evaluations:
    """Run prepared prompts under each mask and turn log-likelihoods into the task's metric."""
    rows = []
    for mask in masks:
        with ablated(loaded.anatomy, mask):
            loglikelihoods, greedy = loglikelihood(loaded, prepared.batches, sum(prepared.counts), progress)
        per_document = np.cumsum(prepared.counts)[:-1]
        rows.append([
            _score_document(prepared.task, *one)
            for one in zip(prepared.prompts, np.split(loglikelihoods, per_document), np.split(greedy, per_document),
                           strict=True)
        ])
    metric = prepared.task.metric
    extra = {name for row in rows for one in row for name in one.metrics} - {metric}
    return Evaluations(
        task=prepared.task.name,
        num_fewshot=prepared.num_fewshot,
        metric=metric,
        masks=tuple(masks),
        doc_ids=np.array([p.doc_id for p in prepared.prompts], np.int64),
        correct=np.array([[one.metrics[metric] for one in row] for row in rows]),
        gold_loglikelihood=np.array([[one.gold for one in row] for row in rows]),
        margin=np.array([[one.margin for one in row] for row in rows]),
        prediction=np.array([[one.prediction for one in row] for row in rows], np.int64),
        gold=np.array([p.gold for p in prepared.prompts], np.int64),
        num_options=np.array(prepared.counts, np.int64),
        extra_metrics={name: np.array([[one.metrics.get(name, np.nan) for one in row] for row in rows])
                       for name in sorted(extra)},
        truncated=prepared.truncated,
        tokens=prepared.tokens * len(masks),
    )


class _Scored(NamedTuple):
    metrics: dict[str, float]
    gold: float
    margin: float
    prediction: int


def _score_document(
    task: Task, prompt: Prompt, loglikelihoods: Float[np.ndarray, " option"], greedy: Int[np.ndarray, " option"]
) -> _Scored:
    results = [(float(x), bool(g)) for x, g in zip(loglikelihoods, greedy, strict=True)]
    gold = float(loglikelihoods[prompt.gold])
    others = np.delete(loglikelihoods, prompt.gold)
    margin = gold - float(others.max()) if len(others) else float("nan")
    return _Scored(task.metrics(prompt, results), gold, margin, int(np.argmax(loglikelihoods)))


@torch.no_grad()
def loglikelihood(
    loaded: LoadedModel, packed: Sequence[Batch], num_requests: int, progress: Progress | None = None
) -> tuple[Float[np.ndarray, " request"], Int[np.ndarray, " request"]]:
    """Log-likelihood (nats) of every request, and 1 where greedy decoding would give its continuation."""
    total = torch.zeros(num_requests, dtype=torch.float64)
    greedy = torch.ones(num_requests, dtype=torch.int64)
    for batch in packed:
        logprobs, best = target_logprobs(loaded, batch)
        owners = torch.from_numpy(batch.requests)
        total.index_add_(0, owners, logprobs.double().cpu())
        greedy.scatter_reduce_(0, owners, best.long().cpu(), "amin")
        if progress is not None:
            progress(batch.tokens)
    return total.numpy(), greedy.numpy()


def target_logprobs(loaded: LoadedModel, batch: Batch) -> tuple[Float[Tensor, " target"], Int[Tensor, " target"]]:
    """Log-probability of every target of a batch, and 1 where it is the most probable token."""
    device = loaded.device
    # Targets at one position (one-token options) share its logits.
    places, which = np.unique(np.stack([batch.rows, batch.positions]), axis=1, return_inverse=True)
    rows, positions = (torch.from_numpy(p).to(device) for p in places)
    with scored_only(loaded, rows, positions):
        logits = loaded.model(**model_inputs(loaded, batch), use_cache=False).logits[0].float()
    targets = torch.from_numpy(batch.targets).to(logits.device)
    index = torch.from_numpy(which.reshape(-1)).to(logits.device)
    logprobs = logits[index, targets] - logits.logsumexp(-1)[index]
    return logprobs, (logits.argmax(-1)[index] == targets).long()


def model_inputs(loaded: LoadedModel, batch: Batch) -> dict[str, Tensor]:
    """The model's keyword arguments for a batch: ids, and the mask that its rows need."""
    device = loaded.device
    ids = torch.from_numpy(batch.ids).to(device)
    if not batch.is_tree:
        real = torch.arange(ids.shape[1])[None] < torch.from_numpy(batch.lengths)[:, None]
        return {"input_ids": ids, "attention_mask": real.long().to(device)}
    ends = torch.from_numpy(batch.ends).to(device)
    index = torch.arange(ids.shape[1], device=device)
    allowed = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < ends[:, None, :])
    # Additive, in the model's type: right for eager attention, which adds the mask, and for SDPA alike.
    dtype = loaded.model.dtype
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)
    depths = torch.from_numpy(batch.depths).to(device)
    return {"input_ids": ids, "attention_mask": mask[:, None], "position_ids": depths}


@contextlib.contextmanager
def scored_only(
    loaded: LoadedModel, rows: Int[Tensor, " scored"], positions: Int[Tensor, " scored"]
) -> Iterator[None]:
    """Give the output layer the scored positions' hidden states only, as one row."""

    def gather(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), positions.to(hidden.device)][None], *args[1:])

    output_layer: torch.nn.Module = loaded.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    handle = output_layer.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


_layouts: weakref.WeakKeyDictionary[LoadedModel, Layout] = weakref.WeakKeyDictionary()


def layout(loaded: LoadedModel) -> Layout:
    """Whether this model gets token trees, found out once per loaded model by `probe`."""
    if loaded not in _layouts:
        _layouts[loaded] = probe(loaded)
    return _layouts[loaded]


def probe(loaded: LoadedModel, seed: int = 0) -> Layout:
    """Score one random tree of requests as a tree and request by request, and see whether the two agree.

    The tree has two documents, a context and options of several lengths in each; its longest branch exceeds the
    smallest attention window where that is short, and longer requests than the window never go into trees.
    """
    window = _smallest_window(loaded.model.config)
    if "position_ids" not in inspect.signature(loaded.model.forward).parameters:
        return Layout(False, "the model takes no position_ids")
    rng = np.random.default_rng(seed)
    longest = min(loaded.max_length, 24)
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)

    def ids(n: int) -> Int[np.ndarray, " pos"]:
        return rng.integers(0, vocabulary, n)

    documents = []
    for context in (ids(longest // 2), ids(longest // 3)):
        options = [ids(n) for n in (1, 2, longest - len(context) - 1)]
        documents.append([Request(np.concatenate([context, o])[:-1], o) for o in options])
    found = [
        loglikelihood(loaded, batches(pack(documents, row_tokens=10_000, trees=trees), BATCH_TOKENS), 6)
        for trees in (True, False)
    ] if window is None or window >= longest else None
    if found is None:
        return Layout(False, f"attention windows of {window} tokens are too short for trees")
    difference = float(np.abs(found[0][0] - found[1][0]).max())
    if not difference <= _TOLERANCE.get(loaded.model.dtype, 1e-3):
        return Layout(False, f"a tree's log-likelihoods differ from single rows' by {difference:.2g}")
    return Layout(True, f"a tree's log-likelihoods equal single rows' to {difference:.1g}", window)


def _smallest_window(config: PretrainedConfig) -> int | None:
    """The smallest sliding window, chunk or local window that the configuration names."""
    text = config.get_text_config()
    named = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((n for n in named if isinstance(n, int) and n > 0), default=None)
