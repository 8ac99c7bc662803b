"""Faults on purpose: single bits of entries flipped, and runs killed at any time and at every kind of write.

`make faults` measures a small study of a tiny random model and does both to it. A flip is believed where the entry
still counts as done, or is read; an entry of an earlier version, which has no digest, may be read as unverified, but
nothing may raise anything except the project's own error. Killed is a whole run whose measuring is replaced by results
that are at hand, so that it does little but write: in a process of its own, at random times, and before and after calls
that touch the disk. After every kill no entry may be damaged; run once more, the folder must hold what an unbroken run
holds, bit by bit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from headcount.analysis.study import TABLES, open_study
from headcount.errors import HeadcountError
from headcount.report.cautions import cautions
from headcount.study import executors, runner
from headcount.study.ledger import FORMAT, Entry, Ledger, job_id
from headcount.study.plan import PlannedJob
from headcount.study.prepare import Plan, prepare
from headcount.study.spec import StudySpec
from headcount.study.worker import Result

_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# What touches the disk while a run writes.
_WRITES = ((os, "link"), (os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "write_bytes"), (Path, "mkdir"),
           (Ledger, "write"), (Ledger, "write_json"))
# Kills of one folder before it is let go on to its end.
_KILLS_OF_A_FOLDER = 8


@dataclass(frozen=True)
class Flips:
    """What became of entries with one flipped bit.

    Attributes:
        tried: How many.
        believed: How many were taken as if they were whole.
        told: How many were found to be damaged.
        tracebacks: What was raised beside the project's own error.
    """

    tried: int
    believed: int
    told: int
    tracebacks: tuple[str, ...]


@dataclass(frozen=True)
class Kills:
    """What became of runs that were killed.

    Attributes:
        killed: How many were.
        undisturbed: How many ended before they could be.
        damaged: Entries that a kill left damaged.
        lost: Folders that in the end did not hold what an unbroken run holds, bit by bit.
    """

    killed: int
    undisturbed: int
    damaged: int
    lost: int


def earlier(entry: Entry) -> bytes:
    """The entry as earlier versions wrote it: without a digest."""
    out, rows = pa.BufferOutputStream(), pa.Table.from_pandas(entry.table, preserve_index=False)
    content = {"format": FORMAT, "job": entry.job, "info": entry.info}
    with pq.ParquetWriter(out, rows.schema.remove_metadata(), compression="zstd", store_schema=False) as file:
        file.write_table(rows.replace_schema_metadata(None))
        file.add_key_value_metadata({"headcount": json.dumps(content)})
    return out.getvalue().to_pybytes()


def flips(files: Mapping[str, bytes], jobs: Mapping[str, Mapping[str, Any]], tries: int, seed: int = 0) -> Flips:
    """Flip one random bit of a random entry, so many times.

    Args:
        files: Bytes of whole entries, by the files' names.
        jobs: What they answer for.
        tries: How many.
        seed: Of what is drawn.
    """
    drawn, names, found = random.Random(seed), sorted(files), Counter[str]()
    tracebacks: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(folder)
        ledger.entries_folder.mkdir()
        for _ in range(tries):
            name = drawn.choice(names)
            data, bit = bytearray(files[name]), drawn.randrange(8 * len(files[name]))
            data[bit // 8] ^= 1 << bit % 8
            path = ledger.entries_folder / name
            path.write_bytes(data)
            try:
                found["believed" if ledger.has(jobs[name]) or list(ledger.keys()) or list(ledger.entries())
                      else "told"] += 1
            except Exception:  # noqa: BLE001 - that there is none is what is shown
                tracebacks.append(traceback.format_exc())
            path.unlink()
    return Flips(tries, found["believed"], found["told"], tuple(tracebacks))


def tables_of(folder: Path) -> list[str]:
    """What reading every table of a study folder raises, beside the project's own error."""
    try:
        study = open_study(folder)
        for table in TABLES:
            getattr(study, table.name)()
        list(cautions(study))
    except HeadcountError:
        return []
    except Exception:  # noqa: BLE001 - that there is none is what is shown
        return [traceback.format_exc()]
    return []


class _AtHand:
    """A worker whose results are those of an unbroken run."""

    results: Mapping[str, Entry]

    def __init__(self, plan: Plan, progress: Callable[[float], None]) -> None:
        self.plan = plan

    def entries(self, jobs: Iterable[PlannedJob], read: Any) -> Iterator[Result]:
        for planned in jobs:
            for need in planned.job.needs:
                read(need)
            known = self.results[job_id(planned.key)]
            yield Result(known.table, dict(known.info))


def running(plan: Plan, entries: Iterable[Entry]) -> Callable[[Ledger], None]:
    """What runs the plan in a folder without measuring anything: results are those of an unbroken run."""
    worker = type("AtHand", (_AtHand,), {"results": {job_id(entry.job): entry for entry in entries}})

    def run(ledger: Ledger) -> None:
        with mock.patch.object(executors, "Worker", worker):
            runner.run(dataclasses.replace(plan, ledger=ledger))

    return run


