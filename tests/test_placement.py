"""Models on several devices, or larger than theirs, give the numbers of a model in memory; wrong devices are told."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations import accelerate as spreading

import headcount as hc
import tiny
from families import reader
from families import tiny as of_family
from headcount import cli
from headcount.engine import budget, device_check, examples, stream
from headcount.engine.device_check import DeviceCheck, compare
from headcount.engine.engine import Engine
from headcount.engine.pack import Budget, Cost
from headcount.engine.proof import _parting, _requests
from headcount.engine.stream import away
from headcount.errors import DeviceWarning, ModelError
from headcount.measure.control import randomised
from headcount.measure.induction import induction_scores
from headcount.model.contracts import probe_tokens
from headcount.model.devices import devices_of
from headcount.model.load import LoadedModel, load, wrap
from headcount.model.on_cpu import on_cpu
from headcount.report.cautions import cautions
from headcount.study.runner import run_study
from headcount.study.spec import StudySpec
from simulated import TYPE, Devices, aten, spread

ONE, TWO = f"{TYPE}:0", f"{TYPE}:1"
PLACES = {"two devices": (ONE, TWO), "a device and the CPU": (ONE, "cpu"), "a device and the disk": (ONE, "disk"),
          "the CPU and the disk": ("cpu", "disk"), "the disk and the CPU": ("disk", "cpu")}
# A norm behind the add, attention that hands its probabilities out when asked alone, norms on branches, experts, keys
# and values that blocks hand on.
FAMILIES = ("opt-350m", "falcon", "gemma3", "mixtral", "gemma4")


# Simulated devices take their time, so that it is taken in one test alone.
TIMED = budget.measure_cost


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(budget, "_synchronize", lambda device: None)  # there is nothing to wait for
    monkeypatch.setattr(budget, "measure_cost", lambda loaded, layout: Cost(100.0))


@contextlib.contextmanager
def spread_out(family: str, places: tuple[str, ...], folder: Path, **devices: Any) -> Iterator[LoadedModel]:
    with Devices(**devices).open():
        yield wrap(spread(of_family(family), places, folder), reader())


# Every family beside memory; one of them in all places.
@pytest.mark.parametrize(("family", "places"), [
    (family, places) for family in FAMILIES for places in PLACES
    if family == "gemma3" or places == "a device and the CPU"])
def test_wherever_its_blocks_are_a_model_gives_the_same_numbers(family: str, places: str, tmp_path: Path) -> None:
    resident = wrap(of_family(family), reader())
    engine, masks = Engine.of(resident), _parting(resident.anatomy)
    requests = [[request] for request in _requests(resident)]
    expected, gradients = engine.loglikelihoods(requests, masks), engine.gradients(_requests(resident))
    with spread_out(family, PLACES[places], tmp_path) as loaded:
        assert loaded.fingerprint == resident.fingerprint
        assert loaded.anatomy.num_parameters == resident.anatomy.num_parameters
        assert {str(device) for device in devices_of(loaded.model)} == {*PLACES[places]} - {"cpu", "disk"} or {"cpu"}
        found = Engine.of(loaded)
        assert np.array_equal(found.loglikelihoods(requests, masks).loglikelihoods, expected.loglikelihoods)
        assert found.sweep_contract.holds
        for one, other in zip(found.gradients(_requests(loaded)), gradients, strict=True):
            assert np.allclose(one, other, rtol=1e-5, atol=1e-6)  # what is read from files may lie otherwise in memory
        assert found.notes == ()


def test_rows_and_batches_are_timed_wherever_blocks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_FIRST_BATCH", 1024)
    with spread_out("gemma3", PLACES["a device and the disk"], tmp_path) as loaded:
        cost = TIMED(loaded, Engine.of(loaded).layout)
        assert np.isfinite([cost.batch, cost.doubled]).all()
        assert cost.doubled >= 1


@pytest.mark.parametrize(("places", "protocol"), [
    ("two devices", "sound"), ("the CPU and the disk", "sound"), ("two devices", "paper")])
def test_induction_is_the_same_wherever_blocks_are(
    places: str, protocol: Literal["sound", "paper"], tmp_path: Path
) -> None:
    resident = wrap(tiny.model("llama"), tiny.tokenizer())
    with Devices().open():
        loaded = wrap(spread(tiny.model("llama"), PLACES[places], tmp_path), tiny.tokenizer())
        for one, other in ((loaded, resident), (randomised(loaded), randomised(resident))):
            found, expected = (induction_scores(model, seeds=2, lengths=(5, 9), protocol=protocol)
                               for model in (one, other))
            for name in ("prefix_matching", "copying", "previous_token", "ov_copying"):
                assert np.allclose(getattr(found, name), getattr(expected, name), atol=1e-5)


def test_experts_that_their_parents_read_are_there_when_only_some_blocks_are(tmp_path: Path) -> None:
    resident = wrap(of_family("dbrx"), reader())
    requests = [[request] for request in _requests(resident)]
    with spread_out("dbrx", ("cpu", "disk"), tmp_path) as loaded:
        assert np.array_equal(Engine.of(loaded).loglikelihoods(requests).loglikelihoods,
                              Engine.of(resident).loglikelihoods(requests).loglikelihoods)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_what_memory_has_no_room_for_goes_to_the_disk(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtral's experts do not lie in the files as the model wants them: they are written to a folder meanwhile."""
    model = of_family(family)
    model.save_pretrained(tmp_path / "model")
    reader().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room = 0.8 * sum(p.numel() * p.element_size() for p in model.parameters())
    monkeypatch.setattr(spreading, "accelerate_max_memory", lambda given=None: {"cpu": int(room)})
    resident, loaded = load(tmp_path / "model", device="cpu"), load(tmp_path / "model", device_map="auto")
    assert {*loaded.model.hf_device_map.values()} == {"cpu", "disk"}
    assert loaded.fingerprint == resident.fingerprint
    requests = _requests(resident)
    assert np.array_equal(Engine.of(loaded).loglikelihoods([requests]).loglikelihoods,
                          Engine.of(resident).loglikelihoods([requests]).loglikelihoods)
    for one, other in zip(Engine.of(loaded).gradients(requests), Engine.of(resident).gradients(requests), strict=True):
        assert np.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert len([*tmp_path.glob("headcount-weights-*")]) == (family == "mixtral")
    del loaded
    gc.collect()
    assert not [*tmp_path.glob("headcount-weights-*")]


