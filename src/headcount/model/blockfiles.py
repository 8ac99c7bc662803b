"""A checkpoint to be read block by block: what of the model lies where, and reading it into memory.

Each block is read by plain reads into one piece of memory: a mapped file counts as memory where memory is limited. A
safetensors checkpoint is read where it lies, under whatever names and in whatever type: both are put right while
reading. What lies otherwise, .bin files and what transformers makes of several tensors, is rewritten once
(`headcount.model.block_cache`). What of the checkpoint becomes what of the model is transformers' own rule
(`headcount.model.conversion`), and nothing may be missing or left over (`headcount.model.checkpoint`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headcount.errors import ModelError
from headcount.model import checkpoint
from headcount.model.anatomy import Names, find_anatomy
from headcount.model.block_cache import BlockCache, Layout
from headcount.model.conversion import convert
from headcount.model.weight_files import Held, files_read

# Tensors begin at multiples of so many bytes, as torch's own.
_ALIGNED = 64


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
    cache = BlockCache.of(name, files, commit)
    held = checkpoint.tensors(name, cache.in_parts())
    conversion = convert(name, list(held.values()), model, dtype)
    notes = checkpoint.check(name, model, conversion.told, folder, held)
    layout = Layout.of(conversion, model, blocks)
    folder_written = cache.write(layout, model, progress) if layout.files else None
    places = {source.first: source.held[0][1] for source in layout.in_place}
    places |= {} if folder_written is None else layout.held(folder_written)
    cache.tidy([*places.values(), *held.values()])
    dtypes = {key: one.dtype for key, one in conversion.announced.items()}
    return BlockFiles(name, blocks, {key: places[key] for key in dtypes}, dtypes, conversion.tied, held, notes,
                      folder_written)


def _blocks(model: PreTrainedModel, names: Names) -> tuple[str, ...]:
    of_module = {id(module): name for name, module in model.named_modules()}
    return tuple(f"{of_module[id(layer.block)]}." for layer in find_anatomy(model, names).layers)
