"""Several workers: who computes a job does not change its numbers, and nothing that dies takes anything along."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import importlib.metadata
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

import tiny
from headcount.engine.stream import stream_of
from headcount.errors import ModelError, OptionError, StudyError
from headcount.study import cluster, executors
from headcount.study.cluster import Size, check_cluster, size_of
from headcount.study.jobs import name_of
from headcount.study.ledger import Ledger, job_id
from headcount.study.member import Delivered, Member, facts_of
from headcount.study.plan import PlannedJob, TaskFacts, plan
from headcount.study.prepare import Outline, Plan, prepare
from headcount.study.queue import TRIES, Queue
from headcount.study.runner import run, run_study
from headcount.study.spec import StudySpec
from headcount.study.worker import Worker

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: headcount[ray]")


def spec(folder: Path, **changes: object) -> StudySpec:
    """A study of few jobs, in batches that are told, so that all runs have the same."""
    base = StudySpec("tiny", tasks=("piqa",), shots=(0, 2), out=folder / "study", data=folder / "data", limit=6,
                     importance_limit=5, fractions=(0.25, 0.5), random_orders=1, masks_per_job=3, row_tokens=200,
                     batch_tokens=400)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


class Told:
    """A reporter that keeps what it is told, and calls a function with the title when a job is handed out."""

    def __init__(self, at_job: Callable[[str], None] = lambda title: None) -> None:
        self.notes: list[str] = []
        self.stages: list[str] = []
        self.titles: list[str] = []
        self.passes: list[tuple[str, list[str]]] = []
        self.together: list[int] = []
        self.at_job = at_job

    @property
    def text(self) -> str:
        return "\n".join(self.notes)

    def stage(self, text: str, done: int = 0, total: int | None = None) -> None:
        self.stages.append(text)

    def begin(self, todo: int, done: int, tokens: float) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def job(self, title: str) -> None:
        self.titles.append(title)
        self.at_job(title)

    def advance(self, tokens: float) -> None: ...


def same(one: Path, other: Path) -> None:
    """Equal as docs/design.md says: log-likelihoods within 1e-3, the same entries, documents and answers."""
    left, right = ({job_id(e.job): e.table for e in Ledger(folder).entries()} for folder in (one, other))
    assert left.keys() == right.keys()
    for name, table in left.items():
        pd.testing.assert_frame_equal(table, right[name], rtol=0, atol=1e-3)


# What is handed out when.


def jobs(*tasks: str) -> list[PlannedJob]:
    facts = [TaskFacts(name, name, {0: 6}, {0: 5}) for name in tasks]
    asked = StudySpec("m", tasks=tasks, shots=(0,), fractions=(0.25, 0.5), random_orders=1)
    return plan(asked, "model", (4,) * 3, facts)


def test_a_job_is_handed_out_when_what_it_reads_is_there_and_once() -> None:
    todo = jobs("a", "b")
    queue, there, out = Queue(todo), set[str](), []
    while queue:
        while taken := queue.take():
            (planned,) = taken
            assert {need.name for need in planned.job.needs} <= there
            out.append(planned)
        for planned in out[len(there):]:
            queue.done(planned)
            there.add(name_of(planned.job))
    assert len(out) == len(there) == len(todo)


def test_a_worker_stays_with_its_task_and_others_take_another() -> None:
    queue = Queue(jobs("a", "b"))
    (first,), (second,) = queue.take(), queue.take()
    assert (first.job.subject, second.job.subject) == ("a, 0-shot", "b, 0-shot")
    queue.done(second)
    (third,) = queue.take(second)
    assert third.job.subject == "b, 0-shot"


def test_a_lost_job_is_tried_a_few_times_and_takes_along_what_reads_it() -> None:
    todo = jobs("a", "b")
    queue = Queue(todo)
    victim = next(p for p in todo if p.title == "a, 0-shot: gradient importance")
    for tried in range(1, TRIES + 1):
        while queue.take() != [victim]:
            assert queue
        assert queue.lost([victim], "it died") == (tried < TRIES)
    name = name_of(victim.job)
    readers = {p.title for p in todo if any(need.name == name for need in p.job.needs)}
    assert queue.failed[0].title == victim.title
    assert "tried 3 times" in queue.failed[0].reason
    assert {failed.title for failed in queue.failed[1:]} == readers
    assert readers


def test_passes_are_of_one_kind_and_shared_out_by_tokens() -> None:
    todo = [dataclasses.replace(one, tokens=float(tokens)) for one, tokens in zip(
        [one for one in jobs("a", "b", "c", "d") if one.title.endswith("gradient importance")], (60, 20, 10, 30),
        strict=True)]
    queue = Queue([*todo, *(one for one in jobs("a", "b") if one.title.endswith("full model, evaluation"))])
    assert queue.take_together(1 / 2) == todo[:1]
    assert queue.take_together(1 / 2) == todo[1:3], "what is left is shared out anew"
    assert queue.take_together(1 / 2) == todo[3:]
    assert [planned.job.subject for planned in queue.take_together()] == ["a, 0-shot", "b, 0-shot"]
    assert queue.take_together() == []


def test_a_lost_pass_is_handed_out_in_halves_before_all_else_until_the_one_that_does_it_is_alone() -> None:
    todo = [one for one in jobs(*"abcdefgh") if one.title.endswith("gradient importance")]
    queue, victim, lost, passes = Queue(todo), todo[5], 0, 0
    while queue:
        taken, passes = queue.take_together(), passes + 1
        if victim in taken:
            queue.lost(taken, "it died")
            lost += 1
        else:
            for planned in taken:
                queue.done(planned)
    assert (lost, passes) == (3 + TRIES, 6 + TRIES)
    assert [failed.title for failed in queue.failed] == [victim.title]


@pytest.mark.parametrize("streamed", [False, True])
def test_two_workers_are_at_jobs_nearly_all_the_time(streamed: bool) -> None:
    """By a clock of numbers: each job takes so long, whoever does it, and handing out takes no time."""
    todo = [dataclasses.replace(planned, tokens=1.0 + n % 5) for n, planned in enumerate(jobs(*"abcdefgh"))]
    seconds = {id(planned): planned.tokens * (0.8 + n % 4 / 10) for n, planned in enumerate(todo)}
    queue, now, passes = Queue(todo), 0.0, 0
    idle: list[PlannedJob | None] = [None, None]
    busy: list[tuple[float, int, list[PlannedJob]]] = []
    while queue:
        while idle and (taken := queue.take_together(1 / 2) if streamed else queue.take(idle[0])):
            passes += 1
            idle.pop(0)
            heapq.heappush(busy, (now + sum(seconds[id(one)] for one in taken), passes, taken))
        now, _, done = heapq.heappop(busy)
        for planned in done:
            queue.done(planned)
        idle.append(done[-1])
    assert sum(seconds.values()) / now > 1.9, (now, passes)
    assert passes < len(todo) / 2 if streamed else passes == len(todo)


GPUS = {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(("nodes", "asked", "gpus", "found"), [
    ([{"CPU": 2.0}], {}, 0, (1, 1, 2, 0)),
    ([{"CPU": 2.0}], {"workers": 2}, 0, (2, 2, 1, 0)),
    ([{"CPU": 3.0}, {"CPU": 1.0}], {}, 0, (2, 2, 1, 0)),
    ([{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1.0}], {"workers": 3}, 0, (3, 3, 4, 0)),
    ([GPUS, GPUS, {"CPU": 64.0}], {}, 1, (8, 8, 4, 1)),
    ([GPUS, GPUS], {"gpus_per_worker": 2}, 1, (4, 4, 8, 2)),
    ([GPUS], {"workers": 6}, 1, (6, 4, 4, 1)),
    ([GPUS], {"workers": 2, "threads_per_worker": 3}, 1, (2, 2, 3, 1)),
])
def test_workers_and_threads_fill_the_cluster(
    nodes: list[dict[str, float]], asked: dict[str, int], gpus: int, found: tuple[int, ...]
) -> None:
    assert dataclasses.astuple(size_of(StudySpec("m", tasks=("a",), executor="ray", **asked), gpus, nodes)) == found


def test_a_node_has_as_many_workers_at_once_as_it_has_room_for() -> None:
    """Also one that is there later than the first."""
    size = Size(workers=8, room=2, threads=2, gpus=1)
    nodes = (GPUS, {"CPU": 6.0, "GPU": 8.0}, {"CPU": 99.0, "GPU": 99.0}, {})
    assert [size.together(node) for node in nodes] == [4, 3, 8, 1]


def test_an_interrupt_while_ray_starts_is_put_off() -> None:
    """Ray that is interrupted meanwhile leaves processes behind, and crashed Python at its end."""
    done = []
    with pytest.raises(KeyboardInterrupt), cluster._put_off():
        signal.raise_signal(signal.SIGINT)
        done.append("one")
    with pytest.raises(KeyboardInterrupt), cluster._put_off():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("two")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert done == ["one"]


def test_a_cluster_without_room_is_refused() -> None:
    with pytest.raises(OptionError, match=r"room for a worker of 1 cores and 8 GPUs \(they have 16 and 4 in all"):
        size_of(wanted(gpus_per_worker=8), 1, [GPUS])


# What is refused before anything is loaded.


def wanted(address: str | None = None, **changes: Any) -> StudySpec:
    """A study by workers, of which nothing is loaded."""
    return StudySpec("m", tasks=("a",), executor="ray", address=address, **changes)


def test_options_of_workers_need_the_executor() -> None:
    for name in ("address", "workers", "gpus_per_worker", "threads_per_worker"):
        with pytest.raises(OptionError, match=f"{name} is for"):
            StudySpec("m", tasks=("a",), **{name: "auto" if name == "address" else 1})


@pytest.mark.parametrize(("answer", "why"), [
    (b"", "timed out"), (b"HTTP/1.1 400 Bad Request\r\n", "not Ray's head node")])
def test_what_answers_and_is_no_head_node_is_told_in_a_line(
    answer: bytes, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would wait for it for many minutes."""
    monkeypatch.setattr(cluster, "_PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        def serve() -> None:
            with server.accept()[0] as connection:
                connection.sendall(answer)
                connection.recv(99)
                time.sleep(1)

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(OptionError, match=f"no Ray cluster answers at RAY_ADDRESS .*{why}.*start its head node"):
            check_cluster(wanted(None if answer else "auto"))
        thread.join()


def test_ray_that_is_not_installed_or_not_reached_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    monkeypatch.setattr(cluster, "find_spec", lambda name: object())
    for address, message in ((f"127.0.0.1:{closed}", "no Ray cluster answers at"), ("ray://head:1", "HOST:PORT"),
                             ("head", "HOST:PORT"), ("127.0.0.1:99999", "no Ray cluster answers at")):
        with pytest.raises(OptionError, match=message):
            check_cluster(wanted(address))
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"needs Ray, which is not installed: pip install 'headcount\[ray\]'"):
        prepare(StudySpec("m", tasks=("a",), executor="ray"))


