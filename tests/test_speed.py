"""Full, masked and removed timed in turns: by a clock that only models move, so that every figure is known."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator

import pytest
import torch

import headcount as hc
import tiny
from headcount.errors import ModelError, OptionError
from headcount.masks import Mask
from headcount.model.hooks import ablated
from headcount.model.load import LoadedModel
from headcount.model.narrowed import Gone
from headcount.removal.cost import flops
from headcount.removal.remove import Removed
from headcount.removal.speed import Side, measured_speed, sides_of

LOSES = ([(0, 0), (1, 1), (1, 2), (1, 3)], [2])


def removed_of(family: str) -> Removed:
    loaded = tiny.loaded(family)
    return hc.remove(loaded, Mask.full(loaded.anatomy.heads_per_layer).without_heads(LOSES[0]).without_ffns(LOSES[1]))


class Clock:
    """Stands still but for what forward passes take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.passes: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def side(self, name: str, loaded: LoadedModel, prefills: list[float], token: float) -> Side:
        """A model whose long passes take these seconds, one after another, and whose passes of a token take `token`."""
        left = iter(prefills)

        def takes(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
            tokens = kwargs["input_ids"].shape[1]
            self.passes.append((name, tokens))
            self.now += {100: lambda: next(left), 1: lambda: token}.get(tokens, lambda: 1000.0)()

        @contextlib.contextmanager
        def ready() -> Iterator[torch.nn.Module]:
            handle = loaded.model.register_forward_pre_hook(takes, with_kwargs=True)
            try:
                yield loaded.model
            finally:
                handle.remove()

        return ready  # type: ignore[return-value]


def test_a_round_runs_every_side_once_and_medians_leave_the_first_out() -> None:
    clock, loaded = Clock(), tiny.loaded("llama")
    sides = {"full": clock.side("full", loaded, [99.0, 4.0, 2.0, 50.0], 0.5),
             "small": clock.side("small", loaded, [99.0, 1.0, 1.0, 8.0], 0.25)}
    found = measured_speed(sides, rounds=3, prefill_tokens=100, prompt_tokens=10, new_tokens=4, clock=clock)
    a_round = [(name, tokens) for name in ("full", "small") for tokens in (100, 10, 1, 1, 1)]
    assert clock.passes == a_round * 4, "in turns, one round to warm up"
    assert found.sides["full"].prefill == 100 / 4.0, "the median of 4, 2 and 50 seconds"
    assert found.sides["small"].prefill == 100 / 1.0
    # What the prompt takes, 1,000 seconds, is no part of decoding.
    assert (found.sides["full"].decode, found.sides["small"].decode) == (2.0, 4.0)
    assert (found.rounds, found.prefill_tokens, found.prompt_tokens, found.new_tokens) == (3, 100, 10, 4)
    assert json.loads(json.dumps(found.to_dict()))["sides"]["small"]["decode"] == 4.0


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox"])
def test_full_masked_and_removed_have_their_parameters_bytes_and_cache(family: str) -> None:
    removed = removed_of(family)
    loaded = removed.plan.loaded
    before = loaded.model(input_ids=torch.arange(9)[None]).logits
    found = measured_speed(sides_of(removed), rounds=1, prefill_tokens=64, prompt_tokens=8, new_tokens=3)
    full, masked, small = (found.sides[name] for name in ("full", "masked", "removed"))
    assert full.parameters == masked.parameters == loaded.anatomy.num_parameters
    assert small.parameters == removed.savings.parameters_left
    assert full.bytes >= 4 * full.parameters
    assert full.bytes - small.bytes == 4 * (full.parameters - small.parameters) - of_gone(removed)
    groups = 2 if family == "llama" else 4
    assert full.cache_bytes == masked.cache_bytes == 3 * 2 * 64 * groups * 8 * 4
    gone = 1 if family == "llama" else 4  # KV groups whose last head went
    assert small.cache_bytes == full.cache_bytes - gone * 2 * 64 * 8 * 4
    assert all(side.peak_bytes == side.bytes + side.cache_bytes for side in (full, masked, small))
    assert not found.peak_measured
    assert all(math.isfinite(x) and x > 0 for side in (full, masked, small) for x in (side.prefill, side.decode))
    assert torch.equal(loaded.model(input_ids=torch.arange(9)[None]).logits, before), "no gate stays"


def of_gone(removed: Removed) -> int:
    """Bytes of the columns and rows of ones that stand where projections were."""
    gone = [module for module in removed.model.model.modules() if type(module) is Gone]
    return 4 * sum(module.weight.numel() for module in gone)


def test_the_masked_side_runs_under_the_mask() -> None:
    removed = removed_of("llama")
    loaded, ids = removed.plan.loaded, torch.arange(9)[None]
    with ablated(loaded.anatomy, removed.mask):
        expected = loaded.model(input_ids=ids).logits
    sides = sides_of(removed)
    with sides["masked"]() as model:
        assert torch.equal(model(input_ids=ids).logits, expected)
    with sides["removed"]() as model:
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)


def test_a_prefill_is_no_longer_than_the_models_window() -> None:
    loaded = tiny.loaded("llama")
    found = measured_speed({"full": lambda: contextlib.nullcontext(loaded.model)}, rounds=1,
                           prefill_tokens=4 * tiny.WINDOW, prompt_tokens=4 * tiny.WINDOW, new_tokens=2)
    assert (found.prefill_tokens, found.prompt_tokens) == (tiny.WINDOW, tiny.WINDOW - 2)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"new_tokens": 1}, {"prefill_tokens": 0}])
def test_nothing_to_time_is_refused(wrong: dict[str, int]) -> None:
    side: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    with pytest.raises(OptionError, match="nothing to time"):
        measured_speed({"full": side}, **wrong)  # type: ignore[dict-item, arg-type]
    with pytest.raises(OptionError, match="nothing to time"):
        measured_speed({})


def test_a_side_that_does_not_run_is_named() -> None:
    loaded = tiny.loaded("llama")

    @contextlib.contextmanager
    def broken() -> Iterator[torch.nn.Module]:
        def fails(*_: object) -> None:
            raise RuntimeError("no such kernel\nand more")

        handle = loaded.model.register_forward_pre_hook(fails)
        try:
            yield loaded.model
        finally:
            handle.remove()

    with pytest.raises(ModelError, match=r"^mine cannot be timed: .* \(no such kernel\)$"):
        measured_speed({"mine": broken}, rounds=1, new_tokens=2)  # type: ignore[dict-item]


def test_promised_arithmetic_is_that_of_the_pass_that_is_timed() -> None:
    """The output layer at one position, not at all of them: of a tiny model that would be nearly all."""
    loaded = tiny.loaded("llama")
    with torch.device("meta"):
        empty = type(loaded.model)(loaded.model.config)
    counted = flops(empty)
    layers, width, inner, tokens = 3, 32, 48, tiny.WINDOW
    projections = 2 * tokens * width * (width + 2 * 16 + width + 3 * inner)
    attention = 2 * 2 * tokens * tokens * width
    assert counted == pytest.approx(layers * (projections + attention) + 2 * width * tiny.VOCAB, rel=0.01)
