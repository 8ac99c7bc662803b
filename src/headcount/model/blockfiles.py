"""A checkpoint to be read block by block: what of the model lies where, written anew where it does not lie so.

A block's tensors are read by plain reads, into memory that is theirs. A safetensors checkpoint is read where it lies,
under whatever names and in whatever type: both are put right while reading. What lies otherwise is rewritten once:
.bin files, and tensors that transformers makes of several, as stacked experts (`headcount.model.conversion`). It goes
into the user's cache, one safetensors file for each block, and one for what lies before and behind them:

    headcount/blocks/<digest>/block-00000.safetensors, ..., rest.safetensors

The digest is of the checkpoint's files (the hub's commit, or path, size, time and inode of each), and of what is to be
written. A file is written under another name and renamed, so that it is whole or not there. A rewrite that was killed
goes on with the next file; of two processes the second waits. It takes 32 MB of memory; what is made of several tensors
takes these and what becomes of them. Only .bin files of before torch 1.6 must be read whole, one after another, and
become one safetensors file each. Weights are kept in the type wanted, or the checkpoint's own where that is shorter.
What the cache holds of a checkpoint whose files have changed since goes when that checkpoint is opened again, if it was
not used for a day.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from platformdirs import user_cache_path
from torch import Tensor
from transformers import PreTrainedModel

from headcount.errors import ModelError, first_line
from headcount.model import checkpoint
from headcount.model.anatomy import Names, find_anatomy
from headcount.model.conversion import Conversion, Source, convert
from headcount.model.tensor_format import header_of, size, write_values
from headcount.model.weight_files import Held, files_read, held_by, reads_in_parts, scratch

_REST = "rest.safetensors"
_ABOUT = "about.json"
# Tensors begin at multiples of so many bytes, as torch's own.
_ALIGNED = 64
# What is stale goes if it was not used for so long: another process may still read it.
_UNUSED_SECONDS = 24 * 3600


@dataclass(frozen=True, eq=False)
class BlockFiles:
    """Where the weights and persistent buffers of a model lie, to be read block by block.

    Attributes:
        name: The model, as the user named it.
        blocks: What the names of every block's tensors begin with (`model.layers.0.`), in order.
        places: Where every tensor lies, by the model's name of it; tied ones by the name that is kept.
        dtypes: The type that each is wanted in, by the same names.
        tied: Other names of some of them, and the name that is kept.
        held: What the checkpoint's own files hold, by its own names.
        notes: What must be said of the checkpoint beside every result.
        folder: Of the files that were written; None where the checkpoint is read where it lies.
    """

    name: str
    blocks: tuple[str, ...]
    places: Mapping[str, Held]
    dtypes: Mapping[str, torch.dtype]
    tied: Mapping[str, str]
    held: Mapping[str, Held]
    notes: tuple[str, ...]
    folder: Path | None

    def names(self, prefix: str) -> list[str]:
        """The model's tensors whose names begin so, tied ones too."""
        return [name for name in (*self.places, *self.tied) if name.startswith(prefix)]

    def rest(self) -> list[str]:
        """The model's tensors that are of no block."""
        return [name for name in (*self.places, *self.tied) if not name.startswith(self.blocks)]

    def tensors_of(self, prefix: str) -> dict[str, Held]:
        """Where the tensors lie whose names begin so."""
        return {name: self.places[self.tied.get(name, name)] for name in self.names(prefix)}

    def bytes_of(self, names: Sequence[str]) -> int:
        """The memory that these tensors are read into; tied ones once."""
        return sum(_length_in_memory(self.places[name].shape, self.dtypes[name]) for name in self._kept(names))

    def read(self, prefix: str, memory: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors whose names begin so, in memory (`read_named`)."""
        return self.read_named(self.names(prefix), memory)

    def read_rest(self) -> dict[str, Tensor]:
        """The tensors that are of no block, in memory (`read_named`)."""
        return self.read_named(self.rest())

    def read_named(self, names: Sequence[str], memory: Tensor | None = None) -> dict[str, Tensor]:
        """These tensors in memory, side by side in one piece of it; names that are tied give one tensor.

        One piece, because the C library keeps for itself much of what many tensors of a few megabytes leave.

        Args:
            names: The model's names.
            memory: Bytes of the CPU's memory to read into, such as an earlier block's, at least `bytes_of` these names.

        Raises:
            ModelError: If a file is gone or has become shorter.
        """
        memory = torch.empty(self.bytes_of(names), dtype=torch.uint8) if memory is None else memory
        read: dict[str, Tensor] = {}
        start = 0
        for name in self._kept(names):
            place, dtype = self.places[name], self.dtypes[name]
            end = start + math.prod(place.shape) * dtype.itemsize
            read[name] = memory[start:end].view(dtype).view(place.shape)
            place.read_into(read[name])
            start += _length_in_memory(place.shape, dtype)
        return {name: read[self.tied.get(name, name)] for name in names}

    def _kept(self, names: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(self.tied.get(name, name) for name in names))


def _length_in_memory(shape: Sequence[int], dtype: torch.dtype) -> int:
    """A tensor's bytes, filled up so that the next one begins where fast kernels want it."""
    length = math.prod(shape) * dtype.itemsize
    return length + -length % _ALIGNED


def block_files(
    folder: Path, model: PreTrainedModel, dtype: torch.dtype, *, name: str | None = None, names: Names | None = None,
    commit: str | None = None, progress: Callable[[int, int], None] | None = None,
) -> BlockFiles:
    """Where a model's weights lie, to be read block by block; what does not lie so is written into the cache first.

    Args:
        folder: Of the checkpoint, with all its files.
        model: The model without weights, built on the meta device, in `dtype`.
        dtype: The type that its weights are wanted in, as `from_pretrained` takes it.
        name: The model, as the user named it; the folder by default.
        names: Names of the model's parts, where they are not found.
        commit: The hub's commit that the files are of, where they are from there.
        progress: Told after every file how many bytes are written, of how many.

    Raises:
        ModelError: If a file is missing, damaged or not whole, the checkpoint is not the model's, it is quantised, or
            the disk of the cache has too little space.
    """
    name = str(folder) if name is None else name
    files = files_read(folder, checkpoint.named_weights(model))
    if not files:
        raise ModelError(f"{name} holds no weights in {folder} that transformers reads (model.safetensors, "
                         "pytorch_model.bin, or the index of their shards): download them there")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{name} is quantised, and only plain weights can be read block by block: load it whole, "
                         "without `stream`", fields=("stream",))
    blocks = _blocks(model, names or Names())
    cache = user_cache_path("headcount", appauthor=False) / "blocks"
    stamps = [commit, *(_stamp(path, commit) for path in files)]
    held = checkpoint.tensors(name, _in_parts(name, files, cache / _digest(stamps)))
    conversion = convert(name, list(held.values()), model, dtype)
    notes = checkpoint.check(name, model, conversion.told, folder, held)
    layout = _Layout.of(conversion, model, blocks)
    places = {source.first: source.held[0][1] for source in layout.in_place}
    place = cache / _digest([stamps, layout.described(model)])
    if layout.files:
        _write(name, place, layout, model, progress)
        places |= {one.name: one for file in layout.files for one in held_by(place / file)}
    for used in {one.path.parent for one in (*places.values(), *held.values())} - {path.parent for path in files}:
        _mark_used(used, files, stamps)
    _tidy(cache, files, stamps)
    dtypes = {key: one.dtype for key, one in conversion.announced.items()}
    return BlockFiles(name, blocks, {key: places[key] for key in dtypes}, dtypes, conversion.tied, held, notes,
                      place if layout.files else None)


