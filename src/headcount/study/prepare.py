"""A study made ready: options checked, tasks and model loaded, jobs planned; nothing is measured or written.

Stages, each of which refuses what cannot work before the next and costlier one begins: the folder's options; tasks and
one prompt of each; the model and the proof that its heads and FFNs are where they seem to be; how many documents and
about how many tokens there are; the jobs. Two things are found out about the device on the way, since what jobs cost
depends on them: how prompts are laid out, and (unless the folder or the options say it) what rows and batches cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from headcount.errors import ModelError, OptionError, StudyError, few
from headcount.study.folder import check_data, check_model, check_options, other_orders, previous
from headcount.study.jobs import Evaluation, InductionScores, job_from
from headcount.study.ledger import Ledger
from headcount.study.plan import PlannedJob, TaskFacts, missing, plan, reads, uniform_steps
from headcount.study.spec import Part, StudySpec, parts_of

if TYPE_CHECKING:
    from headcount.engine.neighbours import Speed
    from headcount.engine.pack import Budget
    from headcount.measure.evaluate import Prepared
    from headcount.model.load import LoadedModel
    from headcount.tasks.fewshot import FewShot
    from headcount.tasks.task import Split, Task

# Documents that the cost of a job is estimated from.
_SAMPLE = 8


@runtime_checkable
class Reporter(Protocol):
    """What a study tells while it is made ready and runs."""

    def stage(self, text: str, done: int = 0, total: int | None = None) -> None:
        """What is being done before the jobs start, and how many of how many steps of it are done."""

    def begin(self, todo: int, done: int, tokens: float) -> None:
        """How many jobs are to do and were done before, and about how many tokens they take."""

    def note(self, text: str) -> None:
        """One thing to know while jobs are done."""

    def job(self, title: str) -> None:
        """A job begins."""

    def advance(self, tokens: float) -> None:
        """So many more tokens are computed."""


class Silent:
    """Tells nothing."""

    def stage(self, text: str, done: int = 0, total: int | None = None) -> None:
        """Nothing."""

    def begin(self, todo: int, done: int, tokens: float) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def job(self, title: str) -> None:
        """Nothing."""

    def advance(self, tokens: float) -> None:
        """Nothing."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A study that is ready to run.

    Attributes:
        spec: What was asked.
        loaded: The model.
        identity: What entries know it by: the model's own, or in a folder of an earlier version that version's.
        tasks: By name, unseen ones at the end.
        unseen: Names of tasks that are only pruned by others' orders.
        facts: What the planner knew of each task.
        budget: How long rows and how large batches are.
        parts: What of a study is measured.
        jobs: All jobs of what was asked, in an order in which they can be done.
        ledger: The folder's entries; None where no folder was named.
        other_orders: Says that the folder's curves follow other scores than those asked for; empty where they do not.
        damaged: Names of the folder's damaged entries; they count as not done.
    """

    spec: StudySpec
    loaded: LoadedModel
    identity: str
    tasks: Mapping[str, Task]
    unseen: frozenset[str]
    facts: tuple[TaskFacts, ...]
    budget: Budget
    parts: tuple[Part, ...]
    jobs: tuple[PlannedJob, ...]
    ledger: Ledger | None = None
    other_orders: str = ""
    damaged: tuple[str, ...] = ()

    @property
    def folder(self) -> Ledger:
        """The folder's entries.

        Raises:
            OptionError: If no folder was named.
        """
        if self.ledger is None:
            raise OptionError("a study needs a folder; name it with `out`", fields=("out",))
        return self.ledger

    def is_done(self, planned: PlannedJob) -> bool:
        """Whether a job has an entry of its own."""
        return self.ledger is not None and self.ledger.has(planned.key)

    def left(self) -> list[PlannedJob | None]:
        """What no entry holds yet of each job, step by step (`headcount.study.plan.missing`); None where nothing is."""
        return left_of(self.jobs, self.ledger)

    def todo(self) -> list[PlannedJob]:
        """What is left to do, in order."""
        return [rest for rest in self.left() if rest is not None]

    def few_shot(self, num_fewshot: int, limit: int | None = None) -> FewShot:
        """So many shots and documents, drawn as the options say."""
        return _few_shot(self.spec, num_fewshot, limit)

    def check_folder(self) -> dict[str, Any] | None:
        """What stands in the folder by now: another process may have begun the same study, or another one.

        Raises:
            StudyError: If the study cannot go on there.
        """
        ledger = self.folder
        before = previous(ledger)
        check_options(self.spec, before, ledger.folder)
        if check_model(self.loaded, before, ledger) != self.identity:
            raise StudyError(f"{ledger.folder} was begun by another version meanwhile; run the same command again")
        check_data(self.spec, before, {f.name: f.fingerprint for f in self.facts}, self.unseen, ledger.folder)
        return before

    def speed(self) -> Speed:
        """How fast the last task's first documents go through the model, and how busy others kept the cores."""
        from headcount.engine.engine import Engine
        from headcount.engine.neighbours import Speed

        if not self.facts:
            return Speed()
        facts, k = self.facts[-1], self.spec.shots[-1]
        split: Split = "evaluation" if facts.documents else "examples"
        sample = _sample(self.loaded, self.tasks[facts.name], self.few_shot(k, _SAMPLE), split, self.budget)
        return Engine.of(self.loaded).speed(sample.packed)


