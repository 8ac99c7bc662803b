"""Safetensors files written tensor by tensor, so that no more than one of them needs to be in memory.

The header is written first (`headcount.model.tensor_format`), and tensors follow as they come, in the order that was
announced. Several files are told apart as transformers does it, by an index.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from headcount.model.tensor_format import header_of, size, write_values

# The largest file, as transformers has it.
SHARD_BYTES = 5 * 10**9


class Shards:
    """Writes a checkpoint's tensors, which must come in the order announced.

    Args:
        folder: Where the files go.
        tensors: Every tensor, with its shape and type (values are not read: they may be on the meta device).
        shard_bytes: How large a file may become; a tensor that is larger has a file of its own.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._files = _files(tensors, shard_bytes)
        self._tensors = dict(tensors)
        self._waiting = [name for names in self._files.values() for name in names]
        self._file: BinaryIO | None = None
        self.bytes = sum(map(size, tensors.values()))

    def write(self, name: str, value: Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: If it is not the one that was announced next.
        """
        announced = self._tensors[name]
        if name != self._waiting[0] or value.shape != announced.shape or value.dtype != announced.dtype:
            raise ValueError(f"{name} ({value.dtype}, {tuple(value.shape)}) is not what was announced next, "
                             f"{self._waiting[0]} ({announced.dtype}, {tuple(announced.shape)})")
        for file, names in self._files.items():
            if names[0] == name:
                self._begin(file, names)
        assert self._file is not None  # noqa: S101 - the first tensor begins the first file
        write_values(self._file, value)
        del self._waiting[0]

    def close(self) -> None:
        """Finish the last file, and write the index where there are several.

        Raises:
            ValueError: If tensors that were announced are missing.
        """
        if self._file is not None:
            self._file.close()
        if self._waiting:
            raise ValueError(f"{len(self._waiting)} tensors were announced and never came, such as {self._waiting[0]}")
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self.bytes},
                     "weight_map": {name: file for file, names in self._files.items() for name in names}}
            (self._folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _begin(self, file: str, names: Sequence[str]) -> None:
        if self._file is not None:
            self._file.close()
        self._file = (self._folder / file).open("wb")
        self._file.write(header_of({name: self._tensors[name] for name in names}))


def _files(tensors: Mapping[str, Tensor], most: int) -> dict[str, list[str]]:
    """Names of files, and the tensors in each, in order."""
    parts: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if parts[-1] and held + size(tensor) > most:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size(tensor)
    if len(parts) == 1:
        return {SAFE_WEIGHTS_NAME: parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": names for i, names in enumerate(parts)}
