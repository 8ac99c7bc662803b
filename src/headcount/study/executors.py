"""Who does a study's jobs: this process, one after another, or several workers of a Ray cluster.

By Ray. Each worker is an actor that loads tasks and model once (`headcount.study.member`). Before it does so its
versions are compared with the driver's, and before it works what its numbers depend on; one that differs is refused by
name, and another is started on a node that was not refused. The driver then hands out passes of jobs that are ready
(`headcount.study.queue`), one a worker, until none is left: a pass is one job, or several that share readings of
weights which lie in files. Each job's entry is written as soon as it is known. A worker that dies is replaced, and what
is left of its pass handed out again; a job that fails as often as it is tried is told and left out. Nothing has to be
undone: an entry is written whole or not at all, and a job that is done twice has one entry. So a driver that died
leaves a study that goes on by the same command; Ray ends the workers of a driver that is gone.

Ray schedules, watches processes and nodes, and carries calls and results; the driver waits for answers, and for nothing
else.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from headcount.engine.engine import Engine
from headcount.engine.waiting import CHOSEN
from headcount.errors import HeadcountError, StudyError, first_line, named
from headcount.model.held import in_files
from headcount.study.cluster import Size, connected, nodes_of, size_of
from headcount.study.jobs import Need
from headcount.study.ledger import Entry
from headcount.study.member import Delivered, facts_of
from headcount.study.plan import PlannedJob
from headcount.study.prepare import Outline, Plan, Reporter
from headcount.study.queue import TRIES, Failed, Queue
from headcount.study.worker import PACKAGES, Read, Result, Worker

# How often a worker is started in one's place that dies, or is refused, before it is given a job.
_STARTS = 3
# How many workers may die of their jobs while none is done: then it is not the jobs.
_LOSSES = 3 * TRIES
# How long no worker may have a place in the cluster, in seconds: nodes that are started on demand take minutes.
_PATIENCE = 900.0
_TICK = 1.0


# Gives the results of jobs, in order: `Worker.entries`.
Work: TypeAlias = Callable[[Iterable[PlannedJob], Read], Iterator[Result]]


@dataclass(frozen=True)
class Done:
    """What became of a study's jobs.

    Attributes:
        masks: How several masks were run, and why; None where that was not needed.
        failed: Jobs that were given up.
    """

    masks: str | None
    failed: tuple[Failed, ...] = ()


def in_this_process(plan: Plan, todo: Sequence[PlannedJob], reporter: Reporter) -> Done:
    """Do jobs one after another; the first that fails ends it, but where jobs share readings of weights."""
    worker = Worker(plan, reporter.advance)
    if in_files(plan.loaded.model):
        _sharing(plan, worker.entries, todo, reporter)
    else:
        for planned in todo:
            _written(plan, worker.entries, [planned], reporter)
    return Done(Engine.of(plan.loaded).masks_reason)


def _sharing(plan: Plan, work: Work, todo: Sequence[PlannedJob], reporter: Reporter) -> None:
    """Do all jobs of one kind that are ready together, since they share readings of weights.

    One that fails takes none of the others along: what is left of its pass is done again in halves, until it is alone.

    Raises:
        HeadcountError: The first, when all others are done.
    """
    queue, first = Queue(todo), None
    while queue:
        left = queue.take_together()
        try:
            _written(plan, work, left, reporter, queue.done)
        except HeadcountError as error:
            left = [planned for planned in left if queue.holds(planned)]
            if len(left) > 1:
                queue.halve(left)
                continue
            first = first or error
            queue.give_up(left[0], str(error))
            reporter.note(f"{left[0].title} failed and is left out: {error}")
    if first is not None:
        raise first


def _written(
    plan: Plan, work: Work, jobs: Sequence[PlannedJob], reporter: Reporter,
    done: Callable[[PlannedJob], None] = lambda planned: None,
) -> None:
    """Do jobs, and write the entry of each as soon as it is known."""
    results = work(_told(jobs, reporter), plan.folder.read_need)
    for planned, result in zip(jobs, results, strict=True):
        plan.folder.write(planned.key, result.table, result.info)
        done(planned)


def _told(jobs: Sequence[PlannedJob], reporter: Reporter) -> Iterator[PlannedJob]:
    """Jobs, each told when it begins."""
    for planned in jobs:
        reporter.job(planned.title)
        yield planned


def by_ray(plan: Plan, todo: Sequence[PlannedJob], reporter: Reporter) -> Done:
    """Hand jobs out to workers; those that fail are told at the end. The driver's own model is given up for it.

    Raises:
        HeadcountError: If there is no cluster, no room in it, or no worker that computes as this process would.
    """
    if not todo:
        return Done(None)
    reporter.note("starting workers")
    expected, gpus = facts_of(plan), int(plan.loaded.device.type == "cuda")
    outline, streamed = Outline.of(plan), in_files(plan.loaded.model)
    with connected(plan.spec, torch.get_num_threads()) as ray, plan.folder.token() as token:
        size = size_of(plan.spec, gpus, nodes_of(ray))
        _put_down(plan)
        crew = _Crew(ray, plan, Queue(todo), reporter, size, outline, token, expected, streamed)
        crew.work()
        return Done(crew.masks, tuple(crew.queue.failed))


def _put_down(plan: Plan) -> None:
    """Give back the memory of the driver's own weights, where workers of the same machine or GPU need it."""
    torch.nn.Module.to(plan.loaded.model, "meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _shell() -> type[Any]:
    """The class of the actors. It is made here so that Ray sends it by value: a node needs nothing to say what it has.

    What it is sent before its versions are known to be the driver's is plain data.
    """

    class Shell:
        """A worker's process, as Ray knows it."""

        def greet(self, packages: Sequence[str]) -> dict[str, Any]:
            """Where it is, and the versions that it has."""
            import hashlib
            import importlib.metadata
            import importlib.util
            import os
            import socket
            from pathlib import Path

            versions = {}
            for name in packages:
                try:
                    versions[name] = importlib.metadata.version(name)
                except importlib.metadata.PackageNotFoundError:
                    versions[name] = "not installed"
            found, code = importlib.util.find_spec("headcount"), hashlib.sha256()
            for path in sorted(Path(str(found.origin)).parent.rglob("*.py")) if found is not None else ():
                code.update(path.name.encode() + path.read_bytes())
            versions["headcount's code"] = code.hexdigest()[:12]
            return {"place": f"{socket.gethostname()} (process {os.getpid()})", "versions": versions}

        def join(self, folder: str, arguments: tuple[Any, ...]) -> tuple[dict[str, str], bool]:
            """Load tasks and model; what its numbers depend on, and whether it shares the study folder."""
            import contextlib
            import os

            from headcount.study.member import Member

            with contextlib.suppress(OSError):  # names of files are meant as in the driver's command
                os.chdir(folder)
            self.member: Member = Member(*arguments)
            return self.member.facts, self.member.shares_folder

        def node(self) -> str:
            """The node that it is on, by Ray's name for it."""
            import ray

            return str(ray.get_runtime_context().get_node_id())

        def do(self, *arguments: Any) -> Any:
            """A pass done, job by job: Ray sends what a generator gives as soon as it is there."""
            yield from self.member.do(*arguments)

    return Shell


@dataclass(eq=False)
class _Hand:
    """A worker, as the driver knows it.

    Attributes:
        actor: Ray's handle.
        step: What it was asked for last.
        place: Where it is; empty until it has said so.
        node: The same by Ray's name.
        shares: Whether it writes entries itself.
        jobs: What of its pass is not delivered.
        last: What it did before.
        starts: How often one was started in its place since one there was given a job.
    """

    actor: Any
    step: str = "node"
    place: str = ""
    node: str = ""
    shares: bool = False
    jobs: Sequence[PlannedJob] = ()
    last: PlannedJob | None = None
    starts: int = 1


@dataclass(eq=False)
class _Crew:
    """The driver's side: who is there, who is waited for, and what is left to do."""

    ray: Any
    plan: Plan
    queue: Queue
    reporter: Reporter
    size: Size
    outline: Outline
    token: tuple[str, str]
    expected: dict[str, str]
    streamed: bool
    masks: str | None = None
    _hands: list[_Hand] = field(default_factory=list)
    _waiting: dict[Any, _Hand] = field(default_factory=dict)
    _refused: dict[str, str] = field(default_factory=dict)
    _reason: str = ""
    _losses: int = 0
    _shell: type[Any] = field(default_factory=_shell)
    _versions: dict[str, str] = field(default_factory=lambda: dict(_shell()().greet(PACKAGES)["versions"]))

    def work(self) -> None:
        """Hand out jobs until none is left.

        Raises:
            StudyError: If no worker is left, or none has a place.
        """
        size, since = self.size, time.monotonic()
        if size.room < size.workers:
            self.reporter.note(f"there is room for {size.room} of {size.workers} workers; the others begin when there "
                               "is more")
        try:
            for _ in range(size.workers):
                self._start(1)
            while self.queue:
                self._hand_out()
                if not self._waiting:
                    raise StudyError(f"no worker is left, the last since {self._reason}; what is measured is kept, and "
                                     "the same command goes on from there")
                answers, _ = self.ray.wait(list(self._waiting), num_returns=1, timeout=_TICK)
                for answer in answers:
                    self._heard(self._waiting.pop(answer), answer)
                if any(hand.place for hand in self._hands):
                    since = time.monotonic()
                elif time.monotonic() - since > _PATIENCE:
                    why = self._reason or "others use it"
                    raise StudyError(f"the cluster has had no place for a worker of {size.threads} cores and "
                                     f"{size.gpus} GPUs for {_PATIENCE / 60:.0f} minutes ({why}); what is measured is "
                                     "kept, and the same command goes on from there")
        finally:
            for hand in [*self._hands]:
                self._end(hand)

    def _start(self, starts: int) -> None:
        """One more worker, on a node that none was refused on."""
        environment = {**CHOSEN, "OMP_NUM_THREADS": str(self.size.threads)}
        avoided = {"ray.io/node-id": f"!in({','.join(self._refused)})"} if self._refused else None
        actor = self.ray.remote(self._shell).options(
            num_cpus=self.size.threads, num_gpus=self.size.gpus, runtime_env={"env_vars": environment},
            label_selector=avoided).remote()
        hand = _Hand(actor, starts=starts)
        self._hands.append(hand)
        self._waiting[actor.node.remote()] = hand

    def _hand_out(self) -> None:
        """A pass for every worker that waits for one, as far as jobs are ready."""
        for hand in [one for one in self._hands if one.step == "job" and not one.jobs]:
            while not hand.jobs and (taken := self._next(hand)):
                self._hand(hand, taken)

    def _next(self, hand: _Hand) -> list[PlannedJob]:
        """The next pass for a worker."""
        if not self.streamed:
            return self.queue.take(hand.last)
        return self.queue.take_together(1 / sum(bool(one.place) for one in self._hands))

    def _hand(self, hand: _Hand, jobs: Sequence[PlannedJob]) -> None:
        """Give a worker a pass, with what its jobs read where the worker does not see that."""
        ready, entries = [], dict[Need, Entry]()
        for planned in jobs:
            try:
                entries |= {} if hand.shares else {need: self.plan.folder.read_need(need) for need in planned.job.needs}
            except StudyError as error:  # an entry was damaged meanwhile
                self._failed(planned, str(error))
                continue
            self.reporter.job(planned.title)
            ready.append(planned)
        if ready:
            hand.jobs, hand.starts = ready, 0
            self._waiting[hand.actor.do.remote(ready, entries)] = hand

    def _heard(self, hand: _Hand, answer: Any) -> None:
        """What a worker answers: where it is, what it has, or a result; or that it failed, or is gone."""
        errors = self.ray.exceptions
        try:
            said = self.ray.get(next(answer) if hand.step == "job" else answer)
        except errors.RayTaskError as error:
            self._raised(hand, error.cause)
        except errors.RayError as error:
            self._gone(hand, self._why(hand, error))
        else:
            steps: dict[str, Callable[[_Hand, Any], None]] = {
                "node": self._greeted, "greet": self._compared, "join": self._joined, "job": self._delivered}
            steps[hand.step](hand, said)
            if hand.jobs:  # a pass gives one result after another
                self._waiting[answer] = hand

    def _greeted(self, hand: _Hand, node: str) -> None:
        hand.node, hand.step, hand.place = node, "greet", f"node {node[:8]}"
        if node in self._refused:  # started before that was known
            self._replace(hand, self._refused[node])
            return
        self._waiting[hand.actor.greet.remote(PACKAGES)] = hand

    def _compared(self, hand: _Hand, said: dict[str, Any]) -> None:
        hand.place, hand.step = said["place"], "join"
        if differing := _differences(self._versions, said["versions"]):
            self._refuse(hand, f"{differing}; install the driver's versions there")
            return
        has = {node["NodeID"]: node["Resources"] for node in self.ray.nodes()}
        together = self.size.together(has.get(hand.node, {}))
        arguments = (self.outline, self.size.threads, self.token, together)
        self._waiting[hand.actor.join.remote(str(Path.cwd()), arguments)] = hand

    def _joined(self, hand: _Hand, said: tuple[dict[str, str], bool]) -> None:
        facts, hand.shares = said
        if differing := _differences(self.expected, facts):
            self._refuse(hand, differing)
            return
        hand.step = "job"
        self.reporter.note(f"a worker on {hand.place} begins" + (
            "" if hand.shares else "; it does not see the study folder, so that its results are sent here"))

    def _delivered(self, hand: _Hand, delivered: Delivered) -> None:
        planned, *hand.jobs = hand.jobs
        if delivered.result is not None:
            self.plan.folder.write(planned.key, delivered.result.table, delivered.result.info)
        self.masks = delivered.masks or self.masks
        hand.last, self._losses = planned, 0
        self.queue.done(planned)
        self.reporter.advance(planned.tokens)

    def _raised(self, hand: _Hand, cause: BaseException) -> None:
        """A call failed in a worker's code: what a user can fix is a fact, anything else may be its process's."""
        told = str(cause) if isinstance(cause, HeadcountError) else named(cause)
        if hand.step != "job" and isinstance(cause, HeadcountError | ImportError):
            self._refuse(hand, told)
        elif not (isinstance(cause, HeadcountError) and hand.jobs):
            self._gone(hand, f"{'it' if hand.jobs else 'a worker'} failed on {hand.place or 'some node'} ({told})")
        else:
            jobs, hand.jobs = hand.jobs, ()
            if len(jobs) == 1:
                self._failed(jobs[0], told)
            else:
                self.queue.halve(jobs)
                self.reporter.note(f"{_titles(jobs)}, done together, are handed out again in halves: {told}")

    def _gone(self, hand: _Hand, reason: str) -> None:
        """A worker died, or cannot be trusted any more: its jobs are handed out again, and another worker started."""
        jobs, hand.jobs = hand.jobs, ()
        if not jobs:
            self.reporter.note(reason)
        elif self.queue.lost(jobs, reason):
            self.reporter.note(f"{_titles(jobs)} {'is' if len(jobs) == 1 else 'are'} handed out again: {reason}")
        else:
            self._tell(jobs[0])
        if len(jobs) == 1:  # of several it is not known yet which job it was
            self._losses += 1
            if self._losses == _LOSSES:
                raise StudyError(f"{_LOSSES} workers were lost one after another while no job was done, the last "
                                 f"since {reason}; what is measured is kept, and the same command goes on from there")
        self._replace(hand, reason)

    def _refuse(self, hand: _Hand, reason: str) -> None:
        reason = f"the worker on {hand.place} is refused: {reason}"
        self.reporter.note(reason)
        self._refused[hand.node] = reason
        self._replace(hand, reason)

    def _replace(self, hand: _Hand, reason: str) -> None:
        """End a worker and start another in its place, not for ever; on other nodes than those that were refused."""
        self._end(hand)
        self._reason = reason
        alive = {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}
        if hand.starts < _STARTS and alive - self._refused.keys():
            self._start(hand.starts + 1)

    def _end(self, hand: _Hand) -> None:
        self._hands.remove(hand)
        for answer in [one for one, waiting in self._waiting.items() if waiting is hand]:
            del self._waiting[answer]
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.kill(hand.actor)

    def _failed(self, planned: PlannedJob, reason: str) -> None:
        self.queue.give_up(planned, reason)
        self._tell(planned)

    def _tell(self, planned: PlannedJob) -> None:
        told = next(failed for failed in self.queue.failed if failed.title == planned.title)
        self.reporter.note(f"{told.title} failed and is left out: {told.reason}")

    def _why(self, hand: _Hand, error: BaseException) -> str:
        """Why a worker is gone, as far as Ray knows."""
        of = f"the worker on {hand.place}" if hand.place else "a worker"
        if "running low on memory" in str(error):
            return f"{of} was ended by Ray since its node ran low on memory: take fewer workers, or smaller batches"
        return f"{of} died ({first_line(error)})"


def _titles(jobs: Sequence[PlannedJob]) -> str:
    """Jobs in few words."""
    return jobs[0].title + (f" and {len(jobs) - 1} more" if len(jobs) > 1 else "")


def _differences(expected: dict[str, str], found: dict[str, str]) -> str:
    """What differs, in words; empty where nothing does."""
    return "; ".join(f"{name} is {_short(found.get(name, 'not known'))} there and {_short(value)} here"
                     for name, value in expected.items() if found.get(name) != value)


def _short(value: str) -> str:
    return value if len(value) <= 24 else f"{value[:12]}..."

