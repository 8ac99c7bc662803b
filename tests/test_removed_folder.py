"""What lies in a removed model's folder beside its weights, where such a folder may be, and what is refused."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import inspect
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GenerationConfig

import headcount as hc
import tiny
from families import tokens
from headcount.errors import ModelError, OptionError
from headcount.mask_file import MaskFile
from headcount.masks import Mask
from headcount.model.load import LoadedModel, load, wrap
from headcount.model.size import weights_size
from headcount.model.source import Source, find
from headcount.removal.remove import Format, fits_twice, remove
from headcount.removal.save import check_place


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a card, and settings of generation that transformers reads and does not write."""
    folder = tiny.saved(tmp_path_factory.mktemp("full") / "model")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-licence\nlanguage:\n- en\n"
                                      "date: 2026-11-29\n---\n# A model\n")
    told = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(told | {"do_sample": False, "temperature": 0.7}))
    return folder


def some(anatomy: Any) -> Mask:
    return Mask.full(anatomy.heads_per_layer).without_heads([(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)]).without_ffns([2])


@pytest.fixture(scope="module")
def small(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load(full)
    return remove(loaded, some(loaded.anatomy)).save(tmp_path_factory.mktemp("small") / "model")


def test_a_models_licence_and_settings_of_generation_go_along(full: Path, small: Path) -> None:
    front = (small / "README.md").read_text().split("---")[1].splitlines()
    assert 'license: "other"' in front
    assert 'license_name: "tiny-licence"' in front
    assert 'language: ["en"]' in front
    assert not any("date" in line for line in front)
    assert GenerationConfig.from_pretrained(small).temperature == 0.7
    assert GenerationConfig.from_pretrained(small).to_dict() == GenerationConfig.from_pretrained(full).to_dict()
    loaded = tiny.loaded()
    in_memory = remove(loaded, some(loaded.anatomy)).save(small.parent / "memory")
    told = json.loads((in_memory / "headcount.json").read_text())
    assert told["model"]["licence"] == {}


@torch.no_grad()
def test_a_smaller_model_is_saved_with_its_code_by_whoever_holds_it(full: Path, small: Path, tmp_path: Path) -> None:
    """Trained further in memory, or loaded by headcount: save_pretrained writes all that is needed."""
    loaded, ids = load(full), tokens()
    in_memory, again = remove(loaded, some(loaded.anatomy)).model, load(small)
    for name, one in (("memory", in_memory), ("again", again)):
        one.model.get_output_embeddings().weight.mul_(0.5)
        one.model.save_pretrained(tmp_path / name)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        torch.testing.assert_close(found(input_ids=ids).logits, one.model(input_ids=ids).logits)
        assert (tmp_path / name / "modeling_headcount.py").read_text() == (small / "modeling_headcount.py").read_text()


@pytest.mark.parametrize("format", ["transformers", "stock", "masked"])
def test_what_the_card_says_of_loading_runs_as_it_stands(
    format: Format, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a question that a person must answer."""
    loaded = load(full)
    mask = Mask.full(loaded.anatomy.heads_per_layer).without_heads([(i, h) for i in range(3) for h in (0, 1)])
    folder = remove(loaded, mask).save(tmp_path / "small", format=format)
    card = (folder / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0].replace("FOLDER", repr(str(folder)))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question"))
    found: dict[str, Any] = {}
    exec(snippet, found)  # noqa: S102
    assert found["tokenizer"]("a word")["input_ids"] == loaded.tokenizer("a word")["input_ids"]
    assert found["model"](input_ids=tokens()).logits.shape[-1] == tiny.VOCAB
    assert "Nothing says how the mask was chosen" in card
    assert "was not compared with the full model" in card


def test_a_choice_is_no_mask_and_says_what_is(study: Path, full: Path) -> None:
    chosen = hc.open_study(study).mask(heads=0.5)
    loaded = load(full)
    with pytest.raises(OptionError, match=r"study\.mask\(\.\.\.\)\.file, not by a Choice"):
        inspect.unwrap(hc.remove)(loaded, chosen)  # in tests, types are checked before it is called
    assert hc.remove(loaded, chosen.file).source["study"]
    with pytest.raises(OptionError, match="nothing goes: measured are"):
        hc.open_study(study).mask(heads=0.0)
    with pytest.raises(OptionError, match=r"not 50\.0 \(50 % is 0\.5\)"):
        hc.open_study(study).mask(parameters=50.0)


def test_one_model_has_one_identity_in_memory_and_in_its_folder(full: Path, small: Path) -> None:
    loaded = load(full)
    made = remove(loaded, some(loaded.anatomy)).model
    assert made.identity == load(small).identity != loaded.identity
    made.model.generation_config.max_length = 7
    assert loaded.model.generation_config.max_length != 7


def test_only_a_model_of_the_hub_is_named_as_base_model(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(full.parent.parent)
    loaded = load(f"{full.parent.name}/{full.name}")
    card = remove(loaded, some(loaded.anatomy)).save("by-path") / "README.md"
    assert "base_model" not in card.read_text()
    of_hub = dataclasses.replace(loaded, provenance={**loaded.provenance, "source": "org/a: b", "commit": "abc"})
    front = (remove(of_hub, some(loaded.anatomy)).save("by-hub") / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(front)["base_model"] == "org/a: b"


def test_whether_a_removed_model_fits_into_memory_is_found_without_its_code(
    full: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(small, tmp_path / "copied")
    (copied / "modeling_headcount.py").write_text("raise SystemExit('this ran')")
    mask = load(small).anatomy.heads_per_layer
    file = MaskFile(Mask.full(mask).without_heads([(0, 0)]), "model")
    file.write(tmp_path / "mask.json")
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    for folder in (full, copied):
        size = weights_size(find(str(folder), None), "auto")
        parameters = sum(p.numel() for p in load(folder).model.parameters())
        assert 4 * parameters <= size <= 4.2 * parameters + 20_000, "of the files, with their headers"
        half = weights_size(find(str(folder), None), torch.bfloat16)
        assert half == size // 2
        with monkeypatch.context() as patch:
            patch.setattr(Source, "folder", None)  # as of a hub id whose files are not here: by the config alone
            assert 4 * parameters <= weights_size(Source(str(folder)), "auto") <= size
        with monkeypatch.context() as patch:
            for free, fits in ((int(2.3 * size), True), (2 * size, False)):
                patch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
                assert fits_twice(str(folder), None, "auto") == fits
    assert tiny.run(["remove", str(copied), "--mask", str(tmp_path / "mask.json"), "--dry-run"]) == 0
    assert "custom code" not in capsys.readouterr().out


def test_what_is_gone_stands_in_no_tools_way(small: Path) -> None:
    """Tools that divide by weights' norms, or pack all projections, find no empty ones."""
    ids = tokens()
    model = AutoModelForCausalLM.from_pretrained(small, trust_remote_code=True).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        packed = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
        assert (packed(input_ids=ids).logits - expected).abs().max() < 0.5 * expected.std()
    assert not any(0 in p.shape for p in model.parameters())
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, use_dora=True))
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in adapted.parameters() if p.grad is not None)


