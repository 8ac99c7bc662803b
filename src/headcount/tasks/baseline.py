"""The accuracy of a model that gives all documents the same answer: a baseline, beside guessing.

Options are scored by their text, and a model does not see their position; so the same answer can be given to all
documents only where its text is among the options of each. What the options of a document have in common at their
beginning belongs to the document (MultiRC's answer, before "yes" or "no") and does not count.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from headcount.tasks.fewshot import FewShot
from headcount.tasks.task import Prompt, Task

# Of more documents the first so many are asked: their share is known to about two points.
_MOST = 1000


def constant_answer(task: Task, documents: int) -> tuple[float, list[int]]:
    """The best accuracy that one answer to all evaluated documents has, 0 where no answer fits all.

    Args:
        task: The task; where a question counts as a whole (protocol "paper"), all its documents must be right.
        documents: How many are evaluated, the first ones.

    Returns:
        The accuracy, and the indices of options that have the same text in all documents.
    """
    if task.is_produced:
        return 0.0, []
    # Most tasks have no such answer, which two documents show.
    for limit in (min(2, documents), min(_MOST, documents)):
        prompts = task.prompts("evaluation", FewShot(limit=limit))
        options = [_options(prompt) for prompt in prompts]
        answers = set.intersection(*map(set, options))
        if not answers:
            return 0.0, []
    best = max(_accuracy(task, prompts, [own[prompt.gold] == answer for own, prompt in zip(options, prompts,
                                                                                           strict=True)])
               for answer in answers)
    same = [place for place, texts in enumerate(zip(*options, strict=False)) if len(set(texts)) == 1]
    return best, same


def _options(prompt: Prompt) -> list[str]:
    """The options' texts without what they begin with in common; none where they differ in the context alone."""
    texts = [continuation for _, continuation in prompt.pairs[: prompt.num_options]]
    if len(set(texts)) < len(texts):
        return []
    if len(texts) < 2:
        return texts
    begin = sum(1 for _ in itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False)))
    return [text[begin:] for text in texts]


def _accuracy(task: Task, prompts: Sequence[Prompt], right: Sequence[bool]) -> float:
    wholes: dict[object, bool] = {}
    for prompt, correct in zip(prompts, right, strict=True):
        whole = task.question(prompt.doc) if task.question is not None else prompt.doc_id
        wholes[whole] = wholes.get(whole, True) and correct
    return sum(wholes.values()) / len(wholes)
