"""A model that is known by its config alone: what a study of it costs can be planned, and nothing can be measured.

The config is that of a folder, of a GGUF file, of a hub id that is in the cache (or that the hub gives), or one of the
shapes that come along: OPT, Pythia, Llama-3, Qwen-3 and Gemma-3 (`data/shapes.json`, as their authors published them;
of Gemma-3 the language model alone). The model is built on PyTorch's meta device, so that heads, FFNs and parameters
are found by the code that finds them in a real one. Its tokenizer is taken where its files are at hand.
"""

from __future__ import annotations

import difflib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from headcount.errors import ModelError
from headcount.model import adapters, gguf
from headcount.model.anatomy import Anatomy, find_anatomy
from headcount.model.attention import eager
from headcount.model.blockfiles import check_plain
from headcount.model.load import window_of
from headcount.model.placement import check_stream, dtype_of, placement
from headcount.model.read import Wanted, check_kind, config_of, quiet, tokenizer_of, without_weights
from headcount.model.source import Source, find

_SHAPES = Path(__file__).parent / "data" / "shapes.json"
# How configs call a mixture's experts, and how many of them a token goes through.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")


@dataclass(frozen=True, eq=False)
class Shape:
    """A model without weights, with what planning needs to know of it.

    Attributes:
        name: As the user gave it.
        model: On the meta device, of the type of numbers in which it would run.
        tokenizer: Its tokenizer; None where there are no files of one.
        anatomy: Where its heads and FFNs are.
        device: Where it would run by the options on this machine.
        bundled: Whether the config is one of those that come along.
        has_bos: Whether texts can begin with a BOS token.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    anatomy: Anatomy
    device: torch.device
    bundled: bool
    has_bos: bool

    @property
    def max_length(self) -> int:
        """The model's window in tokens."""
        return window_of(self.model.config, self.tokenizer)

    @functools.cached_property
    def block_parameters(self) -> tuple[int, ...]:
        """Parameters of every block."""
        return tuple(_parameters(part.block) for part in self.anatomy.layers)

    @functools.cached_property
    def active_parameters(self) -> tuple[float, ...]:
        """Parameters of every block that a token meets: of routed experts those that are chosen."""
        share = _share_of_experts(self.model.config.get_text_config())
        return tuple(size - (1 - share) * _expert_parameters(part.block)
                     for part, size in zip(self.anatomy.layers, self.block_parameters, strict=True))

    @functools.cached_property
    def mean_active_parameters(self) -> float:
        """The same, of a block on average."""
        return sum(self.active_parameters) / self.anatomy.num_layers

    @functools.cached_property
    def attention_width(self) -> float:
        """Channels of attention of a block, all its heads together, on average."""
        return sum(part.num_heads * part.d_head for part in self.anatomy.layers) / self.anatomy.num_layers

    @property
    def attention_kinds(self) -> int:
        """Of how many kinds its attention is, each with a mask of its own: one, or with sliding windows two."""
        kinds: set[str] = {*(getattr(self.model.config.get_text_config(), "layer_types", None) or ())}
        return max(1, sum(kind.endswith("attention") and kind != "linear_attention" for kind in kinds))

    @functools.cached_property
    def shows_attention(self) -> bool:
        """Whether its attention can be had eager, which writes probabilities out and masks by numbers."""
        with eager(self.model):
            return bool(self.model.config.get_text_config()._attn_implementation == "eager")

    @property
    def dtype(self) -> str:
        """The type of its numbers, such as `float16`."""
        return str(self.model.dtype).removeprefix("torch.")

    @functools.cached_property
    def output_parameters(self) -> int:
        """Parameters of the output layer."""
        layer: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return _parameters(layer)


