"""Documents from local files, checked line by line: `DIR/TASK/{train,validation,test}.jsonl`, or one jsonl file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets

from headcount.errors import DataError
from headcount.tasks.fewshot import Document

SPLIT_FILES = ("train", "validation", "test")
_BARE = ("context", "options", "gold")


def local_dataset(folder: str, *, bare: bool = False, **metadata: object) -> dict[str, datasets.Dataset]:
    """A task's files as lm-eval wants them, by split; validation stands in for a missing test split.

    Args:
        folder: With {train,validation,test}.jsonl; or one jsonl file, whose documents are the validation split.
        bare: Whether every document must have `context`, `options` and `gold`.
        metadata: Whatever the definition's `metadata` holds (version, note, a user's own fields): lm-eval gives that
            to any such function. Nothing here depends on it.
    """
    place = Path(folder)
    files = {"validation": place} if place.is_file() else {
        s: place / f"{s}.jsonl" for s in SPLIT_FILES if has_split(place, s)}
    splits = {split: _dataset(path, list(_lines(path, _check_bare if bare else None)))
              for split, path in files.items()}
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]
    by_split: dict[str, datasets.Dataset] = datasets.DatasetDict(splits)
    return by_split


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
        known = ", ".join(sorted(p.name for p in place.parent.glob("*") if p.is_dir())) or "no folder"
        raise DataError(f"there is no folder {place} with the documents of task {name!r}; {place.parent} holds {known}")
    if not has_split(place, "validation") and not has_split(place, "test"):
        raise DataError(f"{place} has neither validation.jsonl nor test.jsonl to evaluate on")


def _lines(path: Path, check: Callable[[Document], str] | None) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (the byte at {error.start}); save it as UTF-8") from error
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


def _check_bare(doc: Document) -> str:
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


def _dataset(path: Path, docs: Sequence[Document]) -> datasets.Dataset:
    if not docs:
        raise DataError(f"{path} is empty; it needs one JSON object a line")
    try:
        return datasets.Dataset.from_list(list(docs))
    except (TypeError, ValueError) as error:  # pyarrow's errors are ValueErrors
        line = str(error).strip().split("\n", 1)[0]
        raise DataError(f"{path}: documents differ in the type of a field ({line})") from error
