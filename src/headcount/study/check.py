"""A study folder checked: which entries are whole, which are damaged and what they were of. Nothing is written.

What a damaged entry was of stands in it, where its name proves that part. Where it does not, all that the folder was
asked for is planned again from study.json, and the planned job of the same name is it. By the same plan it is told
what was never measured, which is nothing wrong: a study that was stopped goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from headcount.errors import HeadcountError, StudyError
from headcount.study.described import check_description
from headcount.study.jobs import Evaluation, job_from, name_of
from headcount.study.ledger import Found, Ledger, is_left_over
from headcount.study.plan import PlannedJob, missing
from headcount.study.shown import planned_again


@dataclass(frozen=True)
class Damaged:
    """An entry that is not believed.

    Attributes:
        name: Of the file.
        reason: Why, and what to do where no command measures it again.
        title: What it was of, in a few words; empty where that cannot be told.
    """

    name: str
    reason: str
    title: str


class _Asked(NamedTuple):
    """A request, planned again.

    Attributes:
        is_whole: Whether all that it asked for is known; earlier versions did not write down its parts.
        either: Two lists of jobs, of which one is right (`headcount.study.shown.planned_again`).
    """

    is_whole: bool
    either: list[list[PlannedJob]]


@dataclass(frozen=True)
class Checked:
    """What was found in a study folder.

    Attributes:
        folder: The folder.
        whole: How many entries are proved by their digest.
        unverified: How many have none, since an earlier version wrote them; nothing speaks against them.
        of_other_models: How many of the whole ones are of another model than study.json says, and shown nowhere.
        other_versions: How many entries another version wrote, which this one does not read.
        damaged: The damaged ones.
        unmeasured: What the folder was asked for and holds no entry of, in a few words each. Of requests of versions
            that did not write down which parts of a study they were, it is not known.
        foreign: Names of files among the entries that are none.
        left_over: Names of what killed processes left there.
        description: What is wrong with study.json, or with the folder as a whole; empty where nothing is.
        commands: By which the folder was measured, as far as study.json can be read.
    """

    folder: Path
    whole: int
    unverified: int
    of_other_models: int
    other_versions: int
    damaged: tuple[Damaged, ...]
    unmeasured: tuple[str, ...]
    foreign: tuple[str, ...]
    left_over: tuple[str, ...]
    description: str
    commands: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged and not self.description


def check(folder: str | Path) -> Checked:
    """Look at every file of a study folder.

    Args:
        folder: The folder, as `out` named it.

    Raises:
        StudyError: If it holds no study.
    """
    ledger = Ledger(folder)
    description, wrong = _description(ledger)
    if description is None and not wrong:
        if not ledger.is_begun():
            raise StudyError(f"{folder} holds no study (no study.json, no entries); name the folder given to `out`",
                             fields=("out",))
        wrong = "study.json is not there; the study's command writes it anew and finds what is measured"
    found = list(ledger.scan(rows=False))
    whole = [one for one in found if one.entry is not None]
    others = _of_other_models(description, whole)
    if whole and others == len(whole):
        wrong = "study.json is of another model than all entries; put back the folder's own"
    if not found and not wrong:
        wrong = f"there are no entries in {ledger.entries_folder}; the study's command measures all of them"
    requests = _asked(description)
    planned = {_file(one): one.title for request in requests for jobs in request.either for one in jobs}
    foreign = ledger.foreign()
    return Checked(
        Path(folder), sum(one.verified for one in whole), sum(not one.verified for one in whole),
        others, sum(one.other_format for one in found),
        tuple(_damaged(one, planned) for one in found if one.damage), _unmeasured(requests, found),
        tuple(name for name in foreign if not is_left_over(name)), tuple(filter(is_left_over, foreign)), wrong,
        _commands(description))


def _description(ledger: Ledger) -> tuple[dict[str, Any] | None, str]:
    """study.json, None where it is not there or damaged; and what is wrong with it."""
    try:
        description = ledger.read_json("study.json")
        if description is not None:
            check_description(description, ledger.folder / "study.json")
    except StudyError as error:
        return None, str(error)
    return description, ""


def _of_other_models(description: Mapping[str, Any] | None, whole: Sequence[Found]) -> int:
    """How many entries are of another model than the description says."""
    if description is None:
        return 0
    own = description["model"]["fingerprint"]
    return sum(one.entry is not None and one.entry.job.get("model", own) != own for one in whole)


def _damaged(found: Found, planned: Mapping[str, str]) -> Damaged:
    """What is told of a damaged entry, with the titles of planned jobs by names of files."""
    title = planned.get(found.name, "")
    if found.job is not None:
        with contextlib.suppress(StudyError):
            title = job_from(found.job).title
    # Nothing is lost by that: it is believed nowhere.
    idle = "" if title else "; nothing that was asked for is measured under its name: delete it"
    return Damaged(found.name, found.damage + idle, title)


def _asked(description: Mapping[str, Any] | None) -> list[_Asked]:
    """What the folder was asked for, planned again."""
    requests: list[_Asked] = []
    for one in () if description is None else description.get("asked", [{}]):
        request = {**(description or {}), **one}
        with contextlib.suppress(HeadcountError):  # what an earlier version wrote may not be enough to plan with
            requests.append(_Asked("parts" in request, [*planned_again(request)]))
    return requests


def _file(planned: PlannedJob) -> str:
    return f"{planned.job.kind}-{name_of(planned.job)}.parquet"


def _unmeasured(requests: Sequence[_Asked], found: Sequence[Found]) -> tuple[str, ...]:
    """Titles of planned jobs that no file is of, whole or damaged."""
    there = {one.name for one in found}
    jobs = [job_from(one.entry.job) for one in found if one.entry is not None]
    measured = [job for job in jobs if isinstance(job, Evaluation)]
    titles: dict[str, str] = {}
    for request in requests:
        if request.is_whole:
            left = [[one for one in missing([one for one in planned if _file(one) not in there], measured)
                     if one is not None and _file(one) not in there] for planned in request.either]
            titles |= {_file(one): one.title for one in min(left, key=len)}
    return tuple(titles.values())


def _commands(description: dict[str, Any] | None) -> tuple[str, ...]:
    commands = (description or {}).get("commands", ())
    return tuple(command for command in commands if isinstance(command, str)) if isinstance(commands, list) else ()
