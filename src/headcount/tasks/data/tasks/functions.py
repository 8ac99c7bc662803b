"""What the task definitions beside this file call; lm-eval loads it with them."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

Doc = dict[str, Any]


def record_docs(dataset: Any) -> Any:
    """Entities and answers without repetition, in alphabetical order."""
    return dataset.map(lambda doc: {name: sorted(set(doc[name])) for name in ("entities", "answers")})


def record_context(doc: Doc) -> str:
    """The passage, and its highlights as a list."""
    passage, *highlights = doc["passage"].strip().split("\n@highlight\n")
    return f"{passage}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def record_options(doc: Doc) -> list[str]:
    """The query as one more item of the list, once with each entity."""
    return [_filled(doc, entity) for entity in doc["entities"]]


def record_target(doc: Doc) -> str:
    """The query with its first right answer."""
    return _filled(doc, doc["answers"][0])


def record_results(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Whether the likeliest entity is one of the answers, both normalised as in SQuAD."""
    best = max(range(len(results)), key=lambda i: results[i][0])
    answers = {_normalised(answer) for answer in doc["answers"]}
    return {"em": float(_normalised(doc["entities"][best]) in answers)}


def multirc_options(doc: Doc) -> list[str]:
    """The answer called wrong (label 0), and called right (label 1)."""
    return [f"{doc['answer']}\nIs the answer correct? {verdict}" for verdict in ("no", "yes")]


def bare_options(doc: Doc) -> list[str]:
    """The options, each behind one space unless it begins with white space."""
    return [option if option[:1].isspace() else f" {option}" for option in doc["options"]]


def _filled(doc: Doc, entity: str) -> str:
    return f"  - {doc['query']}".replace("@placeholder", entity)


def _normalised(answer: str) -> str:
    plain = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())
