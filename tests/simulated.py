"""Devices that are not there: tensors of the CPU that say they lie elsewhere, for tests of models on several devices.

Inside `Devices` a tensor moved to a device of the type `maia` (of which PyTorch knows the name alone) becomes an
`Elsewhere` around a tensor of the CPU. Every operation looks where its tensors lie: two places, or one of them and the
CPU, are an error as they are on GPUs, but for single numbers of the CPU and for its indices. So what runs here leaves
no tensor on a wrong device, forwards and backwards. A device may have a capacity in bytes, beyond which it is out of
memory, and kernels of its own, to be wrong with.

To PyTorch's C++ all is on the CPU, since autograd would look for threads of the other device. So moves, which C++ would
not see, are made by functions of ours (`_moved`), in forward and backward passes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from headcount.model.anatomy import find_anatomy

TYPE = "maia"
aten = torch.ops.aten
CPU = torch.device("cpu")
# The CPU's indices of another device's tensor are copied there, as PyTorch does for GPUs.
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# Given an operation and what it computed; gives what the device computes.
Kernel = Callable[[Any, Any], Any]


class Elsewhere(Tensor):
    """A tensor of the CPU that says it lies on another device."""

    devices: Devices
    _inner: tuple[Tensor]
    _device: torch.device

    @staticmethod
    def __new__(
        cls, inner: Tensor, device: torch.device | None = None, devices: Devices | None = None, *,
        requires_grad: bool = False,
    ) -> Tensor:
        if device is None or devices is None:  # called by accelerate as the class of a parameter
            return torch.nn.Parameter(inner, requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        # No tensor among its attributes, as quantised weights have them.
        made._inner, made._device, made.devices = (inner,), device, devices
        return made

    @property
    def inner(self) -> Tensor:
        return self._inner[0]

    @property
    def device(self) -> torch.device:
        return self._device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return args[0].inner.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return _moved(func, *args, **kwargs or {}) if func in _MOVES else func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Reached in other threads alone, in which the mode is not open.
        owner = next(one for one in tree_leaves((args, kwargs)) if isinstance(one, Elsewhere))
        return owner.devices.run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r}, {self.device})"


class Devices:
    """Devices `maia:0`, `maia:1` and so on, there while `open`.

    Args:
        capacity: Bytes of each device by its name; of others, as many as are wanted.
        kernels: Kernels of each device by its name; others compute what the CPU computes.

    Attributes:
        peak: The most bytes that lay on each device at once, by its name.
    """

    def __init__(self, capacity: Mapping[str, int] | None = None, kernels: Mapping[str, Kernel] | None = None) -> None:
        self.capacity, self.kernels = dict(capacity or {}), dict(kernels or {})
        self.peak: Counter[str] = Counter()
        self._live: Counter[tuple[str, int]] = Counter()
        self._bytes: Counter[str] = Counter()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Have the devices."""
        with _Operations(self), _Moves():
            yield

    def run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What an operation gives, on the device on which its tensors lie."""
        kwargs = dict(kwargs)
        here = self._device(func, args, kwargs)
        wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        # C++ asks for the CPU, where `new_zeros` and its like are meant to stay on their tensor's device.
        device = here if wanted is None or (here.type == TYPE and wanted.type != "meta") else wanted
        if func is aten._to_copy.default and wanted is not None:
            device = wanted
        if wanted is not None and wanted.type == TYPE:
            kwargs["device"] = CPU
        plain_args, plain_kwargs = tree_map_only(Elsewhere, lambda one: one.inner, (args, kwargs))
        if func is aten.histc.default:  # of whole numbers, which the CPU does not count and GPUs do
            plain_args = (plain_args[0].float(), *plain_args[1:])
        out = func(*plain_args, **plain_kwargs)
        if device.type != TYPE:
            return out
        if str(device) in self.kernels:
            out = self.kernels[str(device)](func, out)
        wrapped = tree_map_only(Tensor, lambda one: self._wrapped(one, device), out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _device(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> torch.device:
        """Where an operation runs; tensors of two devices are refused."""
        if func in (aten.copy_.default, aten._to_copy.default):
            return torch.device(args[0].device)
        tensors = [one for one in tree_leaves((args[:1] if func in _INDEXED else args, kwargs))
                   if isinstance(one, Tensor)]
        if func in _INDEXED:
            tensors += [one for one in tree_leaves(args[1]) if isinstance(one, Tensor) and one.device != CPU]
        devices = {one.device for one in tensors if one.dim() or one.device != CPU} or {CPU}
        if len(devices) > 1:
            raise RuntimeError(f"expected all tensors of {func} on one device, found {sorted(map(str, devices))}")
        return devices.pop()

    def _wrapped(self, inner: Tensor, device: torch.device) -> Elsewhere:
        made, name, storage = Elsewhere(inner, device, self), str(device), inner.untyped_storage()
        key, size = (name, storage._cdata), storage.nbytes()
        self._live[key] += 1
        if self._live[key] == 1:
            self._bytes[name] += size
        weakref.finalize(made, self._gone, key, size, storage)
        self.peak[name] = max(self.peak[name], self._bytes[name])
        if self._bytes[name] > self.capacity.get(name, self._bytes[name]):
            raise torch.OutOfMemoryError(f"{name} is out of memory")
        return made

    def _gone(self, key: tuple[str, int], size: int, storage: Any) -> None:
        self._live[key] -= 1
        if not self._live[key]:
            self._bytes[key[0]] -= size

    def put(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor on a device."""
        plain = (tensor.inner if isinstance(tensor, Elsewhere) else tensor).detach()
        copied = plain.to(dtype, copy=True)
        return self._wrapped(copied, device) if device.type == TYPE else copied.to(device)


