"""Whether a model's weights lie on the disk, to be read a module at a time."""

from __future__ import annotations

from torch import nn


def on_disk(model: nn.Module) -> bool:
    """Whether weights are fetched when they are needed (accelerate's offloading)."""
    return any(p.is_meta for p in model.parameters())
