"""Documents of local files for lm-eval: `headcount tasks ... --yaml` puts a copy of this file beside what it writes.

lm-eval's own reader of jsonl files would make dates of texts that look like dates, refuse fields that are here a number
and there a text, and tell two documents apart by fields that no prompt shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import datasets
from lm_eval.api.samplers import ContextSampler

Doc = dict[str, Any]
NUMBER = "headcount_number"


def documents(
    files: Mapping[str, str], fields: Sequence[str] = (), numbered: bool = False, **metadata: object
) -> Any:
    """Each split's documents.

    Args:
        files: The jsonl file of each split.
        fields: The fields to keep; all where none are named.
        numbered: Whether each document gets its number, so that equal documents are not taken for one another.
        metadata: Whatever else lm-eval gives to such a function: the model's arguments and the task's version.
    """
    return datasets.DatasetDict({split: _split(Path(file), fields, numbered) for split, file in files.items()})


class Others(ContextSampler):  # type: ignore[misc]  # lm-eval says nothing of types
    """lm-eval's draw of shots; where it gives the document itself, another takes its place, drawn apart."""

    def sample(self, n: int, eval_doc: Doc | None = None, df: Any = None, **kwargs: object) -> Sequence[Doc]:
        """So many shots for a document, which is known by its number."""
        drawn = list(super().sample(n))
        if eval_doc is None or eval_doc not in drawn:
            return drawn
        kept = [shot for shot in drawn if shot != eval_doc]
        others = [doc for doc in self.fewshot_docs() if doc != eval_doc and doc not in drawn]
        return [*kept, *Random(eval_doc[NUMBER]).sample(others, n - len(kept))]  # noqa: S311


def _split(path: Path, fields: Sequence[str], numbered: bool) -> datasets.Dataset:
    # By "\n" alone: some of what str.splitlines() takes for the end of a line may stand in a JSON text.
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    columns = fields or list(dict.fromkeys(field for doc in lines for field in doc))
    table = {field: [doc.get(field) for doc in lines] for field in columns}
    return datasets.Dataset.from_dict(table | ({NUMBER: list(range(len(lines)))} if numbered else {}))
