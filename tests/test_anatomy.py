from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from families import _TABLE, CORE, DENSE_FIRST, FAMILIES, HYBRIDS, MOE, UNFIT, hybrid, tiny
from headcount.errors import ModelError, OptionError
from headcount.masks import Mask
from headcount.model.anatomy import Anatomy, Names, find_anatomy
from headcount.model.contracts import verify

# Latent attention shares its projections among heads: only the output projection's slice is counted as a head's.
LATENT = ("deepseek_v2", "deepseek_v3")
KV_GROUPS = {"opt": 4, "opt-350m": 4, "llama": 2, "gpt2": 4, "gpt_neox": 4, "falcon": 2, "falcon-multi-query": 1,
             "falcon-alibi": 4, "gpt_bigcode": 1, "phi3": 2, "mpt": 4, "bloom": 4, "gptj": 4, "gemma2": 2, "qwen3": 2,
             "gpt_oss": 2, "mixtral": 2}


def nothing(anatomy: Anatomy) -> Mask:
    return Mask([[False] * n for n in anatomy.heads_per_layer], [False] * anatomy.num_layers)


def altered(anatomy: Anatomy, **changes: object) -> Anatomy:
    layers = tuple(dataclasses.replace(part, **{k: f(part) if callable(f) else f for k, f in changes.items()})
                   for part in anatomy.layers)
    return dataclasses.replace(anatomy, layers=layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_ffns_are_counted_right(family):
    model = tiny(family)
    anatomy = find_anatomy(model)
    assert anatomy.heads_per_layer == (4, 4)
    assert (anatomy.num_layers, anatomy.num_heads) == (2, 8)
    assert anatomy.num_parameters == model.num_parameters()
    groups = [part.num_kv_heads for part in anatomy.layers]
    # MiMo's layers with a window have twice as many.
    said = _TABLE[family][1].get("num_key_value_heads", groups[0])
    assert groups == ([4, 2] if family == "mimo_v2_flash" else [KV_GROUPS.get(family, said)] * 2)
    for part in anatomy.layers:
        assert part.d_model == 32
        assert part.d_head == ((family not in LATENT and getattr(model.config, "head_dim", None)) or 8)
    assert [part.routed for part in anatomy.layers] == [family in MOE, family in (*MOE, *DENSE_FIRST)]


@pytest.mark.parametrize("family", MOE)
def test_all_experts_are_counted_with_their_ffn(family):
    for part in find_anatomy(tiny(family)).layers:
        if part.routed and part.ffn is not None:
            own = sum(p.numel() for p in part.ffn.parameters())
            assert own <= part.ffn_parameters <= own + 2 * part.d_model, "and the norm before it"


@pytest.mark.parametrize("family", FAMILIES)
def test_contracts_hold(family):
    model = tiny(family)
    kernel, asked = model.config._attn_implementation, [p.requires_grad for p in model.parameters()]
    identity, slices = verify(model)
    assert identity.holds, identity
    assert slices.holds, slices
    assert model.config._attn_implementation == kernel
    assert [p.requires_grad for p in model.parameters()] == asked


@pytest.mark.parametrize("family", UNFIT)
def test_contracts_tell_models_that_are_more_than_heads_and_ffns(family):
    results = verify(tiny(family))
    assert [r.holds for r in results] == ([True, False] if family in ("bitnet", "diffllama") else [False, True])
    assert all(r.holds or (r.worst_error > 1e-2 and r.detail) for r in results)


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_everything_leaves_no_weight_of_attention_and_ffn(family):
    model = tiny(family)
    anatomy = find_anatomy(model)
    expected = 0
    for part in anatomy.layers:
        expected += sum(p.numel() for p in part.attention.parameters())
        if getattr(part.out_proj, "bias", None) is not None:
            expected -= part.out_proj.bias.numel()
        expected += part.ffn_parameters
    assert anatomy.parameters_removed(nothing(anatomy)) == expected
    assert anatomy.parameters_removed(Mask.full(anatomy.heads_per_layer)) == 0


def test_a_head_of_latent_attention_has_rows_of_what_is_decompressed():
    anatomy = find_anatomy(tiny("deepseek_v3"))
    queries, keys_and_values, output = (8 + 8) * 12, (8 + 8) * 8, 8 * 32
    removed = anatomy.parameters_removed(Mask.full((4, 4)).without_heads([(0, 1)]))
    assert removed == queries + keys_and_values + output


def test_parameters_of_opt_66b_are_the_papers():
    config = OPTConfig(hidden_size=9216, num_hidden_layers=1, ffn_dim=36864, num_attention_heads=72, vocab_size=64)
    with torch.device("meta"):
        anatomy = find_anatomy(AutoModelForCausalLM.from_config(config))
    weights, biases = 4 * 9216 * 128, 3 * 128
    assert anatomy.parameters_per_head(0) == weights + biases
    assert weights == pytest.approx(4.72e6, rel=1e-3)
    # Two matrices, their biases, and the norm before them.
    assert anatomy.parameters_per_ffn(0) == 2 * 9216 * 36864 + 36864 + 9216 + 2 * 9216
    assert anatomy.parameters_per_ffn(0) == pytest.approx(679.5e6, rel=1e-3)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "opt-350m"])
def test_a_head_of_its_own_keys_takes_q_k_v_and_o(family):
    anatomy = find_anatomy(tiny(family))
    one = Mask.full((4, 4)).without_heads([(1, 2)])
    assert anatomy.parameters_removed(one) == 4 * 32 * 8 + 3 * 8 == anatomy.parameters_per_head(1)


