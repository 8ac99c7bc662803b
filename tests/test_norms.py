"""Gradient scores of models that norm what a branch puts out: the score is of what the residual stream is given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import synthetic_study
from families import FAMILIES, reader, tiny
from headcount.analysis.study import Study
from headcount.engine.encode import Request, encode
from headcount.engine.engine import Engine
from headcount.engine.pack import Budget
from headcount.masks import Mask
from headcount.model.contracts import verify
from headcount.model.hooks import ablated, captured, frozen
from headcount.model.load import LoadedModel, wrap
from headcount.model.norms import LayerNorms
from headcount.study.ledger import Ledger, job_id
from headcount.study.plan import TaskFacts, plan
from headcount.study.spec import StudySpec

# By names, where the code looks at tensors: attention's norm, and the FFN's.
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
NORMED = {
    "afmoe": ("post_attention_layernorm", "post_mlp_layernorm"),
    "exaone4": _AFTER, "flex_olmo": _AFTER, "gemma2": _AFTER, "gemma3": _AFTER, "gemma4": _AFTER, "gemma4-e": _AFTER,
    # The norm of its experts' and dense FFN's sum counts as the FFN: what it puts out was the score's z before.
    "gemma4-experts": (_AFTER[0], None),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "olmo2": _AFTER, "olmo3": _AFTER,
}
NORMED_FFN = [family for family, (_, ffn) in NORMED.items() if ffn is not None]
TEXTS = [("w5 w9 w17 w8", " w30"), ("w40 w41 w42 w43 w44 w45", " w46 w47"), ("w60 w7", " w61")]
HEADS, D_MODEL = 4, 32


def loaded_of(family: str) -> LoadedModel:
    return wrap(tiny(family), reader(), name=family)


def with_biases() -> LoadedModel:
    """An OLMo-2 whose norms on branches are LayerNorms with a bias, so that norm(0) is not 0."""
    model = tiny("olmo2")
    torch.manual_seed(1)
    for block in model.model.layers:
        for name in _AFTER:
            norm = nn.LayerNorm(D_MODEL)
            nn.init.normal_(norm.weight, 0, 0.5)
            nn.init.normal_(norm.bias, 0, 0.5)
            setattr(block, name, norm)
        torch.nn.init.normal_(block.self_attn.o_proj.weight, 0.2, 0.3)
    return wrap(model.eval(), reader(), name="olmo2-biases")


def requests_of(loaded: LoadedModel) -> list[Request]:
    return encode(loaded.tokenizer, TEXTS, loaded.max_length)


def norm_of(loaded: LoadedModel, family: str, layer: int, which: int) -> nn.Module | None:
    name = NORMED[family][which]
    return None if name is None else getattr(loaded.anatomy.layers[layer].block, name)


def scores(loaded: LoadedModel) -> tuple[np.ndarray, np.ndarray]:
    return Engine.of(loaded).gradients(requests_of(loaded), budget=Budget(None, 150, 150))


def loss_of(loaded: LoadedModel, request: Request) -> torch.Tensor:
    logits = loaded.model(torch.from_numpy(request.ids)[None], use_cache=False).logits[0]
    losses = [-logits[p].log_softmax(-1)[t] for p, t in zip(request.scored, request.targets, strict=True)]
    return sum(losses) / len(losses)


def plain(loaded: LoadedModel, family: str, request: Request) -> tuple[np.ndarray, np.ndarray]:
    """One example, position by position and head by head: [score, head] and [score, FFN]."""
    kept: dict[tuple[str, int], torch.Tensor] = {}
    hooks = []
    for i, part in enumerate(loaded.anatomy.layers):
        after, ffn = norm_of(loaded, family, i, 0), norm_of(loaded, family, i, 1) or part.ffn_output
        hooks += [part.out_proj.register_forward_pre_hook(lambda m, a, i=i: kept.__setitem__(("z", i), a[0][0])),
                  after.register_forward_pre_hook(lambda m, a, i=i: kept.__setitem__(("u", i), a[0][0])),
                  after.register_forward_hook(lambda m, a, o, i=i: kept.__setitem__(("y", i), o)),
                  ffn.register_forward_hook(lambda m, a, o, i=i: kept.__setitem__(("f", i), o))]
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(True)
    layers, n = range(loaded.anatomy.num_layers), len(request.ids)
    loss = loss_of(loaded, request)
    gradients = torch.autograd.grad(loss, [kept[which, i] for which in "yf" for i in layers])
    for hook in hooks:
        hook.remove()
    heads, ffns = np.zeros((2, len(layers), HEADS)), np.zeros((2, len(layers)))
    for i, part in enumerate(loaded.anatomy.layers):
        norm, dy, df = norm_of(loaded, family, i, 0), gradients[i][0], gradients[len(layers) + i][0]
        y, u, z = kept["y", i][0], kept["u", i], kept["z", i]
        for h in range(HEADS):
            own = slice(h * part.d_head, (h + 1) * part.d_head)
            products = []
            for t in range(n):
                without = u[t] - part.out_proj.weight[:, own] @ z[t, own]
                products.append(float(((y[t] - norm(without[None, None])[0, 0]) @ dy[t]).detach()))
            heads[:, i, h] = sum(map(abs, products)) / n, abs(sum(products))
        after = norm_of(loaded, family, i, 1)
        left = torch.zeros(D_MODEL) if after is None else after(torch.zeros(1, 1, D_MODEL))[0, 0]
        products = [float(((kept["f", i].reshape(n, -1)[t] - left) @ df[t]).detach()) for t in range(n)]
        ffns[:, i] = sum(map(abs, products)) / n, abs(sum(products))
    return heads.reshape(2, -1), ffns


@contextlib.contextmanager
def altered(module: nn.Module, factor: float) -> Iterator[None]:
    """A factor on what a module puts out, as if its weights (a norm's gain) had it."""
    handle = module.register_forward_hook(
        lambda m, a, o: (factor * o[0], *o[1:]) if isinstance(o, tuple) else factor * o)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_on_branches_are_found(family: str) -> None:
    loaded = loaded_of(family)
    expected = {layer: LayerNorms(norm_of(loaded, family, layer, 0), norm_of(loaded, family, layer, 1))
                for layer in range(2) if family in NORMED}
    assert loaded.norms == expected
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())


