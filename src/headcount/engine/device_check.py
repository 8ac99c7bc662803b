"""Whether a device computes what the CPU computes: the logits of a few tokens, compared once for a model and a device.

A device may be wrong without saying so (Apple's GPUs were, for some kernels), and no proof on the device alone can find
that. The reference is the same model in float32 on the CPU, block by block. What a narrower type explains is found by
the CPU, too, which computes the model in its own type: a device that works is about as far from the reference as the
CPU is then. The error of a position is the root mean square of the differences of its logits, divided by the standard
deviation of all the reference's logits. The device is told of where

    error(device) > max(1e-4, 4 * error(CPU, own type))

at the median position, or at the worst. In float32, and wider, the second is 0. The first number is the project's own
bar for equal logits; how both were chosen stands in docs/design.md. The result is kept, in
`headcount/device_checks.json` in the user's cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from headcount.engine.budget import name_of
from headcount.engine.kept import keep, kept
from headcount.errors import named
from headcount.model.attention import eager
from headcount.model.contracts import FAILURES, probe_tokens
from headcount.model.devices import devices_of
from headcount.model.load import LoadedModel
from headcount.model.on_cpu import on_cpu

_FILE = "device_checks.json"
_FLOOR, _FACTOR = 1e-4, 4.0
# Attention kernels that the CPU has.
_ON_CPU = ("eager", "sdpa", None)


class Apart(NamedTuple):
    """How far logits are from those of the CPU in float32, in standard deviations of these: two positions' errors."""

    median: float
    worst: float

    @property
    def allowed(self) -> Apart:
        """How far a device may be where the CPU is so far in the type of the weights."""
        return Apart(*(max(_FLOOR, _FACTOR * error) for error in self))


_EQUAL = Apart(0.0, 0.0)


@dataclass(frozen=True)
class DeviceCheck:
    """How far a device's logits are from those of the CPU in float32.

    Attributes:
        devices: What was compared, in words.
        found: The device's; None where the CPU does not compute the model.
        of_type: The CPU's in the model's own type.
        reason: Why the CPU does not; empty where it does.
    """

    devices: str
    found: Apart | None
    of_type: Apart = _EQUAL
    reason: str = ""

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> DeviceCheck:
        """What was kept as JSON."""
        found = kept["found"]
        return cls(kept["devices"], None if found is None else Apart(*found), Apart(*kept["of_type"]), kept["reason"])

    def __str__(self) -> str:
        if self.found is None or self.note:
            return self.note
        return (f"on {self.devices} logits are the CPU's, but for {self.found.median:.1g} of their standard "
                f"deviation at the median position ({self.of_type.allowed.median:.1g} is allowed)")

    @property
    def note(self) -> str:
        """What must be said; empty where the device computes what the CPU does."""
        if self.found is None:
            return (f"logits on {self.devices} were not compared with the CPU's, which cannot run the model "
                    f"({self.reason})")
        for where, error, allowed in zip(self.found._fields, self.found, self.of_type.allowed, strict=True):
            if error > allowed:
                return (f"on {self.devices} logits are other than on the CPU: at the {where} position they differ by "
                        f"{error:.1g} of their standard deviation, where the type of the weights explains "
                        f"{allowed:.1g}; take another device, attention kernel or type, or another version of torch")
        return ""


def device_check(loaded: LoadedModel) -> DeviceCheck | None:
    """What was found of a model on its devices, now or earlier; None where it runs on the CPU alone."""
    devices = devices_of(loaded.model)
    if all(device.type == "cpu" for device in devices):
        return None
    names = [f"{device} ({name_of(device)})" for device in devices]
    kernel = loaded.model.config.get_text_config()._attn_implementation
    key = ", ".join(map(str, (loaded.fingerprint, *names, loaded.model.dtype, kernel, f"torch {torch.__version__}",
                              f"transformers {transformers.__version__}")))
    with contextlib.suppress(KeyError, TypeError):
        return DeviceCheck.of(kept(_FILE)[key])
    check = compare(loaded, " and ".join(names))
    keep(_FILE, key, dataclasses.asdict(check))
    return check


@torch.no_grad()
def compare(loaded: LoadedModel, devices: str) -> DeviceCheck:
    """Compare now.

    Args:
        loaded: The model.
        devices: What it runs on, in words.
    """
    first = probe_tokens(loaded.model)
    ids = torch.cat([first, first.flip(1)])
    found = _logits(loaded, ids)
    try:
        expected = _on_cpu(loaded, ids, torch.float32)
        own = _on_cpu(loaded, ids, None) if _narrow(loaded) else expected
    except FAILURES as failure:
        return DeviceCheck(devices, None, reason=named(failure))
    return DeviceCheck(devices, _apart(found, expected), _apart(own, expected))


def _narrow(loaded: LoadedModel) -> bool:
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in loaded.model.parameters())


def _on_cpu(
    loaded: LoadedModel, ids: Int[Tensor, "row pos"], dtype: torch.dtype | None
) -> Float[Tensor, "row pos vocabulary"]:
    kernel = loaded.model.config.get_text_config()._attn_implementation
    blocks = [part.block for part in loaded.anatomy.layers]
    with on_cpu(loaded.model, blocks, dtype), contextlib.nullcontext() if kernel in _ON_CPU else eager(loaded.model):
        return _logits(loaded, ids.cpu())


def _logits(loaded: LoadedModel, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos vocabulary"]:
    logits: Tensor = loaded.model(input_ids=ids, use_cache=False).logits
    return logits.detach().cpu().double()


def _apart(found: Float[Tensor, "row pos vocabulary"], expected: Float[Tensor, "row pos vocabulary"]) -> Apart:
    numbers = torch.isfinite(expected).all((0, 1))  # a model may mask tokens out with -inf
    if not numbers.any():
        return _EQUAL  # told where it is measured
    some = expected[..., numbers]
    errors = (found[..., numbers] - some).square().mean(-1).sqrt().flatten() / some.std().clamp_min(1e-30)
    errors = errors.nan_to_num(torch.inf, torch.inf)
    return Apart(float(errors.median()), float(errors.max()))
