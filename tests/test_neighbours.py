"""What others take of the cores while something is timed, and what is said and kept of such timings."""

from __future__ import annotations

import contextlib
import json
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import tiny
from headcount import terminal
from headcount.engine import budget as rooms
from headcount.engine import neighbours
from headcount.engine.engine import Engine
from headcount.engine.neighbours import Load, Speed, watch
from headcount.engine.pack import Cost
from headcount.study.prepare import prepare
from headcount.study.spec import StudySpec

Core = namedtuple("Core", "user nice system idle iowait irq softirq steal guest guest_nice")
Own = namedtuple("Own", "user system")


def machine(monkeypatch: pytest.MonkeyPatch, cores: list[list[Core]], own: list[Own], mine: list[int]) -> None:
    """A machine that has counted so much before and after, of which this process may use some cores."""
    times, owns = iter(cores), iter(own)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: next(times))
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda self: next(owns))
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: mine, raising=False)


def core(busy: float, idle: float, *, waiting: float = 0.0, guest: float = 0.0, steal: float = 0.0) -> Core:
    return Core(busy, 0, 0, idle, waiting, 0, 0, steal, guest, 0)


def test_others_are_what_neither_this_process_nor_nobody_took(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [core(10, 10), core(20, 5), core(0, 0)]
    # Ten seconds on: the first core was busy for 9, the second for 6 (2 of them for a guest, which stands among users
    # already) and stolen for 1; the third, all busy, is not among this process's.
    after = [core(19, 10, waiting=1), core(26, 8, guest=2, steal=1), core(10, 0)]
    machine(monkeypatch, [before, after], [Own(3, 1), Own(11, 2)], [0, 1])
    with watch(2) as load:
        pass
    assert (load.threads, load.cores, load.crowded) == (2, 2, True)
    assert load.others == pytest.approx((9 + 6 + 1 - 9) / 10)


def test_a_moment_too_short_to_be_counted_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, [[core(1, 1)]] * 2, [Own(0, 0), Own(0, 1)], [0])
    with watch() as load:
        pass
    assert (load.others, load.crowded) == (0.0, False)


@pytest.mark.parametrize(("threads", "cores", "others", "crowded"), [
    (2, 2, 0.4, False), (2, 2, 0.6, True), (1, 2, 1.4, False), (1, 2, 1.6, True), (4, 64, 40.0, False),
    (64, 64, 2.0, True), (8, 2, 0.0, False),
])
def test_a_crowd_leaves_too_few_cores(threads: int, cores: int, others: float, crowded: bool) -> None:
    assert Load(threads, cores, others).crowded is crowded


def beside(monkeypatch: pytest.MonkeyPatch, others: float) -> None:
    @contextlib.contextmanager
    def watched(threads: int = 1) -> Iterator[Load]:
        yield Load(2, 2, others)

    monkeypatch.setattr(neighbours, "watch", watched)


def test_timings_beside_busy_processes_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "headcount" / "devices.json"
    timed: list[float] = []

    def measure(loaded: object, layout: object) -> Cost:
        timed.append(1.0 + len(timed))
        return Cost(timed[-1], 100.0)

    monkeypatch.setattr(rooms, "measure_cost", measure)
    beside(monkeypatch, 1.8)
    assert Engine.of(tiny.loaded("llama", seed=31)).budget().cost == Cost(1.0, 100.0), "it serves this process"
    assert not kept.exists()
    beside(monkeypatch, 0.1)
    assert Engine.of(tiny.loaded("llama", seed=32)).budget().cost == Cost(2.0, 100.0)
    assert [Cost(**cost) for cost in json.loads(kept.read_text()).values()] == [Cost(2.0, 100.0)]
    # What a quiet moment has found stays, also where the machine is busy again.
    beside(monkeypatch, 1.8)
    assert Engine.of(tiny.loaded("llama", seed=33)).budget().cost == Cost(2.0, 100.0)
    assert timed == [1.0, 2.0]


def test_a_plan_says_beside_what_it_was_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = StudySpec("tiny", tasks=("piqa",), shots=(0,), out=tmp_path / "study", limit=4, importance_limit=4,
                     fractions=(0.5,), data=tiny.write_task(tmp_path / "data"))
    runner = prepare(spec, parts=("evaluate",), loaded=tiny.loaded("llama"))
    said = "timed while other processes kept 1.8 of 2 cores busy: on an idle machine it may be several times faster"
    for others in (1.8, 0.2):
        beside(monkeypatch, others)
        speed = runner.speed()
        assert speed.tokens_per_second > 0
        terminal.print_cost(runner.todo(), 2, speed)
        assert (said in " ".join(capsys.readouterr().out.split())) is (others > 1)


def test_a_plan_of_nothing_says_nothing_of_time(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_cost([], 2, Speed(load=Load(2, 2, 1.8)))
    assert "second" not in (out := capsys.readouterr().out)
    assert "cores" not in out
