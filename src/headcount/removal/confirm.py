"""Full against removed on documents that chose nothing: what a removal costs, without the optimism of the choice.

A study picks heads and FFNs on some documents, and the point of its curve on others. The loss at a point that was
picked by its own result looks smaller than it is. So the two models are compared once more, on documents that the study
read neither for importance nor for accuracy:

1. Of every task the evaluated documents behind the study's `limit`, in the order in which it evaluated them.
2. Where the study evaluated all of them, or nearly (fewer than 20 are left): documents of the split that importance was
   measured on, behind its `importance_limit`, if these are more.
3. A task that has neither is left out, and named.

A document is left out that is a shared shot, that is the same question as one that the study read (whatever its white
space, the case of its letters and the order of its options), or shares a passage with one (`headcount.tasks.passages`);
and none is among its own shots. Other documents' own shots are no reason: a training document may have stood there. The
removed model was proved equal to the masked one (`headcount.removal.remove`), so the full model is run under two masks,
and the layers before the first removed part are computed once for both. Intervals and verdicts are a study's own
(`headcount.stats.intervals`): paired, documents of a passage together, and the mean over tasks unweighted, as of a
stratified sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from headcount.engine.forward import Progress
from headcount.engine.pack import Budget
from headcount.errors import OptionError, TaskError, listed
from headcount.masks import Mask
from headcount.measure.evaluate import Prepared, prepare_prompts, score
from headcount.model.load import LoadedModel
from headcount.stats.intervals import (
    COSTS_MORE,
    WITHIN,
    Sample,
    Verdict,
    accuracy_interval,
    difference_interval,
    verdict,
)
from headcount.stats.words import points_of, signed
from headcount.tasks.fewshot import LM_EVAL_SEED, Document, FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.passages import passages, plain
from headcount.tasks.task import SPLITS, Prompt, Protocol, Split, Task

# How many training documents are taken, where no number is named.
TRAINING = 200
# Fewer evaluated documents than these tell nothing: training documents are looked for.
FEWEST = 20
# Averages such as 2/3 leave 0..1 in their last bits.
_EQUAL = 1e-9


@dataclass(frozen=True)
class StudyFacts:
    """What a study says of the documents that it read.

    Attributes:
        tasks: As the study names them.
        num_fewshot: Shots before each document, at the point that was chosen.
        data: The study's folder of documents.
        limit: How many documents of each task were evaluated, the first ones; None: all.
        importance_limit: How many importance was measured on, the first ones.
        examples_split: The split that importance was measured on.
        seed: Of the sampler of shots.
        shared_shots: Whether one draw of shots serves all documents.
        protocol: "sound" or "paper".
        margin: The loss that is to be ruled out, 0..1.
        apply_chat_template: Whether prompts stand in the model's chat template.
        also_read: Numbers of documents that the same folder was asked for besides, by task and split: `limit` and
            `importance_limit` are at least these.
    """

    tasks: tuple[str, ...]
    num_fewshot: int = 0
    data: Path | None = None
    limit: int | None = None
    importance_limit: int = 2500
    examples_split: str = "train"
    seed: int = LM_EVAL_SEED
    shared_shots: bool = False
    protocol: Protocol = "sound"
    margin: float = 0.02
    apply_chat_template: bool = False
    also_read: Mapping[str, Mapping[Split, int]] = field(default_factory=dict)

    def limit_of(self, task: str, split: Split) -> int | None:
        """How many documents of a task's split were read, the first ones; None: all."""
        limit = self.limit if split == "evaluation" else self.importance_limit
        return None if limit is None else max(limit, self.also_read.get(task, {}).get(split, 0))


def facts_of(
    spec: Mapping[str, Any], num_fewshot: int | None = None, asked: Sequence[Mapping[str, Any]] = ()
) -> StudyFacts:
    """The facts of a study, from what was asked for it (`open_study(folder).spec`).

    Args:
        spec: Plain data, as study.json has it.
        num_fewshot: At this number of shots; by default the most that the study has, as where a point is chosen.
        asked: All that the folder was asked for (`open_study(folder).description["asked"]`): whoever chose a point may
            have seen what another request measured on more documents.
    """
    names = ("limit", "importance_limit", "examples_split", "seed", "shared_shots", "protocol", "margin",
             "apply_chat_template")
    data = spec.get("data")
    return StudyFacts(tuple(spec["tasks"]), max(spec["shots"]) if num_fewshot is None else num_fewshot,
                      Path(data) if data is not None else None, **{name: spec[name] for name in names if name in spec},
                      also_read=_also_read(asked))


