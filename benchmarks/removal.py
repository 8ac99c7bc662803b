"""What removing heads and FFNs buys: SmolLM2 full, masked and removed, in turns, beside what it loses.

Heads and FFNs go by one order for all tasks, as a study's common order: the mean over three embedded tasks of the
heads' importance by gradient and of the FFNs' by oracle, on a few examples with 5 shots. Accuracy is the mean over the
first documents of these tasks, with 5 shots that all documents share. The same machine times everything, a point after
the other, and at each point the three sides in turns (`headcount.removal.speed`).
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from headcount.engine import neighbours
from headcount.masks import Mask, prune, removal_order
from headcount.measure.evaluate import evaluate
from headcount.measure.importance import ffn_importance, head_importance
from headcount.model.load import LoadedModel, load
from headcount.removal.cost import TOKENS, last_position
from headcount.removal.remove import Removed, remove
from headcount.removal.speed import MeasuredSpeed, measured_speed, sides_of
from headcount.stats.intervals import Sample, accuracy_interval, difference_interval
from headcount.tasks.load import get_tasks

Row = dict[str, Any]
TASKS = ("icl_plural", "icl_past_tense", "icl_antonym")
SHOTS, EXAMPLES, DOCUMENTS = 5, 20, 40
# Tokens that are decoded.
NEW = 16
# Where more of the cores than this is another's, a point is timed again, so often at most.
_QUIET, _AGAIN = 0.25, 2
ALONE = (0.2, 0.4, 0.6, 0.8)
JOINT = ((0.2, 0.2), (0.4, 0.2), (0.5, 0.2), (0.4, 0.4), (0.6, 0.4), (0.6, 0.6), (0.8, 0.8))
# Of which the goal speaks.
GOAL = (0.5, 0.2)
POINTS = ((0.0, 0.0), *((f, 0.0) for f in ALONE), *((0.0, f) for f in ALONE), *JOINT)


def removal(loaded: LoadedModel, data: Path, rounds: int = 4, loads: int = 7) -> list[Row]:
    """Every point: what it loses, and how fast it is; then how long folders take to load."""
    del data
    masks = _masks(loaded)
    lost = _lost(loaded, masks)
    rows: list[Row] = []
    for point, mask, told in zip(POINTS, masks, lost, strict=True):
        row: Row = {"kind": "point", "heads": point[0], "ffns": point[1], **told}
        if mask.is_full:
            whole = loaded.anatomy.num_parameters
            rows.append({**row, "parameters": whole, "left": 1.0})
            continue
        removed = remove(loaded, mask)
        speed = _timed(removed, 3 * rounds if point == GOAL else rounds)
        rows.append({**row, "parameters": removed.savings.parameters_left, "left": removed.savings.share_left,
                     "promised": 1 - (removed.savings.time_left or float("nan")), **speed.to_dict(),
                     "peak": {"full": _peak(loaded), "removed": _peak(removed.model)}})
        if point == GOAL:
            rows.append(_loads(removed, loads))
    return rows


def _timed(removed: Removed, rounds: int) -> MeasuredSpeed:
    """The speeds of a point; once more where other processes took cores, and then the quieter of both."""
    found: list[MeasuredSpeed] = []
    while len(found) < _AGAIN and (not found or found[-1].others > _QUIET):
        found.append(measured_speed(sides_of(removed), rounds=rounds, new_tokens=NEW))
    return min(found, key=lambda one: one.others)


def _masks(loaded: LoadedModel) -> list[Mask]:
    """The least important go first, by one order for all tasks."""
    scores: dict[str, list[np.ndarray]] = {"head": [], "ffn": []}
    for task in get_tasks(list(TASKS)).values():
        few: dict[str, Any] = {"num_fewshot": SHOTS, "limit": EXAMPLES, "shared_shots": True}
        scores["head"].append(head_importance(loaded, task, **few).scores["example"])
        scores["ffn"].append(ffn_importance(loaded, task, **few).scores["gold_loglikelihood"])
    heads, ffns = (removal_order(np.mean(scores[part], axis=0)) for part in ("head", "ffn"))
    sizes = loaded.anatomy.heads_per_layer
    return [Mask(prune(sizes, "head", heads, h).heads, prune(sizes, "ffn", ffns, f).ffns) for h, f in POINTS]


def _lost(loaded: LoadedModel, masks: Sequence[Mask]) -> list[Row]:
    """Accuracy under each mask with its interval, and its difference to the full model's with its own."""
    correct = [evaluate(loaded, task, masks, num_fewshot=SHOTS, limit=DOCUMENTS, shared_shots=True).correct
               for task in get_tasks(list(TASKS)).values()]
    accuracy = accuracy_interval([Sample(values) for values in correct])
    away = [values - values[:1] for values in correct]
    difference = difference_interval([Sample(values) for values in away])
    means = np.mean([values.mean(axis=1) for values in correct], axis=0)
    changes = np.mean([values.mean(axis=1) for values in away], axis=0)
    return [{"documents": sum(values.shape[1] for values in correct), "accuracy": float(means[i]),
             "low": float(accuracy.low[i]), "high": float(accuracy.high[i]), "difference": float(changes[i]),
             "difference_low": float(difference.low[i]), "difference_high": float(difference.high[i])}
            for i in range(len(masks))]


