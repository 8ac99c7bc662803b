"""What cannot be streamed is refused in one line that says what to do, with exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

import headcount as hc
import tiny
from headcount.errors import HeadcountError, ModelError, OptionError
from headcount.measure.control import randomised
from headcount.model import block_cache, random_weights
from headcount.model.block_cache import what_to_do
from headcount.model.blockfiles import BlockFiles
from headcount.model.placement import bytes_said, bytes_told
from headcount.study import prepare as prepare_module
from headcount.study.ledger import Ledger
from headcount.terminal import Bar

_ASKED = ["--tasks", "icl_plural", "--shots", "0", "--limit", "4"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as shards of safetensors and as shards of .bin files."""
    root, model = tmp_path_factory.mktemp("checkpoints"), tiny.model("llama")
    model.save_pretrained(root / "safetensors", max_shard_size="200KB")
    tiny.tokenizer().save_pretrained(root / "safetensors")
    shutil.copytree(root / "safetensors", root / "bin", ignore=shutil.ignore_patterns("model*"))
    held, names = model.state_dict(), sorted(model.state_dict())
    files = {f"pytorch_model-{i + 1:05d}-of-00003.bin": names[i::3] for i in range(3)}
    for file, inside in files.items():
        torch.save({name: held[name].clone() for name in inside}, root / "bin" / file)
    _write_index(root / "bin" / "pytorch_model.bin.index.json", {n: file for file, inside in files.items()
                                                                 for n in inside})
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "headcount"


def copied(checkpoints: Path, kind: str, folder: Path) -> Path:
    shutil.copytree(checkpoints / kind, folder / kind)
    return folder / kind


def refused(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """The one line that a command is refused with."""
    capsys.readouterr()
    assert tiny.run(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("headcount: ") for line in lines) == 1
    return lines[-1]


def _write_index(path: Path, shards: dict[str, str]) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def _index(folder: Path) -> Path:
    return next(folder.glob("*.index.json"))


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("*model-*"))[1]


def _cut(folder: Path, left: Callable[[int], int]) -> None:
    held = _shard(folder).read_bytes()
    _shard(folder).write_bytes(held[: left(len(held))])


def _names(folder: Path, name: str, shard: str | None) -> None:
    shards = json.loads(_index(folder).read_text())["weight_map"]
    _write_index(_index(folder), {**shards, name: shard or next(iter(shards.values()))})


def _config(folder: Path, **options: Any) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **options}))


_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda f: _shard(f).unlink(), "is missing, which its index names: download or copy it"),
    "a byte is missing": (lambda f: _cut(f, lambda n: n - 1), "is damaged or not whole .*: download or copy it again"),
    "half is missing": (lambda f: _cut(f, lambda n: n // 2), "is damaged or not whole .*: download or copy it again"),
    "all is missing": (lambda f: _cut(f, lambda n: 0), "is damaged or not whole .*: download or copy it again"),
    "a pointer of Git LFS": (lambda f: _shard(f).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
                             "Git LFS's pointer in the place of a file: run `git lfs pull` there"),
    "a folder in its place": (lambda f: (_shard(f).rename(f / "away"), (f / _index(f)).exists(),
                                         (f / sorted({*json.loads(_index(f).read_text())["weight_map"].values()})[1]
                                          ).mkdir()), "is missing, which its index names"),
    "an absent tensor": (lambda f: _names(f, "model.layers.9.mlp.up_proj.weight", None),
                         "lacks 1 tensor that its .*index.json names .the first is model.layers.9.*: download"),
    "an absent file": (lambda f: _names(f, "model.layers.9.mlp.up_proj.weight", "other.bin"),
                       "other.bin is missing, which its index names"),
    "an index that is no JSON": (lambda f: _index(f).write_text("{nonsense"), "index.json is damaged .*no index of"),
    "an index of nothing": (lambda f: _write_index(_index(f), {}), "index.json is damaged .*names no tensors"),
    "another config": (lambda f: _config(f, num_hidden_layers=4), "lacks 9 of the model's weights"),
    "a quantised config": (lambda f: _config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
                           "is quantised, and only plain weights can be read block by block: load it whole, without "
                           "--stream"),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_its_file(
    damage: str, kind: str, checkpoints: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (do, said) = copied(checkpoints, kind, tmp_path), _DAMAGE[damage]
    do(folder)
    line = refused(capsys, ["evaluate", str(folder), *_ASKED, "--stream", "--out", str(tmp_path / "out")])
    assert re.search(said, line), line
    assert str(folder) in line
    assert not (tmp_path / "out").exists()
    assert not [*cache.glob("blocks/*/*.safetensors")]


@pytest.mark.parametrize("command", ["evaluate", "plan"])
def test_what_contradicts_streaming_is_refused_also_by_a_plan(
    command: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(checkpoints, "safetensors", tmp_path)
    asked = [command, str(folder), *_ASKED, "--stream"]
    line = refused(capsys, [*asked, "--device-map", "auto"])
    assert "--device-map auto puts them elsewhere: give one of them" in line
    assert "is no number of bytes: write 8GB or 500MB" in refused(capsys, [*asked, "--stream-memory", "much"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(
        folder)}))
    (adapter / "adapter_model.safetensors").touch()
    line = refused(capsys, [command, str(adapter), *_ASKED, "--stream"])
    assert "is merged in memory, and --stream leaves weights in their files: leave it out, or merge" in line
    _config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantised" in refused(capsys, asked)


def test_memory_too_small_for_one_batch_is_told_with_what_it_takes(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(checkpoints, "safetensors", tmp_path)
    asked = ["evaluate", str(folder), *_ASKED, "--stream", "--stream-memory"]
    line = refused(capsys, [*asked, "1KB"])
    assert "--stream-memory is 1KB: give more, or smaller batches (--batch-tokens)" in line
    least = line.partition("takes at least ")[2].partition(" while it waits")[0]
    line = refused(capsys, [*asked, least])
    needed = line.partition("takes ")[2].partition(" while it waits")[0]
    assert bytes_said(least) < bytes_said(needed)  # type: ignore[operator]
    assert tiny.run([*asked, needed]) == 0


@pytest.mark.parametrize(("size", "told"), [(1000, "1KB"), (1001, "1.1KB"), (27_648, "27.7KB"),
                                            (8 * 10**9, "8GB"), (10**9 - 1, "1000MB"), (2_500_000_000_000, "2.5TB")])
def test_an_amount_of_memory_is_told_as_it_is_read(size: int, told: str) -> None:
    assert bytes_told(size) == told
    read = bytes_said(told)
    assert read is not None
    assert size <= read <= 1.1 * size


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 * 2**30), ("1.5 MiB", 3 * 2**19), ("500k", 500_000),
                                            ("2Ki", 2048), ("4096", 4096)])
def test_an_amount_of_memory_may_be_said_in_powers_of_1024(text: str, size: int) -> None:
    assert bytes_said(text) == size


@pytest.mark.parametrize("text", ["8iB", "8", "B", "8EB", "-1GB", "1 G iB", "0GB", ""])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="is no number of bytes: write 8GB or 500MB"):
        bytes_said(text)


