"""Weights that accelerate fetches when a module is called: whether there are any, and having them in memory meanwhile.

They may lie in files (`headcount.model.disk`), or beside a device that they do not fit on (`device_map="auto"`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.utils import align_module_device
from torch import nn


def offloaded(model: nn.Module) -> bool:
    """Whether some of a model's weights are fetched when they are needed."""
    return any(p.is_meta for p in model.parameters())


def fetches(module: nn.Module) -> bool:
    """Whether accelerate fetches a module's own weights when it is called."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


@contextlib.contextmanager
def present(module: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Have a module's own weights in memory: fetched where they are not there, left alone where they are.

    Args:
        module: The module.
        device: Where what is fetched goes; None: where the module runs.
    """
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    with align_module_device(module, device) if any(tensor.is_meta for tensor in own) else contextlib.nullcontext():
        yield
