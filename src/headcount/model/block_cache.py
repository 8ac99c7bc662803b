"""What of a checkpoint does not lie so that it can be read block by block is rewritten once, into the user's cache.

That are .bin files, and tensors that transformers makes of several, as stacked experts (`headcount.model.conversion`).
They become one safetensors file for each block, and one for what lies before and behind them:

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
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import transformers
from filelock import FileLock
from platformdirs import user_cache_path
from torch import Tensor
from transformers import PreTrainedModel

from headcount.errors import ModelError, first_line
from headcount.model.conversion import Conversion, Source
from headcount.model.fingerprint import described
from headcount.model.tensor_format import header_of, size, write_values
from headcount.model.weight_files import Held, held_by, reads_in_parts, scratch, stamp

# What is written where, how many bytes of it are written, and of how many.
Rewriting: TypeAlias = Callable[[str, int, int], object]
_REST = "rest.safetensors"
_ABOUT = "about.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What is stale goes if it was not used for so long: another process may still read it.
_UNUSED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Layout:
    """What is read where it lies, and what is written into which file.

    Attributes:
        in_place: Tensors of the model that lie in the checkpoint as they are.
        files: Of every file to be written what it is made of, in order, and the tensors that it will hold, without
            values.
    """

    in_place: tuple[Source, ...]
    files: Mapping[str, tuple[tuple[Source, ...], Mapping[str, Tensor]]]

    @classmethod
    def of(cls, conversion: Conversion, model: PreTrainedModel, blocks: Sequence[str]) -> Layout:
        """How a checkpoint is laid out.

        Args:
            conversion: What it gives the model.
            model: The model without weights.
            blocks: What the names of every block's tensors begin with.
        """
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
        return [transformers.__version__, described(model.config) if of_several else "",
                [(file, header_of(announced).decode("latin-1")) for file, (_, announced) in self.files.items()],
                [[key, one.name] for sources, _ in self.files.values() for source in sources
                 for key, one in source.held]]

    def held(self, folder: Path) -> dict[str, Held]:
        """The tensors of files that were written, by the model's names."""
        return {one.name: one for file in self.files for one in held_by(folder / file)}


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