def left_of(jobs: Sequence[PlannedJob], ledger: Ledger | None) -> list[PlannedJob | None]:
    """What no entry of a folder holds yet of each job; None where nothing is left."""
    open_jobs = [planned for planned in jobs if ledger is None or not ledger.has(planned.key)]
    rests = iter(missing(open_jobs, _measured(ledger)) if open_jobs else [])
    still = {id(planned) for planned in open_jobs}
    return [next(rests) if id(planned) in still else None for planned in jobs]


def _measured(ledger: Ledger | None) -> Iterator[Evaluation]:
    """Jobs of evaluation that a folder has entries of; those of other versions are passed over."""
    for key in ledger.keys("evaluation") if ledger is not None else ():
        try:
            job = job_from(key)
        except StudyError:
            continue
        if isinstance(job, Evaluation):
            yield job


@dataclass(frozen=True)
class Outline:
    """What another process needs of a plan, to do its jobs with tasks and a model that it loads itself.

    Attributes:
        spec: What was asked.
        identity: What entries know the model by.
        facts: What the planner knew of each task.
        budget: How long rows and how large batches are; the same for all who do jobs.
        parts: What of a study is measured.
    """

    spec: StudySpec
    identity: str
    facts: tuple[TaskFacts, ...]
    budget: Budget
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, plan: Plan) -> Outline:
        """The outline of a plan: its folder by the whole path, its device by the kind, since GPUs are numbered anew.

        Where the model is streamed it is everywhere: passes are made for that.
        """
        from headcount.model.held import in_files

        out, device = plan.spec.out, plan.spec.device
        spec = dataclasses.replace(plan.spec, out=None if out is None else out.absolute(),
                                   device=None if device is None else device.partition(":")[0],
                                   stream=plan.spec.stream or (plan.spec.device_map is None
                                                               and in_files(plan.loaded.model)))
        return cls(spec, plan.identity, plan.facts, plan.budget, plan.parts)

    def plan(self, together: int = 1) -> Plan:
        """The same plan here, without its jobs: tasks and model loaded, and the proofs of the model made once more.

        Args:
            together: How many processes may share this machine's memory, each with a model of its own.

        Raises:
            HeadcountError: If a task or the model cannot be loaded here, or the model fails a proof.
        """
        tasks, unseen = _tasks(self.spec, self.parts)
        loaded = dataclasses.replace(_load(self.spec, Silent()), together=together)
        loaded = _proved(loaded, self.spec, self.parts)
        ledger = None if self.spec.out is None else Ledger(self.spec.out)
        return Plan(self.spec, loaded, self.identity, tasks, unseen, self.facts, self.budget, self.parts, (), ledger)


