"""What identifies a model: a hash of everything that its numbers depend on.

A model's fingerprint covers its class and config, every byte of its weights and persistent buffers with their names,
shapes and types (SHA-256, so that no two changes cancel), modules and numbers that it was given by hand, and the Python
code of classes that are no installed library's (remote code, a user's own). A tokenizer's covers its own serialisation,
which holds vocabulary, merges, normalizer and all other rules, and what Python adds to it.

The digest of weights that lie in files is kept in the user's cache, under path, size, time of change and inode of every
file that they are read from, so that the bytes are hashed once:

    headcount/weights/<hash of these and of what else decides the tensors>

Weights in memory are hashed each time. Both are of the same tensors: a model has one fingerprint, wherever it is.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import os
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from platformdirs import user_cache_path
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from headcount.code_files import digests, own_files
from headcount.errors import ModelError, first_line
from headcount.model.offloaded import present

# Neither what the file was called, nor what the weights say better, changes what a model computes.
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "_commit_hash"}
# Text of many kinds: it shows what a tokenizer's Python code does with text, which its serialisation does not hold.
_PROBE = "The  cat's 3,141 naïve\n\tdéjà-vu 日本語 🙂 is_it(x) -> Answer: yes"
# What a class raises that wants more than its config, or does not take the meta device.
_NOT_MADE = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ImportError, AssertionError, OSError)
# What says how a model is run at the moment.
_OF_A_MODE = ("training", "gradient_checkpointing", "requires_grad", "name_or_path")
# What calls of a tokenizer leave in it, and what decides nothing about ids.
_OF_A_CALL = ("padding_side", "truncation_side", "verbose", "_in_target_context_manager", "deprecation_warnings",
              "model_max_length", "chat_template", "_processor_class", "clean_up_tokenization_spaces")
# Marks identities of this kind; those of earlier versions have no mark (`headcount.model.earlier_fingerprint`).
KIND = "2-"


def identity_of(model: str, tokenizer: str) -> str:
    """The identity of a model that reads text with a tokenizer, from the fingerprints of both."""
    return f"{KIND}{model}-{tokenizer}"


def fingerprint(model: PreTrainedModel, weights: str | None = None) -> str:
    """64 hexadecimal digits that are equal for equal config, weights, types and code.

    Args:
        model: The model; of weights that were offloaded a module is fetched at a time.
        weights: What `weights_digest` gives for it, where that is known.
    """
    config = copy.copy(model.config)
    config.use_cache = False  # as every pass is told
    parts = [type(model).__name__, described(config), weights or weights_digest(model),
             *code_of([*map(type, model.modules()), type(model.config)]), *altered(model)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def described(config: PreTrainedConfig) -> str:
    """What of a config changes what its model computes, as JSON."""
    return json.dumps({k: v for k, v in config.to_dict().items() if k not in _VOLATILE}, sort_keys=True, default=str)


def altered(model: PreTrainedModel) -> list[str]:
    """What of a model's modules is otherwise than its class makes it of the config, and what files do not hold of it.

    A model in memory may have been given another attention scale, epsilon, rotary base, activation or norm by hand. Its
    class is made once more without weights, and numbers and classes of modules are compared; most models have none that
    differ. Where the class cannot be made so, none are told. Buffers that are not saved are told by their bytes where
    they are masks, whole numbers or a single one (rotary and other tables differ in their last bits between devices).
    """
    found = [line for name, module in model.named_modules() for line in _unsaved(name, module)]
    try:
        with torch.device("meta"):
            fresh = dict(type(model)(copy.deepcopy(model.config)).named_modules())
    except _NOT_MADE:
        return found
    found += [f"{name} is gone" for name in fresh.keys() - dict(model.named_modules()).keys()]
    for name, module in model.named_modules():
        made = fresh.get(name)
        if type(module) is not type(made):
            found += [f"{name} is a {type(module).__qualname__}", *(
                f"{name}.{key} {_digest(value)}" for key, value in vars(module).items() if isinstance(value, Tensor))]
            found += [f"{name}.{key} = {value!r}" for key, value in _plain_values(module).items()]
        else:
            known = _plain_values(made)
            found += [f"{name}.{key} = {value!r}" for key, value in _plain_values(module).items()
                      if key in known and known[key] != value]
        found += [f"{name}.{key} {digest}" for key, digest in _other_frequencies(module)]
    return sorted(found)


def _plain_values(module: nn.Module | None) -> dict[str, object]:
    """Numbers, texts, nothings and lists of these that a module holds in attributes of its own."""
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in _OF_A_MODE
            and all(isinstance(one, int | float | str | None)
                    for one in (value if isinstance(value, list | tuple) else [value]))}


def _unsaved(name: str, module: nn.Module) -> Iterator[str]:
    """Buffers of a module's own that are not saved, with their digests: masks, whole numbers, a single number."""
    if not module._non_persistent_buffers_set:
        return
    with present(module, torch.device("cpu")), torch.no_grad():
        for key, tensor in module.named_buffers(recurse=False):
            plain = not tensor.is_floating_point() or tensor.numel() == 1
            if key in module._non_persistent_buffers_set and plain and tensor.device.type != "meta":
                yield f"{name}.{key} {tuple(tensor.shape)} {_digest(tensor)}"


