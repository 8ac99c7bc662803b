"""Which missing field of a document a text was made of: a null in it, or a number that is none (NaN).

lm-eval renders a null as the text "None". Whether a prompt needs a field cannot be read off its definition, which may
be a template or a function; so it is tried. The null is replaced by a mark, and the text is made again:

- the text with the null is the text with the mark, but for "None" in the mark's place: the null was written there;
- there is no text with the null, and there is one with the mark: the field was needed;
- two marks of NaN give two texts, and the text with NaN has "nan" where these have numbers: it was computed with;
- the null is asked for its number as the bound of a slice, where Python takes a null for the text's beginning or end;
- else the definition looked at the null and did without it, as `{% if hint %}` does.

Only documents with nulls are tried; others cost nothing but a look.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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
# In place of a text, and of a number. Neither has letters, which templates may make large or small; the text is as
# wide as "None", which templates may fill up.
_MARKS: tuple[object, ...] = ("\u29d727\u29d6", 271828182845)
_MARK = re.compile(r"['\"]?(?:\u29d727\u29d6|271828182845(?:\.0+)?)['\"]?")
_OTHER_NUMBER = 314159265359
_NUMBER = re.compile(r"-?\d[\d.,]*(?:e[+-]?\d+)?")
# No mark to look for in a text, but a number that is an index of any list.
_INDEX = 0
_FAR = 1 << 40
_BETWEEN = "\x1f"


@dataclass(eq=False)
class _Bound:
    """What may stand as the bound of a slice, and notes that it did."""

    at: int
    used: bool = False

    def __index__(self) -> int:
        self.used = True
        return self.at

    def __deepcopy__(self, memo: object) -> _Bound:
        return self


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
    made: Callable[[Document], Document | None] = lambda row: row, *, asks: Callable[[], bool] = lambda: False,
) -> str:
    """The name of a field that is missing and that a part of the prompt needs; empty where there is none.

    Args:
        parts: What the prompt is made of.
        doc: The document.
        row: What the document may have been made of, where the definition processes its documents.
        made: What the definition makes of such a row.
        asks: Whether the definition asks for nulls by that name; then slices are its own affair.
    """
    row = doc if row is None else row
    absent = list(nulls(row))
    if not absent:
        return ""
    texts = list(zip(parts, [rendered(part, doc) for part in parts], strict=True))
    if row is doc and not asks() and (field := _bound(texts, doc, absent)):
        return name(field)
    suspects = [(part, text) for part, text in texts if text is None or _NOTHING.search(text)]
    if not suspects or (row is not doc and not same(made(row), doc)):
        return ""
    for field in absent:
        for mark in (*_MARKS, _INDEX):
            marked = made(_replaced(row, field, mark))
            if marked is None:
                continue
            for part, text in suspects:
                other = rendered(part, marked)
                if other is not None and (text is None or (mark in _MARKS and _is_written(text, other))):
                    return name(field)
        if any(_is_computed_with(part, text, row, field, made) for part, text in suspects):
            return name(field)
    return ""


def _is_computed_with(
    part: Part, text: str | None, row: Document, field: Field, made: Callable[[Document], Document | None]
) -> bool:
    """Whether a NaN went into a number of a text, such as its half."""
    documents = [made(_replaced(row, field, number)) for number in (_MARKS[1], _OTHER_NUMBER)]
    one, other = (None if doc is None else rendered(part, doc) for doc in documents)
    if text is None or one is None or other is None or one == other:
        return False
    # The text with NaN is the one with the mark, but for "nan" in the place of numbers.
    numbers, between = _NUMBER.findall(one), _NUMBER.split(one)
    either = [f"(?:{re.escape(number)}|nan)" for number in numbers]
    pieces = itertools.zip_longest(map(re.escape, between), either, fillvalue="")
    pattern = "".join(itertools.chain.from_iterable(pieces))
    return text != one and re.fullmatch(pattern, text, re.IGNORECASE) is not None


def written_elsewhere(parts: Sequence[Part], doc: Document, marked: Document) -> bool:
    """Whether a document's texts have nothing's name where those of the same document, made with marks, have marks."""
    for part in parts:
        plain, other = rendered(part, doc), rendered(part, marked)
        if plain is not None and other is not None and _is_written(plain, other):
            return True
    return False


def mark_for(values: Sequence[object]) -> object | None:
    """What may stand for a null in a column of such values; None where nothing may."""
    known = next((value for value in _values(values) if value is not None), "")
    if isinstance(known, str):
        return _MARKS[0]
    return _MARKS[1] if isinstance(known, int | float) and not isinstance(known, bool) else None


def with_mark(value: object, mark: object) -> object:
    """A value, or a part of one, with marks in the place of its nulls."""
    if isinstance(value, Mapping):
        return {key: with_mark(inner, mark) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_mark(inner, mark) for inner in value]
    return mark if value is None else value


def _values(value: object) -> Iterator[object]:
    """What a value consists of, from the outside in."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        yield value
    else:
        for inner in value:
            yield from _values(inner)


def _bound(texts: Sequence[tuple[Part, str | None]], doc: Document, absent: Sequence[Field]) -> Field | None:
    """The first null that is the bound of a slice."""
    if not list(_slices(texts, doc, absent)):
        return None
    return next((field for field in absent if any(_slices(texts, doc, [field]))), None)


def _slices(texts: Sequence[tuple[Part, str | None]], doc: Document, fields: Sequence[Field]) -> Iterator[bool]:
    """For each part that takes a number in these nulls' place for a slice's bound: whether its text is the same."""
    for at in (_INDEX, _FAR):
        bound, marked = _Bound(at), doc
        for field in fields:
            marked = _replaced(marked, field, bound)
        for part, text in texts:
            with_bound = rendered(part, marked)
            if bound.used:
                yield text is not None and text == with_bound
            bound.used = False


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


def rendered(part: Part, doc: Document) -> str | None:
    """All texts of a part of a prompt in one; None where the definition does not fit the document."""
    try:
        return _BETWEEN.join(_leaves(part(copy.deepcopy(dict(doc)))))
    except MISFITS:
        return None


def _leaves(value: object) -> Iterator[str]:
    return map(str, _values(value))
