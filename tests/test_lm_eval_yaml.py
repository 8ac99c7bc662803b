"""What `headcount tasks --yaml` writes gives lm-eval the prompts, shots and answers of `headcount evaluate`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import tiny
from headcount.cli import main
from headcount.errors import OptionError, TaskError
from headcount.measure.evaluate import evaluate
from headcount.model.load import LoadedModel, load
from headcount.tasks.lm_eval_yaml import write_tasks
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Task

Doc = dict[str, Any]


def rows(n: int, start: int = 0, **more: object) -> list[Doc]:
    """Documents with two or three options of different lengths."""
    return [{"context": f"Count from {start + i}:", "gold": i % 2,
             "options": [f"{start + i + 1}", f"{start + i - 1} and stop", "no more"][: 2 + i % 3 % 2], **more}
            for i in range(n)]


def put(folder: Path, **splits: Sequence[Doc]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, docs in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(doc)}\n" for doc in docs), encoding="utf-8")
    return folder


ODD = [
    {"context": "", "options": ["a", "b c"], "gold": 0},
    {"context": "12", "options": ["13", "11"], "gold": 0},
    {"context": "Spaces at the end:   ", "options": ["x", " y", "\tz", "\nw"], "gold": 2},
    {"context": "日本語 naïve 🙂\u2028\u0085", "options": ["東京", "['père']", "{{ 7 * 7 }}"], "gold": 1},
    {"context": "Quotes: 'a' \"b\" \\n {# no #} {{ 1 }}", "options": ["'", '"', "\\"], "gold": 2},
    {"context": "One:", "options": ["only"], "gold": 0},
    {"context": "[1]", "options": ["true", "null", "no"], "gold": 1},
]
TWICE = [*rows(1), *rows(1), *rows(4), *rows(1)]
DAYS = [{"context": f"2024-03-0{i}", "options": ["2024-03-04", "2024-03-05T10:00:00"], "gold": i % 2}
        for i in range(1, 9)]
# Shapes of documents of one's own, by the splits that there are; `alone` is a single file.
SHAPES: dict[str, dict[str, list[Doc]]] = {
    "train": {"train": rows(12), "validation": rows(7, 100)},
    "train_test": {"train": rows(12), "test": rows(7, 100)},
    "all_three": {"train": rows(12), "validation": rows(5, 50), "test": rows(7, 100)},
    "no_train": {"validation": rows(12), "test": rows(7, 100)},
    "alone": {"": rows(8)},
    "alone_twice": {"": TWICE},
    "only_validation": {"validation": TWICE},
    "only_test": {"test": TWICE},
    "both": {"train": [*rows(6), *rows(3)], "validation": [*rows(3, 100), *rows(4)]},
    "same": {"train": TWICE, "validation": TWICE},
    "same_test": {"train": TWICE, "test": TWICE},
    "validation_is_test": {"validation": TWICE, "test": TWICE},
    "odd": {"": ODD},
    "odd_train": {"train": ODD, "validation": ODD[::-1]},
    "days": {"train": DAYS, "validation": DAYS[3:]},
    # Other fields: different in documents of the same prompt, of several types, null, absent in some lines.
    "fields": {"train": [doc | {"id": i if i % 2 else f"{i}", "note": None} for i, doc in enumerate(rows(9))],
               "validation": [doc | {"id": -1.5} for doc in rows(5)] + rows(2, 100)},
}


def write_shape(folder: Path, name: str, splits: dict[str, list[Doc]]) -> str:
    """A shape's folder or file, as a task's name."""
    if "" not in splits:
        return str(put(folder / name, **splits))
    return str(put(folder, **{name: splits[""]}) / f"{name}.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, documents of all shapes, and what is written of them."""
    made = tmp_path_factory.mktemp("yaml")
    tiny.saved(made / "model")
    names = [write_shape(made / "mine", name, splits) for name, splits in SHAPES.items()]
    written = write_tasks([*names, "icl_antonym"], made / "out")
    assert set(written.tasks) == {*SHAPES, "icl_antonym"}
    return made


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(folder / "model", device="cpu")


def by_lm_eval(folder: Path, tasks: Sequence[str], k: int, seed: int, *, chat: bool) -> dict[str, list[Doc]]:
    """lm-eval's own evaluation, with its own samples by task."""
    found = simple_evaluate(
        model="hf", model_args={"pretrained": str(folder / "model"), "device": "cpu"}, tasks=list(tasks),
        num_fewshot=k, batch_size=16, log_samples=True, bootstrap_iters=0, limit=12,
        fewshot_random_seed=seed, apply_chat_template=chat, fewshot_as_multiturn=chat,
        # Without lm-eval's own tasks, which take ten seconds to be listed.
        task_manager=TaskManager(include_path=str(folder / "out"), include_defaults=False))
    return {name: sorted(samples, key=lambda one: one["doc_id"]) for name, samples in found["samples"].items()}


@pytest.mark.parametrize(("k", "seed", "chat"), [(0, 1234, False), (1, 1234, False), (5, 1234, False), (2, 7, True)])
def test_lm_eval_gives_the_same_document_by_document(
    folder: Path, loaded: LoadedModel, k: int, seed: int, *, chat: bool
) -> None:
    theirs = by_lm_eval(folder, [*SHAPES, "icl_antonym"], k, seed, chat=chat)
    asked = dataclasses.replace(loaded, apply_chat_template=chat)
    for name in [*SHAPES, "icl_antonym"]:
        place = folder / "mine" / name
        named = name if name == "icl_antonym" else str(place if place.is_dir() else place.with_suffix(".jsonl"))
        (task,) = get_tasks([named]).values()
        ours = evaluate(asked, task, num_fewshot=k, limit=12, seed=seed)
        golds = [float(sample["filtered_resps"][sample["target"]][0]) for sample in theirs[name]]
        assert len(golds) == len(ours.doc_ids) == min(12, len(task.documents("evaluation"))), name
        assert np.abs(ours.gold_loglikelihood[0] - golds).max() < 1e-3, name
        close = abs(ours.margin[0]) < 1e-3
        right, right_by_length = ([sample.get(metric) for sample in theirs[name]] for metric in ("acc", "acc_norm"))
        assert ((ours.correct[0] == right) | close).all(), name
        if "acc_norm" in ours.extra_metrics:
            assert ours.extra_metrics["acc_norm"][0].tolist() == right_by_length, name


