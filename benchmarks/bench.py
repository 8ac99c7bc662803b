"""What measuring costs, beside the obvious way of doing it, in one run: counts of tokens and ratios of times.

`python benchmarks/bench.py SECTION ...` measures sections and keeps them in build/bench; the page docs/performance.md
is written from what is kept. Sections:

counts      tokens through the model / nodes of the prompts' tries, on every task of the paper
importance  all heads and FFNs by gradient / one forward pass / autograd with parameter gradients
oracles     single FFNs off, and single heads off, by layer sweep / one evaluation
memory      peak memory of 100 masks / of one

Times are medians of repetitions that alternate between the two sides, with nothing else running.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from headcount.masks import Mask, prune, random_order
from headcount.measure.encoding import encode
from headcount.measure.forward import target_logprobs
from headcount.measure.importance import example_scores
from headcount.measure.names import PAPER14
from headcount.measure.packing import Batch, batches, pack
from headcount.measure.scoring import BATCH_TOKENS, prepare, score
from headcount.measure.tasks import get_tasks
from headcount.model.load import LoadedModel, load

_ROOT = Path(__file__).resolve().parents[1]
_SETTINGS = {"0-shot": (0, False), "5-shot": (5, False), "5-shot, shared": (5, True)}
Row = dict[str, Any]


def counts(loaded: LoadedModel, data: Path, limit: int = 100) -> list[Row]:
    """Per task: tokens of all requests as single rows, trie nodes, and tokens that the model computes."""
    rows = []
    for name in PAPER14:
        task = get_tasks([name], data=data)[name]
        for setting, (k, shared) in _SETTINGS.items():
            prepared = prepare(loaded, task, num_fewshot=k, shared_shots=shared, limit=limit)
            pairs = [pair for p in prepared.prompts for pair in p.pairs]
            requests = encode(loaded.tokenizer, pairs, loaded.max_length)
            rows.append({"task": name, "setting": setting, "documents": len(prepared.prompts),
                         "requests": len(requests), "single": sum(len(r.ids) for r in requests),
                         "nodes": sum(int(b.lengths.sum()) for b in prepared.batches), "tokens": prepared.tokens})
    return rows


def importance(loaded: LoadedModel, data: Path, limit: int = 12, repetitions: int = 3) -> list[Row]:
    """One forward pass, all importances, and autograd with parameter gradients, over the same examples."""
    task = get_tasks(["piqa"], data=data)["piqa"]
    rows = []
    for k in (0, 5):
        prompts = task.prompts("examples", num_fewshot=k, limit=limit)
        requests = encode(loaded.tokenizer, [p.pairs[p.gold] for p in prompts], loaded.max_length)
        packed = batches(pack([[r] for r in requests], row_tokens=1, trees=False), BATCH_TOKENS)
        sides = {"forward": functools.partial(_forward, loaded, packed),
                 "gradient": functools.partial(example_scores, loaded, requests),
                 "parameters": functools.partial(_with_parameters, loaded, packed)}
        rows.append({"task": "piqa", "num_fewshot": k, "examples": len(requests),
                     **_alternating(sides, repetitions)})
    return rows


@torch.no_grad()
def _forward(loaded: LoadedModel, packed: list[Batch]) -> None:
    for batch in packed:
        target_logprobs(loaded, batch)


def _with_parameters(loaded: LoadedModel, packed: list[Batch]) -> None:
    """What plain autograd does: gradients of every parameter on the way to the heads' (the paper's code)."""
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(True)
    for batch in packed:
        ids = torch.from_numpy(batch.ids)
        logits = loaded.model(input_ids=ids, use_cache=False).logits
        chosen = logits[torch.from_numpy(batch.rows), torch.from_numpy(batch.positions)].float()
        torch.nn.functional.cross_entropy(chosen, torch.from_numpy(batch.targets)).backward()
        loaded.model.zero_grad(set_to_none=True)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)


def oracles(loaded: LoadedModel, data: Path, limit: int = 40) -> list[Row]:
    """Wall time and layer-tokens of the FFN oracle and of a share of the head oracle, by one evaluation's."""
    full = Mask.full(loaded.anatomy.heads_per_layer)
    layers, heads = loaded.anatomy.num_layers, loaded.anatomy.heads_per_layer[0]
    prepared = prepare(loaded, get_tasks(["hellaswag"], data=data)["hellaswag"], num_fewshot=5, limit=limit)
    ffns = [full, *(full.without_ffns([layer]) for layer in range(layers))]
    one, _ = _timed(lambda: score(loaded, prepared, [full]))
    rows = []
    for name, masks, floor in (
        ("all FFNs", ffns, (layers + 1) / 2),
        # One head of every layer: a ninth of the whole, which is too long to be timed here.
        ("one head of every layer", [full, *(full.without_heads([(layer, 0)]) for layer in range(layers))],
         (layers + 1) / 2 + 1),
    ):
        wall, measured = _timed(lambda masks=masks: score(loaded, prepared, masks))
        rows.append({"what": name, "masks": len(masks), "documents": len(prepared.prompts), "layers": layers,
                     "heads": heads, "evaluation": one, "wall": wall, "floor": floor,
                     "passes": measured.layer_tokens / (prepared.tokens * layers)})
    return rows


def memory(loaded: LoadedModel, data: Path) -> list[Row]:
    """Peak memory of a process that measures one mask, and of one that measures a hundred."""
    del loaded
    rows = []
    for count in (1, 10, 100):
        script = f"import bench; bench.measure_masks({count}, {str(data)!r})"
        done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True)
        rows.append({"masks": count, **json.loads(done.stdout.splitlines()[-1])})
    return rows


