"""GGUF files of tiny models, as llama.cpp's own converter writes them: names, orders of rows, norms, metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 128
_PLAIN = gguf.GGMLQuantizationType.F32
_BASE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
_GQA = {**_BASE, "num_key_value_heads": 2}
# Neither the file nor transformers' conversion says how wide these families' heads are: they have their class's width.
_QWEN3 = {**_GQA, "head_dim": 128}
_GEMMA = {**_GQA, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 64}
_FALCON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
           "max_position_embeddings": 512}
# GGUF's name of the architecture: transformers' type of model, and settings.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA),
    "qwen2": ("qwen2", _GQA),
    "qwen3": ("qwen3", _QWEN3),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", {**_GEMMA, "num_hidden_layers": 6}),
    "phi3": ("phi3", {**_GQA, "pad_token_id": 0}),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "falcon": ("falcon", {**_FALCON, "multi_query": True}),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "stablelm": ("stablelm", {**_GQA, "partial_rotary_factor": 0.25}),
    "starcoder2": ("starcoder2", _GQA),
    "nemotron": ("nemotron", _GQA),
    "qwen2moe": ("qwen2_moe", {**_GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 1408,
                               "shared_expert_intermediate_size": 5632}),
    "qwen3moe": ("qwen3_moe", {**_QWEN3, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768,
                               "norm_topk_prob": True}),
    "minimax-m2": ("minimax_m2", {**_GQA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def build(arch: str, **settings: Any) -> PreTrainedModel:
    """A model whose weights are random throughout, so that nothing is right by being zero or one."""
    kind, usual = FAMILIES[arch]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**usual, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def write(
    model: PreTrainedModel, path: Path, arch: str, *, fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None, kind: gguf.GGMLQuantizationType = _PLAIN,
) -> Path:
    """The model as a GGUF file of this architecture.

    Args:
        model: To be stored.
        path: Where.
        arch: GGUF's name of its architecture.
        fields: Metadata in place of the usual ones, by full name; None leaves one out.
        tensors: More tensors, or others of the same name.
        kind: How matrices are stored, where their rows are whole blocks of it.
    """
    writer = gguf.GGUFWriter(str(path), arch)
    for name, value in {**_metadata(model, arch), **(fields or {})}.items():
        _add(writer, name, value)
    for name, array in {**_stored(model, arch), **(tensors or {})}.items():
        own = kind if array.ndim == 2 and not array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] else _PLAIN
        values = gguf.quants.quantize(np.ascontiguousarray(array, dtype=np.float32), own)
        writer.add_tensor(name, values, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif value is not None:
        writer.add_array(name, value)


def _metadata(model: PreTrainedModel, arch: str) -> dict[str, Any]:
    """What the converter writes of a config, under the keys' full names."""
    c = model.config
    heads, width = c.num_attention_heads, c.hidden_size
    d_head = getattr(c, "head_dim", None) or width // heads
    layers = c.num_hidden_layers
    eps = next(getattr(c, n) for n in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps",
                                       "norm_epsilon") if hasattr(c, n))
    rms = arch.startswith(("llama", "qwen", "gemma", "phi3", "minimax"))
    said: dict[str, Any] = {
        "context_length": getattr(c, "max_position_embeddings", None) or 512, "embedding_length": width,
        "block_count": layers, "attention.head_count": heads,
        "feed_forward_length": getattr(c, "intermediate_size", None) or getattr(c, "ffn_hidden_size", 4 * width),
        f"attention.layer_norm_{'rms_' if rms else ''}epsilon": float(eps),
    }
    if arch not in ("gpt2", "bloom"):
        kv = c.num_kv_heads if arch == "falcon" and c.new_decoder_architecture else (
            1 if arch == "falcon" else c.num_key_value_heads)
        said["attention.head_count_kv"] = kv
    rope = getattr(c, "rope_parameters", None)
    if rope is not None and arch not in ("gpt2", "bloom"):
        full = rope.get("full_attention", rope)
        said["rope.freq_base"] = float(full["rope_theta"])
        if not arch.startswith(("gemma", "qwen")):
            said["rope.dimension_count"] = int(d_head * full.get("partial_rotary_factor", 1.0))
    if arch in ("llama", "qwen3", "qwen3moe", "minimax-m2", "gemma2", "gemma3"):
        said |= {"attention.key_length": d_head, "attention.value_length": d_head}
    if arch == "llama":
        said["vocab_size"] = c.vocab_size
    if arch == "stablelm":
        said["use_parallel_residual"] = bool(c.use_parallel_residual)
    if arch in ("gemma2", "gemma3"):
        said["attention.sliding_window"] = c.sliding_window
    if arch == "gemma2":
        said |= {"attn_logit_softcapping": float(c.attn_logit_softcapping),
                 "final_logit_softcapping": float(c.final_logit_softcapping)}
    if arch == "falcon":
        said["tensor_data_layout"] = "jploski"
    if arch.endswith("moe"):
        said |= {"expert_count": c.num_experts, "expert_used_count": c.num_experts_per_tok,
                 "expert_feed_forward_length": c.moe_intermediate_size}
    if arch == "minimax-m2":
        said |= {"expert_count": c.num_local_experts, "expert_used_count": c.num_experts_per_tok,
                 "expert_feed_forward_length": c.intermediate_size, "expert_gating_func": 2}
    if arch == "qwen2moe":
        said["expert_shared_feed_forward_length"] = c.shared_expert_intermediate_size
    return {**{f"{arch}.{name}": value for name, value in said.items()}, "general.name": "tiny", **_tokenizer(c)}