@pytest.mark.parametrize("family", ["falcon", "mixtral"])
def test_a_streamed_model_runs_on_its_device_and_waits_beside_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_family(family).save_pretrained(tmp_path)
    reader().save_pretrained(tmp_path)
    resident = load(tmp_path, device="cpu")
    engine, masks, budget = Engine.of(resident), _parting(resident.anatomy), Budget(batch_tokens=100)
    requests = [[request] for request in _requests(resident)]
    expected, gradients = engine.loglikelihoods(requests, masks), engine.gradients(_requests(resident), budget=budget)
    monkeypatch.setattr("headcount.model.load.placement", lambda device, device_map: ONE)
    waiting: list[torch.device] = []

    def left(value: Any) -> Any:
        made = away(value)
        waiting.extend(one.device for one in tree_leaves(made) if isinstance(one, Tensor))
        return made

    monkeypatch.setattr(stream, "away", left)
    with Devices().open():
        loaded = load(tmp_path, stream=True)
        found = Engine.of(loaded)
        assert np.array_equal(found.loglikelihoods(requests, masks).loglikelihoods, expected.loglikelihoods)
        assert found.notes == ()
        assert found.device_check is not None
        assert found.sweep_contract.holds
        for one, other in zip(found.gradients(_requests(loaded), budget=budget), gradients, strict=True):
            assert np.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert {str(device) for device in devices_of(loaded.model)} == {ONE}
    assert {device.type for device in waiting} == {"cpu"}


