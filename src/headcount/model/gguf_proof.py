"""Proof that a model holds what its GGUF file says.

transformers' conversion skips tensors that it has no name for, and metadata that it does not map, without a word. So
after a file is loaded:

1. every tensor of the file must have a parameter of the model that it went into, by the conversion's own table;
2. every key of the architecture must be what the model computes with, or say nothing (a factor of one, a count of
   zero), or be known to change nothing. Where the file is silent, what llama.cpp then does counts as said. RoPE is
   compared by the rotary frequencies themselves, which `rope_freqs.weight` divides;
3. the file's own tokenizer must begin and end a text as the file says. Where the file names a rule of splitting text
   into words that transformers does not know, GPT-2's is used, which is said in a note.

What differs is refused by name and value: what it would change cannot be known here. An architecture is proved only if
a file of it was compared, logit by logit, with the model that it was written from, which the tests do for each.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from headcount.errors import ModelError, first_line

# Raised when the proof asks for more: a model that was kept under a lower one is dequantised and proved again.
PROOF = 1
# Whose conversion the tests compare with the models that the files were written from.
COMPARED = frozenset({"llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "minimax-m2", "gemma2", "gemma3", "phi3",
                      "gpt2", "falcon", "bloom", "stablelm", "starcoder2", "nemotron"})
# Keys that change nothing of what the model computes for text, each with its reason.
_HARMLESS = {
    "context_length": "says how long texts may be; the model's own window cuts them",
    "embedding_length": "the tensors' shapes say it",
    "feed_forward_length": "the tensors' shapes say it",
    "expert_feed_forward_length": "the tensors' shapes say it",
    "expert_shared_feed_forward_length": "the tensors' shapes say it",
    "vocab_size": "the tensors' shapes say it",
    "block_count": "the tensors' names say it",
    "tensor_data_layout": "tells where the tensors came from",
    "pooling_type": "is of embeddings of texts, not of logits",
    "rope.scaling.finetuned": "tells how the model was trained",
    "rope.scaling.original_context_length": "acts only with a scaling, which is refused",
    "rope.scaling.yarn_beta_fast": "acts only with YaRN, which is refused",
    "rope.scaling.yarn_beta_slow": "acts only with YaRN, which is refused",
}
# Keys that no model here computes with, and the values that say nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,), "attention.clamp_kqv": (0,), "attention.output_scale": (0, 1),
    "attention.shared_kv_layers": (0,), "attention.temperature_length": (0,), "attention.temperature_scale": (0, 1),
    "logit_scale": (0, 1), "residual_scale": (0, 1), "embedding_scale": (0, 1), "router_logit_softcapping": (0,),
    "expert_shared_count": (0,), "expert_group_count": (0, 1), "expert_group_used_count": (0, 1),
    "expert_group_scale": (0, 1), "expert_weights_scale": (0, 1), "leading_dense_block_count": (0,),
    "moe_every_n_layers": (0, 1), "interleave_moe_layer_step": (0, 1), "nextn_predict_layers": (0,),
    "rope.scaling.alpha": (0, 1), "rope.scaling.attn_factor": (0, 1), "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,), "rope.scaling.yarn_ext_factor": (0, -1),
}
_EPS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")
_EPS_KEYS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
# What divides the rotary frequencies, dimension by dimension: for all texts, and for long and short ones.
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Kinds of byte-level vocabularies that llama.cpp begins a text with BOS for, where the file does not say.
_BEGINS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                     "jina-v5-nano", "tekken", "chameleon"})
# Rules of splitting text into words that are GPT-2's, or none that the file knows.
_GPT2_RULES = frozenset({None, "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"})
# Single precision, in which files say their numbers.
_RELATIVE = 1e-5
_INSTEAD = "load the checkpoint that the file was made from"


@dataclass(frozen=True)
class _File:
    """What a GGUF file says.

    Attributes:
        name: The file's.
        arch: Its architecture, the first word of its keys.
        fields: What can be read of it by name.
        tensors: Its tensors as they are stored, by name.
    """

    name: str
    arch: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def says(self, key: str, silent: Any = None) -> Any:
        """A value of the architecture, or what counts where the file is silent; of equal values of all layers, one."""
        return self.get(f"{self.arch}.{key}", silent)

    def get(self, key: str, silent: Any = None) -> Any:
        """The same for a whole name."""
        field = self.fields.get(key)
        value = silent if field is None else field.contents()
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            return value[0]
        return value

    def differs(self, key: str, value: object, has: object) -> ModelError:
        """That the model does not have what the file says."""
        said = f"says {self.arch}.{key} = {value}" if f"{self.arch}.{key}" in self.fields else (
            f"is silent on {self.arch}.{key}, which llama.cpp takes for {value}")
        return ModelError(f"{self.name} {said}, and transformers' conversion makes a model with {has}: {_INSTEAD}")


def prove(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Compare a GGUF file with the model that was made from it.

    Args:
        path: The file; it is read through gguf's reader, which `read_once` keeps.
        model: What transformers made of it.
        tokenizer: What it made of the file's tokenizer; None where another one is used.

    Returns:
        What must be said of how that tokenizer reads; empty for most files.

    Raises:
        ModelError: If a tensor or a value of the file is not in the model, by its name.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
        field = reader.get_field("general.architecture")
        arch = "" if field is None else str(field.contents())
    except (ValueError, OSError) as e:
        raise ModelError(f"{path} is no readable GGUF file: {first_line(e)}") from e
    if arch not in COMPARED:
        raise ModelError(f"{path.name} is of GGUF's architecture {arch!r}, whose conversion by transformers was never "
                         f"compared with a model: {_INSTEAD}")
    file = _File(path.name, arch, reader.fields, {t.name: t for t in reader.tensors})
    _prove_values(file, model)
    _prove_rope(file, model)
    _prove_tensors(file, model)
    return _prove_tokenizer(file, tokenizer) if tokenizer is not None else ""


def _prove_tensors(file: _File, model: PreTrainedModel) -> None:
    # Imported here, for no other model needs it.
    from transformers import modeling_gguf_pytorch_utils as conversion

    # The table by which the file was read.
    kind = conversion.TENSOR_PROCESSORS.get(file.arch, conversion.TensorProcessor)
    table: dict[str, str] = conversion.get_gguf_hf_weights_map(model, kind())  # type: ignore[no-untyped-call]
    parameters = model.state_dict().keys()

    def placed(name: str) -> bool:
        # Experts are read under their name without the ending.
        return table.get(re.sub(r"(_exps)\.weight$", r"\1", name), table.get(name)) in parameters

    lost = sorted(name for name in file.tensors if name not in _ROPE_TENSORS and not placed(name))
    if lost:
        raise ModelError(f"{file.name} holds {len(lost)} tensor{'s' * (len(lost) > 1)} that transformers' conversion "
                         f"has no place for (the first is {lost[0]}): {_INSTEAD}")
    last: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    first: Any = model.get_input_embeddings()
    if last is not None and last.weight is first.weight and (own := file.tensors.get("output.weight")) is not None:
        shared = file.tensors["token_embd.weight"]
        if own.tensor_type != shared.tensor_type or not np.array_equal(own.data, shared.data):
            raise ModelError(f"{file.name} holds output.weight, and transformers' conversion makes a model that uses "
                             f"token_embd.weight in its place: {_INSTEAD}")


def _prove_values(file: _File, model: PreTrainedModel) -> None:
    """Every key of the architecture; those that are compared count where the file is silent, too."""
    config = model.config
    if file.arch == "llama" and file.says("attention.head_count_kv") is None:
        # Without it the conversion leaves the rows of queries and keys in llama.cpp's order.
        raise ModelError(f"{file.name} is silent on llama.attention.head_count_kv, without which transformers' "
                         f"conversion leaves queries and keys in llama.cpp's order: {_INSTEAD}")
    compared = _compared(file, config)
    for key, (said, has) in compared.items():
        if not _equal(said, has):
            raise file.differs(key, said, has)
    _prove_eps(file, config)
    _prove_windows(file, config)
    known = {*compared, *_HARMLESS, *_EPS_KEYS, *_WINDOW_KEYS, *_ROPE_KEYS}
    for name in file.fields:
        key = name.removeprefix(f"{file.arch}.")
        if key == name or key in known:
            continue
        value = file.says(key)
        if not any(_equal(value, neutral) for neutral in _NEUTRAL.get(key, ())):
            raise ModelError(f"{file.name} says {name} = {reprlib.repr(value)}, which transformers' conversion does "
                             f"not take over: {_INSTEAD}")


def _compared(file: _File, config: PreTrainedConfig) -> dict[str, tuple[object, object]]:
    """By key: what the file says, or llama.cpp where it is silent, and what the model has."""
    c: Any = config
    arch, heads = file.arch, int(c.num_attention_heads)
    said_heads = file.says("attention.head_count", 0)
    d_head = getattr(c, "head_dim", None) or c.hidden_size // heads
    usual = file.says("embedding_length", 0) // said_heads if isinstance(said_heads, int) and said_heads else 0
    d_key = file.says("attention.key_length", usual)
    scale = file.says("attention.scale") or _attention_scale(file, usual, d_key)
    experts = getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None) or 0
    alibi = 8 if arch == "bloom" or getattr(c, "alibi", False) else 0
    gating = {"minimax-m2": 2}.get(arch, 1 if experts else 0)
    return {
        "attention.head_count": (said_heads, heads),
        "attention.head_count_kv": (file.says("attention.head_count_kv", said_heads), _kv_heads(c)),
        "attention.key_length": (d_key, d_head),
        "attention.value_length": (file.says("attention.value_length", usual), d_head),
        "attention.key_length_swa": (file.says("attention.key_length_swa", d_key), d_head),
        "attention.value_length_swa": (file.says("attention.value_length_swa", d_key), d_head),
        "attention.scale": (scale, (getattr(c, "query_pre_attn_scalar", None) or d_head) ** -0.5),
        "attention.max_alibi_bias": (file.says("attention.max_alibi_bias", 8 if arch == "bloom" else 0), alibi),
        # Gemma-2's, which llama.cpp has by itself.
        "attn_logit_softcapping": (file.says("attn_logit_softcapping", 50 if arch == "gemma2" else 0),
                                   getattr(c, "attn_logit_softcapping", None) or 0),
        "final_logit_softcapping": (file.says("final_logit_softcapping", 30 if arch == "gemma2" else 0),
                                    getattr(c, "final_logit_softcapping", None) or 0),
        "expert_count": (file.says("expert_count", 0), experts),
        "expert_used_count": (file.says("expert_used_count", 0), c.num_experts_per_tok if experts else 0),
        "expert_weights_norm": (file.says("expert_weights_norm", arch in ("qwen3moe", "minimax-m2")),
                                bool(getattr(c, "norm_topk_prob", arch == "minimax-m2"))),
        # 0 is the architecture's own.
        "expert_gating_func": (file.says("expert_gating_func", 0) or gating, gating),
        **({"use_parallel_residual": (file.says("use_parallel_residual", c.use_parallel_residual),
                                      c.use_parallel_residual)} if hasattr(c, "use_parallel_residual") else {}),
    }


def _attention_scale(file: _File, usual: int, d_key: Any) -> object:
    # llama.cpp knows Gemma's 27B models by their number of layers.
    width = usual if (file.arch, file.says("block_count")) in (("gemma2", 46), ("gemma3", 62)) else d_key
    return width**-0.5 if isinstance(width, int) and width else None


def _kv_heads(config: Any) -> int:
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else int(config.num_attention_heads)
    names = ("num_kv_heads", "num_key_value_heads") if config.model_type == "falcon" else ("num_key_value_heads",)
    return int(next((v for n in names if (v := getattr(config, n, None))), config.num_attention_heads))


def _prove_eps(file: _File, config: PreTrainedConfig) -> None:
    has = next(getattr(config, name) for name in _EPS if hasattr(config, name))
    said = {key: value for key in _EPS_KEYS if (value := file.says(key)) is not None}
    if not said:
        raise ModelError(f"{file.name} says neither {' nor '.join(_EPS_KEYS)} of {file.arch}: without one, "
                         f"transformers takes its own: {_INSTEAD}")
    for key, value in said.items():
        if not _equal(value, has):
            raise file.differs(key, value, has)


_WINDOW_KEYS = ("attention.sliding_window", "attention.sliding_window_pattern")


def _prove_windows(file: _File, config: PreTrainedConfig) -> None:
    """Which layers see how far back: compared layer by layer, where a window as long as any text is none."""
    layers = int(config.num_hidden_layers)
    longest = getattr(config, "max_position_embeddings", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    window = getattr(config, "sliding_window", None) or 0
    has = [_reach(window if kind == "sliding_attention" else 0, longest) for kind in types]
    # Of Gemma's layers every second or sixth sees everything, which llama.cpp knows by itself.
    pattern = file.says(_WINDOW_KEYS[1], {"gemma2": 2, "gemma3": 6}.get(file.arch, 0))
    if isinstance(pattern, list):
        slides = [bool(p) for p in pattern]
    elif isinstance(pattern, bool):
        slides = [pattern] * layers
    else:
        slides = [pattern == 0 or layer % pattern < pattern - 1 for layer in range(layers)]
    said_window = file.says(_WINDOW_KEYS[0], 4096 if file.arch == "gemma2" else 0)
    said = [_reach(said_window if slide else 0, longest) for slide in slides]
    if said != has:
        same = set(said) == set(has)
        raise file.differs(_WINDOW_KEYS[same], pattern if same else said_window, f"sliding_window = {window}")


def _reach(window: int, longest: int | None) -> int | None:
    """How far back a layer sees; None for everything."""
    return window if window > 0 and (longest is None or window < longest) else None


_ROPE_KEYS = ("rope.dimension_count", "rope.dimension_count_swa", "rope.freq_base", "rope.freq_base_swa",
              "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")


def _prove_rope(file: _File, model: PreTrainedModel) -> None:
    """The model's rotary frequencies are those that llama.cpp would make of the file."""
    kind = file.says("rope.scaling.type", "linear")
    factor = 1.0 if kind == "none" else file.says("rope.scaling.factor") or file.says("rope.scale_linear") or 1.0
    if kind not in ("none", "linear") and (file.says("rope.scaling.type") != "longrope" or factor != 1):
        raise ModelError(f"{file.name} says {file.arch}.rope.scaling.type = {kind}, which transformers' conversion "
                         f"does not take over: {_INSTEAD}")
    factors = {name: np.array(file.tensors[name].data, np.float64).ravel() for name in _ROPE_TENSORS
               if name in file.tensors}
    found = {name: buffer.detach().double().cpu().numpy() for name, buffer in model.named_buffers()
             if name.endswith("inv_freq") and "original" not in name}
    if not found and factors:
        raise ModelError(f"{file.name} holds {next(iter(factors))}, and its model has no rotary embedding to put it "
                         f"into: {_INSTEAD}")
    if not any("sliding" in name for name in found):
        for key in ("rope.freq_base", "rope.dimension_count"):
            own = file.says(f"{key}_swa")
            if own is not None and own != file.says(key):
                raise file.differs(f"{key}_swa", own, "one rotary embedding for all layers")
    for name, has in found.items():
        near = "sliding" in name.rpartition(".")[2]
        # Layers with a window have neither a factor nor factors.
        rope = _Rope.of(file, model.config, near, 1.0 if near else float(factor))
        _prove_frequencies(file, has, rope, {} if near else factors)


