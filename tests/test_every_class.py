"""Every type that transformers loads as a causal language model: on the page, and some of them measured again here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import every_class
import families
from headcount.engine.engine import Engine
from headcount.engine.forward import plain_loglikelihoods
from headcount.engine.pack import Budget, batches, pack
from headcount.errors import ModelError
from headcount.model import hooks
from headcount.model.attention import attention_keywords, eager
from headcount.model.contracts import verify
from headcount.model.load import wrap
from test_layout import documents

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import models_page  # noqa: E402

# Text of a multimodal type, several residual streams, parts that run unlike attention, sparse attention, a decoder that
# is not called so; several stacks, a hybrid, an encoder-decoder by its config alone.
AGAIN = ("gemma3", "hy_v4", "got_ocr2", "minimax_m3_vl_text", "modernbert-decoder", "blt", "qwen3_5", "bart")


def lines() -> dict[str, str]:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").partition("## Every decoder class")[2]
    return {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()
            if line.startswith("| ") and not line.startswith("| type ")}


def test_every_type_of_the_installed_library_has_a_line() -> None:
    assert list(lines()) == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "make models"


def test_no_type_is_measured_wrong_or_ends_in_a_traceback() -> None:
    wrong = {kind for kind, line in lines().items() if "wrong" in line.split(" | ")[2]}
    # A helper of another model, which takes no token ids.
    assert wrong == set()


def test_no_type_is_refused_for_sizes_that_the_tests_gave_it() -> None:
    assert not [kind for kind, line in lines().items() if "the config says" in line]


@pytest.mark.parametrize("kind", AGAIN)
def test_the_page_says_what_is_found_again(kind: str, tmp_path: Path) -> None:
    found = models_page.class_row(every_class.find(kind, tmp_path))
    # The largest difference depends on the machine.
    assert re.sub(r"\de-\d\d", "", found) == re.sub(r"\de-\d\d", "", lines()[kind])


@pytest.mark.parametrize("broken", ["_head_gate", "_ffn_gate"])
def test_gates_that_do_not_act_are_called_wrong(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the tests above can fail. The contracts are left out, which say so too."""
    idle = {"_head_gate": lambda removed: lambda module, args: args, "_ffn_gate": lambda part: iter(())}
    monkeypatch.setattr(Engine, "contracts", [])
    monkeypatch.setattr(hooks, broken, idle[broken])
    found = every_class.find("llama", tmp_path)
    assert found.outcome == "wrong", found
    assert ("one head off" if broken == "_head_gate" else "one FFN off") in found.detail


def test_gradients_of_another_model_are_called_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = every_class.plain_scores
    monkeypatch.setattr(every_class, "plain_scores",
                        lambda *args: {which: scores * 1.001 for which, scores in plain(*args).items()})
    found = every_class.find("llama", tmp_path)
    assert (found.outcome, re.findall("[a-z ]+of [a-z]+", found.detail)) == (
        "wrong", ["gradients of heads", " gradients of ffns"]), found


def test_text_runs_eagerly_where_the_rest_of_the_model_does_already() -> None:
    """GOT-OCR-2's images have no other attention than eager, so that its own config says eager."""
    model = every_class.build("got_ocr2")
    before = model.config._attn_implementation, model.config.text_config._attn_implementation
    assert before == ("eager", "sdpa")
    with eager(model):
        assert model.config.text_config._attn_implementation == "eager"
    assert (model.config._attn_implementation, model.config.text_config._attn_implementation) == before
    assert all(result.holds for result in verify(model))


def test_trees_stay_within_what_sparse_attention_sees_whole() -> None:
    """MiniMax-M3 chooses blocks of columns; the probe's tree is shorter than a block, and agrees."""
    settings = every_class.config_of("minimax_m3_vl_text").to_dict() | {"index_block_size": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    loaded = wrap(model, families.reader())
    layout = Engine.of(loaded).layout
    assert (layout.trees, layout.tree_tokens) == (True, 64)
    docs = documents(np.random.default_rng(0))
    number = sum(map(len, docs))
    expected, _ = plain_loglikelihoods(loaded, batches(pack(docs, Budget(), trees=False), Budget(None, 1)), number)
    for limit, right in ((layout.tree_tokens, True), (None, False)):
        rows = pack(docs, Budget(400), tree_tokens=limit)
        scores, _ = plain_loglikelihoods(loaded, batches(rows, Budget(None, 400)), number, tree_mask=layout.tree_mask)
        assert bool(np.abs(scores - expected).max() < 1e-4) is right


def test_induction_is_refused_where_heads_write_into_several_streams() -> None:
    loaded = wrap(every_class.build("hy_v4"), families.reader(), name="streams")
    with pytest.raises(ModelError, match=r"^streams \(hy_v4\): its heads write into 4 residual streams"):
        attention_keywords(loaded.name, loaded.model, loaded.anatomy)


def test_stacks_that_run_beside_one_another_are_named() -> None:
    with pytest.raises(ModelError, match=r"several stacks of layers \(local_encoder .*patcher"):
        wrap(every_class.build("blt"), families.reader())
