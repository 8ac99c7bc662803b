"""A worker's process: it takes part in a study with tasks and a model that it loads itself.

Who computes a job must not change its numbers. So a member says what it computes with (`facts_of`), which the driver
compares with its own before it hands out anything; rows and batches are the driver's; and it computes with so many
threads as it was told. Entries are written here where the folder is the driver's own, which a token in it proves, and
read here; else they come with the job, and the result goes back. This file knows nothing of what starts the process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from headcount.engine.engine import Engine
from headcount.study.jobs import Need
from headcount.study.ledger import Entry, Ledger
from headcount.study.plan import PlannedJob
from headcount.study.prepare import Outline, Plan
from headcount.study.spec import Part
from headcount.study.worker import Read, Result, Worker

# Parts of a study whose jobs sweep no masks.
_NO_SWEEPS: frozenset[Part] = frozenset({"evaluate", "heads", "induction"})
# A file system of several machines may show a file a while after another one wrote it, in seconds.
_PATIENCE = 30.0


class Delivered(NamedTuple):
    """What became of a job.

    Attributes:
        result: What is to be written; None where its entry is written.
        masks: How several masks are run, and why; None while that is not known.
    """

    result: Result | None
    masks: str | None


def facts_of(plan: Plan) -> dict[str, str]:
    """What numbers depend on beside versions, by name: weights, type, kernel, device, layout and documents."""
    loaded, layout = plan.loaded, Engine.of(plan.loaded).layout
    documents = {f"definition or documents of {name}": task.fingerprint for name, task in plan.tasks.items()}
    return {"the digest of the weights, config and tokenizer": loaded.identity,
            "the type of the weights": str(loaded.provenance["dtype"]),
            "the attention kernel": str(loaded.provenance["attn_implementation"]),
            "the kind of device": loaded.device.type,
            "the layout of prompts": f"{layout.trees} {layout.tree_mask} {layout.tree_tokens}", **documents}


class Member:
    """One worker of several.

    Args:
        outline: What is measured, and how.
        threads: How many threads it computes with.
        token: Of the folder, as the driver sees it.
        together: How many workers may share this machine's memory.
    """

    def __init__(self, outline: Outline, threads: int, token: tuple[str, str], together: int = 1) -> None:
        torch.set_num_threads(threads)
        self._plan = outline.plan(together)
        if not {*outline.parts} <= _NO_SWEEPS:
            Engine.of(self._plan.loaded).prove_sweep()  # else within the first job of each worker
        self._worker = Worker(self._plan, lambda tokens: None)
        ledger = self._plan.ledger
        self._ledger = ledger if ledger is not None and ledger.shares(token) else None

    @property
    def facts(self) -> dict[str, str]:
        """What its numbers depend on."""
        return facts_of(self._plan)

    @property
    def shares_folder(self) -> bool:
        """Whether it reads and writes the study folder itself."""
        return self._ledger is not None

    def do(self, jobs: Sequence[PlannedJob], entries: Mapping[Need, Entry]) -> Iterator[Delivered]:
        """Do jobs of one kind; what becomes of each, in the order given, as soon as it is known.

        Args:
            jobs: The jobs.
            entries: What they read, where the folder is not shared.

        Raises:
            HeadcountError: If a job cannot be done, whoever does it.
        """
        ledger = self._ledger
        read: Read = entries.__getitem__ if ledger is None else lambda need: _read(ledger, need)
        for planned, result in zip(jobs, self._worker.entries(jobs, read), strict=True):
            yield Delivered(None if _written(ledger, planned, result) else result,
                            Engine.of(self._plan.loaded).masks_reason)


def _written(ledger: Ledger | None, planned: PlannedJob, result: Result) -> bool:
    """Whether an entry could be written here; else the driver writes it, or says why it cannot."""
    if ledger is None:
        return False
    try:
        ledger.write(planned.key, result.table, result.info)
    except OSError:
        return False
    return True


def _read(ledger: Ledger, need: Need) -> Entry:
    """An entry that another process wrote, perhaps just now and elsewhere."""
    path, until = ledger.entries_folder / f"{need.kind}-{need.name}.parquet", time.monotonic() + _PATIENCE
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.2)
    return ledger.read_need(need)
