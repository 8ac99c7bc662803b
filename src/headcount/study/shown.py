"""Which entries of a folder answer what was asked: other documents, orders and steps lie there as well.

A folder keeps what was ever measured. Its tables are of one request, the last one unless told. What that asks for is
planned again from what was saved (`headcount.study.plan`), and shown is what answers one of the planned jobs, however
it was cut into entries. Orders that several tasks have a part in may be of fewer tasks, as long as these are shown: a
folder that tasks were added to has some, and `headcount.analysis.frames` chooses.

Of tasks that an earlier version measured, how many documents were asked for is not known: all of them are shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from headcount.errors import OptionError, StudyError
from headcount.study.described import parts_asked
from headcount.study.jobs import Evaluation, GradientImportance, InductionScores, Job, name_of
from headcount.study.masksets import (
    ByOneTask,
    BySeveral,
    Grid,
    MaskSet,
    Step,
    steps_of,
    with_steps,
)
from headcount.study.plan import PlannedJob, TaskFacts, plan
from headcount.study.spec import CURVES, StudySpec, fields_that, readers, with_later

_SAID = {"evaluate": "accuracy", "heads": "importance of heads", "ffns": "importance of FFNs", "curve": "curves",
         "head_oracle": "the oracle of heads"}


def told_apart(asked: Sequence[Mapping[str, Any]], shown: int) -> list[str]:
    """What each thing that a folder was asked for has otherwise than the one that is shown, in words.

    Args:
        asked: As in study.json, oldest first; each with its options under "spec".
        shown: Position of the one that is shown.

    Returns:
        One line for each other one: its number, from 1, and its options where they differ.
    """
    now, read, lists = asked[shown], readers(), ("tasks", "shots", "unseen")
    known = with_later(now["spec"])
    lines = []
    for number, one in enumerate(asked, 1):
        if number - 1 != shown:
            parts = parts_asked(one)
            differ = [f"measured: {_measured(one)}"] if _measured(one) != _measured(now) else []
            differ += [_in_words(name, value) for name, value in with_later(one["spec"]).items()
                       if value != known.get(name) and (name in lists or {*read.get(name, ())} & {*parts})]
            lines.append(f"{number}: {'; '.join(differ) or 'other numbers of documents'}")
    return lines


def _measured(request: Mapping[str, Any]) -> str:
    """What of a study was asked for, in words; curves bring accuracy and importance."""
    parts = parts_asked(request)
    brought = CURVES[:-1] if "curve" in parts else ()
    return ", ".join(_SAID.get(part, part) for part in parts if part not in brought)


def _in_words(name: str, value: object) -> str:
    """An option and its value: `limit 75`, `no limit`, `shared shots`, `induction seeds by default`."""
    said = name.replace("_", " ")
    if value is None and not name.endswith(("limit", "sample")):
        return f"{said} by default"
    if value is None or value is False or value == []:
        return f"no {said}"
    if value is True:
        return said
    return f"{said} {' '.join(map(str, value)) if isinstance(value, list) else value}"


class Shown:
    """Tells what answers a request from what does not.

    Args:
        description: study.json, with the request that is shown.
        jobs: All of importance that the folder has: what is ordered by hidden importance is hidden too.

    Raises:
        StudyError: If the saved options are none.
    """

    def __init__(self, description: Mapping[str, Any], jobs: Iterable[Job]) -> None:
        self._tasks = {**description["tasks"], **description.get("unseen", {})}
        self._says_parts = "parts" in description
        self._parts = parts_asked(description)
        self._shots = description["spec"]["shots"]
        self._control = not description["spec"].get("skip_control")
        self._planned: dict[Job, set[Step]] = {}
        if any("by_shots" in known for known in self._tasks.values()):
            self._planned = _planned(description, self._parts)
        self._hidden = {name_of(job) for job in jobs if not self._answers(job)}

    def __contains__(self, job: object) -> bool:
        """Whether an entry of this job is shown."""
        if not isinstance(job, Job):
            return False
        needed = {need.name for need in job.needs} if isinstance(job, Evaluation) else set[str]()
        return self._answers(job) and not needed & self._hidden

    def steps(self, job: Evaluation) -> list[bool]:
        """Which of a shown job's masks are shown, in their order."""
        wanted = self._planned.get(_question(job))
        return [wanted is None or step in wanted for step in steps_of(job.masks) or ("",)]

    def _answers(self, job: Job) -> bool:
        if isinstance(job, InductionScores):
            return not self._says_parts or ("induction" in self._parts and (job.weights == "trained" or self._control))
        if self._says_parts and (job.task not in self._tasks or job.num_fewshot not in self._shots):
            return False
        known = self._tasks.get(job.task, {}).get("by_shots", {}).get(str(job.num_fewshot))
        return known is None or _question(job) in self._planned