def prepare(
    spec: StudySpec, *, parts: Sequence[Part] | None = None, reporter: Reporter | None = None,
    loaded: LoadedModel | None = None,
) -> Plan:
    """Everything that must be known before a study runs; nothing is measured or written.

    Args:
        spec: What was asked; without a folder the plan can be looked at, but not run.
        parts: What of the study is wanted; None: what its options say.
        reporter: Told of progress.
        loaded: The model, where it is in memory already.

    Raises:
        HeadcountError: For anything in the options, model, tasks, data or folder that cannot work; of the documents,
            the first ones are tried.
    """
    reporter = reporter or Silent()
    parts = parts_of(spec) if parts is None else tuple(parts)
    ledger = Ledger(spec.out) if spec.out is not None else None
    before = previous(ledger) if ledger is not None else None
    # Slips in the options are told before anything is loaded.
    if spec.executor == "ray":
        from headcount.study.cluster import check_cluster

        if loaded is not None:
            raise OptionError(f"{loaded.name} is in the memory of this process, and Ray's workers load their own: name "
                              "the `model` and pass none, or leave out `executor='ray'`",
                              fields=("model", "executor='ray'"))
        check_cluster(spec)
    if ledger is not None:
        if before is not None and before["spec"].get("dtype") != spec.dtype:
            from headcount.model.placement import dtype_of

            dtype_of(spec.dtype)  # a slip of the pen is no other study
        check_options(spec, before, ledger.folder)
        ledger.check_places()
    # Tasks first: they load faster than models, and most slips of the pen are in their options.
    reporter.stage("loading tasks")
    tasks, unseen = _tasks(spec, parts)
    splits = {name: _splits(spec, parts, unseen=name in unseen) for name in tasks}
    for done, task in enumerate(tasks.values()):
        reporter.stage("checking prompts", done, len(tasks))
        for k in spec.shots:
            for split in splits[task.name]:
                task.prompts(split, _few_shot(spec, k, 1))
    reporter.stage(f"loading {spec.model}")
    loaded = _unchanged(loaded, spec) if loaded is not None else _load(spec, reporter)
    reporter.stage(f"checking {spec.model}")
    loaded = _proved(loaded, spec, parts)
    groups = [part.num_kv_heads for part in loaded.anatomy.layers]
    uniform_steps(spec, loaded.anatomy.heads_per_layer, groups, parts)  # refuses what has none, before it is timed
    identity = loaded.identity if ledger is None else check_model(loaded, before, ledger)
    reporter.stage("timing rows and batches")
    budget = _budget(loaded, spec, before)
    facts: list[TaskFacts] = []
    for task in tasks.values():
        reporter.stage("planning", len(facts), len(tasks))
        facts.append(_facts(loaded, task, spec, splits[task.name], budget, unseen=task.name in unseen))
    jobs = plan(spec, identity, loaded.anatomy.heads_per_layer, facts, parts, through_norms=bool(loaded.norms),
                groups_per_layer=groups)
    ready = Plan(spec, loaded, identity, tasks, unseen, tuple(facts), budget, parts, tuple(jobs), ledger,
                 other_orders(spec, before) if "curve" in parts else "",
                 tuple(ledger.damaged()) if ledger is not None else ())
    if ledger is not None:
        ready.check_folder()
    _tell_control(ready, reporter)
    return ready


def _tell_control(plan: Plan, reporter: Reporter) -> None:
    """Say what the control of induction will take of the disk, where it is still to be measured."""
    if any(isinstance(planned.job, InductionScores) and planned.job.weights == "random" for planned in plan.todo()):
        from headcount.measure.control import control_needs

        if needed := control_needs(plan.loaded):
            reporter.note(needed)


def _tasks(spec: StudySpec, parts: Sequence[Part]) -> tuple[dict[str, Task], frozenset[str]]:
    """The tasks by name, and which of them are unseen."""
    from headcount.tasks.load import get_tasks

    named = spec.tasks, spec.unseen if "transfer" in parts else ()
    seen, unseen = (get_tasks(names, data=spec.data, examples_split=spec.examples_split, protocol=spec.protocol)
                    for names in named)
    check_named(spec, parts, seen, unseen)
    return seen | unseen, frozenset(unseen)


def check_named(spec: StudySpec, parts: Sequence[Part], seen: Collection[str], unseen: Collection[str]) -> None:
    """Refuse tasks that are named twice, and transfer between less than two.

    Raises:
        OptionError: With the options that name them.
    """
    if both := {*seen} & {*unseen}:
        raise OptionError(f"{', '.join(sorted(both))} cannot be among both `tasks` and `unseen`",
                          fields=("tasks", "unseen"))
    if "transfer" in parts and len(seen) < 2 and not unseen:
        raise OptionError("transfer takes one task's order to another: name two tasks (`tasks`), or `unseen`",
                          fields=("tasks", "unseen"))


def _splits(spec: StudySpec, parts: Sequence[Part], *, unseen: bool) -> list[Split]:
    """Which documents of a task are read; of an unseen one none for importance."""
    from headcount.tasks.task import SPLITS

    return [s for s in SPLITS if s in reads(spec, parts) and (s == "evaluation" or not unseen)]


def _few_shot(spec: StudySpec, num_fewshot: int, limit: int | None) -> FewShot:
    from headcount.tasks.fewshot import FewShot

    return FewShot(num_fewshot, limit, spec.seed, spec.shared_shots)


def _sample(loaded: LoadedModel, task: Task, few_shot: FewShot, split: Split, budget: Budget) -> Prepared:
    from headcount.measure import evaluate

    return evaluate.prepare(loaded, task, few_shot, split=split, budget=budget)