def wide(family: str) -> PreTrainedModel:
    """A model whose blocks are nearly all that it is made of, and hidden states nearly nothing."""
    torch.manual_seed(0)
    width = {"vocab_size": 96, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    if family == "falcon":  # hands attention probabilities out only when it is asked for all
        return FalconForCausalLM(FalconConfig(**width, ffn_hidden_size=1536)).eval()
    return LlamaForCausalLM(LlamaConfig(**width, intermediate_size=1024, max_position_embeddings=64)).eval()


@pytest.mark.parametrize(("family", "place"), [("llama", "disk"), ("falcon", "cpu")])
def test_a_model_larger_than_its_device_is_proved_and_measured(
    family: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five of its eight blocks fit onto the device, of which one lies there; texts of all masks together take two."""
    resident = wrap(wide(family), reader())
    block = sum(p.numel() * p.element_size() for p in resident.anatomy.layers[0].block.parameters())
    requests, size = _requests(resident), Budget(batch_tokens=100)
    expected = Engine.of(resident).gradients(requests, budget=size)
    with Devices(capacity={ONE: 5 * block}).open():
        loaded = wrap(spread(wide(family), (ONE, *[place] * 7), tmp_path), reader())
        engine = Engine.of(loaded)
        assert all(result.holds for result in [*engine.contracts, engine.gradient_contract, engine.sweep_contract])
        for one, other in zip(engine.gradients(requests, budget=size), expected, strict=True):
            assert np.allclose(one, other, rtol=1e-5, atol=1e-7)
        # A graph of all layers does not fit: what is tested here is not there for nothing.
        monkeypatch.setattr(examples, "refetched", lambda *given: contextlib.nullcontext())
        with pytest.raises(ModelError, match="memory is too small to check"):
            Engine(loaded).prove(gradients=True)


def attention_off(func: Any, out: Any) -> Any:
    """A kernel that gives attention a little too much."""
    return (out[0] * 1.01, *out[1:]) if func is aten._scaled_dot_product_flash_attention_for_cpu.default else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [(ONE,), (ONE, TWO), (ONE, "disk")])
def test_a_device_that_computes_otherwise_is_told_once(
    places: tuple[str, ...], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(func: Any, out: Any) -> Any:
        return out * 2 if func in (aten.bmm.default, aten._softmax.default) else (
            attention_off(func, out) if dtype == torch.float32 else
            (out[0] * 2, *out[1:]) if func is aten._scaled_dot_product_flash_attention_for_cpu.default else out)

    with Devices(kernels={ONE: twice}).open():
        loaded = wrap(spread(of_family("llama").to(dtype), places, tmp_path), reader())
        before = {name: id(parameter) for name, parameter in loaded.model.named_parameters()}
        check = compare(loaded, "the device")
        assert check.found is not None
        assert check.found.median > check.of_type.allowed.median
        assert check.note.startswith("on the device logits are other than on the CPU: at the median position they ")
        assert {name: id(parameter) for name, parameter in loaded.model.named_parameters()} == before
        (note,) = Engine.of(loaded).notes
        monkeypatch.setattr(device_check, "compare", lambda *given: pytest.fail("compared again"))
        assert Engine(loaded).notes == (note,)
        assert f"{ONE} (" in note


def test_a_type_explains_what_it_rounds(tmp_path: Path) -> None:
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)):
        with Devices().open():
            loaded = wrap(spread(of_family("llama").to(dtype), (ONE, "cpu"), tmp_path), reader())
            check = compare(loaded, "it")
        assert check.note == ""
        assert check.found is not None
        assert (check.found.median > 1e-4) == (dtype != torch.float32)
        assert check.found.worst < most


def test_one_position_that_is_wrong_is_told() -> None:
    expected = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for wrong in (0.01, float("nan"), float("inf")):
        found = expected.clone()
        found[1, 7, 3] += wrong
        assert "at the worst position they differ by" in DeviceCheck("it", device_check._apart(found, expected)).note
    masked = expected.clone()
    masked[..., 4] = -torch.inf
    assert device_check._apart(masked, masked) == (0, 0)


def test_products_in_other_parts_are_explained_by_the_type(tmp_path: Path) -> None:
    """Another right device: it rounds in other places."""
    for family in FAMILIES:
        loaded = wrap(of_family(family).to(torch.bfloat16), reader())
        own = compare(loaded, "it")
        with InParts():
            found = device_check._logits(loaded, torch.cat([ids := probe_tokens(loaded.model), ids.flip(1)]))
        with on_cpu(loaded.model, [part.block for part in loaded.anatomy.layers], torch.float32), torch.no_grad():
            expected = device_check._logits(loaded, torch.cat([ids, ids.flip(1)]))
        apart = device_check._apart(found, expected)
        assert DeviceCheck("it", apart, own.of_type).note == ""
        assert apart.median not in (0, own.of_type.median), "it is another device"


def test_a_model_that_sends_ids_to_its_embeddings_is_compared(tmp_path: Path) -> None:
    with spread_out("llama4", (ONE, TWO), tmp_path) as loaded:
        assert compare(loaded, "it").note == ""


class InParts(TorchDispatchMode):
    """Products are summed from three parts, each of which is rounded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (aten.mm.default, aten.bmm.default):
            return func(*args, **kwargs or {})
        parts = zip(args[0].chunk(3, -1), args[1].chunk(3, -2), strict=True)
        return functools.reduce(Tensor.add, (func(one, other) for one, other in parts))


def test_no_more_than_one_block_is_copied_at_once(tmp_path: Path) -> None:
    with spread_out("llama", (ONE, TWO), tmp_path) as loaded:
        blocks = [part.block for part in loaded.anatomy.layers]
        copied: list[list[bool]] = []

        def look(module: Any, args: Any, output: Any) -> None:
            assert output.dtype == torch.float32
            copied.append([all(p.device.type == "cpu" for p in block.parameters()) for block in blocks])

        handles = [block.mlp.register_forward_hook(look) for block in blocks]
        with on_cpu(loaded.model, blocks, torch.float32), torch.no_grad():
            loaded.model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
        for handle in handles:
            handle.remove()
        assert copied == [[True, False], [False, True]]
        assert all(p.device.type == TYPE for p in loaded.model.parameters())


def test_weights_come_back_when_the_cpu_fails(tmp_path: Path) -> None:
    def fail(module: Any, args: Any) -> None:
        if args[0].device.type == "cpu":
            raise NotImplementedError("no such kernel on the CPU")

    with spread_out("llama", (ONE, TWO), tmp_path) as loaded:
        loaded.anatomy.layers[1].out_proj.register_forward_pre_hook(fail)
        check = compare(loaded, "it")
        assert check.note == ("logits on it were not compared with the CPU's, which cannot run the model "
                              "(NotImplementedError: no such kernel on the CPU)")
        assert all(p.device.type == TYPE for p in loaded.model.parameters())
        assert DeviceCheck.of(json.loads(json.dumps(dataclasses.asdict(check)))) == check


def test_a_study_tells_of_a_wrong_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_task(tmp_path)
    spec = StudySpec("tiny", tasks=("piqa",), data=tmp_path, shots=(0,), limit=4, out=tmp_path / "study",
                     fractions=(0.5,))
    with Devices(kernels={ONE: attention_off}).open():
        loaded = wrap(spread(tiny.model("llama"), (ONE, "cpu"), tmp_path / "off"), tiny.tokenizer())
        with cli._device_notes():
            folder = run_study(spec, loaded=loaded)
            run_study(spec, loaded=loaded)  # goes on
    (told,) = [line for line in " ".join(capsys.readouterr().out.split()).split("note: ") if line]
    assert "logits are other than on the CPU" in told, "printed once"
    (note,) = json.loads((folder / "study.json").read_text())["model"]["notes"]
    assert note == Engine.of(loaded).notes[0]
    assert f"Model: {note}." in [*cautions(hc.open_study(folder))]


def test_python_is_warned(tmp_path: Path) -> None:
    with Devices(kernels={ONE: attention_off}).open():
        loaded = wrap(spread(tiny.model("llama"), (ONE,), tmp_path), tiny.tokenizer(), "tiny")
        with pytest.warns(DeviceWarning, match=r"^tiny: on maia:0 .* logits are other than on the CPU"):
            Engine.of(loaded).prove()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Engine.of(loaded).prove()


def test_nothing_is_compared_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "compare", lambda *given: pytest.fail("compared"))
    engine = Engine.of(wrap(of_family("llama"), reader()))
    engine.prove()
    assert engine.device_check is None
    assert engine.notes == ()
