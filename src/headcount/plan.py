"""From what was asked to the jobs that answer it, and what they cost.

A job is the smallest unit that is measured and saved. Its description (`headcount.ledger.Job`) names everything its
result depends on, and nothing else, so that equal work has equal names: an order is named by the job that measured
the importance it comes from; the number of documents stands for `--limit`; without shots their seed does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from headcount.ledger import Job, job_id
from headcount.masks import Component, Mask, all_heads, blocks_run, random_order
from headcount.specs import StudySpec

# The oracle of heads is asked for by itself: of all heads of a large model it costs hundreds of evaluations.
Part = Literal["evaluate", "heads", "ffns", "curve", "head_oracle"]
PARTS: tuple[Part, ...] = ("evaluate", "heads", "ffns", "curve")
T = TypeVar("T")
# A gradient costs a forward and a backward pass through activations.
GRADIENT_PASSES = 2


@dataclass(frozen=True)
class TaskFacts:
    """What the planner must know of a task.

    Attributes:
        name: The task's name.
        fingerprint: Hash of its definition and documents.
        documents: How many documents are evaluated, by number of shots (shared shots may be left out).
        examples: How many training documents importance is measured on, by number of shots.
        tokens: Estimated tokens of one document by (number of shots, "evaluation" | "examples" | "gradient").
    """

    name: str
    fingerprint: str
    documents: Mapping[int, int]
    examples: Mapping[int, int]
    tokens: Mapping[tuple[int, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedJob:
    """One job, what it needs first, and what it costs.

    Attributes:
        job: Its description; its hash is its name.
        title: A few words for people.
        needs: Jobs whose entries it reads.
        passes: Forward passes over its documents; a gradient counts two, masks that share layers less than one each.
        tokens: Estimated tokens through the model.
    """

    job: Job
    title: str
    needs: tuple[Job, ...] = ()
    passes: float | int = 0
    tokens: float = 0.0


def reads(spec: StudySpec, parts: Sequence[Part]) -> tuple[str, ...]:
    """Which documents are needed, of "evaluation" and "examples"."""
    oracle = _oracle_split(spec)
    ffns = oracle if spec.ffn_order == "oracle" else "examples"
    needed = {"evaluate": {"evaluation"}, "heads": {"examples"}, "ffns": {ffns}, "curve": {"evaluation", "examples"},
              "head_oracle": {"examples", oracle}}
    wanted = set().union(*(needed[part] for part in parts))
    return tuple(split for split in ("evaluation", "examples") if split in wanted)


def _oracle_split(spec: StudySpec) -> str:
    """The paper's code measures the oracle on the documents that it then reports."""
    return "evaluation" if spec.protocol == "paper" else "examples"


def plan(
    spec: StudySpec, model: str, heads_per_layer: Sequence[int], tasks: Sequence[TaskFacts],
    parts: Sequence[Part] = PARTS,
) -> list[PlannedJob]:
    """All jobs of a study in an order in which they can be done.

    Args:
        spec: What was asked.
        model: The model's fingerprint.
        heads_per_layer: The model's number of heads of every layer.
        tasks: What is known of each task.
        parts: What of the study is wanted; a curve brings the importance that orders it.
    """
    jobs: dict[str, PlannedJob] = {}
    for task in tasks:
        for num_fewshot in spec.shots:
            for planned in _Planner(spec, model, tuple(heads_per_layer), task, num_fewshot).jobs(parts):
                jobs.setdefault(job_id(planned.job), planned)
    return list(jobs.values())


