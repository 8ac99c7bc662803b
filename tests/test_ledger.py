"""Entries are whole or not there, whatever happens."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import faults
import synthetic_study as synthetic
from headcount.errors import StudyError
from headcount.study import ledger as room
from headcount.study.ledger import Entry, Ledger, job_id

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


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def as_before(ledger: Ledger, job: Mapping[str, Any]) -> Path:
    """The same entry as earlier versions wrote it."""
    path = ledger.path(job)
    path.write_bytes(faults.earlier(ledger.read(job)))
    return path


def test_no_bit_of_an_entry_can_be_flipped_unseen(tmp_path: Path) -> None:
    """Above all none makes it look like an entry of an earlier version, which has no digest."""
    ledger, job = Ledger(tmp_path), {"kind": "k"}
    ledger.write(job, pd.DataFrame({"x": [1]}), {})
    path = ledger.path(job)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        path.write_bytes(flipped(whole, bit))
        (found,) = ledger.scan(rows=False)
        assert found.damage, bit
        assert found.entry is None
    path.write_bytes(whole)
    assert ledger.has(job)


def test_a_damaged_entry_is_not_done_and_is_replaced(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(JOB, TABLE, {"who": "first"})
    path = ledger.path(JOB)
    at = path.read_bytes().index(b'"first"')
    path.write_bytes(flipped(path.read_bytes(), 8 * at + 16))
    assert not ledger.has(JOB)
    assert (list(ledger.keys()), list(ledger.entries()), list(ledger.descriptions())) == ([], [], [])
    assert ledger.damaged() == [path.name]
    for read in (lambda: ledger.read(JOB), lambda: ledger.read_need(("evaluation", job_id(JOB)))):
        with pytest.raises(StudyError, match=r"damaged .*its digest is of others.*run its study again"):
            read()
    ledger.write(JOB, TABLE, {"who": "second"})
    assert ledger.read(JOB).info == {"who": "second"}


def test_an_entry_under_anothers_name_is_not_believed(tmp_path: Path) -> None:
    ledger, other = Ledger(tmp_path), {**JOB, "task": "piqa"}
    for before in (False, True):
        for job in (JOB, other):
            ledger.write(job, TABLE, {"of": job["task"]})
        if before:
            content = faults.earlier(ledger.read(JOB))
            ledger.path(JOB).write_bytes(content)
        ledger.path(JOB).replace(ledger.path(other))
        assert not ledger.has(other)
        with pytest.raises(StudyError, match=f"whose entry is called {ledger.path(JOB).name}"):
            ledger.read(other)
        ledger.path(other).unlink()


def test_files_of_other_names_are_no_entries(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(JOB, TABLE, {})
    path = ledger.path(JOB)
    strange = (f"{path.stem} (1).parquet", f"{path.name}.bak", "evaluation-copy.parquet", ".DS_Store",
               f".{path.name}.12-ab.tmp", "[red].parquet")
    os.close(os.open(os.fsencode(ledger.entries_folder) + b"/caf\xe9", os.O_CREAT))
    for name in strange:
        path.with_name(name).write_bytes(path.read_bytes())
    assert ([e.job for e in ledger.entries()], list(ledger.keys())) == ([JOB], [JOB])
    assert set(ledger.foreign()) == {*strange, "caf\\xe9"}
    assert ledger.damaged() == []


def test_entries_of_earlier_versions_are_read_as_unverified(tmp_path: Path) -> None:
    ledger = Ledger(synthetic.write(tmp_path))
    whole = list(ledger.entries())
    for entry in whole:
        as_before(ledger, entry.job)
    found = list(ledger.scan())
    assert {(one.damage, one.verified) for one in found} == {("", False)}
    assert all(map(ledger.has, ledger.keys()))
    for one, entry in zip(found, whole, strict=True):
        assert one.entry
        pd.testing.assert_frame_equal(one.entry.table, entry.table)


@pytest.mark.parametrize(("kind", "change", "told"), [
    ("evaluation", lambda table, info: (table.drop(columns="gold"), info), "no column gold"),
    ("evaluation", lambda table, info: (table.astype({"gold": float}), info), "gold is of another type"),
    ("evaluation", lambda table, info: (table.iloc[:-1], info), "299 rows of 3 masks"),
    ("evaluation", lambda table, info: (table.assign(mask=table["mask"] + 1), info), "not in the order of its masks"),
    ("evaluation", lambda table, info: (table.assign(doc_id=range(300)), info), "do not have the same doc_id"),
    ("evaluation", lambda table, info: (table.assign(correct=np.inf), info), "metric is no number"),
    ("evaluation", lambda table, info: (table, {**info, "masks": info["masks"][:-1]}), "2 masks, not 3"),
    ("evaluation", lambda table, info: (table, {**info, "truncated": "0"}), "truncated is no number"),
    ("evaluation", lambda table, info: (table, {**info, "masks": [{**m, "fraction": 0.3} for m in info["masks"]]}),
     "mask 0 is not what its job says"),
    ("evaluation", lambda table, info: (table, {**info, "masks": [{**m, "heads_removed": 1} for m in info["masks"]]}),
     "mask 0 does not remove what it says"),
    ("evaluation", lambda table, info: (table, {**info, "masks": [{**m, "mask": "{}"} for m in info["masks"]]}),
     "cannot be read"),
    ("importance", lambda table, info: (table.assign(component="heae"), info), "components or scores"),
    ("importance", lambda table, info: (table.assign(layer=table["layer"] + 1024), info), "those of a model"),
    ("importance", lambda table, info: (table.iloc[1:], info), "those of a model"),
    ("importance", lambda table, info: (table.assign(importance=np.nan), info), "importance is no number"),
    ("importance", lambda table, info: (table, {}), "num_examples is no number"),
])
def test_what_an_entry_without_a_digest_holds_must_fit_its_job(
    tmp_path: Path, kind: str, change: Callable[[Any, Any], tuple[pd.DataFrame, Mapping[str, Any]]], told: str,
) -> None:
    ledger = Ledger(synthetic.write(tmp_path, tasks=("red",), shots=(5,)))
    entry = next(e for e in ledger.entries(kind) if e.job.get("method", "oracle") == "oracle"
                 and e.job.get("curve", {}).get("component") in (None, "head")
                 and e.job.get("curve", {}).get("order") != "none")
    path = ledger.path(entry.job)
    table, info = change(entry.table, entry.info)
    path.write_bytes(faults.earlier(Entry(entry.job, info, table)))
    assert not ledger.has(entry.job)
    with pytest.raises(StudyError, match=told):
        ledger.read(entry.job)


def test_a_description_has_a_digest_and_old_ones_are_read_without(tmp_path: Path) -> None:
    ledger, path = Ledger(tmp_path), tmp_path / "study.json"
    known = {"spec": {"sha256": "no digest of this file"}, "commands": ["a"]}
    ledger.write_json("study.json", known)
    assert ledger.read_json("study.json") == known
    whole = path.read_bytes()
    assert json.loads(whole).keys() == {*known, "sha256"}
    for bit in range(8 * whole.index(b"digest"), 8 * whole.index(b'"sha256"', whole.index(b"commands"))):
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(StudyError, match=r"study\.json is damaged .*delete this one file and run the study's comm"):
            ledger.read_json("study.json")
    path.write_text(json.dumps(known))
    assert ledger.read_json("study.json") == known


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.filterwarnings("error")
def test_where_the_file_system_knows_no_locks_a_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refused)
    ledger = Ledger(tmp_path)
    with ledger.locked():
        ledger.write_json("study.json", {"a": 1})
    assert ledger.read_json("study.json") == {"a": 1}


def test_a_lock_that_is_never_given_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_PATIENCE", 0.05)
    with Ledger(tmp_path).locked(), pytest.raises(StudyError, match=r"another process has held .*lock for 0 s"), \
            Ledger(tmp_path).locked():
        pass
