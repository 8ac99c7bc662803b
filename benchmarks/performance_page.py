"""docs/performance.md, from the sections that `bench.py` and `gpu.py` have kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from against_lm_eval import SETTINGS
from gpu_page import gpu_section
from headcount.tasks.catalog import PAPER14
from removal import DOCUMENTS, EXAMPLES, GOAL, SHOTS, TASKS, share_of_promise

Row = dict[str, Any]


def write(folder: Path, file: Path) -> None:
    """Write the page from the results in a folder."""
    kept = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.json"))}
    pairs = [json.loads(f.read_text(encoding="utf-8")) for f in sorted((folder / "scoring").glob("*.json"))]
    if pairs:
        kept["scoring"] = {"when": pairs[-1]["when"], "rows": [p["rows"] for p in pairs]}
    file.write_text(page(kept), encoding="utf-8")


def page(kept: dict[str, dict[str, Any]]) -> str:
    """The page: every section that was measured, in order."""
    parts = [_HEAD, _goals({name: section["rows"] for name, section in kept.items()})]
    for name, write in _SECTIONS.items():
        if name in kept:
            parts.append(f"{write(kept[name]['rows'])}\nMeasured {kept[name]['when']}.\n")
    parts.append(gpu_section(kept))
    if absent := [name for name in _SECTIONS if name not in kept]:
        parts.append(f"Not measured yet: {', '.join(absent)}.\n")
    return "\n".join(parts)


def _goals(kept: dict[str, list[Row]]) -> str:
    """What was set out for, and what was reached; only of what was measured."""
    found: list[tuple[str, float, float, str]] = []  # figure, measured, goal, which side of it is right
    if rows := kept.get("counts"):
        found.append(("tokens through the model / nodes, the worst task", max(r["tokens"] / r["nodes"] for r in rows),
                      1.10, "at most"))
    for setting, goal in (("0-shot", 2.0), ("5-shot, shared", 6.0)):
        if rows := [r for r in kept.get("scoring", []) if r["setting"] == setting]:
            ratios = [r["lm_eval"] / (r["packing"] + r["forward"]) for r in rows]
            found.append((f"lm-eval's wall time / ours, {setting}", _mean(ratios), goal, "at least"))
    found += [(f"importance of all heads and FFNs / one forward pass, {r['num_fewshot']} shots",
               r["gradient"] / r["forward"], 2.3, "at most") for r in kept.get("importance", [])]
    for r in kept.get("oracles", []):
        goal = 0.55 * r["layers"] if r["masks"] == r["layers"] else 0.6 * r["masks"] * (1 + 1 / r["layers"])
        found.append((f"oracle of {r['what']} / one evaluation, wall time; {r['task']}, {r['num_fewshot']} shots",
                      r["wall"] / r["evaluation"], goal, "at most"))
        if r["masks"] == r["layers"]:
            found.append(("layer-tokens of the same / those of one forward pass", r["passes"], (r["layers"] + 1) / 2,
                          "at most"))
    if rows := kept.get("scaling"):
        peaks = {r["masks"]: r["peak"] for r in rows}
        found.append(("peak memory, 100 masks / 1", peaks[100] / rows[0]["peak"], 1.5, "at most"))
    found += [("the demo, minutes", r["wall"] / 60, 5, "at most") for r in kept.get("demo", [])]
    for r in kept.get("removal", []):
        without = f"SmolLM2 without {r['heads']:.0%} of its heads and {r['ffns']:.0%} of its FFNs"
        if r["kind"] == "load":
            found.append((f"`load` of {without} / of the full one", r["seconds"]["removed"] / r["seconds"]["full"], 1.0,
                          "at most"))
        elif (r["heads"], r["ffns"]) == GOAL:
            found.append((f"time of a prefill saved / promised by its arithmetic, {without}", share_of_promise(r), 0.7,
                          "at least"))
    found += [("two workers / one, speed of a study of eight tasks", r["ratio"], 1.6, "at least")
              for r in kept.get("workers", [])]
    if rows := kept.get("plan"):
        ratios = [r["seconds"] / r["planned"] for r in rows]
        found.append(("seconds of a study / planned, the furthest above", max(ratios), 1.3, "at most"))
        found.append(("seconds of a study / planned, the furthest below", min(ratios), 0.7, "at least"))
    if rows := kept.get("middles"):
        for model in dict.fromkeys(r["model"] for r in rows):
            for what in ("curves", "grid", "transfer"):
                own = [r for r in rows if r["model"] == model and _part(r["kind"]) == what]
                found.append((f"layer-tokens, middle of a plan's bounds beside real orders, off by: {what} of {model}",
                              abs(sum(r["bounds"][1] for r in own) / sum(r["run"] for r in own) - 1), 0.1, "at most"))
    if rows := kept.get("streaming"):
        found.append(("a streamed pass / the larger of its reading and its computing, the worst", max(
            r["ratio"] for r in rows), 1.25, "at most"))
    for r in kept.get("gpu_cuda", []):
        if (r["model"], r["way"]) == ("opt-6.7b", "resident") and "seconds" in r:
            if r["what"] == "scoring" and r["utilisation"] is not None:
                found.append(("share of a GPU's peak, scoring by OPT-6.7B's shape", r["utilisation"], 0.5, "at least"))
            elif r["what"] == "sweep" and r["over_plain"] is not None:
                found.append(("time of a sweep of ten masks / plain forward passes of as many operations, the same",
                              r["over_plain"], 1.1, "at most"))
    lines = ["| figure | goal | measured | |", "|---|--:|--:|---|"]
    for figure, measured, goal, side in found:
        reached = measured <= goal + 1e-9 if side == "at most" else measured >= goal
        lines.append(f"| {figure} | {side} {goal:.4g} | {measured:.2f} | {'' if reached else 'not reached'} |")
    return "\n".join(["## Goals", "", *lines, ""])


def _mean(ratios: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def _counts(rows: list[Row]) -> str:
    lines = ["## Tokens", "", "The first 100 documents of every task. *Saved* is the tokens of all requests as single "
             "rows / the tokens through the model. *Padding* is the tokens through the model / the nodes of the token "
             "trees.", "",
             "| task | " + " | ".join(f"{s}: saved | padding" for s in SETTINGS) + " |",
             "|---|" + "--:|--:|" * len(SETTINGS)]
    for task in PAPER14:
        of_task = {r["setting"]: r for r in rows if r["task"] == task}
        lines.append(f"| {task} | " + " | ".join(
            f"{of_task[s]['single'] / of_task[s]['tokens']:.2f} | {of_task[s]['tokens'] / of_task[s]['nodes']:.3f}"
            for s in SETTINGS) + " |")
    means = [_mean([r["single"] / r["tokens"] for r in rows if r["setting"] == s]) for s in SETTINGS]
    worst = max(r["tokens"] / r["nodes"] for r in rows)
    return "\n".join([*lines, "| geometric mean | " + " | ".join(f"{m:.2f} |" for m in means) + " |", "",
                      f"The largest padding is {worst:.3f}.", ""])


def _scoring(rows: list[Row]) -> str:
    lines = ["## Scoring, against lm-eval's HF backend", "",
             "Seconds from encoded requests to log-likelihoods of the first 100 documents (cb: 56), SmolLM2-135M in "
             "float32 on both sides. lm-eval ran with the batch size in brackets, the fastest of 1, 2, 4 and 16. "
             "*Every* says which documents were timed: every n-th, scaled up. headcount without shots, and with shared "
             "shots, was timed on all documents. *Built* is the time to build the prompts, which both sides share.", ""]
    for setting in SETTINGS:
        of_setting = {r["task"]: r for r in rows if r["setting"] == setting}
        if not of_setting:
            continue
        lines += [f"### {setting}", "",
                  "| task | lm-eval, s | headcount, s | of it packing | ratio | every | built, s |",
                  "|---|--:|--:|--:|--:|--:|--:|"]
        ratios = []
        for task in PAPER14:
            if (r := of_setting.get(task)) is None:
                continue
            ours = r["packing"] + r["forward"]
            ratios.append(r["lm_eval"] / ours)
            lines.append(f"| {task} | {r['lm_eval']:.1f} ({r['batch_size']}) | {ours:.1f} | {r['packing']:.2f} | "
                         f"{ratios[-1]:.2f} | {r['every']} | {r['built']:.1f} |")
        lines += [f"| geometric mean of {len(ratios)} | | | | **{_mean(ratios):.2f}** | | |", ""]
    return "\n".join(lines)


def _importance(rows: list[Row]) -> str:
    bridge = all("transformer_lens" in r for r in rows)
    beside = " TransformerLens / forward |" if bridge else ""
    lines = ["## Importance by gradient", "", "All heads and FFNs of SmolLM2-135M. The unit is one forward pass "
             "over the same examples (piqa). Beside headcount: autograd with parameter gradients, as the paper's code "
             "has it, and TransformerLens's bridge around the same model (hooks on every head's and FFN's output, "
             "forward and backward).",
             "", f"| shots | examples | forward, s | headcount / forward | parameter gradients / forward |{beside}",
             "|--:|--:|--:|--:|--:|" + ("--:|" if bridge else "")]
    return "\n".join([*lines, *(
        f"| {r['num_fewshot']} | {r['examples']} | {r['forward']:.2f} | {r['gradient'] / r['forward']:.2f} | "
        f"{r['parameters'] / r['forward']:.2f} |"
        + (f" {r['transformer_lens'] / r['forward']:.2f} |" if bridge else "") for r in rows), ""])


def _induction(rows: list[Row]) -> str:
    lines = ["## Induction heads", "", "SmolLM2-135M, every head, random texts of four times *length* tokens. The unit "
             "is one eager forward pass over the same texts without logits. Once per model, "
             f"{rows[0]['once']:.1f} s are added for the OV score, the effect of norms and the end of the residual "
             "stream.", "",
             "| length | texts | tokens | forward, s | prefix matching | copying | copying, protocol `paper` |",
             "|--:|--:|--:|--:|--:|--:|--:|"]
    return "\n".join([*lines, *(
        f"| {r['length']} | {r['texts']} | {r['tokens']:,} | {r['forward']:.2f} | "
        f"{r['prefix_matching'] / r['forward']:.2f} | {r['copying'] / r['forward']:.2f} | "
        f"{r['paper_copying'] / r['forward']:.2f} |" for r in rows), ""])


def _oracles(rows: list[Row]) -> str:
    lines = ["## Oracles", "", "SmolLM2-135M. The unit is one evaluation of the full model. *Counted* is the cost in "
             "layer-tokens, which do not depend on the machine; *wall* is wall time.", "",
             "| what | task | shots | documents | masks | counted | wall / evaluation | the same, per mask |",
             "|---|---|--:|--:|--:|--:|--:|--:|"]
    return "\n".join([*lines, *(
        f"| {r['what']} | {r['task']} | {r['num_fewshot']} | {r['documents']} | {r['masks']} | {r['passes']:.2f} | "
        f"{r['wall'] / r['evaluation']:.2f} | {r['wall'] / r['evaluation'] / r['masks']:.3f} |" for r in rows), ""])


def _scaling(rows: list[Row]) -> str:
    lines = ["## Scaling", "", "piqa; every mask but the first has 30 % of the heads off, at random. Each line ran in "
             "a process of its own. *Peak* is the largest resident memory while measuring, *loaded* the resident "
             "memory before.", "",
             "| masks | documents | layers | shots | tokens a pass | layer-tokens | wall, s | loaded, MiB | "
             "peak, MiB | peak / first line's |", "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    return "\n".join([*lines, *(
        f"| {r['masks']} | {r['documents']} | {r['layers']} | {r['shots']} | {r['tokens']:,} | {r['layer_tokens']:,} | "
        f"{r['wall']:.1f} | {r['loaded']:.0f} | {r['peak']:.0f} | {r['peak'] / rows[0]['peak']:.2f} |"
        for r in rows), ""])


def _demo(rows: list[Row]) -> str:
    (r,) = rows
    work = r["floor"] * sum(r["gflops"]) / 2e3
    kinds = [f"| {kind} | {n} | {seconds:.0f} | {tokens:,} |" for kind, (n, seconds, tokens) in r["kinds"].items()]
    return "\n".join([
        "## The demo", "", f"`headcount demo` in an empty folder takes {r['wall']:.0f} s in all, "
        f"{r['measuring']:.0f} s of them for measuring. Matrix products of this model's shape ran at "
        f"{r['gflops'][0]:.0f} GFLOP/s before and "
        f"{r['gflops'][1]:.0f} after. The blocks' matrix products of the evaluations are {work:.0f} TFLOP, which take "
        f"{r['floor']:.0f} s at that speed; gradients, the output layer and attention come on top. Everything before "
        f"the first job (loading, proofs, planning) takes {r['starting']:.0f} s by itself, and "
        f"`headcount report` {r['report']:.0f} s.", "",
        "| jobs | how many | seconds | layer-tokens |", "|---|--:|--:|--:|", *kinds, ""])


def _waiting(rows: list[Row]) -> str:
    lines = ["## How threads wait", "", "Passes over documents of icl_antonym without shots, SmolLM2-135M. Wall and "
             "CPU are medians of several passes; the processes hold the model in memory and take turns. OpenMP's "
             "threads meet at a barrier after every matrix product. By default a thread that comes early spins there "
             "for a while; on a machine that other processes use, it thereby takes the core that the late thread "
             "needs. "
             "*Others* is how many cores other processes kept busy meanwhile, *CPU* the seconds of all threads of the "
             "timed process. headcount's command line, tests and benchmarks set `OMP_WAIT_POLICY=passive` unless the "
             "user has said how threads wait.", "",
             "| documents | busy processes | others | way of waiting | wall, s | fastest to slowest | CPU, s |",
             "|--:|--:|--:|---|--:|--:|--:|"]
    return "\n".join([*lines, *(
        f"| {r['documents']} | {r['busy']} | {r['others']:.1f} | {r['way']} | {r['wall']:.2f} | {r['fastest']:.2f} to "
        f"{r['slowest']:.2f} | {r['cpu']:.2f} |" for r in rows), ""])


def _removal(rows: list[Row]) -> str:
    points, (loads,) = [r for r in rows if r["kind"] == "point"], [r for r in rows if r["kind"] == "load"]
    timed = [r for r in points if "sides" in r]
    some, seconds, megabytes = timed[0], loads["seconds"], {k: n / 1e6 for k, n in loads["bytes"].items()}
    rounds = sorted({r["rounds"] for r in timed})
    lines = [
        "## Removal", "", f"SmolLM2-135M, {some['dtype']}: the full model, the same under a mask's gates, and with the "
        f"masked heads and FFNs removed, timed in turns; figures are medians of {rounds[0]} rounds ({rounds[-1]} at "
        f"{_gone(loads)}). *Prefill* is {some['prefill_tokens']} tokens with the logits of the last position alone; "
        f"*decode* is greedy `generate` of {some['new_tokens']} tokens with a cache, behind a prompt of "
        f"{some['prompt_tokens']}. *Promised* is the share of the prefill's arithmetic that is saved, *saved* that of "
        "its time. Gates give an FFN that is off no positions, so that masked FFNs cost nothing either; masked heads "
        "cost what they did. *Cache* is keys and values of a prefill; *peak* is the weights and the most that a "
        "prefill has allocated at once beside them.", "",
        f"Accuracy: mean over {', '.join(TASKS)} with {SHOTS} shared shots, {DOCUMENTS} documents each, with 95 % "
        "intervals. One order for all of them, by mean importance (heads by gradient, FFNs by oracle) on "
        f"{EXAMPLES} examples each.", "",
        "![Accuracy against the time of a prefill: heads removed alone, FFNs alone, and both](images/removal-time.png)",
        "", "*The line joins points that none beats in both, labelled with heads removed / "
             "FFNs removed, in %. Vertical lines: 95 % intervals.*", "",
        "| heads / FFNs removed | parameters, M | weights, MB | cache, MB | peak, MB | accuracy | difference, points |",
        "|---|" + "--:|" * 6]
    for r in points:
        small = r["sides"]["removed"] if "sides" in r else some["sides"]["full"]
        peak = r["peak"]["removed"] if "peak" in r else some["peak"]["full"]
        lines.append(f"| {_gone(r)} | {r['parameters'] / 1e6:.1f} | {small['bytes'] / 1e6:.0f} | "
                     f"{small['cache_bytes'] / 1e6:.1f} | {peak / 1e6:.0f} | {r['accuracy']:.3f} ({r['low']:.2f} to "
                     f"{r['high']:.2f}) | " + (f"{100 * r['difference']:+.1f} ({100 * r['difference_low']:+.1f} to "
                                               f"{100 * r['difference_high']:+.1f}) |" if "sides" in r else "|"))
    lines += ["", "| heads / FFNs removed | prefill, tokens/s: full | masked | removed | promised | saved | "
              "decode, tokens/s: full | masked | removed | others |", "|---|" + "--:|" * 9]
    for r in timed:
        sides = r["sides"]
        prefill, decode = (" | ".join(f"{sides[side][way]:,.{digits}f}" for side in ("full", "masked", "removed"))
                           for way, digits in (("prefill", 0), ("decode", 1)))
        saved = 1 - sides["full"]["prefill"] / sides["removed"]["prefill"]
        lines.append(f"| {_gone(r)} | {prefill} | {r['promised']:.0%} | {saved:.0%} | {decode} | {r['others']:.1f} |")
    return "\n".join([*lines, "", "*Others* is how many cores other processes kept busy meanwhile. `load` of the full "
                      f"model's folder ({megabytes['full']:.0f} MB) takes {seconds['full']:.2f} s, of that without "
                      f"{_gone(loads)} ({megabytes['removed']:.0f} MB) {seconds['removed']:.2f} s (medians of "
                      f"{loads['rounds']} in turns).", "", *_memory()])


def _memory() -> list[str]:
    """A paragraph on a removal whose model stays on the disk (`benchmarks/removal_memory.py`)."""
    if not _MEMORY.is_file():
        return []
    r = json.loads(_MEMORY.read_text(encoding="utf-8"))
    allowed = r["base_mb"] + max(2 * r["block_mb"], r["output_mb"])
    return [f"A Llama of {r['parameters'] / 1e9:.2f} billion parameters (random {r['dtype'].removeprefix('torch.')} "
            f"weights, on the disk; {r['date']}, {r['machine']}, {r['cores']} cores): half of its heads and six of "
            f"its 32 FFNs are removed, {r['written_gb']:.1f} GB written, and every block proved, and the model that "
            f"was written, in {r['seconds']:.0f} s. The process held {r['peak_mb']:,.0f} MB at its peak, files that "
            f"are mapped included: {r['base_mb']:,.0f} MB once the model was opened, and "
            f"{r['peak_mb'] - r['base_mb']:,.0f} MB more, where two blocks are {2 * r['block_mb']:,.0f} MB (goal: at "
            f"most {allowed:,.0f} MB in all).", ""]


def _gone(row: Row) -> str:
    return f"{row['heads']:.0%} / {row['ffns']:.0%}"


def _streaming(rows: list[Row]) -> str:
    size = rows[0]["bytes"] / 1e9
    lines = ["## Streaming", "", f"One pass of a model of {rows[0]['layers']} blocks of 50 MB ({size:.1f} GB, float32, "
             "OPT's layers of width 1,024) whose weights stay in their files. *Reading* is the reader of the streamed "
             "schedule alone, *computing* the schedule alone with all weights in memory, medians of several rounds in "
             "turns. Before everything that reads, the system's file cache forgets the checkpoint. Computing has one "
             "thread and reading one. *Others* is how many cores other processes kept busy meanwhile, of two.", "",
             "| documents | tokens | masks | reading, s | computing, s | streaming, s | / the larger | others |",
             "|--:|--:|--:|--:|--:|--:|--:|--:|"]
    return "\n".join([*lines, *(
        f"| {r['documents']} | {r['tokens']} | {r['masks']} | {r['reading']:.2f} | {r['computing']:.2f} | "
        f"{r['streaming']:.2f} | {r['ratio']:.2f} | {r['others']:.1f} |" for r in rows), ""])


def _workers(rows: list[Row]) -> str:
    (row,) = rows
    one, two = (row["medians"][number] for number in ("1", "2"))
    spent = ", ".join(f"{run['overhead']:.1%}" for run in row["runs"]["2"])
    runs = len(row["runs"]["1"])
    return (f"## Several workers\n\nA study of {len(row['tasks'])} embedded tasks by SmolLM2-135M ({row['limit']} "
            f"documents each, {row['jobs']} jobs), by workers of a local Ray cluster with one thread each, on "
            f"{row['cores']} cores; medians of {runs} runs in turns, from when all workers have loaded the model. One "
            f"worker takes {one:.1f} s, two take {two:.1f} s: {row['ratio']:.2f} times as fast. The order of the jobs "
            f"allows {row['schedule']:.2f}; two processes that only compute do {row['machine']:.2f} times the work of "
            f"one on this machine. The driver and Ray's own processes took {spent} of a core beside two workers.\n")


def _plan(rows: list[Row]) -> str:
    lines = ["## A plan's time", "", "Studies of SmolLM2-135M on embedded tasks: what `headcount plan --on cpu` said "
             "a moment before, and what the run took, loading and proofs of the model apart. The seconds that a job "
             "takes beside its operations were chosen on earlier runs of the first three; the last two are others. "
             "*Others* is how many cores other processes kept busy meanwhile.", "",
             "| study | jobs | threads | planned, s | taken, s | taken / planned | CPU, s | others |",
             "|---|--:|--:|--:|--:|--:|--:|--:|"]
    return "\n".join([*lines, *(
        f"| {r['study']} | {r['jobs']} | {r['threads']} | {r['planned']:.1f} | {r['seconds']:.1f} | "
        f"{r['seconds'] / r['planned']:.2f} | {r['cpu']:.1f} | {r['others']:.1f} |" for r in rows), ""])


def _middles(rows: list[Row]) -> str:
    lines = ["## A plan's layer-tokens", "", "Of masks whose orders a plan does not know: its bounds, their middle, "
             "and what a sweep of the masks of real orders computes, on 16 tasks, 0- and 1-shot "
             "(`python benchmarks/middles.py`). All jobs lay within their bounds; layer-tokens of all other jobs are "
             "exact. *Common* is by one order of all tasks: few orders, of which each model has its own.", "",
             "| model | masks | jobs | at least | middle | at most | real orders | middle / real |",
             "|---|---|--:|--:|--:|--:|--:|--:|"]
    for r in rows:
        bounds = " | ".join(f"{value:,.0f}" for value in r["bounds"])
        lines.append(f"| {r['model']} | {r['kind']} | {r['jobs']:,} | {bounds} | {r['run']:,.0f} | "
                     f"{r['bounds'][1] / r['run']:.3f} |")
    return "\n".join([*lines, ""])


def _part(kind: str) -> str:
    """What a kind of masks is a part of."""
    first = kind.partition(",")[0]
    return first if first in ("grid", "transfer") else "curves"


_SECTIONS: dict[str, Callable[[list[Row]], str]] = {
    "counts": _counts, "scoring": _scoring, "importance": _importance, "induction": _induction, "oracles": _oracles,
    "scaling": _scaling, "demo": _demo, "waiting": _waiting, "removal": _removal,
    "streaming": _streaming, "plan": _plan, "middles": _middles, "workers": _workers}
_MEMORY = Path(__file__).parent / "results" / "large" / "removal_memory.json"
_HEAD = """\
# Performance

`make bench` writes this page from stored measurements. A ratio compares two times of the same run; other figures are
counts. `python benchmarks/gpu.py` writes the section on GPUs.
"""
