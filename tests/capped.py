"""A child process whose memory is capped by what the system offers: a cgroup where one can be made, else RLIMIT_DATA.

Both refuse or kill a process that wants more. A cgroup counts what is in memory, and drops pages of files before it
kills. RLIMIT_DATA counts what a process may write to, whether it lies in memory or not: so what was reserved by imports
and is not in memory is added to the cap, and no more can be had later.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_LIMITED = """
import re, resource
import headcount.study.runner, headcount.study.prepare, transformers.models.granitemoe.modeling_granitemoe
of = lambda file, name: int(re.search(rf"{{name}}:\\s+(\\d+)", open(file).read())[1]) * 1024
most = {cap} + of("/proc/self/status", "VmData") - of("/proc/self/smaps_rollup", "Anonymous")
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
"""


def run(code: str, *arguments: str, cap: int, cgroup: Path | None) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, under a cap.

    Args:
        code: What is run, with arguments in `sys.argv`.
        arguments: Its arguments.
        cap: How many bytes it may have.
        cgroup: From `cgroup`; None limits RLIMIT_DATA.
    """

    def enter() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    if cgroup is not None:
        _limit(cgroup).write_text(str(cap))
    else:
        code = _LIMITED.format(cap=cap) + code
    # One thread, asleep while it waits, and no arena of memory for each thread of the C library's.
    environment: Mapping[str, str] = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
                          preexec_fn=enter, env=environment)


@contextlib.contextmanager
def cgroup() -> Iterator[Path | None]:
    """A cgroup of this test's, where one can be made that limits memory."""
    for root in (_CGROUPS / "memory", _CGROUPS):
        made = root / f"headcount-{uuid.uuid4().hex[:8]}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            if _limit(made).exists():
                yield made
                return
        finally:
            made.rmdir()
    yield None


def peak(cgroup: Path) -> int:
    """The most bytes that processes of a cgroup had at once, pages of files among them."""
    names = ("memory.peak", "memory.max_usage_in_bytes")
    return int(next(file for name in names if (file := cgroup / name).exists()).read_text())


def _limit(cgroup: Path) -> Path:
    new = cgroup / "memory.max"
    return new if new.exists() else cgroup / "memory.limit_in_bytes"
