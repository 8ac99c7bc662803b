from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from families import CORE, FAMILIES, tiny, tokens
from headcount.errors import OptionError
from headcount.masks import Mask
from headcount.model.anatomy import LayerAnatomy, find_anatomy
from headcount.model.hooks import ablated, captured, frozen


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def erase_head(part: LayerAnatomy, head: int) -> None:
    """The slow, obvious way: what reads the head's slice reads nothing."""
    columns = slice(head * part.d_head, (head + 1) * part.d_head)
    with torch.no_grad():
        if hasattr(part.out_proj, "nx"):
            part.out_proj.weight[columns] = 0
        else:
            part.out_proj.weight[:, columns] = 0


def erase_ffn(part: LayerAnatomy) -> None:
    with torch.no_grad():
        for p in part.ffn_output.parameters():
            p.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_ablating_equals_erasing_weights(family):
    model, ids = tiny(family), tokens()
    anatomy = find_anatomy(model)
    before = logits(model, ids)
    for heads, ffns in (([(0, 1)], []), ([(1, 0), (1, 3), (0, 2)], []), ([], [0]), ([], [0, 1]), ([(0, 0)], [1])):
        erased = copy.deepcopy(model)
        parts = find_anatomy(erased).layers
        for layer, head in heads:
            erase_head(parts[layer], head)
        for layer in ffns:
            erase_ffn(parts[layer])
        with ablated(anatomy, Mask.full((4, 4)).without_heads(heads).without_ffns(ffns)):
            after = logits(model, ids)
        torch.testing.assert_close(after, logits(erased, ids), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    assert hooks(model) == 0
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", ["opt", "xglm", "biogpt", "llama", "gpt2"])
def test_a_removed_ffn_computes_nothing(family):
    model = tiny(family)
    anatomy = find_anatomy(model)
    given, handles = [], []
    for part in anatomy.layers:
        attention = set(part.attention.modules())
        for module in part.block.modules():
            if module not in attention and (hasattr(module, "in_features") or hasattr(module, "nx")):
                handles.append(module.register_forward_hook(lambda module, args, output: given.append(args[0].numel())))
    none = Mask.full(anatomy.heads_per_layer).without_ffns(range(anatomy.num_layers))
    with torch.no_grad(), ablated(anatomy, none):
        model(tokens())
    for handle in handles:
        handle.remove()
    assert len(given) >= 2 * anatomy.num_layers
    assert not any(given)


def test_a_full_mask_touches_nothing():
    model = tiny("opt")
    with ablated(find_anatomy(model), Mask.full((4, 4))):
        assert hooks(model) == 0


def test_only_layers_that_lose_something_are_touched():
    model = tiny("opt")
    anatomy = find_anatomy(model)
    with ablated(anatomy, Mask.full((4, 4)).without_heads([(1, 0)]).without_ffns([1])):
        assert hooks(model) == 3  # one before the output projection, one at each end of the FFN
        assert len(anatomy.layers[1].out_proj._forward_pre_hooks) == 1
        assert len(anatomy.layers[1].ffn_output._forward_hooks) == 1


@pytest.mark.parametrize("family", CORE)
def test_hooks_are_gone_after_an_exception(family):
    model, ids = tiny(family), tokens()
    anatomy = find_anatomy(model)
    before = logits(model, ids)
    settings = [p.requires_grad for p in model.parameters()]

    def interrupted() -> None:
        with frozen(model), ablated(anatomy, Mask.full((4, 4)).without_ffns([0])), captured(anatomy, gradients=True):
            logits(model, ids)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert hooks(model) == 0
    assert [p.requires_grad for p in model.parameters()] == settings
    assert torch.equal(logits(model, ids), before)


def test_nan_of_what_is_removed_does_not_leak():
    model, ids = tiny("llama"), tokens()
    anatomy = find_anatomy(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:8] = float("nan")  # KV group 0: heads 0 and 1
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    assert logits(model, ids).isnan().any()
    with ablated(anatomy, Mask.full((4, 4)).without_heads([(0, 0), (0, 1)]).without_ffns([1])):
        assert logits(model, ids).isfinite().all()


def test_a_mask_of_another_model_is_refused():
    with pytest.raises(OptionError, match="heads per layer"):
        with ablated(find_anatomy(tiny("opt")), Mask.full((4, 4, 4))):
            pass


def test_bfloat16_models_stay_bfloat16():
    model = tiny("gpt2").bfloat16()
    with ablated(find_anatomy(model), Mask.full((4, 4)).without_heads([(0, 0)]).without_ffns([1])):
        assert logits(model, tokens()).dtype == torch.bfloat16


def plain_products(model: PreTrainedModel, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Activation x gradient as autograd gives it when parameters ask for gradients too."""
    anatomy = find_anatomy(model)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def keep(found: list[torch.Tensor], x: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
        found.append(x[0] if isinstance(x, tuple) else x)
        found[-1].retain_grad()
        # Falcon adds to its FFN's output in place.
        return (x[0].clone(), *x[1:]) if isinstance(x, tuple) else x.clone()

    handles = []
    for part in anatomy.layers:
        handles.append(part.out_proj.register_forward_pre_hook(lambda m, args: keep(inputs, args)))
        handles.append(part.ffn_output.register_forward_hook(lambda m, args, out: keep(outputs, out)))
    loss(model(ids, use_cache=False).logits).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return [x.detach() * x.grad for x in inputs], [x.detach() * x.grad for x in outputs]


def loss(values: torch.Tensor) -> torch.Tensor:
    return values.log_softmax(-1)[..., 5].sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_gradients_are_autograds(family):
    model, ids = tiny(family), tokens()
    anatomy = find_anatomy(model)
    before = logits(model, ids)
    heads, ffns = plain_products(model, ids)
    with frozen(model), captured(anatomy, gradients=True) as found:
        values = model(ids, use_cache=False).logits
        gradients = torch.autograd.grad(loss(values), [*found.heads, *found.ffns])
    assert torch.equal(values, before)
    assert all(p.grad is None for p in model.parameters())
    for layer, part in enumerate(anatomy.layers):
        z, y = found.heads[layer], found.ffns[layer]
        assert z.shape == (2, 7, part.num_heads, part.d_head)
        assert y.shape == (2, 7, part.d_model)
        for mine, plain in ((z * gradients[layer], heads[layer]), (y * gradients[2 + layer], ffns[layer])):
            torch.testing.assert_close(mine.reshape(plain.shape), plain, rtol=1e-4, atol=1e-6)


def test_capture_holds_the_last_forward_pass_and_sees_gates_opened_before():
    model = tiny("opt")
    anatomy = find_anatomy(model)
    with ablated(anatomy, Mask.full((4, 4)).without_heads([(1, 2)]).without_ffns([0])):
        with captured(anatomy, gradients=False) as found:
            logits(model, tokens(batch=1, length=3))
            logits(model, tokens(batch=2, length=5))
    assert [tuple(z.shape) for z in found.heads] == [(2, 5, 4, 8)] * 2
    assert not found.heads[1][:, :, 2].any()
    assert found.heads[1][:, :, 1].any()
    assert not found.ffns[0].any()
    assert not found.heads[0].requires_grad
