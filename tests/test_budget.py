"""What a model is given at once: batches that memory is too small for, timings that are kept."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from headcount.engine import blocks, kept
from headcount.engine import budget as rooms
from headcount.engine.engine import Engine
from headcount.engine.forward import Told, in_memory
from headcount.engine.pack import Batch, Budget, Cost
from headcount.errors import ModelError, OptionError
from headcount.masks import Mask
from headcount.measure.evaluate import evaluate, prepare
from headcount.measure.importance import gradient_importance
from headcount.model.load import LoadedModel
from headcount.study.ledger import Ledger
from headcount.study.prepare import prepare as prepare_study
from headcount.study.runner import run
from headcount.study.spec import StudySpec
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Task


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return get_tasks(["piqa"], data=tiny.write_task(tmp_path / "data"))["piqa"]


@contextlib.contextmanager
def memory_of(loaded: LoadedModel, tokens: int) -> Iterator[list[int]]:
    """A device whose memory ends in the second block when a batch has more tokens than that."""
    failed = []

    def full(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: object) -> None:
        size = (args[0] if args else output[0]).shape[:-1].numel()
        if size > tokens:
            failed.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    # The down-projection is a module of its own in every way of running a block.
    handle = loaded.anatomy.layers[1].ffn_output.register_forward_hook(full)
    try:
        yield failed
    finally:
        handle.remove()


def masks(loaded: LoadedModel) -> list[Mask]:
    full = Mask.full(loaded.anatomy.heads_per_layer)
    return [full, full.without_heads([(1, 0)]), full.without_ffns([0])]


@pytest.mark.parametrize("many", [False, True])
def test_batches_too_large_for_memory_are_halved(task: Task, many: bool) -> None:
    loaded = tiny.loaded("llama")
    budget = Budget(1, 3000)
    asked = masks(loaded) if many else None
    expected = evaluate(loaded, task, asked, num_fewshot=1, budget=budget)
    told: list[int] = []
    with memory_of(loaded, 200) as failed:
        found = evaluate(loaded, task, asked, num_fewshot=1, budget=budget, progress=told.append)
    assert failed, "memory was too small at least once"
    np.testing.assert_allclose(found.gold_loglikelihood, expected.gold_loglikelihood, atol=1e-4)
    assert (found.correct == expected.correct).all()
    assert found.layer_tokens <= expected.layer_tokens, "what is done again is counted once; halves have less padding"
    assert sum(told) == found.tokens, "the planned tokens, however they were halved"
    assert min(told) > 0, "progress never goes back"


def test_what_was_told_of_a_batch_is_not_told_again_when_it_is_halved(task: Task) -> None:
    """Memory ends under the second mask, when the first one's tokens are told already."""
    loaded = tiny.loaded("llama")
    full = Mask.full(loaded.anatomy.heads_per_layer)
    asked = [full, full.without_ffns([2]), *(full.without_heads([(1, h)]) for h in range(4))]
    engine = Engine.of(loaded)
    packed = prepare(loaded, task, FewShot(1), budget=Budget(1, 3000)).packed
    expected = engine.loglikelihoods(packed, asked)
    told: list[int] = []
    failed: list[int] = []

    def full_once(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if told and output.shape[:-1].numel() > packed.tokens // 2:
            failed.append(sum(told))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    handle = loaded.anatomy.layers[1].ffn_output.register_forward_hook(full_once)
    # Every mask's positions pass the output layer by themselves, so that each is told as it is done.
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "_FINISHED", 1)
            found = engine.loglikelihoods(packed, asked, progress=told.append)
    finally:
        handle.remove()
    assert failed, "memory was too small after something was told"
    assert min(failed) > 0
    assert min(told) > 0
    assert sum(told) == packed.tokens * len(asked)
    np.testing.assert_allclose(found.loglikelihoods, expected.loglikelihoods, atol=1e-4)
    assert found.layer_tokens <= expected.layer_tokens


def test_the_halves_of_a_batch_stand_for_what_it_stood_for(task: Task) -> None:
    """Halves have less padding, and share less, than the whole: progress counts the batches that were planned."""
    packed = prepare(tiny.loaded("llama"), task, FewShot(1), budget=Budget(1, 400)).batches
    told: list[int] = []

    def work(batch: Batch) -> int:
        if batch.tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch.tokens

    done = sum(tokens for _, tokens in in_memory(packed, work, Told(told.append, 3)))
    assert done != sum(batch.tokens for batch in packed)
    assert sum(told) == 3 * sum(batch.tokens for batch in packed)
    assert min(told) > 0


def test_later_batches_are_halved_before_they_fail(task: Task) -> None:
    packed = prepare(tiny.loaded("llama"), task, FewShot(1), budget=Budget(1, 600)).batches * 5
    failed: list[int] = []

    def work(batch: Batch) -> int:
        if batch.tokens > 150:
            failed.append(batch.tokens)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch.tokens

    done = list(in_memory(packed, work))
    assert [tokens for _, tokens in done] == [batch.tokens for batch, _ in done]
    assert sorted(np.concatenate([b.requests for b, _ in done])) == sorted(np.concatenate([b.requests for b in packed]))
    assert failed == [512, 256], "512 and 256 tokens fail once; the batches after them come in time"


def test_gradients_are_halved_too(task: Task) -> None:
    loaded = tiny.loaded("llama")
    budget = Budget(gradient_tokens=3000)
    expected = gradient_importance(loaded, task, FewShot(), budget=budget)
    with memory_of(loaded, 150) as failed:
        found = gradient_importance(loaded, task, FewShot(), budget=budget)
    assert failed
    for component in ("head", "ffn"):
        for score, values in expected[component].scores.items():
            np.testing.assert_allclose(found[component].scores[score], values, rtol=1e-4)


