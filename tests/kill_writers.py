"""Kills processes that write entries, so many times; prints how many, and how many entries were damaged or lost.

`python tests/kill_writers.py FOLDER NUMBER`, in an interpreter of its own: one that is small forks fast.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import faults
import synthetic_study as synthetic
from headcount.study.ledger import Ledger


def main(folder: str, number: str) -> None:
    os.fsync = lambda file: None  # type: ignore[assignment]  # `make faults` waits for the disk
    entries = list(Ledger(synthetic.write(Path(folder), tasks=("red",), shots=(5,))).entries())

    def work(ledger: Ledger) -> None:
        with ledger.locked():
            ledger.write_json("study.json", ledger.read_json("study.json") or {"begun": True})
        for entry in entries:
            if not ledger.has(entry.job):
                ledger.write(entry.job, entry.table, entry.info)

    found = faults.kills(work, entries, int(number))
    sys.stdout.write(f"{found.killed} {found.damaged} {found.lost}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