def measure_masks(count: int, data: str) -> None:
    """In a process of its own: measure so many masks and print the peak."""
    torch.set_num_threads(2)
    loaded = load("smollm2", device="cpu")
    prepared = prepare(loaded, get_tasks(["copa"], data=data)["copa"], num_fewshot=5, limit=8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    heads = loaded.anatomy.heads_per_layer
    masks = [prune(heads, "head", random_order(sum(heads), seed), 0.3) for seed in range(count)]
    wall, _ = _timed(lambda: score(loaded, prepared, masks))
    sys.stdout.write(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                                 "loaded": before / 1024, "wall": wall}) + "\n")


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def _alternating(sides: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, work in sides.items():
            times[name].append(_timed(work)[0])
    return {name: statistics.median(values) for name, values in times.items()}


SECTIONS: dict[str, Callable[[LoadedModel, Path], list[Row]]] = {
    "counts": counts, "importance": importance, "oracles": oracles, "memory": memory}


def page(kept: dict[str, dict[str, Any]]) -> str:
    """docs/performance.md, from the sections that were measured."""
    parts = [_HEAD]
    for name, write in (("counts", _counts), ("importance", _importance), ("oracles", _oracles), ("memory", _memory)):
        if name in kept:
            parts.append(f"{write(kept[name]['rows'])}\nMeasured {kept[name]['when']}.\n")
    return "\n".join(parts)


def _counts(rows: list[Row]) -> str:
    lines = ["## Tokens", "", "The first 100 documents of every task. *Saved* is tokens of the requests as single rows "
             "/ tokens through the model; *padding* is tokens through the model / nodes in rows.", "",
             "| task | " + " | ".join(f"{s}: saved | padding" for s in _SETTINGS) + " |",
             "|---|" + "--:|--:|" * len(_SETTINGS)]
    for task in PAPER14:
        of_task = {r["setting"]: r for r in rows if r["task"] == task}
        lines.append(f"| {task} | " + " | ".join(
            f"{of_task[s]['single'] / of_task[s]['tokens']:.2f} | {of_task[s]['tokens'] / of_task[s]['nodes']:.3f}"
            for s in _SETTINGS) + " |")
    means = [float(np.exp(np.mean([np.log(r["single"] / r["tokens"]) for r in rows if r["setting"] == s])))
             for s in _SETTINGS]
    worst = max(r["tokens"] / r["nodes"] for r in rows)
    return "\n".join([*lines, "| geometric mean | " + " | ".join(f"{m:.2f} |" for m in means) + " |", "",
                      f"The most padding: {worst:.3f}.", ""])


def _importance(rows: list[Row]) -> str:
    lines = ["## Importance by gradient", "", "All heads and FFNs of SmolLM2-135M, in forward passes over the same "
             "examples (piqa); beside it autograd with parameter gradients, as the paper's code has it.", "",
             "| shots | examples | forward, s | headcount / forward | parameter gradients / forward |",
             "|--:|--:|--:|--:|--:|"]
    return "\n".join([*lines, *(
        f"| {r['num_fewshot']} | {r['examples']} | {r['forward']:.2f} | {r['gradient'] / r['forward']:.2f} | "
        f"{r['parameters'] / r['forward']:.2f} |" for r in rows), ""])


def _oracles(rows: list[Row]) -> str:
    lines = ["## Oracles", "", f"hellaswag, 5 shots, {rows[0]['documents']} documents, SmolLM2-135M; in evaluations of "
             "the full model. *Counted* is in layer-tokens, which do not depend on the machine.", "",
             "| what | masks | counted | one pass a mask | wall / evaluation | wall / evaluation, per mask |",
             "|---|--:|--:|--:|--:|--:|"]
    return "\n".join([*lines, *(
        f"| {r['what']} | {r['masks']} | {r['passes']:.2f} | {r['masks']} | {r['wall'] / r['evaluation']:.2f} | "
        f"{r['wall'] / r['evaluation'] / r['masks']:.3f} |" for r in rows), ""])


def _memory(rows: list[Row]) -> str:
    lines = ["## Memory", "", "Peak resident memory of a process that measures so many masks (30 % of heads off at "
             "random; copa, 5 shots, 8 documents).", "",
             "| masks | peak, MiB | / one mask | wall, s |", "|--:|--:|--:|--:|"]
    return "\n".join([*lines, *(f"| {r['masks']} | {r['peak']:.0f} | {r['peak'] / rows[0]['peak']:.2f} | "
                                f"{r['wall']:.1f} |" for r in rows), ""])


_HEAD = """\
# Performance

Written by `make bench` from measurements that are kept; ratios of one run, or counts. Not measured yet: against
lm-eval's backend by wall time, on a GPU.
"""


def main() -> None:
    """Measure the sections that are named and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=list(SECTIONS))
    parser.add_argument("--data", type=Path, default=_ROOT.parent / "shared" / "benchmarks")
    parser.add_argument("--kept", type=Path, default=_ROOT / "build" / "bench")
    parser.add_argument("--page", type=Path, default=_ROOT / "docs" / "performance.md")
    options = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    if not options.data.is_dir():
        sys.exit(f"bench: there is no folder {options.data}; name the documents' with --data")
    options.kept.mkdir(parents=True, exist_ok=True)
    loaded = load("smollm2", device="cpu")
    for name in options.sections:
        when = (f"{datetime.date.today().isoformat()}, {platform.machine()}, {torch.get_num_threads()} threads, torch "
                f"{importlib.metadata.version('torch')}, transformers {importlib.metadata.version('transformers')}")
        found = {"when": when, "rows": SECTIONS[name](loaded, options.data)}
        (options.kept / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    kept = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in sorted(options.kept.glob("*.json"))}
    options.page.write_text(page(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
