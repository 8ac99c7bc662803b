"""Seconds of short scoring passes by how OpenMP's threads wait, on the machine as it is and beside busy processes.

A process for each way of waiting holds the model and the documents ready; they score in turns, one at a time, and then
again beside processes that do nothing but count. `python benchmarks/bench.py waiting` measures it and keeps it.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headcount.engine.waiting import NAMES
from headcount.model.load import LoadedModel
from headcount.tasks.fewshot import FewShot

# Ways of waiting: what is set before torch is loaded.
WAYS: dict[str, dict[str, str]] = {
    "OpenMP's default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in (1000, 10_000, 100_000)},
}
# Documents of icl_antonym without shots, and their split.
DOCUMENTS = {30: "evaluation", 95: "examples"}
# Busy processes beside, documents, rounds: by OpenMP's default a pass beside two takes seconds.
_SETTINGS = ((0, 30, 15), (0, 95, 15), (2, 30, 7))
# Where none is to be beside: more of the cores than this is another's, and so often a pass is done again.
_QUIET, _AGAIN = 0.25, 4
Row = dict[str, Any]


def waiting(loaded: LoadedModel, data: Path) -> list[Row]:
    """Every way of waiting in turns, without busy processes beside and with them."""
    del loaded, data  # each process loads its own, after it was told how to wait
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        scorers = {way: stack.enter_context(_process([__file__], chosen)) for way, chosen in WAYS.items()}
        for scorer in scorers.values():
            _answer(scorer)
        beside = 0
        for busy, documents, rounds in _SETTINGS:
            for _ in range(busy - beside):
                stack.enter_context(_process(["-c", "while True: pass"], {}))
            beside = busy
            rows += _rounds(scorers, documents, rounds, busy)
    return rows


def _rounds(scorers: dict[str, subprocess.Popen[str]], documents: int, rounds: int, busy: int) -> list[Row]:
    """Medians of a pass: seconds, CPU seconds of all its threads, and cores that other processes kept busy."""
    found: dict[str, list[list[float]]] = {way: [] for way in scorers}
    for turn in range(rounds + 1):
        for way, scorer in scorers.items():
            for _ in range(_AGAIN if busy == 0 else 1):
                answer = _answer(scorer, str(documents))
                if answer[2] <= _QUIET:
                    break
            if turn:  # the first warms up
                found[way].append(answer)
    return [{"way": way, "documents": documents, "busy": busy, "rounds": rounds,
             **{name: statistics.median(values) for name, values in
                zip(("wall", "cpu", "others"), zip(*answers, strict=True), strict=True)},
             "fastest": min(a[0] for a in answers), "slowest": max(a[0] for a in answers)}
            for way, answers in found.items()]


@contextlib.contextmanager
def _process(arguments: list[str], chosen: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    env = {name: value for name, value in os.environ.items() if name not in NAMES} | chosen
    process = subprocess.Popen([sys.executable, *arguments], env=env, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _answer(scorer: subprocess.Popen[str], asked: str = "") -> Any:
    """What a scorer answers to a line; to none, its first line, when it is ready."""
    if scorer.stdin is None or scorer.stdout is None:
        sys.exit("waiting: a process without pipes")
    if asked:
        scorer.stdin.write(asked + "\n")
        scorer.stdin.flush()
    line = scorer.stdout.readline()
    if not line:
        sys.exit("waiting: a process that scores has ended")
    return json.loads(line)


def _serve() -> None:
    """Score as often as is asked for on stdin; write seconds, CPU seconds, and cores that others kept busy."""
    import torch

    from headcount.engine.neighbours import watch
    from headcount.masks import Mask
    from headcount.measure.evaluate import prepare, score
    from headcount.model.load import load
    from headcount.tasks.load import get_tasks

    torch.set_num_threads(min(2, os.cpu_count() or 1))
    loaded = load("smollm2", device="cpu")
    (task,) = get_tasks("icl_antonym").values()
    prepared = {n: prepare(loaded, task, FewShot(limit=n), split=split) for n, split in DOCUMENTS.items()}
    full = [Mask.full(loaded.anatomy.heads_per_layer)]
    sys.stdout.write("true\n")
    sys.stdout.flush()
    for line in sys.stdin:
        with watch() as seen:
            started = time.perf_counter(), time.process_time()
            score(loaded, prepared[int(line)], full)
            seconds, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        sys.stdout.write(json.dumps([seconds, cpu, seen.others]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