def _planned(description: Mapping[str, Any], parts: Sequence[Any]) -> dict[Job, set[Step]]:
    """What was asked for, each question with its steps."""
    planned: dict[Job, set[Step]] = {}
    # In one piece, however it was cut into jobs.
    for job in (one.job for one in _jobs(description, parts, "", masks_per_job=10**9)):
        steps = steps_of(job.masks) if isinstance(job, Evaluation) else ()
        planned.setdefault(_question(job), set()).update(steps or ("",))
    return planned


def planned_again(description: Mapping[str, Any]) -> Iterator[list[PlannedJob]]:
    """The jobs of a request, as if nothing of it had been measured before: two lists, of which one is right.

    Whether gradients were taken through norms is the model's matter, which is not at hand: once without, once with.

    Args:
        description: study.json, with one of its requests.

    Raises:
        StudyError: If the saved options are none.
    """
    cut, model = description["spec"].get("masks_per_job", StudySpec.masks_per_job), description["model"]["fingerprint"]
    # An earlier version said one number of documents for all numbers of shots.
    shots = description["spec"]["shots"]
    known = {kind: {name: {"by_shots": {str(k): task for k in shots}, **task}
                    for name, task in description.get(kind, {}).items()} for kind in ("tasks", "unseen")}
    for norms in (False, True):
        yield _jobs({**description, **known}, parts_asked(description), model, masks_per_job=cut, through_norms=norms)


def _jobs(
    description: Mapping[str, Any], parts: Sequence[Any], model: str, *, masks_per_job: int,
    through_norms: bool = False,
) -> list[PlannedJob]:
    """What was asked for, planned again from what was saved."""
    names = {f.name for f in dataclasses.fields(StudySpec)} - {*fields_that(StudySpec, "means")}
    options: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                               for name, value in description["spec"].items() if name in names}
    try:
        spec = StudySpec("", **options, masks_per_job=masks_per_job)
    except (OptionError, TypeError) as error:
        raise StudyError(f"study.json holds options that are none: {error}") from error
    facts = [_facts(name, known, spec.shots, unseen=unseen) for unseen, kind in ((False, "tasks"), (True, "unseen"))
             for name, known in description.get(kind, {}).items()]
    anatomy = description["anatomy"]
    return plan(spec, model, anatomy["heads_per_layer"], facts, parts, through_norms=through_norms,
                groups_per_layer=anatomy.get("kv_groups_per_layer", ()))


def _facts(name: str, known: Mapping[str, Any], shots: Sequence[int], *, unseen: bool) -> TaskFacts:
    """What was known of a task; no job has the number -1 of documents."""
    by_shots = {k: known.get("by_shots", {}).get(str(k), {}) for k in shots}
    documents, examples = ({k: -1 if (number := of_k.get(what)) is None else number for k, of_k in by_shots.items()}
                           for what in ("documents", "examples"))
    return TaskFacts(name, known["fingerprint"], documents, examples, unseen=unseen)


def _question(job: Job) -> Job:
    """A job without what differs between entries that answer the same: steps, names of entries, model and versions."""
    if isinstance(job, Evaluation):
        return dataclasses.replace(job, model="", paper_version=None, curve=_without_names(with_steps(job.masks, ())))
    if isinstance(job, InductionScores):
        return job
    changed = dataclasses.replace(job, model="", paper_version=None)
    return (dataclasses.replace(changed, through_norms=None) if isinstance(changed, GradientImportance) else
            dataclasses.replace(changed, evaluations=()))


def _without_names(masks: MaskSet) -> MaskSet:
    """Masks without the names of the entries that their orders are read from."""
    if isinstance(masks, ByOneTask):
        return dataclasses.replace(masks, importance="")
    if isinstance(masks, BySeveral):
        return dataclasses.replace(masks, importance=())
    if isinstance(masks, Grid):
        return dataclasses.replace(masks, heads=dataclasses.replace(masks.heads, importance=()),
                                   ffns=dataclasses.replace(masks.ffns, importance=()))
    return masks