def test_gpus_that_this_machine_has_not_are_told_before_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: object())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(OptionError, match=r"gpus_per_worker is 3, and this machine has 2 GPUs: leave it out, or name"):
        check_cluster(wanted(gpus_per_worker=3))
    check_cluster(wanted(gpus_per_worker=2))
    check_cluster(wanted())
    # A program that is connected itself counts by its cluster.
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 3.0}}, {"Alive": False, "Resources": {"GPU": 9.0}}]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes))
    check_cluster(wanted(gpus_per_worker=3))
    with pytest.raises(OptionError, match="no node of the cluster has room"):
        check_cluster(wanted(gpus_per_worker=4))


def test_a_model_in_memory_is_no_models_of_workers() -> None:
    with pytest.raises(OptionError, match="in the memory of this process"):
        prepare(StudySpec("m", tasks=("a",), executor="ray"), loaded=tiny.loaded("llama"))


def test_a_second_driver_on_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    ready = prepare(spec(folder, model=str(folder / "model"), out=tmp_path / "study"), parts=("evaluate",))
    shared = dataclasses.replace(ready, spec=dataclasses.replace(ready.spec, executor="ray"))
    with Ledger(tmp_path / "study").driven():
        with pytest.raises(StudyError, match="another command hands out the jobs of"):
            run(shared)
    assert not (tmp_path / "study" / "study.json").exists()
    with Ledger(tmp_path / "study").driven():
        pass


