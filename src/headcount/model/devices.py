"""Devices: which one a model is given its tokens on, arrays onto one without waiting for it, and double precision.

A copy from ordinary memory to a GPU waits until all that the GPU was given before is done. From pinned memory it takes
its place in the queue, so that batches, gates and indices of scored positions follow one another without a gap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def device_of(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of the input embeddings (the one they run on, where they are offloaded)."""
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    return device if device.type != "meta" else torch.device(embeddings._hf_hook.execution_device)


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices that a model runs on; of weights that are fetched for each call, where their modules run."""
    found = {tensor.device for tensor in model.parameters() if not tensor.is_meta}
    hooks: list[Any] = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    found |= {torch.device(hook.execution_device) for hook in hooks if getattr(hook, "offload", False)}
    return sorted(found, key=str)


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device; the array must not be written to afterwards."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def doubled(x: Tensor) -> Tensor:
    """In double precision: on its own device, or on the CPU where that device knows none (Apple's)."""
    return (x.cpu() if x.device.type == "mps" else x).double()
