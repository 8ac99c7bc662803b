"""Layer-tokens of masks whose orders a plan does not know: the middle of its bounds, beside those of real orders.

`python benchmarks/middles.py [MODEL ...]` measures importance of heads (gradient) and FFNs (oracle) on 16 tasks, 0- and
1-shot, few documents, and makes of it every mask of the curves, grids and transfers of a study. How many layers a sweep
of these masks computes is counted, not run (`headcount.masks.layers_run`, which tests/test_plan.py compares with runs).
Half of the tasks come along, half are the paper's; the noise of the plan's drawn orders was chosen on three of the
former, of SmolLM2. What was measured is kept in --folder, if that is named.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from headcount.engine.waiting import wait_asleep

wait_asleep()

import torch

from bench import keep
from headcount.masks import layers_run
from headcount.study.forecast import forecast
from headcount.study.jobs import Evaluation
from headcount.study.prepare import Plan, prepare
from headcount.study.runner import run
from headcount.study.sharing import layers_of
from headcount.study.spec import StudySpec
from performance_page import write

_ROOT = Path(__file__).resolve().parents[1]
_TASKS = ("icl_adverb", "icl_antonym", "icl_capital", "icl_comparative", "icl_first_letter", "icl_past_tense",
          "icl_plural", "icl_gerund", "copa", "openbookqa", "arc_easy", "rte", "piqa", "winogrande", "wic", "cb")


def middles(model: str, folder: Path, data: Path) -> list[dict[str, Any]]:
    """Layer-tokens by kind of masks: at least, middle and at most of the plan, and by the orders that were found."""
    spec = StudySpec(model, tasks=_TASKS, shots=(0, 1), limit=8, importance_limit=12, data=data, random_orders=0,
                     measure=("curves", "grid", "transfer"), transfer_components=("head", "ffn"), out=folder)
    importance = prepare(spec, parts=("heads", "ffns"))
    if importance.todo():
        run(importance)
    plan = prepare(spec, loaded=importance.loaded)
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0] * 5)
    for planned, cost in zip(plan.jobs, forecast(spec).costs, strict=True):
        if isinstance(planned.job, Evaluation) and cost is not None and not cost.layer_tokens.exact:
            masks, bounds = planned.job.masks, cost.layer_tokens
            tokens = bounds.high / layers_of(masks, plan.loaded.anatomy.heads_per_layer).high
            run_there = tokens * _layers(plan, planned.job)
            if not bounds.low <= run_there <= bounds.high:
                raise ValueError(f"{planned.title}: {run_there:,.0f} layer-tokens lie outside {bounds}")
            component = getattr(masks, "component", None)
            kind = f"{masks.order}, {component}s" if component else masks.order
            found[kind] = [a + b for a, b in zip(found[kind], (1, *bounds, run_there), strict=True)]
    name = Path(model).stem
    return [{"model": name, "kind": kind, "jobs": int(jobs), "bounds": bounds, "run": ran}
            for kind, (jobs, *bounds, ran) in sorted(found.items())]


def _layers(plan: Plan, job: Evaluation) -> int:
    """How many layers a sweep of a job's masks computes, by the importance that was measured."""
    tables = [plan.folder.read_need(need).table for need in job.needs]
    return layers_run([mask for mask, _ in job.masks.masks(plan.loaded.anatomy.heads_per_layer, tables)])


def main() -> None:
    """Measure importance, count, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2"])
    parser.add_argument("--folder", type=Path, help="where importance is kept, a folder for each model")
    parser.add_argument("--data", type=Path, default=_ROOT.parent / "shared" / "benchmarks")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"middles: there is no folder {options.data}; name the documents' with --data")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="headcount-") as place:
        for model in options.models:
            rows += middles(model, (options.folder or Path(place)) / Path(model).stem, options.data)
    keep(_ROOT / "benchmarks" / "results" / "middles.json", rows)
    write(_ROOT / "benchmarks" / "results", _ROOT / "docs" / "performance.md")


if __name__ == "__main__":
    main()
