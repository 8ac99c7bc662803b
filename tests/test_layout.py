"""Token trees on every family of the table, in every kernel it has: found right by the probe, and right when used."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from families import FAMILIES, SINGLE_ROWS, VOCAB, kernels, probed, reader, tiny, with_kernel
from headcount.engine.encode import Request
from headcount.engine.engine import Engine
from headcount.engine.forward import plain_loglikelihoods
from headcount.engine.layout import expected_layout, probe
from headcount.engine.pack import Budget, batches, pack
from headcount.model.load import wrap


def documents(rng: np.random.Generator) -> list[list[Request]]:
    """Prompts of 3 to 40 tokens that share their beginnings, well past the tiny models' windows of 4."""
    shots = rng.integers(4, VOCAB, 12)
    found = []
    for length in (0, 1, 9, 20):
        context = np.concatenate([shots, rng.integers(4, VOCAB, length)])
        options = [rng.integers(4, VOCAB, n) for n in (1, 1, 3, 8)]
        found.append([Request(np.concatenate([context, o])[:-1], o) for o in options])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_are_used_where_they_are_right(family: str) -> None:
    assert kernels(family)
    for kernel in kernels(family):
        loaded = probed(family, kernel)
        config = with_kernel(family, kernel).model.config.to_dict()
        found = Engine.of(loaded).layout
        assert found.trees == (family not in SINGLE_ROWS), f"{kernel}: {found}"
        assert loaded.model.config.to_dict() == config, "the probe's short windows are gone"
        known = expected_layout(loaded.model)
        assert (known.trees, known.tree_tokens) == (found.trees, found.tree_tokens), "a plan knows it without weights"
        docs = documents(np.random.default_rng(0))
        number = sum(map(len, docs))
        expected, _ = plain_loglikelihoods(loaded, batches(pack(docs, Budget(), trees=False), Budget(None, 1)), number)
        rows = pack(docs, Budget(200), trees=found.trees, tree_tokens=found.tree_tokens)
        scores, _ = plain_loglikelihoods(loaded, batches(rows, Budget(None, 400)), number, tree_mask=found.tree_mask)
        np.testing.assert_allclose(scores, expected, atol=2e-4, err_msg=kernel)


def test_the_page_of_models_is_up_to_date() -> None:
    """The families of docs/models.md are what is found; `make models` writes it. For classes: test_every_class.py."""
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("models_page", root / "tools" / "models_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (root / "docs" / "models.md").read_text(encoding="utf-8").startswith(module.families())


@pytest.mark.parametrize("family", ["gemma2", "mistral", "olmo3", "llama4", "gpt_oss", "qwen2-window"])
def test_a_tree_without_the_window_would_be_wrong(family: str) -> None:
    """So the test above can fail."""
    loaded = with_kernel(family, kernels(family)[-1])
    docs = documents(np.random.default_rng(0))
    number = sum(map(len, docs))
    expected, _ = plain_loglikelihoods(loaded, batches(pack(docs, Budget(), trees=False), Budget(None, 1)), number)
    trees = batches(pack(docs, Budget(200)), Budget(None, 400))
    wrong, _ = plain_loglikelihoods(loaded, trees, number, tree_mask="plain")
    assert np.abs(wrong - expected).max() > 1e-2


def test_a_model_that_takes_no_such_mask_gets_single_rows() -> None:
    loaded = with_kernel("llama", "sdpa")
    original = loaded.model.forward

    def picky(*args: object, attention_mask: torch.Tensor, position_ids: object = None, **kwargs: object) -> object:
        if attention_mask.ndim == 4:
            raise ValueError("two dimensions, please")
        return original(*args, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    loaded.model.forward = picky
    found = probe(loaded)
    assert (found.trees, found.reason) == (False, "the model does not take a tree's mask (ValueError)")


def test_a_window_that_cannot_be_cut_short_is_not_trusted() -> None:
    """A kernel that keeps its window to itself: trees then stay within the window."""
    loaded = with_kernel("llama", "sdpa")
    loaded.model.config.sliding_window = 40
    found = probe(loaded)
    assert (found.trees, found.tree_mask, found.tree_tokens) == (True, "plain", 40)


def test_half_precision_is_told_from_a_wrong_mask() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for family in ("llama", "mistral", "bloom"):
            model = tiny(family).to(dtype)
            loaded = dataclasses.replace(wrap(model, reader()), name=family)
            assert probe(loaded).trees == (family != "bloom")