def test_a_folder_is_shared_where_its_token_is_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with ledger.token() as token:
        assert Ledger(tmp_path).shares(token)
        assert not Ledger(tmp_path / "elsewhere").shares(token)
        assert not Ledger(tmp_path).shares((token[0], "another folder of the same name"))
    assert not ledger.shares(token)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_writes_entries_where_it_shares_the_folder_and_else_sends_them(folder: Path, tmp_path: Path) -> None:
    ready = prepare(spec(folder, model=str(folder / "model"), out=tmp_path / "study"), parts=("evaluate",))
    outline, (first, *_) = Outline.of(ready), ready.jobs
    ready.folder.folder.mkdir()
    torch.set_num_threads(2)
    with ready.folder.token() as token:
        apart, beside = Member(outline, 1, (token[0], "another")), Member(outline, 1, token)
    assert torch.get_num_threads() == 1, "as many threads as it was told"
    assert beside._plan.budget == ready.budget, "the driver's rows and batches, whatever is timed here"
    assert apart.facts == beside.facts == facts_of(ready)
    assert (apart.shares_folder, beside.shares_folder) == (False, True)
    ((sent, _),) = apart.do([first], {})
    assert sent is not None
    assert not ready.is_done(first)
    assert [delivered.result for delivered in beside.do([first], {})] == [None]
    pd.testing.assert_frame_equal(ready.folder.read(first.key).table, sent.table)
    inode = ready.folder.path(first.key).stat().st_ino
    assert [delivered.result for delivered in beside.do([first], {})] == [None]
    assert ready.folder.path(first.key).stat().st_ino == inode, "a job that is done twice has one entry"