@pytest.mark.parametrize("family", [*NORMED, "biases"])
def test_scores_are_those_of_a_plain_computation(family: str) -> None:
    loaded, named = (with_biases(), "olmo2") if family == "biases" else (loaded_of(family), family)
    found = scores(loaded)
    slow = [plain(loaded, named, request) for request in requests_of(loaded)]
    for which in (0, 1):
        expected = np.stack([one[which] for one in slow], axis=1)
        assert expected.max() > 1e-3
        np.testing.assert_allclose(found[which], expected, rtol=2e-3, atol=1e-5 * expected.max())


@pytest.mark.parametrize("family", NORMED_FFN)
def test_the_length_of_what_an_ffn_writes_before_its_norm_does_not_matter(family: str) -> None:
    loaded = loaded_of(family)
    before = scores(loaded)
    with altered(loaded.anatomy.layers[0].ffn_output, 8.0):
        scaled = scores(loaded)
    for a, b in zip(before, scaled, strict=True):
        np.testing.assert_allclose(b, a, rtol=5e-3, atol=1e-3 * a.max())


@pytest.mark.parametrize("family", NORMED)
def test_an_ffns_score_is_what_the_loss_changes_with_its_norms_gain(family: str) -> None:
    """(y - norm(0)) . dL/dy, summed over positions, is the slope by the logarithm of the gain: no autograd here."""
    loaded = loaded_of(family)
    _, found = scores(loaded)
    for layer, part in enumerate(loaded.anatomy.layers):
        losses = []
        for factor in (1 + 5e-3, 1 - 5e-3):
            with torch.no_grad(), altered(norm_of(loaded, family, layer, 1) or part.ffn_output, factor):
                losses.append([float(loss_of(loaded, request)) for request in requests_of(loaded)])
        slopes = np.abs(np.subtract(*losses)) / 1e-2
        np.testing.assert_allclose(found[1, :, layer], slopes, rtol=2e-2, atol=5e-3 * slopes.max())


