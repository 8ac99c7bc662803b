"""A model and its tokenizer read from files, by transformers' own classes.

The kind of model is checked before any weight is read: from the config, then on a skeleton without weights (PyTorch's
meta device), so that an encoder-decoder or a hybrid is refused in seconds, not after a download. Whatever transformers
raises becomes one line. Afterwards the model must have got exactly what its files hold (`headcount.model.checkpoint`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from headcount.errors import ModelError
from headcount.model import checkpoint, removed
from headcount.model.anatomy import Names, find_anatomy
from headcount.model.block_cache import Rewriting
from headcount.model.blockfiles import Checkpoint, check_plain
from headcount.model.disk import left_in_files
from headcount.model.placement import DISK, SPREAD
from headcount.model.source import TRUST, Source, failure, said
from headcount.model.weight_files import UNREADABLE

# What transformers and its parts raise for files that are absent, damaged or of another kind, or too large; and for
# configs whose values do not go together.
_LOAD_ERRORS = (*UNREADABLE, KeyError, ImportError, StrictDataclassError, TypeError, AttributeError, AssertionError,
                ArithmeticError, IndexError)


@dataclass(frozen=True)
class Wanted:
    """What was asked of a model, wherever its files are: the options of `load`.

    `runs_on` is the device on which a model computes whose weights stay in their files, and `progress` is told where
    these are rewritten.
    """

    name: str
    dtype: str | torch.dtype
    device_map: str
    attn_implementation: str | None
    trust_remote_code: bool = False
    tokenizer: str | None = None
    names: Names = field(default_factory=Names)
    apply_chat_template: bool = False
    runs_on: str = "cpu"
    progress: Rewriting | None = None


def read(
    source: Source, wanted: Wanted, of_tokenizer: Source | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, tuple[str, ...]]:
    """Model, tokenizer, and what must be said of them; what needs no weights is refused before they are read.

    Args:
        source: Where the model's files are.
        wanted: What was asked of it.
        of_tokenizer: Where the tokenizer's are, if elsewhere.

    Raises:
        ModelError: If either cannot be read, if the model is of a kind that cannot be measured, or if it did not get
            what its files hold.
    """
    common = {**source.keywords, "trust_remote_code": wanted.trust_remote_code}
    config = _config(wanted.name, source, common)
    check_kind(config, wanted)
    reader = tokenizer_of(wanted.name, of_tokenizer or source, wanted)
    if wanted.apply_chat_template and not reader.chat_template:
        raise ModelError(f"the tokenizer of {wanted.name} has no chat template: leave out "
                         "`apply_chat_template`", fields=("apply_chat_template",))
    if wanted.device_map == DISK and source.gguf is None:
        model, notes = _on_disk(wanted, source, config)
    else:
        model, notes = (_spread if wanted.device_map in SPREAD else _model)(wanted.name, source, {
            **common, "config": config, "dtype": wanted.dtype, "device_map": wanted.device_map,
            "attn_implementation": wanted.attn_implementation})
    return model, reader, notes


def _config(name: str, source: Source, common: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        told = {} if source.gguf is not None else PreTrainedConfig.get_config_dict(source.place, **common)[0]
        if removed.is_removed(told):
            made = removed.class_of(name, told)
            of_removed: PreTrainedConfig = made.config_class.from_pretrained(source.place, **source.keywords)
            return of_removed
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.place, **common)
    except _LOAD_ERRORS as e:
        raise failure(name, source, e) from e
    return config


def skeleton(source: Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A folder's or hub id's model without weights, on the meta device; no code that comes with it is run unasked.

    Raises:
        ModelError: If there is no such config.
    """
    return empty(config_of(source.place, source, trust_remote_code=trust_remote_code), trust_remote_code)


