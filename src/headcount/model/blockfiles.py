"""A checkpoint to be read block by block: what of the model lies where, and reading it into memory.

Each block is read by plain reads into one piece of memory: a mapped file counts as memory where memory is limited. A
safetensors checkpoint is read where it lies, under whatever names and in whatever type: both are put right while
reading. What lies otherwise, .bin files and what transformers makes of several tensors, is rewritten once
(`headcount.model.block_cache`). What of the checkpoint becomes what of the model is transformers' own rule
(`headcount.model.conversion`), and nothing may be missing or left over (`headcount.model.checkpoint`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from headcount.errors import ModelError
from headcount.model import checkpoint
from headcount.model.anatomy import Names, find_anatomy
from headcount.model.block_cache import BlockCache, Layout, Rewriting
from headcount.model.conversion import Source, convert
from headcount.model.weight_files import Held, files_read, stamp, stamps_of

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
        behind: How many bytes behind a multiple of 64 each begins in memory, by the names that are kept. Kernels go by
            that: so it is where a model in memory has it, whose weights are the mapped file's.
        notes: What must be said of the checkpoint beside every result.
        stamps: What tells every file from a later one of its name.
        folder: Of the files that were written; None where the checkpoint is read where it lies.
    """

    name: str
    blocks: tuple[str, ...]
    places: Mapping[str, Held]
    dtypes: Mapping[str, torch.dtype]
    tied: Mapping[str, str]
    behind: Mapping[str, int]
    notes: tuple[str, ...]
    stamps: Mapping[Path, tuple[object, ...]]
    folder: Path | None

    def names(self, prefix: str) -> list[str]:
        """The model's tensors whose names begin so, tied ones too."""
        return [name for name in (*self.places, *self.tied) if name.startswith(prefix)]

    def tensors_of(self, prefix: str) -> dict[str, Held]:
        """Where the tensors lie whose names begin so."""
        return {name: self.places[self.tied.get(name, name)] for name in self.names(prefix)}

    def bytes_of(self, names: Sequence[str]) -> int:
        """The memory that these tensors are read into; tied ones once."""
        return self._starts(names)[-1][1]

    def read(self, prefix: str, memory: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors whose names begin so, in memory (`read_named`)."""
        return self.read_named(self.names(prefix), memory)

    def read_named(self, names: Sequence[str], memory: Tensor | None = None) -> dict[str, Tensor]:
        """These tensors in memory, side by side in one piece of it; names that are tied give one tensor.

        One piece, because the C library keeps for itself much of what many tensors of a few megabytes leave.

        Args:
            names: The model's names.
            memory: Bytes of the CPU's memory to read into, such as an earlier block's, at least `bytes_of` these names.

        Raises:
            ModelError: If a file is gone, or is not what it was when it was opened.
        """
        self._check_files(names)
        memory = torch.empty(self.bytes_of(names), dtype=torch.uint8) if memory is None else memory
        first = -memory.data_ptr() % _ALIGNED
        read: dict[str, Tensor] = {}
        for name, start in self._starts(names)[:-1]:
            place, dtype = self.places[name], self.dtypes[name]
            begin = first + start
            read[name] = memory[begin : begin + math.prod(place.shape) * dtype.itemsize].view(dtype).view(place.shape)
            place.read_into(read[name])
        self._check_files(names)  # once more: one may have changed meanwhile
        return {name: read[self.tied.get(name, name)] for name in names}

    def _check_files(self, names: Sequence[str]) -> None:
        """Refuse files of these tensors that are gone, or are not those that were opened."""
        for path in {self.places[self.tied.get(name, name)].path for name in names}:
            if stamp(path) != self.stamps[path]:
                back = "" if path.parent == self.folder else "put it back as it was, and "  # else it is written anew
                raise ModelError(f"{path} is gone or has changed while {self.name} was read from it: {back}give the "
                                 "same command again")

    def _starts(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """Where each begins, behind the memory's first multiple of 64; at the end how long the memory must be."""
        starts, end = [], 0
        for name in dict.fromkeys(self.tied.get(name, name) for name in names):
            end += -end % _ALIGNED + self.behind[name]
            starts.append((name, end))
            end += math.prod(self.places[name].shape) * self.dtypes[name].itemsize
        return [*starts, ("", end + _ALIGNED)]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint's files, opened: what they hold is known, and nothing of it is read.

    Attributes:
        name: The model, as the user named it.
        folder: Where the files lie.
        cache: Where they are rewritten, if need be.
        held: What they hold, by its own names.
    """

    name: str
    folder: Path
    cache: BlockCache
    held: Mapping[str, Held]

    @classmethod
    def open(
        cls, folder: Path, named: str | None, *, name: str | None = None, commit: str | None = None,
        progress: Rewriting | None = None,
    ) -> Checkpoint:
        """The files of a checkpoint; those that can only be read whole are rewritten once.

        Args:
            folder: Of the checkpoint, with all its files.
            named: The file of weights, or index of shards, that the config names; None where it names none.
            name: The model, as the user named it; the folder by default.
            commit: The hub's commit that the files are of, where they are from there.
            progress: Told before anything is rewritten and after every file.

        Raises:
            ModelError: If a file is missing, damaged or not whole.
        """
        name = str(folder) if name is None else name
        files = files_read(folder, named)
        if not files:
            where = "" if name == str(folder) else f" in {folder}"
            raise ModelError(f"{name} holds no weights{where} that transformers reads (model.safetensors, "
                             "pytorch_model.bin, or the index of their shards): download them there")
        cache = BlockCache.of(name, files, commit)
        return cls(name, folder, cache, checkpoint.tensors(name, cache.in_parts(progress)))

    def without_values(self) -> dict[str, Tensor]:
        """What it holds without values, on the meta device.

        Raises:
            ModelError: If it holds numbers of a type that torch does not have.
        """
        return {name: one.without_values() for name, one in self.held.items()}


def block_files(
    opened: Checkpoint, model: PreTrainedModel, dtype: torch.dtype, *, names: Names | None = None,
    progress: Rewriting | None = None,
) -> BlockFiles:
    """Where a model's weights lie, to be read block by block; what does not lie so is written into the cache first.

    Args:
        opened: The checkpoint.
        model: The model without weights, built on the meta device, in `dtype`.
        dtype: The type that its weights are wanted in, as `from_pretrained` takes it.
        names: Names of the model's parts, where they are not found.
        progress: Told before anything is written and after every file (`Rewriting`).

    Raises:
        ModelError: If the checkpoint is not the model's, it changes meanwhile, or the disk of the cache has too little
            space.
    """
    name, held = opened.name, opened.held
    blocks = blocks_of(model, names or Names())
    conversion = convert(name, list(held.values()), model, dtype)
    notes = checkpoint.check(name, model, conversion.told, opened.folder, held)
    layout = Layout.of(conversion, model, blocks)
    folder = opened.cache.write(layout, model, progress) if layout.files else None
    places = {source.first: source.held[0][1] for source in layout.in_place}
    places |= {} if folder is None else layout.held(folder)
    opened.cache.tidy([*places.values(), *held.values()])
    dtypes = {key: one.dtype for key, one in conversion.announced.items()}
    behind = dict.fromkeys(dtypes, 0) | {source.first: _mapped_at(source) for source in conversion.sources}
    places = {key: places[key] for key in dtypes}
    return BlockFiles(name, blocks, places, dtypes, conversion.tied, behind, notes, stamps_of(places), folder)


def check_plain(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model whose weights are not numbers as they lie in its files.

    Raises:
        ModelError: If its config says that it is quantised.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} is quantised, and only plain weights can be read block by block: load it whole, "
                         "without `stream`", fields=("stream",))


def _mapped_at(source: Source) -> int:
    """How many bytes behind a multiple of 64 a tensor begins that `from_pretrained` gives a model: a mapped file's."""
    held = source.held[0][1]
    maps = source.rule is None and held.whole is None and held.dtype == source.dtype and (
        held.offset % source.dtype.itemsize == 0)
    return held.offset % _ALIGNED if maps else 0


def blocks_of(model: PreTrainedModel, names: Names) -> tuple[str, ...]:
    """What the names of every block's tensors begin with (`model.layers.0.`), in order."""
    of_module = {id(module): name for name, module in model.named_modules()}
    return tuple(f"{of_module[id(layer.block)]}." for layer in find_anatomy(model, names).layers)
