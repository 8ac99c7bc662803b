"""Documents from local files, checked line by line: `DIR/TASK/{train,validation,test}.jsonl`, or one jsonl file.

And what identifies a task: a hash of its definition and of its documents, wherever they came from.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from headcount.errors import DataError

SPLIT_FILES = ("train", "validation", "test")
SAME = "importance is measured on the documents that are evaluated, so that pruned models come out too well"
_BARE = ("context", "options", "gold")
# Where the documents lay, and what the caller chooses; none of it changes what a document asks.
_VOLATILE = ("metadata", "dataset_kwargs", "custom_dataset", "num_fewshot")


def local_dataset(folder: str, *, bare: bool = False, **_: object) -> dict[str, Any]:
    """Read a task's files for lm-eval; validation stands in for a missing test split.

    Args:
        folder: With {train,validation,test}.jsonl; or one jsonl file, whose documents are the validation split.
        bare: Whether every document must have `context`, `options` and `gold`.
    """
    place = Path(folder)
    files = {"validation": place} if place.is_file() else {
        s: place / f"{s}.jsonl" for s in SPLIT_FILES if has_split(place, s)}
    splits = {split: _dataset(path, list(_lines(path, _check_bare if bare else None)))
              for split, path in files.items()}
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]
    found: dict[str, Any] = datasets.DatasetDict(splits)
    return found


def has_split(folder: Path, split: str) -> bool:
    """Whether a task's folder has the file of a split."""
    return (folder / f"{split}.jsonl").is_file()


def bare_splits(place: Path) -> dict[str, str | None]:
    """lm-eval's names of splits; a single file is the evaluated one, whose shots are its other documents."""
    has = {s: has_split(place, s) for s in SPLIT_FILES}
    return {"training_split": "train" if has["train"] else None,
            "validation_split": "validation" if has["validation"] or place.is_file() else None,
            "test_split": "test" if has["test"] else None}


def check_place(place: Path, name: str) -> None:
    """Refuse a folder without documents to evaluate on.

    Raises:
        DataError: If there is no such folder, or neither validation nor test documents in it.
    """
    if place.is_file():
        return
    if not place.is_dir():
        known = ", ".join(sorted(p.name for p in place.parent.glob("*") if p.is_dir())) or "none"
        raise DataError(f"no folder {place} with the documents of task {name!r}; --data holds: {known}")
    if not has_split(place, "validation") and not has_split(place, "test"):
        raise DataError(f"{place} has neither validation.jsonl nor test.jsonl to evaluate on")


def _lines(path: Path, check: Callable[[Mapping[str, Any]], str] | None) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (the byte at {error.start}); save it as that") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            doc = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}); fix that line") from error
        if "\\ud" in line.lower() and not _is_text(doc):
            raise DataError(f"{path}, line {number}: half of a surrogate pair (\\ud...) is no text; fix that line")
        if not isinstance(doc, dict):
            raise DataError(f"{path}, line {number}: a document is a JSON object, not {type(doc).__name__}")
        if check is not None and (wrong := check(doc)):
            raise DataError(f"{path}, line {number}: {wrong}")
        yield {name: doc[name] for name in _BARE} if check is not None else doc


def _is_text(doc: object) -> bool:
    try:
        json.dumps(doc, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_bare(doc: Mapping[str, Any]) -> str:
    """What is wrong with a document of context, options and gold; empty if nothing is."""
    if absent := [name for name in _BARE if name not in doc]:
        return f"no {' and no '.join(absent)}; a document has context, options and gold"
    context, options, gold = (doc[name] for name in _BARE)
    if not isinstance(context, str):
        return f"context is a text, not {json.dumps(context)[:60]}"
    if not isinstance(options, list) or not options or not all(isinstance(o, str) and o.strip() for o in options):
        return f"options is a list of one or more texts, not {json.dumps(options)[:60]}"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(options):
        return f"gold is the right option's index, 0 to {len(options) - 1}, not {json.dumps(gold)[:60]}"
    return ""


def _dataset(path: Path, docs: Sequence[Mapping[str, Any]]) -> datasets.Dataset:
    if not docs:
        raise DataError(f"{path} is empty; it needs one JSON object a line")
    try:
        return datasets.Dataset.from_list(list(docs))
    except (TypeError, ValueError) as error:  # pyarrow's errors are ValueErrors
        line = str(error).strip().split("\n", 1)[0]
        raise DataError(f"{path}: documents differ in the type of a field ({line})") from error


def notes(inner: Any, place: Path | None, examples_split: str) -> list[str]:
    """What a reader of results must know of a task: its definition's note, and which documents stand for which."""
    told = [note] if (note := (inner.config.metadata or {}).get("note")) else []
    evaluated = ["test"] if inner.has_test_docs() else ["validation"]
    if place is not None and place.is_dir() and inner.has_test_docs() and not has_split(place, "test"):
        told.append("test.jsonl is missing: validation.jsonl stands in for the test split")
        evaluated = ["test", "validation"]
    if examples_split in evaluated:
        told.append(SAME)
    return told


def fingerprint(
    definition: Mapping[str, Any], variant: Sequence[str], splits: Mapping[str, Iterable[Mapping[str, Any]]],
) -> str:
    """24 hexadecimal digits that are equal for equal definitions, variants and documents, in whatever process.

    Args:
        definition: lm-eval's configuration of the task. Its functions count by their source, see `_source`.
        variant: What else changes the prompts.
        splits: All documents.
    """
    config = {key: value for key, value in definition.items() if key not in _VOLATILE}
    digest = hashlib.sha256(json.dumps([config, *variant], sort_keys=True, default=_source).encode())
    for split in sorted(splits):
        digest.update(f"\n{split}\n".encode())
        for doc in splits[split]:
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]


def _source(value: object) -> Any:
    """What stands for a value that JSON has no form for: of a function its file's text too, for the helpers it calls.

    A function's repr would not do: it holds an address, so that no other process could go on with a study.
    """
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if not callable(value):
        return str(value)
    name = str(getattr(value, "__qualname__", type(value).__qualname__))
    with contextlib.suppress(TypeError, OSError):
        return [name, inspect.getsource(value), Path(inspect.getfile(value)).read_text(encoding="utf-8")]
    return name
