"""What measuring costs, beside what people use today and the obvious way of doing it, in one run.

`python benchmarks/bench.py SECTION ...` measures sections and keeps them in benchmarks/results; the page
docs/performance.md is written from what is kept. Sections:

counts      tokens through the model / nodes of the prompts' tries, on every task of the paper
scoring     wall time of lm-eval's HF backend / headcount, on every task of the paper; kept task by task
importance  all heads and FFNs by gradient / one forward pass / autograd with parameter gradients / TransformerLens
induction   prefix matching, copying / one eager forward pass of the same texts
oracles     single FFNs off, and single heads off, by layer sweep / one evaluation
scaling     seconds and peak memory against masks, documents, layers, length of prompts
demo        wall time of the demo, by kind of job, beside the speed of matrix products
waiting     short scoring passes by how torch's threads wait, without and with busy processes beside
workers     a study of eight tasks by one worker of a Ray cluster with one thread, and by two (workers.py)
streaming   a pass whose weights are read from a disk / reading alone, computing alone
plan        seconds of small studies / what the plan said of them
removal     prefill, decoding, memory and accuracy of full, masked and removed models, from 0 to 80 % of heads and FFNs

Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from headcount.engine.waiting import wait_asleep

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of torch's profiler, which says where it begins and ends.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
wait_asleep()

import torch

import against_lm_eval
import against_the_obvious
from headcount.model.load import LoadedModel, load
from headcount.tasks.catalog import PAPER14
from performance_page import write
from planned import planned
from removal import draw, removal
from streaming import streaming
from waiting import waiting

_ROOT = Path(__file__).resolve().parents[1]
_WHOLE = {"counts": against_lm_eval.counts, "importance": against_the_obvious.importance,
          "induction": against_the_obvious.induction, "oracles": against_the_obvious.oracles,
          "scaling": against_the_obvious.scaling, "demo": against_the_obvious.demo, "waiting": waiting,
          "removal": removal, "streaming": streaming, "plan": planned, "workers": lambda *_: [_workers()]}
SECTIONS = (*_WHOLE, "scoring")


def main() -> None:
    """Measure the sections that are named and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=list(SECTIONS))
    parser.add_argument("--tasks", nargs="+", default=list(PAPER14), help="of the section scoring")
    parser.add_argument("--settings", nargs="+", default=list(against_lm_eval.SETTINGS), help="of the section scoring")
    parser.add_argument("--data", type=Path, default=_ROOT.parent / "shared" / "benchmarks")
    parser.add_argument("--kept", type=Path, default=_ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=_ROOT / "docs" / "performance.md")
    options = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    if not options.data.is_dir():
        sys.exit(f"bench: there is no folder {options.data}; name the documents' with --data")
    (options.kept / "scoring").mkdir(parents=True, exist_ok=True)
    loaded = load("smollm2", device="cpu")
    for name in options.sections:
        if name == "scoring":
            _scoring(loaded, options)
        else:
            keep(options.kept / f"{name}.json", _WHOLE[name](loaded, options.data))
    write(options.kept, options.page)
    if "removal" in options.sections:
        rows = json.loads((options.kept / "removal.json").read_text(encoding="utf-8"))["rows"]
        draw(rows, options.page.parent / "images" / "removal-time.png")


def _workers() -> Any:
    """In a process of its own, since its threads are set before torch is loaded."""
    script = _ROOT / "benchmarks" / "workers.py"
    return json.loads(subprocess.run([sys.executable, script], stdout=subprocess.PIPE, check=True).stdout)


def _scoring(loaded: LoadedModel, options: argparse.Namespace) -> None:
    """Task by task, since it takes long; what is kept already is not measured again."""
    for setting, name in itertools.product(options.settings, options.tasks):
        file = options.kept / "scoring" / f"{setting.replace(', ', '-')}-{name}.json"
        if not file.exists():
            keep(file, against_lm_eval.scoring(loaded, options.data, name, setting))
        sys.stderr.write(file.read_text(encoding="utf-8") + "\n")


def keep(file: Path, rows: Any) -> None:
    """Rows, and when and where they were measured."""
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers", "lm_eval"))
    when = f"{datetime.date.today().isoformat()}, {platform.machine()}, {torch.get_num_threads()} threads, {versions}"
    file.write_text(json.dumps({"when": when, "rows": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
