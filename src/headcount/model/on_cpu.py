"""A model computed on the CPU, wherever its weights lie, and with no more than one block of them in memory for it.

While a block is called, copies of its weights and buffers stand in their places, on the CPU and in the type that is
wanted; so they do of every other module with weights of its own. Modules run by their own `forward`, not by
accelerate's, which would take their inputs to another device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from headcount.model.held import Before, fetched


@contextlib.contextmanager
def on_cpu(model: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run a model on the CPU; inputs must lie there, and outputs do.

    Args:
        model: The model.
        blocks: Its blocks, which may read weights of their parts without calling them.
        dtype: The type in which weights that are narrower compute; None: each in its own.
    """
    inside = {module for block in blocks for module in block.modules()}
    with contextlib.ExitStack() as undone:
        for module in model.modules():
            own = vars(module)
            if "_old_forward" in own:
                undone.callback(own.__setitem__, "forward", own["forward"])
                own["forward"] = own["_old_forward"]
        for unit in (*blocks, *(module for module in model.modules() if module not in inside)):
            copies = _Copies([*unit.modules()] if unit in inside else [unit], dtype)
            undone.callback(copies.remove)
            undone.callback(unit.register_forward_pre_hook(copies.put, prepend=True).remove)
            undone.callback(unit.register_forward_hook(copies.remove, always_call=True).remove)
        yield


class _Copies:
    """Copies of the tensors of some modules, in their places while these run.

    Args:
        owners: The modules.
        dtype: As in `on_cpu`.
    """

    def __init__(self, owners: Sequence[nn.Module], dtype: torch.dtype | None) -> None:
        self.owners, self.dtype = owners, dtype
        self._before: list[Before] = []

    def put(self, _: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Put them there, and inputs where they are: Llama-4 sends them to the device of its own weights before."""
        stored = {(weight.owner, weight.name): weight.value for weight in fetched(*self.owners, inside=False)}
        for owner in self.owners:
            places: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers, vars(owner))
            for place in places:
                for name, tensor in [*place.items()]:
                    if isinstance(tensor, Tensor):
                        self._before.append((place, name, tensor))
                        place[name] = self._copy(tensor, stored.get((owner, name), tensor))
        return send_to_device(inputs, "cpu")

    def remove(self, *_: Any) -> None:
        """Put the model's own back."""
        while self._before:
            place, name, own = self._before.pop()
            place[name] = own

    def _copy(self, own: Tensor, stored: Tensor) -> Tensor:
        here = stored.detach().to("cpu")
        if self.dtype is not None and here.is_floating_point():
            here = here.to(torch.promote_types(here.dtype, self.dtype))
        return nn.Parameter(here, requires_grad=False) if isinstance(own, nn.Parameter) else here
