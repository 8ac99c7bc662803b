"""README's example of a removal is run as it stands there, on SmolLM2, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headcount.errors import ModelError
from headcount.model.gguf import smollm2

README = Path(__file__).resolve().parents[1] / "README.md"


def section(title: str) -> str:
    """What stands under a heading."""
    return README.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_study_remove_lm_eval_generate(tmp_path: Path) -> None:
    try:
        smollm2()
    except ModelError as error:
        pytest.skip(str(error))
    part = section("Make it really smaller")
    commands = re.findall(r"^    (\S.*)$", part, re.M)
    assert [command.split()[0] for command in commands] == ["headcount"] * 4 + ["lm_eval"]
    (code,) = re.findall(r"```python\n(.*?)```", part, re.S)
    here = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    outputs = []
    for command in (*commands, None):
        arguments = [sys.executable, "-c", code] if command is None else command.split()
        ran = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, f"{command}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}"
        outputs.append(ran.stdout)
    study, removed, checked, _, evaluated, written = outputs
    assert "report" in study
    assert "proved: logits of the whole model, loaded again from the files" in " ".join(removed.split())
    assert "it is what was written" in checked
    assert re.search(r"icl_plural.*acc", evaluated)
    assert written.startswith("Once upon a time there was")
