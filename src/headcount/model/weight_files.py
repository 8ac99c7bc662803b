"""Tensors in the files of a checkpoint, by the names that they have there; none is read before it is looked at.

Which files transformers reads is its own rule: the one that the config names, else model.safetensors, else the shards
that its index names, else the same for pytorch_model.bin. Others that lie beside them are not read.

Where a tensor lies is told by a safetensors file's header (eight bytes with its length, then JSON: type, shape, from
which byte to which), and of a .bin file by `torch.load` onto the meta device, which unpickles names and shapes alone
and tells where in the file each storage begins. Both are then read by plain reads, never mapped: a mapped file counts
as memory where memory is limited. Only .bin files of before torch 1.6 are read whole.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # of files that torch refuses to read
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from headcount.errors import ModelError, first_line
from headcount.model.tensor_format import TYPES

# What the readers of weights raise for files that are damaged or of another kind.
UNREADABLE = (SafetensorError, UnpicklingError, zipfile.BadZipFile, RuntimeError, OSError, ValueError, EOFError)
# What is copied, or wanted in another type, is read by so many bytes at a time: what the C library gives back at once.
_CHUNK = 2**25
_POINTER = b"version https://git-lfs"
# A longer header is none: safetensors' own bound.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor in a file.

    Attributes:
        path: The file.
        name: The tensor's, in the file.
        shape: Its shape.
        dtype: Its type of numbers; None where torch has none such, and it cannot be read.
        offset: The byte of the file at which it begins.
        strides: How many numbers lie between neighbours, along every dimension.
        whole: The tensor itself, of a file that cannot be read in parts.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    offset: int
    strides: tuple[int, ...]
    whole: Tensor | None = None

    @property
    def is_coded(self) -> bool:
        """Whether it holds whole numbers or eight bits, as quantised weights do."""
        return self.dtype is None or not self.dtype.is_floating_point or self.dtype.itemsize == 1

    @property
    def is_plain(self) -> bool:
        """Whether its numbers lie in the file one behind another."""
        return self.whole is None and self.strides == contiguous(self.shape)

    def without_values(self) -> Tensor:
        """Its shape and type, on the meta device.

        Raises:
            ModelError: If torch has no such type.
        """
        return torch.empty(self.shape, dtype=self._type, device="meta")

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """All of it, in its own type or another one; takes no more memory than what is returned, and a little.

        Raises:
            ModelError: If the file has become shorter, or is gone.
        """
        values = torch.empty(self.shape, dtype=dtype or self._type)
        self.read_into(values)
        return values

    def read_into(self, values: Tensor) -> None:
        """Read all of it into a tensor of its shape, which is contiguous and on the CPU, and may be of another type.

        Raises:
            ModelError: If the file has become shorter, or is gone.
        """
        if self.whole is not None:
            values.copy_(self.whole)
        elif not self.is_plain:
            span = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
            values.copy_(self.numbers(0, span if values.numel() else 0).as_strided(self.shape, self.strides))
        elif values.dtype == self._type:
            self._fill(self.offset, values.view(-1))
        else:
            flat, done = values.view(-1), 0
            for part in self.chunks(torch.empty(min(_CHUNK, flat.numel() * self._type.itemsize), dtype=torch.uint8)):
                flat[done : done + part.numel()].copy_(part)
                done += part.numel()

    def chunks(self, scratch: Tensor) -> Iterator[Tensor]:
        """All numbers of a plain tensor, in the order in which they lie in the file.

        Args:
            scratch: Bytes of memory into which one part after another is read.

        Raises:
            ModelError: If the file has become shorter, or is gone.
        """
        step, numel = scratch.numel() // self._type.itemsize, math.prod(self.shape)
        for start in range(0, numel, max(1, step)):
            part = scratch[: min(step, numel - start) * self._type.itemsize].view(self._type)
            self._fill(self.offset + start * self._type.itemsize, part)
            yield part

    def rows(self, indices: Iterable[int], most: int | None = None) -> Tensor:
        """Some of its rows, along the first dimension, of each so many along the second; no other is read."""
        if not self.is_plain:
            whole = self.read()
            return torch.cat([whole[index : index + 1, :most] if most else whole[index : index + 1]
                              for index in indices])
        shape = (1, min(most, self.shape[1]), *self.shape[2:]) if most else (1, *self.shape[1:])
        return torch.cat([self.numbers(index * self.strides[0], math.prod(shape)).view(shape) for index in indices])

    def numbers(self, start: int, numel: int) -> Tensor:
        """So many of its numbers, from one on, in the order in which they lie in the file."""
        values = torch.empty(numel, dtype=self._type)
        self._fill(self.offset + start * self._type.itemsize, values)
        return values

    @property
    def _type(self) -> torch.dtype:
        if self.dtype is None:
            raise ModelError(f"{self.path} holds {self.name} in a type of numbers that torch does not have: it cannot "
                             "be read")
        return self.dtype

    def _fill(self, offset: int, values: Tensor) -> None:
        rest = values.view(torch.uint8).numpy().data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                while rest and (got := file.readinto(rest)):
                    rest = rest[got:]
        except OSError as e:
            raise ModelError(f"{self.path} cannot be read ({first_line(e)}): give the same command again once it "
                             "can") from e
        if rest:
            raise _damaged(self.path, f"it ends before {self.name} does")


@dataclass(frozen=True)
class Index:
    """What tells which shard of a checkpoint holds which tensor.

    Attributes:
        path: The file.
        shards: The shard's name, by tensor.
    """

    path: Path
    shards: Mapping[str, str]


def index_of(folder: Path, named: str | None = None) -> Index | None:
    """The index of the checkpoint that transformers reads; None where it lies in one file, or there is none.

    Args:
        folder: Of the checkpoint.
        named: The file, or index of shards, that the config names; None where it names none.

    Raises:
        ModelError: If it is damaged.
    """
    path = _first(folder, named)
    if path is None or path.suffix != ".json":
        return None
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        index = Index(path, {str(name): str(shard) for name, shard in shards.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise _damaged(path, "it is no index of shards") from e
    if not index.shards:
        raise _damaged(path, "it names no tensors")
    return index


def weight_names(named: str | None) -> list[str]:
    """Names of files that transformers looks for in turn: weights, or the index of their shards.

    Args:
        named: The one that the config names; None where it names none.
    """
    return [name for name in (named, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
            if name is not None]


def files_read(folder: Path, named: str | None) -> list[Path]:
    """The files of a folder that transformers reads weights from; none where there are none of its names.

    Args:
        folder: Of the checkpoint.
        named: The file, or index of shards, that the config names; None where it names none.

    Raises:
        ModelError: If the index of shards is damaged.
    """
    index = index_of(folder, named)
    if index is not None:
        return [folder / shard for shard in sorted({*index.shards.values()})]
    path = _first(folder, named)
    return [] if path is None else [path]


def files_passed_over(folder: Path, read: Iterable[Path]) -> list[Path]:
    """Other files of a folder that have a checkpoint's name."""
    found = {path for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)}
    return sorted(found - {*read})


