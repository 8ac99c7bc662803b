"""The figures of docs/opt-66b.md: `python benchmarks/opt66b_page.py` computes them anew and puts them into the page.

The page's text is written by hand. What stands between `<!-- NAME -->` and `<!-- end -->` is written here: the plan's
output, the same by what is left out, what the paper's way costs, and what `real_shape.py` has kept.

The paper's way is the same jobs as its code does them, counted as the plan counts: one forward pass for each mask over
all requests, each request a row of its own; for gradients a forward and a backward pass over each example, padded to
the window (docs/paper.md). Padding of evaluated batches is left out, and so are gradients of weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headcount.engine.pack import Budget
from headcount.study.costs import flops_of
from headcount.study.forecast import Forecast, forecast
from headcount.study.jobs import Evaluation, GradientImportance, Job
from headcount.study.masksets import FullModel, Grid, RandomCurve, SingleFFNs, Transfer, steps_of
from headcount.study.plan import GRADIENT_PASSES
from headcount.study.spec import PRESETS, StudySpec
from headcount.study.tokens import Bundled, Reading, Work

MODEL, PRESET = "facebook/opt-66b", "opt66b-study"
DEVICES = ("h100", "h200", "8xh100", "4090")
# The whole study, and what is left of it by options: each in addition to the one before.
CUTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("the whole study", {}),
    ("`--shared-shots`", {"shared_shots": True}),
    ("and `--transfer-limit 500 --grid-limit 500`", {"transfer_limit": 500, "grid_limit": 500}),
    ("and `--limit 500 --importance-limit 500`", {"limit": 500, "importance_limit": 500}),
    ("and `--transfer-limit 100 --grid-limit 100`", {"transfer_limit": 100, "grid_limit": 100}),
    ("and no grid and transfer: `--measure curves induction --unseen`",
     {"measure": ("curves", "induction"), "unseen": ()}),
)
_ROOT = Path(__file__).resolve().parents[1]
PAGE = _ROOT / "docs" / "opt-66b.md"
SHAPE_RUN = _ROOT / "benchmarks" / "results" / "large" / "real_shape.json"


def blocks() -> dict[str, str]:
    """What stands in the page, by name."""
    whole = planned({})
    return {"plan": plan_output(), "machines": machines(), "paper": papers_way(whole), "shape": shape_run()}


def filled(text: str, by_name: Mapping[str, str]) -> str:
    """A page with what is computed in its places."""
    for name, block in by_name.items():
        text, found = re.subn(rf"(?s)<!-- {name} -->\n.*?<!-- end -->",
                              lambda _, block=block, name=name: f"<!-- {name} -->\n{block}\n<!-- end -->", text)
        if found != 1:
            raise ValueError(f"{PAGE.name} has {found} places for {name}")
    return text


def planned(options: Mapping[str, Any]) -> Forecast:
    """The plan of the paper's whole study under other options."""
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in PRESETS[PRESET].items()}
    return forecast(StudySpec(**{"model": MODEL} | known | dict(options)), on=DEVICES)


