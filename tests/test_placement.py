"""Models on several devices, or larger than theirs, give the numbers of a model in memory; wrong devices are told."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import headcount as hc
import tiny
from families import reader
from families import tiny as of_family
from headcount import cli
from headcount.engine import budget, device_check, examples
from headcount.engine.device_check import DeviceCheck, compare
from headcount.engine.engine import Engine
from headcount.engine.proof import _parting, _requests
from headcount.errors import DeviceWarning, ModelError
from headcount.measure.induction import induction_scores
from headcount.model.devices import devices_of
from headcount.model.load import LoadedModel, wrap
from headcount.model.on_cpu import on_cpu
from simulated import TYPE, Devices, aten, spread

ONE, TWO = f"{TYPE}:0", f"{TYPE}:1"
PLACES = {"two devices": (ONE, TWO), "a device and the CPU": (ONE, "cpu"), "a device and the disk": (ONE, "disk"),
          "the CPU and the disk": ("cpu", "disk"), "the disk and the CPU": ("disk", "cpu")}
# A norm behind the add, attention that hands its probabilities out when asked alone, norms on branches, experts, keys
# and values that blocks hand on.
FAMILIES = ("llama", "opt-350m", "falcon", "gemma3", "mixtral", "gemma4")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(budget, "_synchronize", lambda device: None)  # there is nothing to wait for


@contextlib.contextmanager
def spread_out(family: str, places: tuple[str, ...], folder: Path, **devices: Any) -> Iterator[LoadedModel]:
    with Devices(**devices).open():
        yield wrap(spread(of_family(family), places, folder), reader())


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_wherever_its_blocks_are_a_model_gives_the_same_numbers(family: str, places: str, tmp_path: Path) -> None:
    resident = wrap(of_family(family), reader())
    engine, masks = Engine.of(resident), _parting(resident.anatomy)
    requests = [[request] for request in _requests(resident)]
    expected, gradients = engine.loglikelihoods(requests, masks), engine.gradients(_requests(resident))
    with spread_out(family, PLACES[places], tmp_path) as loaded:
        assert loaded.fingerprint == resident.fingerprint
        assert {str(device) for device in devices_of(loaded.model)} == {*PLACES[places]} - {"cpu", "disk"} or {"cpu"}
        found = Engine.of(loaded)
        assert np.array_equal(found.loglikelihoods(requests, masks).loglikelihoods, expected.loglikelihoods)
        assert found.sweep_contract.holds
        for one, other in zip(found.gradients(_requests(loaded)), gradients, strict=True):
            assert np.allclose(one, other, rtol=1e-5, atol=1e-6)  # what is read from files may lie otherwise in memory