def test_a_disk_that_is_full_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, told in ((None, "No space left on device, where --out or a cache is: make space there and run"),
                       ("/full/x", "No space left on device: /full/x: make space there and run the same command")):
        def full(*_: object, path: str | None = path, **__: object) -> None:
            raise OSError(28, "No space left on device", path)

        monkeypatch.setattr(prepare_module, "prepare", full)
        assert told in refused(capsys, ["study", "m", "--tasks", "piqa", "--out", "s"])


def test_a_model_in_memory_cannot_be_left_in_its_files(checkpoints: Path, tmp_path: Path) -> None:
    loaded = hc.load(checkpoints / "safetensors", device="cpu")
    spec = hc.StudySpec(model=loaded.name, tasks=("icl_plural",), shots=(0,), stream=True, out=tmp_path / "out")
    with pytest.raises(OptionError, match="are in memory, and stream leaves weights in their files: load it with"):
        hc.run_study(spec, loaded=loaded)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("absent", ["nothing there", "kept out"])
def test_ray_that_is_not_there_is_told(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    if absent == "kept out":
        monkeypatch.setitem(sys.modules, "ray", None)
    else:
        monkeypatch.setattr("headcount.study.cluster.find_spec", lambda name: None)
    line = refused(capsys, ["evaluate", "any", *_ASKED, "--executor", "ray"])
    assert "--executor ray needs Ray, which is not installed: pip install 'headcount[ray]'" in line


def test_a_disk_with_too_little_space_is_told_before_anything_is_written(
    checkpoints: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, space = copied(checkpoints, "bin", tmp_path), SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(block_cache.shutil, "disk_usage", lambda path: space)
        line = refused(capsys, ["evaluate", str(folder), *_ASKED, "--stream"])
    assert f"takes 620,472 bytes, and {cache / 'blocks'} has 1,000 bytes left: make space there, or set XDG_" in line
    assert not [*cache.glob("blocks/*/*.safetensors")]
    asked = ["induction", str(checkpoints / "safetensors"), "--stream", "--lengths", "5", "--seeds", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(random_weights.shutil, "disk_usage", lambda path: space)
        line = refused(capsys, asked)
    assert f"takes 1,665,920 bytes in {cache / 'control'} while it is measured, where 1,000 are left" in line
    assert "leave the control out (--skip-control)" in line
    assert tiny.run(asked) == 0
    assert "will take 1,665,920 bytes in" in capsys.readouterr().err
    assert not [*(cache / "control").iterdir()]


def test_a_control_that_is_measured_needs_no_space(
    checkpoints: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = hc.StudySpec(model=str(checkpoints / "safetensors"), tasks=(), measure=("induction",), stream=True,
                        induction_lengths=(5,), induction_seeds=2, out=tmp_path / "out")
    hc.run_study(spec)
    monkeypatch.setattr(random_weights.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    hc.run_study(spec)


def test_a_cache_that_cannot_be_written_is_told(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    line = refused(capsys, ["evaluate", str(copied(checkpoints, "bin", tmp_path)), *_ASKED, "--stream"])
    assert "(Not a directory): set XDG_CACHE_HOME to a folder that can be written to" in line
    line = refused(capsys, ["induction", str(checkpoints / "safetensors"), "--stream", "--lengths", "5"])
    assert "(Not a directory): set XDG_CACHE_HOME to a folder that can be written to, or leave the control out" in line
    assert what_to_do(OSError(28, "No space left on device")).startswith("the disk is full): make space there, or set")


def test_a_disk_that_fills_up_while_the_control_is_drawn_leaves_nothing(
    checkpoints: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, write, written = hc.load(checkpoints / "safetensors", stream=True), random_weights._Slot.write, list[int]()

    def full(self: random_weights._Slot) -> None:
        write(self)
        written.append(self.nbytes)
        if len(written) == 10:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(random_weights._Slot, "write", full)
    with pytest.raises(ModelError, match=r"\(the disk is full\): make space there.*leave the control out"):
        randomised(loaded)
    assert not [*(cache / "control").iterdir()]


# What happens to a file while it is read, and what the line says.
_MEANWHILE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "deleted": ("safetensors", lambda path: path.unlink()),
    "truncated": ("safetensors", lambda path: path.write_bytes(path.read_bytes()[:5000])),
    "other numbers": ("safetensors", lambda path: path.write_bytes(path.read_bytes()[:-400] + bytes(400))),
    "deleted from the cache": ("bin", lambda path: path.unlink()),
    "truncated in the cache": ("bin", lambda path: path.write_bytes(path.read_bytes()[:100]))}


def _spec(folder: Path, out: Path) -> hc.StudySpec:
    return hc.StudySpec(model=str(folder), tasks=("icl_plural",), shots=(0,), limit=4, importance_limit=4,
                        fractions=(0.5,), random_orders=1, random_fractions=(0.5,), batch_tokens=500, row_tokens=200,
                        stream=True, out=out)


@pytest.fixture(scope="module")
def unbroken(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The curves of a study that nothing happened to."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    return hc.open_study(hc.run_study(_spec(checkpoints / "safetensors", out))).curves()


@pytest.mark.parametrize("what", _MEANWHILE)
def test_a_file_that_goes_while_a_study_runs_ends_it_and_what_is_measured_stays(
    what: str, checkpoints: Path, unbroken: pd.DataFrame, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, do = _MEANWHILE[what]
    folder = copied(checkpoints, kind, tmp_path)
    spec = _spec(folder, tmp_path / "out")
    ledger, read = Ledger(tmp_path / "out"), BlockFiles.read_named

    def damaging(self: BlockFiles, names: Any, memory: Any = None) -> Any:
        if not done and [*ledger.keys("importance")]:
            path = next(cache.glob("blocks/*/block-00001.safetensors")) if kind == "bin" else _shard(folder)
            do(path)
            done.append(path)
        return read(self, names, memory)

    done: list[Path] = []
    monkeypatch.setattr(BlockFiles, "read_named", damaging)
    with pytest.raises(HeadcountError, match=r"is gone or has changed while .* give the same command again") as told:
        hc.run_study(spec)
    assert str(done[0]) in str(told.value)
    assert ("put it back as it was" in str(told.value)) == (kind == "safetensors")
    kept = [*ledger.keys("importance")]
    assert kept
    if kind == "safetensors":
        shutil.copy2(checkpoints / kind / done[0].name, done[0])
    found = hc.open_study(hc.run_study(spec))
    assert [key for key in kept if key in [*ledger.keys("importance")]] == kept
    pd.testing.assert_frame_equal(found.curves(), unbroken, check_exact=True)


def test_a_rewrite_is_told_to_who_wants_to_know(
    checkpoints: Path, tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, said = copied(checkpoints, "bin", tmp_path), list[tuple[str, int, int]]()
    hc.load(folder, stream=True, progress=lambda *told: said.append(told))
    assert {text for text, _, _ in said} == {
        f"rewriting {folder} to be read block by block: 620,472 bytes, once, into {cache / 'blocks'}"}
    assert [done for _, done, _ in said] == sorted({done for _, done, _ in said})
    assert [said[0][1], said[-1][1], said[-1][2]] == [0, 620_472, 620_472]
    again: list[object] = []
    hc.load(folder, stream=True, progress=lambda *told: again.append(told))
    assert not again
    os.utime(_shard(folder), (1, 1))
    hc.load(folder, stream=True)
    assert capfd.readouterr() == ("", "")


def test_long_stages_are_told_in_a_log_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("headcount.terminal.time.monotonic", lambda: now[0])
    console = Console(width=200, record=True, force_terminal=False, file=open(os.devnull, "w"))  # noqa: SIM115
    bar = Bar(Progress(console=console, disable=True))
    for done in range(0, 100, 10):
        now[0] = done
        bar.stage("rewriting a model: 100 bytes", done, 100)
    assert console.export_text().splitlines() == [f" {done}%  rewriting a model: 100 bytes" for done in (30, 60, 90)]
