"""Devices that a study can be planned on: what their makers say they compute and hold, and what is assumed of them.

Peaks are the makers' data sheets' for dense matrix products, of the type of numbers that the model has; float32 is
computed without TF32, as PyTorch does by default. Which share of the peak a study reaches is assumed, not measured, and
said beside every result; so is how fast weights are read. `cpu` is the machine that the plan is made on: a matrix
product of the model's shape is timed there, for a tenth of a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from headcount.errors import OptionError
from headcount.model.placement import filled, free_memory, may_wait
from headcount.model.speed import matrix_products

# Which share of a GPU's peak a study is assumed to reach, and of this machine's matrix products.
GPU_EFFICIENCY, CPU_EFFICIENCY = 0.4, 0.8
# Bytes a second that weights are assumed to be read at, where a model is streamed: an NVMe disk's.
READ_SPEED = 3e9
# Bytes of a host's memory that hidden states are assumed to wait in, where a model is streamed.
WAITING = 64e9
# Seconds that a job takes beside its operations, for prompts, batches and tables: studies of SmolLM2 of 11 to 104 jobs,
# with one thread (.15 would do) and with two (.25).
JOB_SECONDS = 0.2
_COUNTED = re.compile(r"(\d+)x(.+)")


@dataclass(frozen=True)
class Device:
    """One kind of device, and how many of them.

    Attributes:
        name: As the user names it.
        memory: Bytes of each; of this machine, what is free.
        peak: FLOP/s of each by the type of numbers.
        efficiency: The share of the peak that is assumed to be reached.
        source: Where the peak comes from.
        number: How many there are.
        kind: As torch names it.
        waiting: Bytes of the host's memory that hidden states may wait in, where a model is streamed.
        read_speed: Bytes a second that weights are read at, where a model is streamed.
    """

    name: str
    memory: float | int
    peak: Mapping[str, float] = field(hash=False)
    efficiency: float
    source: str
    number: int = 1
    kind: str = "cuda"
    waiting: float | int = WAITING
    read_speed: float | int = READ_SPEED

    @property
    def usable(self) -> float:
        """Bytes of each that weights and activations may take."""
        return self.memory * filled(self.kind)

    def flops(self, dtype: str) -> float:
        """FLOP/s that are assumed of one of them."""
        return self.peak.get(dtype, self.peak["float32"]) * self.efficiency


def _gpu(name: str, title: str, memory: float, half: float, single: float) -> Device:
    return Device(name, memory, {"bfloat16": half, "float16": half, "float32": single}, GPU_EFFICIENCY,
                  f"NVIDIA's data sheet of the {title}")


_GPUS = {device.name: device for device in (
    _gpu("h200", "H200 SXM, 141 GB", 141e9, 989.4e12, 66.9e12),
    _gpu("h100", "H100 SXM, 80 GB", 80e9, 989.4e12, 66.9e12),
    _gpu("a100", "A100 SXM, 80 GB", 80e9, 311.9e12, 19.5e12),
    _gpu("4090", "GeForce RTX 4090, 24 GB", 24e9, 165.2e12, 82.6e12),
)}
NAMES = (*_GPUS, "cpu")


def device_of(name: str, width: int, inner: int, dtype: str) -> Device:
    """A device by its name, such as `h100`, `8xh100` or `cpu`.

    Args:
        name: As the user gave it.
        width: The model's width, for timing this machine.
        inner: The width of its FFNs, for the same.
        dtype: The type of the model's numbers.

    Raises:
        OptionError: If there is none of this name.
    """
    counted = _COUNTED.fullmatch(name.lower())
    number, kind = (int(counted[1]), counted[2]) if counted else (1, name.lower())
    if kind == "cpu" and number > 1:
        raise OptionError(f"`on` {name!r}: `cpu` is this machine, of which there is one", fields=("on",))
    if kind not in NAMES or number < 1:
        close = difflib.get_close_matches(kind, NAMES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise OptionError(f"`on` names devices of {', '.join(NAMES)}, several as 8xh100, not {name!r}{hint}",
                          fields=("on",))
    one = _GPUS[kind] if kind in _GPUS else _here(width, inner, dtype)
    return dataclasses.replace(one, name=name.lower(), number=number)


def _here(width: int, inner: int, dtype: str) -> Device:
    """This machine, timed."""
    rate = matrix_products(width, inner, getattr(torch, dtype))
    threads = torch.get_num_threads()
    return Device("cpu", free_memory("cpu"), {dtype: rate, "float32": rate}, CPU_EFFICIENCY,
                  f"matrix products timed just now, {threads} of {os.cpu_count()} cores", 1, "cpu", may_wait())