def test_a_row_too_large_for_memory_is_halved_by_its_requests(task: Task) -> None:
    loaded = tiny.loaded("llama")
    expected = evaluate(loaded, task, num_fewshot=1, shared_shots=True, budget=Budget(1000, 1000))
    with memory_of(loaded, 80) as failed:
        found = evaluate(loaded, task, num_fewshot=1, shared_shots=True, budget=Budget(1000, 1000))
    assert max(failed) > 150, "one row holds the task"
    np.testing.assert_allclose(found.gold_loglikelihood, expected.gold_loglikelihood, atol=1e-4)
    assert (found.correct == expected.correct).all()


def test_a_prompt_too_large_for_memory_is_said(task: Task) -> None:
    loaded = tiny.loaded("llama")
    with memory_of(loaded, 5), pytest.raises(ModelError, match=r"one prompt of \d+ tokens; take fewer shots"):
        evaluate(loaded, task)


def test_other_errors_are_not_taken_for_memory(task: Task) -> None:
    loaded = tiny.loaded("llama")

    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    handle = loaded.anatomy.layers[1].ffn_output.register_forward_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="shapes do not match"):
            evaluate(loaded, task)
    finally:
        handle.remove()


def test_timings_are_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = Engine.of(tiny.loaded("llama", seed=11)).budget()
    assert found.row_tokens is None
    assert found.cost.batch >= 0
    assert found.cost.doubled >= 64
    (kept,) = json.loads((tmp_path / "headcount" / "devices.json").read_text()).values()
    assert Cost(**kept) == found.cost
    # Another model of that shape: what is kept is taken, nothing is timed.
    monkeypatch.setattr(rooms, "measure_cost", lambda *_: pytest.fail("timed again"))
    assert Engine.of(tiny.loaded("llama", seed=12)).budget().cost == found.cost
    pinned = Engine.of(tiny.loaded("llama", seed=12)).budget(100)
    assert (pinned.row_tokens, pinned.cost) == (100, found.cost)


def test_what_takes_seconds_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def seconds(self: object, batch: Batch) -> float:
        timed.append(batch.tokens)
        return batch.tokens / 1000

    monkeypatch.setattr(rooms._Timed, "__call__", seconds)
    loaded = tiny.loaded("llama")
    rooms.measure_cost(loaded, Engine.of(loaded).layout)
    few, many = min(timed), max(timed)
    assert few / 1000 < rooms._ONCE < many / 1000
    # Once in short rows for the cost of a batch, and once more beside the long rows.
    assert timed.count(few) == 1 + rooms._REPETITIONS
    assert timed.count(many) == 3


@pytest.mark.parametrize("content", ["", "[]", "{", '{"KEY": {"batch": 1}}', '{"KEY": {"speed": 1}}'])
def test_what_cannot_be_read_is_timed_again(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = tiny.loaded("gpt2", seed=13)
    (tmp_path / "headcount").mkdir()
    (tmp_path / "headcount" / "devices.json").write_text(content.replace("KEY", rooms.device_key(loaded)))
    assert Engine.of(loaded).budget().batch_tokens > 0


def test_a_folder_is_laid_out_alike_when_it_goes_on(tmp_path: Path) -> None:
    spec = StudySpec("tiny", tasks=("piqa",), shots=(0,), out=tmp_path / "study", limit=4, importance_limit=4,
                     fractions=(0.5,), data=tiny.write_task(tmp_path / "data"))
    run(prepare_study(spec, parts=("evaluate",), loaded=tiny.loaded("llama")))
    ledger = Ledger(tmp_path / "study")
    description = ledger.read_json("study.json")
    description["budget"] |= {"batch_tokens": 777, "cost": {"batch": 3.0, "doubled": 99.0}}
    ledger.write_json("study.json", description)
    again = prepare_study(spec, parts=("evaluate",), loaded=tiny.loaded("llama"))
    assert (again.budget.batch_tokens, again.budget.cost) == (777, Cost(3.0, 99.0))
    description["budget"]["device"] = "another"
    ledger.write_json("study.json", description)
    assert prepare_study(spec, parts=("evaluate",), loaded=tiny.loaded("llama")).budget.batch_tokens != 777


def test_rows_and_batches_that_are_both_given_depend_on_no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Budget(row_tokens=200, batch_tokens=500, gradient_tokens=500)
    assert Budget(longest_row=100, cost=Cost(300, 900)).limited(200, 500) == given == Budget().limited(200, 500)
    assert Budget(cost=Cost(300, 900)).limited(200, None).cost == Cost(300, 900)
    monkeypatch.setattr(rooms, "kept_cost", lambda of: None)
    monkeypatch.setattr(rooms, "timed_cost", lambda *_: pytest.fail("it was timed"))
    assert Engine.of(tiny.loaded("llama", seed=7)).budget(200, 500) == given


@pytest.mark.parametrize("wrong", [{"row_tokens": 0}, {"batch_tokens": 0}, {"gradient_tokens": -1}])
def test_a_budget_is_positive(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="is at least 1"):
        Budget(**wrong)


def test_timings_lie_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kept._file("devices.json") == tmp_path / "cache" / "headcount" / "devices.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    if sys.platform == "linux":
        assert kept._file("devices.json") == tmp_path / ".cache" / "headcount" / "devices.json"
