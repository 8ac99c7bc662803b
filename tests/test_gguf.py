"""Dequantised models in the user's cache: what is read from there is what the GGUF file gives, or it is made anew."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import tiny
from headcount.errors import ModelError
from headcount.model import gguf
from headcount.model.fingerprint import fingerprint
from headcount.model.gguf import Facts, Kept
from headcount.model.load import load
from test_load import tokenizer


def entry(cache: Path) -> Path:
    """The one folder that is kept."""
    (folder,) = (cache / "headcount" / "gguf").glob("*/*")
    return folder


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_gguf_file_is_dequantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file in place of SmolLM2's, quantised as that one, with a tokenizer and a chat template of its kind."""
    package = pytest.importorskip("gguf")
    import gguf_files

    fields = {"general.file_type": package.LlamaFileType.MOSTLY_Q4_1.value, "tokenizer.ggml.pre": "smollm",
              "tokenizer.chat_template": "{{ messages[0]['content'] }}"}
    path = gguf_files.write(gguf_files.build("llama"), tmp_path / "small.gguf", "llama", fields=fields,
                            kind=package.GGMLQuantizationType.Q4_1)
    monkeypatch.setattr(gguf, "smollm2", lambda: path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    direct = load("smollm2", device="cpu")
    assert direct.notes[0] == "weights dequantised from Q4_1"
    folder = entry(tmp_path / "cache")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "read_once", lambda path: pytest.fail("the GGUF file was read"))
        for name in ("smollm2", str(path)):
            kept = load(name, device="cpu")
            assert same(kept.model, direct.model)
            assert (kept.fingerprint, kept.identity, kept.notes) == (direct.fingerprint, direct.identity, direct.notes)
            assert kept.provenance == {**direct.provenance, "name": name}
            assert kept.model.name_or_path == direct.model.name_or_path
        assert load(name, device="cpu", apply_chat_template=True).apply_chat_template
        ids = torch.arange(40)[None]
        with torch.no_grad():
            assert torch.equal(kept.model(ids).logits, direct.model(ids).logits)
    # Damage that transformers does not see: one weight.
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][5] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load("smollm2", device="cpu").fingerprint == direct.fingerprint
    assert Kept(folder).facts() == Facts.of(*direct.notes, fingerprint(direct.model), direct.tokenizer)
    assert torch.equal(load_file(folder / "model.safetensors")["model.norm.weight"], direct.model.model.norm.weight)


def kept(folder: Path) -> Kept:
    """A tiny model, kept as if it came from a GGUF file."""
    place = Kept(folder / "digest" / "float32-transformers-2-gguf-1")
    model, reader = tiny("llama"), tokenizer()
    place.keep(Facts.of("a note", "", fingerprint(model), reader), model, reader)
    return place


def test_what_is_kept_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, unfinished, fresh, bfloat16 = (tmp_path / "digest" / name for name in (
        "float32-transformers-1-gguf-1", ".unfinished", ".fresh", "bfloat16-transformers-1-gguf-1"))
    for folder in (other, unfinished, fresh, bfloat16):
        folder.mkdir(parents=True)
    os.utime(unfinished, (0, 0))
    place = kept(tmp_path)
    facts = place.facts()
    assert facts is not None
    assert facts.note == "a note"
    assert same(load(place.folder, device="cpu").model, tiny("llama"))
    assert sorted(p.name for p in place.folder.parent.iterdir()) == [".fresh", bfloat16.name, place.folder.name]
    (place.folder / "headcount.json").write_text("{")
    assert place.facts() is None
    assert kept(tmp_path).facts() == facts, "what is damaged is written again"
    shutil.rmtree(place.folder)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_reads_back", lambda *_: False)
        assert kept(tmp_path).facts() is None
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "free")
        patch.setattr(shutil, "disk_usage", lambda _: usage(100))
        assert kept(tmp_path).facts() is None
    with monkeypatch.context() as patch:
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(type(tokenizer()), "save_pretrained", full)
        assert kept(tmp_path).facts() is None
    assert sorted(p.name for p in place.folder.parent.iterdir()) == [".fresh", bfloat16.name]
    (tmp_path / "file").write_text("")
    assert kept(tmp_path / "file").facts() is None


def test_writing_a_model_leaves_it_as_it_was(tmp_path: Path) -> None:
    model, reader = tiny("llama"), tokenizer()
    before = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    place = Kept(tmp_path / "digest" / "float32")
    place.keep(Facts.of("", "", fingerprint(model), reader), model, reader)
    assert place.facts() is not None
    assert json.dumps(model.config.to_dict(), sort_keys=True, default=str) == before


def test_places_differ_by_content_dtype_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    a, b, c = (tmp_path / f"{name}.gguf" for name in "abc")
    a.write_bytes(b"GGUF one")
    b.write_bytes(b"GGUF one")
    c.write_bytes(b"GGUF two")
    for path in (a, b, c):
        os.utime(path, (0, 0))
    first = Kept.of(a, torch.float32)
    assert first == Kept.of(b, torch.float32)
    places = {first, Kept.of(c, torch.float32), Kept.of(a, torch.bfloat16)}
    real = gguf.importlib.metadata.version
    for name in ("gguf", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(gguf.importlib.metadata, "version", lambda n, name=name: "9" if n == name else real(n))
            places.add(Kept.of(a, torch.float32))
    assert len(places) == 5
    with pytest.raises(ModelError, match="no readable GGUF file"):
        Kept.of(tmp_path, torch.float32)
