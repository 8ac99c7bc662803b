"""Removed models as classes: a family's own class, made as small as its config says (`headcount.model.narrowed`).

A removed checkpoint has a config of a type of its own, `headcount_` and the family's, so that nothing loads it as what
it is not. transformers gets both classes from the file that goes along with the checkpoint; headcount makes them here,
and runs no code that lies in a folder.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from headcount.errors import ModelError
from headcount.model.narrowed import PREFIX, narrow

# Of what `config.headcount` says; a later version may say other things.
FORMAT = 1


class _Told(dict[str, Any]):
    """`config.headcount`, which nothing changes: transformers copies configs dozens of times while it loads a model."""

    def __deepcopy__(self, memo: object) -> _Told:
        return self


@functools.cache
def narrowed(base: Any) -> Any:
    """A family's class whose models are as small as their config says, with a config of a type of its own.

    Args:
        base: The family's class for causal language models, such as LlamaForCausalLM.
    """
    of_base = base.config_class

    def narrowed_init(self: Any, config: PreTrainedConfig) -> None:
        base.__init__(self, config)
        narrow(self, config.headcount)

    def keeps(self: Any, name: str, value: Any) -> None:
        of_base.__setattr__(self, name, _Told(value) if name == "headcount" and type(value) is dict else value)

    told = {"model_type": PREFIX + of_base.model_type, "__module__": __name__, "__setattr__": keeps}
    config = type(name_of(of_base), (of_base,), told)
    return type(name_of(base), (base,), {"config_class": config, "__init__": narrowed_init, "__module__": __name__})


def name_of(base: Any) -> str:
    """What the smaller class of a class is called."""
    return f"Headcount{base.__name__}"


def is_removed(config: Mapping[str, Any]) -> bool:
    """Whether a config, as it lies in a folder, is of a model from which something was removed."""
    return str(config.get("model_type", "")).startswith(PREFIX) and "headcount" in config


def class_of(name: str, config: Mapping[str, Any]) -> Any:
    """The class of a removed model whose config lies in a folder.

    Args:
        name: What the model is called in errors.
        config: As it lies there.

    Raises:
        ModelError: If a later version wrote it, or the family is none of transformers'.
    """
    told = config["headcount"]
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ModelError(f"{name} was written by another version of headcount (its config says format "
                         f"{told.get('format') if isinstance(told, dict) else told!r}, this version knows {FORMAT}): "
                         "use that one, or load it with transformers and trust_remote_code=True")
    base = str(told.get("class"))
    if base not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ModelError(f"the config of {name} says that it is a smaller {base}, which is no causal language model of "
                         "this version of transformers")
    return narrowed(getattr(transformers, base))


def base_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The family's own class of a model, from which something may have been removed."""
    told = getattr(model.config, "headcount", None)
    base: type[PreTrainedModel] = type(model) if told is None else getattr(transformers, told["class"])
    return base
