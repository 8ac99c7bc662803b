"""A model three times as large as the memory that its process may have is measured, and gives the resident numbers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import GraniteMoeConfig

import capped
import headcount as hc
import random_checkpoint
import tiny

CAP = 700_000_000
# What torch, transformers and tables take without any model is most of it, so that a model must be so large. Experts,
# of which a token meets one, make it large and fast.
_WIDTH, _LAYERS, _EXPERTS = 512, 40, 8
_STUDY = """
import sys
import headcount as hc
model, out, stream = sys.argv[1:]
hc.run_study(hc.StudySpec(model=model, tasks=("icl_plural",), shots=(1,), limit=3, importance_limit=3,
                          fractions=(0.5,), random_orders=0, ffn_order="gradient", batch_tokens=300, row_tokens=300,
                          stream=stream == "stream", stream_memory="30MB" if stream == "stream" else None, out=out))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 40 blocks of 54 MB."""
    folder = tmp_path_factory.mktemp("large")
    config = GraniteMoeConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=_LAYERS,
        num_attention_heads=8, num_key_value_heads=4, num_local_experts=_EXPERTS, num_experts_per_tok=1,
        max_position_embeddings=512, tie_word_embeddings=False)
    random_checkpoint.write(folder, config, torch.float32, tiny.tokenizer())
    return folder


@pytest.fixture(scope="module")
def resident(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study of the model in memory."""
    out = tmp_path_factory.mktemp("resident") / "study"
    done = capped.run(_STUDY, str(large), str(out), "resident", cap=8 * CAP, cgroup=None)
    assert done.returncode == 0, done.stderr
    return out


def test_a_model_larger_than_its_cap_is_measured(large: Path, resident: Path, tmp_path: Path) -> None:
    assert sum(file.stat().st_size for file in large.glob("*.safetensors")) > 3 * CAP
    with capped.cgroup() as cgroup:
        beyond = capped.run(f"bytearray({CAP}).count(1)", cap=CAP, cgroup=cgroup)
        assert beyond.returncode != 0, "nothing enforces the cap"
        done = capped.run(_STUDY, str(large), str(tmp_path / "study"), "stream", cap=CAP, cgroup=cgroup)
        assert done.returncode == 0, done.stderr
        assert cgroup is None or capped.peak(cgroup) <= CAP
    for table in ("curves", "importance"):
        one, other = (getattr(hc.open_study(folder), table)() for folder in (resident, tmp_path / "study"))
        assert len(one) > 0
        pd.testing.assert_frame_equal(one, other, check_exact=True)