def _blocks(model: PreTrainedModel, names: Names) -> tuple[str, ...]:
    of_module = {id(module): name for name, module in model.named_modules()}
    return tuple(f"{of_module[id(layer.block)]}." for layer in find_anatomy(model, names).layers)


@dataclass(frozen=True)
class _Layout:
    """What is read where it lies, and what is written into which file.

    Attributes:
        in_place: Tensors of the model that lie in the checkpoint as they are.
        files: Of every file to be written what it is made of, in order, and the tensors that it will hold, without
            values.
    """

    in_place: tuple[Source, ...]
    files: Mapping[str, tuple[tuple[Source, ...], Mapping[str, Tensor]]]

    @classmethod
    def of(cls, conversion: Conversion, model: PreTrainedModel, blocks: Sequence[str]) -> _Layout:
        in_place = tuple(source for source in conversion.sources if _lies_so(source))
        parts: dict[str, list[Source]] = {}
        for source in conversion.sources:
            if not _lies_so(source):
                number = next((i for i, block in enumerate(blocks) if source.first.startswith(block)), None)
                parts.setdefault(_REST if number is None else f"block-{number:05d}.safetensors", []).append(source)
        files = {}
        for file, sources in sorted(parts.items()):
            ordered = tuple(sorted(map(_shortest, sources), key=_place))
            files[file] = ordered, {key: one for source in ordered for key, one in source.announced(model).items()}
        return cls(in_place, files)

    def described(self, model: PreTrainedModel) -> list[object]:
        """What tells one rewrite of a checkpoint from another."""
        of_several = any(source.rule is not None for sources, _ in self.files.values() for source in sources)
        return [transformers.__version__, model.config.to_json_string() if of_several else "",
                [(file, header_of(announced).decode("latin-1")) for file, (_, announced) in self.files.items()],
                [[key, one.name] for sources, _ in self.files.values() for source in sources
                 for key, one in source.held]]


def _lies_so(source: Source) -> bool:
    """Whether a tensor of the model is one of a safetensors file, but for its name and type."""
    held = source.held[0][1]
    return source.rule is None and held.is_plain and held.path.suffix == ".safetensors"


def _place(source: Source) -> tuple[Path, int]:
    held = source.held[0][1]
    return held.path, held.offset


def _shortest(source: Source) -> Source:
    """What is taken as it is, in the checkpoint's type where that is shorter: reading makes the type wanted of it."""
    own = source.held[0][1].dtype
    if source.rule is not None or own is None or own.itemsize >= source.dtype.itemsize or not own.is_floating_point:
        return source
    return Source(source.held, None, source.first, own)


