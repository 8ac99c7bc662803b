"""Models whose weights stay on the disk, to be read a module at a time, because they do not fit into memory."""

from __future__ import annotations

import os

import psutil
import torch

from headcount.errors import ModelError
from headcount.model.contracts import FAILURES
from headcount.model.placement import dtype_of
from headcount.model.read import quiet, skeleton
from headcount.model.source import find

# The model, the smaller one that is loaded again beside it, and what passes of a few tokens take.
_TIMES = 2.2


def too_large(name: str, revision: str | None, dtype: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a model and its smaller twin do not fit into memory together, by its config, before it is loaded.

    Args:
        name: As `headcount.load` takes it.
        revision: As there.
        dtype: As there.
        trust_remote_code: As there.
    """
    source = find(name, revision)
    if source.gguf is not None:  # four bits and more become 32
        return bool(_TIMES * 8 * os.path.getsize(source.gguf) > psutil.virtual_memory().available)
    try:
        with quiet():
            model = skeleton(source, trust_remote_code=trust_remote_code)
    except (ModelError, *FAILURES, OSError, ImportError):  # of a type that is told when it is loaded
        return False
    wanted = dtype_of(dtype)
    kind = wanted if isinstance(wanted, torch.dtype) else getattr(model.config, "dtype", None) or torch.float32
    needed = sum(p.numel() for p in model.parameters()) * kind.itemsize
    return bool(_TIMES * needed > psutil.virtual_memory().available)
