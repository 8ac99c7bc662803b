"""What a second worker is worth: a study of eight tasks by one worker with one thread, and by two.

`python benchmarks/workers.py` (with Ray: the extra `ray`) measures a small study of eight embedded word tasks by
SmolLM2 so many times with each number of workers, in turns, and prints seconds, their medians and the ratio as JSON.
Loading is apart: no job is handed out before every worker has loaded its tasks and model, and the clock starts then.
Ray's own processes and the driver run meanwhile, on the same cores. Nothing else should; what the workers' time went to
is told besides (`busy`: the share of it that they were at jobs), which says more than the ratio where something did.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

from headcount.engine.waiting import wait_asleep

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
wait_asleep()

from headcount.study import executors
from headcount.study.ledger import Ledger
from headcount.study.prepare import Silent, prepare
from headcount.study.runner import run
from headcount.study.spec import StudySpec

TASKS = ("icl_adverb", "icl_antonym", "icl_capital", "icl_comparative", "icl_first_letter", "icl_past_tense",
         "icl_plural", "icl_gerund")


class Together(executors._Crew):
    """Workers that are given nothing before all of them are ready; keeps when that was."""

    ready = 0.0

    def _hand_out(self) -> None:
        if all(hand.step == "job" for hand in self._hands):
            Together.ready = Together.ready or time.perf_counter()
            super()._hand_out()


def seconds(workers: int, tasks: tuple[str, ...], limit: int, out: Path) -> tuple[float, float]:
    """Seconds from when all workers are ready to the last entry, and the share of the workers' time spent on jobs."""
    spec = StudySpec("smollm2", tasks=tasks, shots=(0,), limit=limit, importance_limit=limit, fractions=(0.2, 0.5),
                     random_orders=1, row_tokens=256, batch_tokens=1024, device="cpu", out=out, executor="ray",
                     workers=workers, threads_per_worker=1)
    ready, Together.ready = prepare(spec), 0.0
    run(ready, reporter=Silent())
    taken = time.perf_counter() - Together.ready
    spent = [info["seconds"] for _, info in Ledger(out).descriptions()]
    if len(spent) != len(ready.jobs):
        sys.exit(f"workers: {len(spent)} of {len(ready.jobs)} jobs were done")
    return round(taken, 2), round(sum(spent) / (workers * taken), 3)


def main() -> None:
    """Measure in turns and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--limit", type=int, default=16, help="documents, and training documents, of a task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    options = parser.parse_args()
    executors._Crew = Together
    found: dict[int, list[float]] = {1: [], 2: []}
    busy: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.repetitions):
        for workers, times in found.items():
            with tempfile.TemporaryDirectory() as folder:
                taken, share = seconds(workers, tuple(options.tasks), options.limit, Path(folder) / "study")
            times.append(taken)
            busy[workers].append(share)
            sys.stderr.write(f"{workers} worker(s): {times[-1]} s\n")
    medians = {workers: statistics.median(times) for workers, times in found.items()}
    sys.stdout.write(json.dumps({
        "tasks": options.tasks, "limit": options.limit, "seconds": found, "busy": busy, "medians": medians,
        "ratio": round(medians[1] / medians[2], 3), "cores": os.cpu_count(), "machine": platform.machine(),
        "load of the last minutes": os.getloadavg()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