def test_workers_that_stream_share_what_may_wait_of_their_node(folder: Path) -> None:
    ready = prepare(spec(folder, model=str(folder / "model"), stream=True), parts=("evaluate",))
    stream = stream_of(Member(Outline.of(ready), 1, ("", ""), 3)._plan.loaded)
    assert stream is not None
    assert (stream.memory, stream.together) == (None, 3)


def test_a_worker_with_other_documents_or_another_model_says_so(folder: Path, tmp_path: Path) -> None:
    ready = prepare(spec(folder, model=str(folder / "model"), out=tmp_path / "study"), parts=("evaluate",))
    changed = dataclasses.replace(ready.spec, model=str(tiny.saved(tmp_path / "opt", "opt")),
                                  data=tiny.write_task(tmp_path / "data", validation=5))
    other = dataclasses.replace(Outline.of(ready), spec=changed)
    found = executors._differences(facts_of(ready), Member(other, 1, ("", "")).facts)
    assert re.findall(r"(?:^|; )(.*?) is ", found) == ["the digest of the weights, config and tokenizer",
                                                       "definition or documents of piqa"]


# The driver, with workers that are no processes.


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Acted:
    """Ray as far as the driver uses it, in this process: actors on nodes, whose answers come in order.

    Args:
        plan: The study.
        nodes: Names of nodes, a place on each.
        act: Called before each job with its node and title: raises as a worker would.
        unlike: Nodes with other versions ("tokenizers") or another kernel, by what differs.
        cores: Of each node.

    Attributes:
        together: How many workers each was told to share its node's memory with.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(
        self, plan: Plan, nodes: tuple[str, ...], act: Callable[[str, str], None] = lambda node, title: None,
        unlike: dict[str, str] | None = None, cores: float = 1.0,
    ) -> None:
        self.plan, self.names, self.act, self.unlike, self.cores = plan, nodes, act, unlike or {}, cores
        self.together: list[int] = []
        self.worker = Worker(plan, lambda tokens: None)
        self.free = [*nodes]
        self.passes: list[tuple[str, list[str]]] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": True, "Resources": {"CPU": self.cores}} for name in self.names]

    def remote(self, shell: type) -> Any:
        return self

    def options(self, label_selector: dict[str, str] | None, **_: object) -> Any:
        avoided = "" if label_selector is None else label_selector["ray.io/node-id"]
        return SimpleNamespace(remote=lambda: Actor(self, next((n for n in self.free if n not in avoided), "")))

    def wait(self, answers: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
        ready = [answer for answer in answers if answer.actor.name]
        return ready[:1], answers

    def get(self, answer: Any) -> Any:
        if isinstance(answer, RayError):
            raise answer
        return answer() if isinstance(answer, Answer) else answer

    def kill(self, actor: Actor) -> None:
        if actor.name:
            self.free.append(actor.name)


class Actor:
    """A worker on a node of `Acted`; without a name it waits for a place for ever."""

    def __init__(self, ray: Acted, name: str) -> None:
        self.ray, self.name = ray, name
        if name:
            ray.free.remove(name)

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: Answer(self, lambda: getattr(self, f"_{method}")(*arguments)))

    def _node(self) -> str:
        return self.name

    def _greet(self, packages: tuple[str, ...]) -> dict[str, Any]:
        versions = executors._shell()().greet(packages)["versions"]
        if self.ray.unlike.get(self.name) == "tokenizers":
            versions["tokenizers"] = "0.0.1"
        return {"place": f"{self.name} (process 1)", "versions": versions}

    def _join(self, folder: str, arguments: tuple[Any, ...]) -> tuple[dict[str, str], bool]:
        facts = facts_of(self.ray.plan)
        if self.ray.unlike.get(self.name) == "kernel":
            facts["the attention kernel"] = "eager"
        self.ray.together.append(arguments[3])
        return facts, False

    def _do(self, jobs: Sequence[PlannedJob], entries: Any) -> Iterator[Delivered]:
        self.ray.passes.append((self.name, [planned.title for planned in jobs]))
        for planned in jobs:
            try:
                self.ray.act(self.name, planned.title)
            except RayError:
                raise
            except Exception as error:
                raise RayTaskError(error) from error
            yield Delivered(next(self.ray.worker.entries([planned], entries.__getitem__)), None)


class Answer:
    """What `Actor` was asked for: a call's answer, or one after another, an error among them."""

    def __init__(self, actor: Actor, call: Callable[[], Any]) -> None:
        self.actor, self.call = actor, call
        self.given: Iterator[Any] | None = None

    def __call__(self) -> Any:
        return self.call()

    def __next__(self) -> Any:
        self.given = self.given or self.call()
        try:
            return next(self.given)
        except RayError as error:
            return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data and a model, and the study by one process, in "alone"."""
    folder = tmp_path_factory.mktemp("workers")
    tiny.write_task(folder / "data")
    tiny.saved(folder / "model")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers of clusters whose nodes have a core each
    run_study(spec(folder, model=str(folder / "model"), out=folder / "alone"), parts=("curve",))
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def acted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Do the study with workers that are no processes; gives what was done, told, and the folder."""
    ready = prepare(spec(folder, model=str(folder / "model"), out=tmp_path / "study"), parts=("curve",))
    ready.folder.folder.mkdir()

    def by(
        *nodes: str, workers: int | None = None, streamed: bool = False, **options: Any
    ) -> tuple[executors.Done, Told, Path]:
        asked = dataclasses.replace(ready, spec=dataclasses.replace(ready.spec, executor="ray", workers=workers))
        told, ray = Told(), Acted(asked, nodes, **options)
        monkeypatch.setattr(executors, "in_files", lambda model: streamed)
        monkeypatch.setattr(executors, "connected", lambda spec, cores: contextlib.nullcontext(ray))
        monkeypatch.setattr(executors, "_put_down", lambda plan: None)
        told.passes, told.together = ray.passes, ray.together
        return executors.by_ray(asked, asked.todo(), told), told, ready.folder.folder
    return by