def _facts(
    loaded: LoadedModel, task: Task, spec: StudySpec, splits: Sequence[Split], budget: Budget, *, unseen: bool
) -> TaskFacts:
    """How many documents a task has, and about how many tokens one takes."""
    counts: dict[Split, dict[int, int]] = {"evaluation": {}, "examples": {}}
    tokens: dict[tuple[int, str], float] = {}
    limits = {"evaluation": spec.limit, "examples": spec.importance_limit}
    for split in splits:
        for k in spec.shots:
            available = task.size(split, _few_shot(spec, k, None))
            limit = limits[split]
            counts[split][k] = available if limit is None else min(limit, available)
            sample = _sample(loaded, task, _few_shot(spec, k, min(_SAMPLE, counts[split][k])), split, budget)
            tokens[k, split] = sample.tokens / len(sample.prompts)
            if split == "examples":
                longest = [int(b.depths.max(initial=0)) + 1 for b in sample.batches]
                tokens[k, "gradient"] = sum(longest) / len(longest)
    return TaskFacts(task.name, task.fingerprint, counts["evaluation"], counts["examples"], tokens, unseen)


def _load(spec: StudySpec, reporter: Reporter) -> LoadedModel:
    from headcount.model.load import load

    return load(spec.model, dtype=spec.dtype, device=spec.device, device_map=spec.device_map, stream=spec.stream,
                stream_memory=spec.stream_memory,
                attn_implementation=spec.attn_implementation, trust_remote_code=spec.trust_remote_code,
                revision=spec.revision, apply_chat_template=spec.apply_chat_template, progress=reporter.stage)


def _unchanged(loaded: LoadedModel, spec: StudySpec) -> LoadedModel:
    """Refuse a model in memory that is not what its fingerprint says: entries answer for the latter."""
    from headcount.model.fingerprint import fingerprint
    from headcount.model.held import in_files
    from headcount.model.wrappers import hooked

    if spec.stream and not in_files(loaded.model):
        raise OptionError(f"the weights of {loaded.name} are in memory, and `stream` leaves weights in their files: "
                          "load it with stream=True, or leave out `stream`", fields=("stream",))

    if patched := [name or type(m).__name__ for name, m in loaded.model.named_modules()
                   if "forward" in vars(m) and not hasattr(m, "_hf_hook")]:
        raise ModelError(f"{patched[0]} of {loaded.name} has a forward of its own: a study's entries could not tell "
                         "this model from one without it; remove it, or measure with evaluate() instead")
    if hooks := hooked(loaded.model):
        raise ModelError(f"{loaded.name} carries forward hooks ({few(hooks)}): a study's entries could not tell this "
                         "model from one without them; remove them, or measure with evaluate() instead")
    if fingerprint(loaded.model) != loaded.fingerprint:
        raise ModelError(f"the weights, config or code of {loaded.name} have been changed since it was loaded: wrap it "
                         "again (wrap(loaded.model, loaded.tokenizer)), so that a study knows it as it is now")
    return loaded


def _proved(loaded: LoadedModel, spec: StudySpec, parts: Sequence[Part]) -> LoadedModel:
    """Nothing is measured on a model whose heads and FFNs are not where they seem to be."""
    from headcount.engine.engine import Engine

    if loaded.apply_chat_template != spec.apply_chat_template:
        raise OptionError("the model that was passed and the options differ in apply_chat_template; give the same")
    # FFNs may be ordered by gradients, and both scores are always kept.
    Engine.of(loaded).prove(gradients=bool({*parts} - {"evaluate", "head_oracle", "induction"}))
    if "induction" in parts:
        from headcount.measure.induction import check

        check(loaded, lengths=spec.induction_lengths, protocol=spec.protocol)
    return loaded


def _budget(loaded: LoadedModel, spec: StudySpec, before: Mapping[str, Any] | None) -> Budget:
    """As before in this folder, so that equal jobs are laid out alike; what the options say goes first."""
    from headcount.engine.engine import Engine

    engine, kept = Engine.of(loaded), kept_budget(before)
    if kept is None or kept[0] != engine.device_key:
        return engine.budget(spec.row_tokens, spec.batch_tokens)
    return kept[1].limited(spec.row_tokens, spec.batch_tokens)


def kept_budget(before: Mapping[str, Any] | None) -> tuple[str, Budget] | None:
    """What a folder's runs were packed by, and the device that this was found on; None of a new folder."""
    from headcount.engine.pack import Budget, Cost

    kept = (before or {}).get("budget")
    if kept is None:
        return None
    return kept["device"], Budget(None, kept["batch_tokens"], kept["gradient_tokens"], kept["longest_row"],
                                  Cost(**kept["cost"]))