class _Operations(TorchDispatchMode):
    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self.devices = devices
        _open.append(devices)

    def __exit__(self, *exc: Any) -> None:
        _open.remove(self.devices)
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.devices.run(func, args, kwargs or {})


class _Moves(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Functions of PyTorch's C++, of which this one asks no tensor of a class of its own.
        if func is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].inner.tolist()
        return _moved(func, *args, **kwargs or {}) if func in _MOVES else func(*args, **kwargs or {})


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        ctx.before = x.device, x.dtype
        owner = x.devices if isinstance(x, Elsewhere) else _open[-1]
        return owner.put(x, device, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.to(*ctx.before), None, None


_open: list[Devices] = []
_MOVES = (Tensor.to, Tensor.cpu, Tensor.type_as)


def _moved(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What `to`, `cpu` and `type_as` give, whose arguments are looked at here."""
    given = [*args, *(kwargs[name] for name in ("device", "dtype", "other") if kwargs.get(name) is not None)]
    device, dtype = (CPU if func is Tensor.cpu else x.device), x.dtype
    for one in given:
        if isinstance(one, Tensor):
            device, dtype = (one.device if func is Tensor.to else x.device), one.dtype
        elif isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, str | torch.device):
            device = torch.device(one)
    if TYPE not in (device.type, x.device.type):
        with torch._C.DisableTorchFunctionSubclass():
            return func(x, *args, **kwargs)
    if (device, dtype) == (x.device, x.dtype) and not kwargs.get("copy"):
        return x
    moved: Tensor = _Moved.apply(x, device, dtype)
    return moved


def spread(model: PreTrainedModel, places: Sequence[str], folder: Path) -> PreTrainedModel:
    """A model in memory over devices, `cpu` and `disk`, as accelerate does it.

    Args:
        model: The model.
        places: Where each block goes, in turns; what is in no block goes to the first.
        folder: Where the disk is.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = [names[part.block] for part in find_anatomy(model).layers]
    outer = [name for name in names.values() if name and not any(
        block == name or f"{block}.".startswith(f"{name}.") or name.startswith(f"{block}.") for block in blocks)]
    outer = [name for name in outer if not any(name.startswith(f"{other}.") for other in outer)]
    device_map = dict.fromkeys(outer, places[0]) | {b: places[i % len(places)] for i, b in enumerate(blocks)}
    main = next((place for place in places if place.startswith(TYPE)), "cpu")
    # accelerate knows tied weights by their addresses, which tensors that are read later must not get.
    vars(model)["_addresses"] = [parameter.data for parameter in model.parameters()]
    dispatched: PreTrainedModel = dispatch_model(
        model, device_map, main_device=main, offload_dir=folder, force_hooks=True,
        skip_keys=model._skip_keys_device_placement)
    return dispatched
