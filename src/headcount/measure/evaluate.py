"""Scoring: a task's metric, gold log-likelihoods and margins, for many masks.

Prompts are built, encoded and laid out once (`prepare`); the engine runs them through the unmodified model under all
masks, and log-likelihoods become lm-eval's metrics (`score`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from headcount.engine.encode import Request, encode
from headcount.engine.engine import Engine
from headcount.engine.forward import Progress, columns_of
from headcount.engine.likelihoods import Likelihoods, Packed, Wanted
from headcount.engine.pack import Batch, Budget
from headcount.errors import OptionError, TaskError
from headcount.masks import Mask, mask_named
from headcount.measure.finite import finite_likelihoods
from headcount.model.load import LoadedModel
from headcount.results import Evaluations
from headcount.tasks.fewshot import LM_EVAL_SEED, FewShot
from headcount.tasks.task import Prompt, Split, Task


@dataclass(frozen=True, eq=False)
class Prepared:
    """A task's documents, encoded and packed, ready for any number of masks.

    Attributes:
        task: The task.
        num_fewshot: How many shots stand before each document.
        prompts: The documents.
        counts: How many requests each document has; requests follow one another in this order.
        packed: The requests, laid out for the model.
        passages: Which documents share a passage: equal numbers.
        truncated: How many requests lost their beginning.
        columns: The first so many logits decide (protocol "paper"); None: all.
        split: Which documents these are.
    """

    task: Task
    num_fewshot: int
    prompts: tuple[Prompt, ...]
    counts: tuple[int, ...]
    packed: Packed
    passages: Int[np.ndarray, " doc"]
    truncated: int
    columns: int | None = None
    split: Split = "evaluation"

    @property
    def tokens(self) -> int:
        """Positions that one forward pass over all documents computes."""
        return self.packed.tokens

    @property
    def batches(self) -> tuple[Batch, ...]:
        """What the model reads."""
        return self.packed.batches

    def of_document(self, prompt: Prompt) -> str:
        """What a document is called in messages."""
        return document_named(self.task.name, self.num_fewshot, self.split, prompt.doc_id)

    def named(self, request: int) -> str:
        """What a request's log-likelihood is called in messages."""
        document = int(np.searchsorted(np.cumsum(self.counts), request, side="right"))
        option = request - sum(self.counts[:document])
        return f"the log-likelihood of option {option} of {self.of_document(self.prompts[document])}"


def document_named(task: str, num_fewshot: int, split: Split, doc_id: int) -> str:
    """What a document is called in messages: its number in its split, from 0, task and shots."""
    examples = "" if split == "evaluation" else ", importance examples"
    return f"document {doc_id} of task {task!r} ({num_fewshot}-shot{examples})"


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
    budget: Budget | None = None,
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
        trees: Whether prompts share their prefixes in token trees; None asks the engine's probe.
        budget: How long rows and how large batches may be; None measures the device.
        progress: Called with the number of tokens after each batch.

    Returns:
        Metric, gold log-likelihood, margin and prediction per mask and document.
    """
    if isinstance(masks, Mask) or not isinstance(task, Task):
        raise OptionError("masks must be a list of masks, and task one of the tasks that get_tasks returned")
    few_shot = FewShot(num_fewshot, limit, seed, shared_shots)
    prepared = prepare(loaded, task, few_shot, split=split, trees=trees, budget=budget)
    return score(loaded, prepared, masks or [Mask.full(loaded.anatomy.heads_per_layer)], progress=progress)


def prepare(
    loaded: LoadedModel,
    task: Task,
    few_shot: FewShot,
    *,
    split: Split = "evaluation",
    trees: bool | None = None,
    budget: Budget | None = None,
) -> Prepared:
    """Build, encode and pack a task's prompts; the options are those of `evaluate`."""
    prompts = task.prompts(split, few_shot, chat=loaded.chat)
    return prepare_prompts(loaded, task, prompts, few_shot.num_fewshot, split=split, trees=trees, budget=budget)


