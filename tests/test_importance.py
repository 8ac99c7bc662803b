"""Gradient importance against plain autograd, the oracle against one ablation at a time, and a planted circuit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from headcount.engine.encode import encode
from headcount.engine.engine import Engine
from headcount.engine.pack import Budget
from headcount.errors import OptionError
from headcount.masks import Mask
from headcount.measure.evaluate import evaluate
from headcount.measure.importance import (
    ffn_importance,
    gradient_importance,
    head_importance,
    oracle_importance,
    order_of,
)
from headcount.measure.resampling import standard_error
from headcount.model.load import LoadedModel, wrap
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Task


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return get_tasks(["piqa"], data=tiny.write_task(tmp_path))["piqa"]


def projections(loaded: LoadedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """The attention output projections and the FFNs' last linear maps, spelled out family by family."""
    model = loaded.model
    kind = model.config.model_type
    if kind == "opt":
        layers = model.model.decoder.layers
        return [b.self_attn.out_proj for b in layers], [b.fc2 for b in layers]
    if kind == "llama":
        return [b.self_attn.o_proj for b in model.model.layers], [b.mlp.down_proj for b in model.model.layers]
    if kind == "gpt2":
        return [b.attn.c_proj for b in model.transformer.h], [b.mlp.c_proj for b in model.transformer.h]
    layers = model.gpt_neox.layers
    return [b.attention.dense for b in layers], [b.mlp.dense_4h_to_h for b in layers]


def plain_autograd(loaded: LoadedModel, context: str, continuation: str, num_heads: int) -> tuple[np.ndarray, ...]:
    """One example through the unmodified model, parameters trainable, products position by position."""
    (request,) = encode(loaded.tokenizer, [(context, continuation)], loaded.max_length)
    out_projections, down_projections = projections(loaded)
    kept: dict[nn.Module, torch.Tensor] = {}
    handles = [m.register_forward_pre_hook(lambda m, a: (a[0].retain_grad(), kept.__setitem__(m, a[0]))[:0] or None)
               for m in out_projections]
    handles += [m.register_forward_hook(lambda m, a, o: (o.retain_grad(), kept.__setitem__(m, o))[:0] or None)
                for m in down_projections]
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(True)
    logits = loaded.model(torch.from_numpy(request.ids)[None]).logits[0].float()
    losses = [-logits[p].log_softmax(-1)[t] for p, t in zip(request.scored, request.targets, strict=True)]
    (sum(losses) / len(losses)).backward()
    for handle in handles:
        handle.remove()
    n = len(request.ids)
    heads = np.zeros((2, len(out_projections), num_heads))
    ffns = np.zeros((2, len(down_projections)))
    for layer, (out, down) in enumerate(zip(out_projections, down_projections, strict=True)):
        z, g = kept[out].detach()[0], kept[out].grad[0]
        width = z.shape[-1] // num_heads
        for head in range(num_heads):
            own = slice(head * width, (head + 1) * width)
            products = [float(z[t, own] @ g[t, own]) for t in range(n)]
            heads[0, layer, head] = sum(map(abs, products)) / n
            heads[1, layer, head] = abs(sum(products))
        z, g = kept[down].detach().reshape(n, -1), kept[down].grad.reshape(n, -1)
        products = [float(z[t] @ g[t]) for t in range(n)]
        ffns[0, layer], ffns[1, layer] = sum(map(abs, products)) / n, abs(sum(products))
    loaded.model.zero_grad()
    return heads.reshape(2, -1), ffns


def test_documents_of_one_passage_are_no_further_evidence() -> None:
    values = np.random.default_rng(0).normal(size=(20, 3))
    alone = standard_error(values, np.arange(20))
    np.testing.assert_allclose(alone, values.std(0, ddof=1) / np.sqrt(20))
    np.testing.assert_allclose(standard_error(np.repeat(values, 3, axis=0), np.repeat(np.arange(20), 3)), alone)
    assert np.isnan(standard_error(values, np.zeros(20, np.int64))).all()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("k", [0, 2])
