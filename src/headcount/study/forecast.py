"""What a study will cost, known before a model is loaded: jobs, tokens, layer-tokens, FLOPs, memory, hours.

Nothing is measured, proved or written, and no weights are read. The jobs are the planner's (`plan`), the rows and
batches the packer's (`tokens`), how often layers are computed the sweep's (`sharing`). What is counted:

    layer-tokens  positions that blocks compute, layers added up: of a set of masks what the sweep computes; of a
                  gradient twice its rows, forward and back; of induction every text once for prefix matching, once
                  for copying (protocol paper: twice). Probes and proofs of a model are not counted.
    FLOPs         2 a parameter of a block and position (of experts the chosen ones), 4 a channel of attention and
                  pair of positions in a row, 2 a parameter of the output layer and position whose logits are wanted.

Layer-tokens are exact where documents are at hand and masks are known beforehand, for a model that takes token trees
and can be run layer by layer as its family does, with the rows and batches of the same budget: that of the folder, or
what was timed on this machine for a model of this shape; else the default.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from headcount.engine.budget import budget_for, device_key, kept_cost
from headcount.engine.layout import expected_layout
from headcount.engine.pack import Budget
from headcount.engine.stream import cannot_wait
from headcount.errors import OptionError, TaskError, UnavailableError
from headcount.model.placement import DISK, bytes_said, may_wait
from headcount.model.speed import slow_type
from headcount.model.without_weights import Shape, shape_of
from headcount.study.costs import Memory, OnDevice, Passes, hours_on, memory_of
from headcount.study.devices import Device, device_of
from headcount.study.folder import check_options, other_orders, previous
from headcount.study.job_costs import Cost, JobCosts, readings, sum_of
from headcount.study.jobs import Evaluation, InductionScores, Job
from headcount.study.ledger import Ledger
from headcount.study.masksets import FullModel, Grid, RandomCurve, SingleFFNs, SingleHeads, Transfer
from headcount.study.plan import PlannedJob, TaskFacts, plan, reads
from headcount.study.prepare import Plan, Reporter, Silent, check_named, kept_budget, left_of
from headcount.study.spec import Part, StudySpec, parts_of
from headcount.study.stand_in import StandIn
from headcount.study.tokens import AtHand, Bundled, Documents, Reading, statistics

Share: TypeAlias = Literal["full model", "importance", "curves", "grid", "transfer", "induction"]
SHARES: tuple[Share, ...] = ("full model", "importance", "curves", "grid", "transfer", "induction")
# To how many documents a task the what-if of fewer documents goes.
_FEWER = 500


@dataclass(frozen=True)
class TaskTokens:
    """A task at a number of shots.

    Attributes:
        name: The task's.
        num_fewshot: Shots.
        documents: Evaluated documents.
        examples: Documents that importance is measured on; 0 of unseen tasks.
        tokens: Positions of one pass over the evaluated documents, padding included; 0 where none are read.
        gradient: The same over the examples, a row each.
        bundled: Whether the counts are those that come along.
        cut: Requests of the evaluated documents that are longer than the window, and lose their beginning.
        longest: Tokens of the longest example, about; 0 where gradients are not wanted.
    """

    name: str
    num_fewshot: int
    documents: int
    examples: int
    tokens: float
    gradient: float
    bundled: bool
    cut: int
    longest: int


@dataclass(frozen=True, eq=False)
class Forecast:
    """A study as it is known without its model.

    Attributes:
        spec: What was asked.
        shape: The model.
        parts: What of a study is measured.
        jobs: All jobs, in an order in which they can be done.
        left: What the folder does not hold of each yet; None where nothing is left.
        costs: What each of these computes; None where nothing is left.
        tasks: Documents and tokens of every task and number of shots.
        shares: What is left to do costs, by part.
        savings: What would be saved otherwise: a change of options in words, and the FLOPs that it saves.
        memory: What a run keeps in memory.
        devices: Hours on every device asked for.
        passes: How often the weights are read where the model is streamed on this machine.
        waiting: How many bytes of hidden states then wait between its blocks at the most.
        notes: What is assumed.
        told: What a run would note of prompts that are cut, of texts that are left out, and of a slow type of numbers.
        other_orders: As in `headcount.study.prepare.Plan`.
        damaged: As there.
    """

    spec: StudySpec
    shape: Shape
    parts: tuple[Part, ...]
    jobs: tuple[PlannedJob, ...]
    left: tuple[PlannedJob | None, ...]
    costs: tuple[Cost | None, ...]
    tasks: tuple[TaskTokens, ...]
    shares: Mapping[Share, Cost]
    savings: tuple[tuple[str, float], ...]
    memory: Memory
    devices: tuple[OnDevice, ...]
    passes: Passes
    waiting: int
    notes: tuple[str, ...]
    told: tuple[str, ...] = ()
    other_orders: str = ""
    damaged: tuple[str, ...] = ()

    @property
    def total(self) -> Cost:
        """What is left to do costs."""
        return sum_of(self.shares.values())


def forecast(
    spec: StudySpec, *, on: Sequence[str] = (), price: Sequence[float] = (), efficiency: float | None = None,
    read_speed: str | int | None = None, reporter: Reporter | None = None,
) -> Forecast:
    """What a study will cost, from its options and the model's config alone.

    Args:
        spec: What was asked; with a folder, what that holds already is taken off.
        on: Devices to say hours for, such as `h100`, `8xh100`, `cpu`.
        price: What an hour of one such device costs; a single price serves all.
        efficiency: The share of each device's peak that is reached; None: what is assumed of it.
        read_speed: Bytes a second that streamed weights are read at, also as "1.5GB"; None: an NVMe disk's.
        reporter: Told of progress.

    Raises:
        HeadcountError: If the model's config or a task's documents are not to be had, or options cannot go together.
    """
    reporter = reporter or Silent()
    if len(price) not in (0, 1, len(on)):
        raise OptionError(f"`price` is one number, or one for each of `on`: there are {len(price)} prices and "
                          f"{len(on)} devices", fields=("price", "on"))
    if wrong := [one for one in price if not 0 <= one < math.inf]:
        raise OptionError(f"`price` is what an hour costs, not {wrong[0]:g}", fields=("price",))
    said = _said(spec, efficiency, read_speed)
    parts, before, ledger = parts_of(spec), None, None
    if spec.out is not None:
        ledger = Ledger(spec.out)
        before = previous(ledger)
        check_options(spec, before, ledger.folder)
    reporter.stage(f"reading the config of {spec.model}")
    shape = _shape(spec)
    devices = [dataclasses.replace(_device(name, shape), **said) for name in on]
    reading, notes = _reading(shape, spec, before)
    narrow = shape.model.dtype == torch.float16 and any(one.kind == "cpu" for one in devices)
    slow = [*filter(None, [slow_type(shape.model.dtype) if narrow else ""])]
    reporter.stage("loading tasks")
    seen, unseen = (_documents(names, spec, shape, reading)
                    for names in (spec.tasks, spec.unseen if "transfer" in parts else ()))
    check_named(spec, parts, seen, unseen)
    facts: list[TaskFacts] = []
    for name, documents in {**seen, **unseen}.items():
        reporter.stage("counting tokens", len(facts), len(seen) + len(unseen))
        facts.append(_facts(name, documents, spec, parts, unseen=name in unseen))
    of_jobs = JobCosts(spec, shape, {**seen, **unseen}, facts, reading.trees, reading.budget)
    known = _Known(of_jobs)
    jobs, left = _planned(spec, shape, facts, parts, before, ledger)
    todo = [one for one in left if one is not None]
    costs = tuple(None if one is None else of_jobs.cost(one.job) for one in left)
    shares = known.shares(todo, [cost for cost in costs if cost is not None])
    total = sum_of(shares.values())
    memory = memory_of(shape, reading.budget, max((one.longest for one in known.tasks), default=0),
                       induction="induction" in parts)
    streamed = spec.stream or spec.device_map == DISK
    waiting = said.get("waiting")
    if streamed and waiting is not None:
        _check_largest(total, waiting)
    waiting = waiting or may_wait()
    passes_with = functools.partial(readings, todo, [cost for cost in costs if cost is not None], of_jobs.probes)
    prices: list[float | None] = [*price] * len(on) if len(price) == 1 else [*price] or [None] * len(on)
    spent = tuple(hours_on(device, shape.dtype, total.flops, memory, passes_with(device.waiting), cost,
                           streamed=streamed, jobs=total.jobs)
                  for device, cost in zip(devices, prices, strict=True))
    return Forecast(spec, shape, parts, tuple(jobs), tuple(left), costs, tuple(known.tasks), shares,
                    tuple(known.savings(todo, shares)), memory, spent, passes_with(waiting), waiting,
                    (*notes, *known.notes), (*slow, *known.noted(todo)),
                    other_orders(spec, before) if "curve" in parts else "",
                    tuple(ledger.damaged()) if ledger is not None else ())


def check_waiting(ready: Plan, waiting: int) -> None:
    """Refuse memory in which some batch of a streamed run cannot wait, before the first job; by what `forecast` counts.

    Args:
        ready: A study whose model is there.
        waiting: Bytes that may wait.

    Raises:
        OptionError: If there is one, with what the largest takes at least.
    """
    from headcount.engine.engine import Engine
    from headcount.model.held import in_files

    spec, loaded, todo = ready.spec, ready.loaded, ready.todo()
    if not todo or not in_files(loaded.model):
        return
    layout = Engine.of(loaded).layout
    shape = Shape(loaded.name, loaded.model, loaded.tokenizer, loaded.anatomy, loaded.device, False,
                  loaded.tokenizer.bos_token_id is not None)
    reading = Reading(loaded.tokenizer, loaded.max_length, ready.budget, layout.trees, layout.tree_tokens,
                      loaded.apply_chat_template, spec.seed, spec.shared_shots)
    documents = {name: AtHand(task, reading) for name, task in ready.tasks.items()}
    of_jobs = JobCosts(spec, shape, documents, ready.facts, layout.trees, ready.budget)
    _check_largest(sum_of(of_jobs.cost(planned.job) for planned in todo), waiting)


def _check_largest(total: Cost, waiting: int) -> None:
    if (largest := total.largest).needed > waiting:
        raise cannot_wait(largest.tokens, largest.needed, waiting, largest.smaller, counted=True)


def _shape(spec: StudySpec) -> Shape:
    return shape_of(spec.model, dtype=spec.dtype, device=spec.device, device_map=spec.device_map,
                    stream=spec.stream, attn_implementation=spec.attn_implementation,
                    trust_remote_code=spec.trust_remote_code, revision=spec.revision,
                    apply_chat_template=spec.apply_chat_template)


def _said(spec: StudySpec, efficiency: float | None, read_speed: str | int | None) -> dict[str, Any]:
    """What was said of devices, by the field that it stands in for."""
    if efficiency is not None and not 0.001 <= efficiency <= 1:
        raise OptionError(f"`efficiency` is a share of the peak, from 0.001 to 1, not {efficiency:g}",
                          fields=("efficiency",))
    said = {"waiting": bytes_said(spec.stream_memory), "efficiency": efficiency,
            "read_speed": bytes_said(read_speed, "read_speed")}
    return {name: value for name, value in said.items() if value is not None}


def _device(name: str, shape: Shape) -> Device:
    part = shape.anatomy.layers[0]
    return device_of(name, part.d_model, max(1, part.ffn_parameters // (2 * part.d_model)), shape.dtype)


def _reading(shape: Shape, spec: StudySpec, before: Mapping[str, Any] | None) -> tuple[Reading, list[str]]:
    """How texts are read and laid out, and what is assumed of it."""
    notes, layout = [], expected_layout(shape.model)
    key, kept = device_key(shape), kept_budget(before)
    if kept is not None and kept[0] == key:
        budget = kept[1]
    elif (cost := kept_cost(shape)) is not None:
        budget = budget_for(shape, cost)
    else:
        budget = Budget()
        if spec.row_tokens is None or spec.batch_tokens is None:
            notes.append("rows and batches are the default's: a run times its device and chooses its own")
    if not layout.trees:
        notes.append(f"prompts are laid out one request a row: {layout.reason}")
    tokenizer = shape.tokenizer if shape.tokenizer is not None else StandIn(shape.has_bos)
    return Reading(tokenizer, shape.max_length, budget.limited(spec.row_tokens, spec.batch_tokens), layout.trees,
                   layout.tree_tokens, spec.apply_chat_template, spec.seed, spec.shared_shots), notes


def _documents(
    names: Sequence[str], spec: StudySpec, shape: Shape, reading: Reading
) -> dict[str, Documents]:
    """The documents of tasks by name: at hand, or by what comes along."""
    from headcount.tasks.catalog import expand

    found: dict[str, Documents] = {}
    for name in expand(names):
        # Without the model's tokenizer, real documents would be no better than the counts.
        if spec.data is None and shape.tokenizer is None and name in statistics()["tasks"]:
            found[name] = Bundled(name, reading, spec.examples_split)
            continue
        from headcount.tasks.load import get_tasks

        try:
            (task,) = get_tasks([name], data=spec.data, examples_split=spec.examples_split,
                                protocol=spec.protocol).values()
        except UnavailableError:
            if name not in statistics()["tasks"]:
                raise
            found[name] = Bundled(name, reading, spec.examples_split)
            continue
        if task.name in found:
            raise TaskError(f"two of the tasks are named {task.name!r}; rename one")
        found[task.name] = AtHand(task, reading)
    return found


def _facts(
    name: str, documents: Documents, spec: StudySpec, parts: Sequence[Part], *, unseen: bool
) -> TaskFacts:
    """How many documents a task has, and how many tokens one takes."""
    counts: dict[str, dict[int, int]] = {"evaluation": {}, "examples": {}}
    tokens: dict[tuple[int, str], float] = {}
    kinds: list[tuple[Literal["evaluation", "examples"], int | None]] = [("evaluation", spec.limit)]
    kinds += [] if unseen else [("examples", spec.importance_limit)]
    for split, limit in kinds:
        if split not in reads(spec, parts):
            continue
        for k in spec.shots:
            available = documents.size(split, k)
            counts[split][k] = number = available if limit is None else min(limit, available)
            tokens[k, split] = documents.work(split, k, number).tokens / max(1, number)
            if split == "examples":
                tokens[k, "gradient"] = documents.work(split, k, number, "gradient").tokens / max(1, number)
    return TaskFacts(name, documents.fingerprint, counts["evaluation"], counts["examples"], tokens, unseen)


def _planned(
    spec: StudySpec, shape: Shape, facts: Sequence[TaskFacts], parts: Sequence[Part],
    before: Mapping[str, Any] | None, ledger: Ledger | None,
) -> tuple[list[PlannedJob], list[PlannedJob | None]]:
    """All jobs, and what is left of each; of a folder that was begun, as its model's."""
    model = str(((before or {}).get("model") or {}).get("fingerprint", ""))
    groups = [part.num_kv_heads for part in shape.anatomy.layers]
    # Whether gradients are taken through norms is found out on the model: what more entries answer is right.
    found = []
    for norms in (False, True) if model else (False,):
        jobs = plan(spec, model, shape.anatomy.heads_per_layer, facts, parts, through_norms=norms,
                    groups_per_layer=groups)
        found.append((jobs, left_of(jobs, ledger if model else None)))
    return max(found, key=lambda one: one[1].count(None))