@dataclass(frozen=True)
class _Rope:
    """What a file says of the rotary embedding of some layers, and under which keys."""

    base_key: str
    base: float
    width_key: str
    width: int
    factor: float

    @classmethod
    def of(cls, file: _File, config: Any, near: bool, factor: float) -> _Rope:
        """Of the layers with a window, where they have their own, or of the others."""
        usual = file.says("attention.key_length") or config.hidden_size // config.num_attention_heads
        base, width = file.says("rope.freq_base", 10000.0), file.says("rope.dimension_count", usual)
        base_key, width_key = "rope.freq_base", "rope.dimension_count"
        if near:
            # Gemma-3's, which llama.cpp has by itself.
            base_key, base = "rope.freq_base_swa", file.says("rope.freq_base_swa", 10000.0)
            width_key, width = "rope.dimension_count_swa", file.says("rope.dimension_count_swa", width)
        return cls(base_key, float(base), width_key, int(width), float(factor))


def _prove_frequencies(file: _File, has: np.ndarray, rope: _Rope, factors: Mapping[str, np.ndarray]) -> None:
    if rope.width != 2 * len(has):
        raise file.differs(rope.width_key, rope.width, 2 * len(has))
    plain = float(rope.base) ** (-2 * np.arange(len(has)) / rope.width)
    for name, divisors in (factors or {"": np.ones(1)}).items():
        if divisors.size in (1, len(has)) and np.allclose(has, plain / rope.factor / divisors, _RELATIVE, 0):
            continue
        if name and not np.allclose(divisors, 1):
            raise ModelError(f"{file.name} holds {name}, by which llama.cpp divides the rotary frequencies, and "
                             f"transformers' conversion has no place for it: {_INSTEAD}")
        if rope.factor != 1:
            raise file.differs("rope.scaling.factor", rope.factor, "no scaling of RoPE")
        raise file.differs(rope.base_key, rope.base, f"another base (frequencies from {has[0]:.4g} to {has[-1]:.4g})")


