"""By which names a user says where a model runs, and in which type of numbers."""

from __future__ import annotations

import re

import psutil
import torch

from headcount.errors import OptionError

# All weights stay where they lie, and are read a module at a time.
DISK = "disk"
# Over all devices; what they have no room for goes to memory, then to the disk.
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


# What follows a number of bytes.
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Of free memory, what weights may fill: batches need some, too, and a machine's other programs.
_FILLED = {"cpu": 0.9}
_FILLED_ELSEWHERE = 0.95
# Of the host's memory that is free, what may wait between two blocks of a model that is streamed.
_WAITS = 0.25


def bytes_said(text: str | int | None, option: str = "stream_memory") -> int | None:
    """A number of bytes as people write it: 8GB, 500MB, 8GiB.

    Args:
        text: What was written; None where nothing was.
        option: Which option it was written for.

    Raises:
        OptionError: If it is none.
    """
    if text is None or isinstance(text, int):
        return text
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?)(I?)B?", text.strip().upper())
    unit = found[2] if found else ""
    each = 1024 ** (1 + "KMGT".index(unit)) if found and found[3] and unit else _UNITS[f"{unit}B" if unit else ""]
    size = int(float(found[1]) * each) if found and (unit or not found[3]) else 0
    if size < 1 or (not unit and size < _UNITS["KB"]):
        raise OptionError(f"`{option}` {text!r} is no number of bytes: write 8GB or 500MB", fields=(option,))
    return size


def free_memory(device: str | torch.device) -> int:
    """How many bytes of a device's memory are free."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return int(torch.cuda.mem_get_info(kind)[0])
    return int(psutil.virtual_memory().available)


def bytes_told(size: int) -> str:
    """A number of bytes as `bytes_said` reads it, rounded up."""
    unit = next((unit for unit in reversed(_UNITS) if size >= _UNITS[unit]), "")
    tenths = -(-10 * size // _UNITS[unit])
    return f"{tenths / 10:g}{unit or ' bytes'}"


def check_stream(stream: bool, device_map: str | None) -> None:
    """Refuse two places for the same weights.

    Raises:
        OptionError: If a map over devices is given beside `stream`.
    """
    if stream and device_map not in (None, DISK):
        raise OptionError(f"`stream` leaves weights in their files, and `device_map` {device_map} puts them elsewhere: "
                          "give one of them", fields=("stream", "device_map"))


def filled(kind: str) -> float:
    """Which share of the free memory of a kind of device (`cpu`, `cuda`) weights may fill."""
    return _FILLED.get(kind, _FILLED_ELSEWHERE)


def fits(weights: int, device: str) -> bool:
    """Whether so many bytes of weights fit into a device's memory, with some room for batches."""
    return weights <= filled(torch.device(device).type) * free_memory(device)


def may_wait() -> int:
    """How many bytes may wait between two blocks of a model that is streamed, where nobody says."""
    return int(_WAITS * free_memory("cpu"))


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
        if device_map not in (*SPREAD, DISK):
            raise OptionError(f"unknown device map {device_map!r}: use {', '.join((*SPREAD, DISK))}; a single "
                              "device is `device`", fields=("device",))
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
