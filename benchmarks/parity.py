"""Parity with lm-evaluation-harness: every log-likelihood of every option, ours beside its HF backend's.

Both sides get the prompts that lm-eval's own loop builds from the same definition and documents, the same model object
and the same tokenizer; lm-eval's side is `lm_eval.models.huggingface.HFLM`, unchanged. Two right computations in
float32 differ in the fourth digit after the point; a document counts as different only if the two sides disagree
whether it is right while its two best options lie further apart than twice the allowed difference.

`python benchmarks/parity.py --data DIR` writes docs/parity.md; what is measured is kept in build/parity, so that it
goes on where it was stopped. The second table compares bfloat16 and float16 with float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headcount.engine.waiting import wait_asleep

os.environ.setdefault("HF_HUB_OFFLINE", "1")
wait_asleep()

import numpy as np
import torch
from scipy.stats import spearmanr

from headcount.engine.engine import Engine
from headcount.masks import Component
from headcount.measure.evaluate import evaluate, prepare
from headcount.measure.importance import gradient_importance
from headcount.model.load import LoadedModel, load
from headcount.results import Evaluations, Importance
from headcount.tasks.catalog import PAPER14, UNSEEN
from headcount.tasks.fewshot import LM_EVAL_SEED, FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Task

TOLERANCE = 1e-3
_ROOT = Path(__file__).resolve().parents[1]
_DTYPES = ("bfloat16", "float16")
_DTYPE_TASKS = ("piqa", "arc_easy", "copa")


@dataclass(frozen=True)
class Comparison:
    """One task at one number of shots, both sides.

    Attributes:
        task: Its name.
        num_fewshot: Shots before each document.
        documents: How many documents.
        requests: How many (context, continuation) pairs.
        truncated: How many of them were longer than the window.
        worst: The largest difference between log-likelihoods, in nats.
        theirs: lm-eval's metric, averaged.
        ours: Ours.
        different: Documents that one side has right and the other wrong.
        close: Those of them whose two best options lie within the rounding of float32.
        greedy_differs: Requests that one side calls the greedy continuation and the other does not.
        seconds: Wall time of lm-eval's side and of ours, from encoded prompts on; beside other work, so no benchmark.
    """

    task: str
    num_fewshot: int
    documents: int
    requests: int
    truncated: int
    worst: float
    theirs: float
    ours: float
    different: tuple[int, ...]
    close: tuple[int, ...]
    greedy_differs: int
    seconds: tuple[float, float]


def lm_eval_results(
    loaded: LoadedModel, task: Task, num_fewshot: int, limit: int, batch_size: int = 2
) -> dict[int, list[tuple[float, bool]]]:
    """Log-likelihood and greedy match of every request, by document, from lm-eval's own loop and backend."""
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size,
                   max_length=loaded.max_length)
    chat = loaded.apply_chat_template
    task.inner.set_fewshot_seed(LM_EVAL_SEED)
    task.inner.set_config("num_fewshot", num_fewshot)
    task.inner.build_all_requests(limit=limit, rank=0, world_size=1, apply_chat_template=chat,
                                  fewshot_as_multiturn=chat, chat_template=backend.apply_chat_template)
    grouped: dict[int, list[tuple[float, bool]]] = {}
    for instance, result in zip(task.inner.instances, backend.loglikelihood(task.inner.instances, disable_tqdm=True),
                                strict=True):
        grouped.setdefault(instance.doc_id, []).append(result)
    return grouped