@dataclass(frozen=True, eq=False)
class _Known:
    """What is told of documents, what jobs cost by part, and what would be saved."""

    costs: JobCosts

    @functools.cached_property
    def tasks(self) -> list[TaskTokens]:
        """Documents and tokens of every task and number of shots."""
        return [TaskTokens(f.name, k, f.documents.get(k, 0), f.examples.get(k, 0),
                           f.documents.get(k, 0) * f.tokens.get((k, "evaluation"), 0.0),
                           f.examples.get(k, 0) * f.tokens.get((k, "gradient"), 0.0),
                           isinstance(self.costs.documents[f.name], Bundled), self._cut(f, k), self._longest(f, k))
                for f in self.costs.facts for k in self.costs.spec.shots]

    def _cut(self, facts: TaskFacts, k: int) -> int:
        number = facts.documents.get(k, 0)
        return self.costs.documents[facts.name].work("evaluation", k, number).cut if number else 0

    def _longest(self, facts: TaskFacts, k: int) -> int:
        number = facts.examples.get(k, 0)
        return self.costs.documents[facts.name].work("examples", k, number, "gradient").longest if number else 0

    @property
    def notes(self) -> list[str]:
        """What is assumed of the documents."""
        at_hand = [name for name, one in self.costs.documents.items() if isinstance(one, AtHand)]
        notes = []
        if at_hand and self.costs.shape.tokenizer is None:
            notes.append("texts are cut into tokens by a stand-in, about as byte-level BPE tokenizers cut English")
        if len(at_hand) < len(self.costs.documents):
            said = statistics()
            absent = len(self.costs.documents) - len(at_hand)
            notes.append(f"documents and tokens of {absent} task{'s' * (absent > 1)} are counts that come along: the "
                         f"hub's numbers of documents, and tokens of {said['sample']} documents a split by the "
                         f"tokenizer of {said['tokenizer']}, in a window of {said['window']:,}")
        return notes

    def shares(self, todo: Iterable[PlannedJob], costs: Iterable[Cost]) -> dict[Share, Cost]:
        """What jobs cost, by part.

        Args:
            todo: The jobs.
            costs: Of each.
        """
        found: dict[Share, Cost] = {}
        for planned, cost in zip(todo, costs, strict=True):
            share = self._share(planned.job)
            found[share] = found.get(share, Cost()).plus(cost)
        return {share: found[share] for share in SHARES if share in found}

    def savings(self, todo: Sequence[PlannedJob], shares: Mapping[Share, Cost]) -> Iterable[tuple[str, float]]:
        """Changes of options, and the FLOPs that each saves by itself."""
        total, spec = sum_of(shares.values()).flops, self.costs.spec
        if not spec.shared_shots and any(spec.shots) and self.costs.documents:
            yield "--shared-shots", total - sum_of(self.costs.cost(one.job, True) for one in todo).flops
        most = max((one.job.documents or 0 for one in todo if not isinstance(one.job, InductionScores)), default=0)
        fewer = _FEWER if most > _FEWER else most // 2
        # A limit that is lower already stays.
        limits = " ".join(f"--{name} {fewer}" for name, given in (
            ("limit", spec.limit), ("importance-limit", spec.importance_limit)) if given is None or given > fewer)
        limits += "".join(f" --{name} {fewer}" for name, given in (
            ("grid-limit", spec.grid_limit), ("transfer-limit", spec.transfer_limit)) if given and given > fewer)
        if fewer and limits:
            yield limits, total - sum_of(self.costs.cost(_with_documents(one.job, fewer)) for one in todo).flops
        for share in ("transfer", "grid", "induction"):
            if share in shares and len(shares) > 1:
                yield f"without {share}", shares[share].flops

    def _share(self, job: Job) -> Share:
        if isinstance(job, InductionScores):
            return "induction"
        if not isinstance(job, Evaluation) or isinstance(job.masks, SingleFFNs | SingleHeads):
            return "importance"
        if isinstance(job.masks, FullModel):
            return "full model"
        if isinstance(job.masks, Grid):
            return "grid"
        beside = isinstance(job.masks, RandomCurve) and not (
            "curves" in self.costs.spec.measure and {*job.masks.fractions} <= {*self.costs.spec.fractions_of_random}
            and job.task not in {f.name for f in self.costs.facts if f.unseen})
        return "transfer" if beside or isinstance(job.masks, Transfer) else "curves"

    def noted(self, todo: Iterable[PlannedJob]) -> list[str]:
        """What a run would note of prompts that are cut, and of texts that are left out."""
        window = f"the window of {self.costs.shape.max_length:,} tokens"
        cut = [f"{one.name}, {one.num_fewshot}-shot: {one.cut:,} request{'s are' if one.cut > 1 else ' is'} longer "
               f"than {window}, and lose{'s' * (one.cut == 1)} the beginning" for one in self.tasks if one.cut]
        texts = [note for one in todo if isinstance(one.job, InductionScores)
                 for note in self.costs.texts_of_job(one.job)[1]]
        return [*cut, *dict.fromkeys(texts)]


def _with_documents(job: Job, most: int) -> Job:
    if isinstance(job, InductionScores) or job.documents is None or job.documents <= most:
        return job
    return dataclasses.replace(job, documents=most)
