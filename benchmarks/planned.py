"""What `headcount plan` says of studies of SmolLM2 on this machine, beside what they took when they were run.

Loading, and proofs of the model, are apart, as in the plan: the clock starts behind them. The seconds that the plan
adds for each job were chosen on earlier runs of the first three of these studies; the last two are others. One of those
reads the model block by block, from files that the system has in its cache.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from headcount.engine import neighbours
from headcount.engine.engine import Engine
from headcount.model.load import LoadedModel
from headcount.study.forecast import forecast
from headcount.study.ledger import Ledger
from headcount.study.prepare import prepare
from headcount.study.runner import run
from headcount.study.spec import StudySpec

_EIGHT = ("icl_adverb", "icl_antonym", "icl_capital", "icl_comparative", "icl_first_letter", "icl_past_tense",
          "icl_plural", "icl_gerund")
# What each is called on the page, and its options.
STUDIES: dict[str, dict[str, Any]] = {
    "eight tasks of eight documents": {"tasks": _EIGHT, "limit": 8, "importance_limit": 8, "shots": (0,)},
    "three tasks of sixteen documents": {"tasks": _EIGHT[:3], "limit": 16, "importance_limit": 16, "shots": (0,)},
    "a task of sixty documents": {"tasks": _EIGHT[6:7], "limit": 60, "importance_limit": 60, "shots": (0,)},
    "two tasks of 24 documents, 0 and 2 shots": {"tasks": _EIGHT[5:7], "limit": 24, "importance_limit": 24,
                                                 "shots": (0, 2)},
    "the same, streamed": {"tasks": _EIGHT[5:7], "limit": 24, "importance_limit": 24, "shots": (0, 2), "stream": True},
}


def planned(loaded: LoadedModel, data: Path) -> list[dict[str, Any]]:
    """Seconds of every study, planned and taken; what is handed in is not looked at."""
    return [_one(name, options) for name, options in STUDIES.items()]


def _one(name: str, options: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="headcount-") as place:
        spec = StudySpec("smollm2", out=Path(place) / "study", random_orders=1, **options)
        plan = prepare(spec)
        engine = Engine.of(plan.loaded)
        engine.prove(gradients=True)
        engine.prove_sweep()
        known = forecast(spec, on=("cpu",))
        started, cpu = time.perf_counter(), time.process_time()
        with neighbours.watch(torch.get_num_threads()) as load:
            run(plan)
        seconds, spent = time.perf_counter() - started, time.process_time() - cpu
        entries = len([*Ledger(Path(place) / "study").descriptions()])
    return {"study": name, "jobs": len(known.jobs), "entries": entries, "threads": torch.get_num_threads(),
            "planned": known.devices[0].hours * 3600, "seconds": seconds, "cpu": spent, "others": load.others}
