"""The layer sweep computes what one hooked forward pass per mask computes, and no layer twice."""

from __future__ import annotations

import dataclasses
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from families import FAMILIES, third_contract, tokens
from families import tiny as family_model
from headcount.engine import sweep as schedule
from headcount.engine.blocks import entered, finished, learned
from headcount.engine.engine import Engine
from headcount.engine.pack import Budget
from headcount.engine.step import State, Stepped, step
from headcount.engine.sweep import Sweep, fewest_first
from headcount.masks import Mask, all_heads, blocks_run, prune, random_order, ways
from headcount.measure.evaluate import evaluate
from headcount.model.anatomy import Anatomy, find_anatomy
from headcount.model.contracts import ContractResult
from headcount.model.hooks import ablated
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Task

ROWS, POSITIONS = torch.tensor([0, 0, 1]), torch.tensor([3, 8, 8])


def inputs() -> dict[str, torch.Tensor]:
    ids = tokens(2, 9)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def every_kind(anatomy: Anatomy) -> list[Mask]:
    """Each head off, each FFN off, whole layers off, everything off, curves, and one mask twice."""
    full = Mask.full(anatomy.heads_per_layer)
    heads = [(layer, h) for layer, n in enumerate(anatomy.heads_per_layer) for h in range(n)]
    layers = range(anatomy.num_layers)
    masks = [full, *(full.without_heads([h]) for h in heads), *(full.without_ffns([layer]) for layer in layers)]
    for layer in layers:
        whole = full.without_heads(h for h in heads if h[0] == layer)
        masks += [whole, whole.without_ffns([layer]), whole.without_ffns(layers)]
    for component, n in (("head", anatomy.num_heads), ("ffn", anatomy.num_layers)):
        masks += [prune(anatomy.heads_per_layer, component, random_order(n, 0), f) for f in (0.3, 0.6, 1.0)]
    return [*masks, full.without_heads(heads).without_ffns(layers), full]


def swept(model: torch.nn.Module, anatomy: Anatomy, masks: list[Mask]) -> tuple[list[torch.Tensor], Sweep]:
    sweep = Sweep(model, anatomy)
    found: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for owners, logits in sweep.logits(inputs(), masks, ROWS, POSITIONS):
            for i in owners:
                assert i not in found, "every mask once"
                found[i] = logits
    return [found[i] for i in range(len(masks))], sweep


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sweep_is_one_forward_pass_per_mask(family: str) -> None:
    model = family_model(family)
    anatomy = find_anatomy(model)
    masks = every_kind(anatomy)
    found, sweep = swept(model, anatomy, masks)
    for i, mask in enumerate(masks):
        with torch.no_grad(), ablated(anatomy, mask):
            expected = model(**inputs(), use_cache=False).logits[ROWS, POSITIONS]
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert sweep.layer_tokens == 18 * blocks_run(masks)
    assert third_contract(family).holds
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("types", [["full_attention"] * 6, ["sliding_attention", "full_attention"] * 3])
def test_branches_keep_what_later_layers_read_apart(types: list[str]) -> None:
    """The last two of six layers use keys and values of earlier ones, which the model passes on in one object."""
    from transformers import AutoModelForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma4TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=16, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96, sliding_window=4, num_kv_shared_layers=2, layer_types=types)).eval()
    anatomy = find_anatomy(model)
    everything = every_kind(anatomy)
    # Groups whose layers have no heads at all are no reason to skip what those layers keep.
    headless = [mask for mask in everything if not mask.heads[3].any()]
    assert len(headless) > 3
    for masks in (everything, headless, everything[::-1], everything[5:9]):
        found, _ = swept(model, anatomy, masks)
        for mask, logits in zip(masks, found, strict=True):
            with torch.no_grad(), ablated(anatomy, mask):
                expected = model(**inputs(), use_cache=False).logits[ROWS, POSITIONS]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_the_oracles_share_what_the_design_says(layers: int) -> None:
    anatomy = tiny.loaded("opt", layers=layers).anatomy
    full = Mask.full(anatomy.heads_per_layer)
    ffns = [full, *(full.without_ffns([layer]) for layer in range(layers))]
    assert blocks_run(ffns) / layers == (layers + 1) / 2
    heads = [full.without_heads([(layer, h)]) for layer in range(layers) for h in range(4)]
    # Each head's branch begins at its layer's output projection; the trunk runs once.
    assert blocks_run([full, *heads]) / layers == 4 * (layers + 1) / 2 + 1
    assert blocks_run([full, full]) == layers
    _, sweep = swept(tiny.loaded("opt", layers=layers).model, anatomy, ffns)
    assert sweep.layer_tokens == 18 * layers * (layers + 1) / 2


def layer_by_layer(model: torch.nn.Module, anatomy: Anatomy, masks: list[Mask]) -> tuple[list[torch.Tensor], int]:
    """Another schedule of the same step: all branches through one layer, then through the next."""
    blocks = learned(model, anatomy, inputs()["input_ids"])
    hidden, calls = entered(model, blocks, inputs())
    branches = [(list(range(len(masks))), State(hidden))]
    positions = 0
    for layer, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        following = []
        for owners, state in branches:
            parted = ways(masks, owners, layer)
            for stepped in step(block, state, call, fewest_first(parted)):
                following.append((parted[stepped.way], stepped.state))
                positions += stepped.positions
        branches = following
    leaves = [(owners, state.hidden[ROWS, POSITIONS]) for owners, state in branches]
    found = {i: logits for owners, logits in finished(model, blocks, leaves) for i in owners}
    return [found[i] for i in range(len(masks))], positions


