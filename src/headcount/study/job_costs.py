"""What each job of a study costs, by the model's config and the lengths of documents: counts, and what waits.

How layers, tokens and FLOPs are counted is told in `headcount.study.forecast`. What waits between two blocks of a model
that is streamed are hidden states, and the masks of attention: of all batches together they tell how often weights are
read, and of the largest one whether it may wait at all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from headcount.engine.pack import Budget
from headcount.measure.induction import largest_batch, states_of_induction
from headcount.measure.probes import ROW_STATES
from headcount.measure.texts import texts_of, usable_tokens
from headcount.model.circuits import probes_of
from headcount.model.without_weights import Shape
from headcount.study.costs import Passes, Waits, flops_of, passes_of
from headcount.study.jobs import Evaluation, GradientImportance, InductionScores, Job
from headcount.study.plan import GRADIENT_PASSES, PlannedJob, TaskFacts
from headcount.study.queue import rounds
from headcount.study.sharing import NONE, Layers, distinct_masks, layers_of
from headcount.study.spec import StudySpec
from headcount.study.tokens import Bundled, Documents, Work

# Documents on which it is tried what shared shots would save.
_SAMPLE = 32


class Largest(NamedTuple):
    """A batch: its tokens, the bytes that it takes at least while it waits, and the option that makes it smaller."""

    tokens: int = 0
    needed: int = 0
    smaller: str = ""


_NO_BATCH = Largest()


@dataclass(frozen=True)
class Cost:
    """What jobs compute.

    Attributes:
        jobs: How many they are.
        layer_tokens: Positions that blocks compute.
        flops: Floating-point operations, at the middle of the layer-tokens.
        waiting: Bytes that wait between blocks of a streamed run: hidden states, and the masks of attention.
        kept: The same where gradients are wanted, which keep every block's input.
        batch: What the largest batch takes of `waiting` or `kept`, about.
        largest: The batch that takes the most while it waits.
    """

    jobs: int = 0
    layer_tokens: Layers = NONE
    flops: float = 0.0
    waiting: float = 0.0
    kept: float = 0.0
    batch: float = 0.0
    largest: Largest = _NO_BATCH

    def plus(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(self.jobs + other.jobs, self.layer_tokens.plus(other.layer_tokens), self.flops + other.flops,
                    self.waiting + other.waiting, self.kept + other.kept, max(self.batch, other.batch),
                    max(self.largest, other.largest, key=lambda one: one.needed))


@dataclass(frozen=True, eq=False)
class JobCosts:
    """What jobs cost, by what is known of the model and the documents.

    Attributes:
        spec: What was asked.
        shape: The model.
        documents: Of every task, by name.
        facts: How many they are, and how many tokens one takes.
        trees: Whether prompts share their beginnings.
        budget: How large rows and batches are.
    """

    spec: StudySpec
    shape: Shape
    documents: Mapping[str, Documents]
    facts: Sequence[TaskFacts]
    trees: bool
    budget: Budget

    def cost(self, job: Job, shared: bool | None = None) -> Cost:
        """What one job computes.

        Args:
            job: The job.
            shared: Whether one draw of shots serves all documents; None: as asked.
        """
        layers = self.shape.anatomy.num_layers
        masks, kept, waiting, states = 1, 0.0, 0.0, 0
        if isinstance(job, InductionScores):
            states = states_of_induction(self.shape.model.dtype)
            # Prefix matching and copying read texts of their own; the paper's copying runs blocks twice.
            kinds = 3 if job.protocol == "paper" else 2
            work, runs = self._texts(job), Layers.exactly(layers * kinds)
            waiting = kinds * self._waiting(work, states, masked=True)
        elif isinstance(job, GradientImportance):
            work, runs = self._work(job, "gradient", "examples", shared), Layers.exactly(GRADIENT_PASSES * layers)
            masks, kept, states = GRADIENT_PASSES, self._waiting(work, layers + 1), layers + 1
        elif isinstance(job, Evaluation):
            work = self._work(job, "scored", job.split, shared)
            heads = self.shape.anatomy.heads_per_layer
            runs, masks = layers_of(job.masks, heads), distinct_masks(job.masks, heads)
            waiting, states = self._waiting(work, masks, masked=self.trees), masks
        else:
            return Cost(1)  # put together from other entries
        flops = flops_of(self.shape, work, runs.middle, masks)
        # At least: over trees, and where attention is read, masks are numbers; some models have two.
        numbers = self.trees if isinstance(job, Evaluation) else (
            isinstance(job, InductionScores) and self.shape.shows_attention)
        mask = work.width * (self.shape.model.dtype.itemsize if numbers else isinstance(job, InductionScores))
        # Where batches are not known, the largest has no less than a row of mean length.
        batch_at_least = work.largest or int(work.pairs / max(1, work.tokens))
        largest = Largest(batch_at_least, batch_at_least * (self._hidden(states) + mask), "batch_tokens")
        if isinstance(job, InductionScores):
            rows = probes_of(self.shape.anatomy.layers[0].d_model)[1]
            probes = Largest(rows, rows * self._hidden(ROW_STATES))
            largest = max(largest._replace(smaller=""), probes, key=lambda one: one.needed)
        tokens = work.largest or min(self.budget.batch_tokens, work.tokens)
        batch = max(waiting, kept) * tokens / max(1, work.tokens)
        return Cost(1, runs.times(work.tokens), flops, waiting, kept, batch, largest)

    def _waiting(self, work: Work, states: int, *, masked: bool = False) -> float:
        """Bytes that documents take between two blocks: so many hidden states of each, and its masks of attention."""
        # Masks are of numbers where prompts are trees, and to eager attention; else of yes and no.
        numbers = masked or self.shape.model.config.get_text_config()._attn_implementation == "eager"
        mask = self.shape.attention_kinds * (self.shape.model.dtype.itemsize if numbers else 1)
        return float(work.tokens * (self._hidden(states) + torch.int64.itemsize) + work.pairs * mask)

    def _hidden(self, states: int) -> int:
        """Bytes of so many hidden states of a position."""
        return states * self.shape.model.dtype.itemsize * self.shape.anatomy.layers[0].d_model

    def _work(
        self, job: Evaluation | GradientImportance, layout: Literal["scored", "gradient"],
        split: Literal["evaluation", "examples"], shared: bool | None,
    ) -> Work:
        """One pass over a job's documents; other draws of shots, and fewer documents, are tried on a sample."""
        documents, k, number = self.documents[job.task], job.num_fewshot, job.documents
        facts = next(f for f in self.facts if f.name == job.task)
        whole = (facts.documents if split == "evaluation" else facts.examples)[k]
        planned = number in (whole, self.spec.grid_limit, self.spec.transfer_limit)
        if isinstance(documents, Bundled) or (planned and (shared is None or not k)):
            return documents.work(split, k, number, layout, shared)
        few = min(_SAMPLE, whole)
        known = documents.work(split, k, whole, layout)
        scale = number / whole
        if shared is not None and k:
            scale *= documents.work(split, k, few, layout, shared).tokens / documents.work(split, k, few, layout).tokens
        return Work(known.tokens * scale, known.pairs * scale, known.places * number / whole)

    @property
    def probes(self) -> float:
        """Bytes that probes of heads take between two blocks: induction's, after its texts."""
        rows, _ = probes_of(self.shape.anatomy.layers[0].d_model)
        return self._waiting(Work(rows, rows, 0), ROW_STATES)

    def _texts(self, job: InductionScores) -> Work:
        """One pass over the random texts of one kind."""
        shape = self.shape
        texts, _ = self.texts_of_job(job)
        largest, width = largest_batch(texts, int(shape.has_bos), max(shape.anatomy.heads_per_layer), shape.device)
        return Work(sum(texts), sum(text**2 for text in texts), 0, largest, width)

    def texts_of_job(self, job: InductionScores) -> tuple[list[int], list[str]]:
        """How many tokens each random text of one kind has, and what is left out."""
        return texts_of(job.lengths, job.seeds, "paper" if job.protocol == "paper" else "sound",
                        window=self.shape.max_length, tokens=self._tokens, has_bos=self.shape.has_bos)

    @functools.cached_property
    def _tokens(self) -> int:
        """How many tokens random texts are drawn from; all of the vocabulary where there is no tokenizer."""
        if self.shape.tokenizer is None:
            return int(self.shape.model.config.get_text_config().vocab_size)
        return len(usable_tokens(self.shape.tokenizer, self.shape.model)[0])


def readings(todo: Sequence[PlannedJob], costs: Sequence[Cost], probes: float, waiting: float | int) -> Passes:
    """How often the weights are read where the model is streamed: the jobs of each round share readings.

    Induction scores do not: each job has a model of its own, whose heads are probed besides.
    """
    by_job = {id(planned): cost for planned, cost in zip(todo, costs, strict=True)}
    scored, kept = [], []
    for jobs in rounds(todo):
        own = [by_job[id(one)] for one in jobs]
        together = sum_of(own)
        if isinstance(jobs[0].job, InductionScores):
            scored += [size for cost in own for size in (Waits(cost.waiting, cost.batch), Waits(probes, 0))]
        else:
            scored.append(Waits(together.waiting, together.batch))
            kept.append(Waits(together.kept, together.batch))
    return passes_of([one for one in scored if one.together], [one for one in kept if one.together], waiting)


def sum_of(costs: Iterable[Cost]) -> Cost:
    """All together."""
    total = Cost()
    for cost in costs:
        total = total.plus(cost)
    return total
