"""What a second worker is worth: a study of eight tasks by one worker with one thread, and by two.

`python benchmarks/workers.py` (with Ray: the extra `ray`) measures a small study of eight embedded word tasks by
SmolLM2 so many times with each number of workers, in turns, and prints seconds, their medians and the ratio as JSON; on
two idle cores that takes five minutes. Loading is apart: no job is handed out before every worker has loaded its tasks
and model, and the clock starts then. Ray's own processes and the driver run meanwhile, on the same cores. Nothing else
should. What else bounds the ratio is told beside it:

- `busy`: the share of the workers' time that they were at jobs.
- `schedule`: the ratio if a job took as long whoever does it, and handing out took no time: the jobs of the first run
  by one worker, handed out again by a clock of numbers.
- `overhead`: CPU seconds of Ray's own processes and of the driver for each second.
- `machine`: how many forward passes two processes without Ray do at once, to one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from headcount.engine.waiting import wait_asleep

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
wait_asleep()

import psutil
import torch

from headcount.model.load import load
from headcount.study import executors
from headcount.study.cluster import connected
from headcount.study.jobs import name_of
from headcount.study.ledger import Ledger, job_id
from headcount.study.plan import PlannedJob
from headcount.study.prepare import Plan, Silent, prepare
from headcount.study.queue import Queue
from headcount.study.runner import run
from headcount.study.spec import StudySpec

TASKS = ("icl_adverb", "icl_antonym", "icl_capital", "icl_comparative", "icl_first_letter", "icl_past_tense",
         "icl_plural", "icl_gerund")
# How long the machine itself is looked at, in seconds.
_PROBE = 6.0


class Together(executors._Crew):
    """Workers that are given nothing before all of them are ready; keeps when that was."""

    ready = 0.0
    overhead = 0.0

    def _hand_out(self) -> None:
        if all(hand.step == "job" for hand in self._hands):
            if not Together.ready:
                Together.ready, Together.overhead = time.perf_counter(), overhead()
            super()._hand_out()


def overhead() -> float:
    """CPU seconds till now of this process and of Ray's, but for those of workers."""
    spent = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            if not process.name().startswith("ray::Shell"):
                spent += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return spent


def measured(plan: Plan, workers: int, out: Path) -> tuple[dict[str, float], dict[str, float]]:
    """One run: its figures, and the seconds of each job by name."""
    spec = dataclasses.replace(plan.spec, workers=workers, out=out)
    Together.ready = 0.0
    run(dataclasses.replace(plan, spec=spec, ledger=Ledger(out)), reporter=Silent())
    taken, own = time.perf_counter() - Together.ready, overhead() - Together.overhead
    spent = {job_id(job): info["seconds"] for job, info in Ledger(out).descriptions()}
    if len(spent) != len(plan.jobs):
        sys.exit(f"workers: {len(spent)} of {len(plan.jobs)} jobs were done")
    return {"seconds": round(taken, 2), "busy": round(sum(spent.values()) / (workers * taken), 3),
            "overhead": round(own / taken, 3)}, spent


def schedule(jobs: Sequence[PlannedJob], seconds: Callable[[PlannedJob], float], workers: int) -> float:
    """Seconds until all jobs are done by so many workers that are handed out jobs as in a study, and wait for nothing.

    Args:
        jobs: The jobs.
        seconds: How long each takes.
        workers: How many there are.
    """
    queue, now = Queue(jobs), 0.0
    idle: list[tuple[int, PlannedJob | None]] = [(number, None) for number in range(workers)]
    busy: list[tuple[float, int, PlannedJob]] = []
    while queue:
        while idle and (taken := queue.take(idle[0][1])):
            heapq.heappush(busy, (now + seconds(taken[0]), idle.pop(0)[0], taken[0]))
        now, number, done = heapq.heappop(busy)
        queue.done(done)
        idle.append((number, done))
    return now


def probe() -> None:
    """Forward passes a second of this process, from when a line is read."""
    torch.set_num_threads(1)
    model, tokens = load("smollm2", device="cpu").model, torch.arange(256).reshape(4, 64)
    with torch.inference_mode():
        model(tokens)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        passes, until = 0, time.perf_counter() + _PROBE
        while time.perf_counter() < until:
            model(tokens)
            passes += 1
    sys.stdout.write(f"{passes / _PROBE}\n")


def machine(processes: int) -> float:
    """Forward passes a second of so many processes together."""
    started = [subprocess.Popen([sys.executable, __file__, "--probe"], text=True, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE) for _ in range(processes)]
    for one in started:
        one.stdout.readline()
    for one in started:
        one.stdin.write("\n")
        one.stdin.flush()
    return sum(float(one.communicate()[0]) for one in started)


def main() -> None:
    """Measure in turns and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--limit", type=int, default=8, help="documents, and training documents, of a task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        probe()
        return
    alone, two = machine(1), machine(2)
    spec = StudySpec("smollm2", tasks=tuple(options.tasks), shots=(0,), limit=options.limit,
                     importance_limit=options.limit, fractions=(0.2, 0.5), random_orders=1, row_tokens=256,
                     batch_tokens=1024, device="cpu", out=Path("study"), executor="ray", workers=2,
                     threads_per_worker=1)
    executors._Crew = Together
    executors._put_down = lambda plan: None  # it is used again
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    by_job: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        plan = prepare(dataclasses.replace(spec, out=Path(folder) / "study"))
        with connected(spec, 2):
            for turn in range(options.repetitions):
                for workers, runs in found.items():
                    figures, seconds = measured(plan, workers, Path(folder) / f"{turn}-{workers}")
                    runs.append(figures)
                    by_job = by_job or seconds
                    sys.stderr.write(f"{workers} worker(s): {json.dumps(figures)}\n")
    medians = {workers: statistics.median(one["seconds"] for one in runs) for workers, runs in found.items()}
    ideal = sum(by_job.values()) / schedule(plan.jobs, lambda planned: by_job[name_of(planned.job)], 2)
    sys.stdout.write(json.dumps({
        "tasks": options.tasks, "limit": options.limit, "jobs": len(plan.jobs), "runs": found, "medians": medians,
        "ratio": round(medians[1] / medians[2], 3), "schedule": round(ideal, 3), "machine": round(two / alone, 3),
        "cores": os.cpu_count(), "processor": platform.machine(),
        "load of the last minutes": os.getloadavg()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