@pytest.mark.parametrize("family", FAMILIES)
def test_another_schedule_of_the_same_step_gives_the_same_bits(family: str) -> None:
    model = family_model(family)
    anatomy = find_anatomy(model)
    masks = every_kind(anatomy)
    found, sweep = swept(model, anatomy, masks)
    with torch.no_grad():
        other, positions = layer_by_layer(model, anatomy, masks)
    assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    assert positions == sweep.layer_tokens


def test_a_step_lets_go_of_what_it_was_given_before_its_last_way_is_told() -> None:
    loaded = tiny.loaded("opt")
    full = Mask.full(loaded.anatomy.heads_per_layer)
    parted = ways([full, full.without_heads([(0, 1)]), full.without_ffns([0])], range(3), 0)
    with torch.no_grad():
        blocks = learned(loaded.model, loaded.anatomy, inputs()["input_ids"])
        hidden, calls = entered(loaded.model, blocks, inputs())
        waits = weakref.ref(hidden)
        steps = step(blocks[0], State(hidden), calls[0], list(parted))
        del hidden
        alive = [(next(steps).positions, waits() is not None) for _ in parted]
    assert alive == [(18, True), (18, True), (0, False)]


def test_few_hidden_states_wait_however_many_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny.loaded("opt", layers=6)
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(stepped: Stepped) -> Stepped:
        nonlocal most
        made.append(weakref.ref(stepped.state.hidden))
        most = max(most, sum(ref() is not None for ref in made))
        return stepped

    monkeypatch.setattr(schedule, "step", lambda *args: map(watched, step(*args)))
    full = Mask.full(loaded.anatomy.heads_per_layer)
    heads = [full.without_heads([h]) for h in all_heads(loaded.anatomy.heads_per_layer)]
    random = [prune(loaded.anatomy.heads_per_layer, "head", random_order(24, i), 0.5) for i in range(64)]
    for masks in (heads, random, [*heads, *random, full]):
        made.clear()
        most = 0
        swept(loaded.model, loaded.anatomy, masks)
        assert 1 <= most <= 2 + math.log2(len(masks))


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return get_tasks(["piqa"], data=tiny.write_task(tmp_path))["piqa"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_evaluations_are_those_of_one_pass_per_mask(
    task: Task, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny.loaded(family)
    masks = every_kind(loaded.anatomy)
    engine = Engine.of(loaded)
    assert engine.sweep_contract.holds
    shared = evaluate(loaded, task, masks, num_fewshot=1, limit=4)
    monkeypatch.setitem(vars(engine), "sweep_contract", ContractResult("", False, 1.0, "planted"))
    assert engine.masks_reason == "one forward pass each: planted"
    plain = evaluate(loaded, task, masks, num_fewshot=1, limit=4)
    np.testing.assert_allclose(shared.gold_loglikelihood, plain.gold_loglikelihood, atol=1e-4)
    assert (shared.prediction == plain.prediction).all()
    assert plain.layer_tokens == plain.tokens * loaded.anatomy.num_layers
    assert shared.layer_tokens * len(masks) * 3 == plain.layer_tokens * blocks_run(masks)


def test_a_model_that_cannot_be_swept_runs_a_pass_per_mask(task: Task) -> None:
    """Blocks that keep what they saw for one another, outside their arguments, are found out."""
    loaded = tiny.loaded("llama", seed=5)
    first, last = loaded.anatomy.layers[0].block, loaded.anatomy.layers[-1].block
    seen: list[torch.Tensor] = []

    def remember(module: object, args: object, output: torch.Tensor) -> None:
        seen[:] = [output]

    def recall(module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + seen[0]

    # What heads wrote is added once more at the end: nothing where all are off, as the other contracts want it.
    handles = [loaded.anatomy.layers[1].out_proj.register_forward_hook(remember),
               last.register_forward_hook(recall), first.register_forward_hook(lambda *_: None)]
    try:
        contract = Engine.of(loaded).sweep_contract
        assert not contract.holds
        assert contract.worst_error > 1e-3
        full = Mask.full(loaded.anatomy.heads_per_layer)
        measured = evaluate(loaded, task, [full, full.without_ffns([0])], limit=2)
        assert measured.layer_tokens == measured.tokens * 3
    finally:
        for handle in handles:
            handle.remove()


def test_what_was_replaced_is_put_back(task: Task) -> None:
    loaded = tiny.loaded("llama", seed=6)
    block = loaded.anatomy.layers[1].block
    own = block.forward

    def forward_of_its_own(*args: object, **kwargs: object) -> object:
        """As accelerate leaves one on a block."""
        return own(*args, **kwargs)

    block.forward = forward_of_its_own
    masks = every_kind(loaded.anatomy)
    evaluate(loaded, task, masks, limit=1)
    assert block.__dict__["forward"] is forward_of_its_own
    loaded.anatomy.layers[2].out_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(loaded, task, masks, limit=1)
    assert block.__dict__["forward"] is forward_of_its_own
    assert "forward" not in loaded.anatomy.layers[0].block.__dict__
    assert "forward" not in loaded.anatomy.layers[2].attention.__dict__


def test_contract_three_is_proved_when_masks_are_first_swept(task: Task) -> None:
    loaded = dataclasses.replace(tiny.loaded("llama", seed=7))
    engine = Engine.of(loaded)
    full = Mask.full(loaded.anatomy.heads_per_layer)
    evaluate(loaded, task, limit=1, budget=Budget())
    evaluate(loaded, task, [full.without_ffns([1])], limit=1, budget=Budget())
    assert engine.masks_reason is None, "one mask is not swept"
    evaluate(loaded, task, [full, full.without_ffns([1])], limit=1, budget=Budget())
    assert engine.masks_reason == "layers before the first difference are shared"