def compare(loaded: LoadedModel, task: Task, num_fewshot: int, limit: int) -> Comparison:
    """Score the first documents of a task on both sides."""
    started = time.monotonic()
    theirs = lm_eval_results(loaded, task, num_fewshot, limit)
    between = time.monotonic()
    prepared = prepare(loaded, task, FewShot(num_fewshot, limit))
    found = Engine.of(loaded).loglikelihoods(prepared.packed)
    scores, greedy = found.loglikelihoods[0], found.greedy[0]
    finished = time.monotonic()
    ends = np.cumsum(prepared.counts)
    worst, greedy_differs, metrics, different, close = 0.0, 0, [], [], []
    for prompt, end in zip(prepared.prompts, ends, strict=True):
        mine = list(zip(scores[end - len(prompt.pairs) : end].tolist(),
                        greedy[end - len(prompt.pairs) : end].astype(bool).tolist(), strict=True))
        other = [(float(x), bool(g)) for x, g in theirs[prompt.doc_id]]
        worst = max(worst, *(abs(a - b) for (a, _), (b, _) in zip(mine, other, strict=True)))
        greedy_differs += sum(a != b for (_, a), (_, b) in zip(mine, other, strict=True))
        pair = [task.metrics(prompt, side)[task.metric] for side in (other, mine)]
        metrics.append(pair)
        if pair[0] != pair[1]:
            different.append(prompt.doc_id)
            best = sorted(x for x, _ in other[: prompt.num_options])[-2:]
            if len(best) == 2 and best[1] - best[0] < 2 * TOLERANCE:
                close.append(prompt.doc_id)
    means = np.mean(metrics, axis=0)
    return Comparison(task.name, num_fewshot, len(prepared.prompts), len(scores), prepared.truncated, worst,
                      float(means[0]), float(means[1]), tuple(different), tuple(close), greedy_differs,
                      (between - started, finished - between))


@functools.cache
def _measured(
    loaded: LoadedModel, task: Task, num_fewshot: int, limit: int
) -> tuple[Evaluations, dict[Component, Importance]]:
    return (evaluate(loaded, task, num_fewshot=num_fewshot, limit=limit),
            gradient_importance(loaded, task, FewShot(num_fewshot, limit)))


def compare_dtypes(full: LoadedModel, other: LoadedModel, task: Task, num_fewshot: int, limit: int) -> dict[str, Any]:
    """Accuracy by document, log-likelihoods and importance of a model in another type of weights, beside float32."""
    (a, first), (b, second) = (_measured(m, task, num_fewshot, limit) for m in (full, other))

    def rank(component: Component) -> float:
        scores = [x[component].scores["position"] for x in (first, second)]
        return float(spearmanr(*scores).statistic)

    return {"task": task.name, "num_fewshot": num_fewshot, "documents": len(a.doc_ids),
            "full": float(a.accuracy[0]), "other": float(b.accuracy[0]),
            "different": int((a.correct != b.correct).sum()),
            "median": float(np.median(np.abs(a.gold_loglikelihood - b.gold_loglikelihood))),
            "worst": float(np.abs(a.gold_loglikelihood - b.gold_loglikelihood).max()),
            "heads": rank("head"), "ffns": rank("ffn")}


