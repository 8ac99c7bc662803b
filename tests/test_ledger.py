"""Entries are whole or not there, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from headcount.errors import StudyError
from headcount.study.ledger import Ledger, job_id

JOB = {"kind": "evaluation", "task": "copa", "num_fewshot": 5, "curve": {"fractions": [0.1, 0.2]}}
TABLE = pd.DataFrame({"mask": [0, 0], "doc_id": [0, 1], "correct": [1.0, 0.0]})


def test_an_entry_comes_back_as_it_was_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert not ledger.has(JOB)
    ledger.write(JOB, TABLE, {"seconds": 1.5})
    assert ledger.has(JOB)
    entry = ledger.read(JOB)
    pd.testing.assert_frame_equal(entry.table, TABLE)
    assert (entry.job, entry.info) == (JOB, {"seconds": 1.5})
    assert [e.job for e in ledger.entries("evaluation")] == [JOB]
    assert list(ledger.entries("importance")) == []
    assert list(ledger.descriptions()) == list(ledger.descriptions("evaluation")) == [(JOB, {"seconds": 1.5})]
    assert list(ledger.descriptions("importance")) == []


def test_a_description_is_written_once_and_tables_keep_their_types(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    rng = np.random.default_rng(0)
    info = {"masks": [rng.bytes(50_000).hex()]}
    table = pd.DataFrame({"score": ["position", "example"], "layer": [0, 1], "importance": [0.5, np.nan],
                          "hit": [True, False], "resampled": list(rng.integers(-127, 128, (2, 200), np.int8))})
    ledger.write(JOB, table, info)
    assert ledger.path(JOB).stat().st_size < 110_000
    found = ledger.read(JOB)
    pd.testing.assert_frame_equal(found.table, table)
    assert found.table["resampled"][0].dtype == np.int8
    assert found.info == info


def test_names_depend_on_content_not_on_order() -> None:
    assert job_id(dict(reversed(JOB.items()))) == job_id(JOB)
    assert job_id({**JOB, "num_fewshot": 1}) != job_id(JOB)


def test_the_first_whole_entry_wins(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(JOB, TABLE, {"seconds": 1})
    ledger.write(JOB, TABLE, {"seconds": 2})
    assert ledger.read(JOB).info == {"seconds": 1}


def test_a_cut_off_file_is_no_entry_and_is_replaced(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(JOB, TABLE, {})
    path = ledger.path(JOB)
    path.write_bytes(path.read_bytes()[:-20])
    assert not ledger.has(JOB)
    with pytest.raises(StudyError, match="damaged"):
        ledger.read(JOB)
    ledger.write(JOB, TABLE, {})
    assert ledger.has(JOB)


def test_nothing_stays_behind_when_writing_fails(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(TypeError):
        ledger.write(JOB, TABLE, {"not json": object()})
    assert list(ledger.entries_folder.glob("*")) == []
    assert not ledger.has(JOB)


def _write_many(folder: str) -> None:
    for i in range(10_000):
        Ledger(folder).write({**JOB, "i": i}, TABLE, {})


def test_killed_while_writing(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_many, args=(str(tmp_path),))
    process.start()
    entries = tmp_path / "entries"
    deadline = time.monotonic() + 60
    while len(list(entries.glob("*.parquet"))) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    ledger = Ledger(tmp_path)
    found = list(ledger.entries())
    assert len(found) >= 20
    for entry in found:
        pd.testing.assert_frame_equal(entry.table, TABLE)


def test_damaged_study_json_is_told(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"spec": ')
    with pytest.raises(StudyError, match="damaged"):
        Ledger(tmp_path).read_json("study.json")


def test_the_first_whole_entry_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may finish the same job between the look and the writing."""
    ledger = Ledger(tmp_path)
    ledger.write({"kind": "k"}, pd.DataFrame({"x": [1]}), {"who": "first"})
    answers = iter([False])
    whole = Ledger.has
    monkeypatch.setattr(Ledger, "has", lambda self, job: next(answers, whole(self, job)))
    ledger.write({"kind": "k"}, pd.DataFrame({"x": [2]}), {"who": "second"})
    assert ledger.read({"kind": "k"}).info == {"who": "first"}
    assert not list(tmp_path.rglob("*.tmp"))
