"""One table of tiny random decoders, made from configs without a network: every weight, bias and norm is random."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from headcount.engine.proof import verify_sweep
from headcount.model.anatomy import find_anatomy
from headcount.model.contracts import ContractResult
from headcount.model.load import LoadedModel, wrap

VOCAB = 96
_BASE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}
_GQA = {**_BASE, "num_key_value_heads": 2}
# d_head differs from hidden_size / heads, as in Gemma-2 and Qwen3.
_WIDE = {**_GQA, "head_dim": 16}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
         "eos_token_id": 2}
_OPT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32}
# Every second layer sees four tokens back, so that short prompts exceed the window.
_WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA4 = {**_WIDE, **_WINDOW, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
           "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# family: (model type, settings)
_TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "llama": ("llama", _GQA),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _BASE),
    "llama-bias": ("llama", {**_GQA, "attention_bias": True, "mlp_bias": True}),
    "gpt_neox-sequential": ("gpt_neox", {**_BASE, "use_parallel_residual": False}),
    "afmoe": ("afmoe", {**_WIDE, **_MOE}),
    "apertus": ("apertus", _GQA),
    "arcee": ("arcee", _GQA),
    "biogpt": ("biogpt", _BASE),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "codegen": ("codegen", {**_GPT2, "rotary_dim": 8, "n_ctx": 64}),
    "cohere": ("cohere", _GQA),
    "cohere2": ("cohere2", {**_GQA, **_WINDOW}),
    "cohere2_moe": ("cohere2_moe", {**_WIDE, **_MOE, **_WINDOW}),
    "cwm": ("cwm", _GQA),
    "dbrx": ("dbrx", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
                      "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
                      "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}}),
    "deepseek_v2": ("deepseek_v2", {**_BASE, "num_key_value_heads": 4, "head_dim": 8, "n_routed_experts": 4,
                                    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
                                    "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                                    "moe_intermediate_size": 16, "first_k_dense_replace": 1}),
    "deepseek_v3": ("deepseek_v3", {**_BASE, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
                                    "n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 12,
                                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                                    "moe_intermediate_size": 16, "first_k_dense_replace": 1}),
    "dots1": ("dots1", {**_WIDE, **_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0,
                        "n_group": 1, "topk_group": 1}),
    "ernie4_5": ("ernie4_5", _GQA),
    "ernie4_5_moe": ("ernie4_5_moe", {**_WIDE, **_MOE, "moe_layer_start_index": 0}),
    "exaone4": ("exaone4", {**_GQA, "sliding_window": 4}),
    "exaone_moe": ("exaone_moe", {**_WIDE, **_MOE, **_WINDOW}),
    "falcon": ("falcon", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-multi-query": ("falcon", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
                                      "num_attention_heads": 4, "multi_query": True}),
    "falcon-alibi": ("falcon", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
                                "num_attention_heads": 4, "multi_query": False, "alibi": True,
                                "parallel_attn": False, "bias": True}),
    "flex_olmo": ("flex_olmo", {**_WIDE, **_MOE}),
    "gemma": ("gemma", _WIDE),
    "gemma2": ("gemma2", {**_WIDE, "sliding_window": 4, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {**_WIDE, "sliding_window": 4, "query_pre_attn_scalar": 16}),
    "gemma4": ("gemma4_text", _GEMMA4),
    # Per-layer embeddings, and a second layer that uses the first one's keys and values.
    "gemma4-e": ("gemma4_text", {**_GEMMA4, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1,
                                 "layer_types": ["full_attention"] * 2}),
    "gemma4-experts": ("gemma4_text", {**_GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                                       "moe_intermediate_size": 24}),
    "glm": ("glm", {**_GQA, "head_dim": 8}),
    "glm4": ("glm4", {**_GQA, "head_dim": 8}),
    "glm4_moe": ("glm4_moe", {**_GQA, **_MOE, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
                              "first_k_dense_replace": 0}),
    "gpt_bigcode": ("gpt_bigcode", {**_GPT2, "multi_query": True}),
    "gpt_neo": ("gpt_neo", {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4,
                            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}),
    "gpt_oss": ("gpt_oss", {**_WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 8}),
    "granite": ("granite", {**_GQA, "attention_bias": True, "residual_multiplier": 0.5}),
    "granitemoe": ("granitemoe", {**_GQA, **_MOE}),
    "granite_swa": ("granite_swa", {**_WIDE, **_WINDOW}),
    "helium": ("helium", {**_GQA, "head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _WIDE),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**_WIDE, **_MOE}),
    "jais2": ("jais2", _GQA),
    "laguna": ("laguna", {**_WIDE, **_MOE, **_WINDOW}),
    "llama4": ("llama4_text", {**_WIDE, **_MOE, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1,
                               "attention_chunk_size": 4}),
    "mimo_v2_flash": ("mimo_v2_flash", {**_WIDE, **_MOE, **_WINDOW, "v_head_dim": 16}),
    "minimax_m2": ("minimax_m2", {**_WIDE, **_MOE}),
    "ministral": ("ministral", {**_WIDE, "sliding_window": 4}),
    "ministral3": ("ministral3", {**_GQA, "head_dim": 8}),
    "mistral": ("mistral", {**_GQA, "sliding_window": 4}),
    "mixtral": ("mixtral", {**_GQA, **_MOE, "sliding_window": 4}),
    "mpt": ("mpt", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "nanochat": ("nanochat", _GQA),
    "nemotron": ("nemotron", _GQA),
    "olmo": ("olmo", _GQA),
    "olmo2": ("olmo2", _GQA),
    "olmo3": ("olmo3", {**_GQA, "sliding_window": 4}),
    "olmoe": ("olmoe", {**_GQA, **_MOE}),
    "openai-gpt": ("openai-gpt", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "persimmon": ("persimmon", _BASE),
    "phi": ("phi", _BASE),
    "phi3": ("phi3", _GQA),
    "phi3-window": ("phi3", {**_GQA, "sliding_window": 4}),
    "phimoe": ("phimoe", {**_GQA, **_MOE, "attention_bias": True}),
    "qwen2": ("qwen2", _GQA),
    "qwen2-window": ("qwen2", {**_GQA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2_moe": ("qwen2_moe", {**_GQA, **_MOE, "shared_expert_intermediate_size": 24}),
    "qwen3": ("qwen3", _WIDE),
    "qwen3_moe": ("qwen3_moe", {**_WIDE, **_MOE}),
    "seed_oss": ("seed_oss", _WIDE),
    "smollm3": ("smollm3", {**_GQA, **_WINDOW, "use_sliding_window": True}),
    "solar_open": ("solar_open", {**_WIDE, **_MOE}),
    "stablelm": ("stablelm", _GQA),
    "starcoder2": ("starcoder2", {**_GQA, "sliding_window": 4}),
    "vaultgemma": ("vaultgemma", _WIDE),
    "xglm": ("xglm", {"vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
                      "max_position_embeddings": 64}),
}
# Families whose layers hold more than heads and one FFN, or heads that are not their own: `verify` must say so.
_UNFIT: dict[str, tuple[str, dict[str, Any]]] = {
    "bitnet": ("bitnet", _GQA),  # norms all heads together before the output projection
    "diffllama": ("diffllama", _GQA),  # each head's output is a difference of two heads
    "falcon_h1": ("falcon_h1", {**_GQA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),  # a mixer beside
    "gemma3n": ("gemma3n_text", {**_WIDE, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
                                 "num_kv_shared_layers": 0, "laurel_rank": 4, "intermediate_size": [48] * 2,
                                 "layer_types": ["sliding_attention", "full_attention"],
                                 "activation_sparsity_pattern": [0.0] * 2}),  # four streams, a branch per layer
    "granitemoeshared": ("granitemoeshared", {**_GQA, **_MOE, "shared_intermediate_size": 16}),  # a second FFN
}
# Families with layers that have no attention heads: refused by their block's name.
HYBRIDS: dict[str, dict[str, Any]] = {
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1},
    "jamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 48},
    "lfm2": {**_GQA, "layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"vocab_size": 64, "hidden_size": 32},
    "qwen3_next": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "intermediate_size": 48},
    "recurrent_gemma": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "intermediate_size": 48, "lru_width": 32},
    "rwkv": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1},
}
FAMILIES = list(_TABLE)
UNFIT = list(_UNFIT)
CORE = ("opt", "opt-350m", "llama", "gpt2", "gpt_neox")
MOE = ("cohere2_moe", "dbrx", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe",
       "hunyuan_v1_moe", "llama4", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open")
# They begin with a layer without experts.
DENSE_FIRST = ("afmoe", "deepseek_v2", "deepseek_v3", "exaone_moe", "laguna", "mimo_v2_flash")
# Positions are read off the column (ALiBi), masks are not taken, or the window (4) is fixed in a buffer.
SINGLE_ROWS = ("bloom", "falcon-alibi", "gpt_neo", "mpt", "openai-gpt")


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode, with weights that are random throughout, so that nothing is right by being zero."""
    kind, settings = {**_TABLE, **_UNFIT}[family]
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # Gemma-4's factor of a whole block
                buffer.fill_(0.5)
    return model.eval()