@dataclass(frozen=True)
class BlockCache:
    """Where the files of one checkpoint are rewritten.

    Attributes:
        name: The model, as the user named it.
        files: The checkpoint's.
        commit: The hub's commit that they are of, where they are from there.
        stamps: What tells them from later ones of their names.
        root: The folder with what is rewritten of all checkpoints.
    """

    name: str
    files: tuple[Path, ...]
    commit: str | None
    stamps: tuple[object, ...]
    root: Path

    @classmethod
    def of(cls, name: str, files: Sequence[Path], commit: str | None) -> BlockCache:
        """The place in the user's cache.

        Raises:
            ModelError: If one of the files is missing.
        """
        root = user_cache_path("headcount", appauthor=False) / "blocks"
        return cls(name, tuple(files), commit, _stamps(files, commit), root)

    def in_parts(self, progress: Rewriting | None = None) -> list[Path]:
        """The files, and for those that can only be read whole their copies in the cache, which are made if need be.

        Args:
            progress: Told before each and behind it.

        Raises:
            ModelError: If a file is damaged, or the disk has too little space.
        """
        found, copies = [], self.root / _digest(self.stamps)
        sizes = [path.stat().st_size for path in self.files]
        for i, path in enumerate(self.files):
            if reads_in_parts(path):
                found.append(path)
                continue
            found.append(copy := copies / f"whole-{i:05d}.safetensors")
            if not copy.is_file():
                self._tell(progress, sum(sizes[:i]), sum(sizes))
                values = {one.name: one.read() for one in held_by(path)}
                with self._writing(copies):
                    _unfinished(copy).unlink(missing_ok=True)
                    self._check_space(sum(sizes[i:]))
                    _write_file(copy, values, values.values())
                    self._check_unchanged(copy)
                del values
                self._tell(progress, sum(sizes[: i + 1]), sum(sizes))
        return found

    def write(
        self, layout: Layout, model: PreTrainedModel, progress: Rewriting | None = None
    ) -> Path:
        """The folder of the files that a layout names; those that are not whole there are written.

        Args:
            layout: What they are made of.
            model: The model without weights.
            progress: Told before anything is written and after every file.

        Raises:
            ModelError: If the disk has too little space, or the checkpoint changes meanwhile.
        """
        folder = self.root / _digest([self.stamps, layout.described(model)])
        with self._writing(folder):
            left = [file for file, (_, announced) in layout.files.items() if not _is_whole(folder / file, announced)]
            for file in left:
                _unfinished(folder / file).unlink(missing_ok=True)
            total, written = sum(_length(layout.files[file][1]) for file in left), 0
            self._check_space(total)
            if left:
                self._tell(progress, written, total)
            for file in left:
                sources, announced = layout.files[file]
                _write_file(folder / file, announced, _values(sources, model))
                self._check_unchanged(folder / file)
                written += _length(announced)
                self._tell(progress, written, total)
        return folder

    def tidy(self, used: Iterable[Held]) -> None:
        """Mark what is used, and remove what was written of these files when they were others, if not used lately."""
        about = json.dumps({"files": [str(path) for path in self.files], "stamps": self.stamps})
        for folder in {one.path.parent for one in used if one.path.parent.parent == self.root}:
            with contextlib.suppress(OSError):
                (folder / _ABOUT).write_text(about, encoding="utf-8")
        present = json.loads(about)
        for path in self.root.glob(f"*/{_ABOUT}"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                told = json.loads(path.read_text(encoding="utf-8"))
                unused = time.time() - path.stat().st_mtime > _UNUSED_SECONDS
                if told["files"] == present["files"] and told["stamps"] != present["stamps"] and unused:
                    shutil.rmtree(path.parent, ignore_errors=True)
                    path.parent.with_name(f"{path.parent.name}.lock").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """While nobody else writes here; what the disk says becomes one line, and files that are whole stay.

        Where the disk has no locks, two may write, and the later one's file stays.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as held:
                with contextlib.suppress(OSError, NotImplementedError):
                    held.enter_context(FileLock(folder.with_name(f"{folder.name}.lock")))
                yield
        except OSError as e:
            kept = "; the files that are whole stay, and the same command goes on with the next" * (e.errno in _FULL)
            raise ModelError(f"{self.name} could not be written into the cache {self.root} ({what_to_do(e)}{kept}"
                             ) from e

    def _tell(self, progress: Rewriting | None, written: int, total: int) -> None:
        if progress is not None:
            progress(f"rewriting {self.name} to be read block by block: {total:,} bytes, once, into {self.root}",
                     written, total)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise ModelError(f"{self.name} has to be written into the cache once, one file for each block, which takes "
                             f"{needed:,} bytes, and {self.root} has {free:,} bytes left: make space there, or set "
                             "XDG_CACHE_HOME to a folder on a larger disk")

    def _check_unchanged(self, written: Path) -> None:
        """Refuse a checkpoint that was written over while it was read."""
        if _stamps(self.files, self.commit) != self.stamps:
            written.unlink()
            raise ModelError(f"the files of {self.name} have changed while they were read: give the same command again "
                             "once they are all there")


def what_to_do(error: OSError) -> str:
    """Why the user's cache could not be written, and what helps: `the disk is full): make space there, ...`."""
    if error.errno in _FULL:
        return "the disk is full): make space there, or set XDG_CACHE_HOME to a folder on another disk"
    return f"{error.strerror or first_line(error)}): set XDG_CACHE_HOME to a folder that can be written to"


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


def _stamps(files: Sequence[Path], commit: str | None) -> tuple[object, ...]:
    """What tells the files of a checkpoint from later ones of their names."""
    return commit, *(_stamp(path, commit) for path in files)


def _stamp(path: Path, commit: str | None) -> tuple[object, ...]:
    """What tells a file of a checkpoint from a later one of its name."""
    if not path.is_file():
        held_by(path)  # which refuses it
    if commit is not None:
        return path.name, path.stat().st_size
    return str(path.resolve()), *stamp(path)


def _digest(told: object) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
