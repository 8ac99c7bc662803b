"""What is read block by block is, bit for bit, what `from_pretrained` reads, and costs no more memory than a block."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import shutil
import signal
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import families
from headcount.errors import ModelError
from headcount.model import block_cache
from headcount.model.blockfiles import BlockFiles, Checkpoint, block_files
from headcount.model.source import Source
from headcount.model.weight_files import held_by


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "headcount" / "blocks"


def saved(folder: Path, family: str, form: str = "bin", rename: Callable[[str], str] = str) -> Path:
    """A tiny model's folder: its weights in one file or several, of one kind or the other, under other names."""
    families.tiny(family).save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write(folder, {rename(name): value for name, value in held.items()}, form)
    return folder


def write(folder: Path, held: dict[str, Tensor], form: str) -> None:
    """`bin`, `old bin`, `safetensors`, or several of them."""
    kind = "safetensors" if "safetensors" in form else "bin"
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = sorted(held, key=lambda name: zlib.crc32(name.encode()) if "shards" in form else 0)
    number = 3 if "shards" in form else 1
    files = {f"{stem}-{i + 1:05d}-of-{number:05d}.{kind}" if number > 1 else f"{stem}.{kind}": names[i::number]
             for i in range(number)}
    for file, inside in files.items():
        part = {name: held[name] for name in inside}
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization="old" not in form)
    if number > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, inside in files.items() for name in inside}}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


