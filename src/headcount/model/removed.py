"""Removed models as classes: a family's own class, made as small as its config says (`headcount.model.narrowed`).

A removed checkpoint has a config of a type of its own, `headcount_` and the family's, so that nothing loads it as what
it is not. transformers gets both classes from the file that goes along with the checkpoint; headcount makes them here,
and runs no code that lies in a folder.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import headcount
from headcount.errors import ModelError
from headcount.model import narrowed as runtime
from headcount.model.narrowed import PREFIX, narrow

# Of what `config.headcount` says; a later version may say other things.
FORMAT = 1
CODE = "modeling_headcount"
_CLASSES = '''

from {config_module} import {config}  # noqa: E402
from {model_module} import {model}  # noqa: E402


class {new_config}({config}):
    """The family's config, with `headcount`: how small every layer is."""

    model_type = "{model_type}"


class {new_model}({model}):
    """The family's model without the heads and FFNs that were removed."""

    config_class = {new_config}

    def __init__(self, config):
        super().__init__(config)
        narrow(self, config.headcount)
'''


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

    def saves(self: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        name_code(self.config, base)
        base.save_pretrained(self, save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            write_code(base, Path(save_directory))

    told = {"model_type": PREFIX + of_base.model_type, "__module__": __name__, "__setattr__": keeps}
    config = type(name_of(of_base), (of_base,), told)
    return type(name_of(base), (base,), {"config_class": config, "__init__": narrowed_init, "save_pretrained": saves,
                                         "__module__": __name__})


def name_of(base: Any) -> str:
    """What the smaller class of a class is called."""
    return f"Headcount{base.__name__}"


def name_code(config: PreTrainedConfig, base: Any) -> None:
    """Have a config say which classes transformers finds in the file that goes along."""
    told: Any = config
    new = {"AutoConfig": name_of(base.config_class), "AutoModelForCausalLM": name_of(base)}
    told.auto_map = {auto: f"{CODE}.{name}" for auto, name in new.items()}


def write_code(base: Any, folder: Path) -> None:
    """Write the file that goes along: how modules are narrowed, and two classes."""
    of_base = base.config_class
    head = f"# Written by headcount {headcount.__version__}; needs torch and transformers alone.\n"
    classes = _CLASSES.format(
        config_module=of_base.__module__, config=of_base.__name__, model_module=base.__module__, model=base.__name__,
        new_config=name_of(of_base), new_model=name_of(base), model_type=PREFIX + of_base.model_type)
    text = head + inspect.getsource(runtime).rstrip() + classes
    (folder / f"{CODE}.py").write_text(text, encoding="utf-8")


def is_removed(config: object) -> bool:
    """Whether a config, as it lies in a folder, is of a model from which something was removed."""
    return isinstance(config, Mapping) and "headcount" in config and (
        str(config.get("model_type", "")).startswith(PREFIX))


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
    heads, ffns = told.get("num_heads"), told.get("ffns")
    if not isinstance(heads, list) or not isinstance(ffns, list) or len(heads) != len(ffns) or not all(
            type(n) is int and n >= 0 for n in heads) or not all(type(ffn) is bool for ffn in ffns):
        raise ModelError(f"the config of {name} does not say which heads and FFNs are left (num_heads and ffns in "
                         "its headcount): copy the folder again")
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
