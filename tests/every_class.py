"""Every type of model that transformers loads as a causal language model, built small, and what headcount makes of it.

A type is built with random weights, saved, and loaded from that folder as a user would. It is *measured* if its
contracts hold and every number equals the slow, obvious computation of `plain_passes` on the model that was saved: log-
likelihoods of the full model, without one head, without one FFN and without all heads of a layer, the oracle of all
heads and FFNs, and gradient scores. It is *refused* if headcount says so in one line, and *not built small* if
transformers itself does not build or run it. Everything else, a traceback above all, is *wrong*.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import families
from headcount.engine.engine import Engine
from headcount.engine.pack import Budget
from headcount.errors import HeadcountError, first_line
from headcount.masks import Mask, all_heads
from headcount.measure.evaluate import evaluate
from headcount.measure.importance import ffn_importance, head_importance
from headcount.model.load import LoadedModel, load, wrap
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Task
from plain_passes import plain_gold, plain_scores, requests_of, sees_later_tokens

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# In nats; and of gradients relative to the largest.
TOLERANCE = 1e-4
_LARGEST = 30_000_000
_BUDGET = Budget(None, 400, 400)
_SHOTS = 1
# Under the many names that configs have for the same sizes; a config is given those that it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": families.VOCAB, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32,
    "emb_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "d_ff": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_head": 8, "max_position_embeddings": 64,
    "n_positions": 64, "is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_QWEN4 = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
          "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "indexed_attention"],
          "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
          "indexer_compress_ratio": 2, "hc_lowrank": 8}
_DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
          "shared_expert_intermediate_size": 16, **_HYBRID}
_LATENT = {"num_key_value_heads": 4}
# As many keys as a sparse layer lets a position see: fewer than the prompts have.
_INDEXED = {**_LATENT, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 16}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 28, "patch_size": 14}
_BLT = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1,
        "intermediate_size": 48, "hidden_size_global": 32, "vocab_size": families.VOCAB}
# What a type needs besides these, or instead; of a multimodal type the text model's under "text_config".
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "glm4_moe_lite", "longcat_flash", "minicpm3"), _LATENT),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"), _INDEXED),
    "bailing_hybrid": {**_LATENT, **_HYBRID},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "blt": {"patcher_config": _BLT, "encoder_config": _BLT, "decoder_config": _BLT, "global_config": _BLT,
            "encoder_hash_byte_group_vocab": 64},
    "beam": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}},
    "dots3_note": {"text_config": {**_INDEXED, "n_shared_experts": 1}, "vision_config": {
        **_VISION, "mlp_layer_types": ["dense"], "adapter_in_dim": 16, "adapter_out_dim": 32}, "audio_config": {
        **_VISION, "adapter_input_size": 16, "adapter_out_dim": 32}},
    "dots3_note_text": {**_INDEXED, "n_shared_experts": 1},
    "flint": {"sliding_window": 4},
    "gemma3": {"text_config": {"sliding_window": 4, "query_pre_attn_scalar": 8,
                               "layer_types": ["sliding_attention", "full_attention"]},
               "vision_config": {**_VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4},
    "gemma4": {"text_config": dict(families._GEMMA4), "vision_config": _VISION},
    "gemma4_unified": {"text_config": dict(families._GEMMA4)},
    "gemma4_unified_text": dict(families._GEMMA4),
    "git": {"vision_config": _VISION},
    "got_ocr2": {"vision_config": {**_VISION, "output_channels": 8, "mlp_dim": 16, "global_attn_indexes": [0]}},
    "granitemoehybrid": {**_MAMBA2, **_HYBRID, "shared_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_LATENT, **_HYBRID, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "granitemoe_swa": {"sliding_window": 4},
    "kolibri1": {"sliding_window": 4},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mellum": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "modernbert-decoder": {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2,
                           "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2, "rotary_dim": 8,
                           "mlp_layer_types": ["dense", "sparse"], "dense_intermediate_size": 48,
                           "shared_intermediate_size": 16},
    "moss_transcribe_diarize": {"audio_config": {**_VISION, "num_mel_bins": 8, "max_source_positions": 16}},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
                   "n_groups": 1, "ssm_state_size": 8},
    "phi4_multimodal": {"vision_config": {**_VISION, "crop_size": 28},
                        "audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1,
                                         "num_attention_heads": 2, "ext_pw_out_channel": 16,
                                         "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8}},
    "qwen3_5": {"text_config": _DELTA}, "qwen3_5_text": _DELTA,
    "qwen3_5_moe": {"text_config": _DELTA}, "qwen3_5_moe_text": _DELTA,
    "qwen3_next": _DELTA,
    "qwen4_exp": {"text_config": _QWEN4}, "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8},
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "attention_head_size": 8,
                 "feed_forward_size": 48, "attn_layers": ["local", "local"], "local_attn_chunk_length": 8},
    "rwkv": {"attention_hidden_size": 32},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 128},
    # Whatever row is the padding token's, transformers fills with zeros when it loads this type.
    "youtu": {**_LATENT, "pad_token_id": None},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2,
              "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 4, "mamba_d_state": 8,
               "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# Of types whose default config transformers itself rejects: all settings.
_WHOLE: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {**families._GEMMA4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 0,
                                         "model_type": "gemma4_text"}, "backbone_hidden_size": 32},
    "gemma4_unified_assistant": {"text_config": {
        **families._GEMMA4, "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2,
        "model_type": "gemma4_unified_text"}, "backbone_hidden_size": 32},
}


@dataclass(frozen=True)
class Found:
    """What headcount makes of a type of model.

    Args:
        kind: The type, as configs write it.
        outcome: See the module's first lines.
        detail: Why, or how far the worst number is from the obvious computation's.
    """

    kind: str
    outcome: Literal["measured", "refused", "not built small", "wrong"]
    detail: str


@functools.cache
def _settings_of_families() -> dict[str, dict[str, Any]]:
    """The settings of types that the table of families has; of several the first."""
    found: dict[str, dict[str, Any]] = {}
    for kind, settings in {**families._TABLE, **families._UNFIT}.values():
        found.setdefault(kind, settings)
    return found


def config_of(kind: str) -> PreTrainedConfig:
    """A small config."""
    if kind in _settings_of_families():
        return AutoConfig.for_model(kind, **copy.deepcopy(_settings_of_families()[kind]))
    if kind in _WHOLE:
        return AutoConfig.for_model(kind, **copy.deepcopy(_WHOLE[kind]))
    own = copy.deepcopy(_OWN.get(kind, {}))
    default = AutoConfig.for_model(kind)
    if isinstance(text := getattr(default, "text_config", None), PreTrainedConfig):
        sizes = {**_sizes(text), **own.pop("text_config", {}), "model_type": text.model_type}
        return AutoConfig.for_model(kind, text_config=sizes, **own)
    return AutoConfig.for_model(kind, **{**_sizes(default), **own})


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """The small sizes under the names that a config has."""
    encodes = getattr(config, "is_encoder_decoder", False)
    return {name: size for name, size in _SIZES.items()
            if _has(config, name) and not (encodes and name == "is_decoder")}


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)
    except RuntimeError:  # it differs from layer to layer
        return True


def build(kind: str, seed: int = 0) -> PreTrainedModel:
    """A small model of the type, random throughout."""
    config = config_of(kind)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if (number := sum(p.numel() for p in skeleton.parameters())) > _LARGEST:
        raise ValueError(f"it has {number:,} parameters where it is small")
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(0, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # Gemma-4's factor of a whole block
                buffer.fill_(0.5)
    return model.eval()


def write_task(folder: Path) -> Task:
    """A few documents of the families' words, longer than the windows of the small models."""
    rng = np.random.default_rng(0)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(4, families.VOCAB, n))

    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        rows = [{"context": words(3 + i), "options": [words(1 + j) for j in range(3)], "gold": i % 3} for i in range(4)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return get_tasks([str(folder)])[folder.name]


def find(kind: str, folder: Path) -> Found:
    """What headcount makes of a type of model.

    Args:
        kind: The type.
        folder: An empty folder, for the model's files and a task's.
    """
    families.reader().save_pretrained(folder / "tokenizer")
    try:
        original = _saved(kind, folder / "model")
    except Exception as error:  # noqa: BLE001 - whatever transformers and a type's own code raise
        return Found(kind, "not built small", f"{type(error).__name__}: {first_line(error)}")
    try:
        loaded = load(folder / "model", device="cpu", tokenizer=str(folder / "tokenizer"))
        worst = measured(loaded, original, write_task(folder / "documents"))
    except HeadcountError as error:
        return Found(kind, "refused", str(error).replace(str(folder / "model"), "it"))
    except Exception as error:  # noqa: BLE001 - that there is none is what this finds out
        return Found(kind, "wrong", f"{type(error).__name__}: {first_line(error)}")
    bad = {what: error for what, error in worst.items() if not error <= TOLERANCE}
    if bad:
        return Found(kind, "wrong", ", ".join(f"{what}: {error:.1e}" for what, error in bad.items()))
    return Found(kind, "measured", f"{max(worst.values()):.1e}")


def _saved(kind: str, folder: Path) -> PreTrainedModel | None:
    """The model that was saved; None for an encoder-decoder, which is refused by its config alone."""
    config = config_of(kind)
    original = None if getattr(config, "is_encoder_decoder", False) else build(kind)
    if original is not None:
        original.save_pretrained(folder)
    # Not the model's: of a multimodal config the class may have taken the text's alone.
    config_of(kind).save_pretrained(folder)
    return original


def measured(loaded: LoadedModel, original: PreTrainedModel | None, task: Task) -> Mapping[str, float]:
    """How far what is measured is from the obvious computation on the original, and what should not be.

    Raises:
        HeadcountError: If the model is refused, or a contract fails, by which a study refuses it.
    """
    for contract in Engine.of(loaded).contracts:
        if not contract.holds:
            raise HeadcountError(f"{contract.name}: {contract.detail}")
    plain = wrap(original or loaded.model, loaded.tokenizer)
    worst = {"causality": sees_later_tokens(plain, requests_of(plain, task, FewShot(_SHOTS), "evaluation")[0])}
    worst |= _likelihoods(loaded, plain, task)
    for component, importance in (("head", head_importance), ("ffn", ffn_importance)):
        worst[f"oracle of {component}s"] = _oracle(loaded, plain, task, component, importance)
    expected = plain_scores(plain, requests_of(plain, task, FewShot(_SHOTS), "examples"))
    for component, importance in (("head", head_importance), ("ffn", ffn_importance)):
        found = importance(loaded, task, method="gradient", num_fewshot=_SHOTS, budget=_BUDGET)
        both = np.stack([found.scores["position"], found.scores["example"]])
        largest = np.abs(expected[component]).max()
        worst[f"gradients of {component}s"] = _apart(both, expected[component]) / largest if largest else np.inf
    return worst


def _likelihoods(loaded: LoadedModel, plain: LoadedModel, task: Task) -> Mapping[str, float]:
    counts = loaded.anatomy.heads_per_layer
    full, last = Mask.full(counts), len(counts) - 1
    masks = {"full model": full, "one head off": full.without_heads([(0, 1 % counts[0])]),
             "one FFN off": full.without_ffns([last]),
             "all heads of a layer off": full.without_heads([(last, h) for h in range(counts[last])])}
    found = evaluate(loaded, task, list(masks.values()), num_fewshot=_SHOTS, budget=_BUDGET)
    alone = evaluate(loaded, task, num_fewshot=_SHOTS, budget=_BUDGET)
    requests = requests_of(plain, task, FewShot(_SHOTS), "evaluation")
    expected = {what: plain_gold(plain, requests, mask) for what, mask in masks.items()}
    worst = {what: _apart(row, expected[what]) for what, row in zip(masks, found.gold_loglikelihood, strict=True)}
    worst["full model, alone"] = _apart(alone.gold_loglikelihood[0], expected["full model"])
    idle = [what for what in list(masks)[1:] if _apart(expected[what], expected["full model"]) < 1e-6]
    return worst | {f"nothing changed with {what}": np.inf for what in idle}


def _oracle(loaded: LoadedModel, plain: LoadedModel, task: Task, component: str, importance: Any) -> float:
    found = importance(loaded, task, method="oracle", num_fewshot=_SHOTS, budget=_BUDGET)
    full = Mask.full(loaded.anatomy.heads_per_layer)
    masks = ([full.without_heads([head]) for head in all_heads(full.heads_per_layer)] if component == "head"
             else [full.without_ffns([layer]) for layer in range(loaded.anatomy.num_layers)])
    requests = requests_of(plain, task, FewShot(_SHOTS), "examples")
    whole = plain_gold(plain, requests, full).mean()
    lost = [whole - plain_gold(plain, requests, mask).mean() for mask in masks]
    return _apart(found.scores["gold_loglikelihood"], np.array(lost))


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.nan_to_num(np.abs(a - b), nan=np.inf).max())
