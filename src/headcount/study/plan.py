"""From what was asked to the jobs that answer it, and what they cost.

A job is the smallest unit that is measured and saved. Its description (`study.ledger.Job`) names everything its
result depends on, and nothing else, so that equal work has equal names: an order is named by the job that measured
the importance it comes from; the number of documents stands for `--limit`; without shots their seed does not count.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from headcount.masks import Component, Mask, all_heads, blocks_run, random_order
from headcount.study.ledger import Job, job_id
from headcount.study.spec import INDUCTION_TEXTS, StudySpec

# The oracle of heads is asked for by itself: of all heads of a large model it costs hundreds of evaluations.
Part = Literal["evaluate", "heads", "ffns", "curve", "head_oracle", "grid", "transfer", "induction"]
CURVES: tuple[Part, ...] = ("evaluate", "heads", "ffns", "curve")
# The donor whose order is that of all tasks together, and of all but the one that is pruned.
AGGREGATE, OTHERS, OWN = "mean", "mean without own", "own"
T = TypeVar("T")
# Tokens of a text of random tokens, on average over the default lengths: 4 repeats of 25 to 223.
INDUCTION_TOKENS = 500
# Raised when scores of the same texts change. 2: without BOS, copying leaves the first token out of view.
INDUCTION_VERSION = 2
# Raised when what protocol "paper" measures of tasks changes; entries without it are of version 1. 2: its order of
# documents, its draws of shots, and log-likelihoods over the tokenizer's tokens alone.
PAPER_VERSION = 2
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
        unseen: Whether it is only pruned by the orders of other tasks.
    """

    name: str
    fingerprint: str
    documents: Mapping[int, int]
    examples: Mapping[int, int]
    tokens: Mapping[tuple[int, str], float] = field(default_factory=dict)
    unseen: bool = False


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


def parts_of(spec: StudySpec) -> tuple[Part, ...]:
    """What of a study its options ask for."""
    found: list[Part] = [*CURVES] if "curves" in spec.measure else ["evaluate"] if spec.tasks else []
    return (*found, *(part for part in spec.measure if part != "curves"))


def reads(spec: StudySpec, parts: Sequence[Part]) -> tuple[str, ...]:
    """Which documents are needed, of "evaluation" and "examples"."""
    oracle = _oracle_split(spec)
    ffns = oracle if spec.ffn_order == "oracle" else "examples"
    both = {"evaluation", "examples"}
    needed = {"evaluate": {"evaluation"}, "heads": {"examples"}, "ffns": {ffns}, "curve": both,
              "head_oracle": {"examples", oracle}, "grid": both, "transfer": both, "induction": set()}
    wanted: set[str] = set().union(*(needed[part] for part in parts))
    return tuple(split for split in ("evaluation", "examples") if split in wanted)


def _oracle_split(spec: StudySpec) -> str:
    """The paper's code measures the oracle on the documents that it then reports."""
    return "evaluation" if spec.protocol == "paper" else "examples"


def plan(
    spec: StudySpec, model: str, heads_per_layer: Sequence[int], tasks: Sequence[TaskFacts],
    parts: Sequence[Part] = CURVES, *, through_norms: bool = False,
) -> list[PlannedJob]:
    """All jobs of a study in an order in which they can be done.

    Args:
        spec: What was asked.
        model: The model's fingerprint.
        heads_per_layer: The model's number of heads of every layer.
        tasks: What is known of each task.
        parts: What of the study is wanted; a curve brings the importance that orders it.
        through_norms: Whether the model norms what its branches put out (`LoadedModel.norms`). Gradient scores
            are then taken through these norms, which an earlier version did not do: their entries have other names.
    """
    planners = [_Planner(spec, model, tuple(heads_per_layer), task, k, through_norms)
                for task in tasks for k in spec.shots]
    jobs: dict[str, PlannedJob] = {}
    wanted = [*(p.jobs(parts) for p in planners if not p.task.unseen)]
    for p in planners:
        donors = [q for q in planners if q.num_fewshot == p.num_fewshot and not q.task.unseen]
        if "curve" in parts and len(donors) > 1 and not p.task.unseen:
            wanted.append(p.common(donors))
        if "grid" in parts and not p.task.unseen:
            wanted.append(p.grid(donors, "curve" in parts))
        if "transfer" in parts:
            wanted.append(p.transfers(donors, parts))
    if "induction" in parts:
        wanted.append(_inductions(spec, model))
    for planned in itertools.chain.from_iterable(wanted):
        jobs.setdefault(job_id(planned.job), planned)
    return list(jobs.values())