def test_a_kv_group_goes_with_its_last_head():
    anatomy = find_anatomy(tiny("llama"))
    full, head = Mask.full((4, 4)), 32 * 8
    assert anatomy.parameters_per_head(0) == 2 * head
    assert anatomy.parameters_removed(full.without_heads([(0, 0)])) == 2 * head
    assert anatomy.parameters_removed(full.without_heads([(0, 1), (0, 2)])) == 4 * head  # of two groups
    assert anatomy.parameters_removed(full.without_heads([(0, 0), (0, 1)])) == 4 * head + 2 * head
    assert anatomy.parameters_removed(full.without_heads((0, i) for i in range(4))) == 8 * head + 4 * head


def test_an_ffns_norm_goes_unless_it_is_shared_or_follows_the_residual_add():
    matrices = 2 * 32 * 48 + 48 + 32
    assert find_anatomy(tiny("opt")).parameters_per_ffn(0) == matrices + 2 * 32
    assert find_anatomy(tiny("opt-350m")).parameters_per_ffn(0) == matrices
    assert find_anatomy(tiny("gpt_neox")).parameters_per_ffn(0) == matrices + 2 * 32
    assert find_anatomy(tiny("phi")).parameters_per_ffn(0) == matrices  # one norm feeds attention and FFN
    assert find_anatomy(tiny("llama")).parameters_per_ffn(0) == 3 * 32 * 48 + 32
    assert find_anatomy(tiny("gemma2")).parameters_per_ffn(0) == 3 * 32 * 48 + 32
    assert find_anatomy(tiny("olmo2")).parameters_per_ffn(0) == 3 * 32 * 48


def test_a_mask_of_another_model_is_refused():
    with pytest.raises(OptionError, match="2 x 4"):
        find_anatomy(tiny("opt")).parameters_removed(Mask.full((4, 5)))


@pytest.mark.parametrize(("family", "wrong"), [
    ("bloom", {"ffn_output": lambda part: part.block.mlp}),  # adds the residual itself
    ("mpt", {"ffn_output": lambda part: part.block.ffn}),
    ("opt", {"ffn_output": lambda part: part.block.fc1}),  # the down projection's bias is left over
    ("opt", {"out_proj": lambda part: part.attention.v_proj}),
    ("opt-350m", {"out_proj": lambda part: part.attention.v_proj}),
    ("opt-350m", {"ffn_output": lambda part: part.block.fc1}),
    ("gemma2", {"out_proj": lambda part: part.attention.o_proj, "ffn_output": lambda part: part.block.input_layernorm}),
])
def test_the_first_contract_fails_for_gates_at_a_wrong_place(family, wrong):
    model = tiny(family)
    identity, _ = verify(model, altered(find_anatomy(model), **wrong))
    assert not identity.holds
    assert identity.worst_error > 1e-3
    assert "block" in identity.detail


@pytest.mark.parametrize("family", CORE)
def test_the_second_contract_fails_where_slices_are_not_heads(family):
    model = tiny(family)
    anatomy = find_anatomy(model)
    assert not verify(model, altered(anatomy, num_heads=2, num_kv_heads=1, d_head=16))[1].holds
    # Three features of each head now lie in the next one's slice.
    anatomy.layers[1].out_proj.register_forward_pre_hook(lambda module, args: (args[0].roll(3, -1),))
    _, slices = verify(model, anatomy)
    assert not slices.holds
    assert slices.worst_error > 1e-3
    assert slices.detail.startswith("L1H")


@pytest.mark.parametrize("kind", HYBRIDS)
def test_layers_without_attention_are_refused_by_name(kind):
    model = hybrid(kind)
    said = r"(layers|blocks)\.0.* has no (attention|output projection): looked for .*names=Names"
    with pytest.raises(ModelError, match=said) as e:
        find_anatomy(model)
    assert "\n" not in str(e.value)


def test_other_names_can_be_passed():
    model = tiny("llama")
    for block in model.model.layers:
        block.mixer = block.self_attn
        del block.self_attn
    with pytest.raises(ModelError, match="mixer"):
        find_anatomy(model)
    assert find_anatomy(model, Names(attention=("mixer",))).heads_per_layer == (4, 4)


def test_number_of_heads_must_fit_the_weights():
    model = tiny("llama")
    model.config.num_attention_heads = 5
    with pytest.raises(ModelError, match="32 inputs"):
        find_anatomy(model)


def test_table_has_a_row_per_layer():
    anatomy = find_anatomy(tiny("llama"))
    assert anatomy.table()[1] == {"layer": 1, "heads": 4, "kv_groups": 2, "d_head": 8, "parameters_per_head": 512,
                                  "parameters_per_ffn": 3 * 32 * 48 + 32}


def test_layers_that_differ_in_kv_groups_are_counted_one_by_one():
    from transformers import Gemma4TextConfig

    # As Gemma-4-26B-A4B: layers of full attention have their own number of groups, and keys that serve as values.
    model = AutoModelForCausalLM.from_config(Gemma4TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_global_key_value_heads=1, attention_k_eq_v=True, head_dim=16, global_head_dim=16,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=96, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"])).eval()
    anatomy = find_anatomy(model)
    assert anatomy.heads_per_layer == (4, 4)
    assert [part.num_kv_heads for part in anatomy.layers] == [2, 1]
    assert [part.kv_parameters for part in anatomy.layers] == [2 * 32 * 16, 32 * 16]
    assert all(result.holds for result in verify(model, anatomy))
