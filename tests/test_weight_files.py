"""A model has the very numbers of the files that transformers reads, and other files beside them are told."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from every_class import build
from headcount.errors import ModelError
from headcount.model.checkpoint import check
from headcount.model.load import load
from headcount.model.weight_files import files_read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.saved(tmp_path / "m")


def own_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Give a model's folder a class of its own, a llama but for `body`."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["Own"],
               "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\nimport torch\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        f"class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n{body}")


@pytest.mark.parametrize("row", [0, 1280, -1])
def test_a_class_that_changes_its_weights_after_loading_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    monkeypatch.setattr("headcount.model.checkpoint._WHOLE", 100)
    own_code(folder, tmp_path, monkeypatch,
             "    @classmethod\n    def from_pretrained(cls, *args, **keywords):\n"
             "        got = super().from_pretrained(*args, **keywords)\n"
             f"        got[0].lm_head.weight.data[{row}] += 1\n        return got\n")
    with pytest.raises(ModelError, match=r"other numbers in lm_head\.weight"):
        load(folder, device="cpu", trust_remote_code=True)


def test_padding_that_a_class_sets_to_zero_is_told(tmp_path: Path) -> None:
    model = build("youtu")
    model.config.pad_token_id = 5
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu")
    assert model.get_input_embeddings().weight[5].any()
    assert not loaded.model.get_input_embeddings().weight[5].any()
    assert [note for note in loaded.notes if "the embedding of token 5, padding, to zero" in note]


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards", "old bin", "bfloat16"])
def test_the_same_numbers_in_any_form_have_no_note(folder: Path, kind: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    if "bin" in kind:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    elif kind == "shards":
        (folder / "model.safetensors").unlink()
        tiny.model("llama").save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = load(folder, device="cpu", dtype="bfloat16" if kind == "bfloat16" else "auto")
    assert loaded.notes == ()


def test_a_config_that_names_the_class_of_another_type_is_told(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GraniteForCausalLM"]}))
    (note,) = load(folder, device="cpu").notes
    assert note.startswith("the config names the class GraniteForCausalLM, and its type, llama, is that of Llama")


def test_a_damaged_file_that_is_not_read_does_no_harm(folder: Path) -> None:
    (folder / "model_int8.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    assert load(folder, device="cpu").notes == ()


def test_a_second_checkpoint_of_other_weights_is_told(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    assert load(folder, device="cpu").notes == ()
    torch.save(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, folder / "pytorch_model.bin")
    (note,) = load(folder, device="cpu").notes
    assert "model.safetensors was read" in note
    assert "pytorch_model.bin was not" in note


@pytest.mark.parametrize(("expert", "row"), [(0, 0), (-1, 3)])
def test_stacked_experts_are_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expert: int, row: int
) -> None:
    monkeypatch.setattr("headcount.model.checkpoint._WHOLE", 100)
    model = build("llama4_text")
    model.save_pretrained(tmp_path)
    told: dict[str, list[str]] = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}
    assert check("m", model, told, tmp_path) == ()
    (name, weight), *_ = [(name, one) for name, one in model.named_parameters() if one.dim() == 3]
    weight.data[expert, row] += 1
    with pytest.raises(ModelError, match=rf"other numbers in {name.replace('.', '[.]')}"):
        check("m", model, told, tmp_path)


def test_files_that_are_not_whole_are_told_as_that(folder: Path) -> None:
    single = folder / "model.safetensors"
    data = single.read_bytes()
    single.write_bytes(data[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or not whole .*download or copy it again"):
        load(folder, device="cpu")
    single.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match=r"Git LFS's pointers .*\(model\.safetensors\): run `git lfs pull`"):
        load(folder, device="cpu")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("harm", ["missing", "cut", "index", "named"])
def test_what_is_wrong_with_a_checkpoint_is_told_by_its_file(folder: Path, kind: str, harm: str) -> None:
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, stem = sorted(held), "model" if kind == "safetensors" else "pytorch_model"
    files = [folder / f"{stem}-{i + 1:05d}-of-00002.{kind}" for i in range(2)]
    for i, file in enumerate(files):
        part = {name: held[name] for name in names[i::2]}
        if harm == "named" and i:
            del part[names[1]]
        if kind == "bin":
            torch.save(part, file)
        else:
            save_file(part, file, metadata={"format": "pt"})
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {name: files[i % 2].name
                                                                for i, name in enumerate(names)}}))
    if harm == "missing":
        files[1].unlink()
    elif harm == "cut":
        files[1].write_bytes(files[1].read_bytes()[:-1000])
    elif harm == "index":
        index.write_text("{")
    words = {"missing": f"{files[1].name} is missing", "cut": f"{files[1].name} is damaged or not whole",
             "index": f"{index.name} is damaged or not whole",
             "named": f"lacks 1 tensor that its {index.name} names .the first is {names[1]}, in {files[1].name}"}
    with pytest.raises(ModelError, match=words[harm]) as told:
        load(folder, device="cpu")
    assert "\n" not in str(told.value)


def test_one_tensor_in_two_shards_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    norm = "model.norm.weight"
    save_file({norm: tensors[norm] * 3}, folder / "b.safetensors", metadata={"format": "pt"})
    named = dict.fromkeys(tensors, "a.safetensors") | {norm: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))
    with pytest.raises(ModelError, match=r"holds model\.norm\.weight twice, in a\.safetensors and b\.safetensors"):
        load(folder, device="cpu")


def test_the_files_are_those_that_transformers_reads(folder: Path) -> None:
    single = folder / "model.safetensors"
    shutil.copy(single, folder / "consolidated.safetensors")
    assert files_read(folder, None) == [single]
    assert files_read(folder, "consolidated.safetensors") == [folder / "consolidated.safetensors"]
    single.rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "part.safetensors"}}))
    assert files_read(folder, None) == [folder / "part.safetensors"]