@torch.inference_mode()
def _peak(loaded: LoadedModel) -> int:
    """Bytes of weights, and the most that a prefill has allocated at once beside them."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        output = loaded.model(input_ids=ids, use_cache=True, **last_position(loaded.model))
    del output
    events = sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"),  # type: ignore[union-attr]
                    key=lambda e: e.start_ns())
    beside = np.cumsum([e.nbytes() for e in events]).max(initial=0)
    tensors = {id(t): t for t in (*loaded.model.parameters(), *loaded.model.buffers())}
    return int(beside) + sum(t.numel() * t.element_size() for t in tensors.values())


def _loads(removed: Removed, rounds: int) -> Row:
    """Seconds that `load` takes of the folders of the full and of the removed model, in turns."""
    full = removed.plan.loaded
    with tempfile.TemporaryDirectory() as place:
        folders = {"full": Path(place, "full"), "removed": Path(place, "removed")}
        full.model.save_pretrained(folders["full"])
        full.tokenizer.save_pretrained(folders["full"])
        removed.save(folders["removed"])
        seconds: dict[str, list[float]] = {side: [] for side in folders}
        with neighbours.watch(torch.get_num_threads()) as beside:
            for number in range(rounds + 1):
                for side, folder in folders.items():
                    gc.collect()  # else the models of earlier loads are freed during some load, always the same side's
                    start = time.perf_counter()
                    load(folder, device="cpu")
                    if number:  # the first reads files that are not in memory yet
                        seconds[side].append(time.perf_counter() - start)
        sizes = {side: sum(file.stat().st_size for file in folder.iterdir()) for side, folder in folders.items()}
    return {"kind": "load", "heads": GOAL[0], "ffns": GOAL[1], "rounds": rounds, "others": beside.others,
            "crowded": beside.crowded, "bytes": sizes,
            "seconds": {side: statistics.median(times) for side, times in seconds.items()}}


def share_of_promise(row: Row) -> float:
    """Of the time that less arithmetic promises to save of a prefill, which share is saved."""
    return (1 - row["sides"]["full"]["prefill"] / row["sides"]["removed"]["prefill"]) / row["promised"]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against the time of a prefill; a line joins the points that none beats in both."""
    import altair as alt
    import pandas as pd

    from headcount.report.style import PALETTE, description, dressed, save

    kinds = ("nothing", "heads alone", "FFNs alone", "heads and FFNs")
    points = [r for r in rows if r["kind"] == "point"]
    frame = pd.DataFrame([
        {"kind": kinds[(r["heads"] > 0) + 2 * (r["ffns"] > 0)], "accuracy": r["accuracy"], "low": r["low"],
         "high": r["high"], "time": 100 * (r["sides"]["full"]["prefill"] / r["sides"]["removed"]["prefill"]
                                           if "sides" in r else 1.0),
         "label": f"{100 * r['heads']:.0f}/{100 * r['ffns']:.0f}"} for r in points])
    frame = frame.sort_values("time", kind="stable", ignore_index=True)
    front = frame[frame["accuracy"] > frame["accuracy"].cummax().shift(fill_value=-1.0)]
    base = alt.Chart(frame).encode(
        x=alt.X("time:Q", title="time of a prefill of 512 tokens (% of the full model's)",
                scale=alt.Scale(zero=True)),
        color=alt.Color("kind:N", title="removed", legend=alt.Legend(symbolOpacity=1),
                        scale=alt.Scale(domain=list(kinds), range=["black", *PALETTE[: len(kinds) - 1]])))
    shape = alt.Shape("kind:N", title="removed",
                      scale=alt.Scale(domain=list(kinds), range=["diamond", "circle", "square", "triangle-up"]))
    accuracy = alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]))
    bars = base.mark_rule(opacity=0.4).encode(y=alt.Y("low:Q", title="accuracy"), y2=alt.Y2("high:Q"))
    marks = base.mark_point(filled=True, opacity=1, size=70).encode(y=accuracy, shape=shape)
    best = alt.Chart(front).encode(x=alt.X("time:Q"), y=accuracy)
    line = best.mark_line(interpolate="step-after", color="#59616b", strokeWidth=1.5)
    text = best.mark_text(dx=-6, dy=-7, align="right", fontSize=10, color="#59616b").encode(text=alt.Text("label:N"))
    chart = dressed(alt.layer(bars, line, marks, text).properties(width=620, height=340))
    figure = description(lambda: chart)
    if figure is not None:
        save(figure, path)[1].unlink()
