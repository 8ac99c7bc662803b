"""A model of random weights that lie in files: the same numbers as in memory, and one tensor in memory at a time.

transformers draws weights while it builds a model: every module draws its own when it is made, and
`PreTrainedModel.initialize_weights` draws most of them once more, in the order of modules, from one generator. To get
the same numbers this is let run as it is. Meanwhile each parameter's memory is given back, and its bytes wait in a
file, whenever another one is used: a `TorchFunctionMode` sees all that is done with tensors, and fetches what is used
first. That takes memory of one tensor (the largest: an embedding matrix, or all experts of a layer), and writes and
reads all weights twice.

    headcount/control/<random>/parameter-00000, ...

The folder goes with the model, or with the process; what a process that was killed left there goes when the next
control is made.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from headcount.errors import ModelError
from headcount.model.anatomy import Names
from headcount.model.block_cache import what_to_do
from headcount.model.blockfiles import BlockFiles, blocks_of
from headcount.model.disk import read_when_called
from headcount.model.held import give_back
from headcount.model.tensor_format import size
from headcount.model.weight_files import Held, scratch, stamps_of

# Of the disk, what other things that are written beside the weights may take.
_SPARE = 2**20


def space_needed(name: str, model: PreTrainedModel) -> tuple[int, Path]:
    """How many bytes a model of random weights takes on the disk, of the kind of another one, and in which folder.

    Args:
        name: The other model, as the user named it.
        model: The other model.

    Raises:
        ModelError: If the disk has less.
    """
    root = _root()
    needed = sum(size(weight) for _, weight in model.named_parameters(remove_duplicate=False)) + _SPARE
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
        free = shutil.disk_usage(root).free
    except OSError as e:
        raise _unwritten(name, e) from e
    if needed > free:
        raise ModelError(f"the control of induction, {name} with random weights, takes {needed:,} bytes in {root} "
                         f"while it is measured, where {free:,} are left: make space there, set XDG_CACHE_HOME to a "
                         "folder on a larger disk, or leave the control out (`skip_control`)", fields=("skip_control",))
    return needed, root


def random_in_files(
    name: str, build: Callable[[], PreTrainedModel], device: torch.device, names: Names
) -> PreTrainedModel:
    """A model whose weights its own class draws, left in files that go with it.

    Args:
        name: The model, as the user named it.
        build: Makes it, on the device on which weights are drawn.
        device: Where it runs.
        names: Names of the model's parts, where they are not found.

    Raises:
        ModelError: If the files cannot be written.
    """
    root = _root()
    _remove_abandoned(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=root))
        lock = _locked(folder)
        try:
            with _Away(folder).open() as away:
                model = build()
            read_when_called(model, away.files(name, model, names), device)
        except BaseException:
            _remove(folder, lock)
            raise
    except OSError as e:
        raise _unwritten(name, e) from e
    weakref.finalize(model, _remove, folder, lock)
    return model


@dataclass(frozen=True, eq=False)
class _Slot:
    """A parameter's memory, and the file in which its bytes wait while it has none.

    Bytes go through memory of their own: torch gives none back that an array of numpy has seen.
    """

    storage: torch.UntypedStorage
    path: Path
    nbytes: int

    def write(self) -> None:
        """Put the bytes into the file, and give the memory back."""
        part = scratch()
        with self.path.open("wb") as file:
            for start in range(0, self.nbytes, len(part)):
                there = self._bytes()[start : start + len(part)]
                part[: len(there)].copy_(there)
                file.write(part[: len(there)].numpy().data)
        self.storage.resize_(0)

    def read(self) -> None:
        """Get memory, and the bytes from the file."""
        self.storage.resize_(self.nbytes)
        part = scratch()
        held = Held(self.path, self.path.name, (self.nbytes,), torch.uint8, 0, (1,))
        there, done = self._bytes(), 0
        for read in held.chunks(part):
            there[done : done + len(read)].copy_(read)
            done += len(read)

    def _bytes(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)


class _Away(TorchFunctionMode):
    """While a model is built, only those of its parameters are in memory that were used last.

    Args:
        folder: For their files.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        # By the address of what holds the memory, which is kept, so that no other has the same.
        self._slots: dict[int, _Slot] = {}
        self._here: set[int] = set()

    @contextlib.contextmanager
    def open(self) -> Iterator[_Away]:
        """Look at all that is built meanwhile; then all parameters are in their files."""
        hook = register_module_parameter_registration_hook(self._registered)
        try:
            with self:
                yield self
        finally:
            hook.remove()
        self._keep(set())

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Whatever is done with tensors: parameters among them are fetched first."""
        kwargs = kwargs or {}
        # Properties (shape, dtype, data) tell nothing of values.
        if getattr(func, "__name__", "") != "__get__":
            used = {tensor.untyped_storage()._cdata for tensor in _tensors((*args, *kwargs.values()))}
            if used := used & self._slots.keys():
                self._keep(used)
        return func(*args, **kwargs)

    def files(self, name: str, model: PreTrainedModel, names: Names) -> BlockFiles:
        """Where a model's parameters lie, which then are on the meta device."""
        first: dict[Tensor, str] = {}
        tied = {key: first[one] for key, one in model.named_parameters(remove_duplicate=False)
                if first.setdefault(one, key) != key}
        places = {key: Held(self._slots[one.untyped_storage()._cdata].path, key, tuple(one.shape), one.dtype,
                            int(one.storage_offset()) * one.itemsize, one.stride()) for one, key in first.items()}
        empty = {one: nn.Parameter(torch.empty_like(one, device="meta"), one.requires_grad) for one in first}
        for module in model.modules():
            module._parameters.update({key: empty[one] for key, one in module._parameters.items() if one is not None})
        # What was drawn for a weight that then was tied to another one.
        for slot in self._slots.values():
            if slot.path not in {place.path for place in places.values()}:
                slot.path.unlink()
        dtypes: dict[str, torch.dtype] = {key: one.dtype for one, key in first.items()}
        return BlockFiles(name, blocks_of(model, names), places, dtypes, tied, dict.fromkeys(places, 0), (),
                          stamps_of(places), self._folder)

    def _registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None:
            return
        storage = parameter.untyped_storage()
        if storage._cdata not in self._slots:
            path = self._folder / f"parameter-{len(self._slots):05d}"
            self._slots[storage._cdata] = _Slot(storage, path, storage.nbytes())
            self._here.add(storage._cdata)
            self._keep({storage._cdata})

    def _keep(self, wanted: set[int]) -> None:
        """Have these in memory, and no others."""
        with torch._C.DisableTorchFunction():  # what is done here is none of the model's own
            for slot in (self._slots[key] for key in self._here - wanted):
                slot.write()
            give_back()
            for slot in (self._slots[key] for key in wanted - self._here):
                slot.read()
        self._here = wanted


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _root() -> Path:
    return user_cache_path("headcount", appauthor=False) / "control"


def _unwritten(name: str, error: OSError) -> ModelError:
    return ModelError(f"the control of induction, {name} with random weights, could not be written into {_root()} "
                      f"({what_to_do(error)}, or leave the control out (`skip_control`)", fields=("skip_control",))


def _locked(folder: Path) -> FileLock | None:
    """A lock that is held as long as somebody uses a folder; None where the disk has none."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError):
        return None
    return lock


def _remove_abandoned(root: Path) -> None:
    """Remove what processes left that were killed: nobody holds its lock."""
    for lock_file in root.glob("*.lock"):
        lock = FileLock(lock_file)
        with contextlib.suppress(Timeout, OSError, NotImplementedError):
            lock.acquire(timeout=0)
            _remove(lock_file.with_suffix(""), lock)


def _remove(folder: Path, lock: FileLock | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