def shape_of(
    name: str, *, dtype: str = "auto", device: str | None = None, device_map: str | None = None,
    stream: bool = False, attn_implementation: str | None = None, trust_remote_code: bool = False,
    revision: str | None = None, apply_chat_template: bool = False,
) -> Shape:
    """A model by its config; the arguments are those of `headcount.model.load.load`.

    Raises:
        ModelError: If no config is to be had, or if it is of a model that cannot be measured, or not streamed as asked.
        OptionError: If dtype, device or device_map is unknown or not available here.
    """
    check_stream(stream, device_map)
    wanted_dtype, placed = dtype_of(dtype), placement(device, device_map)
    with quiet():
        source = find(name, revision)
        place = Path(source.place)
        bundled = bundled_shapes().get(name) if not place.is_dir() and source.folder is None else None
        if bundled is None:
            source = _as_kept(_base(source, stream=stream), wanted_dtype)
            try:
                config = config_of(name, source, trust_remote_code=trust_remote_code)
            except ModelError as error:
                raise _with_names(name, source, error) from error
        else:
            config = AutoConfig.for_model(bundled["model_type"], **bundled["config"], dtype=bundled["dtype"])
        wanted = Wanted(name, wanted_dtype, placed, attn_implementation, trust_remote_code)
        if stream and source.gguf is None:
            check_plain(name, config)
        if bundled is None:
            check_kind(config, wanted)
        tokenizer = tokenizer_of(name, source, wanted) if bundled is None and _reads(source) else None
        model = without_weights(name, config, wanted)
    own: Any = torch.float32 if source.gguf is not None else config.dtype or torch.float32
    nn.Module.to(model, dtype=own if isinstance(wanted_dtype, str) else wanted_dtype)  # a string is auto
    has_bos = bundled["bos"] if bundled is not None else (
        config.get_text_config().bos_token_id is not None if tokenizer is None else tokenizer.bos_token_id is not None)
    if apply_chat_template and (tokenizer is None or not tokenizer.chat_template):
        raise ModelError(f"a plan with `apply_chat_template` needs the chat template of {name}, and there is none: "
                         "leave it out, or name a folder with config.json and the tokenizer's files",
                         fields=("apply_chat_template",))
    running = torch.device(placed if device_map is None else "cpu")
    shape = Shape(name, model, tokenizer, find_anatomy(model), running, bundled is not None, bool(has_bos))
    if not all((shape.output_parameters, *(part.d_model for part in shape.anatomy.layers))):
        raise ModelError(f"the config of {name} does not describe a whole model: it has no width or no tokens")
    return shape


@functools.cache
def bundled_shapes() -> dict[str, dict[str, Any]]:
    """The configs that come along, by hub id."""
    shapes: dict[str, dict[str, Any]] = json.loads(_SHAPES.read_text(encoding="utf-8"))
    return shapes


def _base(source: Source, *, stream: bool) -> Source:
    """Where the config lies: of an adapter alone, its base's."""
    adapter = source.adapter()
    if adapter is not None and stream:
        raise adapters.not_streamed(adapter)
    return source if adapter is None else find(adapter.base, adapter.base_revision)


def _as_kept(source: Source, dtype: str | torch.dtype) -> Source:
    """A GGUF file as it was dequantised before, where it was: its tokenizer is read there in a tenth of the time."""
    if source.gguf is None:
        return source
    kept = gguf.Kept.of(source.gguf, torch.float32 if isinstance(dtype, str) else dtype)
    return source if kept.facts() is None else Source(str(kept.folder))


def _reads(source: Source) -> bool:
    return source.gguf is not None or source.has_tokenizer


def _with_names(name: str, source: Source, error: ModelError) -> ModelError:
    """The error, and of a hub id that is not to be had, which of the shapes that come along it may be."""
    if Path(source.place).is_dir():
        return error
    known = bundled_shapes()
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return ModelError(f"no config of {name} is to be had here: {hint}name a folder with nothing but its config.json, "
                      "or the hub id of an OPT, Pythia, Llama-3, Qwen-3 or Gemma-3 model, whose shapes come along")


def _share_of_experts(config: PreTrainedConfig) -> float:
    """Which share of the routed experts a token goes through; 1 where there are none."""
    there = next((getattr(config, name) for name in _EXPERTS if getattr(config, name, None)), None)
    chosen = next((getattr(config, name) for name in _CHOSEN if getattr(config, name, None)), None)
    return 1.0 if there is None or chosen is None else min(1.0, float(chosen) / float(there))


def _expert_parameters(block: nn.Module) -> int:
    """Parameters of a block's routed experts."""
    return sum(_parameters(module) for name, module in block.named_modules() if name.rpartition(".")[2] == "experts")


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
