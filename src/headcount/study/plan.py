"""From what was asked to the jobs that answer it, and what they cost.

Jobs come in an order in which they can be done: importance before the curves that it orders. What an entry of the
folder holds already is not planned again, step by step: a curve that is asked for at other fractions is measured at
those that no entry of the same order, documents and shots has (`missing`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from headcount.masks import Component, all_heads, random_order
from headcount.study.jobs import (
    Evaluation,
    GradientImportance,
    HeadOracle,
    ImportanceJob,
    InductionScores,
    Job,
    OracleImportance,
    Weights,
    name_of,
)
from headcount.study.masksets import (
    AGGREGATE,
    OTHERS,
    OWN,
    RESERVED_DONORS,
    CommonCurve,
    CommonUniformCurve,
    FullModel,
    Grid,
    GridOrder,
    MaskSet,
    Method,
    OwnCurve,
    RandomCurve,
    SingleFFNs,
    SingleHeads,
    Step,
    Transfer,
    UniformCurve,
    steps_of,
    with_steps,
)
from headcount.study.shapes import shape_of, shares
from headcount.study.spec import CURVES, INDUCTION_TEXTS, Part, StudySpec

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
    """One job and what it costs.

    Attributes:
        job: What is measured.
        passes: Forward passes over its documents; a gradient counts two, masks that share layers less than one each.
        tokens: Estimated tokens through the model.
    """

    job: Job
    passes: float | int = 0
    tokens: float = 0.0

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        """What its entry answers for."""
        return self.job.key()

    @property
    def title(self) -> str:
        """A few words for people."""
        return self.job.title


def reads(spec: StudySpec, parts: Sequence[Part]) -> tuple[str, ...]:
    """Which documents are needed, of "evaluation" and "examples"."""
    oracle = _oracle_split(spec)
    ffns = oracle if spec.ffn_order == "oracle" else "examples"
    both: set[str] = {"evaluation", "examples"}
    needed: dict[Part, set[str]] = {
        "evaluate": {"evaluation"}, "heads": {"examples"}, "ffns": {ffns}, "curve": both,
        "head_oracle": {"examples", oracle}, "grid": both, "transfer": both, "induction": set()}
    wanted: set[str] = set().union(*(needed[part] for part in parts))
    return tuple(split for split in ("evaluation", "examples") if split in wanted)


def _oracle_split(spec: StudySpec) -> Literal["evaluation", "examples"]:
    """The paper's code measures the oracle on the documents that it then reports."""
    return "evaluation" if spec.protocol == "paper" else "examples"


