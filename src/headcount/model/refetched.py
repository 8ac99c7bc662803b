"""Gradients of a model of which some weights lie elsewhere: its graph keeps none that are fetched for each call.

Where a model is larger than its device, accelerate fetches the weights of a module when it is called, and lets go of
them. A graph would keep every one of them on the device until the backward pass. Here it keeps which weight it was, and
fetches it once more (`torch.autograd.graph.saved_tensors_hooks`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headcount.model.offloaded import fetches


@dataclass(frozen=True, eq=False)
class _Fetched:
    """A weight, or a view of one: whose it is, and which part.

    Attributes:
        owner: The module that it belongs to.
        name: What it is called there.
        size: The view's.
        stride: The view's.
        start: Where the view begins, in elements from the weight's first.
    """

    owner: nn.Module
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    start: int

    def again(self) -> Tensor:
        """The view, of the weight as it lies on the device that its module runs on."""
        hook: Any = self.owner._hf_hook
        weight: Tensor = hook.weights_map[self.name].contiguous().to(hook.execution_device)
        return weight.as_strided(self.size, self.stride, weight.storage_offset() + self.start)


@contextlib.contextmanager
def refetched(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let graphs that are made meanwhile keep no weight that is fetched when its module, or block, is called.

    Args:
        model: The model; where all its weights are in memory, nothing changes.
        blocks: Its blocks, which may read weights of their parts without calling them.
    """
    running: list[nn.Module] = []

    def enter(module: nn.Module, *_: Any) -> None:
        running.append(module)

    def leave(*_: Any) -> None:
        running.pop()

    def pack(tensor: Tensor) -> Tensor | _Fetched:
        return _weight_of(running, tensor) or tensor

    def unpack(kept: Tensor | _Fetched) -> Tensor:
        return kept.again() if isinstance(kept, _Fetched) else kept

    fetching = [*dict.fromkeys((*blocks, *filter(fetches, model.modules())))]
    if not any(map(fetches, fetching)):
        yield
        return
    with contextlib.ExitStack() as hooks:
        for module in fetching:
            hooks.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        yield


def _weight_of(running: Sequence[nn.Module], tensor: Tensor) -> _Fetched | None:
    """The fetched weight of which a tensor is a view; None of anything else."""
    storage = tensor.untyped_storage()._cdata
    for module in reversed(running):
        for owner in filter(fetches, module.modules()):
            for name, weight in owner._parameters.items():
                if weight is not None and not weight.is_meta and weight.untyped_storage()._cdata == storage and (
                        weight.is_contiguous()):
                    start = int(tensor.storage_offset()) - int(weight.storage_offset())
                    return _Fetched(owner, name, tensor.shape, tensor.stride(), start)
    return None
