"""Weights of a part of a model held in memory while many batches pass it, where the model's weights lie in files.

A model may leave its weights in their files (`headcount.model.disk`). Then every call of a module fetches its own anew.
Here those of a whole block are fetched once, in another thread if that is wished (`fetched`), and put in place while
something runs (`held`). Meanwhile modules run by their own `forward`, not by accelerate's, which would fetch again. A
plain pass does the same block by block (`hold_blocks`): blocks whose modules read one another's weights without a call
(DBRX, Llama-4) run from files, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from accelerate.utils.modeling import named_module_tensors
from accelerate.utils.offload import PrefixedDataset
from torch import Tensor, nn

from headcount.model.blockfiles import BlockFiles
from headcount.model.disk import InFiles
from headcount.model.offloaded import fetches

# Where something stood, under which name, and what it was.
Before = tuple[dict[str, Any], str, Any]


class Weight(NamedTuple):
    """One tensor, and where it belongs."""

    owner: nn.Module
    name: str
    value: Tensor


def in_files(model: nn.Module) -> bool:
    """Whether all weights of a model stay in their files (`headcount.model.disk`), so that they can be streamed."""
    return _is_fetched(model) and all(place.files is not None for place in _places(model))


def fetched(*modules: nn.Module, memory: Tensor | None = None, inside: bool = True) -> list[Weight]:
    """The weights of some modules; of a model that lies in files they are read whole, into one piece of memory.

    Args:
        modules: The modules.
        memory: The bytes to read into, such as an earlier block's, at least `size` of them; None takes new ones.
        inside: Whether weights of the modules in them are fetched, too.
    """
    parts = [part for module in modules for part in (module.modules() if inside else (module,))]
    places = [place for part in parts for place in _own_places(part)]
    files = next((place.files for place in places if place.files is not None), None)
    if files is None:
        return [Weight(place.owner, place.name, place.weights[place.key]) for place in places]
    read = files.read_named([place.key for place in places], memory)
    return [Weight(place.owner, place.name, read[place.key]) for place in places]


def size(*modules: nn.Module) -> int:
    """How many bytes of memory some modules' weights are read into."""
    places = [place for module in modules for place in _places(module)]
    files = next((place.files for place in places if place.files is not None), None)
    return 0 if files is None else files.bytes_of([place.key for place in places])


class _Place(NamedTuple):
    """Where a tensor belongs, and where it comes from: the map of all that is fetched, and its name there."""

    owner: nn.Module
    name: str
    weights: Mapping[str, Tensor]
    key: str

    @property
    def files(self) -> BlockFiles | None:
        """The files of a model all of whose weights stay there."""
        return self.weights.files if isinstance(self.weights, InFiles) else None


def _places(module: nn.Module) -> Iterator[_Place]:
    return (place for part in module.modules() for place in _own_places(part))


def _own_places(part: nn.Module) -> Iterator[_Place]:
    """The places of what one module fetches when it is called."""
    if not fetches(part):
        return
    hook: Any = part._hf_hook
    weights, prefix = hook.weights_map, ""
    if isinstance(weights, PrefixedDataset):
        weights, prefix = weights.dataset, weights.prefix
    for name, _ in named_module_tensors(part, include_buffers=hook.offload_buffers, recurse=hook.place_submodules,
                                        remove_non_persistent=True):
        owner, _, last = name.rpartition(".")
        yield _Place(part.get_submodule(owner), last, weights, f"{prefix}{name}")


@contextlib.contextmanager
def held(modules: Sequence[nn.Module], weights: Sequence[Weight]) -> Iterator[None]:
    """Put weights in their places, on the devices that the modules run on, while something runs.

    Args:
        modules: The modules that run.
        weights: From `fetched`, of these modules.
    """
    before: list[Before] = []
    try:
        _put(modules, weights, before)
        yield
    finally:
        _undo(before)


