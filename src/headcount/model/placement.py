"""By which names a user says where a model runs, and in which type of numbers."""

from __future__ import annotations

import torch

from headcount.errors import OptionError

# All weights stay where they lie, and are read a module at a time.
DISK = "disk"
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", DISK)


def dtype_of(name: str) -> str | torch.dtype:
    """A type of weights by its name.

    Raises:
        OptionError: If there is none of this name.
    """
    dtype = getattr(torch, name, None)
    if name == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        return dtype or name
    if isinstance(dtype, torch.dtype):
        raise OptionError(f"`dtype` {name} is no type that a model is computed in: use auto, float32, bfloat16 or "
                          "float16", fields=("dtype",))
    raise OptionError(f"unknown `dtype` {name!r}: use auto, float32, bfloat16 or float16", fields=("dtype",))


def placement(device: str | None, device_map: str | None) -> str:
    """Where a model goes, as transformers' `device_map` takes it: a device, or a way to spread over all.

    Args:
        device: A torch device; None: the first GPU, else the CPU.
        device_map: A way to spread, in its place.

    Raises:
        OptionError: If both are given, or what is given is unknown or not here.
    """
    if device is not None and device_map is not None:
        raise OptionError(f"give a device ({device!r}) or a device map ({device_map!r}), not both")
    if device_map is not None:
        if device_map not in _DEVICE_MAPS:
            raise OptionError(f"unknown device map {device_map!r}: use {', '.join(_DEVICE_MAPS)}, or a device")
        return device_map
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return str(accelerator or "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as e:
        raise OptionError(f"unknown device {device!r}: use cpu, cuda, cuda:1 or mps") from e
    if wanted.type != "cpu":
        count = torch.accelerator.device_count() if accelerator is not None and accelerator.type == wanted.type else 0
        if (wanted.index or 0) >= count:
            raise OptionError(f"device {device!r} is not there: PyTorch sees {count} of type {wanted.type}; use cpu")
    return device