def check_files(folder: Path, named: str | None = None) -> None:
    """Refuse a checkpoint one of whose files is missing, or not whole; headers and names alone are read.

    Args:
        folder: Of the checkpoint.
        named: The file, or index of shards, that the config names; None where it names none.

    Raises:
        ModelError: Which names the file.
    """
    for path in files_read(folder, named):
        held_by(path)


def held_by(path: Path) -> list[Held]:
    """The tensors of a file.

    Raises:
        ModelError: If there is no such file, or it is damaged or not whole.
    """
    if not path.is_file():
        raise ModelError(f"the checkpoint's file {path} is missing, which its index names: download or copy it there")
    if is_pointer(path):
        raise ModelError(f"{path} is Git LFS's pointer in the place of a file: run `git lfs pull` there, or download "
                         "it")
    try:
        return _of_safetensors(path) if path.suffix == ".safetensors" else _of_bin(path)
    except UnpicklingError as e:  # torch's own text offers to run what is in the file
        raise ModelError(f"{path} is damaged, or holds other objects than tensors, which are not unpickled: download "
                         "or copy it again, or save its tensors as safetensors") from e
    except (*UNREADABLE, TypeError, AttributeError, AssertionError, ArithmeticError, LookupError) as e:
        raise _damaged(path, first_line(e)[:80].rstrip(". ")) from e


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in the place of one that it has not fetched."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def reads_in_parts(path: Path) -> bool:
    """Whether single tensors of a file can be read; else it is read whole to have any.

    Raises:
        ModelError: If there is no such file, or it is damaged or not whole.
    """
    if path.is_file() and path.suffix != ".safetensors" and not _is_zip(path):
        return False
    return all(one.whole is None for one in held_by(path))