def test_workers_measure_what_one_process_measures(acted: Callable[..., Any], folder: Path) -> None:
    done, told, out = acted("north", "south")
    assert done.failed == ()
    same(folder / "alone", out)
    assert {note.partition(" begins")[0] for note in told.notes[1:]} == {
        "a worker on north (process 1)", "a worker on south (process 1)"}


def test_workers_are_told_how_many_their_node_has_room_for(acted: Callable[..., Any]) -> None:
    _, told, _ = acted("north", "south", workers=4, cores=3.0)
    assert told.together == [3, 3]


@pytest.mark.parametrize(("kind", "message"), [
    ("tokenizers", "tokenizers is 0.0.1 there and {} here; install the driver's versions there"),
    ("kernel", "the attention kernel is eager there and sdpa here")])
def test_a_worker_that_differs_is_refused_by_name_and_another_begins_elsewhere(
    acted: Callable[..., Any], kind: str, message: str
) -> None:
    with pytest.raises(StudyError, match=r"no worker is left, the last since the worker on odd .* is refused: "):
        acted("odd", workers=1, unlike={"odd": kind})
    done, told, _ = acted("odd", "even", workers=1, unlike={"odd": kind})
    assert done.failed == ()
    expected = message.format(importlib.metadata.version("tokenizers"))
    assert told.notes[1] == f"the worker on odd (process 1) is refused: {expected}"
    assert told.notes[2].startswith("a worker on even (process 1) begins")