def _also_read(asked: Sequence[Mapping[str, Any]]) -> dict[str, dict[Split, int]]:
    """The largest number of documents that any request read, by task and split."""
    names: dict[Split, str] = {"evaluation": "documents", "examples": "examples"}
    most: dict[str, dict[Split, int]] = {}
    for request in asked:
        for task, known in [*request.get("tasks", {}).items(), *request.get("unseen", {}).items()]:
            for numbers in [known, *known.get("by_shots", {}).values()]:
                for split, name in names.items():
                    of_task = most.setdefault(task, {})
                    of_task[split] = max(of_task.get(split, 0), numbers.get(name) or 0)
    return most


@dataclass(frozen=True)
class Compared:
    """The full and the removed model on the same documents; bounds are those of 95 % intervals, NaN without one.

    Attributes:
        documents: How many.
        full: The full model's accuracy.
        removed: The removed model's.
        difference: Removed - full.
        low: The difference's lower bound.
        high: Its upper bound.
        full_low: The full model's accuracy's lower bound.
        full_high: Its upper bound.
        removed_low: The removed model's accuracy's lower bound.
        removed_high: Its upper bound.
        verdict: What the difference's interval says of a loss of the margin.
    """

    documents: int
    full: float
    removed: float
    difference: float
    low: float
    high: float
    full_low: float
    full_high: float
    removed_low: float
    removed_high: float
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; None where there is no number."""
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in asdict(self).items()}


@dataclass(frozen=True)
class ConfirmedTask:
    """One task's result.

    Attributes:
        task: Its name.
        metric: What is called accuracy here.
        split: "evaluation": documents of the split that was evaluated. "examples": of the one of importance.
        split_name: What the task calls that split.
        doc_ids: Which documents of that split, by their numbers there.
        compared: The result.
    """

    task: str
    metric: str
    split: Split
    split_name: str
    doc_ids: tuple[int, ...]
    compared: Compared

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"task": self.task, "metric": self.metric, "split": self.split, "split_name": self.split_name,
                **self.compared.to_dict(), "doc_ids": list(self.doc_ids)}


@dataclass(frozen=True)
class Confirmation:
    """What a removal costs on documents that chose nothing.

    Attributes:
        num_fewshot: Shots before each document.
        margin: The loss that is to be ruled out, 0..1.
        tasks: One by one.
        mean: Over tasks, unweighted; None where no task has other documents.
        left_out: Tasks that have none.
        asked: How many documents of each task were asked for; None: all that there are.
    """

    num_fewshot: int
    margin: float
    tasks: tuple[ConfirmedTask, ...]
    mean: Compared | None
    left_out: tuple[str, ...] = ()
    asked: int | None = None

    @property
    def sentence(self) -> str:
        """The result in words, without a full stop at the end."""
        without = f"{listed(self.left_out)} {'has' if len(self.left_out) == 1 else 'have'} no other documents"
        if self.mean is None:
            return f"nothing could be confirmed: {without}"
        mean, training = self.mean, [one.task for one in self.tasks if one.split == "examples"]
        tasks = self.tasks[0].task if len(self.tasks) == 1 else f"{len(self.tasks)} tasks"
        of_training = f" ({_training(training, len(self.tasks))})" if training else ""
        documents = "document" if mean.documents == 1 else "documents"
        text = (f"on {mean.documents:,} other {documents} of {tasks}{of_training} accuracy is {mean.removed:.3f}, "
                f"the full model's {mean.full:.3f}: {signed(mean.difference)} points ({_interval(mean)})")
        fewer = [one.task for one in self.tasks if self.asked is not None and one.compared.documents < self.asked]
        text += f"; {self._verdict(mean.verdict)}" + (f"; {without}" if self.left_out else "")
        return text + (f"; {listed(fewer)} {'has' if len(fewer) == 1 else 'have'} fewer than the {self.asked:,} that "
                       "were asked for" if fewer else "")

    def _verdict(self, said: Verdict) -> str:
        loss = f"a loss of {points_of(self.margin)}"
        if said == WITHIN:
            return f"{loss} is ruled out"
        more = f"a loss of more than {points_of(self.margin)}"
        return f"{more} is shown" if said == COSTS_MORE else f"{loss} is neither ruled out nor shown"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"sentence": self.sentence, "num_fewshot": self.num_fewshot, "margin": self.margin,
                "tasks": [one.to_dict() for one in self.tasks],
                "mean": None if self.mean is None else self.mean.to_dict(), "left_out": list(self.left_out),
                "asked": self.asked}


def confirm(
    full: LoadedModel, mask: Mask, study: StudyFacts, n: int | None = None, *,
    tasks: Mapping[str, Task] | None = None, budget: Budget | None = None, progress: Progress | None = None,
) -> Confirmation:
    """Measure the full model and the masked one on documents that chose nothing.

    The removed model is proved equal to the masked one, so the full model is run under both masks, which share the
    layers before the first removed part.

    Args:
        full: The full model, loaded as the study loaded it.
        mask: What is kept.
        study: Which documents the study read.
        n: At most so many documents of each task; None: all evaluated ones that are left, 200 of training documents.
        tasks: The study's tasks, where they are loaded already.
        budget: How long rows and how large batches may be; None measures the device.
        progress: Called with the number of tokens after each batch.

    Raises:
        OptionError: If n is below 1, the mask is of another model, or prompts of the study had another chat template.
        TaskError: If a task is unknown by now; or DataError, where its documents are gone or do not fit.
    """
    if n is not None and n < 1:
        raise OptionError(f"a confirmation needs at least 1 document, not `n` {n}", fields={"n": "--confirm"})
    if full.apply_chat_template != study.apply_chat_template:
        raise OptionError(f"the study was measured with apply_chat_template {study.apply_chat_template}, and "
                          f"{full.name} is loaded with {full.apply_chat_template}: load it as the study did")
    full.anatomy.check(mask)
    if tasks is None:
        tasks = get_tasks(study.tasks, data=study.data, examples_split=study.examples_split, protocol=study.protocol)
    found, samples, left_out = list[ConfirmedTask](), list[Sample](), list[str]()
    for task in tasks.values():
        split, doc_ids = other_documents(task, study, n)
        prompts = _prompts(full, task, study, split, doc_ids) if doc_ids else []
        if not prompts:
            left_out.append(task.name)
            continue
        prepared = prepare_prompts(full, task, prompts, study.num_fewshot, split=split, budget=budget)
        samples.append(_measured(full, mask, prepared, progress))
        found.append(ConfirmedTask(task.name, task.metric, split, task.split_name(split),
                                   tuple(prompt.doc_id for prompt in prompts), _compared(samples[-1:], study.margin)))
    return Confirmation(study.num_fewshot, study.margin, tuple(found),
                        _compared(samples, study.margin) if samples else None, tuple(left_out), n)


def other_documents(task: Task, study: StudyFacts, n: int | None = None) -> tuple[Split, list[int]]:
    """Which documents of a task chose nothing: of which split, and their numbers there, at most n; maybe none.

    Args:
        task: Of the study.
        study: Which documents the study read.
        n: The first so many of them; None: all evaluated ones, 200 of training documents.
    """
    read, rest = _Read([], set()), dict[Split, dict[int, Document]]()
    for split in SPLITS:
        limit = study.limit_of(task.name, split)
        try:
            documents = task.documents(split)
        except TaskError:
            if split == "evaluation":
                raise
            continue  # a task need not have such a split where importance was not measured on it
        ids = task.doc_ids(split, FewShot(study.num_fewshot, None, study.seed, study.shared_shots))
        of_study = {doc_id: documents[doc_id] for doc_id in ids[:limit]}
        read.texts.extend(task.texts(split, of_study))
        read.likenesses.update(task.likenesses(split, of_study))
        rest[split] = {doc_id: documents[doc_id] for doc_id in ids[limit:]} if limit is not None else {}
    evaluated = _unlike(read, task, "evaluation", rest["evaluation"], n)
    if "examples" not in rest or len(evaluated) >= (FEWEST if n is None else min(n, FEWEST)):
        return "evaluation", evaluated
    training = _unlike(read, task, "examples", rest["examples"], TRAINING if n is None else n)
    return ("examples", training) if len(training) > len(evaluated) else ("evaluation", evaluated)


class _Read(NamedTuple):
    """What a study read of a task."""

    texts: list[str]
    likenesses: set[str]


def _unlike(
    read: _Read, task: Task, split: Split, documents: Mapping[int, Document], n: int | None
) -> list[int]:
    """The first n of these documents that neither are a question that was read nor share a passage with one."""
    looked_at = len(documents) if n is None else min(n, len(documents))
    while looked_at:
        some = dict(itertools.islice(documents.items(), looked_at))
        shares, likenesses = _share_passages(task.texts(split, some), read.texts), task.likenesses(split, some)
        kept = [doc_id for doc_id, shared, like in zip(some, shares, likenesses, strict=True)
                if not shared and like not in read.likenesses][:n]
        if looked_at == len(documents) or len(kept) == n:
            return kept
        looked_at = min(2 * looked_at, len(documents))
    return []


def _share_passages(texts: Sequence[str], read: Sequence[str]) -> list[bool]:
    """Which texts share a passage with one that was read."""
    numbers = passages([plain(text) for text in (*texts, *read)]).tolist()
    of_read = {*numbers[len(texts) :]}
    return [number in of_read for number in numbers[: len(texts)]]


def _prompts(
    full: LoadedModel, task: Task, study: StudyFacts, split: Split, doc_ids: Sequence[int]
) -> list[Prompt]:
    """These documents with their shots; without those that would be their own shots.

    Prompts are built from the first document on, so that each has the shots that a whole evaluation gives it.
    """
    wanted = {*doc_ids}
    order = task.doc_ids(split, FewShot(study.num_fewshot, None, study.seed, study.shared_shots))
    last = max(place for place, doc_id in enumerate(order, 1) if doc_id in wanted)
    few_shot = FewShot(study.num_fewshot, last, study.seed, study.shared_shots)
    built = task.prompts(split, few_shot, chat=full.chat, apart=True)
    return [prompt for prompt in built if prompt.doc_id in wanted]


def _measured(full: LoadedModel, mask: Mask, prepared: Prepared, progress: Progress | None) -> Sample:
    """The metric of both models on these documents, in two rows."""
    measured = score(full, prepared, [Mask.full(full.anatomy.heads_per_layer), mask], progress=progress)
    values = measured.correct
    return Sample(values, measured.passages, bool(((values >= -_EQUAL) & (values <= 1 + _EQUAL)).all()))


def _compared(samples: Sequence[Sample], margin: float) -> Compared:
    """Both models on the mean over tasks.

    Args:
        samples: Of each task the metric of the full model and of the removed one, in two rows.
        margin: The loss that is to be ruled out.
    """
    accuracies: Float[np.ndarray, "model=2"] = np.mean([one.values.mean(axis=1) for one in samples], axis=0)
    of_models = accuracy_interval(samples)
    away = [Sample(one.values[1:] - one.values[:1], one.clusters, one.bounded) for one in samples]
    low, high = (float(bound[0]) for bound in difference_interval(away))
    documents: Int[np.ndarray, " task"] = np.array([one.values.shape[1] for one in samples])
    # Not the difference of the two means: where no document changed it must be 0 to the last bit.
    difference = float(np.mean([one.values.mean() for one in away]))
    return Compared(int(documents.sum()), float(accuracies[0]), float(accuracies[1]), difference, low, high,
                    float(of_models.low[0]), float(of_models.high[0]), float(of_models.low[1]),
                    float(of_models.high[1]), verdict(low, high, margin))


def _interval(of: Compared) -> str:
    return f"95 % interval {signed(of.low)} to {signed(of.high)}" if of.low == of.low else "no interval"


def _training(tasks: Sequence[str], of: int) -> str:
    """Of which tasks the documents are training documents."""
    if len(tasks) == of:
        return "training documents that importance did not read"
    return f"of {listed(tasks)} training documents that importance did not read"
