"""Whether the answer that a document names is one of its options; lm-eval takes what is none without a word.

As a shot, a document with label -1 gets its last option for an answer (Python's list[-1]); where a document is
evaluated, no option or the last one counts as right. lm-eval's own metrics know an answer by its index or by its text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from headcount.tasks.fewshot import Document
from headcount.tasks.missing import Part, rendered

# Fields that hold an answer's index in most data sets.
_LABELS = ("label", "gold", "answer", "target")
# What no label is: a definition that gives the same answer for these does not know its label.
_ARBITRARY = (271828182845, -271828182845)


def wrong_answer(answer: object, options: Sequence[object], *, several: bool = False, texts: bool = True) -> str:
    """What is wrong with a document's answer; empty if nothing is.

    Args:
        answer: The right option's index or text; a list of indices where several are right.
        options: The options.
        several: Whether the task's documents may have several right options.
        texts: Whether an answer that is a text must be among the options.
    """
    if isinstance(options, str):
        return f"the options are a list of texts, not the text {_written(options)}"
    if unlike := [option for option in options if not isinstance(option, str)]:
        return f"an option is a text, not {_written(unlike[0])}"
    if isinstance(answer, str):
        known = not texts or answer in options
        return "" if known else f"the answer {_written(answer)} is none of its {len(options)} options"
    answers = answer if several and isinstance(answer, list) else [answer]
    if not answers:
        return "no option is right"
    for one in answers:
        if not isinstance(one, int | np.integer):
            column = "; a NaN or a fraction makes numbers of its whole column fractions" * isinstance(one, float)
            return f"an answer is an option's index or text, not {_written(one)}{column}"
        if not 0 <= one < len(options):
            return f"the answer is {one}, and its {len(options)} options are 0 to {len(options) - 1}"
    return ""


def wrapped_index(answer: Part, doc: Document, options: int) -> str:
    """What is wrong with a label that Python counts from the end of a list; empty if nothing is.

    `["a", "b"][label]` is "b" where label is -1, and so is `["a", "b"][label - 1]` where it is 0. Such answers repeat
    themselves after as many numbers as there are options, and there are none for numbers on either side.

    Args:
        answer: What gives a document's answer.
        doc: The document.
        options: How many options it has.
    """
    for field, value in doc.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not -options <= value <= 0:
            continue

        def at(number: int, field: str = field) -> str | None:
            return rendered(answer, {**doc, field: number}) or None

        if at(int(value)) is None or at(int(value) + options) != at(int(value)):
            continue
        # The last number that is counted from the end: of a list asked for label, and for label - 1.
        for last in (-1, 0):
            wrapped = range(last - options + 1, last + 1)
            answers = [at(number) for number in wrapped]
            alone = at(wrapped[0] - 1) is at(last + options + 1) is None
            if value in wrapped and alone and None not in answers and len({*answers}) > 1 and answers == [
                    at(number + options) for number in wrapped]:
                return f"{field!r} is {value}, with which Python counts from the end of the options"
    return ""


def unknown_label(answer: Part, doc: Document, options: int) -> str:
    """What is wrong with a label that the answer falls to as the last resort; empty if nothing is.

    COPA's answer is the first choice where the label is 0, and else the second, whatever the label is: -1, "0", null.

    Args:
        answer: What gives a document's answer.
        doc: The document.
        options: How many options it has.
    """
    for field, value in doc.items():
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        if isinstance(value, list | dict) or (not missing and value in range(options)):
            continue
        if not missing and field not in _LABELS and not (isinstance(value, int) and value < 0):
            continue
        plain = rendered(answer, doc)
        if any(rendered(answer, {**doc, field: other}) != plain for other in _ARBITRARY):
            continue
        if any(rendered(answer, {**doc, field: index}) not in (None, plain) for index in range(options)):
            return f"{field!r} is {'null' if missing else _written(value)}, and no option's index (0 to {options - 1})"
    return ""


def _written(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
