"""Computing in float32 with weights of a coarser type, a module at a time.

In bfloat16 two computations of the same thing differ by so much that a wrong head can hide among it. So what is proved
is proved in float32: before a module runs, its own weights and buffers are fetched (from the disk, where they lie
there) and made float32; after it ran it gets back what it had. A family's own modules may read the weights of those
right inside them without calling them (DBRX's experts), so that these are made float32 with them. No more than one
module's weights are held twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headcount.engine.blocks import replaced
from headcount.model.held import HeldWhileCalled, give_back
from headcount.model.offloaded import present

# Weights of more numbers are cast some rows at a time.
_LARGE, _ROWS = 2**26, 2**12
Kept = list[tuple[Any, str, Any]]


@contextlib.contextmanager
def in_float32(*models: nn.Module) -> Iterator[None]:
    """Run these modules, and all in them, with weights made float32; nothing is done where they are that already."""
    held: set[int] = set()
    with contextlib.ExitStack() as undo:
        for model in models:
            if all(p.dtype in (torch.float32, torch.float64) for p in model.parameters()):
                continue
            for module in model.modules():
                if isinstance(getattr(module, "_hf_hook", None), HeldWhileCalled):
                    undo.enter_context(replaced({module: module.__dict__["_old_forward"]}))
                if type(module) is nn.Embedding:  # a look-up is exact, so that only its output is cast
                    undo.callback(module.register_forward_hook(lambda _, args, output: as_float32(output)).remove)
                elif type(module) is nn.Linear and module.weight.numel() > _LARGE:
                    undo.enter_context(_by_rows(module))
                elif any(p.is_floating_point() for one in _read_by(module) for p in _own(one).values()):
                    undo.enter_context(_cast(module, held))
        yield


def as_float32(value: Any) -> Any:
    """Tensors of a coarser type than float32 made float32, also in tuples; what may be written into stays as it is."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.itemsize < 4 else value
    return tuple(map(as_float32, value)) if type(value) is tuple else value


def _read_by(module: nn.Module) -> list[nn.Module]:
    """A module, and those right inside it whose weights it may read itself: those that are not PyTorch's."""
    if type(module).__module__.startswith("torch."):
        return [module]
    return [module, *(child for child in module.children() if not type(child).__module__.startswith("torch."))]


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


@contextlib.contextmanager
def _by_rows(module: nn.Linear) -> Iterator[None]:
    """A large projection, such as an output layer's, computed some rows at a time."""
    outer = module.__dict__.get("forward")

    def forward(hidden: Tensor) -> Tensor:
        with present(module):
            weight, bias = module.weight.detach(), module.bias
            parts = [nn.functional.linear(hidden, weight[i : i + _ROWS].float(),
                                          None if bias is None else bias.detach()[i : i + _ROWS].float())
                     for i in range(0, len(weight), _ROWS)]
        return torch.cat(parts, dim=-1)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if outer is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = outer


@contextlib.contextmanager
def _cast(module: nn.Module, held: set[int]) -> Iterator[None]:
    """Hooks on one module; its forward is its own, not accelerate's, which would fetch the coarse weights again.

    Args:
        module: The module.
        held: Modules whose weights are float32 now, by `id`; what is called from within another may be.
    """
    kept: Kept = []
    calls, mine = 0, set[int]()
    inner: Callable[..., Any] | None = module.__dict__.get("_old_forward")

    def before(called: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        for one in _read_by(called):
            if id(one) not in held:
                held.add(id(one))
                mine.add(id(one))
                kept.extend(_made_float32(one))

    def after(called: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls
        calls -= 1
        if not calls:  # it may be called from within itself
            restore()

    def restore() -> None:
        for where, name, value in kept:
            where[name] = value
        held.difference_update(mine)
        kept.clear()
        mine.clear()
        if inner is not None:  # weights came from the disk: what they took would be kept for others of their size
            give_back()

    handles = [module.register_forward_pre_hook(before, prepend=True),
               module.register_forward_hook(after, always_call=True)]
    outer = module.__dict__.get("forward")
    try:
        if inner is not None:
            module.__dict__["forward"] = inner
        yield
    finally:
        for handle in handles:
            handle.remove()
        if inner is not None:
            module.__dict__["forward"] = outer
        restore()


def _made_float32(module: nn.Module) -> Kept:
    """Put float32 in the place of a module's own tensors; gives back what was there."""
    with present(module):
        made = {name: value.detach().float() for name, value in _own(module).items() if value.is_floating_point()}
    kept: Kept = []
    wheres: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for where in wheres:
        for name in [name for name in where if name in made]:
            kept.append((where, name, where[name]))
            value = made[name]
            where[name] = nn.Parameter(value, requires_grad=False) if where is wheres[0] else value
    return kept