def plan_output() -> str:
    """What the command prints, on a machine that has neither model nor documents."""
    command = ["headcount", "plan", MODEL, "--preset", PRESET, "--on", *DEVICES]
    with tempfile.TemporaryDirectory() as nothing:
        env = {**os.environ, "COLUMNS": "100", "HF_HOME": nothing, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": nothing}
        told = subprocess.run([sys.executable, "-m", *command], env=env, capture_output=True, text=True, check=True)
    lines = (line.rstrip() for line in told.stdout.splitlines())
    return "\n".join(["```", f"$ {' '.join(command)}", *lines, "```"])


def machines() -> str:
    """Hours on every machine, as more and more is left out."""
    lines = ["| | FLOPs | jobs | " + " | ".join(DEVICES) + " | reading, once a pass |",
             "|---|--:|--:|" + "--:|" * (len(DEVICES) + 1)]
    options: dict[str, Any] = {}
    for what, more in CUTS:
        known = planned(options := options | dict(more))
        streamed = next(one for one in known.devices if one.way == "streamed")
        lines.append(f"| {what} | {power(known.total.flops)} | {len(known.jobs):,} | "
                     + " | ".join(hours(one.hours) for one in known.devices) + f" | {hours(streamed.reading)} |")
    return "\n".join(lines)


def papers_way(known: Forecast) -> str:
    """The same jobs as headcount does them, and as the paper's code does."""
    reading = Reading(None, known.shape.max_length, Budget(), trees=False, tree_tokens=None, chat=False,
                      seed=known.spec.seed, shared=False)
    documents = {one.name: Bundled(one.name, reading) for one in known.tasks}
    rate = known.devices[0].device.flops(known.shape.dtype) * 3600
    found: dict[str, list[float]] = {}
    for planned_job, cost in zip(known.jobs, known.costs, strict=True):
        job = planned_job.job
        if cost is None or not cost.flops:
            continue
        one = found.setdefault(part_of(job), [0.0, 0.0, 0.0, 0.0])
        tokens, flops = by_themselves(known, job, documents) or (cost.layer_tokens.middle, cost.flops)
        for i, value in enumerate((cost.layer_tokens.middle, cost.flops, tokens, flops)):
            one[i] += value
    found["all"] = [sum(values) for values in zip(*found.values(), strict=True)]
    lines = ["| part | layer-tokens | FLOPs | hours | the paper's way: layer-tokens | FLOPs | hours | times as much |",
             "|---|" + "--:|" * 7]
    for part, (tokens, flops, their_tokens, their_flops) in found.items():
        lines.append(f"| {part} | {power(tokens)} | {power(flops)} | {hours(flops / rate)} | {power(their_tokens)} | "
                     f"{power(their_flops)} | {hours(their_flops / rate)} | {their_flops / flops:.1f} |")
    return "\n".join(lines)


def part_of(job: Job) -> str:
    """What of the study a job belongs to."""
    if isinstance(job, GradientImportance):
        return "gradients"
    if not isinstance(job, Evaluation):
        return "induction"
    return {FullModel: "full model", SingleFFNs: "FFN oracle", Grid: "grid", Transfer: "transfer",
            RandomCurve: "random orders"}.get(type(job.masks), "curves")


def by_themselves(known: Forecast, job: Job, documents: Mapping[str, Bundled]) -> tuple[float, float] | None:
    """Layer-tokens and FLOPs of a job where every mask and every request is computed by itself; None of induction."""
    shape, layers = known.shape, known.shape.anatomy.num_layers
    if isinstance(job, GradientImportance):
        places = documents[job.task].work("examples", job.num_fewshot, job.documents, "gradient").places
        work, masks = Work(job.documents * shape.max_length, job.documents * shape.max_length**2, places), (
            GRADIENT_PASSES)
    elif isinstance(job, Evaluation):
        work, masks = documents[job.task].work(job.split, job.num_fewshot, job.documents), max(
            1, len(steps_of(job.masks)))
    else:
        return None
    return work.tokens * layers * masks, flops_of(shape, work, layers * masks, masks)


def shape_run() -> str:
    """What the study of random weights of this shape took, beside its plan."""
    return "Not run." if not SHAPE_RUN.is_file() else shape_figures(json.loads(SHAPE_RUN.read_text(encoding="utf-8")))


def shape_figures(found: Mapping[str, Any]) -> str:
    """The same, from what was kept."""
    plan = found["plan"]
    parts = {name: found[name] for name in ("study", "removal", "induction") if name in found}
    took = ", ".join(f"{name} {one['seconds'] / 60:.1f} min" for name, one in parts.items())
    busy = max(one["others"] for one in parts.values())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"{found['date']}, {found['machine']}, {found['threads']} threads, {found['memory'] / 1e9:.0f} GB of memory, "
        f"{versions}: {found['layers']} layers, {plan['parameters'] / 1e9:.1f} billion parameters, "
        f"{plan['weights'] / 1e9:.1f} GB; two embedded tasks of {found['documents']} documents, one shot, "
        f"{plan['jobs']} jobs. With loading and proving the model: {took}."
        + (f" Other processes kept up to {busy:.1f} of the cores busy meanwhile, so that times are rough."
           if busy >= 0.1 else ""), "",
        *_memory(found), "", *_passes(found), "", *_readings(found), "", *_removal(found), "", *_induction(found)]
    return "\n".join(lines)


def _memory(found: Mapping[str, Any]) -> list[str]:
    plan, study = found["plan"], found["study"]
    rows = [("two blocks", 2 * plan["block"]), ("a batch", plan["batch"]), ("what waits, at most", plan["waiting"]),
            ("what the process had before it read weights", study["base"])]
    told = sum(size for _, size in rows)
    return ["| memory | GB |", "|---|--:|", *(f"| {what} | {size / 1e9:.2f} |" for what, size in rows),
            f"| together, as planned | {told / 1e9:.2f} |",
            f"| the most that was seen while the study loaded and proved the model | "
            f"{study['peaks']['proofs'] / 1e9:.2f} |",
            f"| the most that was seen while jobs were done | {study['peaks']['jobs'] / 1e9:.2f} |",
            *(f"| the most that was seen in {what} | {max(found[what]['peaks'].values()) / 1e9:.2f} |"
              for what in ("removal",) if what in found), *_induction_memory(found), "",
            "Seen is anonymous memory, looked at every 20 ms: without pages of files, which the system drops when it "
            "needs the room."]


def _induction_memory(found: Mapping[str, Any]) -> list[str]:
    if "induction" not in found:
        return []
    plan, one = found["plan"], found["induction"]
    told = one["base"] + 2 * plan["block"] + plan["maps"] + plan["rows"]
    return [f"| induction, as planned: two blocks, maps and work on rows ({plan['maps'] / 1e9:.2f}), rows that "
            f"wait ({plan['rows'] / 1e9:.2f}), and what the process had | {told / 1e9:.2f} |",
            f"| the most that was seen in induction | {max(one['peaks'].values()) / 1e9:.2f} |"]


