"""What other processes take of the cores while something is timed here.

Seconds that were measured beside busy neighbours say little about the machine: plans are told with a caution, and what
would be kept for later runs is not kept (`headcount.engine.budget`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psutil

# So much of a core, taken from what a computation could use, is told.
_TOLD = 0.5


@dataclass
class Load:
    """How busy other processes kept the cores that this one may run on.

    Attributes:
        threads: Threads that the computation wanted a core for, each.
        cores: Cores that this process may run on.
        others: Cores' worth of time that other processes took, on the mean.
    """

    threads: int = 1
    cores: int = 1
    others: float = 0.0

    @property
    def crowded(self) -> bool:
        """Whether the computation had to share cores: others left it too few."""
        return self.others + min(self.threads, self.cores) > self.cores + _TOLD


@dataclass(frozen=True)
class Speed:
    """How fast a model ran when it was tried; NaN where there was nothing to try it on."""

    tokens_per_second: float = float("nan")
    load: Load = field(default_factory=Load)


@contextlib.contextmanager
def watch(threads: int = 1) -> Iterator[Load]:
    """What other processes do while a computation runs; what is yielded is filled in when the block ends.

    Args:
        threads: Of the computation.
    """
    process = psutil.Process()
    # Not on every system can a process be tied to some of the cores, or be asked which.
    mine = list(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else None
    load = Load(threads, len(mine) if mine else psutil.cpu_count() or 1)
    before = _seconds(process, mine)
    try:
        yield load
    finally:
        total, busy, own = (now - then for now, then in zip(_seconds(process, mine), before, strict=True))
        if total > 0:
            load.others = min(max(0.0, busy - own), total) / total * load.cores


def _seconds(process: psutil.Process, mine: Sequence[int] | None) -> tuple[float, float, float]:
    """Seconds of all these cores, those of them that they were busy, and those that this process took.

    All time is the sum of what the system counted, not a clock's: the system counts in ticks, and both sides of a ratio
    are then of the same ones.
    """
    counted = psutil.cpu_times(percpu=True)
    total = idle = 0.0
    for core in (counted[i] for i in mine or range(len(counted)) if i < len(counted)):
        # Linux counts guests' time among that of users too.
        total += sum(core) - getattr(core, "guest", 0.0) - getattr(core, "guest_nice", 0.0)
        idle += core.idle + getattr(core, "iowait", 0.0)
    own = process.cpu_times()
    return total, total - idle, float(own.user + own.system)
