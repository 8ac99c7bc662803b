"""Which missing field of a document a text was made of: a null in it, or a number that is none (NaN).

lm-eval renders a null as the text "None". Whether a prompt needs a field cannot be read off its definition, which may
be a template or a function; so it is tried. The null is replaced by a mark, and the text is made again:

- the text with the null is the text with the mark, but for "None" in the mark's place: the null was written there;
- there is no text with the null, and there is one with the mark: the field was needed;
- else the definition looked at the null and did without it, as `{% if hint %}` does.

Only documents with nulls whose text holds "None" (or "null", "nan"), or cannot be made, are tried; others cost nothing
but a look.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from jinja2.exceptions import TemplateError

from headcount.tasks.fewshot import Document
from headcount.tasks.pool import same

# What a definition raises on documents that it was not written for.
MISFITS = (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError, TemplateError, SyntaxError,
           ArithmeticError, RecursionError)

Field = tuple[str | int, ...]
# A part of a prompt, made of a document.
Part = Callable[[Document], object]

_NOTHING = re.compile(r"none|null|nan", re.IGNORECASE)
# In place of a text, and of a number. Neither has letters, which templates may make large or small.
_MARKS: tuple[object, ...] = ("~271828182845~", 271828182845)
_MARK = re.compile(r"['\"]?~?271828182845(?:\.0+)?~?['\"]?")
# No mark to look for in a text, but a number that is an index of any list.
_INDEX = 0
_BETWEEN = "\x1f"


def nulls(value: object, field: Field = ()) -> Iterator[Field]:
    """Where a document, or a part of one, holds nulls or NaN: keys and indices from the outside in."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        yield field
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from nulls(inner, (*field, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from nulls(inner, (*field, place))


def name(field: Field) -> str:
    """A field as Python writes it: `choices.text[2]`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in field).removeprefix(".")


def lacking(
    parts: Sequence[Part], doc: Document, row: Document | None = None,
    made: Callable[[Document], Document | None] = lambda row: row,
) -> str:
    """The name of a field that is missing and that a part of the prompt needs; empty where there is none.

    Args:
        parts: What the prompt is made of.
        doc: The document.
        row: What the document may have been made of, where the definition processes its documents.
        made: What the definition makes of such a row.
    """
    row = doc if row is None else row
    absent = list(nulls(row))
    if not absent:
        return ""
    plain = [_text(part, doc) for part in parts]
    suspects = [(part, text) for part, text in zip(parts, plain, strict=True) if text is None or _NOTHING.search(text)]
    if not suspects or (row is not doc and not same(made(row), doc)):
        return ""
    for field in absent:
        for mark in (*_MARKS, _INDEX):
            marked = made(_replaced(row, field, mark))
            if marked is None:
                continue
            for part, text in suspects:
                with_mark = _text(part, marked)
                if with_mark is not None and (text is None or (mark in _MARKS and _is_written(text, with_mark))):
                    return name(field)
    return ""


def _is_written(plain: str, marked: str) -> bool:
    """Whether two texts differ in this alone, that one has nothing's name where the other has the mark."""
    pieces = _MARK.split(marked)
    between = r"['\"]?(?:none|null|nan)['\"]?"
    return len(pieces) > 1 and re.fullmatch(between.join(map(re.escape, pieces)), plain,
                                            re.IGNORECASE | re.DOTALL) is not None


def _replaced(row: Document, field: Field, value: object) -> Document:
    replaced = copy.deepcopy(dict(row))
    inner: object = replaced
    for key in field[:-1]:
        inner = inner[key]  # type: ignore[index]
    inner[field[-1]] = value  # type: ignore[index]
    return replaced


def _text(part: Part, doc: Document) -> str | None:
    """All texts of a part in one; None where the definition does not fit the document."""
    try:
        return _BETWEEN.join(_leaves(part(copy.deepcopy(dict(doc)))))
    except MISFITS:
        return None


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield str(value)
