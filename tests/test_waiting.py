"""How torch's threads wait: said before torch is loaded, by programs alone, and not where the user has said it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headcount.engine.waiting import CHOSEN, NAMES, wait_asleep

TESTS = Path(__file__).resolve().parent
COMMAND_LINE = "from headcount.cli import main; main(['anatomy', 'no-such-model.gguf'])"
# Stands for torch: tells what it would be loaded with, and that is all.
TORCH = f"""
import json, os, sys
sys.stdout.write(json.dumps({{name: os.environ[name] for name in {NAMES!r} if name in os.environ}}))
sys.stdout.flush()
os._exit(0)
"""


def process(code: str, *places: Path, **chosen: str) -> subprocess.CompletedProcess[str]:
    """A process whose user has said nothing of waiting but this, and that finds modules in these places first."""
    env = {k: v for k, v in os.environ.items() if k not in NAMES} | chosen
    env["PYTHONPATH"] = os.pathsep.join([*map(str, places), *filter(None, [env.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", [COMMAND_LINE, "import conftest", "import bench", "import gpu", "import parity"])
def test_it_is_said_before_torch_is_loaded(code: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    places = tmp_path, TESTS, TESTS.parent / "benchmarks"
    done = process(code, *places)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == CHOSEN
    users = process(code, *places, GOMP_SPINCOUNT="77")
    assert json.loads(users.stdout) == {"GOMP_SPINCOUNT": "77"}


def test_a_library_leaves_its_process_alone(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    assert json.loads(process("import headcount; headcount.load", tmp_path).stdout) == {}


def test_torchs_openmp_reads_it() -> None:
    code = "from headcount.engine.waiting import wait_asleep; wait_asleep(); import torch"
    found = process(code, OMP_DISPLAY_ENV="VERBOSE").stderr
    if "GOMP_SPINCOUNT" not in found:
        pytest.skip("torch's OpenMP is not GNU's here")
    without = process("import torch", OMP_DISPLAY_ENV="VERBOSE").stderr
    assert "GOMP_SPINCOUNT = '0'" in found
    assert "GOMP_SPINCOUNT = '0'" not in without


@pytest.mark.parametrize("name", NAMES)
def test_every_name_counts_as_a_choice(name: str) -> None:
    chosen = {name: "1"}
    wait_asleep(chosen)
    assert chosen == {name: "1"}
    nothing = {name: ""}
    wait_asleep(nothing)
    assert nothing == {name: "", **CHOSEN}