def test_names_that_no_folder_can_have_are_one_line_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    for name, said in (("x" * 300, "no folder can have the name"), ("file/small", "is a file"),
                       ("file", "exists already"), ("link", "exists already")):
        with pytest.raises(OptionError, match=said) as error:
            check_place(tmp_path / name, 10)
        assert len(str(error.value)) < 300
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(OptionError, match="nothing may be written into"):
            check_place(tmp_path / "new", 10)
    longest = tmp_path / "deep" / ("y" * 255)
    loaded = tiny.loaded()
    assert load(remove(loaded, some(loaded.anatomy)).save(longest)).anatomy.num_heads == 7
    assert [path.name for path in longest.parent.iterdir()] == [longest.name]


def test_a_model_over_several_devices_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = wrap(tiny.model("llama"), tiny.tokenizer(), name="spread")
    spread = [SimpleNamespace(device=torch.device("cuda", i), is_meta=False) for i in (0, 1)]
    monkeypatch.setattr(loaded.model, "parameters", lambda: iter(spread))
    with pytest.raises(ModelError, match=r"spread lies on several devices \(cuda:0 and cuda:1\): load it on one"):
        remove(loaded, some(loaded.anatomy))


@pytest.fixture(scope="module")
def study(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    tiny.write_task(folder / "data", "piqa", train=12, validation=30)
    return hc.run_study(hc.StudySpec(
        model=str(full), tasks=("piqa",), data=folder / "data", shots=(0,), fractions=(0.5,), limit=8,
        importance_limit=12, random_orders=1, out=folder / "study"))


def test_an_edited_mask_is_confirmed_on_documents_that_its_study_did_not_read(
    full: Path, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny.run(["mask", str(study), "--heads", "0.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    told["removed_heads"] = told["removed_heads"][1:]
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(told))
    command = ["remove", str(full), "--mask", str(edited), "--study", str(study), "--out"]
    assert tiny.run([*command, str(tmp_path / "small")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "On 22 other documents of piqa" in said
    assert "was edited by hand" in said
    certificate = json.loads((tmp_path / "small" / "headcount.json").read_text())
    assert certificate["removed"]["heads"] == told["removed_heads"]
    assert "edited by hand" in certificate["chosen"]["sentence"]
    assert "measured" not in certificate["chosen"]
    assert certificate["confirmation"]["tasks"][0]["doc_ids"] == [*range(8, 30)]
    assert (study / "removed" / "small.json").is_file()

    def read_only(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("headcount.removal.certificate.kept_with_study", read_only)
    assert tiny.run([*command, str(tmp_path / "other"), "--skip-confirm"]) == 0
    assert "no copy of the certificate is kept in" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "other" / "headcount.json").is_file()


def test_options_for_loading_are_refused_where_nothing_is_loaded(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in (["--backend", "transformers"], ["--device", "cpu"]):
        assert tiny.run(["check", str(study), *option]) == 2
        assert "is no removed model" in capsys.readouterr().err
    assert tiny.run(["check", str(study)]) == 0


def test_a_folder_of_another_name_is_the_same_model(small: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(small, tmp_path / "moved")
    one: LoadedModel = load(small)
    assert load(moved).fingerprint == one.fingerprint