def _tokenizer(config: Any) -> dict[str, Any]:
    words = ["<pad>", "<s>", "</s>", *(chr(c) for c in range(33, 127)), "ab"]
    words += [f"<x{i}>" for i in range(config.vocab_size - len(words))]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(words) - 3), "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.padding_token_id": 0, "general.file_type": 0}


def _stored(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    """Every weight under the name and in the order in which the converter stores it."""
    names = gguf.get_tensor_name_map(next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch),
                                     model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings and arch != "bloom"
    found: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        array = tensor.float().numpy()
        if expert := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj", name):
            halves = np.split(array, 2, axis=1) if expert[2] == "gate_up" else [array]
            for part, half in zip(("gate", "up") if expert[2] == "gate_up" else ("down",), halves, strict=True):
                found[f"blk.{expert[1]}.ffn_{part}_exps.weight"] = half
            continue
        if correction := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.e_score_correction_bias", name):
            found[f"blk.{correction[1]}.exp_probs_b.bias"] = array
            continue
        stored = names.get_name(name.removeprefix("transformer.") if arch == "bloom" else name, (".weight", ".bias"))
        assert stored is not None, name
        found[stored] = _arranged(array, stored, model.config, arch)
    return found


def _arranged(array: np.ndarray, name: str, config: Any, arch: str) -> np.ndarray:
    """What the converter of this architecture does to one weight."""
    heads = config.num_attention_heads
    if arch == "llama" and re.search(r"attn_[qk]\.", name):
        # Halves of each head's rows, interleaved: llama.cpp rotates neighbours.
        n = heads if "attn_q" in name else config.num_key_value_heads
        return array.reshape(n, 2, len(array) // n // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if arch in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return array + 1
    if arch == "gpt2" and re.search(r"blk.*(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", name):
        return array.T
    if arch == "bloom" and "attn_qkv" in name:
        parts = array.reshape(heads, 3, config.hidden_size // heads, *array.shape[1:])
        return parts.swapaxes(0, 1).reshape(array.shape)
    if arch == "falcon" and "attn_qkv" in name:
        kv = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
        d_head = config.hidden_size // heads
        parts = array.reshape(kv, heads // kv + 2, d_head, *array.shape[1:])
        q, k, v = parts[:, :-2], parts[:, -2], parts[:, -1]
        return np.concatenate([p.reshape(-1, *array.shape[1:]) for p in (q, k, v)])
    if "ffn_gate_inp_shexp" in name:
        return array.reshape(-1)
    return array
