"""Faults on purpose: flipped bits, kills, damaged entries and a lost description, from the first look to the page."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import faults
import headcount as hc
import synthetic_study as synthetic
import tiny
from headcount import terminal
from headcount.analysis.study import TABLES
from headcount.cli import main
from headcount.errors import ModelError, StudyError
from headcount.model.load import wrap
from headcount.report.cautions import cautions
from headcount.report.page import write_page
from headcount.study import executors
from headcount.study.check import check
from headcount.study.jobs import job_from
from headcount.study.ledger import Entry, Ledger, job_id
from headcount.study.plan import PlannedJob
from headcount.study.prepare import Plan, Silent, prepare
from headcount.study.runner import run, run_study
from headcount.study.spec import StudySpec
from headcount.study.worker import Result


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Ledger]:
    """A small study, measured."""
    return faults.small_study(tmp_path_factory.mktemp("measured"), shots=(0,), limit=4, importance_limit=4)


@pytest.fixture
def copied(measured: tuple[Plan, Ledger], tmp_path: Path) -> tuple[Plan, Ledger]:
    """The same in a folder of its own."""
    plan, whole = measured
    ledger = Ledger(tmp_path / "study")
    ledger.entries_folder.mkdir(parents=True)
    for path in (*whole.entries_folder.iterdir(), whole.folder / "study.json"):
        (ledger.folder / path.relative_to(whole.folder)).write_bytes(path.read_bytes())
    return dataclasses.replace(plan, ledger=ledger, spec=dataclasses.replace(plan.spec, out=ledger.folder)), ledger


def damage(path: Path) -> None:
    """Flip a bit of an entry."""
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)


def code(*arguments: str) -> int:
    """The exit code of a command line."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def kept(ledger: Ledger) -> dict[str, pd.DataFrame]:
    return {ledger.path(entry.job).name: entry.table for entry in ledger.entries()}


def same(one: Ledger, other: Ledger) -> bool:
    left, right = kept(one), kept(other)
    return left.keys() == right.keys() and all(table.equals(right[name]) for name, table in left.items())


def test_a_flipped_bit_is_never_believed_and_ends_in_no_traceback(measured: tuple[Plan, Ledger]) -> None:
    entries = {measured[1].path(entry.job).name: entry for entry in measured[1].entries()}
    jobs = {name: entry.job for name, entry in entries.items()}
    files = {name: (measured[1].entries_folder / name).read_bytes() for name in entries}
    assert faults.flips(files, jobs, 200) == faults.Flips(200, 0, 200, ())
    old = faults.flips({name: faults.earlier(entry) for name, entry in entries.items()}, jobs, 200)
    assert (old.believed + old.told, old.tracebacks) == (200, ())
    assert old.told > 50


