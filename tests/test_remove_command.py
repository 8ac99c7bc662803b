"""From a study to a removed model by commands: what is told, what is refused, and what lm-eval makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM

import headcount as hc
import tiny
from headcount.engine.pack import Budget
from headcount.masks import Mask
from headcount.tasks.lm_eval_yaml import write_tasks
from headcount.tasks.load import get_tasks


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model's folder, and a study of it with a common order."""
    folder = tmp_path_factory.mktemp("remove")
    model, data = tiny.saved(folder / "model"), folder / "data"
    for name in ("piqa", "copa_like"):
        tiny.write_task(data, name)
    spec = hc.StudySpec(model=str(model), tasks=("piqa",), data=data, shots=(0,), fractions=(0.25, 0.5),
                        grid_fractions=(0.25, 0.5), random_orders=1, measure=("curves", "grid"), out=folder / "study")
    return model, hc.run_study(spec)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_a_study_says_what_goes_and_the_folder_is_that_model(
    study: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = study
    out = tmp_path / "small"
    command = ["remove", str(model), "--study", str(folder), "--heads", "0.25", "--out", str(out), "--skip-confirm"]
    assert tiny.run([*command, "--dry-run"]) == 0
    assert not out.exists()
    assert "3 of 12 heads and 0 of 3 FFNs go" in told(capsys)
    assert tiny.run(command) == 0
    said = told(capsys)
    assert "on piqa (8 documents)" in said
    assert "proved: logits of the whole model, loaded again from the files" in said
    certificate = json.loads((out / "headcount.json").read_text())
    chosen = hc.open_study(folder).mask(heads=0.25)
    assert certificate["removed"]["heads"] == [str(head) for head in chosen.mask.heads_removed]
    assert certificate["chosen"]["sentence"] == chosen.describe()
    assert json.loads((folder / "removed" / "small.json").read_text()) == certificate
    assert chosen.describe() in (out / "README.md").read_text()
    for backend in ("headcount", "transformers"):
        assert tiny.run(["check", str(out), "--backend", backend]) == 0
    assert "it is what was written" in told(capsys)
    assert tiny.run(["study", str(out), "--tasks", "icl_plural", "--shots", "0", "--limit", "2", "--dry-run"]) == 0
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    assert tiny.run(["check", str(out)]) == 1
    assert "changed: config.json" in told(capsys)


def test_a_mask_file_is_taken_and_anything_wrong_is_one_line(
    study: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = study
    other = tmp_path / "other"
    tiny.model("llama", seed=1).save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    assert tiny.run(["mask", str(folder), "--heads", "0.5"]) == 0
    mask = tmp_path / "mask.json"
    mask.write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "there").mkdir()
    out = ["--out", str(tmp_path / "none")]
    wrong = {
        "by a --study or a --mask": [str(model), *out],
        "say which measured point": [str(model), "--study", str(folder), *out],
        "--mask is of another model": [str(other), "--mask", str(mask), *out],
        "is no study of": [str(other), "--study", str(folder), "--heads", "0.5", *out],
        "leave out one or the other": [str(model), "--mask", str(mask), "--free", *out],
        "cannot be read": [str(model), "--mask", str(tmp_path / "nothing.json"), *out],
        "was not measured": [str(model), "--study", str(folder), "--heads", "0.3", *out],
        "nothing was removed": [str(model), "--study", str(folder), "--heads", "0.5", "--order", "boolq", *out],
        "--num-fewshot 5": [str(model), "--study", str(folder), "--heads", "0.5", "--shots", "5", *out],
        "exists already": [str(model), "--mask", str(mask), "--out", str(tmp_path / "there")],
        "layers of one shape": [str(model), "--mask", str(mask), "--format", "stock", *out],
        "no measured point is": [str(model), "--study", str(folder), "--within", "0", *out],
        "no points that leave every layer one shape": [str(model), "--study", str(folder), "--uniform", "--free", *out]}
    for said, options in wrong.items():
        assert tiny.run(["remove", *options]) == 2, said
        captured = capsys.readouterr().err.strip()
        assert said in captured.replace("--shots 5", "--num-fewshot 5"), captured
        assert captured.count("\n") == 0, captured
    assert not (tmp_path / "none").exists()
    zeros = ["remove", str(model), "--mask", str(mask), "--format", "masked", "--skip-confirm"]
    assert tiny.run([*zeros, "--out", str(tmp_path / "zeros")]) == 0


def test_lm_eval_unchanged_gets_the_masked_models_answers(tmp_path: Path) -> None:
    """Document by document: predictions are the same unless two options lie within rounding of each other."""
    loaded = tiny.loaded("llama")
    mask = Mask.full(loaded.anatomy.heads_per_layer).without_heads([(0, 0), (1, 1), (1, 2)]).without_ffns([2])
    small = hc.remove(loaded, mask).save(tmp_path / "small")
    write_tasks(["icl_plural"], tmp_path / "tasks")
    task = get_tasks(["icl_plural"])["icl_plural"]
    ours = hc.evaluate(loaded, task, [mask], num_fewshot=2, limit=20, budget=Budget(batch_tokens=4096))
    backend = HFLM(pretrained=str(small), trust_remote_code=True, batch_size=4, device="cpu")
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    theirs = lm_eval.simple_evaluate(model=backend, tasks=["icl_plural"], num_fewshot=2, limit=20, task_manager=manager,
                                     log_samples=True, bootstrap_iters=0)
    samples = sorted(theirs["samples"]["icl_plural"], key=lambda sample: sample["doc_id"])
    scores = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    assert len(scores) == 20
    gold = [score[int(sample["target"])] for score, sample in zip(scores, samples, strict=True)]
    np.testing.assert_allclose(gold, ours.gold_loglikelihood[0], atol=1e-3)
    for score, sample, correct in zip(scores, samples, ours.correct[0], strict=True):
        best, second = sorted(score)[-1:-3:-1]
        assert sample["acc"] == correct or best - second < 1e-3