def test_a_job_that_always_fails_is_left_out_and_told_and_the_others_finish(
    acted: Callable[..., Any], folder: Path
) -> None:
    tried = []

    def act(node: str, title: str) -> None:
        if title == "piqa, 2-shot: gradient importance":
            tried.append(node)
            raise ModelError("the loss is no number")

    done, told, out = acted("north", "south", act=act)
    assert len(tried) == 1, "a fact about the job is no other on another worker"
    assert (done.failed[0].title, done.failed[0].reason) == ("piqa, 2-shot: gradient importance",
                                                             "the loss is no number")
    assert {failed.reason for failed in done.failed[1:]} == {
        "it reads what failed: piqa, 2-shot: gradient importance"}
    assert f"{done.failed[0].title} failed and is left out: the loss is no number" in told.notes
    left = {job_id(e.job) for e in Ledger(folder / "alone").entries()} - {job_id(e.job) for e in Ledger(out).entries()}
    assert len(left) == len(done.failed)


@pytest.mark.parametrize(("error", "message"), [
    (RayError("The actor died"), "the worker on north (process 1) died (The actor died); it was tried 3 times"),
    (RayError("Task was killed due to the node running low on memory."), "ended by Ray since its node ran low on mem"),
    (RuntimeError("CUDA error"), "it failed on north (process 1) (RuntimeError: CUDA error); it was tried 3 times")])
def test_a_job_that_takes_its_workers_along_is_given_up(
    acted: Callable[..., Any], error: Exception, message: str
) -> None:
    tried = []

    def act(node: str, title: str) -> None:
        if title == "piqa, 0-shot: full model, evaluation":
            tried.append(node)
            raise error

    done, told, _ = acted("north", act=act)
    assert len(tried) == TRIES
    assert [failed.title for failed in done.failed] == ["piqa, 0-shot: full model, evaluation"]
    assert message in done.failed[0].reason
    assert sum("begins" in note for note in told.notes) == 1 + TRIES


def test_a_job_that_is_lost_once_is_done(acted: Callable[..., Any], folder: Path) -> None:
    lost = []

    def act(node: str, title: str) -> None:
        if not lost:
            lost.append(title)
            raise RayError("The actor died")

    done, told, out = acted("north", act=act)
    assert done.failed == ()
    assert f"{lost[0]} is handed out again: the worker on north (process 1) died (The actor died)" in told.notes
    same(folder / "alone", out)


LOST = RayError("The actor died")


@pytest.mark.parametrize(("error", "tries", "reason"), [
    (ModelError("the loss is no number"), 1, "the loss is no number"),
    (LOST, TRIES, "died (The actor died); it was tried 3 times")])
def test_a_job_that_always_fails_does_not_take_its_pass_along(
    acted: Callable[..., Any], folder: Path, error: Exception, tries: int, reason: str
) -> None:
    victim, done_before = "piqa, 2-shot: full model, evaluation", list[str]()

    def act(node: str, title: str) -> None:
        if title == victim:
            raise error
        done_before.append(title)

    done, told, out = acted("north", "south", streamed=True, act=act)
    assert [failed.title for failed in done.failed] == [victim]
    assert done.failed[0].reason.endswith(reason)
    passes = [titles for _, titles in told.passes]
    assert passes.count([victim]) == tries
    assert any(victim in titles and len(titles) > 1 for titles in passes), "it was in a pass at first"
    assert len(done_before) == len({*done_before}), "what is delivered is not handed out again"
    assert len(Ledger(out).damaged()) == 0
    left = {job_id(e.job) for e in Ledger(folder / "alone").entries()} - {job_id(e.job) for e in Ledger(out).entries()}
    assert len(left) == 1


def test_of_a_pass_that_is_lost_only_what_is_not_delivered_is_handed_out_again(
    acted: Callable[..., Any], folder: Path
) -> None:
    begun = list[str]()

    def act(node: str, title: str) -> None:
        begun.append(title)
        if len(begun) == 6:
            raise LOST

    done, told, out = acted("north", streamed=True, act=act)
    again = [title for title in begun if begun.count(title) > 1]
    assert done.failed == ()
    assert again == [begun[5]] * 2
    assert any(note.startswith(f"{begun[5]} and ") and " more are handed out again: " in note for note in told.notes)
    assert max(len(titles) for _, titles in told.passes) > 2
    same(folder / "alone", out)