@dataclass(frozen=True)
class _Planner:
    """The jobs of one task at one number of shots."""

    spec: StudySpec
    model: str
    heads_per_layer: tuple[int, ...]
    task: TaskFacts
    num_fewshot: int

    @property
    def documents(self) -> int:
        return self.task.documents[self.num_fewshot]

    @property
    def examples(self) -> int:
        return self.task.examples[self.num_fewshot]

    def jobs(self, parts: Sequence[Part]) -> Iterator[PlannedJob]:
        if "evaluate" in parts or "curve" in parts:
            yield self._full("evaluation")
        if "head_oracle" in parts:
            yield self._gradient()
            yield from self._oracle("head")
        if not {"heads", "ffns", "curve"} & set(parts):
            return
        gradient = self._gradient()
        if "heads" in parts or "curve" in parts:
            yield gradient
        if "curve" in parts:
            yield from self._curves("head", gradient)
        ffns = gradient
        if self.spec.ffn_order == "oracle" and ("ffns" in parts or "curve" in parts):
            *singles, ffns = self._oracle("ffn")
            yield from [*singles, ffns]
        elif "ffns" in parts:
            yield gradient
        if "curve" in parts:
            yield from self._curves("ffn", ffns)

    def _base(self, kind: str, documents: int) -> dict[str, Any]:
        shots = {"seed": self.spec.seed, "shared_shots": self.spec.shared_shots} if self.num_fewshot else {}
        chat = {"chat": True} if self.spec.apply_chat_template else {}
        return {"kind": kind, "protocol": self.spec.protocol, "model": self.model, "task": self.task.name,
                "task_fingerprint": self.task.fingerprint, "num_fewshot": self.num_fewshot, "documents": documents,
                **shots, **chat}

    def _planned(self, job: Job, what: str, passes: float | int, tokens: str, *needs: Job) -> PlannedJob:
        per_document = self.task.tokens.get((self.num_fewshot, tokens), 0.0)
        title = f"{self.task.name}, {self.num_fewshot}-shot: {what}"
        return PlannedJob(job, title, needs, passes, passes * job["documents"] * per_document)

    def _gradient(self) -> PlannedJob:
        job = {**self._base("importance", self.examples), "method": "gradient"}
        return self._planned(job, "gradient importance", GRADIENT_PASSES, "gradient")

    def _full(self, split: str) -> PlannedJob:
        documents = self.documents if split == "evaluation" else self.examples
        job = {**self._base("evaluation", documents), "split": split, "curve": {"order": "none"}}
        return self._planned(job, f"full model, {split}", 1, split)

    def _curves(self, component: Component, importance: PlannedJob) -> Iterator[PlannedJob]:
        method = importance.job["method"]
        measured: dict[str, Any] = {"component": component, "order": method, "importance": job_id(importance.job)}
        if method == "gradient":
            measured["score"] = self.spec.head_score
        elif self.spec.protocol == "paper":
            measured["score"] = "accuracy"  # alone: equal accuracies stay in the order of layers
        yield from self._curve(measured, f"{component}s by {method}", importance.job)
        for i in range(self.spec.random_orders):
            order = {"component": component, "order": "random", "order_seed": self.spec.seed + i}
            yield from self._curve(order, f"{component}s at random")

    def _curve(self, order: Mapping[str, Any], what: str, *needs: Job) -> Iterator[PlannedJob]:
        for fractions in _chunks(self.spec.fractions, self.spec.masks_per_job):
            job = {**self._base("evaluation", self.documents), "split": "evaluation",
                   "curve": {**order, "fractions": list(fractions)}}
            span = f"{fractions[0]:.0%} to {fractions[-1]:.0%}"
            yield self._planned(job, f"{what}, {span}", len(fractions), "evaluation", *needs)

    def _shared(self, masks: Sequence[Mask]) -> float:
        """What masks cost together, in forward passes, since they share the layers before they differ."""
        return blocks_run(masks) / len(self.heads_per_layer)

    def _oracle(self, component: Component) -> list[PlannedJob]:
        split = _oracle_split(self.spec)
        documents = self.documents if split == "evaluation" else self.examples
        full = self._full(split)
        singles = [*self._heads_off(split, documents)] if component == "head" else [*self._ffns_off(split, documents)]
        measured = [full.job, *(s.job for s in singles)]
        job = {**self._base("importance", documents), "method": "oracle"}
        if component == "head":
            job |= {"component": "head", "sample": self.spec.head_sample}
        title = "head oracle" if component == "head" else "FFN oracle"
        return [full, *singles, self._planned(job, title, 0, split, *measured)]

    def _ffns_off(self, split: str, documents: int) -> Iterator[PlannedJob]:
        full = Mask.full(self.heads_per_layer)
        for layers in _chunks(range(len(self.heads_per_layer)), self.spec.masks_per_job):
            job = {**self._base("evaluation", documents), "split": split,
                   "curve": {"order": "single", "component": "ffn", "layers": list(layers)}}
            passes = self._shared([full.without_ffns([layer]) for layer in layers])
            yield self._planned(job, f"one FFN off, layers {layers[0]} to {layers[-1]}", passes, split)

    def _heads_off(self, split: str, documents: int) -> Iterator[PlannedJob]:
        heads, full = all_heads(self.heads_per_layer), Mask.full(self.heads_per_layer)
        if self.spec.head_sample is not None:
            drawn = random_order(len(heads), self.spec.seed)[: self.spec.head_sample]
            heads = [heads[i] for i in sorted(drawn)]
        for chosen in _chunks(heads, self.spec.masks_per_job):
            job = {**self._base("evaluation", documents), "split": split,
                   "curve": {"order": "single", "component": "head", "heads": [list(head) for head in chosen]}}
            passes = self._shared([full.without_heads([head]) for head in chosen])
            yield self._planned(job, f"one head off, {chosen[0]} to {chosen[-1]}", passes, split)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