def _passes(found: Mapping[str, Any]) -> list[str]:
    plan, layers = found["plan"], found["layers"]
    lines = ["| pass | passes | layer-tokens | computing, s a block | waiting for the next block, s | GFLOP/s |",
             "|---|" + "--:|" * 5]
    blocks = [one for one in found["study"]["blocks"] if one["phase"] == "jobs"]
    for kind in dict.fromkeys(one["kind"] for one in blocks):
        own = [one for one in blocks if one["kind"] == kind]
        seconds, waited, tokens = (sum(one[what] for one in own) for what in ("seconds", "waiting", "positions"))
        # Backwards a block is computed once more, and its gradient by what it was given.
        times = 2 if kind == "gradients, backwards" else 1
        lines.append(f"| {kind} | {len(own) / layers:.0f} | {tokens:,} | {seconds / len(own):.2f} | "
                     f"{waited / len(own):.2f} | {times * 2 * tokens * plan['active'] / seconds / 1e9:.0f} |")
    low, middle, high = plan["layer_tokens"]
    of_jobs = [one for one in blocks if one["kind"] != "proof"]
    seconds, waited = (sum(one[what] for one in of_jobs) for what in ("seconds", "waiting"))
    beside = plan["jobs"] * plan["job_seconds"]
    first = plan["seconds"] - max(plan["computing"], plan["reading"])
    return [*lines, "",
            f"Layer-tokens: {sum(one['positions'] for one in of_jobs):,} in the run; planned about {middle:,.0f}, "
            f"between {low:,.0f} and {high:,.0f}. *Proof* is contract 3, which the first job needs. GFLOP/s "
            "count blocks in full, also those whose FFN is removed and not computed. The jobs' blocks took "
            f"{seconds:.1f} s to compute and {waited:.1f} s to wait for, {seconds + waited:.1f} s together. The plan "
            f"says {plan['seconds']:.1f} s: {plan['computing'] - beside:.1f} s at {plan['rate'] / 1e9:.0f} GFLOP/s, "
            f"{beside:.1f} s for what {plan['jobs']} jobs do besides, and {first:.1f} s for the first block of each "
            f"pass at {plan['read_speed'] / 1e9:.1f} GB/s, which this disk was timed at beforehand (`--read-speed`); "
            "in a model of three layers every third block is one."]


def _readings(found: Mapping[str, Any]) -> list[str]:
    plan, readings = found["plan"], found["study"]["readings"]
    ahead = [one for one in readings if one["ahead"]]
    of = {phase: sum(one["bytes"] for one in readings if one["phase"] == phase) for phase in ("proofs", "jobs")}
    seconds = sum(one["seconds"] for one in ahead) / len(ahead)
    scoring, gradients = plan["passes"]
    return [f"Reading a block ahead took {seconds:.2f} s ({plan['block'] / 1e9 / seconds:.1f} GB/s), from the disk, "
            "beside computing and other processes: what was read is dropped from the file cache. The jobs read "
            f"{of['jobs'] / 1e9:.0f} GB, {of['jobs'] / plan['weights']:.1f} times the weights; planned were "
            f"{scoring + gradients} times ({scoring} to score, {gradients} for gradients). Loading, hashing and "
            f"proving the model read {of['proofs'] / 1e9:.0f} GB, {of['proofs'] / plan['weights']:.1f} times the "
            "weights."]


def _removal(found: Mapping[str, Any]) -> list[str]:
    if "removal" not in found:
        return ["The removal was not run."]
    blocks, logits = (proof["largest"] for proof in found["removal"]["proofs"])
    before, after = (found["removal"]["saved"][name] for name in ("parameters", "parameters_left"))
    return [f"`headcount remove --stream`, of 67 % of the heads and one FFN by that study: {before / 1e6:,.0f} million "
            f"parameters became {after / 1e6:,.0f}; blocks differ from the masked model's by at most {blocks:.1e} "
            f"standard deviations while they are written, and logits of the written model by at most {logits:.1e} of "
            "their range."]


def _induction(found: Mapping[str, Any]) -> list[str]:
    if "induction" not in found:
        return ["Induction was not run."]
    one, weights = found["induction"], found["plan"]["weights"]
    lines = []
    for kind in ("texts", "probes"):
        own = [block for block in one["blocks"] if block["kind"] == f"induction, {kind}"]
        seconds, waited = (sum(block[what] for block in own) / len(own) for what in ("seconds", "waiting"))
        lines.append(f"{kind} ({own[0]['positions']:,} positions a block) took {seconds:.1f} s a block, and "
                     f"{waited:.1f} s to wait for it")
    read = sum(reading["bytes"] for reading in one["readings"])
    return [f"`headcount induction --stream`, one text of each kind: {'; '.join(lines)}. With loading, hashing and "
            f"proving the model it read {read / 1e9:.0f} GB, {read / weights:.1f} times the weights."]


def hours(number: float) -> str:
    """A number of hours, in days where they are many."""
    return f"{number:.1f} h" if number < 100 else f"{number:,.0f} h"


def power(number: float) -> str:
    """As the plan writes large numbers."""
    return f"{number:.2e}".replace("e+", "e")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), blocks()), encoding="utf-8")
