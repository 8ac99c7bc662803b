"""What identifies a task: a hash of its definition and of its documents, wherever they came from."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headcount.code_files import digests, own_files
from headcount.tasks.fewshot import Document

# Where the documents lay, and what the caller chooses; none of it changes what a document asks.
_VOLATILE = ("metadata", "dataset_kwargs", "custom_dataset", "num_fewshot")


def fingerprint(
    definition: Mapping[str, Any], variant: Sequence[str], splits: Mapping[str, Iterable[Document]],
) -> str:
    """24 hexadecimal digits that are equal for equal definitions, variants and documents, in whatever process.

    Args:
        definition: lm-eval's configuration of the task. Its functions count by their source, see `_source`, and by the
            files that this imports, but for installed libraries' own.
        variant: What else changes the prompts.
        splits: All documents.
    """
    config = {key: value for key, value in definition.items() if key not in _VOLATILE}
    files: set[Path] = set()
    known = json.dumps([config, *variant], sort_keys=True, default=functools.partial(_source, files=files))
    digest = hashlib.sha256(known.encode())
    # Files that functions stand in are in there. What these import was not looked at by earlier versions, and changes
    # nothing where there is none.
    if imported := {path: text for path, text in own_files(files).items() if path not in {f.resolve() for f in files}}:
        digest.update("\n".join(["", *digests(imported)]).encode())
    for split in sorted(splits):
        digest.update(f"\n{split}\n".encode())
        for doc in splits[split]:
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]


def _source(value: object, files: set[Path]) -> Any:
    """What stands for a value that JSON has no form for: of a function its file's text too, for the helpers it calls.

    The file is put into `files`.

    A function's repr would not do: it holds an address, so that no other process could go on with a study.
    """
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if not callable(value):
        return str(value)
    name = str(getattr(value, "__qualname__", type(value).__qualname__))
    with contextlib.suppress(TypeError, OSError):
        file = Path(inspect.getfile(value))
        told = [name, inspect.getsource(value), file.read_text(encoding="utf-8")]
        files.add(file)
        return told
    return name
