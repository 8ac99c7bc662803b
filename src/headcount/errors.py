"""Errors that a user can cause: one clear line that says what to do; the command line prints it and exits with 2."""

from __future__ import annotations

import re
from collections.abc import Sequence


class HeadcountError(Exception):
    """Base of every error that a user can cause and fix.

    Args:
        message: One line that says what to do.
        fields: Options that the message names as Python knows them (`importance_limit`).
    """

    def __init__(self, message: str, *, fields: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)

    def on_command_line(self) -> str:
        """The message with these options as the command line knows them (`--importance-limit`)."""
        message = str(self)
        for name in sorted(self.fields, key=len, reverse=True):
            message = re.sub(rf"(?<![\w-]){name}(?![\w-])", f"--{name.replace('_', '-')}", message)
        return message


class ModelError(HeadcountError):
    """The model cannot be found, loaded, or understood."""


class TaskError(HeadcountError):
    """The task is unknown, or does not offer what was asked of it."""


class UnavailableError(TaskError):
    """A task's documents are not here, and the hub does not give them."""


class DataError(HeadcountError):
    """A data file is missing, empty or malformed."""


class OptionError(HeadcountError):
    """An option's value is out of range, or options contradict one another."""


class StudyError(HeadcountError):
    """The study folder belongs to another study, or an entry in it is damaged."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