def reader() -> PreTrainedTokenizerBase:
    """A tokenizer of one word a token, for all of them."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCAB)}}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", model_max_length=64)


@functools.cache
def kernels(family: str) -> list[str]:
    """What the family's attention can be computed with."""
    model, found = tiny(family), []
    for kernel in ("sdpa", "eager"):
        try:
            model.set_attn_implementation(kernel)
        except ValueError:
            continue
        found += [kernel] if model.config._attn_implementation == kernel else []
    return found


def with_kernel(family: str, kernel: str) -> LoadedModel:
    """A tiny model with that attention."""
    model = tiny(family)
    model.set_attn_implementation(kernel)
    return wrap(model, reader(), name=family)


@functools.cache
def probed(family: str, kernel: str) -> LoadedModel:
    """One for all tests that only ask for its layout, which is then probed once."""
    return with_kernel(family, kernel)


@functools.cache
def third_contract(family: str) -> ContractResult:
    """Contract 3 on a tiny model, tested once."""
    model = tiny(family)
    result = verify_sweep(model, find_anatomy(model))
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return result


def hybrid(kind: str) -> PreTrainedModel:
    """A model without weights: it is refused before they are read."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **HYBRIDS[kind]))
    return model


def tokens(batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random ids, none of them special."""
    return torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