def empty(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    return model


def opened(folder: Path, dtype: torch.dtype = torch.float32, model: PreTrainedModel | None = None,
           progress: Callable[[str, int, int], object] | None = None) -> BlockFiles:
    found = Checkpoint.open(folder, None, progress=progress)
    return block_files(found, model or empty(folder, dtype), dtype, progress=progress)


def rest(files: BlockFiles) -> list[str]:
    """The tensors that are of no block."""
    return [name for name in files.names("") if not name.startswith(files.blocks)]


def read(files: BlockFiles) -> dict[str, Tensor]:
    found = files.read_named(rest(files))
    for block in files.blocks:
        part = files.read(block)
        assert part
        found |= part
    return found


def check_equal(files: BlockFiles, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Every tensor of `from_pretrained`'s, and no other, with its type and every bit."""
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    found = read(files)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    pairs = [(one, other) for one in expected for other in expected]
    assert [found[a] is found[b] for a, b in pairs] == [expected[a].data_ptr() == expected[b].data_ptr()
                                                        for a, b in pairs]


@pytest.mark.parametrize("form", ["bin", "bin shards", "safetensors", "safetensors shards"])
@pytest.mark.parametrize("family", ["opt", "opt-350m", "gpt2", "gpt_neox", "mixtral", "phi3", "gemma4-e",
                                    "deepseek_v3"])
def test_blocks_are_what_from_pretrained_reads(tmp_path: Path, family: str, form: str) -> None:
    dtype = torch.bfloat16 if "shards" in form else torch.float32
    folder = saved(tmp_path / "m", family, form)
    check_equal(opened(folder, dtype), folder, dtype)


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder."])
@pytest.mark.parametrize("with_output", [True, False])
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_prefixes_of_any_size_of_opt_are_known(tmp_path: Path, prefix: str, with_output: bool, form: str) -> None:
    folder = saved(tmp_path / "m", "opt", form, lambda name: name.replace("model.decoder.", prefix))
    if with_output:
        file = next(folder.glob("*model.*"))
        held = load_file(file) if form == "safetensors" else torch.load(file)
        held["lm_head.weight"] = held[f"{prefix}embed_tokens.weight"]
        write(folder, {name: value.clone() if form == "safetensors" else value for name, value in held.items()}, form)
    check_equal(opened(folder), folder)


def test_outputs_that_only_the_config_ties_stay_apart(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "opt", "safetensors")
    held = load_file(folder / "model.safetensors")
    write(folder, held | {"lm_head.weight": held["model.decoder.embed_tokens.weight"] * 2}, "safetensors")
    files = opened(folder)
    assert not files.tied
    check_equal(files, folder)


def test_tensors_that_are_views_are_read_as_they_are(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    held = torch.load(folder / "pytorch_model.bin")
    name = "model.layers.1.mlp.up_proj.weight"
    held[name] = held[name].T.contiguous().T
    held["model.norm.weight"] = torch.stack([held["model.norm.weight"]] * 3, dim=1)[:, 1]
    torch.save(held, folder / "pytorch_model.bin")
    check_equal(opened(folder), folder)


def test_bin_files_of_before_torch_1_6_are_read_whole_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "m", "mixtral", "old bin shards")
    check_equal(opened(folder), folder)
    model = empty(folder)
    monkeypatch.setattr(torch, "load", None)
    assert read(opened(folder, model=model)).keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_safetensors_checkpoint_is_read_where_it_lies(tmp_path: Path, cache: Path, dtype: torch.dtype) -> None:
    folder = saved(tmp_path / "m", "opt", "safetensors shards", lambda name: name.removeprefix("model."))
    files = opened(folder, dtype)
    assert {place.path.parent for place in files.places.values()} == {folder}
    assert files.folder is None
    assert not cache.exists()
    check_equal(files, folder, dtype)


def test_there_is_one_file_for_each_block_and_one_for_the_rest(tmp_path: Path) -> None:
    files = opened(saved(tmp_path / "m", "gemma4-e"))
    assert files.folder is not None
    assert sorted(path.name for path in files.folder.glob("*.safetensors")) == [
        "block-00000.safetensors", "block-00001.safetensors", "rest.safetensors"]
    for i, block in enumerate(files.blocks):
        read = files.read(block)
        assert load_file(files.folder / f"block-{i:05d}.safetensors").keys() == read.keys()
        assert any(value.nbytes == 4 for value in read.values())
        assert not any(value.storage_offset() * value.itemsize % 64 for value in read.values())
    others = rest(files)
    assert files.read_named(others)["lm_head.weight"].untyped_storage().nbytes() == files.bytes_of(others)


def test_a_file_takes_no_more_bytes_than_the_checkpoint_and_serves_both_types(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    held = torch.load(folder / "pytorch_model.bin")
    torch.save({name: value.half() for name, value in held.items()}, folder / "pytorch_model.bin")
    as_float, as_half = opened(folder, torch.float32), opened(folder, torch.float16)
    assert as_float.folder == as_half.folder
    check_equal(as_float, folder, torch.float32)
    check_equal(as_half, folder, torch.float16)
    assert opened(folder, torch.bfloat16).folder != as_half.folder


def test_a_block_can_be_read_into_the_memory_of_another(tmp_path: Path) -> None:
    files = opened(saved(tmp_path / "m", "llama", "safetensors"), torch.bfloat16)
    first, second = files.blocks
    memory = torch.empty(files.bytes_of(files.names(first)) + 10, dtype=torch.uint8)
    files.read(first, memory)
    found = files.read(second, memory)
    assert all(torch.equal(value, files.read(second)[name]) for name, value in found.items())
    assert {value.untyped_storage().data_ptr() for value in found.values()} == {memory.data_ptr()}


@pytest.mark.parametrize("at", [1, 14, 33])
def test_a_rewrite_that_was_killed_goes_on(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    folder = saved(tmp_path / "m", "opt")
    model, real = empty(folder), block_cache.write_values
    calls = 0

    def dies(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)  # type: ignore[arg-type]

    child = os.fork()
    if not child:
        monkeypatch.setattr(block_cache, "write_values", dies)
        try:
            opened(folder, model=model)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    whole = {path: path.stat().st_mtime_ns for path in cache.glob("*/[br]*.safetensors")}
    assert len(whole) == (at - 1) // 16
    told: list[tuple[str, int, int]] = []
    files = opened(folder, model=model, progress=lambda *said: told.append(said))
    assert len(told) == 1 + 3 - len(whole)
    (text, of), = {(text, of) for text, _, of in told}
    assert text == f"rewriting {folder} to be read block by block: {of:,} bytes, once, into {cache}"
    assert [done for _, done, _ in told][:: len(told) - 1] == [0, of]
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    assert files.folder is not None
    assert not [path for path in files.folder.iterdir() if path.name.startswith(".")]
    check_equal(files, folder)


def test_a_file_of_the_cache_that_is_damaged_is_written_again(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    written = opened(folder).folder
    assert written is not None
    (written / "rest.safetensors").write_bytes((written / "rest.safetensors").read_bytes()[:-1])
    (written / "block-00000.safetensors").unlink()
    check_equal(opened(folder), folder)


def test_a_checkpoint_that_changed_is_written_anew_and_the_old_one_goes_later(tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    first = opened(folder)
    again = opened(folder)
    assert first.folder == again.folder is not None
    held = torch.load(folder / "pytorch_model.bin")
    for unused in (False, True):
        torch.save({name: value * 2 for name, value in held.items()}, folder / "pytorch_model.bin")
        if unused:
            for about in cache.glob("*/about.json"):
                os.utime(about, (1, 1))
        check_equal(opened(folder), folder)
        assert first.folder.exists() != unused
    assert len([*cache.glob("*/about.json")]) == 1


def test_memory_is_that_of_one_block(tmp_path: Path) -> None:
    """100 MB in one file are rewritten and read block by block within 60 MB, under a limit that does enforce."""
    config = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=6,
                         num_attention_heads=8, max_position_embeddings=64)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.float32
    config.save_pretrained(tmp_path)
    torch.save(LlamaForCausalLM(config).state_dict(), tmp_path / "pytorch_model.bin")
    size = (tmp_path / "pytorch_model.bin").stat().st_size
    assert size > 100e6
    model = empty(tmp_path)
    gc.collect()
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + 60_000_000, before[1]))
    try:
        with pytest.raises(RuntimeError, match="memory"):
            torch.empty(size, dtype=torch.uint8)
        with pytest.raises(RuntimeError):  # a map counts, too
            torch.load(tmp_path / "pytorch_model.bin", mmap=True)
        files = opened(tmp_path, model=model)
        memory = torch.empty(files.bytes_of(files.names(files.blocks[0])), dtype=torch.uint8)
        found = {name: zlib.crc32(one.numpy().data) for block in files.blocks
                 for name, one in files.read(block, memory).items()}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    held = torch.load(tmp_path / "pytorch_model.bin")
    assert found == {name: zlib.crc32(one.numpy().data) for name, one in held.items() if ".layers." in name}


@pytest.mark.parametrize("form", ["bin", "bin shards", "safetensors shards"])
def test_what_is_on_the_hub_alone_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    there, here = saved(tmp_path / "there", "llama", form), tmp_path / "snapshots" / "0123"
    here.mkdir(parents=True)
    asked: list[str] = []

    def cached_file(place: str, name: str, **options: object) -> str | None:
        assert (place, options["revision"]) == ("org/model", "v1")
        asked.append(name)
        if not (there / name).exists():
            return None
        shutil.copy(there / name, here)
        return str(here / name)

    monkeypatch.setattr("headcount.model.source.cached_file", cached_file)
    assert Source("org/model", None, {"revision": "v1"}).fetched(None) == here
    assert {path.name for path in here.iterdir()} == {path.name for path in there.glob("*model*")}
    assert len(asked) == len({*asked})
    assert Source(str(there)).fetched(None) == there


def refused(folder: Path, words: str) -> None:
    """In one line, before anything is written that is not whole."""
    with pytest.raises(ModelError, match=words) as told:
        opened(folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("form", ["bin shards", "safetensors shards"])
def test_a_shard_that_is_missing_is_named(tmp_path: Path, form: str) -> None:
    folder = saved(tmp_path / "m", "llama", form)
    shard = next(folder.glob("*-00002-of-00003.*"))
    shard.unlink()
    refused(folder, f"{shard.name} is missing, which its index names: download or copy it there")


@pytest.mark.parametrize("form", ["bin shards", "safetensors shards", "old bin"])
@pytest.mark.parametrize("left", [0, 5, 0.5, 0.99])
def test_a_shard_that_is_not_whole_is_named(tmp_path: Path, form: str, left: float) -> None:
    folder = saved(tmp_path / "m", "llama", form)
    shard = max(folder.glob("*model*"), key=lambda path: path.stat().st_size)
    data = shard.read_bytes()
    shard.write_bytes(data[: int(left if left >= 1 else left * len(data))])
    refused(folder, rf"{shard.name} is damaged(,| or not whole \(.*\):) .*download or copy it again")


def test_a_file_that_changed_while_it_was_used_is_named(tmp_path: Path) -> None:
    files = opened(saved(tmp_path / "m", "llama", "safetensors"))
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.safetensors is gone or has changed .*: put it back as it was, and"):
        read(files)
    path.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is gone or has changed .*: put it back as it was, and"):
        read(files)


@pytest.mark.parametrize(("do", "said"), [
    (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is damaged or not whole"),
    (lambda path: path.unlink(), "cannot be read"),
    (lambda path: os.utime(path, (1, 1)), "is gone or has changed")])
def test_a_file_that_changes_within_a_reading_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, do: Callable[[Path], object], said: str
) -> None:
    files, path = opened(saved(tmp_path / "m", "llama", "safetensors")), tmp_path / "m" / "model.safetensors"
    checked = BlockFiles._check_files

    def changes(self: BlockFiles, names: Sequence[str]) -> None:
        checked(self, names)
        if not done:
            done.append(do(path))

    done: list[object] = []
    monkeypatch.setattr(BlockFiles, "_check_files", changes)
    with pytest.raises(ModelError, match=rf"model\.safetensors {said}"):
        read(files)


def test_numbers_that_begin_anywhere_in_a_file_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama", "safetensors")
    path = folder / "model.safetensors"
    expected, data = load(path.read_bytes()), path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   " + data[8 + length :])
    found = read(opened(folder))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("place", ["directory", "offset"])
def test_an_archive_that_is_damaged_inside_is_named(tmp_path: Path, place: str) -> None:
    folder = saved(tmp_path / "m", "llama", "bin")
    path = folder / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    if place == "directory":  # the number of disks that it spans
        at = data.rindex(b"PK\x06\x07") + 16
        data[at : at + 4] = (7).to_bytes(4, "little")
    else:  # how much stands before the first tensor's numbers
        with zipfile.ZipFile(path) as archive:
            first = next(part for part in archive.infolist() if "/data/" in part.filename)
        at = first.header_offset + 28
        data[at : at + 2] = (int.from_bytes(data[at : at + 2], "little") + 1).to_bytes(2, "little")
    path.write_bytes(data)
    refused(folder, r"pytorch_model\.bin is damaged")


@pytest.mark.parametrize("form", ["bin shards", "safetensors shards"])
@pytest.mark.parametrize("absent", ["model.norm.weight", "model.layers.7.mlp.up_proj.weight"])
def test_an_index_of_tensors_that_are_not_there_is_refused(tmp_path: Path, form: str, absent: str) -> None:
    folder = saved(tmp_path / "m", "llama", form)
    index = next(folder.glob("*.index.json"))
    told = json.loads(index.read_text())
    shards = told["weight_map"]
    shard = shards.setdefault(absent, next(iter(shards.values())))
    index.write_text(json.dumps(told))
    inside = load_file(folder / shard) if "safe" in form else torch.load(folder / shard)
    inside.pop(absent, None)
    if "safe" in form:
        save_file(inside, folder / shard, metadata={"format": "pt"})
    else:
        torch.save(inside, folder / shard)
    refused(folder, rf"lacks 1 tensor that its {index.name} names \(the first is {absent}, in {shard}\): download")


def test_objects_in_a_bin_file_are_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Printed:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("ran",)

    folder = saved(tmp_path / "m", "llama")
    for old in (False, True):
        torch.save({"x": Printed()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        refused(folder, r"pytorch_model\.bin is damaged, or holds other objects than tensors, which are not unpickled")
    assert "ran" not in capsys.readouterr().out


def test_a_pointer_of_git_lfs_is_told_as_that(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(folder, r"pytorch_model\.bin is Git LFS's pointer in the place of a file: run `git lfs pull`")


def test_an_index_may_name_a_weight_that_is_tied_to_another(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "opt", "safetensors shards")
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(told))
    check_equal(opened(folder), folder)


def test_an_index_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama", "bin shards")
    for text in ("", "{}", '{"weight_map": []}'):
        (folder / "pytorch_model.bin.index.json").write_text(text)
        refused(folder, r"pytorch_model\.bin\.index\.json is damaged or not whole \(it is no index of shards\)")


@pytest.mark.parametrize("form", ["bin", "old bin"])
def test_too_little_disk_is_said_before_in_bytes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    folder = saved(tmp_path / "m", "llama", form)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5000})())
    refused(folder, r"has to be written into the cache once, .* takes \d[\d,]+ bytes, and .* has 5,000 bytes left: ")
    assert not [*cache.glob("*/*.safetensors")]


def test_a_disk_that_fills_up_keeps_what_is_whole(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "m", "opt")
    real, calls = block_cache.write_values, 0

    def full(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise OSError(28, "No space left on device")
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(block_cache, "write_values", full)
    refused(folder, r"could not be written into the cache .* \(the disk is full\): make space there")
    assert [path.name for path in cache.glob("*/[br]*.safetensors")] == ["block-00000.safetensors"]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check_equal(opened(folder), folder)


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path / "m", "opt")

    def changes(_: str, done: int, of: int) -> None:
        if done:
            os.utime(folder / "pytorch_model.bin", (1, 1))

    with pytest.raises(ModelError, match="have changed while they were read: give the same command again"):
        opened(folder, progress=changes)
    assert [path.name for path in cache.glob("*/*.safetensors")] == ["block-00000.safetensors"]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "holds no weights")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parts_of_a_tensor_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("headcount.model.weight_files._CHUNK", 64)
    value = torch.randn(7, 5, 3)
    save_file({"x": value, "none": torch.empty(0, 3)}, tmp_path / "x.safetensors")
    held = {one.name: one for one in held_by(tmp_path / "x.safetensors")}
    assert torch.equal(held["x"].read(dtype), value.to(dtype))
    assert torch.equal(held["x"].rows([0, 6, 2]), value[[0, 6, 2]])
    assert torch.equal(held["x"].rows([3], 2), value[[3], :2])
    assert held["none"].read(dtype).shape == (0, 3)