def _write(
    name: str, folder: Path, layout: _Layout, model: PreTrainedModel, progress: Callable[[int, int], None] | None
) -> None:
    """Write the files that are not there; memory is that of what one source takes."""
    with _space_told(name, folder), _alone(folder):
        folder.mkdir(exist_ok=True)
        left = [file for file, (_, announced) in layout.files.items() if not _is_whole(folder / file, announced)]
        lengths = {file: _length(layout.files[file][1]) for file in left}
        for file in left:
            _unfinished(folder / file).unlink(missing_ok=True)
        _check_space(name, folder, sum(lengths.values()))
        written = 0
        for file in left:
            sources, announced = layout.files[file]
            _write_file(folder / file, announced, _values(sources, model))
            written += lengths[file]
            if progress is not None:
                progress(written, sum(lengths.values()))


def _values(sources: Sequence[Source], model: PreTrainedModel) -> Iterator[Tensor]:
    """What files are made of, in order: in parts where it is taken as it is."""
    memory = scratch()
    for source in sources:
        held = source.held[0][1]
        if source.rule is None and held.is_plain:
            yield from (part.to(source.dtype) for part in held.chunks(memory))
        else:
            yield from source.made(model).values()


def _write_file(path: Path, announced: Mapping[str, Tensor], values: Iterable[Tensor]) -> None:
    """A safetensors file, which gets its name when all is there, and on the disk."""
    with _unfinished(path).open("wb") as file:
        file.write(header_of(announced))
        for part in values:
            write_values(file, part)
        file.flush()
        os.fsync(file.fileno())
    _unfinished(path).replace(path)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _length(announced: Mapping[str, Tensor]) -> int:
    return len(header_of(announced)) + sum(map(size, announced.values()))


def _is_whole(path: Path, announced: Mapping[str, Tensor]) -> bool:
    header = header_of(announced)
    try:
        with path.open("rb") as file:
            return file.read(len(header)) == header and path.stat().st_size == _length(announced)
    except OSError:
        return False


def _in_parts(name: str, files: Sequence[Path], copies: Path) -> list[Path]:
    """The files, and for those that can only be read whole their copies in the cache, which are made if need be."""
    found = []
    for i, path in enumerate(files):
        if not reads_in_parts(path):
            copy = copies / f"whole-{i:05d}.safetensors"
            if not copy.is_file():
                values = {one.name: one.read() for one in held_by(path)}
                with _space_told(name, copies), _alone(copies):
                    copies.mkdir(exist_ok=True)
                    _unfinished(copy).unlink(missing_ok=True)
                    _check_space(name, copies, sum(file.stat().st_size for file in files[i:]))
                    _write_file(copy, values, values.values())
                del values
            path = copy
        found.append(path)
    return found


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While nobody else writes this; where the disk has no locks, two may, and the later one's file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError, NotImplementedError):
            held.enter_context(lock)
        yield


def _check_space(name: str, place: Path, needed: int) -> None:
    free = shutil.disk_usage(place.parent).free
    if needed > free:
        raise ModelError(f"{name} has to be written into the cache once, one file for each block, which takes "
                         f"{needed:,} bytes, and {place.parent} has {free:,} bytes left: make space there, or set "
                         "XDG_CACHE_HOME to a folder on a larger disk")


@contextlib.contextmanager
def _space_told(name: str, place: Path) -> Iterator[None]:
    """What the disk says while files are written, in one line; those that are whole stay."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        why = "the disk is full" if e.errno in (errno.ENOSPC, errno.EDQUOT) else first_line(e)
        raise ModelError(f"{name} could not be written into the cache {place.parent} ({why}): make space there, or set "
                         "XDG_CACHE_HOME to a folder on another disk; the files that are whole stay, and the same "
                         "command goes on with the next") from e


def _stamp(path: Path, commit: str | None) -> tuple[object, ...]:
    """What tells a file of a checkpoint from a later one of its name."""
    if not path.is_file():
        held_by(path)  # which refuses it
    found = path.stat()
    if commit is not None:
        return path.name, found.st_size
    return str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ino


def _digest(told: object) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def _mark_used(folder: Path, files: Sequence[Path], stamps: Sequence[object]) -> None:
    with contextlib.suppress(OSError):
        about = {"files": [str(path) for path in files], "stamps": stamps}
        (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")


def _tidy(cache: Path, files: Sequence[Path], stamps: Sequence[object]) -> None:
    """Remove what was written of the same files when they were others, and was not used lately."""
    present = json.loads(json.dumps({"files": [str(path) for path in files], "stamps": stamps}))
    for about in cache.glob(f"*/{_ABOUT}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(about.read_text(encoding="utf-8"))
            unused = time.time() - about.stat().st_mtime > _UNUSED_SECONDS
            if told["files"] == present["files"] and told["stamps"] != present["stamps"] and unused:
                shutil.rmtree(about.parent, ignore_errors=True)
                about.parent.with_name(f"{about.parent.name}.lock").unlink(missing_ok=True)