def prepare_prompts(
    loaded: LoadedModel,
    task: Task,
    prompts: Sequence[Prompt],
    num_fewshot: int,
    *,
    split: Split = "evaluation",
    trees: bool | None = None,
    budget: Budget | None = None,
) -> Prepared:
    """Encode and pack prompts that a task has built, or some of them."""
    requests = _encoded(loaded, task, prompts)
    counts = [len(p.pairs) for p in prompts]
    by_document = [requests[end - n : end] for n, end in zip(counts, np.cumsum(counts), strict=True)]
    packed = Engine.of(loaded).pack(by_document, budget, trees)
    return Prepared(task, num_fewshot, tuple(prompts), tuple(counts), packed, task.passages(split, prompts),
                    sum(r.truncated for r in requests), columns_of(loaded) if task.protocol == "paper" else None,
                    split)


def _encoded(loaded: LoadedModel, task: Task, prompts: Sequence[Prompt]) -> list[Request]:
    """All requests of these documents, one after another."""
    try:
        return encode(loaded.tokenizer, [pair for p in prompts for pair in p.pairs], loaded.max_length,
                      apart=task.protocol == "paper")
    except TaskError as error:
        raise TaskError(f"task {task.name!r}: {error}") from error


class Scoring(NamedTuple):
    """Prepared prompts that are to be run under masks, and who is told of progress."""

    prepared: Prepared
    masks: Sequence[Mask]
    progress: Progress | None = None


def score(
    loaded: LoadedModel, prepared: Prepared, masks: Sequence[Mask], *, progress: Progress | None = None
) -> Evaluations:
    """Run prepared prompts under each mask and turn log-likelihoods into the task's metric.

    Raises:
        ModelError: If a log-likelihood is no number, with document, mask and the part of the model.
        TaskError: If a metric of the task is none.
    """
    return next(scores(loaded, [Scoring(prepared, masks, progress)]))


def scores(loaded: LoadedModel, wanted: Iterable[Scoring]) -> Iterator[Evaluations]:
    """The same of several, in the order given; they share readings of weights that lie in files.

    Args:
        loaded: The model.
        wanted: What is to be scored; asked for when there is room for more.

    Raises:
        ModelError: If a log-likelihood is no number, with document, mask and the part of the model.
        TaskError: If a metric of the task is none.
    """
    begun: deque[Scoring] = deque()

    def asked() -> Iterator[Wanted]:
        for one in wanted:
            begun.append(one)
            yield Wanted(one.prepared.packed, one.masks, one.prepared.columns, one.progress)

    for likelihoods in Engine.of(loaded).loglikelihoods_of(asked()):
        one = begun.popleft()
        yield _evaluations(loaded, one.prepared, one.masks, likelihoods)


def _evaluations(
    loaded: LoadedModel, prepared: Prepared, masks: Sequence[Mask], likelihoods: Likelihoods
) -> Evaluations:
    """What log-likelihoods say of a task."""
    likelihoods = finite_likelihoods(
        loaded, likelihoods, masks, prepared.packed, lambda: _encoded(loaded, prepared.task, prepared.prompts),
        prepared.named, columns=prepared.columns)
    splits = np.cumsum(prepared.counts)[:-1]
    rows = [
        [_score_document(prepared, mask, *one) for one in zip(
            prepared.prompts, np.split(values, splits), np.split(greedy, splits), strict=True)]
        for mask, values, greedy in zip(masks, likelihoods.loglikelihoods, likelihoods.greedy, strict=True)
    ]
    metric, task = prepared.task.metric, prepared.task
    extra = {name for row in rows for one in row for name in one.metrics} - {metric}
    measured = Evaluations(
        task=task.name,
        num_fewshot=prepared.num_fewshot,
        metric=metric,
        masks=tuple(masks),
        doc_ids=np.array([p.doc_id for p in prepared.prompts], np.int64),
        correct=np.array([[one.metrics[metric] for one in row] for row in rows]),
        gold_loglikelihood=np.array([[one.gold for one in row] for row in rows]),
        margin=np.array([[one.margin for one in row] for row in rows]),
        prediction=np.array([[one.prediction for one in row] for row in rows], np.int64),
        gold=np.array([p.gold for p in prepared.prompts], np.int64),
        num_options=np.array([0 if task.is_produced else p.num_options for p in prepared.prompts], np.int64),
        extra_metrics={name: np.array([[one.metrics.get(name, np.nan) for one in row] for row in rows])
                       for name in sorted(extra)},
        passages=prepared.passages,
        truncated=prepared.truncated,
        tokens=prepared.tokens * len(masks),
        layer_tokens=likelihoods.layer_tokens,
    )
    if task.question is not None:
        return by_question(measured, [task.question(p.doc) for p in prepared.prompts])
    return measured


