"""The command line as a stranger uses it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tiny
from headcount.analysis.study import open_study
from headcount.cli import main
from headcount.engine.engine import Engine
from headcount.model.load import load
from headcount.study.ledger import Ledger, job_id
from headcount.study.runner import run_study
from headcount.study.spec import StudySpec


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("models") / "tiny-llama")


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def headcount(*arguments: object) -> Done:
    """The command in this process: what it prints, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def study_arguments(model: Path, tmp_path: Path, out: str = "study") -> list[object]:
    return ["study", model, "--tasks", "piqa", "--shots", "0", "1", "--limit", "6", "--importance-limit", "5",
            "--data", tiny.write_task(tmp_path / "data"), "--out", tmp_path / out, "--masks-per-job", "1"]


def test_help_is_quick_and_brings_no_torch() -> None:
    code = ("import sys, time; t = time.perf_counter()\n"
            "from headcount.cli import main\nmain(['--help'])\n"
            "heavy = {'torch', 'transformers', 'lm_eval', 'pandas', 'altair', 'scipy'} & set(sys.modules)\n"
            "sys.exit(f'imports {heavy}' if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("study", "evaluate", "heads", "ffns", "curve", "induction", "anatomy", "demo", "report", "plan"):
        assert f" {verb} " in done.stdout


def test_a_study_killed_and_started_again(model_folder: Path, tmp_path: Path) -> None:
    arguments = study_arguments(model_folder, tmp_path)
    # Timed here, where the machine counts as quiet, and kept: what another process times beside this one is not, and
    # other timings are other packs.
    Engine.of(load(str(model_folder))).budget()
    # As many threads as here: sums in another order are other bits.
    process = subprocess.Popen([sys.executable, "-m", "headcount", *map(str, arguments)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    entries = tmp_path / "study" / "entries"
    deadline = time.monotonic() + 200
    while len(list(entries.glob("*.parquet"))) < 5 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed_at = len(list(entries.glob("*.parquet")))
    done = headcount(*arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "study" / "report.html").stat().st_size > 100_000
    assert f"{killed_at} were done before" in done.stderr
    unbroken = StudySpec(str(model_folder), tasks=("piqa",), shots=(0, 1), limit=6, importance_limit=5,
                         data=tmp_path / "data", out=tmp_path / "unbroken", masks_per_job=1)
    run_study(unbroken)
    one, two = ({job_id(e.job): e.table for e in Ledger(tmp_path / f).entries()} for f in ("study", "unbroken"))
    assert one.keys() == two.keys()
    assert len(one) > killed_at >= 5
    for name, table in one.items():
        # The same machine and the same packs: the same bits.
        assert table.equals(two[name]), name


def test_dry_run_measures_nothing(model_folder: Path, tmp_path: Path) -> None:
    done = headcount(*study_arguments(model_folder, tmp_path), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "gradient importance" in done.stdout
    assert "Nothing was measured" in done.stdout
    assert not (tmp_path / "study").exists()
    many = headcount(*study_arguments(model_folder, tmp_path), "--measure", "curves", "grid", "--dry-run")
    assert "gradient importance" not in many.stdout, "a long plan is told by part"
    *parts, jobs = (int(n) for n in re.findall(r"^(?:full model|importance|curves|grid|all) +(\d+) ", many.stdout,
                                               re.MULTILINE))
    assert (len(parts), sum(parts), f"{jobs} jobs, {jobs} to do" in many.stdout) == (4, jobs, True)


def test_a_preset_stands_for_options_and_loses_to_the_command_line(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["--tasks", "icl_plural", "icl_gerund", "--unseen", "icl_agent", "--limit", "4",
                 "--importance-limit", "4", "--out", tmp_path / "study"]
    done = headcount("study", model_folder, "--preset", "opt66b-study", *arguments, "--shots", "2", "--dry-run")
    assert done.returncode == 0, done.stderr
    for planned in ("2-shot: grid, 10% of heads", "by the order of icl_gerund", "by the order of icl_plural",
                    "induction scores, random weights", "icl_agent, 2-shot: heads by the order of mean"):
        assert planned in " ".join(done.stdout.split()), planned
    assert "5-shot" not in done.stdout
    assert re.search(r"^cpu +resident +1 +\d+ s", done.stdout, re.MULTILINE)
    wrong = headcount("study", model_folder, "--preset", "opt67b", *arguments)
    assert wrong.returncode == 2
    assert "opt66b-study" in wrong.stderr


def test_induction_needs_no_tasks(model_folder: Path, tmp_path: Path) -> None:
    done = headcount("induction", model_folder, "--seeds", "1", "--out", tmp_path / "study")
    assert done.returncode == 0, done.stderr
    assert "prefix matching" in done.stdout
    found = open_study(tmp_path / "study").induction()
    assert len(found) == 2 * 12
    assert (tmp_path / "study" / "report.html").exists()
    assert "Means over 4 texts" in done.stdout
    more = headcount("induction", model_folder, "--seeds", "2", "--out", tmp_path / "study")
    assert "Means over 8 texts" in more.stdout
    assert "Means over 4 texts" in headcount("induction", model_folder, "--seeds", "1", "--out",
                                             tmp_path / "study").stdout, "what was asked for last"
    assert "headcount: --seeds is at least 1" in headcount("induction", model_folder, "--seeds=0").stderr
    # Short names are those of the verb, and not of what a study measures.
    study = ("study", model_folder, "--tasks", "icl_plural", "--measure", "induction", "--out", tmp_path / "no")
    assert "headcount: --induction-seeds is at least 1" in headcount(*study, "--induction-seeds", "0").stderr
    assert "Unknown option: --seeds" in headcount(*study, "--seeds=2").stderr


def test_options_come_from_a_file_too(model_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "study.toml"
    config.write_text(f'model = "{model_folder}"\ntasks = ["piqa"]\nshots = [0]\nlimit = 4\n'
                      f'data = "{tiny.write_task(tmp_path / "data")}"\nout = "{tmp_path / "study"}"\n')
    done = headcount("evaluate", "--config", config, "--limit", "3")
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "study" / "study.json").read_text())
    assert saved["spec"]["limit"] == 3
    assert saved["spec"]["shots"] == [0]
    assert "3 documents, fewer than 50: intervals are wide and rough" in " ".join(done.stdout.split())


@pytest.mark.parametrize("verb", ["evaluate", "heads", "ffns", "curve"])
def test_single_steps_print_their_result(model_folder: Path, tmp_path: Path, verb: str) -> None:
    done = headcount(verb, model_folder, "--tasks", "piqa", "--shots", "0", "--limit", "4", "--importance-limit", "4",
                     "--data", tiny.write_task(tmp_path / "data"), "--fractions", "0.5")
    assert done.returncode == 0, done.stderr
    expected = {"evaluate": "accuracy", "heads": "L2H3", "ffns": "L2F", "curve": "by gradient"}[verb]
    assert "piqa" in done.stdout
    assert expected in done.stdout


def test_single_steps_print_what_was_asked_of_a_folder_that_holds_more(model_folder: Path, tmp_path: Path) -> None:
    arguments = ["--limit", "4", "--importance-limit", "4", "--out", tmp_path / "study"]
    first = headcount("curve", model_folder, "--tasks", "icl_plural", "icl_gerund", "--shots", "0", "1", *arguments)
    assert first.returncode == 0, first.stderr
    assert max(map(len, first.stdout.splitlines())) <= 80
    assert all(f"{task}: accuracy" in first.stdout for task in ("icl_plural", "icl_gerund", "mean"))
    assert re.search(r"^ *0 +heads by gradient +[.\d]+ ", first.stdout, re.MULTILINE)
    again = headcount("evaluate", model_folder, "--tasks", "icl_gerund", "--shots", "1", *arguments)
    assert again.returncode == 0, again.stderr
    rows = [line.split()[:2] for line in again.stdout.splitlines()[1:] if ":" not in line]
    assert rows[0] == ["icl_gerund", "1"]
    assert "icl_plural" not in again.stdout
    assert "4 documents, fewer than 50" in again.stdout
    assert "oracle" not in again.stdout, "nothing was asked of it"


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_stopped_says_what_is_kept(asked: signal.Signals, model_folder: Path, tmp_path: Path) -> None:
    arguments = study_arguments(model_folder, tmp_path)
    # A suite that runs in the background has interrupts ignored, and hands that on.
    process = subprocess.Popen([sys.executable, "-m", "headcount", *map(str, arguments)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 200
    while not list((tmp_path / "study" / "entries").glob("*.parquet")):
        assert process.poll() is None, "over before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(asked)
    _, err = process.communicate(timeout=120)
    # A shell sees 130 both ways: CPython ends itself by the signal where the interrupt went through exec() of a text
    # (a dataclass that is made while a module loads), although it was caught.
    assert process.returncode in (130, -signal.SIGINT), err
    assert f"stopped; what is measured is kept in {tmp_path / 'study'}, and the same command goes on from there" in err
    assert list(Ledger(tmp_path / "study").entries()), "whole files"
    assert not (tmp_path / "study" / "report.html").exists()


def test_anatomy_is_printed_and_verified(model_folder: Path) -> None:
    done = headcount("anatomy", model_folder, "--verify")
    assert done.returncode == 0, done.stderr
    assert "12 heads" in done.stdout
    assert done.stdout.count("holds") >= 2
    assert "token trees" in done.stdout


@pytest.mark.parametrize(("change", "message"), [
    ({"model": "no/such-model-here"}, "no/such-model-here"),
    ({"model": "./nowhere"}, "nowhere"),
    ({"--tasks": "pika"}, "did you mean piqa"),
    ({"--shots": "many"}, "many"),
    ({"--shots": "13"}, "few-shot documents"),
    ({"--limit": "0"}, "--limit is at least 1"),
    ({"--dtype": "float12"}, "float12"),
    ({"--examples-split": "dev"}, "--examples-split"),
    ({"--head-score": "best"}, "best"),
    ({"--data": "./nodata"}, "nodata"),
    ({"--bogus": "1"}, "--bogus"),
    ({"--config": "absent.toml"}, "absent.toml"),
    ({"--out": None}, "--out"),
    ({"--measure": "transfer"}, "name two tasks (--tasks), or --unseen"),
    ({"--unseen": "icl_plural"}, "--measure transfer"),
    ({"--seed": "-1"}, "--seed is at least 0"),
    ({"--tasks": "./nowhere"}, "there is no folder ./nowhere"),
])
def test_bad_input_is_one_line_and_exit_code_2(
    model_folder: Path, tmp_path: Path, change: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, str | None] = {
        "model": str(model_folder), "--tasks": "piqa", "--shots": "0", "--limit": "3", "--importance-limit": "3",
        "--data": str(tiny.write_task(tmp_path / "data")), "--out": str(tmp_path / "study"), **change}
    arguments = [options.pop("model"), *(x for pair in options.items() if pair[1] is not None for x in pair)]
    done = headcount("study", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "study").exists(), "nothing half-written"


def test_a_malformed_line_is_named(model_folder: Path, tmp_path: Path) -> None:
    arguments = study_arguments(model_folder, tmp_path)
    path = tmp_path / "data" / "piqa" / "validation.jsonl"
    path.write_text(path.read_text() + '{"goal": \n')
    done = headcount(*arguments)
    assert done.returncode == 2, done.stderr
    assert "validation.jsonl, line 9" in done.stderr


def test_an_encoder_decoder_and_a_state_space_model_are_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, T5Config

    for config in (T5Config(), MambaConfig()):
        folder = tmp_path / config.model_type
        config.save_pretrained(folder)
        done = headcount("anatomy", folder)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert config.model_type in done.stderr.lower()


def test_prompts_that_are_cut_are_told(model_folder: Path, tmp_path: Path) -> None:
    """The tiny model reads 512 tokens; 40 shots of about 30 do not fit."""
    data = tiny.write_task(tmp_path / "data", train=50)
    done = headcount("evaluate", model_folder, "--tasks", "piqa", "--shots", "40", "--limit", "3", "--data", data)
    assert done.returncode == 0, done.stderr
    assert "40-shot: 6 requests were longer than the model's window" in done.stdout
    done = headcount("heads", model_folder, "--tasks", "piqa", "--shots", "40", "--importance-limit", "4",
                     "--data", data)
    assert "40-shot: 4 requests were longer" in done.stdout


def test_ones_own_documents_from_a_file_to_a_report(model_folder: Path, tmp_path: Path) -> None:
    for split, n in (("train", 8), ("validation", 6)):
        path = tmp_path / "after" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"context": f"The number after {i} is", "options": [f"{i + 1}", f"{i}"],
                                            "gold": 0}) + "\n" for i in range(n)))
    done = headcount("study", model_folder, "--tasks", path.parent, "--shots", "0", "2", "--fractions", "0.5",
                     "--protocol", "paper", "--out", tmp_path / "study")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "study" / "report.html").read_text()
    assert "protocol = paper" in report
    assert "Measured as the paper" in done.stdout


def test_a_chat_template_must_be_there(model_folder: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", model_folder, "--tasks", "piqa", "--shots", "0", "--limit", "2", "--data",
                 tiny.write_task(tmp_path / "data")]
    raw, chat = headcount(*arguments), headcount(*arguments, "--apply-chat-template")
    assert (raw.returncode, chat.returncode) == (0, 0), chat.stderr
    plain = tmp_path / "plain"
    shutil.copytree(model_folder, plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    done = headcount("evaluate", plain, *arguments[2:], "--apply-chat-template")
    assert done.returncode == 2
    assert "no chat template" in done.stderr


def test_tasks_are_listed(tmp_path: Path) -> None:
    done = headcount("tasks", "icl_plural", "piqa", "--data", tiny.write_task(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"icl_plural +113 +200\* +4 +0\.250 +acc", done.stdout)
    assert re.search(r"piqa +12 +8\* +2 +0\.500 +acc", done.stdout)
    assert headcount("tasks", "pika").returncode == 2
    absent = headcount("tasks", "copa", "--data", tmp_path)
    assert absent.returncode == 2
    assert "copa" in absent.stderr


def test_the_oracle_of_heads_is_printed_beside_the_gradient(model_folder: Path, tmp_path: Path) -> None:
    arguments = ["heads", model_folder, "--tasks", "piqa", "--shots", "0", "--importance-limit", "6", "--data",
                 tiny.write_task(tmp_path / "data"), "--out", tmp_path / "study"]
    assert headcount(*arguments).returncode == 0
    done = headcount(*arguments, "--method", "oracle")
    assert done.returncode == 0, done.stderr
    assert "L2H3" in done.stdout
    row = r"position +log-lik\. +piqa +0 +-?0\.\d\d +-?0\.\d\d to -?[01]\.\d\d +12"
    assert re.search(row, done.stdout), done.stdout
    sampled = headcount(*arguments, "--method", "oracle", "--sample", "4")
    assert sampled.returncode == 0, sampled.stderr
    assert headcount(*arguments, "--sample", "4").returncode == 2
    spelt_out = headcount("heads", model_folder, *arguments[2:8], *arguments[8:10], "--method", "oracle",
                          "--head-sample", "4")
    assert spelt_out.returncode == 0, spelt_out.stderr
    assert re.search(r"position +log-lik\. +piqa +0 .* 4$", spelt_out.stdout, re.MULTILINE)
    for asked, heads in ((1, 12), (2, 4)):
        table = open_study(tmp_path / "study", asked).importance().query("method == 'oracle' and score == 'accuracy'")
        assert len(table) == heads
    # A folder of an earlier version does not say what was asked for, so that all of it is shown.
    known = tmp_path / "study" / "study.json"
    described = {name: value for name, value in json.loads(known.read_text()).items()
                 if name not in ("asked", "parts", "sha256")}
    del described["tasks"]["piqa"]["by_shots"]
    known.write_text(json.dumps(described))
    table = open_study(tmp_path / "study").importance().query("method == 'oracle' and score == 'accuracy'")
    assert len(table) == 12, "a head of both the sample and the whole counts once"


@pytest.mark.parametrize(("given", "message"), [
    (["--limit", "4.7"], "--limit is a whole number, not 4.7"),
    (["--shots", "0", "1.5"], "--shots is a whole number, not 1.5"),
    (["--executor", "ray", "--gpus-per-worker=.5"], "--gpus-per-worker is a whole number, not .5"),
])
def test_fractions_are_not_rounded(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run(["study", "facebook/opt-125m", "--tasks", "icl_plural", "--out", str(tmp_path / "s"), *given]) == 2
    assert message in capsys.readouterr().err
    assert tiny.run(["plan", "facebook/opt-125m", "--tasks", "piqa", "--limit", "30.0", "--margin", ".015"]) == 0
    (tmp_path / "asked.toml").write_text("shots = [0, 1.7]\nlimit = 2.0\n", encoding="utf-8")
    assert tiny.run(["--config", str(tmp_path / "asked.toml"), "plan", "facebook/opt-125m", "--tasks", "piqa"]) == 2
    assert "--shots is a whole number, not 1.7" in capsys.readouterr().err
