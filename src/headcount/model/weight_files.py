"""Tensors in the files of a checkpoint, by the names that they have there; none is read before it is looked at.

Which files transformers reads is its own rule: the one that the config names, else model.safetensors, else the shards
that its index names, else the same for pytorch_model.bin. Others that lie beside them are not read.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # of files that torch refuses to read
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

# What the readers of weights raise for files that are damaged or of another kind.
UNREADABLE = (SafetensorError, UnpicklingError, RuntimeError, OSError, ValueError, EOFError)
_CODED = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor in a file.

    Attributes:
        path: The file.
        name: The tensor's, in the file.
        shape: Its shape.
        is_coded: Whether it holds whole numbers or eight bits, as quantised weights do.
        part: The tensor itself, or safetensors' handle of it: both are mapped, and read where they are indexed.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    is_coded: bool
    part: Any

    def read(self) -> Tensor:
        """All of it."""
        tensor: Tensor = self.part[...]
        return tensor

    def rows(self, indices: Iterable[int], most: int | None = None) -> Tensor:
        """Some of its rows, along the first dimension, of each so many along the second; no other is read."""
        return torch.cat([self.part[index : index + 1, :most] if most else self.part[index : index + 1]
                          for index in indices])


def files_read(folder: Path, named: str | None) -> list[Path]:
    """The files of a folder that transformers reads weights from; none where there are none of its names.

    Args:
        folder: Of the checkpoint.
        named: The file, or index of shards, that the config names; None where it names none.
    """
    for name in (named, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if name is not None and (path := folder / name).is_file():
            shards = json.loads(path.read_text())["weight_map"].values() if path.suffix == ".json" else [name]
            return [folder / shard for shard in sorted({*shards})]
    return []


def files_passed_over(folder: Path, read: Iterable[Path]) -> list[Path]:
    """Other files of a folder that have a checkpoint's name."""
    found = {path for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)}
    return sorted(found - {*read})


def held_by(path: Path) -> list[Held]:
    """The tensors of a file."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return [Held(path, name, tuple(part.get_shape()), str(part.get_dtype()) in _CODED, part)
                for name, part in parts.items()]
    saved: Mapping[str, Any] = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    return [Held(path, name, tuple(value.shape), not value.is_floating_point() or value.itemsize == 1, value)
            for name, value in saved.items() if isinstance(value, Tensor)]
