"""Whether the answer that a document names is one of its options; lm-eval takes what is none without a word.

As a shot, a document with label -1 gets its last option for an answer (Python's list[-1]); where a document is
evaluated, no option or the last one counts as right. lm-eval's own metrics know an answer by its index or by its text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def wrong_answer(answer: object, options: Sequence[object], *, several: bool = False, texts: bool = True) -> str:
    """What is wrong with a document's answer; empty if nothing is.

    Args:
        answer: The right option's index or text; a list of indices where several are right.
        options: The options.
        several: Whether the task's documents may have several right options.
        texts: Whether an answer that is a text must be among the options.
    """
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
            return f"an answer is an option's index or text, not {_written(one)}"
        if not 0 <= one < len(options):
            return f"the answer is {one}, and its {len(options)} options are 0 to {len(options) - 1}"
    return ""


def _written(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