def test_gradient_importance_equals_plain_autograd(task: Task, family: str, k: int) -> None:
    loaded = tiny.loaded(family)
    found = gradient_importance(loaded, task, FewShot(k, 7), budget=Budget(None, 150, 150))
    slow = [plain_autograd(loaded, *p.pairs[p.gold], num_heads=4)
            for p in task.prompts("examples", FewShot(k, 7))]
    for component, which in (("head", 0), ("ffn", 1)):
        expected = np.stack([one[which] for one in slow], axis=1)
        assert found[component].num_examples == 7
        for i, score in enumerate(("position", "example")):
            np.testing.assert_allclose(found[component].scores[score], expected[i].mean(0), rtol=2e-4, atol=1e-8)
            spread = expected[i].std(0, ddof=1) / np.sqrt(7)
            np.testing.assert_allclose(found[component].stderrs[score], spread, rtol=2e-3, atol=1e-8)


def test_no_parameter_gets_a_gradient(task: Task) -> None:
    loaded = tiny.loaded("llama", seed=2)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    gradient_importance(loaded, task, FewShot(limit=2))
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_scores_do_not_depend_on_the_batch(task: Task) -> None:
    loaded = tiny.loaded("llama")
    prompts = task.prompts("examples", FewShot(1))
    requests = encode(loaded.tokenizer, [p.pairs[p.gold] for p in prompts], loaded.max_length)
    one_by_one = Engine.of(loaded).gradients(requests, budget=Budget(None, 1, 1))
    for batch_tokens in (60, 10_000):
        together = Engine.of(loaded).gradients(requests, budget=Budget(None, batch_tokens, batch_tokens))
        for found, expected in zip(together, one_by_one, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-8)