class HeldWhileCalled(ModelHook):  # type: ignore[misc]
    """Of a block: all its weights are in memory while it is called.

    Args:
        inner: accelerate's own hook on the block, which knows its device, and fetches what is the block's alone.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._before: list[Before] = []

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The weights are fetched, and arguments are sent to their device."""
        if not self._before:
            _put([module], fetched(module), self._before)
        device = self.inner.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=self.inner.skip_keys)

    def let_go(self) -> None:
        """Take weights out of their places, where they are there: behind every call (`_ended`)."""
        _undo(self._before)


def hold_blocks(blocks: Sequence[nn.Module]) -> None:
    """Let each of a model's blocks hold all its weights while it is called, where all of them are fetched for it."""
    for block in filter(_is_fetched, blocks):
        inner = getattr(block, "_hf_hook", None)
        if isinstance(inner, AlignDevicesHook):
            hook = HeldWhileCalled(inner)
            add_hook_to_module(block, hook)
            block.__dict__["forward"] = _ended(block.__dict__["forward"], hook)


def _ended(forward: Callable[..., Any], hook: HeldWhileCalled) -> Callable[..., Any]:
    """A block's forward, behind which its weights are let go of however it ends: accelerate's hooks know no errors.

    It is no closure: those are not copied with their model.
    """
    return functools.update_wrapper(functools.partial(_call, forward, hook), forward)


def _call(forward: Callable[..., Any], hook: HeldWhileCalled, *args: Any, **kwargs: Any) -> Any:
    try:
        return forward(*args, **kwargs)
    finally:
        hook.let_go()


def _put(modules: Sequence[nn.Module], weights: Sequence[Weight], before: list[Before]) -> None:
    """Put weights in their places, and own forwards; what was there is noted."""
    device = _runs_on(modules)
    for owner, name, value in weights:
        is_parameter = name in owner._parameters
        place: dict[str, Any] = owner._parameters if is_parameter else owner._buffers
        before.append((place, name, place[name]))
        here = value.to(device)
        place[name] = nn.Parameter(here, requires_grad=False) if is_parameter else here
    for part in (part for module in modules for part in module.modules() if "_old_forward" in vars(part)):
        before.append((part.__dict__, "forward", part.__dict__["forward"]))
        part.__dict__["forward"] = part.__dict__["_old_forward"]


def _undo(before: list[Before]) -> None:
    while before:
        place, name, old = before.pop()
        place[name] = old


def one_by_one(blocks: Sequence[nn.Module]) -> Iterator[int]:
    """Go through blocks, whose weights are in memory while their numbers are out; the next one is read meanwhile.

    Yields:
        The number of each block, in the order given. Two blocks are in memory at a time, in turn in two pieces of it.
    """
    room = max(map(size, blocks))
    memory = [torch.empty(room, dtype=torch.uint8, pin_memory=_runs_on(blocks[:1]).type == "cuda") for _ in range(2)]
    with ThreadPoolExecutor(1, thread_name_prefix="headcount-reader") as reader:
        ahead = reader.submit(fetched, blocks[0], memory=memory[0])
        for i, block in enumerate(blocks):
            weights = ahead.result()
            if i + 1 < len(blocks):
                ahead = reader.submit(fetched, blocks[i + 1], memory=memory[(i + 1) % 2])
            with held([block], weights):
                yield i
            del weights
            give_back()


def give_back() -> None:
    """Hand memory that was freed back to the system: glibc keeps what lies between blocks of a few megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _runs_on(modules: Sequence[nn.Module]) -> torch.device:
    """The device on which modules compute whose weights are fetched."""
    return next((torch.device(part._hf_hook.execution_device) for part in _offloaded(modules)),  # type: ignore
                torch.device("cpu"))


def _is_fetched(module: nn.Module) -> bool:
    """Whether all weights of a module are fetched when they are needed."""
    return all(p.is_meta for p in module.parameters()) and bool(_offloaded([module]))


def _offloaded(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules, and those in them, that fetch weights of their own."""
    return [part for module in modules for part in module.modules() if fetches(part)]