def main() -> None:
    """Measure what is not measured yet and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=_ROOT.parent / "shared" / "benchmarks",
                        help="folder with TASK/{train,validation,test}.jsonl")
    parser.add_argument("--tasks", nargs="+", default=[*PAPER14, *UNSEEN])
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 5])
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--kept", type=Path, default=_ROOT / "build" / "parity")
    parser.add_argument("--page", type=Path, default=_ROOT / "docs" / "parity.md")
    options = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    if not options.data.is_dir():
        sys.exit(f"parity: there is no folder {options.data}; name the documents' with --data")
    options.kept.mkdir(parents=True, exist_ok=True)
    loaded = load("smollm2", device="cpu")
    rows = [_row(loaded, name, k, options) for k in options.shots for name in options.tasks]
    dtypes = [row for dtype in _DTYPES for row in _dtype_rows(loaded, dtype, options)]
    options.page.write_text(page(rows, dtypes, loaded), encoding="utf-8")


def _row(loaded: LoadedModel, name: str, num_fewshot: int, options: argparse.Namespace) -> dict[str, Any]:
    def measured() -> dict[str, Any]:
        return dataclasses.asdict(compare(loaded, _task(name, options.data), num_fewshot, options.limit))

    return _kept(options.kept / f"{name}-{num_fewshot}-{options.limit}.json", measured)


def _dtype_rows(full: LoadedModel, dtype: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    @functools.cache
    def other() -> LoadedModel:
        return load("smollm2", device="cpu", dtype=dtype)

    for name, num_fewshot in itertools.product(_DTYPE_TASKS, options.shots):
        # Most CPUs have no arithmetic in float16, and take far longer than in float32.
        limit = options.limit if dtype != "float16" or num_fewshot == 0 else max(1, options.limit // 4)

        def measured(name: str = name, num_fewshot: int = num_fewshot, limit: int = limit) -> dict[str, Any]:
            return compare_dtypes(full, other(), _task(name, options.data), num_fewshot, limit)

        found = _kept(options.kept / f"{dtype}-{name}-{num_fewshot}-{limit}.json", measured)
        yield {"dtype": dtype, **found}


@functools.cache
def _task(name: str, data: Path) -> Task:
    return get_tasks([name], data=data)[name]


def _kept(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not file.exists():
        file.write_text(json.dumps(measure()), encoding="utf-8")
    found = file.read_text(encoding="utf-8")
    sys.stderr.write(f"{file.stem}: {found}\n")
    return dict(json.loads(found))


def page(rows: list[dict[str, Any]], dtypes: list[dict[str, Any]], loaded: LoadedModel) -> str:
    """docs/parity.md."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("lm_eval", "transformers", "torch"))
    return _PAGE.format(
        date=datetime.date.today().isoformat(),
        machine=f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {versions}",
        model=f"SmolLM2-135M-Instruct ({loaded.notes[0]}), computed in float32",
        requests=f"{sum(r['requests'] for r in rows):,}", worst=f"{max(r['worst'] for r in rows):.1e}",
        clear=sum(len(set(r["different"]) - set(r["close"])) for r in rows),
        listed=_listed(rows),
        rows="\n".join(_PARITY_ROW.format(**{**r, "different": len(r["different"]), "close": len(r["close"])})
                       for r in rows),
        dtypes="\n".join(_DTYPE_ROW.format(**r) for r in dtypes))


def _listed(rows: list[dict[str, Any]]) -> str:
    """Documents that differ, by their position in the evaluated split."""
    found = [f"{r['task']}, {r['num_fewshot']}-shot: {', '.join(map(str, r['different']))}" for r in rows
             if r["different"]]
    return f"Documents that differ, by position: {'; '.join(found)}." if found else "No document differs."


_PARITY_ROW = ("| {task} | {num_fewshot} | {documents} | {requests} | {truncated} | {worst:.1e} | {greedy_differs} | "
               "{theirs:.3f} | {ours:.3f} | {different} | {close} |")
_DTYPE_ROW = ("| {dtype} | {task} | {num_fewshot} | {documents} | {full:.3f} | {other:.3f} | {different} | "
              "{median:.3f} | {worst:.2f} | {heads:.4f} | {ffns:.4f} |")
_PAGE = """\
# Parity

`make parity` writes this page; every figure is measured. {date}, {machine}.
Model: {model}.

## Against lm-eval's HF backend

Both sides score the prompts that lm-eval builds, from the same model object. *Worst* is the largest difference between
the two sides' log-likelihoods over all requests, in nats. *Different* counts documents that one side has right and
the other wrong. *Close* counts those of them whose two best options lie within 0.002 nats of one another, so that
rounding decides the answer. *Greedy* counts requests that one side calls the greedy continuation and the other does
not. `record` and `multirc` use headcount's own definitions on both sides: lm-eval's `record` needs a module that
transformers no longer has, and its `multirc` takes right answers for wrong ones.

Over {requests} requests the largest difference is {worst} nats; {clear} documents differ without being close.

| task | shots | documents | requests | cut to the window | worst | greedy | lm-eval | headcount | different | close |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
{rows}

{listed}

## Other types of weights against float32

The same weights, rounded to bfloat16 and float16 and computed in that type. *Changed* counts documents whose answer
turns right or wrong. The two differences are of the gold continuation's log-likelihood, in nats. *Heads* and *FFNs* are
Spearman correlations with float32 of gradient importance (score `position`), over all heads and all FFNs, measured on
as many training documents as *documents* says.

| type | task | shots | documents | float32 | this type | changed | median difference | largest | heads | FFNs |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|
{dtypes}
"""


if __name__ == "__main__":
    main()
