"""The jobs of a study that are handed out to several workers: which are next, and what becomes of one that fails.

A job is ready when no entry that it reads is still to be measured. What is handed out at once is a *pass*.

Where the model is in memory a pass is one job: the first that is of the same task and number of shots as the worker's
last, whose prompts it has encoded; else the first of a task and number of shots that no other worker has; else the
first. Where weights are read from files a pass is several jobs of one kind, which share the readings: of the tokens
that are ready, one worker's share, as guided self-scheduling divides a loop (Polychronopoulos and Kuck 1987). So passes
are large at first, and small at the end, where workers must end together.

A pass that was lost or failed is handed out again in halves, before all else, until the job that did it is alone. A job
that is lost alone is tried so many times; one that fails takes those along that read its entry, and nothing else.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headcount.study.jobs import Evaluation, GradientImportance, HeadOracle, InductionScores, OracleImportance, name_of
from headcount.study.plan import PlannedJob

# How often a job is tried alone that is lost, or fails by what is no fact about it.
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
        self._again: deque[list[PlannedJob]] = deque()
        self._tries: Counter[str] = Counter()
        self.failed: list[Failed] = []

    def __bool__(self) -> bool:
        """Whether anything is left, handed out or not."""
        return bool(self._left)

    def take(self, last: PlannedJob | None = None) -> list[PlannedJob]:
        """The next pass of one job for a worker, which counts as handed out; empty where none is ready.

        Args:
            last: What the worker did before.
        """
        if self._again:
            return self._handed_out(self._again.popleft())
        subject = None if last is None else last.job.subject
        others = {self._left[name].job.subject for name in self._out}
        first, free = None, None
        for planned in self._ready():
            if planned.job.subject == subject:
                first = free = planned
                break
            first = first or planned
            if free is None and planned.job.subject not in others:
                free = planned
        chosen = free or first
        return [] if chosen is None else self._handed_out([chosen])

    def take_together(self, share: float = 1.0) -> list[PlannedJob]:
        """The next pass of several jobs, all of one kind, which count as handed out; empty where none is ready.

        Args:
            share: How much of what is ready, by tokens; at least one job is taken.
        """
        if self._again:
            return self._handed_out(self._again.popleft())
        ready = list(self._ready())
        kind = min((type(one.job) for one in ready), key=_TURNS.index, default=None)
        together = [one for one in ready if type(one.job) is kind]
        wanted, tokens, taken = share * sum(one.tokens for one in together), 0.0, 0
        while taken < len(together) and (taken == 0 or tokens + together[taken].tokens / 2 <= wanted):
            tokens += together[taken].tokens
            taken += 1
        return self._handed_out(together[:taken])

    def _handed_out(self, jobs: list[PlannedJob]) -> list[PlannedJob]:
        names = [self._names[id(one)] for one in jobs]
        self._out.update(names)
        if len(names) == 1:
            self._tries.update(names)
        return jobs

    def holds(self, planned: PlannedJob) -> bool:
        """Whether a job's entry is still to come."""
        return self._names[id(planned)] in self._left

    def done(self, planned: PlannedJob) -> None:
        """A job's entry is there."""
        name = self._names[id(planned)]
        self._out.discard(name)
        self._left.pop(name, None)

    def lost(self, jobs: Sequence[PlannedJob], reason: str) -> bool:
        """What was left of a pass was lost with its worker; gives whether it is tried again."""
        if len(jobs) > 1:
            self.halve(jobs)
            return True
        (planned,) = jobs
        if self._tries[self._names[id(planned)]] < TRIES:
            self._again.appendleft([planned])
            return True
        self.give_up(planned, f"{reason}; it was tried {TRIES} times")
        return False

    def halve(self, jobs: Sequence[PlannedJob]) -> None:
        """What was left of a pass is handed out next, as two."""
        half = (len(jobs) + 1) // 2
        self._again.extendleft([list(jobs[half:]), list(jobs[:half])])

    def give_up(self, planned: PlannedJob, reason: str) -> None:
        """A job fails, and with it all that read its entry."""
        self.done(planned)
        self.failed.append(Failed(planned.title, reason))
        name = self._names[id(planned)]
        for other in [one for one in self._left.values() if any(need.name == name for need in one.job.needs)]:
            if self._names[id(other)] in self._left:
                self.give_up(other, f"it reads what failed: {planned.title}")

    def _ready(self) -> Iterator[PlannedJob]:
        for name, planned in self._left.items():
            if name not in self._out and not any(need.name in self._left for need in planned.job.needs):
                yield planned