def _other_frequencies(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Rotary frequencies, which are no saved buffers, where they are not those of the module's config."""
    config = getattr(module, "config", None)
    own = {key: tensor for key, tensor in module.named_buffers(recurse=False)
           if key.endswith("inv_freq") and "original" not in key and tensor.device.type != "meta"}
    if not own or config is None:
        return
    if getattr(module, "rope_type", "default") in ("dynamic", "longrope"):  # which change with the length of texts
        return
    try:
        made = dict(type(module)(config=config).named_buffers(recurse=False))
    except _NOT_MADE:
        return
    for key, tensor in own.items():
        if key in made and (made[key].shape != tensor.shape or not torch.allclose(
                made[key].float(), tensor.float().cpu(), rtol=1e-3)):
            yield key, _digest(tensor)


def weights_digest(model: PreTrainedModel) -> str:
    """64 hexadecimal digits of all bytes of all parameters and persistent buffers, with names, shapes and types."""
    modules = list(model.named_modules())
    offloaded = any(p.device.type == "meta" for p in model.parameters())
    # Hashing lets other threads run; fetching offloaded weights is left to one.
    with ThreadPoolExecutor(1 if offloaded else min(8, os.cpu_count() or 1)) as pool:
        of_modules = list(pool.map(_of_module, modules))
    return hashlib.sha256("\n".join(line for lines in of_modules for line in lines).encode()).hexdigest()


def _of_module(named: tuple[str, nn.Module]) -> list[str]:
    """One line for each tensor of a module's own: name, shape, type and digest."""
    prefix, module = named
    with present(module, torch.device("cpu")), torch.no_grad():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        return [f"{prefix}.{name}{part} {tuple(tensor.shape)} {tensor.dtype} {_digest(tensor)}"
                for name, whole in own if name not in module._non_persistent_buffers_set
                for part, tensor in _plain(whole)]


def _plain(tensor: Tensor, part: str = "") -> Iterator[tuple[str, Tensor]]:
    """A tensor as plain ones: quantised weights are several (packed numbers, scales, ...)."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name), f"{part}.{name}")
        return
    yield part, tensor
    state = getattr(tensor, "quant_state", None)  # bitsandbytes' 4-bit weights
    beside = {**vars(tensor), **(state.as_dict(packed=False) if state is not None else {})}
    for name, value in sorted(beside.items()):
        if isinstance(value, Tensor) and name != "grad":
            yield f"{part}.{name}", value


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


def code_of(classes: Iterable[type]) -> list[str]:
    """Digests of the Python files that define these classes and what they import, but for installed libraries' own."""
    files, written = set[Path](), set[str]()
    for cls in dict.fromkeys(base for one in classes for base in one.__mro__):
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if file is not None:
            files.add(Path(file))
        elif cls.__module__ != "builtins":  # written in a notebook
            with contextlib.suppress(OSError, TypeError):
                written.add(f"{cls.__qualname__} {hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()}")
        # Somebody may have given an installed class another one, around the one that it had.
        forward: Any = vars(cls).get("forward")
        while forward is not None:
            code = getattr(forward, "__code__", None)
            if code is not None and Path(code.co_filename).is_file():
                files.add(Path(code.co_filename))
            elif code is not None:
                written.add(f"{cls.__qualname__}.forward {_of_code(code)}")
            forward = getattr(forward, "__wrapped__", None)
    return sorted([*digests(own_files(files)), *written])


def _of_code(code: types.CodeType) -> str:
    """The digest of code that is in no file, with its constants and names."""
    constants = [_of_code(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return hashlib.sha256(json.dumps([code.co_code.hex(), *constants, *code.co_names]).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, max_length: int, *, chat: bool) -> str:
    """32 hexadecimal digits that are equal for tokenizers that read alike.

    Args:
        tokenizer: The model's.
        max_length: The window that prompts are cut to.
        chat: Whether its chat template is used, and so counts.
    """
    named = " ".join([_PROBE, *sorted(map(str, tokenizer.all_special_tokens))])
    ids = [list(tokenizer(text, add_special_tokens=special)["input_ids"])
           for text in (_PROBE, named) for special in (True, False)]
    known = [type(tokenizer).__name__, _serialised(tokenizer), ids, tokenizer.bos_token_id, tokenizer.eos_token_id,
             max_length, tokenizer.chat_template if chat else None, code_of([type(tokenizer)])]
    return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()[:32]


def _serialised(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All rules of a tokenizer as it writes them itself."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # It says also what the last call wanted, which the next call sets anew.
        backend.no_truncation()
        backend.no_padding()
        try:
            rules = backend.to_str()
        except Exception as error:  # tokenizers raises no other kind
            raise ModelError(f"the tokenizer's rules cannot be written down ({first_line(error)}), so that a study "
                             "could not tell it from another: use one without custom parts") from error
        return hashlib.sha256(rules.encode()).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(NotImplementedError, AttributeError):
            tokenizer.save_vocabulary(folder)
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}
    added = {i: str(token) for i, token in sorted(tokenizer.added_tokens_decoder.items())}
    # Options of its Python code; where its files lie is none.
    options = {key: value for key, value in vars(tokenizer).items()
               if isinstance(value, str | int | float | None) and not key.endswith(("_file", "name_or_path"))
               and key not in _OF_A_CALL}
    return [files, added, sorted(tokenizer.get_vocab().items()), sorted(options.items())]


class KeptDigest:
    """Where the digest of weights that lie in files is kept between processes.

    Args:
        files: All files that the weights are read from.
        decides: What else decides which tensors come of them: config, types, versions.
    """

    def __init__(self, files: Sequence[Path], decides: Sequence[str]) -> None:
        stats = [(str(path.resolve()), (s := path.stat()).st_size, s.st_mtime_ns, s.st_ino) for path in sorted(files)]
        self._key = hashlib.sha256(json.dumps([stats, *decides, transformers.__version__]).encode()).hexdigest()
        self._path = user_cache_path("headcount", appauthor=False) / "weights" / self._key

    def read(self) -> str | None:
        """The digest; None where it is not kept, or damaged."""
        try:
            digest, check = self._path.read_text(encoding="ascii").split()
        except (OSError, ValueError):
            return None
        return digest if check == self._check(digest) else None

    def write(self, digest: str) -> None:
        """Keep a digest; where that cannot be done, it is taken again the next time."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, encoding="ascii", delete=False) as file:
                file.write(f"{digest} {self._check(digest)}\n")
            Path(file.name).replace(self._path)

    def _check(self, digest: str) -> str:
        return hashlib.sha256(f"{self._key} {digest}".encode()).hexdigest()
