"""Where a document comes from: the line of a local file, or its number in a split of a data set.

A definition may process its documents before they are used (`process_docs`), and may leave some out or change their
order. A document is of the row with its number if that row, processed alone, gives the document; else the row is not
known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from headcount.tasks.fewshot import Document
from headcount.tasks.local import files_of, line_in
from headcount.tasks.missing import MISFITS, mark_for, nulls, with_mark
from headcount.tasks.pool import same


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the documents of one split come from.

    Attributes:
        task: The task's name.
        split: lm-eval's name of the split; None for documents that stand in the definition.
        rows: What the data set holds of the split.
        process: What the definition makes of a data set, None where it takes it as it is.
        files: The local files that the split's documents stand in, one a line; none where they do not.
    """

    task: str
    split: str | None
    rows: Any
    process: Callable[[Any], Any] | None
    files: Sequence[Path]
    _marked: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def unprocessed(self, number: int) -> Document | None:
        """The row with a document's number, which it was made of unless documents were left out or moved."""
        row: Document | None = self.rows[number] if self.rows is not None and number < len(self.rows) else None
        return row

    def made(self, row: Document) -> Document | None:
        """The document that the definition makes of a row, None where it makes none."""
        if self.process is None:
            return row
        try:
            made: Sequence[Document] = list(self.process(datasets.Dataset.from_list([dict(row)])))
        except (*MISFITS, NotImplementedError):
            return None
        return made[0] if len(made) == 1 else None

    def made_with_marks(self, column: str) -> Sequence[Document] | None:
        """All documents that the definition makes where marks stand for a column's nulls; None where it makes others.

        So it is seen where a null went although rows were left out or moved.
        """
        if column not in self._marked:
            self._marked[column] = self._with_marks(column)
        found: Sequence[Document] | None = self._marked[column]
        return found

    @functools.cached_property
    def columns_with_nulls(self) -> list[str]:
        """Names of the columns in which a row has a null; none where the definition takes rows as they are."""
        if self.process is None or self.rows is None:
            return []
        return [name for name in self.rows.column_names if next(nulls(list(self.rows[name])), None) is not None]

    def _with_marks(self, column: str) -> Sequence[Document] | None:
        mark = mark_for(list(self.rows[column]))
        if mark is None or self.process is None:
            return None
        rows = [{**row, column: with_mark(row[column], mark)} for row in self.rows]
        try:
            plain, marked = list(self.process(self.rows)), list(self.process(datasets.Dataset.from_list(rows)))
        except (*MISFITS, NotImplementedError):
            return None
        return marked if len(plain) == len(marked) else None

    def where(self, number: int, doc: Document) -> str:
        """A document's file and line, or its number and the split's name, as an error begins with it."""
        if self.split is None:
            return f"shot {number} of the definition of task {self.task!r}"
        row = self.unprocessed(number)
        if self.files and row is not None and same(self.made(row), doc) and (place := line_in(self.files, number)):
            return f"{place[0]}, line {place[1]}"
        return f"document {number} of the {self.split} split of task {self.task!r}"


def origin_of(
    task: str, inner: Any, split: str, process: Callable[[Any], Any] | None, place: Path | None
) -> Origin:
    """Where the documents of a split come from.

    Args:
        task: The task's name.
        inner: lm-eval's own task.
        split: lm-eval's name of the split.
        process: What the definition makes of it, None where it takes it as it is.
        place: The local folder or file that the task's documents come from, if they do.
    """
    return Origin(task, split, inner.dataset[split], process, files_of(place, split, inner.config))


def origin_of_shots(task: str, inner: Any, place: Path | None) -> Origin:
    """Where the documents come from that shots are drawn from, as lm-eval chooses them.

    Args:
        task: The task's name.
        inner: lm-eval's own task.
        place: The local folder or file that its documents come from, if they do.
    """
    config, shots = inner.config, inner.fewshot_cfg
    if shots.split is not None:
        return origin_of(task, inner, shots.split, shots.process_docs, place)
    if shots.samples is not None:
        return Origin(task, None, None, None, ())
    split = config.training_split or config.validation_split or config.test_split
    return origin_of(task, inner, split, config.process_docs, place)
