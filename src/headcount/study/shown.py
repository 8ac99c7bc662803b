"""Which entries of a folder are part of what was asked: other numbers of documents, other steps lie there as well.

A folder keeps what was ever measured. Its tables are of one run's options, the last one's unless told: of as many
documents, with shots drawn alike, by orders from as many training documents, at these steps. What a folder of an
earlier version does not say is not asked of its entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headcount.study.jobs import (
    Evaluation,
    GradientImportance,
    InductionScores,
    Job,
    name_of,
)
from headcount.study.masksets import Grid, RandomCurve, Transfer
from headcount.study.spec import StudySpec, fields_that


def told_apart(asked: Sequence[Mapping[str, Any]], shown: int) -> list[str]:
    """What each thing that a folder was asked for has otherwise than the one that is shown, in words.

    Args:
        asked: As in study.json, oldest first; each with its options under "spec".
        shown: Position of the one that is shown.

    Returns:
        One line for each other one: its number, from 1, and its options where they differ.
    """
    now, means = asked[shown]["spec"], fields_that(StudySpec, "means")
    lines = []
    for number, one in enumerate(asked, 1):
        if number - 1 != shown:
            differ = [_in_words(name.replace("_", " "), value) for name, value in one["spec"].items()
                      if value != now.get(name) and name not in means]
            lines.append(f"{number}: {'; '.join(differ) or 'other numbers of documents'}")
    return lines


def _in_words(name: str, value: object) -> str:
    """An option and its value: `limit 75`, `no limit`, `shared shots`."""
    if value is None or value is False or value == []:
        return f"no {name}"
    if value is True:
        return name
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


class Shown:
    """Tells the entries of what was asked from others.

    Args:
        spec: The options, as saved.
        tasks: What is known of each task, as saved; unseen ones too.
        jobs: All of importance that the folder has: what is ordered by hidden importance is hidden too.
    """

    def __init__(
        self, spec: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]], jobs: Iterable[Job]
    ) -> None:
        self._spec = spec
        self._tasks = tasks
        self._hidden = {name_of(job) for job in jobs if not self._of_documents(job)}

    def __contains__(self, job: object) -> bool:
        """Whether an entry of this job is shown."""
        if not isinstance(job, Job):
            return False
        needed = {need.name for need in job.needs} if isinstance(job, Evaluation) else set[str]()
        return self._of_documents(job) and not needed & self._hidden

    def has_step(self, order: str, fraction: float, ffn_fraction: float) -> bool:
        """Whether a mask of the grid or of transfer lies at a step that was asked for; others go by their curves."""
        known = any("by_shots" in task for task in self._tasks.values())
        if not known or order not in ("grid", "transfer"):
            return True
        if order == "transfer":
            return fraction in self._spec["transfer_fractions"]
        steps = (0.0, *self._spec["grid_fractions"])
        return fraction in steps and ffn_fraction in steps

    def _of_documents(self, job: Job) -> bool:
        if isinstance(job, InductionScores):
            return True
        task = self._tasks.get(job.task, {})
        known = task.get("by_shots", {}).get(str(job.num_fewshot))
        if known is None:
            return True
        if job.task_fingerprint != task["fingerprint"]:
            return False
        if job.num_fewshot and bool(job.shared_shots) != known["shared_shots"]:
            return False
        examples, documents = known["examples"], known["documents"]
        if isinstance(job, Evaluation):
            if job.split == "examples":
                return examples is None or job.documents == examples
            fewer = isinstance(job.masks, RandomCurve | Grid | Transfer)
            return documents is None or job.documents == documents or (fewer and job.documents < documents)
        paper = self._spec["protocol"] == "paper" and not isinstance(job, GradientImportance)
        wanted = documents if paper else examples
        return wanted is None or job.documents == wanted