def plan(
    spec: StudySpec, model: str, heads_per_layer: Sequence[int], tasks: Sequence[TaskFacts],
    parts: Sequence[Part] = CURVES, *, through_norms: bool = False, groups_per_layer: Sequence[int] = (),
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
        groups_per_layer: The model's number of KV groups of every layer; only `uniform` needs them.

    Raises:
        HeadcountError: If uniform curves are asked for, and the model or the fractions allow none.
    """
    steps = uniform_steps(spec, heads_per_layer, groups_per_layer, parts)
    planners = [_Planner(spec, model, tuple(heads_per_layer), task, k, through_norms, steps)
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
        jobs.setdefault(name_of(planned.job), planned)
    return list(jobs.values())


@dataclass(frozen=True)
class UniformSteps:
    """The steps of curves that leave every layer the same shape; none where they are not asked for.

    Attributes:
        shares: Shares of heads that are removed.
        groups: KV groups of every layer of the model.
    """

    shares: tuple[float, ...] = ()
    groups: int = 0


def uniform_steps(
    spec: StudySpec, heads_per_layer: Sequence[int], groups_per_layer: Sequence[int], parts: Sequence[Part]
) -> UniformSteps:
    """The steps of uniform curves; arguments and errors as of `plan`."""
    if not spec.uniform or "curve" not in parts:
        return UniformSteps()
    full = shape_of(heads_per_layer, groups_per_layer)
    return UniformSteps(shares(spec.fractions, full), full.groups)


def missing(planned: Sequence[PlannedJob], measured: Iterable[Evaluation]) -> list[PlannedJob | None]:
    """What is left of each job once the steps that other entries hold are taken out; None where nothing is.

    Which entries an oracle reads is settled here too, since its single FFNs may lie in other entries than those that
    were planned. Single heads are taken by whole entries: a sample must not gain the heads of another one.

    Args:
        planned: Jobs in their order, none of which has an entry of its own.
        measured: Jobs of evaluation that have one.
    """
    entries: dict[Evaluation, dict[Step, str]] = {}
    for known_job in measured:
        entries.setdefault(_without_steps(known_job), {}).update(
            dict.fromkeys(steps_of(known_job.masks), name_of(known_job)))
    moved: dict[str, list[str]] = {}
    left: list[PlannedJob | None] = []
    for one in planned:
        job, rest = one.job, one
        if isinstance(job, Evaluation) and not isinstance(job.masks, SingleHeads):
            known, asked = entries.get(_without_steps(job), {}), steps_of(job.masks)
            if held := list(dict.fromkeys(known[step] for step in asked if step in known)):
                steps = [step for step in asked if step not in known]
                if not steps:
                    moved[name_of(job)] = held
                    left.append(None)
                    continue
                share = len(steps) / len(asked)
                rest = PlannedJob(dataclasses.replace(job, curve=with_steps(job.masks, steps)), one.passes * share,
                                  one.tokens * share)
                moved[name_of(job)] = [*held, name_of(rest.job)]
        elif isinstance(job, OracleImportance):
            names = itertools.chain.from_iterable(moved.get(name, [name]) for name in job.evaluations)
            rest = dataclasses.replace(one, job=dataclasses.replace(job, evaluations=tuple(dict.fromkeys(names))))
        left.append(rest)
    return left


def _without_steps(job: Evaluation) -> Evaluation:
    return dataclasses.replace(job, curve=with_steps(job.masks, ()))


def _inductions(spec: StudySpec, model: str) -> Iterator[PlannedJob]:
    """Induction scores of the model, and of the same model with random weights."""
    number, seeds = INDUCTION_TEXTS[spec.protocol]
    seeds, tokens = spec.induction_seeds or seeds, float(INDUCTION_TOKENS)
    lengths: tuple[int, ...] | None = None
    if spec.induction_lengths is not None:
        number, tokens = len(spec.induction_lengths), 4 * sum(spec.induction_lengths) / len(spec.induction_lengths)
        lengths = tuple(sorted(spec.induction_lengths))
    both: tuple[Weights, Weights] = ("trained", "random")
    for weights in both[: 1 if spec.skip_control else 2]:
        job = InductionScores(protocol=spec.protocol, model=model, weights=weights, lengths=lengths, seeds=seeds,
                              seed=spec.seed, documents=number * seeds, version=INDUCTION_VERSION)
        # Prefix matching and copying read texts of their own.
        yield PlannedJob(job, passes=2, tokens=2 * number * seeds * tokens)


@dataclass(frozen=True)
class _Ordered:
    """By what one kind of component is ordered, and the entries of importance that it is read from."""

    component: Component
    method: Method
    score: str | None
    names: tuple[str, ...]
    aggregate: str | None

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments of an order that several tasks have a part in."""
        return {"component": self.component, "importance": self.names, "score": self.score,
                "aggregate": self.aggregate}


@dataclass(frozen=True)
class _Planner:
    """The jobs of one task at one number of shots."""

    spec: StudySpec
    model: str
    heads_per_layer: tuple[int, ...]
    task: TaskFacts
    num_fewshot: int
    through_norms: bool = False
    uniform: UniformSteps = UniformSteps()

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

    def _together(self, component: Component, members: Sequence[_Planner]) -> _Ordered:
        """The order of one task, or of several together."""
        jobs = [member._importance(component)[-1].job for member in members]
        importance: ImportanceJob = jobs[0]  # type: ignore[assignment]  # the last of these jobs is one
        score: str | None = self.spec.scores[component]
        if self.spec.protocol == "sound" and score == "accuracy":
            score = None  # not alone: between equal accuracies log-likelihood decides
        aggregate = self.spec.aggregate if len(members) > 1 else None
        return _Ordered(component, importance.method, score, tuple(map(name_of, jobs)), aggregate)

    @property
    def _of_task(self) -> dict[str, Any]:
        """What all jobs of this task and number of shots say, but for the number of documents."""
        shots = {"seed": self.spec.seed, "shared_shots": self.spec.shared_shots} if self.num_fewshot else {}
        return {"protocol": self.spec.protocol, "model": self.model, "task": self.task.name,
                "task_fingerprint": self.task.fingerprint, "num_fewshot": self.num_fewshot,
                "chat": self.spec.apply_chat_template or None,
                "paper_version": PAPER_VERSION if self.spec.protocol == "paper" else None, **shots}

    def _planned(self, job: Job, passes: float | int, tokens: str) -> PlannedJob:
        per_document = self.task.tokens.get((self.num_fewshot, tokens), 0.0)
        return PlannedJob(job, passes, passes * (job.documents or 0) * per_document)

    def _gradient(self) -> PlannedJob:
        job = GradientImportance(**self._of_task, documents=self.examples, through_norms=self.through_norms or None)
        return self._planned(job, GRADIENT_PASSES, "gradient")

    def _evaluation(
        self, masks: MaskSet, documents: int, split: Literal["evaluation", "examples"] = "evaluation"
    ) -> PlannedJob:
        job = Evaluation(**self._of_task, documents=documents, split=split, curve=masks)
        return self._planned(job, masks.passes(self.heads_per_layer), split)

    def _full(self, split: Literal["evaluation", "examples"]) -> PlannedJob:
        return self._evaluation(FullModel(), self.documents if split == "evaluation" else self.examples, split)

    def _chunked(self, masks: MaskSet, documents: int, split: Literal["evaluation", "examples"] = "evaluation"
                 ) -> Iterator[PlannedJob]:
        """Jobs of so many masks each."""
        for steps in _chunks(steps_of(masks), self.spec.masks_per_job):
            yield self._evaluation(with_steps(masks, steps), documents, split)

    def _curves(self, component: Component) -> Iterator[PlannedJob]:
        own = self._together(component, [self])
        curve = OwnCurve(component=component, order=own.method, importance=own.names[0], score=own.score,
                         fractions=self._beside_uniform(component, self.spec.fractions))
        yield from self._chunked(curve, self.documents)
        if component == "head" and self.uniform.shares:
            shaped = UniformCurve(component=component, importance=own.names[0], score=own.score,
                                  groups=self.uniform.groups, fractions=self.uniform.shares)
            yield from self._chunked(shaped, self.documents)
        for i in range(self.spec.random_orders):
            yield from self._random(component, i, self.spec.fractions_of_random, self.documents)

    def _beside_uniform(self, component: Component, fractions: Sequence[float]) -> tuple[float, ...]:
        """A curve's fractions, and those of uniform shapes: each of these has a free-form one beside it."""
        return tuple(sorted({*fractions, *(self.uniform.shares if component == "head" else ())}))

    def _random(
        self, component: Component, number: int, fractions: Sequence[float], documents: int
    ) -> Iterator[PlannedJob]:
        curve = RandomCurve(component=component, order_seed=self.spec.seed + number, fractions=tuple(fractions))
        yield from self._chunked(curve, documents)

    def common(self, donors: Sequence[_Planner]) -> Iterator[PlannedJob]:
        """This task pruned by the order of all tasks together, as one smaller model for all of them would be."""
        for component in ("head", "ffn"):
            order = self._together(component, donors)
            fractions = self._beside_uniform(component, self.spec.fractions_of_common)
            yield from self._chunked(CommonCurve(**order.shared, fractions=fractions), self.documents)
            if component == "head" and self.uniform.shares:
                shaped = CommonUniformCurve(**order.shared, groups=self.uniform.groups, fractions=self.uniform.shares)
                yield from self._chunked(shaped, self.documents)

    def grid(self, donors: Sequence[_Planner], with_curves: bool) -> Iterator[PlannedJob]:
        """Heads and FFNs pruned jointly, by this task's own orders (points of curves are left out) or by all tasks'."""
        own = self.spec.grid_order == "own" or len(donors) < 2
        orders = [self._together(component, [self] if own else donors) for component in ("head", "ffn")]
        steps = (0.0, *self.spec.grid_fractions)
        points = [(h, f) for h in steps for f in steps
                  if (h and f) or ((h or f) and not (own and with_curves and (h or f) in self.spec.fractions))]
        documents = min(self.documents, self.spec.grid_limit or self.documents)
        # A task's own orders are named as in earlier versions.
        heads, ffns = (GridOrder(component=o.component, order=o.method, score=o.score, aggregate=o.aggregate,
                                 importance=o.names[0] if own else o.names) for o in orders)
        grid = Grid(heads=heads, ffns=ffns, points=tuple(points), donor=None if own else AGGREGATE)
        yield from self._chunked(grid, documents)

    def transfers(self, donors: Sequence[_Planner], parts: Sequence[Part]) -> Iterator[PlannedJob]:
        """This task pruned by the orders of all tasks at this number of shots, each and together."""
        documents = min(self.documents, self.spec.transfer_limit or self.documents)
        known = "curve" in parts and set(self.spec.transfer_fractions) <= set(self.spec.fractions)
        if self.task.unseen:
            yield self._full("evaluation")
        for component in self.spec.transfer_components:
            chosen: list[tuple[str, bool, Sequence[_Planner]]] = [(AGGREGATE, False, donors)]
            if self.task.unseen:
                yield from self._random(component, 0, self.spec.transfer_fractions, documents)
            else:
                others = [d for d in donors if d.task.name != self.task.name]
                # One other task is a donor of its own, and a single one's aggregate is its own order.
                chosen = chosen if others else []
                chosen += [(d.task.name, True, [d]) for d in others]
                chosen += [(OTHERS, False, others)] if len(others) > 1 else []
                chosen += [(OWN, False, [self])] if others and not known else []
                beside = self.spec.fractions_of_random if "curve" in parts and self.spec.random_orders else ()
                if lacking := [f for f in self.spec.transfer_fractions if others and f not in beside]:
                    yield from self._random(component, 0, lacking, documents)
            for donor, is_task, members in chosen:
                order = self._together(component, members)
                named: Literal["task"] | None = "task" if is_task and donor in RESERVED_DONORS else None
                yield from self._chunked(Transfer(**order.shared, donor=donor, donor_is=named,
                                                  fractions=self.spec.transfer_fractions), documents)

    @functools.cached_property
    def _ffn_oracle(self) -> list[PlannedJob]:
        return self._oracle("ffn")

    def _oracle(self, component: Component) -> list[PlannedJob]:
        split = _oracle_split(self.spec)
        documents = self.documents if split == "evaluation" else self.examples
        singles: MaskSet = SingleFFNs(tuple(range(len(self.heads_per_layer))))
        if component == "head":
            heads = all_heads(self.heads_per_layer)
            if self.spec.head_sample is not None:
                drawn = random_order(len(heads), self.spec.seed)[: self.spec.head_sample]
                heads = [heads[i] for i in sorted(drawn)]
            singles = SingleHeads(tuple((head.layer, head.head) for head in heads))
        jobs = [self._full(split), *self._chunked(singles, documents, split)]
        names = tuple(name_of(planned.job) for planned in jobs)
        oracle: Job = (HeadOracle(**self._of_task, documents=documents, sample=self.spec.head_sample, evaluations=names)
                       if component == "head" else
                       OracleImportance(**self._of_task, documents=documents, evaluations=names))
        return [*jobs, self._planned(oracle, 0, split)]


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