def _inductions(spec: StudySpec, model: str) -> Iterator[PlannedJob]:
    """Induction scores of the model, and of the same model with random weights."""
    lengths, seeds = INDUCTION_TEXTS[spec.protocol]
    seeds, tokens = spec.induction_seeds or seeds, float(INDUCTION_TOKENS)
    chosen: dict[str, Any] = {}
    if spec.induction_lengths is not None:
        lengths, tokens = len(spec.induction_lengths), 4 * sum(spec.induction_lengths) / len(spec.induction_lengths)
        chosen["lengths"] = sorted(spec.induction_lengths)
    for weights in ("trained", "random")[: 1 if spec.skip_control else 2]:
        job = {"kind": "induction", "protocol": spec.protocol, "model": model, "weights": weights, **chosen,
               "seeds": seeds, "seed": spec.seed, "documents": lengths * seeds, "version": INDUCTION_VERSION}
        # Prefix matching and copying read texts of their own.
        yield PlannedJob(job, f"induction scores, {weights} weights", passes=2, tokens=2 * lengths * seeds * tokens)


@dataclass(frozen=True)
class _Planner:
    """The jobs of one task at one number of shots."""

    spec: StudySpec
    model: str
    heads_per_layer: tuple[int, ...]
    task: TaskFacts
    num_fewshot: int
    through_norms: bool = False

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
        wanted = set(parts)
        if wanted & {"heads", "curve", "grid", "transfer"}:
            yield self._gradient()
        if "curve" in parts:
            yield from self._curves("head")
        if wanted & {"ffns", "curve", "grid"} or ("transfer" in parts and "ffn" in self.spec.transfer_components):
            yield from self._importance("ffn")
        if "curve" in parts:
            yield from self._curves("ffn")

    def _importance(self, component: Component) -> list[PlannedJob]:
        """What orders heads, or FFNs, and before it what it is made of."""
        oracle = component == "ffn" and self.spec.ffn_order == "oracle"
        return self._ffn_oracle if oracle else [self._gradient()]

    def _order(self, component: Component) -> tuple[dict[str, Any], Job]:
        """By what a component is ordered, as a curve's description has it, and the job that it is read from."""
        importance = self._importance(component)[-1].job
        order: dict[str, Any] = {"component": component, "order": importance["method"],
                                 "score": self.spec.scores[component]}
        if self.spec.protocol == "sound" and order["score"] == "accuracy":
            del order["score"]  # not alone: between equal accuracies log-likelihood decides
        return order, importance

    def _base(self, kind: str, documents: int) -> dict[str, Any]:
        shots = {"seed": self.spec.seed, "shared_shots": self.spec.shared_shots} if self.num_fewshot else {}
        chat = {"chat": True} if self.spec.apply_chat_template else {}
        paper = {"paper_version": PAPER_VERSION} if self.spec.protocol == "paper" else {}
        return {"kind": kind, "protocol": self.spec.protocol, "model": self.model, "task": self.task.name,
                "task_fingerprint": self.task.fingerprint, "num_fewshot": self.num_fewshot, "documents": documents,
                **shots, **chat, **paper}

    def _planned(self, job: Job, what: str, passes: float | int, tokens: str, *needs: Job) -> PlannedJob:
        per_document = self.task.tokens.get((self.num_fewshot, tokens), 0.0)
        title = f"{self.task.name}, {self.num_fewshot}-shot: {what}"
        return PlannedJob(job, title, needs, passes, passes * job["documents"] * per_document)

    def _gradient(self) -> PlannedJob:
        norms = {"through_norms": True} if self.through_norms else {}
        job = {**self._base("importance", self.examples), "method": "gradient", **norms}
        return self._planned(job, "gradient importance", GRADIENT_PASSES, "gradient")

    def _full(self, split: str) -> PlannedJob:
        documents = self.documents if split == "evaluation" else self.examples
        job = {**self._base("evaluation", documents), "split": split, "curve": {"order": "none"}}
        return self._planned(job, f"full model, {split}", 1, split)

    def _curves(self, component: Component) -> Iterator[PlannedJob]:
        order, importance = self._order(component)
        yield from self._curve({**order, "importance": job_id(importance)}, f"{component}s by {order['order']}",
                               self.spec.fractions, self.documents, importance)
        for i in range(self.spec.random_orders):
            yield from self._random(component, i, self.spec.fractions_of_random, self.documents)

    def _random(
        self, component: Component, number: int, fractions: Sequence[float], documents: int
    ) -> Iterator[PlannedJob]:
        order = {"component": component, "order": "random", "order_seed": self.spec.seed + number}
        yield from self._curve(order, f"{component}s at random", fractions, documents)

    def _curve(
        self, order: Mapping[str, Any], what: str, steps: Sequence[float], documents: int, *needs: Job
    ) -> Iterator[PlannedJob]:
        for fractions in _chunks(steps, self.spec.masks_per_job):
            job = {**self._base("evaluation", documents), "split": "evaluation",
                   "curve": {**order, "fractions": list(fractions)}}
            span = f"{fractions[0]:.0%} to {fractions[-1]:.0%}"
            yield self._planned(job, f"{what}, {span}", len(fractions), "evaluation", *needs)

    def common(self, donors: Sequence[_Planner]) -> Iterator[PlannedJob]:
        """This task pruned by the order of all tasks together, as one smaller model for all of them would be."""
        for component in ("head", "ffn"):
            order, needs = self._together(component, donors)
            yield from self._curve({**order, "order": "common"}, f"{component}s by the order of all tasks",
                                   self.spec.fractions_of_common, self.documents, *needs)

    def grid(self, donors: Sequence[_Planner], with_curves: bool) -> Iterator[PlannedJob]:
        """Heads and FFNs pruned jointly, by this task's own orders (points of curves are left out) or by all tasks'."""
        own = self.spec.grid_order == "own" or len(donors) < 2
        (heads, of_heads), (ffns, of_ffns) = (self._together(c, [self] if own else donors) for c in ("head", "ffn"))
        steps = (0.0, *self.spec.grid_fractions)
        points = [[h, f] for h in steps for f in steps
                  if (h and f) or ((h or f) and not (own and with_curves and (h or f) in self.spec.fractions))]
        documents = min(self.documents, self.spec.grid_limit or self.documents)
        orders: dict[str, Any] = {"heads": heads, "ffns": ffns, "donor": AGGREGATE}
        if own:  # named as in earlier versions
            orders = {kind: {**order, "importance": order["importance"][0]}
                      for kind, order in (("heads", heads), ("ffns", ffns))}
        for chunk in _chunks(points, self.spec.masks_per_job):
            job = {**self._base("evaluation", documents), "split": "evaluation",
                   "curve": {"order": "grid", **orders, "points": list(chunk)}}
            (h, f), (last_h, last_f) = chunk[0], chunk[-1]
            title = f"grid, {h:.0%} of heads and {f:.0%} of FFNs to {last_h:.0%} and {last_f:.0%}"
            yield self._planned(job, title, len(chunk), "evaluation", *of_heads, *of_ffns)

    def _together(self, component: Component, members: Sequence[_Planner]) -> tuple[dict[str, Any], list[Job]]:
        """The order of several tasks together, as a description has it, and the jobs that it is read from."""
        orders = [member._order(component) for member in members]
        needs = [importance for _, importance in orders]
        aggregate = {"aggregate": self.spec.aggregate} if len(members) > 1 else {}
        return {**orders[0][0], "importance": [job_id(job) for job in needs], **aggregate}, needs

    def transfers(self, donors: Sequence[_Planner], parts: Sequence[Part]) -> Iterator[PlannedJob]:
        """This task pruned by the orders of all tasks at this number of shots, each and together."""
        documents = min(self.documents, self.spec.transfer_limit or self.documents)
        known = "curve" in parts and set(self.spec.transfer_fractions) <= set(self.spec.fractions)
        if self.task.unseen:
            yield self._full("evaluation")
        for component in self.spec.transfer_components:
            chosen: dict[str, Sequence[_Planner]] = {AGGREGATE: donors}
            if self.task.unseen:
                yield from self._random(component, 0, self.spec.transfer_fractions, documents)
            else:
                others = [d for d in donors if d.task.name != self.task.name]
                # One other task is a donor of its own, and a single one's aggregate is its own order.
                chosen = chosen if others else {}
                chosen |= {d.task.name: [d] for d in others} | ({OTHERS: others} if len(others) > 1 else {})
                if others and not known:
                    chosen[OWN] = [self]
                beside = self.spec.fractions_of_random if "curve" in parts and self.spec.random_orders else ()
                if missing := [f for f in self.spec.transfer_fractions if others and f not in beside]:
                    yield from self._random(component, 0, missing, documents)
            for donor, members in chosen.items():
                yield from self._transfer(component, donor, members, documents)

    def _transfer(
        self, component: Component, donor: str, members: Sequence[_Planner], documents: int
    ) -> Iterator[PlannedJob]:
        order, needs = self._together(component, members)
        yield from self._curve({**order, "order": "transfer", "donor": donor}, f"{component}s by the order of {donor}",
                               self.spec.transfer_fractions, documents, *needs)

    def _shared(self, masks: Sequence[Mask]) -> float:
        """What masks cost together, in forward passes, since they share the layers before they differ."""
        return blocks_run(masks) / len(self.heads_per_layer)

    @functools.cached_property
    def _ffn_oracle(self) -> list[PlannedJob]:
        return self._oracle("ffn")

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