def test_two_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    """`make faults` does the same to whole runs, and waits for the disk."""
    script = Path(__file__).with_name("kill_writers.py")
    done = subprocess.run([sys.executable, script, tmp_path, "200"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["200", "0", "0"], done.stderr


def test_a_run_that_is_killed_goes_on(measured: tuple[Plan, Ledger]) -> None:
    entries = list(measured[1].entries())
    found = faults.kills(faults.running(measured[0], entries), entries, 10)
    assert (found.killed, found.damaged, found.lost) == (10, 0, 0)


def test_what_is_damaged_is_measured_again_and_told(
    measured: tuple[Plan, Ledger], copied: tuple[Plan, Ledger], capsys: pytest.CaptureFixture[str],
) -> None:
    """An order and a curve by it: the order comes first, and both are as they were."""
    plan, ledger = copied
    curve = next(job for job in plan.jobs if job.job.needs and job.job.kind == "evaluation")
    (need,) = curve.job.needs
    paths = [ledger.path(curve.key), ledger.entries_folder / f"{need.kind}-{need.name}.parquet"]
    for path in paths:
        damage(path)
    ready = prepare(plan.spec, loaded=plan.loaded)
    assert set(ready.damaged) == {path.name for path in paths}
    terminal.print_damaged(ready.damaged)
    assert "2 entries of this folder are damaged and count as not done" in capsys.readouterr().out
    assert [ledger.path(job.key) for job in ready.todo()] == [*reversed(paths)]
    run(ready)
    assert ledger.damaged() == []
    assert same(ledger, measured[1])


def test_a_study_goes_on_without_its_description(measured: tuple[Plan, Ledger], copied: tuple[Plan, Ledger]) -> None:
    plan, ledger = copied
    (ledger.folder / "study.json").unlink()
    with pytest.raises(StudyError, match=r"has entries, but no study\.json; run the study's command again"):
        hc.open_study(ledger.folder)
    ready = prepare(plan.spec, loaded=plan.loaded)
    assert ready.todo() == []
    run(ready)
    pd.testing.assert_frame_equal(hc.open_study(ledger.folder).curves(), hc.open_study(measured[1].folder).curves())


def test_a_description_that_is_lost_while_a_study_runs_is_written_again(copied: tuple[Plan, Ledger]) -> None:
    plan, ledger = copied
    next(ledger.entries_folder.glob("evaluation-*")).unlink()

    class Loses(Silent):
        def job(self, title: str) -> None:
            (ledger.folder / "study.json").unlink()

    run(plan, reporter=Loses())
    assert hc.open_study(ledger.folder).curves()["accuracy"].notna().all()


def test_the_page_is_written_without_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(synthetic.write(tmp_path, tasks=("red",), shots=(5,)))
    assert not [c for c in cautions(hc.open_study(tmp_path)) if "entr" in c]
    full = next(e for e in ledger.entries("evaluation") if e.job["curve"] == {"order": "none"})
    for path in (*map(ledger.path, (e.job for e in ledger.entries("importance"))), ledger.path(full.job)):
        whole = path.read_bytes()
        damage(path)
        study = hc.open_study(tmp_path)
        assert study.damaged == [path.name]
        assert next(cautions(study)).startswith(f"1 entry is damaged and left out ({path.name})")
        for table in TABLES:
            getattr(study, table.name)()
        path.write_bytes(whole)
    for path in ledger.entries_folder.iterdir():
        damage(path)
    (ledger.entries_folder / "importance-copy (1) [red].parquet").write_bytes(b"")
    told = list(cautions(hc.open_study(tmp_path)))
    assert told[0].startswith("7 entries are damaged and left out (")
    assert told[1] == "1 file among the entries is none and is ignored: importance-copy (1) [red].parquet."
    page, _ = write_page(hc.open_study(tmp_path))
    terminal.print_summary(hc.open_study(tmp_path), page)
    assert "[red].parquet" in capsys.readouterr().out


def test_what_cannot_be_verified_is_counted(tmp_path: Path) -> None:
    ledger = Ledger(synthetic.write(tmp_path, tasks=("red",), shots=(5,)))
    for entry in list(ledger.entries("importance")):
        ledger.path(entry.job).write_bytes(faults.earlier(entry))
    (told,) = (caution for caution in cautions(hc.open_study(tmp_path)) if "checksum" in caution)
    assert told.startswith("2 of 7 entries are of an earlier version, which wrote no checksums")


def test_a_folder_is_checked(
    copied: tuple[Plan, Ledger], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = copied[1]
    names = sorted(path.name for path in ledger.entries_folder.iterdir())
    jobs = {ledger.path(entry.job).name: entry for entry in ledger.entries()}
    old, flipped, cut, emptied = (ledger.entries_folder / name for name in names[:4])
    old.write_bytes(faults.earlier(jobs[old.name]))
    assert code("check", str(ledger.folder)) == 0
    assert f"{len(names) - 1} whole, 1 unverified, 0 damaged" in capsys.readouterr().out
    damage(flipped)
    cut.write_bytes(cut.read_bytes()[:-30])
    emptied.write_bytes(b"")
    for name in (".DS_Store", f".{old.name}.1-ab.tmp"):
        (ledger.entries_folder / name).touch()
    found = check(ledger.folder)
    assert (found.whole, found.unverified, found.holds) == (len(names) - 4, 1, False)
    assert {one.name: one.title for one in found.damaged} == {
        path.name: job_from(jobs[path.name].job).title for path in (flipped, cut, emptied)}
    assert (found.foreign, found.left_over) == ((".DS_Store",), (f".{old.name}.1-ab.tmp",))
    assert code("check", str(ledger.folder)) == 1
    told = capsys.readouterr().out
    assert "Parquet file size is 0 bytes" in told
    assert "measured again when the same command is run again" in told
    assert code("check", str(tmp_path / "nothing")) == 2
    assert "holds no study" in capsys.readouterr().err


def test_what_no_command_measures_again_is_to_be_deleted(
    copied: tuple[Plan, Ledger], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = copied[1]
    path = sorted(ledger.entries_folder.iterdir())[0]
    path.rename(path.with_name(f"evaluation-{24 * '0'}.parquet"))
    found = check(ledger.folder)
    assert [one.reason.endswith("is measured under its name: delete it") for one in found.damaged] == [True]
    assert len(found.unmeasured) == 1
    run(copied[0])
    capsys.readouterr()
    path.with_name(f"evaluation-{24 * '0'}.parquet").unlink()
    assert (check(ledger.folder).holds, check(ledger.folder).unmeasured) == (True, ())


def test_a_folder_in_an_entrys_place_is_told_before_anything_is_measured(copied: tuple[Plan, Ledger]) -> None:
    plan, ledger = copied
    path = sorted(ledger.entries_folder.iterdir())[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(StudyError, match=r"is a folder, where an entry is to be written; move it away"):
        prepare(plan.spec, loaded=plan.loaded, parts=plan.parts)


def test_entries_of_another_model_are_counted(copied: tuple[Plan, Ledger], capsys: pytest.CaptureFixture[str]) -> None:
    ledger = copied[1]
    assert check(ledger.folder).of_other_models == 0
    known = ledger.read_json("study.json") or {}
    ledger.write_json("study.json", known | {"model": known["model"] | {"fingerprint": "2-other"}})
    whole = len(list(ledger.entries()))
    assert check(ledger.folder).of_other_models == whole
    assert code("check", str(ledger.folder)) == 1, "study.json is another folder's"
    assert f"of another model than study.json says, and shown nowhere: {whole}" in capsys.readouterr().out


def test_each_entry_that_is_taken_away_is_named(copied: tuple[Plan, Ledger]) -> None:
    ledger = copied[1]
    assert check(ledger.folder).unmeasured == ()
    for entry in [*ledger.entries()]:
        path = ledger.path(entry.job)
        data = path.read_bytes()
        path.unlink()
        assert check(ledger.folder).unmeasured == (job_from(entry.job).title,)
        path.write_bytes(data)


def test_what_other_commands_cut_otherwise_is_not_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AutoConfig.for_model(  # with norms on what branches put out
        "gemma2", hidden_size=32, intermediate_size=48, head_dim=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(tiny.tokenizer()))
    model = wrap(AutoModelForCausalLM.from_config(config), tiny.tokenizer())
    study, data = tmp_path / "s", tiny.write_task(tmp_path / "data")
    for cut, parts in ((2, ("ffns",)), (5, ("heads", "ffns", "curve"))):
        spec = StudySpec("tiny", tasks=("piqa",), data=data, shots=(0,), limit=4, importance_limit=4, random_orders=0,
                         masks_per_job=cut, out=study)
        run_study(spec, loaded=model, parts=parts)
    assert check(study).unmeasured == ()
    heads = Ledger(study).path(next(entry.job for entry in Ledger(study).entries() if entry.job.get("through_norms")))
    heads.unlink()
    assert code("check", str(study)) == 0
    told = capsys.readouterr().out
    assert "1 job is not measured yet: piqa, 0-shot" in told
    assert "that is measured when the same command is run again" in told


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_description_is_told_and_entries_are_counted(tmp_path: Path, data: bytes) -> None:
    synthetic.write(tmp_path, tasks=("red",), shots=(5,))
    (tmp_path / "study.json").write_bytes(data)
    with pytest.raises(StudyError, match=r"study\.json is damaged"):
        hc.open_study(tmp_path)
    found = check(tmp_path)
    assert (found.whole, found.holds) == (7, False)
    assert "delete this one file" in found.description


@pytest.mark.parametrize(("name", "value"), [
    ("anatomy", {}), ("anatomy", {"heads_per_layer": "x"}), ("unseen", None), ("unseen", {"a": 5}), ("asked", None),
    ("asked", []), ("budget", "x"), ("budget", {"device": "cpu"}), ("commands", 5),
    ("tasks", {"red": {"fingerprint": 1}}), ("asked", [{"spec": {}}]), ("asked", [{"spec": 5}]),
    ("asked", [{"spec": {"tasks": [], "shots": [0], "measure": None}}]), ("anatomy", {"heads_per_layer": [-1]}),
])
def test_a_description_without_a_digest_is_of_the_right_form(tmp_path: Path, name: str, value: object) -> None:
    ledger = Ledger(synthetic.write(tmp_path, tasks=("red",), shots=(5,)))
    known = ledger.read_json("study.json") or {}
    (tmp_path / "study.json").write_text(json.dumps({**known, name: value}))
    with pytest.raises(StudyError, match=rf"study\.json is damaged \({name}.*delete this one file"):
        hc.open_study(tmp_path)


def test_without_its_description_entries_say_which_model_a_study_is_of(
    measured: tuple[Plan, Ledger], tmp_path: Path
) -> None:
    """Those of an earlier version know it by another name."""
    plan, ledger = measured[0], Ledger(tmp_path / "study")
    for entry in measured[1].entries():
        if entry.job.get("curve", {}).get("order") == "none" or entry.job.get("method") == "gradient":
            ledger.write({**entry.job, "model": plan.loaded.earlier_identity}, entry.table, entry.info)
    asked = dataclasses.replace(plan.spec, out=ledger.folder)
    assert prepare(asked, loaded=plan.loaded, parts=("evaluate", "heads")).todo() == []
    with pytest.raises(StudyError, match=r"holds entries of another model, and no study\.json"):
        prepare(asked, loaded=tiny.loaded("opt"), parts=("evaluate", "heads"))


def test_of_jobs_that_share_readings_one_that_fails_takes_none_along(
    measured: tuple[Plan, Ledger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but it and what reads its entry are measured, and then it is told."""
    plan, ledger = measured
    bad = next(job for job in plan.jobs if job.job.kind == "importance" and any(
        need.name == job_id(job.key) for other in plan.jobs for need in other.job.needs))

    class Failing(faults._AtHand):
        results: ClassVar[dict[str, Entry]] = {job_id(entry.job): entry for entry in ledger.entries()}

        def entries(self, jobs: Iterable[PlannedJob], read: Any) -> Iterator[Result]:
            for planned, result in zip(kept := list(jobs), super().entries(kept, read), strict=True):
                if planned.key == bad.key:
                    raise ModelError("it has no number")
                yield result

    monkeypatch.setattr(executors, "Worker", Failing)
    monkeypatch.setattr(executors, "in_files", lambda model: True)
    again = dataclasses.replace(plan, ledger=Ledger(tmp_path / "study"))
    with pytest.raises(ModelError, match="it has no number"):
        run(again)
    left = {job.title for job in again.todo()}
    reading = {job.title for job in plan.jobs if any(need.name == job_id(bad.key) for need in job.job.needs)}
    assert reading
    assert {bad.title, *reading} == left