def stamp(path: Path) -> tuple[object, ...]:
    """What tells a file from a later one of its name: size, time and inode; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino


def stamps_of(places: Mapping[str, Held]) -> dict[Path, tuple[object, ...]]:
    """The same of all files in which tensors lie."""
    return {path: stamp(path) for path in {place.path for place in places.values()}}


def scratch() -> Tensor:
    """Memory to read a tensor's numbers into, part by part."""
    return torch.empty(_CHUNK, dtype=torch.uint8)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose numbers lie one behind another."""
    return torch.empty(shape, device="meta").stride()


def _first(folder: Path, named: str | None) -> Path | None:
    return next((path for name in weight_names(named) if (path := folder / name).is_file()), None)


def _of_safetensors(path: Path) -> list[Held]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("its header is not whole")
        header: dict[str, Any] = json.loads(file.read(length))
    found: list[Held] = []
    end = 8 + length
    for name, said in header.items():
        if name != "__metadata__":
            one = Held(path, name, tuple(said["shape"]), TYPES.get(said["dtype"]), 8 + length + said["data_offsets"][0],
                       contiguous(tuple(said["shape"])))
            stop = 8 + length + said["data_offsets"][1]
            if one.dtype is not None and stop - one.offset != math.prod(one.shape) * one.dtype.itemsize:
                raise ValueError(f"its header gives {name} other bytes than its shape needs")
            found.append(one)
            end = max(end, stop)
    if end != size:
        raise ValueError(f"it has {size:,} bytes, and its header tells of {end:,}")
    return found


def _of_bin(path: Path) -> list[Held]:
    in_parts = _is_zip(path)
    if in_parts:
        with zipfile.ZipFile(path) as file:
            in_parts = all(part.compress_type == zipfile.ZIP_STORED for part in file.infolist())
    saved: Mapping[str, Any] = torch.load(path, map_location="meta" if in_parts else "cpu", weights_only=True)
    found: list[Held] = []
    for name, value in saved.items():
        if isinstance(value, Tensor):
            begins = value.untyped_storage()._checkpoint_offset if in_parts else 0
            if begins is None:  # an earlier torch does not tell
                return _mapped(path)
            if begins % value.itemsize:
                raise ValueError(f"{name} begins within a number")
            found.append(Held(path, name, tuple(value.shape), value.dtype,
                              begins + int(value.storage_offset()) * value.itemsize, value.stride(),
                              None if in_parts else value.detach()))
    return found


def _is_zip(path: Path) -> bool:
    """Whether a file is a ZIP archive, whole or not, as .bin files are since torch 1.6."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def _mapped(path: Path) -> list[Held]:
    saved: Mapping[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return [Held(path, name, tuple(value.shape), value.dtype, 0, value.stride(), value.detach())
            for name, value in saved.items() if isinstance(value, Tensor)]


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is damaged or not whole ({why}): download or copy it again")
