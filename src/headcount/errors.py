"""Errors that a user can cause: one clear line that says what to do; the command line prints it and exits with 2.

Beside them the one warning: numbers are given all the same, and may be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Characters of another library's message.
_LONGEST = 300


class HeadcountError(Exception):
    """Base of every error that a user can cause and fix.

    Args:
        message: One line that says what to do. Arguments stand in it as Python knows them, between backticks, which
            tell them from the same letters elsewhere (in a path): `` `importance_limit` ``, `` `device_map='auto'` ``.
        fields: These arguments, as they are written there; or what the command line calls each of them, where that is
            not the same name with hyphens.
    """

    def __init__(self, message: str, *, fields: Sequence[str] | Mapping[str, str] = ()) -> None:
        self._marked = message
        self._options = dict(fields) if isinstance(fields, Mapping) else {text: _option(text) for text in fields}
        super().__init__(self._with({text: text for text in self._options}))

    def on_command_line(self, short: Mapping[str, str] | None = None) -> str:
        """The message with options as the command line knows them (`--importance-limit`, `--device-map auto`).

        Args:
            short: What the verb calls some of them instead.
        """
        return self._with({text: (short or {}).get(option, option) for text, option in self._options.items()})

    def _with(self, written: Mapping[str, str]) -> str:
        message = self._marked
        for text, instead in written.items():
            message = message.replace(f"`{text}`", instead)
        return message


def _option(argument: str) -> str:
    """`importance_limit` as `--importance-limit`, `device_map='auto'` as `--device-map auto`."""
    name, _, value = argument.partition("=")
    value = value.replace("'", "")
    return f"--{name.replace('_', '-')}" + ("" if value in ("", "True") else f" {value}")


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


class JobsFailedError(StudyError):
    """Some jobs of a study failed as often as they were tried; all others are measured and kept."""


class DeviceWarning(UserWarning):
    """A device computes other logits than the CPU, or could not be compared with it."""


def named(error: BaseException) -> str:
    """Another library's error, as one who knows Python reads it: `KeyError: 'full_attention'`."""
    said, kind = first_line(error), type(error).__name__
    return said if said == kind else f"{kind}: {said}"


def first_line(error: BaseException) -> str:
    """The first line of another library's message, with what it announces, or the error's name where it has none."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST].rpartition(' ')[0] or said[:_LONGEST]} ..."


def listed(names: Sequence[str]) -> str:
    """`no shots and 5 shots`; `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def few(names: Sequence[str], kind: str = "", most: int = 3) -> str:
    """Names, or where they are many the first of them and how many more there are: `a, b, c and 4 more heads`."""
    if len(names) <= most + 1:
        return listed(names)
    return f"{', '.join(names[:most])} and {len(names) - most:,} more{f' {kind}' if kind else ''}"
