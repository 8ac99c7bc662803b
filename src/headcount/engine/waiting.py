"""How torch's threads wait for one another: asleep, not spinning, where the cores are shared.

torch's OpenMP threads meet at a barrier after every matrix product, and one that comes early spins there, for up to
20 ms by default, before it sleeps. Where other processes keep the cores busy, the thread that is waited for is one that
has no core, and the spinning one holds the core that it needs: short passes then take many times as long. Threads that
sleep at once leave it; waking them costs a few microseconds a barrier (figures: benchmarks/waiting.py,
docs/performance.md).

OpenMP reads its environment when it is loaded, which torch does: so this is for programs, before they import torch.
A library that is imported into another's process leaves it alone. The standard library alone is imported here.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# OpenMP's own name, and those by which GNU's and LLVM's (Intel's) runtimes say the same more finely.
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
CHOSEN = {"OMP_WAIT_POLICY": "passive"}


def wait_asleep(environment: MutableMapping[str, str] | None = None) -> None:
    """Let threads that wait sleep at once, unless the user has said how they wait, by any of these names.

    Args:
        environment: What is changed; by default the process's own, which OpenMP reads.
    """
    chosen = os.environ if environment is None else environment
    if not any(chosen.get(name) for name in NAMES):
        chosen.update(CHOSEN)