def test_the_users_requires_grad_flags_come_back(task: Task) -> None:
    loaded = tiny.loaded("llama")
    for i, parameter in enumerate(loaded.model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    head_importance(loaded, task, limit=2)
    assert [p.requires_grad for p in loaded.model.parameters()][:4] == [True, False, True, False]


def test_oracle_equals_one_ablation_at_a_time(task: Task) -> None:
    loaded = tiny.loaded("opt")
    found = oracle_importance(loaded, task, FewShot(1, 8))
    down = projections(loaded)[1]

    def measured() -> tuple[float, float]:
        one = evaluate(loaded, task, num_fewshot=1, limit=8, split="examples")
        return float(one.correct.mean()), float(one.gold_loglikelihood.mean())

    full = measured()
    for layer, module in enumerate(down):
        # The weights themselves are zeroed, not a gate.
        saved = {name: value.detach().clone() for name, value in module.named_parameters()}
        with torch.no_grad():
            for value in module.parameters():
                value.zero_()
            without = measured()
            for name, value in module.named_parameters():
                value.copy_(saved[name])
        assert found.scores["accuracy"][layer] == pytest.approx(full[0] - without[0])
        assert found.scores["gold_loglikelihood"][layer] == pytest.approx(full[1] - without[1], abs=1e-4)
    assert found.num_examples == 8


def test_the_oracles_order_breaks_ties_by_loglikelihood(task: Task) -> None:
    found = oracle_importance(tiny.loaded("opt"), task, FewShot(limit=8))
    accuracy, loglikelihood = found.scores["accuracy"], found.scores["gold_loglikelihood"]
    order = order_of(found)
    assert order == sorted(range(3), key=lambda i: (round(accuracy[i], 10), float(f"{loglikelihood[i]:.4e}"), i))


def test_methods_by_name(task: Task) -> None:
    loaded = tiny.loaded("llama")
    assert ffn_importance(loaded, task, method="gradient", limit=2).component == "ffn"
    assert ffn_importance(loaded, task, limit=2).method == "oracle"
    with pytest.raises(OptionError, match="'magic'"):
        ffn_importance(loaded, task, method="magic")
    for name, option in {"heads": {"heads": [(0, 1)]}, "trees": {"trees": True}}.items():
        with pytest.raises(OptionError, match=f"^{name} is an argument of method='oracle'"):
            head_importance(loaded, task, **option)


def planted() -> LoadedModel:
    """A llama all of whose heads and FFNs write nothing, but for heads L0H1 and L2H2 and the FFN L1F."""
    model = tiny.model("llama")
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            width = block.self_attn.head_dim
            for head in range(4):
                if (layer, head) not in ((0, 1), (2, 2)):
                    block.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
            if layer != 1:
                block.mlp.down_proj.weight.zero_()
    return wrap(model, tiny.tokenizer(), name="planted")


def test_a_planted_circuit_is_found(task: Task) -> None:
    loaded = planted()
    found = gradient_importance(loaded, task, FewShot(1))
    for score in ("position", "example"):
        heads = found["head"].scores[score]
        alive = [str(p) for p, x in zip(found["head"].positions, heads, strict=True) if x > 0]
        assert alive == ["L0H1", "L2H2"], "all importance lies in the circuit"
        assert [i for i, x in enumerate(found["ffn"].scores[score]) if x > 0] == [1]
        assert heads.sum() == pytest.approx(heads[[1, 10]].sum())
    assert set(order_of(found["head"])[-2:]) == {1, 10}
    lost = oracle_importance(loaded, task, FewShot(1)).scores["gold_loglikelihood"]
    np.testing.assert_allclose(lost[[0, 2]], 0, atol=1e-5)
    assert abs(lost[1]) > 1e-3


def test_pruning_all_but_the_planted_circuit_changes_nothing(task: Task) -> None:
    loaded = planted()
    order = order_of(gradient_importance(loaded, task, FewShot())["head"])
    full = Mask.full(loaded.anatomy.heads_per_layer)
    positions = gradient_importance(loaded, task, FewShot(limit=2))["head"].positions
    without = full.without_heads(positions[i] for i in order[:10]).without_ffns([0, 2])
    both = evaluate(loaded, task, [full, without, full.without_heads([positions[order[-1]]])])
    np.testing.assert_allclose(both.gold_loglikelihood[1], both.gold_loglikelihood[0], atol=1e-5)
    assert np.abs(both.gold_loglikelihood[2] - both.gold_loglikelihood[0]).max() > 1e-3


def test_the_oracle_of_heads_is_one_evaluation_per_head(task: Task) -> None:
    loaded = tiny.loaded("llama")
    found = head_importance(loaded, task, method="oracle", num_fewshot=1, limit=6)
    full = Mask.full(loaded.anatomy.heads_per_layer)
    whole = evaluate(loaded, task, num_fewshot=1, limit=6, split="examples")
    for i, head in enumerate(found.positions):
        without = evaluate(loaded, task, [full.without_heads([head])], num_fewshot=1, limit=6, split="examples")
        assert found.scores["accuracy"][i] == pytest.approx(whole.accuracy[0] - without.accuracy[0])
        lost = whole.gold_loglikelihood[0].mean() - without.gold_loglikelihood[0].mean()
        assert found.scores["gold_loglikelihood"][i] == pytest.approx(lost, abs=1e-5)
    assert (found.component, found.method, found.num_examples) == ("head", "oracle", 6)
    some = oracle_importance(loaded, task, FewShot(1, 6), component="head", heads=[(0, 1), (2, 3)])
    measured = np.isfinite(some.scores["accuracy"])
    assert [str(p) for p, m in zip(some.positions, measured, strict=True) if m] == ["L0H1", "L2H3"]
    np.testing.assert_allclose(some.scores["gold_loglikelihood"][measured],
                               found.scores["gold_loglikelihood"][measured], atol=1e-5)
    with pytest.raises(OptionError, match="'oracle' or 'gradient'"):
        head_importance(loaded, task, method="guess")