@pytest.mark.parametrize("family", NORMED_FFN)
def test_before_its_norm_an_ffn_scores_rounding(family: str) -> None:
    """What these scores were before: z . dL/dz of a branch whose length a norm takes away."""
    loaded = loaded_of(family)
    (request, *_) = requests_of(loaded)
    with frozen(loaded.model), captured(loaded.anatomy, gradients=True) as caught:
        loss = loss_of(loaded, request)
    gradients = torch.autograd.grad(loss, caught.ffns)
    old = [abs(float((z * g).sum())) for z, g in zip(caught.ffns, gradients, strict=True)]
    _, new = scores(loaded)
    assert max(old) < 1e-3 * new[1, 0].min()


@pytest.mark.parametrize("family", NORMED)
def test_what_writes_nothing_scores_nothing(family: str) -> None:
    loaded = loaded_of(family)
    part = loaded.anatomy.layers[1]
    with torch.no_grad():
        part.out_proj.weight[:, : 2 * part.d_head] = 0
    with altered(part.ffn_output, 0.0):
        heads, ffns = scores(loaded)
    assert not heads[:, :, HEADS : HEADS + 2].any()
    assert (heads[:, :, HEADS + 2 :] > 0).all()
    assert not ffns[:, :, 1].any()
    assert (ffns[:, :, 0] > 0).all()


def test_a_norms_bias_is_no_part_of_the_branch() -> None:
    loaded = with_biases()
    assert all(contract.holds for contract in verify(loaded))
    with altered(loaded.anatomy.layers[0].ffn_output, 0.0):
        _, ffns = scores(loaded)
    assert not ffns[:, :, 0].any()
    assert (ffns[:, :, 1] > 0).all()


@pytest.mark.parametrize("family", NORMED)
def test_an_ffn_made_important_ranks_first(family: str) -> None:
    for important in (0, 1):
        loaded = loaded_of(family)
        with contextlib.ExitStack() as gains:
            for layer, part in enumerate(loaded.anatomy.layers):
                norm = norm_of(loaded, family, layer, 1) or part.ffn_output
                gains.enter_context(altered(norm, 1.0 if layer == important else 1e-3))
            found = scores(loaded)[1]
        assert (found.mean(1).argmax(-1) == important).all()
        assert found.mean(1).max() > 10 * found.mean(1).min()


@pytest.mark.parametrize("family", NORMED)
def test_heads_of_a_branch_between_one_and_many(family: str) -> None:
    """A head that is its whole branch is worth what the branch is; what is small is worth its derivative.

    The derivative of the norm alone adds up to 0 over the heads, so that it gives the single head 0.
    """
    loaded = loaded_of(family)
    part = loaded.anatomy.layers[0]
    own = slice(part.d_head, 2 * part.d_head)
    (request, *_) = requests_of(loaded)

    def measured() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with frozen(loaded.model), captured(loaded.anatomy, gradients=True, norms=loaded.norms) as caught:
            loss = loss_of(loaded, request)
        dz, dy = torch.autograd.grad(loss, [caught.heads[0], caught.attention[0]])
        whole = (caught.attention[0] * dy).sum()
        derivative = (caught.heads[0] * dz).sum((0, 1, 3))
        return scores(loaded)[0][1, 0, :HEADS], abs(derivative).detach().numpy(), abs(whole).detach().numpy()

    with torch.no_grad():
        part.out_proj.weight[:, own] *= 1e-3
    found, derivative, _ = measured()
    np.testing.assert_allclose(found[1], derivative[1], rtol=2e-2)
    with torch.no_grad():
        part.out_proj.weight[:, own] *= 1e3
        part.out_proj.weight[:, : own.start] = 0
        part.out_proj.weight[:, own.stop :] = 0
    found, derivative, whole = measured()
    np.testing.assert_allclose(found[1], whole, rtol=1e-3)
    assert derivative[1] < 1e-3 * found[1]
    assert not np.delete(found, 1).any()


