"""Models whose weights stay on the disk, to be read a module at a time, because they do not fit into memory."""

from __future__ import annotations

import os

import psutil
from torch import nn

from headcount.model.source import find

# The model, the smaller one that is loaded again beside it, and what passes of a few tokens take.
_TIMES = 2.2


def on_disk(model: nn.Module) -> bool:
    """Whether weights are fetched when they are needed (accelerate's offloading)."""
    return any(p.is_meta for p in model.parameters())


def too_large(name: str, revision: str | None) -> bool:
    """Whether a model's files say that it and its smaller twin do not fit into memory together.

    Args:
        name: As `headcount.load` takes it; of a model on the hub that was not fetched yet nothing is known.
        revision: As there.
    """
    source = find(name, revision)
    sizes = [os.path.getsize(path) for path in source.files if path.suffix != ".json"]
    return bool(_TIMES * sum(sizes) > psutil.virtual_memory().available)