def by_question(measured: Evaluations, questions: Sequence[Hashable]) -> Evaluations:
    """One document per question: right if every answer to it is judged right (MultiRC in the paper's code).

    A question stands where its first answer does, under that one's number. A limit may cut the last question's answers
    short; it then counts by those that were evaluated.

    Gold log-likelihoods are averaged over a question's answers, its margin is the smallest, and judgements are numbered
    as the digits of one number, so that prediction, gold and the number of options keep their meaning.
    """
    numbers = {q: i for i, q in enumerate(dict.fromkeys(questions))}
    owner = np.array([numbers[q] for q in questions])
    members = [np.flatnonzero(owner == i) for i in range(len(numbers))]

    def reduced(values: np.ndarray, how: Callable[..., Any]) -> np.ndarray:
        return np.stack([how(values[..., m], axis=-1) for m in members], axis=-1)

    def number(values: np.ndarray) -> np.ndarray:
        bases = [np.concatenate([[1], np.cumprod(measured.num_options[m])[:-1]]) for m in members]
        return np.stack([(values[..., m] * base).sum(-1) for m, base in zip(members, bases, strict=True)], axis=-1)

    passages = measured.passages
    if passages is not None:  # counted anew: an answer that shares nothing with its question's first one leaves a gap
        passages = np.unique(passages[[m[0] for m in members]], return_inverse=True)[1]
    return dataclasses.replace(
        measured,
        doc_ids=np.array([measured.doc_ids[m[0]] for m in members]),
        passages=passages,
        correct=reduced(measured.correct, np.min),
        gold_loglikelihood=reduced(measured.gold_loglikelihood, np.mean),
        margin=reduced(measured.margin, np.min),
        prediction=number(measured.prediction),
        gold=number(measured.gold),
        num_options=reduced(measured.num_options, np.prod),
        extra_metrics={name: reduced(values, np.mean) for name, values in measured.extra_metrics.items()},
    )


class _Scored(NamedTuple):
    metrics: dict[str, float]
    gold: float
    margin: float
    prediction: int


def _score_document(
    prepared: Prepared, mask: Mask, prompt: Prompt, loglikelihoods: Float[np.ndarray, " option"],
    greedy: Int[np.ndarray, " option"],
) -> _Scored:
    results = [(float(x), bool(g)) for x, g in zip(loglikelihoods, greedy, strict=True)]
    options = loglikelihoods[: prompt.num_options]
    gold = float(options[prompt.gold])
    others = np.delete(options, prompt.gold)
    margin = gold - float(others.max()) if len(others) else float("nan")
    metrics = prepared.task.metrics(prompt, results)
    if wrong := {name: value for name, value in metrics.items() if not math.isfinite(value)}:
        name, value = next(iter(wrong.items()))
        where = " ".join(filter(None, (prepared.of_document(prompt), mask_named(mask))))
        raise TaskError(f"the metric {name!r} of {where} is {value:g}, though all its log-likelihoods are numbers: "
                        "change the function of the task's definition that computes it, or leave that metric out there")
    return _Scored(metrics, gold, margin, int(np.argmax(options)))