def kills(work: Callable[[Ledger], None], entries: Iterable[Entry], number: int, seed: int = 0) -> Kills:
    """Kill a process that fills folders, so many times.

    Args:
        work: Writes what a folder lacks of these entries, and study.json.
        entries: The entries.
        number: How many times.
        seed: Of when and where.
    """
    drawn, found = random.Random(seed), Counter[str]()
    whole = {job_id(entry.job): entry for entry in entries}
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        _wait(_start(work, Path(scratch) / "unbroken"))
        takes = time.monotonic() - started
        folder, of_folder = Path(scratch) / "0", 0
        while found["killed"] < number:
            ended = _killed(work, folder, drawn, takes)
            found["killed" if ended else "undisturbed"] += 1
            found["damaged"] += len(Ledger(folder).damaged())
            of_folder += 1
            if not ended or of_folder == _KILLS_OF_A_FOLDER or found["killed"] == number:
                found["lost"] += (ended and _wait(_start(work, folder)) != 0) or not _same(whole, folder)
                shutil.rmtree(folder)
                folder, of_folder = Path(scratch) / str(found.total()), 0
    return Kills(found["killed"], found["undisturbed"], found["damaged"], found["lost"])


def _killed(work: Callable[[Ledger], None], folder: Path, drawn: random.Random, takes: float) -> bool:
    """Do the work in a process that is killed, if it does not end before."""
    chosen = drawn.choice(_SIGNALS)
    if drawn.random() < 0.5:
        where, name = drawn.choice(_WRITES)
        left, after = drawn.randint(1, 5), drawn.random() < 0.5
        return _wait(_start(work, folder, lambda: _arm(where, name, left, chosen, after=after))) != 0
    process = _start(work, folder)
    time.sleep(drawn.uniform(0, takes))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, chosen)
    return _wait(process) != 0


def _arm(where: Any, name: str, number: int, chosen: signal.Signals, *, after: bool) -> None:
    """Let the so manieth call of this function, before or after it is done, be the process's last."""
    call, calls = getattr(where, name), itertools.count(1)

    def armed(*arguments: Any, **named: Any) -> Any:
        last = next(calls) == number
        if last and not after:
            os.kill(os.getpid(), chosen)
        result = call(*arguments, **named)
        if last and after:
            os.kill(os.getpid(), chosen)
        return result

    setattr(where, name, armed)


def _start(work: Callable[[Ledger], None], folder: Path, before: Callable[[], None] = lambda: None) -> int:
    """Do the work in a process of its own; returns its number once it has begun."""
    begun, begin = os.pipe()
    process = os.fork()
    if process:
        os.close(begin)
        os.read(begun, 1)
        os.close(begun)
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(begin)
        before()
        work(Ledger(folder))
        code = 0
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def _wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _same(whole: Mapping[str, Entry], folder: Path) -> bool:
    """Whether a folder holds the same entries, table by table, and a description that can be read."""
    ledger = Ledger(folder)
    found = {job_id(entry.job): entry for entry in ledger.entries()}
    return ledger.read_json("study.json") is not None and found.keys() == whole.keys() and all(
        found[name].table.equals(entry.table) and found[name].job == entry.job for name, entry in whole.items())


def small_study(folder: Path, **options: Any) -> tuple[Plan, Ledger]:
    """A study of a tiny random model: its plan, and what was measured."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import tiny

    asked = {"shots": (0, 2), "limit": 6, "importance_limit": 6, "fractions": (0.25, 0.5), "masks_per_job": 2} | options
    spec = StudySpec("tiny", tasks=("piqa",), data=tiny.write_task(folder / "data"), out=folder / "study", **asked)
    plan = prepare(spec, loaded=tiny.loaded("llama"))
    return plan, Ledger(runner.run(plan))


def _read_flipped(folder: Path, files: Mapping[str, bytes], tries: int, seed: int = 1) -> Iterator[str]:
    """What reading the tables of a whole folder raises in which entries of an earlier version have a flipped bit."""
    drawn = random.Random(seed)
    for name, data in files.items():
        (folder / "entries" / name).write_bytes(data)
    for _ in range(tries):
        name = drawn.choice(sorted(files))
        flipped, bit = bytearray(files[name]), drawn.randrange(8 * len(files[name]))
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / "entries" / name).write_bytes(flipped)
        yield from tables_of(folder)
        (folder / "entries" / name).write_bytes(files[name])


def main() -> int:
    """Both loops; 1 where one of them found something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=300)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        plan, ledger = small_study(Path(scratch), measure=("curves", "grid", "induction"), induction_seeds=1,
                                   induction_lengths=(20,), grid_fractions=(0.5,))
        entries = {ledger.path(entry.job).name: entry for entry in ledger.entries()}
        jobs = {name: entry.job for name, entry in entries.items()}
        whole = flips({name: (ledger.entries_folder / name).read_bytes() for name in entries}, jobs, asked.flips)
        sys.stdout.write(f"{whole.tried} flips: {whole.believed} believed, {len(whole.tracebacks)} tracebacks\n")
        old_files = {name: earlier(entry) for name, entry in entries.items()}
        old = flips(old_files, jobs, asked.flips)
        sys.stdout.write(f"{old.tried} flips of entries of an earlier version: {old.told} told, {old.believed} read as "
                         f"unverified, {len(old.tracebacks)} tracebacks\n")
        killed = kills(running(plan, entries.values()), entries.values(), asked.kills)
        sys.stdout.write(f"{killed.killed} kills: " + (
            "nothing lost, tables equal\n" if not killed.lost + killed.damaged else
            f"{killed.lost} folders lost something, {killed.damaged} entries damaged\n"))
        read = list(_read_flipped(ledger.folder, old_files, asked.flips // 20))
        sys.stdout.write(f"{asked.flips // 20} folders with a flipped entry of an earlier version read: "
                         f"{len(read)} tracebacks\n")
    raised = [*whole.tracebacks, *old.tracebacks, *read]
    sys.stdout.write("".join(f"\n{text}" for text in dict.fromkeys(raised)))
    return int(bool(whole.believed or raised or killed.lost or killed.damaged))


if __name__ == "__main__":
    sys.exit(main())
