"""Whether a study may go on in a folder: what identifies its model, whichever options and versions led to it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from headcount.analysis.study import open_study
from headcount.errors import HeadcountError, ModelError, StudyError
from headcount.model.load import LoadedModel, load
from headcount.report.cautions import cautions
from headcount.study import worker
from headcount.study.prepare import prepare
from headcount.study.runner import run_study
from headcount.study.spec import StudySpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model."""
    return tiny.saved(tmp_path_factory.mktemp("models") / "llama")


def spec(tmp_path: Path, folder: Path, **changes: Any) -> StudySpec:
    return StudySpec(str(folder), tasks=("piqa",), shots=(0,), out=tmp_path / "study", limit=3, importance_limit=3,
                     data=tiny.write_task(tmp_path / "data"), fractions=(0.5,), device="cpu", **changes)


def left(asked: StudySpec, **how: Any) -> int:
    """How many jobs are to do where a study has been done as by default."""
    return len(prepare(asked, parts=("evaluate", "heads"), **how).todo())


@pytest.fixture
def done(tmp_path: Path, folder: Path) -> StudySpec:
    asked = spec(tmp_path, folder)
    run_study(asked, parts=("evaluate", "heads"))
    return asked


def test_options_that_lead_to_the_same_model_are_the_same_study(done: StudySpec, tmp_path: Path, folder: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    for change in ({"dtype": "float32"}, {"attn_implementation": "sdpa"}, {"trust_remote_code": True},
                   {"model": str(moved)}, {"device_map": "auto", "device": None}):
        assert left(dataclasses.replace(done, **change)) == 0, change


@pytest.mark.parametrize(("change", "said"), [
    ({"dtype": "bfloat16"}, "`?dtype`? was float32, is bfloat16"),
    ({"dtype": "half"}, "`?dtype`? was float32, is float16"),
    ({"attn_implementation": "eager"}, "`?attn_implementation`? was sdpa, is eager"),
    ({"apply_chat_template": True}, "`?apply_chat_template`? was False, is True"),
])
def test_options_that_lead_to_another_model_are_refused_by_name(
    done: StudySpec, change: dict[str, Any], said: str
) -> None:
    before = {path.name: path.read_bytes() for path in done.out.rglob("*") if path.is_file()}
    with pytest.raises(StudyError, match=said):
        prepare(dataclasses.replace(done, **change))
    assert {path.name: path.read_bytes() for path in done.out.rglob("*") if path.is_file()} == before


def test_a_default_that_leads_elsewhere_is_refused(tmp_path: Path, folder: Path) -> None:
    asked = spec(tmp_path, folder, dtype="bfloat16", attn_implementation="eager")
    run_study(asked, parts=("evaluate",))
    with pytest.raises(StudyError, match="attn_implementation was eager, is sdpa"):
        prepare(dataclasses.replace(asked, attn_implementation=None))
    with pytest.raises(StudyError, match="dtype was bfloat16, is float32"):
        prepare(dataclasses.replace(asked, dtype="auto"))


def test_a_model_in_memory_is_what_its_fingerprint_says(done: StudySpec, folder: Path) -> None:
    assert left(done, loaded=load(folder, device="cpu")) == 0
    hooked = load(folder, device="cpu")
    handle = hooked.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ModelError, match=r"carries forward hooks \(model\.layers\.0\.mlp\)"):
        prepare(done, loaded=hooked)
    handle.remove()
    assert left(done, loaded=hooked) == 0
    mlp = hooked.model.model.layers[1].mlp
    mlp.forward = lambda x: x
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp of .* has a forward of its own"):
        prepare(done, loaded=hooked)
    del mlp.forward
    assert left(done, loaded=hooked) == 0
    with torch.no_grad():
        hooked.model.model.embed_tokens.weight[10:20] *= -1
    with pytest.raises(ModelError, match="changed since it was loaded: wrap it again"):
        prepare(done, loaded=hooked)


def test_other_weights_or_rules_of_reading_are_another_model(done: StudySpec, folder: Path, tmp_path: Path) -> None:
    """Weights that the fingerprints of earlier versions did not tell apart, and a tokenizer."""
    other = tiny.model("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight[1010:1030] *= -1
    other.save_pretrained(tmp_path / "negated")
    tiny.tokenizer().save_pretrained(tmp_path / "negated")
    shutil.copytree(folder, tmp_path / "lower")
    rules = tmp_path / "lower" / "tokenizer.json"
    rules.write_text(json.dumps(json.loads(rules.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    for name in ("negated", "lower"):
        with pytest.raises(StudyError, match="a study of another model"):
            prepare(dataclasses.replace(done, model=str(tmp_path / name)))


def as_before(monkeypatch: pytest.MonkeyPatch, asked: StudySpec) -> None:
    """Let a folder be made as by versions that knew the earlier fingerprints alone."""
    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "identity", property(lambda self: self.earlier_identity))
        run_study(asked, parts=("evaluate",))
    file = asked.out / "study.json"
    description = json.loads(file.read_text())
    for name in ("identity", "code", "adapter"):
        del description["model"][name]
    description.pop("sha256", None)
    file.write_text(json.dumps(description))


def test_folders_of_earlier_versions_go_on_by_the_fingerprint_of_these(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spec(tmp_path, folder)
    as_before(monkeypatch, asked)
    assert left(asked) == 1, "evaluation was done, importance was not"
    run_study(asked, parts=("evaluate", "heads"))
    known = json.loads((asked.out / "study.json").read_text())["model"]
    assert known["fingerprint"] != known["identity"] == load(folder, device="cpu").identity
    assert left(asked) == 0
    assert len(open_study(asked.out).importance())


def test_a_folder_that_went_on_tells_models_apart_as_a_new_one(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spec(tmp_path, folder)
    as_before(monkeypatch, asked)
    other = tiny.model("llama")
    with torch.no_grad():
        # Cancels in the earlier fingerprint, and lies between two values of its sample.
        other.model.embed_tokens.weight[1010:1030] *= -1
    other.save_pretrained(tmp_path / "negated")
    tiny.tokenizer().save_pretrained(tmp_path / "negated")
    negated = dataclasses.replace(asked, model=str(tmp_path / "negated"))
    assert left(negated) == 1, "as that version had it"
    run_study(asked, parts=("evaluate",))
    with pytest.raises(HeadcountError, match="a study of another model"):
        prepare(negated)


def test_versions_that_differ_between_entries_are_named(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spec(tmp_path, folder)
    run_study(asked, parts=("evaluate",))
    assert not any("same versions" in caution for caution in cautions(open_study(asked.out)))
    now = worker.versions()
    monkeypatch.setattr(worker, "versions", lambda: now | {"torch": "9.9", "lm_eval": "9.8"})
    run_study(asked, parts=("evaluate", "heads"))
    (told,) = [caution for caution in cautions(open_study(asked.out)) if "same versions" in caution]
    assert f"torch {now['torch']} and 9.9" in told
    assert f"lm_eval {now['lm_eval']} and 9.8" in told
    assert "transformers" not in told
