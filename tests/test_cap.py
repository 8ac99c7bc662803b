"""A model three times as large as the memory that its process may have is measured, and gives the resident numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

import capped
import headcount as hc
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
                          fractions=(0.5,), random_orders=1, ffn_order="gradient", batch_tokens=300, row_tokens=300,
                          stream=stream == "stream", stream_memory="30MB" if stream == "stream" else None, out=out))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 40 blocks of 54 MB, a shard each."""
    folder = tmp_path_factory.mktemp("large")
    tokenizer = tiny.tokenizer()
    config = GraniteMoeConfig(
        vocab_size=len(tokenizer), hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=_LAYERS,
        num_attention_heads=8, num_key_value_heads=4, num_local_experts=_EXPERTS, num_experts_per_tok=1,
        max_position_embeddings=512, tie_word_embeddings=False, architectures=["GraniteMoeForCausalLM"],
        dtype="float32")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        shapes = GraniteMoeForCausalLM(config).state_dict()
    generator, drawn, shards = torch.Generator().manual_seed(0), dict[str, torch.Tensor](), dict[str, str]()
    by_part: dict[str, dict[str, torch.Tensor]] = {}
    for name, empty in shapes.items():
        part, _, last = name.removeprefix("model.layers.").partition(".") if ".layers." in name else (
            "rest", "", name)
        if last not in drawn:
            drawn[last] = torch.empty(empty.shape).normal_(0, 0.02, generator=generator)
        by_part.setdefault(part, {})[name] = drawn[last].roll(len(by_part), -1)  # no layer is another's
    for part, held in by_part.items():
        shards |= dict.fromkeys(held, file := f"model-{part}.safetensors")
        save_file(held, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
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
