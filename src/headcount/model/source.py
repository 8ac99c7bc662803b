"""Where a model's files are: a local folder, a GGUF file, the hub or its cache; and what it means if they are not."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.repocard import metadata_load
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from headcount.errors import ModelError, OptionError, few, first_line
from headcount.model import adapters, gguf
from headcount.model.weight_files import check_files, index_of, is_pointer, weight_names
from headcount.tasks import hub

TRUST = "read it, then pass `trust_remote_code=True`"
# How torch begins what it says of files that it does not unpickle.
_UNPICKLED = "Weights only load failed"
# Files that weights are read from, and those that decide how.
_READ = (".safetensors", ".bin", ".pt", ".pth", ".json")


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        place: The first argument of `from_pretrained`: a folder or a hub id.
        gguf: The GGUF file, where it is one.
        keywords: What `from_pretrained` must be told besides.
    """

    place: str
    gguf: Path | None = None
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def revision(self) -> str | None:
        """The version on the hub that was asked for."""
        return self.keywords.get("revision")

    @property
    def folder(self) -> Path | None:
        """The folder with the files, in the hub's cache where they were fetched; None for a GGUF file."""
        if self.gguf is not None:
            return None
        if Path(self.place).is_dir():
            return Path(self.place)
        found = (try_to_load_from_cache(self.place, name, revision=self.revision)
                 for name in ("config.json", adapters.CONFIG))
        return next((Path(file).parent for file in found if isinstance(file, str)), None)

    @property
    def commit(self) -> str | None:
        """The hub's commit that the files are of, told by the folder they lie in; None for files not from the hub."""
        folder = None if self.gguf is not None or Path(self.place).is_dir() else self.folder
        return None if folder is None else folder.name

    @property
    def files(self) -> list[Path]:
        """All files of the folder that weights may be read from."""
        folder = self.folder
        if folder is None:
            return []
        return sorted(path for path in folder.iterdir() if path.suffix in _READ and path.is_file())

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies there."""
        return any(self._file(name) is not None for name in ("tokenizer_config.json", "tokenizer.json"))

    def fetched(self, named: str | None) -> Path:
        """The folder with all files that weights are read from; what of them is on the hub alone is fetched.

        Args:
            named: The file of weights, or index of shards, that the config names; None where it names none.

        Raises:
            ModelError: If they are not to be had.
        """
        if Path(self.place).is_dir():
            return Path(self.place)
        try:
            for name in weight_names(named):
                file = cached_file(self.place, name, _raise_exceptions_for_missing_entries=False,
                                   _raise_exceptions_for_connection_errors=False, **self.keywords)
                if file is not None:
                    index = index_of(Path(file).parent, name)
                    for shard in sorted({*(index.shards.values() if index is not None else ())}):
                        cached_file(self.place, shard, **self.keywords)
                    return Path(file).parent
        except (OSError, ValueError) as e:
            raise failure(self.place, self, e) from e
        raise ModelError(f"{self.place} holds no weights that transformers reads, or the hub does not give them: check "
                         "the name and the network")

    def card(self) -> Mapping[str, Any]:
        """What the model card says in its front matter: licence, language, ...; empty where it says nothing."""
        file = None if self.gguf is not None else self._file("README.md")
        try:
            return (metadata_load(file) if file is not None else None) or {}
        except (OSError, ValueError, yaml.YAMLError):
            return {}

    def adapter(self) -> adapters.Adapter | None:
        """The adapter that lies there by itself; None where none does.

        Raises:
            ModelError: If it cannot be read, or lies beside a whole model.
        """
        if self.gguf is not None:
            return None
        config = self._file(adapters.CONFIG)
        if config is None:
            return None
        adapters.check_files(self.place, self._names(config.parent))
        return adapters.Adapter.read(self.place, config)

    def _file(self, name: str) -> Path | None:
        """A file that lies there, fetched where it is on the hub; None where it cannot be had, for whatever reason."""
        try:
            file: str | None = cached_file(
                self.place, name, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False, **self.keywords)
        except (OSError, ValueError):  # what is wrong with the place is told when the model is read
            return None
        return None if file is None else Path(file)

    def _names(self, folder: Path) -> list[str]:
        """Names of the files there, whether they were fetched or not."""
        if not Path(self.place).is_dir():
            try:
                return HfApi().list_repo_files(self.place, revision=self.revision)
            except (OSError, ValueError):  # offline: what is in the cache is what can be had
                pass
        return [path.name for path in folder.iterdir()]


def find(name: str, revision: str | None) -> Source:
    """Where the files of a model are that was named.

    Args:
        name: As `headcount.model.load.load` takes it.
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelError: If there is no such file or folder, or none of a model.
        OptionError: If local files are given a revision.
    """
    path = Path(name).expanduser()
    if name == "smollm2" and not path.exists():
        path = gguf.smollm2()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no GGUF file {name}: check the path")
        _check_revision(name, revision)
        return Source(str(path.parent), path, {"gguf_file": path.name})
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", adapters.CONFIG)):
            raise ModelError(f"the folder {name} holds no config.json: name the folder that save_pretrained wrote, or "
                             "a GGUF file in it")
        _check_revision(name, revision)
        return Source(str(path))
    if path.is_file():
        raise ModelError(f"{name} is a file, but not a GGUF file: name the model's folder")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise ModelError(f"there is no folder {name}: check the path")
    hub.answers()
    return Source(name, None, {} if revision is None else {"revision": revision})


def _check_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise OptionError(f"`revision` ({revision}) is a version on the hub, and {name} lies on this disk: leave it "
                          "out", fields=("revision",))


def failure(name: str, source: Source, error: BaseException) -> ModelError:
    """What a library's error in loading a model means for who named it."""
    chain, link = [error], error
    while (link := link.__cause__ or link.__context__) is not None and link not in chain:  # type: ignore[assignment]
        chain.append(link)
    if "trust_remote_code" in str(error):
        return ModelError(f"{name} comes with its own code: {TRUST}", fields=("trust_remote_code=True",))
    if source.gguf is not None or Path(source.place).is_dir():
        if pointers := [path.name for path in source.files if is_pointer(path)]:
            return ModelError(f"{name} holds Git LFS's pointers in the place of files ({few(pointers)}): run `git lfs "
                              "pull` there, or download them")
        try:
            if source.folder is not None:
                check_files(source.folder)
        except ModelError as damaged:
            return ModelError(f"{name} cannot be loaded: {damaged}")
        config = Path(source.place) / "config.json"
        if source.gguf is None and config.is_file() and not _holds_object(config):
            return ModelError(f"{name} cannot be loaded: its config.json holds no JSON object: write it as "
                              "save_pretrained does, or download it again")
        return ModelError(f"{name} cannot be loaded: {said(error)}")
    if any(isinstance(e, GatedRepoError) for e in chain):
        return ModelError(f"{name} is gated: accept its terms on huggingface.co, then run `hf auth login`")
    if any(isinstance(e, RevisionNotFoundError) for e in chain):
        return ModelError(f"{name} has no revision {source.revision!r} on the hub: check "
                          "`revision`", fields=("revision",))
    if any(isinstance(e, (RepositoryNotFoundError, HFValidationError)) for e in chain):
        return ModelError(f"{name} is neither a local folder nor a model on the hub: check the name, or log in with "
                          "`hf auth login` if it is private")
    if any(isinstance(e, OSError) for e in chain):
        return ModelError(f"{name} is no local folder, and the hub has not given it: {first_line(error)} Check the "
                          "name and the network, or name a local folder, a GGUF file, or smollm2")
    return ModelError(f"{name} cannot be loaded: {said(error)}")


def _holds_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def said(error: BaseException) -> str:
    """Another library's message, with the kind of error where the message alone says little."""
    line = first_line(error)
    if isinstance(error, SafetensorError) or getattr(error, "errno", None) == errno.EINVAL or _UNPICKLED in line:
        return f"its weights are damaged or not whole ({line[:80].rstrip('. ')}): download or copy them again"
    return line if isinstance(error, (OSError, ImportError)) or " " in line else f"{type(error).__name__}: {line}"