def _prove_tokenizer(file: _File, tokenizer: PreTrainedTokenizerBase) -> str:
    """It begins and ends a text as the file says, or as llama.cpp does where the file is silent.

    Returns:
        What must be said of how it splits text; empty for most files.
    """
    from transformers.integrations.gguf import gguf_tokenizer_mapping as rules

    kind, rule = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    ids: list[int] = list(tokenizer("a")["input_ids"])
    for name, at, silent in (("bos", ids[:1], kind == "llama" or rule in _BEGINS), ("eos", ids[-1:], False)):
        own = getattr(tokenizer, f"{name}_token_id")
        token = file.get(f"tokenizer.ggml.{name}_token_id", own)
        if token != own:
            raise _reads(file, f"says tokenizer.ggml.{name}_token_id = {token}", f"has {own}")
        key = f"tokenizer.ggml.add_{name}_token"
        adds = bool(file.get(key, silent))
        if adds != (own is not None and at == [own]):
            said = f"says {key} =" if key in file.fields else f"is silent on {key}, which llama.cpp takes for"
            raise _reads(file, f"{said} {adds}", "does otherwise")
    # llama.cpp begins texts of other kinds with no space.
    key = "tokenizer.ggml.add_space_prefix"
    spaced = bool(file.get(key, True))
    if kind == "llama" and spaced != (tokenizer.tokenize("a") or [""])[0].startswith("\u2581"):
        raise _reads(file, f"says {key} = {spaced}" if key in file.fields else f"is silent on {key}", "does otherwise")
    if kind != "gpt2" or rule in _GPT2_RULES or rule in rules.GGUF_PRE_TOKENIZER_SPLITS:
        return ""
    return (f"its tokenizer splits text into words by GPT-2's rule, for transformers does not know the rule {rule!r} "
            "that the GGUF file names: some texts become other tokens")


def _reads(file: _File, said: str, does: str) -> ModelError:
    return ModelError(f"{file.name} {said}, and the tokenizer that transformers makes of it {does}: in Python name the "
                      "model's own with load(..., tokenizer=FOLDER_OR_HUB_ID)")


def _equal(said: object, has: object) -> bool:
    """Whether two values are the same number in single precision, or the same otherwise."""
    if isinstance(said, int | float) and isinstance(has, int | float):
        return bool(torch.isclose(torch.tensor(float(said)), torch.tensor(float(has)), rtol=_RELATIVE, atol=0))
    return said == has