def config_of(name: str, source: Source, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """What a folder, hub id or GGUF file says of its model; no weights are read.

    Raises:
        ModelError: If there is no such config.
    """
    return _config(name, source, {**source.keywords, "trust_remote_code": trust_remote_code})


def empty(
    config: PreTrainedConfig, trust_remote_code: bool = False, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The model of a config without weights, on the meta device."""
    made: Any = _class(config)
    with torch.device("meta"):
        build = functools.partial(made.from_config, trust_remote_code=trust_remote_code) if (
            made is AutoModelForCausalLM) else made._from_config
        without: PreTrainedModel = build(config, attn_implementation=attn_implementation)
    return without


def _class(config: PreTrainedConfig) -> Any:
    """What reads a model of this config: transformers' own choice, or the smaller class of a removed model."""
    base = getattr(config, "headcount", None)
    return AutoModelForCausalLM if base is None else removed.class_of(config.model_type, config.to_dict())


def check_config(name: str, config: PreTrainedConfig) -> None:
    """Refuse an encoder-decoder.

    Raises:
        ModelError: If the config is of one.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}); only decoder-only language models can "
                         "be measured: name a model such as facebook/opt-125m")


def check_kind(config: PreTrainedConfig, wanted: Wanted) -> None:
    """Refuse what cannot be measured, before its weights are read.

    Raises:
        ModelError: If the config is of no decoder-only model whose heads and FFNs are found.
    """
    name = wanted.name
    check_config(name, config)
    if _class(config) is not AutoModelForCausalLM:
        return  # a removed model: of a family that was measured, and built twice as it is
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
            if wanted.trust_remote_code:
                return
            raise ModelError(f"{name} comes with its own code: {TRUST}", fields=("trust_remote_code=True",))
        raise ModelError(f"{name} is of type {config.model_type}, which transformers does not load as a causal "
                         "language model: name a decoder-only model such as facebook/opt-125m")
    skeleton = without_weights(name, config, wanted)
    try:
        find_anatomy(skeleton, wanted.names)
    except ModelError as e:
        raise ModelError(f"{name} ({config.model_type}): {e}") from e


def without_weights(name: str, config: PreTrainedConfig, wanted: Wanted) -> PreTrainedModel:
    """The model of a config without weights, on the meta device.

    Raises:
        ModelError: If the config describes none, or it cannot have the attention kernel that was asked for.
    """
    try:
        return empty(config, wanted.trust_remote_code, wanted.attn_implementation)
    except _LOAD_ERRORS as e:
        if wanted.attn_implementation is not None and _is_whole(config, wanted):
            raise ModelError(f"{name} cannot have `attn_implementation` {wanted.attn_implementation!r} here "
                             f"({said(e)}): install what it needs, name another, or leave it out",
                             fields=("attn_implementation",)) from e
        raise ModelError(f"the config of {name} does not describe a whole model: {said(e)}") from e


def _is_whole(config: PreTrainedConfig, wanted: Wanted) -> bool:
    """Whether a config describes a model with the attention kernel that it names itself, or transformers chooses."""
    try:
        empty(config, wanted.trust_remote_code)
    except _LOAD_ERRORS:
        return False
    return True


def tokenizer_of(name: str, source: Source, wanted: Wanted) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model, or the one that was asked for.

    Raises:
        ModelError: If there is none.
    """
    trust = {"trust_remote_code": wanted.trust_remote_code}
    try:
        if wanted.tokenizer is not None:
            return AutoTokenizer.from_pretrained(wanted.tokenizer, **trust)
        return AutoTokenizer.from_pretrained(source.place, **source.keywords, **trust)
    except _LOAD_ERRORS as e:
        why = said(e) if wanted.tokenizer is not None or source.has_tokenizer else "there are no files of one"
        raise ModelError(f"no tokenizer can be loaded from {wanted.tokenizer or name} ({why}): put its files "
                         "beside the model's, or in Python name one with load(..., tokenizer=FOLDER_OR_HUB_ID)") from e


def _on_disk(wanted: Wanted, source: Source, config: PreTrainedConfig) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A model whose weights stay in their files."""
    name = wanted.name
    check_plain(name, config)
    named = getattr(config, "transformers_weights", None)
    opened = Checkpoint.open(source.fetched(named), named, name=name, commit=source.commit, progress=wanted.progress)
    try:
        made: Any = type(empty(config, wanted.trust_remote_code, wanted.attn_implementation))
        # Sizes that do not match are told when the files are laid out.
        build = functools.partial(made.from_pretrained, None, config=config, dtype=wanted.dtype,
                                  attn_implementation=wanted.attn_implementation, ignore_mismatched_sizes=True)
        model, notes = left_in_files(opened, build, wanted.runs_on, names=wanted.names, progress=wanted.progress)
    except _LOAD_ERRORS as e:
        raise failure(name, source, e) from e
    model.name_or_path = model.config.name_or_path = source.place
    if model.can_generate():
        model.generation_config = _generation(source)
    return model, (*notes, *_of_another_class(model))


def _generation(source: Source) -> GenerationConfig:
    """Settings of generation, as `from_pretrained` takes them from a folder: their own file's, else the config's."""
    try:
        return GenerationConfig.from_pretrained(source.place, **source.keywords)
    except OSError:
        return GenerationConfig.from_pretrained(source.place, config_file_name="config.json", _from_model_config=True,
                                                **source.keywords)


def _model(name: str, source: Source, options: Mapping[str, Any]) -> tuple[PreTrainedModel, tuple[str, ...]]:
    try:
        # With output_loading_info it returns a pair, which transformers' annotations do not know. Sizes that do not
        # match are told there, too, where transformers' own error would name none.
        pair: Any = _class(options["config"]).from_pretrained(source.place, output_loading_info=True,
                                                              ignore_mismatched_sizes=True, **options)
    except torch.OutOfMemoryError as e:
        raise ModelError(f"{name} does not fit on {options['device_map']}: use a smaller dtype, or "
                         "`device_map='auto'`, which offloads", fields=("device_map='auto'",)) from e
    except _LOAD_ERRORS as e:
        raise failure(name, source, e) from e
    model: PreTrainedModel = pair[0]
    return model, (*checkpoint.check(name, model, pair[1], source.folder), *_of_another_class(model))


def _spread(name: str, source: Source, options: Mapping[str, Any]) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A model over devices, with a folder for what ends on the disk and does not lie in the files as it is wanted."""
    spilled = Path(tempfile.mkdtemp(prefix="headcount-weights-"))
    try:
        model, notes = _model(name, source, {**options, "offload_folder": str(spilled)})
    except BaseException:
        shutil.rmtree(spilled, ignore_errors=True)
        raise
    if any(spilled.iterdir()):
        weakref.finalize(model, shutil.rmtree, spilled, ignore_errors=True)
    else:
        spilled.rmdir()
    return model, notes


def _of_another_class(model: PreTrainedModel) -> tuple[str, ...]:
    """A note, where the config names the class of another type than the one that it is of."""
    named = [name for name in model.config.architectures or () if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
    if not named or type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return ()
    if type(model).__name__ in named:
        return ()
    return (f"the config names the class {named[0]}, and its type, {model.config.model_type}, is that of "
            f"{type(model).__name__}, which was loaded",)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back bars and warnings of transformers and its hub: what matters of them is raised as an error here."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    hub_level, offloading = hub_logging.get_verbosity(), logging.getLogger("accelerate")
    offloading_level = offloading.level
    hub_logging.set_verbosity(logging.CRITICAL)
    offloading.setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        offloading.setLevel(offloading_level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
