"""Documents from local files, checked line by line: `DIR/TASK/{train,validation,test}.jsonl`, or one jsonl file.

Lines are read as `datasets` reads them: a split's columns are the fields of all its lines, a field that a line lacks is
null there, and a column has one type. Two things are not as in `datasets`: a text that looks like a date stays a text,
and a column of several types is refused.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from headcount.errors import DataError, first_line
from headcount.tasks.fewshot import Document
from headcount.tasks.missing import name, nulls

SPLIT_FILES = ("train", "validation", "test")
BARE = ("context", "options", "gold")
# What datasets and pyarrow raise on values that make no column; pyarrow's own errors are some of these.
_NO_COLUMN = (TypeError, ValueError, OverflowError, NotImplementedError, RecursionError)


def local_dataset(folder: str, *, bare: bool = False, **metadata: object) -> dict[str, datasets.Dataset]:
    """A task's files as lm-eval wants them, by split; validation stands in for a missing test split.

    Args:
        folder: With {train,validation,test}.jsonl; or one jsonl file, whose documents are the validation split.
        bare: Whether every document must have `context`, `options` and `gold`.
        metadata: Whatever the definition's `metadata` holds (version, note, a user's own fields): lm-eval gives that
            to any such function. Nothing here depends on it.
    """
    splits = {split: _dataset(path, list(_lines(path, _check_bare if bare else None)))
              for split, path in _files(Path(folder)).items()}
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]
    by_split: dict[str, datasets.Dataset] = datasets.DatasetDict(splits)
    return by_split


def files_of(place: Path | None, split: str, config: Any) -> list[Path]:
    """The files that a split's documents stand in, one a line; none where they do not.

    Args:
        place: The task's folder, or its one file; None where the definition says where its documents are.
        split: lm-eval's name of the split.
        config: The definition as lm-eval has it, whose `data_files` name files if it reads its documents as JSON.
    """
    if place is not None:
        files = _files(place)
        return [files.get(split) or files["validation"]]
    kwargs = config.dataset_kwargs or {}
    if config.dataset_path != "json" or "field" in kwargs:
        return []
    named = kwargs.get("data_files")
    listed = named.get(split) if isinstance(named, Mapping) else named if split == "train" else None
    paths = [Path(path) for path in ([listed] if isinstance(listed, str) else listed or [])]
    return paths if all(path.is_file() for path in paths) else []


def line_in(files: Sequence[Path], number: int) -> tuple[Path, int] | None:
    """The file and the line of a document of a split; None where the files do not have one a line.

    Args:
        files: Of the split, in their order.
        number: The document's, counted from 0; blank lines do not count.
    """
    lines = ((path, line) for path in files for line, _ in _lines(path, None))
    try:
        return next(itertools.islice(lines, number, None), None)
    except DataError:
        return None


def first_gap(place: Path) -> str:
    """The first line with a null, or without a field that other lines have, as words; empty if there is none."""
    for path in _files(place).values():
        lines = list(_lines(path, None))
        columns = _columns(doc for _, doc in lines)
        for number, doc in lines:
            if (field := next(nulls({**dict.fromkeys(columns), **doc}), None)) is not None:
                return f"{path}, line {number}, has no value of {name(field)!r}"
    return ""


def _files(place: Path) -> dict[str, Path]:
    if place.is_file():
        return {"validation": place}
    return {s: place / f"{s}.jsonl" for s in SPLIT_FILES if has_split(place, s)}


def _columns(docs: Iterable[Document]) -> list[str]:
    """The fields of all documents, in the order in which they appear."""
    return list(dict.fromkeys(field for doc in docs for field in doc))


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


def _lines(path: Path, check: Callable[[Document], str] | None) -> Iterator[tuple[int, Document]]:
    """The documents of a file, each with its line's number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (the byte at {error.start}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            doc = json.loads(line, object_pairs_hook=_fields)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}); fix that line") from error
        except RecursionError as error:
            raise DataError(f"{path}, line {number}: nested too deeply; fix that line") from error
        except KeyError as error:
            raise DataError(f"{path}, line {number}: field {error} stands there twice; fix that line") from error
        if "\\ud" in line.lower() and not _is_text(doc):
            raise DataError(f"{path}, line {number}: half of a surrogate pair (\\ud...) is no text; fix that line")
        if not isinstance(doc, dict):
            raise DataError(f"{path}, line {number}: a document is a JSON object, not {type(doc).__name__}")
        if check is not None and (wrong := check(doc)):
            raise DataError(f"{path}, line {number}: {wrong}")
        yield number, {field: doc[field] for field in BARE} if check is not None else doc


def _fields(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, of which Python takes the last of two values without a word."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        known = [field for field, _ in pairs]
        raise KeyError(next(field for field in known if known.count(field) > 1))
    return fields


def _is_text(doc: object) -> bool:
    try:
        json.dumps(doc, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_bare(doc: Document) -> str:
    """What is wrong with a document of context, options and gold; empty if nothing is."""
    if absent := [field for field in BARE if field not in doc]:
        return f"no {' and no '.join(absent)}; a document has context, options and gold"
    context, options, gold = (doc[field] for field in BARE)
    if not isinstance(context, str):
        return f"context is a text, not {json.dumps(context)[:60]}"
    if not isinstance(options, list) or not options or not all(isinstance(o, str) and o.strip() for o in options):
        return f"options is a list of one or more texts, not {json.dumps(options)[:60]}"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(options):
        return f"gold is the right option's index, 0 to {len(options) - 1}, not {json.dumps(gold)[:60]}"
    return ""


def _dataset(path: Path, lines: Sequence[tuple[int, Document]]) -> datasets.Dataset:
    if not lines:
        raise DataError(f"{path} is empty; it needs one JSON object a line")
    table = {field: [doc.get(field) for _, doc in lines] for field in _columns(doc for _, doc in lines)}
    if not table:
        raise DataError(f"{path}: its documents have no fields")
    try:
        return datasets.Dataset.from_dict(table)
    except _NO_COLUMN as error:
        for field, values in table.items():
            if _reason({field: values}):
                # A column's beginning is one until a value of another type comes.
                last = bisect.bisect_left(range(1, len(values) + 1), True,
                                          key=lambda n: bool(_reason({field: values[:n]})))
                raise DataError(f"{path}, line {lines[last][0]}: field {field!r} differs in its type from the lines "
                                f"before, or is no value of a table ({_reason({field: values[: last + 1]})}); give it "
                                "one type in all lines") from error
        raise DataError(f"{path}: its lines are no table ({first_line(error)})") from error


def _reason(table: dict[str, list[object]]) -> str:
    """Why columns are no table, empty if they are one."""
    try:
        datasets.Dataset.from_dict(table)
    except _NO_COLUMN as error:
        return first_line(error)
    return ""
