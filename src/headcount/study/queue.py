"""The jobs of a study that are handed out to several workers: which is next, and what becomes of one that fails.

A job is ready when no entry that it reads is still to be measured. Of the ready ones a worker is given the first that
is of the same task and number of shots as its last, whose prompts it has encoded; else the first of a task and number
of shots that no other worker has; else the first. A job that was lost with its worker is ready again, at its place, so
many times in all; one that fails takes those along that read its entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headcount.study.jobs import Evaluation, GradientImportance, HeadOracle, InductionScores, OracleImportance, name_of
from headcount.study.plan import PlannedJob

# How often a job is tried that is lost, or fails by what is no fact about it.
TRIES = 3
# Of jobs that are ready together, which kind is done first.
_TURNS = (OracleImportance, HeadOracle, GradientImportance, Evaluation, InductionScores)


@dataclass(frozen=True)
class Failed:
    """A job that is given up.

    Attributes:
        title: Of the job.
        reason: Why, in words.
    """

    title: str
    reason: str


def rounds(todo: Sequence[PlannedJob]) -> Iterator[list[PlannedJob]]:
    """Jobs that are ready together, all of one kind, which share readings of weights that lie in files.

    First comes what is put together from entries, then gradients, then evaluations under whatever masks: so that as
    many as possible are ready when weights are read.

    Args:
        todo: Jobs in an order in which they can be done.
    """
    queue = Queue(todo)
    while queue:
        together = queue.take_together()
        yield together
        for planned in together:
            queue.done(planned)


class Queue:
    """What is left to do of a plan.

    Args:
        todo: Jobs in an order in which they can be done; what they read beside one another is measured.

    Attributes:
        failed: The jobs that were given up, in that order.
    """

    def __init__(self, todo: Sequence[PlannedJob]) -> None:
        self._left = {name_of(planned.job): planned for planned in todo}
        self._names = {id(planned): name for name, planned in self._left.items()}
        self._out: set[str] = set()
        self._tries: Counter[str] = Counter()
        self.failed: list[Failed] = []

    def __bool__(self) -> bool:
        """Whether anything is left, handed out or not."""
        return bool(self._left)

    def take(self, last: PlannedJob | None = None) -> PlannedJob | None:
        """The next job for a worker, which counts as handed out; None where none is ready.

        Args:
            last: What the worker did before.
        """
        subject = None if last is None else last.job.subject
        others = {self._left[name].job.subject for name in self._out}
        first, free = None, None
        for name, planned in self._ready():
            if planned.job.subject == subject:
                first = free = name
                break
            first = first or name
            if free is None and planned.job.subject not in others:
                free = name
        chosen = free or first
        if chosen is None:
            return None
        self._out.add(chosen)
        self._tries[chosen] += 1
        return self._left[chosen]

    def take_together(self) -> list[PlannedJob]:
        """The next of `rounds`: jobs that are ready, all of one kind; they count as handed out."""
        ready = [self._left[name] for name, _ in self._ready()]
        kind = min((type(one.job) for one in ready), key=_TURNS.index)
        together = [one for one in ready if type(one.job) is kind]
        self._out.update(self._names[id(one)] for one in together)
        return together

    def done(self, planned: PlannedJob) -> None:
        """A job's entry is there."""
        name = self._names[id(planned)]
        self._out.discard(name)
        self._left.pop(name, None)

    def lost(self, planned: PlannedJob, reason: str) -> bool:
        """A job was lost with its worker; gives whether it is tried again."""
        name = self._names[id(planned)]
        if self._tries[name] < TRIES:
            self._out.discard(name)
            return True
        self.give_up(planned, f"{reason}; it was tried {TRIES} times")
        return False

    def give_up(self, planned: PlannedJob, reason: str) -> None:
        """A job fails, and with it all that read its entry."""
        self.done(planned)
        self.failed.append(Failed(planned.title, reason))
        name = self._names[id(planned)]
        for other in [one for one in self._left.values() if any(need.name == name for need in one.job.needs)]:
            if self._names[id(other)] in self._left:
                self.give_up(other, f"it reads what failed: {planned.title}")

    def _ready(self) -> Iterator[tuple[str, PlannedJob]]:
        for name, planned in self._left.items():
            if name not in self._out and not any(need.name in self._left for need in planned.job.needs):
                yield name, planned
