"""One engine per loaded model: what it finds out is found out once, when it is needed, and gone with the model."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

import families
from headcount.engine import budget as budgets
from headcount.engine import engine as engines
from headcount.engine.encode import Request
from headcount.engine.engine import Engine
from headcount.engine.layout import Layout
from headcount.engine.pack import Budget, Cost
from headcount.errors import OptionError
from headcount.masks import Mask
from headcount.model.load import LoadedModel, wrap


def documents(number: int = 3) -> list[list[Request]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(number):
        context = rng.integers(4, families.VOCAB, 9)
        options = [rng.integers(4, families.VOCAB, n) for n in (1, 2)]
        made.append([Request(np.concatenate([context, o])[:-1], o) for o in options])
    return made


@pytest.fixture
def loaded() -> LoadedModel:
    return wrap(families.tiny("llama"), families.reader())


def test_a_model_has_one_engine_and_a_copy_has_another(loaded: LoadedModel) -> None:
    engine = Engine.of(loaded)
    assert Engine.of(loaded) is engine
    copy = dataclasses.replace(loaded, name="another")
    assert Engine.of(copy) is not engine
    assert Engine.of(copy).layout is not engine.layout


def test_an_engine_keeps_no_model_alive() -> None:
    model = wrap(families.tiny("llama"), families.reader())
    engine, gone = Engine.of(model), weakref.ref(model.model)
    full = Mask.full(model.anatomy.heads_per_layer)
    engine.loglikelihoods(documents(), [full, full.without_ffns([0])])
    engine.gradients([d[0] for d in documents()])
    gc.disable()  # without looking for circles
    try:
        del model, engine
        assert gone() is None
    finally:
        gc.enable()


def test_everything_is_found_out_once_and_when_it_is_needed(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done: list[str] = []

    def watched(room: object, name: str) -> None:
        own = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *args: done.append(name) or own(*args))

    for room, name in ((engines, "probe"), (engines, "verify"), (engines, "verify_scoring"), (engines, "verify_sweep"),
                       (budgets, "measure_cost")):
        watched(room, name)
    engine = Engine.of(loaded)
    full = Mask.full(loaded.anatomy.heads_per_layer)
    assert done == []
    packed = engine.pack(documents(), Budget())
    proved = ["verify", "verify_scoring", "probe"]
    assert (done, packed.num_requests, packed.layout) == (proved, 6, engine.layout)
    engine.loglikelihoods(packed)
    engine.gradients([d[0] for d in documents()], budget=Budget())
    assert done == proved
    engine.loglikelihoods(packed, [full, full.without_ffns([0])])
    assert done == [*proved, "verify_sweep"]
    engine.budget(100)
    engine.pack(documents())
    assert all(contract.holds for contract in [*engine.contracts, *engine.contracts, engine.sweep_contract])
    assert done == [*proved, "verify_sweep", "measure_cost"]


def test_requests_may_be_packed_before_or_not(loaded: LoadedModel) -> None:
    engine = Engine.of(loaded)
    packed = engine.pack(documents())
    np.testing.assert_array_equal(engine.loglikelihoods(packed).loglikelihoods,
                                  engine.loglikelihoods(documents()).loglikelihoods)
    single = engine.pack(documents(), trees=False)
    assert (packed.layout.trees, single.layout.trees, single.layout.reason) == (True, False, "asked for")
    assert single.tokens == sum(b.ids.size for b in single.batches)
    assert engine.speed(packed).tokens_per_second > 0


def test_trees_that_a_model_does_not_take_are_refused() -> None:
    engine = Engine.of(wrap(families.tiny("bloom"), families.reader()))
    with pytest.raises(OptionError, match="cannot be laid out as trees: the model takes no position_ids"):
        engine.pack(documents(), trees=True)


def test_a_budget_takes_what_is_asked_for(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.of(loaded)
    monkeypatch.setitem(vars(engine), "_budget", Budget(None, 10, 20, 30, Cost(1, 2)))
    monkeypatch.setitem(vars(engine), "layout", Layout(False, ""))
    assert engine.budget() == Budget(None, 10, 20, 30, Cost(1, 2))
    assert engine.budget(5) == Budget(5, 10, 20, 30, Cost(1, 2))
    assert engine.budget(None, 7) == Budget(None, 7, 7, 30, Cost(1, 2))
    assert engine.budget(5, 7) == Budget(5, 7, 7), "nothing that was timed"


def test_progress_is_the_packed_tokens_times_the_masks(loaded: LoadedModel) -> None:
    engine = Engine.of(loaded)
    full = Mask.full(loaded.anatomy.heads_per_layer)
    packed = engine.pack(documents(), Budget(1, 25))
    assert len(packed.batches) > 1
    for masks in ([full], [full, full.without_ffns([0]), full.without_heads([(1, 1)])]):
        told: list[int] = []
        engine.loglikelihoods(packed, masks, progress=told.append)
        assert sum(told) == packed.tokens * len(masks)
        assert min(told) > 0