def test_a_cluster_that_never_has_a_place_is_told(acted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_PATIENCE", 0.0)
    monkeypatch.setattr(Acted, "options", lambda self, **_: SimpleNamespace(remote=lambda: Actor(self, "")))
    with pytest.raises(StudyError, match="has had no place for a worker of 1 cores and 0 GPUs"):
        acted("north")


def test_failed_jobs_end_the_command_with_1(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    failed = tuple(executors.Failed(title, "it died") for title in ("a: one", "a: two"))
    monkeypatch.setattr(executors, "in_this_process", lambda *_: executors.Done(None, failed))
    command = ["--tasks", "piqa", "--data", str(folder / "data"), "--shots", "0", "--limit", "4", "--out"]
    assert tiny.run(["evaluate", str(folder / "model"), *command, str(tmp_path / "out")]) == 1
    assert "headcount: a: one failed (it died), and 1 more job: a: two; all others are" in capsys.readouterr().err


# Real processes.


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes with a core each."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        yield made
        made.shutdown()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver in this process, without the checks of types that tests run under, which Ray cannot send."""
    spec = importlib.util.spec_from_file_location("headcount.study.sent", executors.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(executors, "by_ray", module.by_ray)
    return module


@needs_ray
@pytest.mark.parametrize(("address", "mode", "hint"), [
    ("auto", None, False), ("127.0.0.1:6379", None, True), ("127.0.0.1:6379", "token", False)])
def test_no_cluster_is_told_before_anything_is_loaded(
    address: str, mode: str | None, hint: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `auto` only Ray knows that; where an address is named it tells nobody that a cluster wants a token."""
    import ray

    def none(**options: object) -> None:
        raise ConnectionError(f"Could not find any running Ray instance for {options['address']}.\nMore lines.")

    monkeypatch.setattr(ray, "init", none)
    monkeypatch.setattr(cluster, "_answers", lambda host, port: None)
    for name, value in (("RAY_ADDRESS", None), ("RAY_AUTH_MODE", mode)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    told = Told()
    why = rf"cluster at address {address} cannot be used \(Could not find .* for {address}\.\)"
    with pytest.raises(OptionError, match=why) as no:
        prepare(spec(folder, executor="ray", address=address), reporter=told)
    assert ("set RAY_AUTH_MODE=token here and on all nodes" in str(no.value)) is hint
    assert told.stages == []


@needs_ray
def test_a_cluster_without_room_is_told_before_anything_is_loaded(nodes: Any, folder: Path, tmp_path: Path) -> None:
    told = Told()
    with pytest.raises(OptionError, match=r"room for a worker of 1 cores and 1 GPUs \(they have 2 and 0 in all"):
        prepare(by_ray(folder, tmp_path / "study", nodes, gpus_per_worker=1), reporter=told)
    assert told.stages == []


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Something is done while the block runs, and has succeeded with it."""
    with ThreadPoolExecutor(1) as pool:
        acted = pool.submit(act)
        yield
        acted.result()


def until(happened: Callable[[], bool], told: Callable[[], object], seconds: float = 200.0) -> None:
    """Wait until something happened; what was told till then is shown if it does not."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, told()
        time.sleep(0.05)


def begun(notes: str) -> list[int]:
    """Processes of workers that have begun."""
    return [int(n) for n in re.findall(r"^a worker on \S+ \(process (\d+)\) begins", notes, re.MULTILINE)]


def command(folder: Path, out: Path, *more: str) -> list[str]:
    """The same study as a command; workers write notes to stderr."""
    asked = spec(folder)
    return [sys.executable, "-m", "headcount", "curve", str(folder / "model"), "--tasks", "piqa", "--data",
            str(asked.data), "--shots", "0", "2", "--limit", "6", "--importance-limit", "5", "--fractions", "0.25",
            "0.5", "--random-orders", "1", "--masks-per-job", "3", "--row-tokens", "200", "--batch-tokens", "400",
            "--out", str(out), "--executor", "ray", *more]


def by_ray(folder: Path, out: Path, nodes: Any, **changes: object) -> StudySpec:
    """The same study by workers of a cluster, whose driver is this process."""
    return spec(folder, model=str(folder / "model"), out=out, executor="ray", address=nodes.address, **changes)


class Driver:
    """A command that is watched while it runs; it is ended with the block."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log, self.file = log, log.open("w")
        self.process = subprocess.Popen(arguments, stdout=self.file, stderr=self.file, start_new_session=True)
        self.seen: set[psutil.Process] = set()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.file.close()

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait until something happened; processes that it started are kept."""
        def looked() -> bool:
            if self.process.poll() is None:
                self.seen |= {*psutil.Process(self.process.pid).children(recursive=True)}
            return happened()
        until(looked, lambda: self.said[-3000:])

    @property
    def said(self) -> str:
        return self.log.read_text()

    def ended(self) -> int:
        self.until(lambda: self.process.poll() is not None)
        return self.process.returncode


def entries(out: Path) -> dict[str, int]:
    """Entries that are there, with their inodes."""
    return {path.name: path.stat().st_ino for path in (out / "entries").glob("*.parquet")}


@needs_ray
def test_a_driver_of_a_streamed_study_was_killed_and_two_workers_go_on_by_the_same_command(
    nodes: Any, sent: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, passes = tmp_path / "study", list[int]()
    more = ("--address", nodes.address, "--workers", "1", "--stream")
    with Driver(command(folder, out, *more), tmp_path / "log") as driver:
        driver.until(lambda: len(entries(out)) > 1)
        driver.process.kill()
        assert driver.ended() == -signal.SIGKILL, "killed half-way"
        (worker,) = begun(driver.said)
        driver.until(lambda: not psutil.pid_exists(worker))  # a worker goes with its driver
    before = entries(out)
    assert len(before) < len(entries(folder / "alone"))
    told, hand = Told(), sent._Crew._hand

    def counted(crew: Any, to: Any, jobs: Sequence[PlannedJob]) -> None:
        passes.append(len(jobs))
        hand(crew, to, jobs)

    def act() -> None:
        until(lambda: len(begun(told.text)) > 0, lambda: told.text)
        os.kill(begun(told.text)[0], signal.SIGSTOP)  # so that the other has its part
        until(lambda: len(begun(told.text)) > 1, lambda: told.text)
        os.kill(begun(told.text)[0], signal.SIGCONT)

    monkeypatch.setattr(sent._Crew, "_hand", counted)
    with meanwhile(act):
        run_study(by_ray(folder, out, nodes, workers=2, stream=True), parts=("curve",), reporter=told)
    assert max(passes) > 1, "jobs share readings"
    assert sum(passes) == len(entries(folder / "alone")) - len(before)
    assert before.items() <= entries(out).items(), "what was measured is not measured again"
    same(folder / "alone", out)


@needs_ray
def test_what_dies_or_is_unlike_takes_nothing_along(nodes: Any, sent: Any, folder: Path, tmp_path: Path) -> None:
    """Of four workers one is unlike, one has no memory, one is killed, and one's node is removed."""
    older = tmp_path / "older" / "tokenizers-0.0.1.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 0.0.1\n")
    path = os.pathsep.join([str(older.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    nodes.add_node(num_cpus=1, env_vars={"PYTHONPATH": path})
    starved = nodes.add_node(num_cpus=1, env_vars={"RAY_memory_usage_threshold": "0.001"})
    out, told = tmp_path / "study", Told()

    def act() -> None:
        head = nodes.head_node.all_processes["raylet"][0].process.pid
        for number in (0, 1):  # stopped with the jobs that they have, so that there is time
            until(lambda number=number: len(begun(told.text)) > number, lambda: told.text)  # type: ignore[misc]
            os.kill(begun(told.text)[number], signal.SIGSTOP)
        on_head, elsewhere = sorted(begun(told.text), key=lambda pid: psutil.Process(pid).ppid() != head)
        until(lambda: told.text.count("was ended by Ray since its node ran low on memory") >= 3, lambda: told.text)
        nodes.remove_node(starved)
        assert psutil.Process(on_head).ppid() == head
        os.kill(on_head, signal.SIGKILL)
        until(lambda: "is handed out again" in told.text, lambda: told.text)
        (node,) = (one for one in nodes.worker_nodes
                   if one.all_processes["raylet"][0].process.pid == psutil.Process(elsewhere).ppid())
        nodes.remove_node(node, allow_graceful=False)
        os.kill(elsewhere, signal.SIGKILL)  # what is stopped does not see that its node is gone

    with meanwhile(act):
        run_study(by_ray(folder, out, nodes, workers=4), parts=("curve",), reporter=told)
    assert told.text.count("is handed out again") == 2
    assert "is refused: tokenizers is 0.0.1 there and" in told.text
    same(folder / "alone", out)


@needs_ray
def test_ctrl_c_leaves_no_process_behind(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    with Driver(command(folder, out), tmp_path / "log") as driver:
        driver.until(lambda: len(entries(out)) > 0)
        driver.process.send_signal(signal.SIGINT)
        assert driver.ended() == 130, driver.said
        assert "what is measured is kept in" in driver.said
        assert len(driver.seen) > 2
        assert psutil.wait_procs(driver.seen, timeout=20)[1] == []
