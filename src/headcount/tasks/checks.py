"""Documents that do not fit a task's definition are refused, with file and line where they are local.

Evaluated documents, examples and shots pass the same checks: the definition can make a prompt of them; no field is
missing that the prompt needs (`headcount.tasks.missing`); the answer is one of the options (`headcount.tasks.answers`).
A task with a metric of its own is asked which option is right.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headcount.errors import DataError, TaskError, first_line
from headcount.tasks.answers import unknown_label, wrapped_index, wrong_answer
from headcount.tasks.fewshot import Document
from headcount.tasks.missing import MISFITS, Part, lacking, name, nulls, written_elsewhere
from headcount.tasks.origin import Origin

# The metrics that a right option can be known by, the first one that a task has.
METRICS = ("acc", "em", "exact_match")
NUMBERS = (int, float, np.number, np.bool_)


def check_definition(task: str, inner: Any) -> None:
    """Refuse a prompt that is the name of a field which no document has: lm-eval takes the name for the text.

    Raises:
        DataError: If there is no such field.
    """
    config, fields = inner.config, inner.features
    named = [config.doc_to_text, *([config.doc_to_target] if inner.OUTPUT_TYPE == "loglikelihood" else [])]
    for part in named:
        if isinstance(part, str) and part.isidentifier() and part not in fields:
            raise DataError(f"the documents of task {task!r} have no field {part!r}, which its definition names; they "
                            f"have {', '.join(fields)}")


@dataclass(frozen=True, eq=False)
class Checks:
    """The checks of one task's documents.

    Attributes:
        task: The task's name.
        inner: lm-eval's own task.
        metric: The metric that knows the right option.
    """

    task: str
    inner: Any
    metric: str

    def evaluated(self, origin: Origin, number: int, doc: Document) -> None:
        """Refuse a document that is evaluated, or an example.

        Args:
            origin: Where the documents of its split come from.
            number: Its number there.
            doc: The document.

        Raises:
            DataError: If a field is missing that the prompt needs, or the answer is none of the options.
        """
        self._fields(origin, number, doc, self._parts())
        with self.fitting(origin, number, doc):
            if wrong := self._wrong_answer(doc):
                raise _WrongError(wrong)

    def shot(self, origin: Origin, number: int, shot: Document) -> None:
        """Refuse a shot as `evaluated` refuses a document; of its options, it needs the right one alone."""
        inner, shots = self.inner, self.inner.fewshot_cfg
        self._fields(origin, number, shot, [self._shot_text, lambda doc: inner.doc_to_target(doc, shots.doc_to_target)])
        with self.fitting(origin, number, shot):
            if wrong := self._wrong_shot(shot):
                raise _WrongError(wrong)
            self._shot_text(shot)

    @contextlib.contextmanager
    def fitting(self, origin: Origin, number: int, doc: Document) -> Iterator[None]:
        """Tell the document where the definition does not fit it."""
        try:
            yield
        except _WrongError as error:
            raise DataError(f"{origin.where(number, doc)}: {error}; fix that document") from error.__cause__
        except MISFITS as error:
            gaps = ", ".join(name(field) for field in itertools.islice(nulls(doc), 3))
            raise DataError(f"{origin.where(number, doc)}: the document does not fit the definition of task "
                            f"{self.task!r} ({_named(error)}{f'; missing or null: {gaps}' if gaps else ''}); fix that "
                            "document") from error

    def gold(self, doc: Document, options: int, pairs: int) -> int:
        """The option which scores when it alone wins, asked of the task's own metric."""
        for i in range(options):
            results = [(0.0, True) if j == i else (-1e4, False) for j in range(pairs)]
            score = self.inner.process_results(doc, results).get(self.metric)
            if not isinstance(score, NUMBERS):
                raise TaskError(f"task {self.task!r} measures {', '.join(self.inner.aggregation())}; headcount needs a "
                                f"metric that gives each document a number, such as {' or '.join(METRICS)}")
            if score == 1:
                return i
        raise _WrongError("no option is right")

    def _wrong_answer(self, doc: Document) -> str:
        """What is wrong with an evaluated document's answer; empty where the task has a metric of its own."""
        inner = self.inner
        if callable(inner.config.process_results):
            return ""
        if self._is_produced:
            target = inner.doc_to_target(doc)
            return "" if isinstance(target, str) else f"the continuation is a text, not {target!r}"
        answer = inner.doc_to_text if inner.multiple_input else inner.doc_to_target
        options = inner.doc_to_choice(doc)
        return (wrong_answer(answer(doc), options, several=bool(inner.multiple_target))
                or unknown_label(answer, doc, len(options)) or wrapped_index(answer, doc, len(options)))

    def _parts(self) -> list[Part]:
        """What an evaluated document's prompt is made of."""
        inner = self.inner
        parts: list[Part] = [inner.doc_to_text, inner.doc_to_prefix,
                             lambda doc: inner.resolve_field(doc, inner.config.description)]
        if inner.config.doc_to_choice is not None:
            parts.append(inner.doc_to_choice)
        # A metric of the task's own may ask another field for the answer.
        if self._is_produced or inner.multiple_input or not callable(inner.config.process_results):
            parts.append(inner.doc_to_target)
        return parts

    def _fields(self, origin: Origin, number: int, doc: Document, parts: Sequence[Part]) -> None:
        """Refuse a document that lacks a field which its prompt needs."""
        row = origin.unprocessed(number) if origin.process is not None else None
        field = lacking(parts, doc, asks=lambda: self._asks_for_nulls)
        field = field or ("" if row is None else lacking(parts, doc, row, origin.made))
        if field := field or self._processed_away(origin, number, doc, parts):
            raise DataError(f"{origin.where(number, doc)}: field {field!r} is missing, null or NaN, and the "
                            f"prompt of task {self.task!r} needs it; give it a value, or leave that document out")

    @staticmethod
    def _processed_away(origin: Origin, number: int, doc: Document, parts: Sequence[Part]) -> str:
        """The column whose null the definition wrote into a document before it left rows out or moved them."""
        for column in origin.columns_with_nulls:
            marked = origin.made_with_marks(column)
            if marked is not None and number < len(marked) and written_elsewhere(parts, doc, marked[number]):
                return column
        return ""

    @functools.cached_property
    def _asks_for_nulls(self) -> bool:
        """Whether the definition has the word None, as `is none` has."""
        config = self.inner.config
        for part in (config.doc_to_text, config.doc_to_target, config.doc_to_choice):
            with contextlib.suppress(TypeError, OSError):
                if "none" in (inspect.getsource(part) if callable(part) else str(part or "")).lower():
                    return True
        return False

    def _wrong_shot(self, shot: Document) -> str:
        """What is wrong with a shot's answer, which may have a form of its own (`fewshot_config`)."""
        inner, config, shots = self.inner, self.inner.config, self.inner.fewshot_cfg
        alike = all(getattr(config, part) == getattr(shots, part)
                    for part in ("doc_to_text", "doc_to_target", "doc_to_choice"))
        if callable(config.process_results):
            if alike and shots.samples is None and not self._is_produced:
                size = len(inner.doc_to_choice(shot))
                self.gold(shot, size, size)
            return ""
        if not shots.doc_to_choice:
            return ""
        # A wrong option that is missing is no part of the shot.
        options = [str(option) for option in inner.doc_to_choice(shot, shots.doc_to_choice)]
        answer = self._answer_of_shot
        return (wrong_answer(answer(shot), options, several=bool(inner.multiple_target), texts=alike)
                or unknown_label(answer, shot, len(options)) or wrapped_index(answer, shot, len(options)))

    def _answer_of_shot(self, shot: Document) -> Any:
        inner, shots = self.inner, self.inner.fewshot_cfg
        if inner.multiple_input:
            return inner.doc_to_text(shot, shots.doc_to_text)
        return inner.doc_to_target(shot, shots.doc_to_target)

    def _shot_text(self, shot: Document) -> str:
        """A document as a shot, as lm-eval's fewshot_context writes it."""
        inner, shots = self.inner, self.inner.fewshot_cfg
        text = inner.doc_to_text(shot, shots.doc_to_text)
        options: Any = inner.doc_to_choice(shot, shots.doc_to_choice) if shots.doc_to_choice else None
        if inner.multiple_input:
            text, options = options[text], None
        turns = inner.build_qa_turn(q=text, c=options, a=inner.doc_to_target(shot, shots.doc_to_target),
                                    gen_prefix=inner.resolve_field(shot, shots.gen_prefix),
                                    tgt_delim=shots.target_delimiter, few_delim=shots.fewshot_delimiter)
        return "".join(turn.to_text() for turn in turns)

    @property
    def _is_produced(self) -> bool:
        return bool(self.inner.OUTPUT_TYPE == "loglikelihood")


class _WrongError(Exception):
    """What is wrong with a document's answer."""


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
