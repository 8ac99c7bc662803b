"""Adapters of PEFT (LoRA and its kin): found beside a model's files, loaded onto their base and merged into it.

transformers applies an adapter that it finds in a model's folder where PEFT is installed, and passes it over where it
is not: the same command gives two results. Here a folder that holds an adapter alone is loaded onto the base that it
names, and the adapter is merged, so that a head's parameters are those of one matrix; without PEFT it is refused. A
folder that holds both a whole model and an adapter is refused, since nothing says whether the model has it already.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from headcount.errors import ModelError, first_line
from headcount.model.devices import device_of

CONFIG = "adapter_config.json"
# Files that hold a whole model's weights, and not an adapter's.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_OWN_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What PEFT raises for files that are absent, damaged or of another base.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class Adapter:
    """An adapter as its config describes it.

    Attributes:
        place: The folder or hub id that it lies in.
        base: Folder or hub id of the model that it was trained on.
        base_revision: The base's revision on the hub, where one is named.
        kind: PEFT's name of its type, such as "LORA".
    """

    place: str
    base: str
    base_revision: str | None
    kind: str

    @classmethod
    def read(cls, place: str, config: Path) -> Adapter:
        """What an adapter's config says.

        Raises:
            ModelError: If it is no adapter's config, or names no base.
        """
        try:
            said = json.loads(config.read_text(encoding="utf-8"))
            base, kind = said["base_model_name_or_path"], said["peft_type"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ModelError(f"{place} holds an {CONFIG} that names no type or base ({first_line(e)}): name a model, "
                             "or the folder that PEFT's save_pretrained wrote") from e
        if not isinstance(base, str) or not base:
            raise ModelError(f"the adapter in {place} does not say which model it belongs to: write that into "
                             f"base_model_name_or_path of its {CONFIG}")
        return cls(place, base, said.get("revision"), str(kind))

    @property
    def note(self) -> str:
        """What must be said beside results."""
        return f"the {self.kind} adapter of {self.place} is merged into {self.base}"


def check_files(name: str, files: Collection[str]) -> None:
    """Refuse an adapter that lies beside a whole model's weights, or whose own are not there.

    Args:
        name: The folder or hub id.
        files: The names of what lies there.

    Raises:
        ModelError: Which says what to do.
    """
    if whole := [file for file in _WEIGHTS if file in files]:
        raise ModelError(f"{name} holds a whole model ({whole[0]}) and a PEFT adapter ({CONFIG}), and nothing says "
                         "whether the one contains the other: in a folder of your own (download it, if it lies on "
                         "the hub) move the adapter's files into another one to measure the model with it, or away to "
                         "measure the model as it is")
    if not any(file in files for file in _OWN_WEIGHTS):
        raise ModelError(f"{name} holds a PEFT adapter's {CONFIG} without its weights ({' or '.join(_OWN_WEIGHTS)}): "
                         "put them there, as PEFT's save_pretrained does")


def not_streamed(adapter: Adapter) -> ModelError:
    """That an adapter's model cannot be read block by block."""
    return ModelError(f"{adapter.place} is an adapter, which is merged in memory, and `stream` leaves weights in their "
                      "files: leave it out, or merge the adapter first and load what was merged", fields=("stream",))


def check_installed(adapter: Adapter) -> None:
    """Refuse adapters where PEFT is missing.

    Raises:
        ModelError: Which says how to install it.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"{adapter.place} is a PEFT adapter ({adapter.kind}) of {adapter.base}, which needs the "
                         'package peft: pip install peft')


def merged(model: PreTrainedModel, adapter: Adapter, revision: str | None) -> PreTrainedModel:
    """The base with the adapter in its weights.

    Args:
        model: The base; it is changed.
        adapter: What is merged into it.
        revision: The adapter's revision on the hub.

    Raises:
        ModelError: If the adapter cannot be read, does not fit the base, is of a kind that is no part of weights, or
            the merged model does not compute what base and adapter do.
    """
    from peft import PeftModel

    keywords: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        adapted = PeftModel.from_pretrained(model, adapter.place, **keywords)
        if not hasattr(adapted, "merge_and_unload"):
            raise ModelError(f"the adapter of {adapter.place} is of type {adapter.kind}, which is no part of a model's "
                             "weights: only adapters that can be merged, such as LoRA, are measured")
        # Said only by loading once more; the first time it is a warning.
        loaded = adapted.load_adapter(adapter.place, "default", **keywords)
        if lost := [*loaded.missing_keys, *loaded.unexpected_keys]:
            raise ModelError(f"the adapter of {adapter.place} does not fit {adapter.base}: {len(lost)} of its tensors "
                             f"have no counterpart (the first is {lost[0]}); name the base that it was trained on in "
                             f"its {CONFIG}")
        expected = _logits(adapted, model)
        whole: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        error = float((_logits(whole, whole) - expected).abs().max() / expected.abs().max())
        if not error <= max(1e-3, 8 * torch.finfo(whole.dtype).eps):
            raise ModelError(f"the adapter of {adapter.place} cannot be merged into {adapter.base}: the merged model "
                             f"computes something else (by {error:.1e} of the largest logit), as where one of two tied "
                             "matrices is adapted; merge it in a base whose output layer is untied")
    except _LOAD_ERRORS as e:
        raise ModelError(f"the adapter of {adapter.place} cannot be merged into {adapter.base}: {first_line(e)}") from e
    return whole


@torch.no_grad()
def _logits(model: torch.nn.Module, base: PreTrainedModel) -> Tensor:
    """Logits of a few tokens, by a model or by an adapter around it."""
    embeddings: Any = base.get_input_embeddings()
    ids = torch.arange(2, min(18, int(embeddings.weight.shape[0])))[None].to(device_of(base))
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits.double().cpu()
