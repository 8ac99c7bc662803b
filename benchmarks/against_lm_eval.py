"""Tokens and time of scoring, beside lm-eval's HF backend: from encoded requests to log-likelihoods on both sides.

lm-eval's side is the unchanged `lm_eval.models.huggingface.HFLM` on the same model object, given encoded requests, with
the batch size that is fastest on a few documents of each task (it sorts requests by length, pads, shares the forward
pass of one-token continuations, and computes logits of all positions). Its cost goes with the number of requests, so it
is timed on every n-th document, evenly, and scaled up. Ours is timed on all documents, which may share beginnings,
packing included; but with shots of each document's own on the same ones as lm-eval's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headcount.engine.encode import Request, encode
from headcount.engine.engine import Engine
from headcount.measure.evaluate import prepare
from headcount.model.load import LoadedModel
from headcount.tasks.catalog import PAPER14
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Prompt

SETTINGS = {"0-shot": (0, False), "5-shot": (5, False), "5-shot, shared": (5, True)}
# Padded tokens that lm-eval's side is timed on, about; and those that its batch size is chosen on.
_TIMED, _TRIED = 15_000, 2_500
_BATCH_SIZES = (1, 2, 4, 16)
Row = dict[str, Any]


def counts(loaded: LoadedModel, data: Path, limit: int = 100) -> list[Row]:
    """Per task: tokens of all requests as single rows, trie nodes, and tokens that the model computes."""
    rows = []
    for name, (setting, (k, shared)) in itertools.product(PAPER14, SETTINGS.items()):
        prepared = prepare(loaded, get_tasks([name], data=data)[name], FewShot(k, limit, shared=shared))
        pairs = [pair for p in prepared.prompts for pair in p.pairs]
        requests = encode(loaded.tokenizer, pairs, loaded.max_length)
        rows.append({"task": name, "setting": setting, "documents": len(prepared.prompts),
                     "requests": len(requests), "single": sum(len(r.ids) for r in requests),
                     "nodes": sum(int(b.lengths.sum()) for b in prepared.batches), "tokens": prepared.tokens})
    return rows


def scoring(loaded: LoadedModel, data: Path, name: str, setting: str, limit: int = 100) -> Row:
    """Seconds of one task on both sides; ours beside it in parts."""
    k, shared = SETTINGS[setting]
    task = get_tasks([name], data=data)[name]
    started = time.perf_counter()
    prompts = task.prompts("evaluation", FewShot(k, limit, shared=shared))
    built = time.perf_counter() - started
    tokens = [sum(len(r.ids) for r in requests) for requests in _encoded(loaded, prompts)]
    every = max(1, round(sum(tokens) / _TIMED))
    sample = prompts[::every]
    theirs, batch_size = _lm_eval(loaded, sample)
    ours = sample if k and not shared else prompts
    encoded = _encoded(loaded, ours)
    engine = Engine.of(loaded)
    engine.pack(encoded[:1])  # what the engine must find out about the model, it finds out before the clock starts
    started = time.perf_counter()
    packed = engine.pack(encoded)
    between = time.perf_counter()
    scores = engine.loglikelihoods(packed).loglikelihoods[0]
    forward = time.perf_counter() - between
    scale = sum(tokens) / sum(tokens[::every])
    own = scale if ours is sample else 1
    return {"task": name, "setting": setting, "documents": len(prompts), "every": every, "batch_size": batch_size,
            "built": built, "lm_eval": theirs * scale, "packing": (between - started) * own,
            "forward": forward * own, "single": sum(tokens),
            "finite": bool(np.isfinite(scores).all())}


def _encoded(loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[list[Request]]:
    requests = iter(encode(loaded.tokenizer, [pair for p in prompts for pair in p.pairs], loaded.max_length))
    return [list(itertools.islice(requests, len(p.pairs))) for p in prompts]


def _lm_eval(loaded: LoadedModel, prompts: Sequence[Prompt]) -> tuple[float, int]:
    """Seconds of lm-eval's side for these documents, and the batch size it was given."""
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1, max_length=loaded.max_length)
    requests = [((context, continuation), *backend._encode_pair(context, continuation))
                for p in prompts for context, continuation in p.pairs]

    def timed(some: Sequence[Any], batch_size: int) -> float:
        backend.batch_size_per_gpu = batch_size
        started = time.perf_counter()
        backend._loglikelihood_tokens(list(some), disable_tqdm=True)
        return time.perf_counter() - started

    few, size = [], 0
    # Whole documents from all over, so that what shares a context stays together.
    for document in np.random.default_rng(0).permutation(len(prompts)):
        start = sum(len(p.pairs) for p in prompts[:document])
        few += requests[start : start + len(prompts[document].pairs)]
        size = sum(len(context) + len(continuation) for _, context, continuation in few)
        if size > _TRIED:
            break
    times = {n: timed(few, n) for n in _BATCH_SIZES if n <= len(few)}
    best = min(times, key=times.__getitem__)
    return timed(requests, best), best
