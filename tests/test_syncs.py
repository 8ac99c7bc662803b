"""How often the host waits for the device: never per layer, so that a GPU's queue does not run dry.

Counted on a CPU: reading a number off a tensor, and copying one to the host. On a GPU each waits for all that was
queued before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from headcount.engine.encode import Request
from headcount.engine.engine import Engine
from headcount.engine.pack import Budget
from headcount.masks import Mask, prune, random_order

aten = torch.ops.aten
READ = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select, aten._unique2}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Reads(TorchDispatchMode):
    """Operations whose result the host must know."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        by_flags = packet in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        if packet in READ or by_flags:
            self.found[packet.__name__] += 1
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Copies to the host, which are none on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "tolist"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits(work: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
    """Reads and copies, once what is found out about a model is found out."""
    work()
    with Reads() as reads, Copies() as copies:
        work()
    return reads.found, copies.found


def documents(number: int) -> list[list[Request]]:
    rng = np.random.default_rng(0)
    return [[Request(ids, ids[-3:]) for ids in rng.integers(5, tiny.VOCAB, (4, 30))] for _ in range(number)]


def engine_of(family: str, layers: int) -> tuple[Engine, Sequence[int]]:
    loaded = tiny.loaded(family, layers=layers)
    return Engine.of(loaded), loaded.anatomy.heads_per_layer


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_waits_do_not_grow_with_layers(family: str) -> None:
    found = []
    for layers in (2, 4):
        engine, heads = engine_of(family, layers)
        budget = Budget(row_tokens=128, batch_tokens=256, gradient_tokens=64)
        packed = engine.pack(documents(6), budget)
        assert len(packed.batches) > 1
        order = random_order(sum(heads), 0)
        curve = [prune(heads, "head", order, step / 10) for step in range(5)]
        examples = [doc[0] for doc in documents(6)]
        found.append([waits(lambda p=packed, e=engine: e.loglikelihoods(p)),
                      waits(lambda p=packed, e=engine, c=curve: e.loglikelihoods(p, c)),
                      waits(lambda x=examples, e=engine, b=budget: e.gradients(x, budget=b))])
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_scores_are_copied_once(family: str) -> None:
    engine, heads = engine_of(family, 2)
    packed = engine.pack(documents(6), Budget(row_tokens=128, batch_tokens=256))
    masks = [Mask.full(heads), Mask.full(heads).without_ffns([0]), Mask.full(heads).without_ffns([1])]
    for some in (masks[:1], masks):
        reads, copies = waits(lambda some=some: engine.loglikelihoods(packed, some))
        # Log-probabilities, and which are the most probable.
        assert copies == {"cpu": 2}
        # transformers looks whether positions are packed, in each pass of the output layer.
        assert reads.total() <= len(some) * len(packed.batches)


def test_waits_are_seen() -> None:
    x = torch.arange(4.0)
    for work, of in ((lambda: x.sum().item(), 0), (lambda: x[x > 1], 0), (lambda: bool((x > 1).all()), 0),
                     (lambda: x.nonzero(), 0), (lambda: x.cpu(), 1), (lambda: x.tolist(), 1)):
        assert waits(work)[of].total() == 1