@pytest.mark.long
def test_lm_evals_command_line_finds_the_task_and_gets_the_accuracy(tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    """Where the folder of the documents lies beside, and lm-eval has a task of that name."""
    put(tmp_path / "copa", train=rows(12), validation=rows(40, 100))
    tiny.saved(tmp_path / "model")
    with pytest.raises(SystemExit, match="0"):
        main(["tasks", str(tmp_path / "copa"), "--yaml", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "with 0, 1 and 5 shots lm-eval's prompts are headcount's" in told
    assert "--shared-shots and --protocol paper cannot be repeated" in told
    (command,) = [line for line in told.splitlines() if line.startswith("lm_eval ")]
    words = command.replace("MODEL", "model").replace("num_fewshot K", "num_fewshot 3").split()
    ran = subprocess.run([sys.executable, "-m", *words, "--device", "cpu", "--output_path", "results",
                          "--log_samples"],
                         cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (log,) = (tmp_path / "results").rglob("samples_copa*.jsonl")
    theirs = sorted(map(json.loads, log.read_text(encoding="utf-8").splitlines()), key=lambda one: one["doc_id"])
    (task,) = get_tasks([str(tmp_path / "copa")]).values()
    ours = evaluate(load(tmp_path / "model", device="cpu"), task, num_fewshot=3)
    golds = [float(sample["filtered_resps"][int(sample["target"])][0]) for sample in theirs]
    assert np.abs(ours.gold_loglikelihood[0] - golds).max() < 1e-3
    assert ((ours.correct[0] == [sample["acc"] for sample in theirs]) | (abs(ours.margin[0]) < 1e-3)).all()


def definition(folder: Path, name: str) -> Doc:
    """What was written, its functions by their names."""
    text = (folder / f"{name}.yaml").read_text(encoding="utf-8").replace("!function", "")
    return dict(yaml.safe_load(text))


def test_only_documents_that_are_their_own_shots_are_numbered(folder: Path) -> None:
    numbered = {name for name in SHAPES if definition(folder / "out", name)["dataset_kwargs"].get("numbered")}
    assert numbered == {"alone", "alone_twice", "only_validation", "only_test", "same", "same_test",
                        "validation_is_test", "odd"}
    drawn_apart = {name for name in SHAPES if "fewshot_config" in definition(folder / "out", name)}
    assert drawn_apart == {"only_test", "same_test", "validation_is_test"}
    assert definition(folder / "out", "train")["dataset_kwargs"]["files"] == {
        split: str(folder / "mine" / "train" / f"{split}.jsonl") for split in ("train", "validation")}


@pytest.mark.parametrize("name", ["alone_twice", "same_test"])
def test_prompts_that_lm_eval_makes_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          name: str) -> None:
    """Without the numbers, lm-eval would take duplicates for the document; without the sampler, draw the document."""
    place = write_shape(tmp_path, name, SHAPES[name])
    monkeypatch.setattr(Task, "draws_from_evaluated", False)
    with pytest.raises(TaskError, match=r"lm-eval cannot repeat headcount's prompts of task .* so nothing is written"):
        write_tasks([place], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_definitions_of_lm_eval_are_written_with_local_documents_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_task(tmp_path)
    with pytest.raises(TaskError, match="lm-eval has piqa and copa already: give their names to lm_eval --tasks"):
        write_tasks(["piqa", "copa"], tmp_path / "out")
    with pytest.raises(SystemExit, match="0"):
        main(["tasks", "copa", "multirc", "--yaml", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "not written, since lm-eval has it: copa" in told
    assert "multirc for lm-eval: headcount's definition; its documents are not local" in told
    monkeypatch.chdir(tmp_path)
    assert write_tasks(["piqa"], Path("out"), Path()).tasks == {"piqa": (0, 1, 5)}
    assert definition(Path("out"), "piqa")["dataset_kwargs"]["files"]["train"] == str(tmp_path / "piqa" / "train.jsonl")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"piqa.yaml", "multirc.yaml",
                                                                    "headcount_documents.py", "headcount_functions.py"}


def test_what_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = put(tmp_path / "mine", validation=rows(8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.yaml").write_text("task: mine\n")
    assert main(["tasks", str(one), "--yaml", str(tmp_path / "out")]) == 2
    assert "mine.yaml is there, and headcount did not write it: name another folder with --yaml" in (
        capsys.readouterr().err)
    assert (tmp_path / "out" / "mine.yaml").read_text() == "task: mine\n"
    with pytest.raises(OptionError, match="yaml is a folder to write to"):
        write_tasks([str(one)], tmp_path / "out" / "mine.yaml")
    with pytest.raises(TaskError, match=r"does not find a task named 'a\[1\]'; rename"):
        write_tasks([str(put(tmp_path / "a[1]", validation=rows(3)))], tmp_path / "new")
    with pytest.raises(TaskError, match="two of the tasks are named 'mine'"):
        write_tasks([str(one), str(put(tmp_path / "b" / "mine", validation=rows(3)))], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    for _ in range(2):  # what headcount wrote, it writes anew
        write_tasks([str(one)], tmp_path / "new")
