"""Weights that hold NaN or infinities: which they are, and computing as if they were zeros.

Nothing here is kept: weights get their values back when a block ends, however it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from headcount.masks import Mask
from headcount.model.anatomy import Anatomy, LayerAnatomy
from headcount.model.offloaded import present


def damaged(modules: Iterable[nn.Module], model: nn.Module) -> list[str]:
    """Parameters of modules (and buffers that hold NaN), each with how many of its values are NaN or infinite."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, str] = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        with present(module), torch.no_grad():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if not tensor.is_floating_point() or tensor.device.type == "meta":
                    continue
                bad = ~torch.isfinite(tensor) if isinstance(tensor, nn.Parameter) else torch.isnan(tensor)
                if count := int(bad.sum()):
                    whole = f"{names.get(id(module), '')}.{name}".strip(".")
                    found[whole] = f"{whole} ({count:,} of {tensor.numel():,} values)"
    return list(found.values())


def holds_nan(modules: Iterable[nn.Module]) -> bool:
    """Whether any parameter of these modules holds NaN."""
    for module in (inner for outer in modules for inner in outer.modules()):
        with present(module), torch.no_grad():
            if any(bool(torch.isnan(p).any()) for p in module.parameters(recurse=False)
                   if p.is_floating_point() and p.device.type != "meta"):
                return True
    return False


@contextlib.contextmanager
def removed_heads_blank(anatomy: Anatomy, mask: Mask) -> Iterator[bool]:
    """Zeros for NaN and infinite weights through which removed heads would write, while the block runs.

    A gate writes zeros into a head's output, but 0 times a NaN weight of the output projection is NaN, and these
    weights go with the head.

    Yields:
        Whether there were any. Weights that are not in memory as they are (offloaded, quantised) are not looked at.
    """
    found = False
    with _blanks() as blank:
        for part, kept in zip(anatomy.layers, mask.heads, strict=True):
            weight = by_feature(part)
            if weight is None or kept.all():
                continue
            gone = torch.from_numpy(np.repeat(~kept, part.d_head)).to(weight.device)[:, None]
            found |= blank(weight, gone & ~torch.isfinite(weight))
        yield found


@contextlib.contextmanager
def damage_blank(model: nn.Module) -> Iterator[None]:
    """Zeros for all weights that are NaN or infinite, while the block runs; those that are offloaded stay."""
    with _blanks() as blank:
        for weight in (p.detach() for p in model.parameters() if p.is_floating_point() and p.device.type != "meta"):
            blank(weight, ~torch.isfinite(weight))
        yield


@contextlib.contextmanager
def _blanks() -> Iterator[Callable[[Tensor, Tensor], bool]]:
    """A function that writes zeros where it is told, and says whether it did; undone when the block ends."""
    before: list[tuple[Tensor, Tensor, Tensor]] = []

    def blank(weight: Tensor, where: Tensor) -> bool:
        if found := bool(where.any()):
            before.append((weight, where, weight[where]))
            weight[where] = 0
        return found

    try:
        yield blank
    finally:
        for weight, where, values in before:
            weight[where] = values


def by_feature(part: LayerAnatomy) -> Tensor | None:
    """The output projection's weights, one row for each feature that it reads; None where they are not in the open."""
    weight = getattr(part.out_proj, "weight", None)
    width = part.num_heads * part.d_head
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.device.type == "meta":
        return None
    rows = weight.detach() if hasattr(part.out_proj, "nx") else weight.detach().T
    return rows if rows.shape == (width, part.d_model) else None