def test_in_bfloat16_scores_are_near_those_in_float32() -> None:
    exact = scores(loaded_of("gemma3"))
    model = tiny("gemma3")
    rough = scores(wrap(model.bfloat16(), reader(), name="gemma3"))
    for a, b in zip(rough, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.3, atol=0.05 * b.max())


def test_what_is_removed_before_is_seen() -> None:
    """Scores under a gate: a head that is off scores nothing, and the norm is still found."""
    loaded = loaded_of("olmo2")
    with ablated(loaded.anatomy, Mask.full((HEADS, HEADS)).without_heads([(0, 2)]).without_ffns([1])):
        heads, ffns = scores(loaded)
    assert not heads[:, :, 2].any()
    assert (np.delete(heads, 2, axis=-1) > 0).all()
    assert not ffns[:, :, 1].any()


def test_jobs_say_when_scores_pass_norms() -> None:
    spec = StudySpec(model="m", tasks=("a",), shots=(0,), ffn_order="gradient")
    facts = [TaskFacts("a", "f", {0: 10}, {0: 10})]
    before, after = (plan(spec, "model", (2, 2), facts, through_norms=norms) for norms in (False, True))
    assert [p.key for p in before] == [p.key for p in plan(spec, "model", (2, 2), facts)]
    (old,), (new,) = ([p.key for p in jobs if p.key["kind"] == "importance"] for jobs in (before, after))
    assert new == {**old, "through_norms": True}
    curves = [{p.key["curve"]["importance"] for p in jobs if "importance" in p.key.get("curve", {})}
              for jobs in (before, after)]
    assert curves == [{job_id(old)}, {job_id(new)}]


def test_scores_of_before_are_passed_over_where_they_were_measured_again(tmp_path: Path) -> None:
    folder = synthetic_study.write(tmp_path, tasks=("red",), shots=(5,), importance=False)
    ledger = Ledger(folder)
    old = {**synthetic_study.of_task("importance", "red", 5, 50), "method": "gradient"}
    new = {**old, "through_norms": True}
    curve = {**synthetic_study.of_task("evaluation", "red", 5, 100), "split": "evaluation"}
    label = synthetic_study._label("head", "gradient", 0.1)
    of_curve = {"metric": "acc", "truncated": 0, "tokens": 1, "seconds": 0.1, "masks": [label]}

    def write(job: dict[str, object], value: float, right: int) -> None:
        table = pd.DataFrame({"component": "head", "layer": [0, 1], "head": [0, 0], "score": "position",
                              "importance": value, "stderr": 0.0})
        ledger.write(job, table, {"num_examples": 50, "truncated": 0})
        order = {"component": "head", "order": "gradient", "fractions": [0.1], "importance": job_id(job),
                 "score": "position"}
        ledger.write({**curve, "curve": order}, synthetic_study._rows(right, 100, 0), of_curve)

    def shown() -> tuple[set[float], set[float]]:
        study = Study(folder)
        rows = study.evaluations()
        rows = rows[(rows["order"] == "gradient") & (rows["fraction"] == 0.1)]
        return set(study.importance()["importance"]), {rows["correct"].mean()}

    write(old, 1.0, 10)
    assert shown() == ({1.0}, {0.1})
    write(new, 2.0, 90)
    assert shown() == ({2.0}, {0.9})
