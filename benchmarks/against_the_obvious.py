"""What importance, oracles and many masks cost, beside the obvious way of having them.

Times are medians of repetitions that alternate between the sides, with nothing else running.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headcount.engine.encode import encode
from headcount.engine.engine import Engine
from headcount.engine.forward import target_logprobs
from headcount.engine.likelihoods import Likelihoods
from headcount.engine.pack import Batch, batches, pack
from headcount.masks import Mask, prune, random_order
from headcount.measure.copying import PaperCopying, Reading, Watch, sound_copying
from headcount.measure.evaluate import Prepared, prepare, score
from headcount.measure.induction import prefix_matching
from headcount.measure.probes import probe_of
from headcount.measure.texts import LENGTHS, REPEATS, usable_tokens
from headcount.model.attention import attention_keywords, attention_seen, eager
from headcount.model.circuits import ov_copying
from headcount.model.load import LoadedModel, load
from headcount.study.ledger import Job, Ledger
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks

Row = dict[str, Any]


def importance(loaded: LoadedModel, data: Path, limit: int = 12, repetitions: int = 3) -> list[Row]:
    """One forward pass, all importances, and autograd with parameter gradients, over the same examples."""
    task = get_tasks(["piqa"], data=data)["piqa"]
    rows = []
    for k in (0, 5):
        prompts = task.prompts("examples", FewShot(k, limit))
        requests = encode(loaded.tokenizer, [p.pairs[p.gold] for p in prompts], loaded.max_length)
        budget = Engine.of(loaded).budget()
        packed = batches(pack([[r] for r in requests], budget, trees=False), budget, gradients=True)
        sides: dict[str, Callable[[], Any]] = {
            "forward": functools.partial(_forward, loaded, packed),
            "gradient": functools.partial(Engine.of(loaded).gradients, requests),
            "parameters": functools.partial(_with_parameters, loaded, packed)}
        if importlib.util.find_spec("transformer_lens") is not None:
            sides["transformer_lens"] = functools.partial(_with_transformer_lens, _bridge(loaded), packed)
        rows.append({"task": "piqa", "num_fewshot": k, "examples": len(requests), **_alternating(sides, repetitions)})
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
        _loss(loaded.model(input_ids=torch.from_numpy(batch.ids), use_cache=False).logits, batch).backward()
        loaded.model.zero_grad(set_to_none=True)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)


def _bridge(loaded: LoadedModel) -> Any:
    """TransformerLens around the same model object; it reads a folder for what the object does not tell."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = tempfile.mkdtemp()
    loaded.model.config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, hf_model=loaded.model, tokenizer=loaded.tokenizer, device="cpu")


def _with_transformer_lens(bridge: Any, packed: list[Batch]) -> None:
    """Activation x gradient of every head's and FFN's output, by hooks on the way forward and back."""
    wanted = [name for name in bridge.hook_dict if name.endswith(("attn.hook_z", "hook_mlp_out"))]
    for parameter in bridge.parameters():
        parameter.requires_grad_(True)
    forward: dict[str, torch.Tensor] = {}
    backward: dict[str, torch.Tensor] = {}
    there = [(name, lambda value, hook: forward.__setitem__(hook.name, value.detach())) for name in wanted]
    back = [(name, lambda value, hook: backward.__setitem__(hook.name, value.detach())) for name in wanted]
    for batch in packed:
        with bridge.hooks(fwd_hooks=there, bwd_hooks=back):
            _loss(bridge(torch.from_numpy(batch.ids)), batch).backward()
        for name, value in backward.items():
            (value * forward[name]).sum(-1)
        bridge.zero_grad(set_to_none=True)
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)


def _loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    chosen = logits[torch.from_numpy(batch.rows), torch.from_numpy(batch.positions)].float()
    return torch.nn.functional.cross_entropy(chosen, torch.from_numpy(batch.targets))


@torch.no_grad()
def induction(loaded: LoadedModel, data: Path, repetitions: int = 3) -> list[Row]:
    """Prefix matching and copying of every head, and eager forward passes of the same texts without logits."""
    rows = []
    with eager(loaded.model):
        told = attention_keywords(loaded.name, loaded.model, loaded.anatomy)
        once, reading = _timed(functools.partial(Reading.of, loaded, told))
        ov, _ = _timed(functools.partial(ov_copying, loaded.model, loaded.anatomy, reading.ends, reading.norms,
                                         probe_of(loaded, told, None)))
        for length in (LENGTHS[0], LENGTHS[3], LENGTHS[-1]):
            texts = max(1, 500 // length)
            tokens, _ = usable_tokens(loaded.tokenizer, loaded.model)
            own = np.stack([np.random.default_rng(i).choice(tokens, REPEATS * length, False) for i in range(texts)])
            unique = torch.from_numpy(own)
            repeated = unique[:, :length].repeat(1, REPEATS)
            sides: dict[str, Callable[[], Any]] = {
                "forward": functools.partial(reading.run, unique),
                "prefix_matching": functools.partial(_prefix_matching, reading, repeated, length),
                "copying": lambda unique=unique: _looked_at(reading, unique, sound_copying(reading, unique)),
                "paper_copying": functools.partial(_paper_copying, reading, unique)}
            rows.append({"length": length, "texts": texts, "tokens": unique.numel(), "once": once + ov,
                         **_alternating(sides, repetitions)})
    return rows


def _prefix_matching(reading: Reading, ids: torch.Tensor, length: int) -> None:
    def visit(layer: int, z: torch.Tensor, attention: torch.Tensor) -> None:
        prefix_matching(attention, length, REPEATS, 0)

    with attention_seen(reading.loaded.anatomy, visit):
        reading.run(ids)


def _looked_at(reading: Reading, ids: torch.Tensor, watch: Watch) -> None:
    with watch.over(reading.loaded.anatomy):
        reading.run(ids)
    if watch.result is not None:
        watch.result()


def _paper_copying(reading: Reading, ids: torch.Tensor) -> None:
    looks = PaperCopying(reading, ids)
    _looked_at(reading, ids, looks.attention())
    _looked_at(reading, ids.reshape(-1, 1), looks.values())


def oracles(loaded: LoadedModel, data: Path, limit: int = 40) -> list[Row]:
    """Wall time and layer-tokens of the FFN oracle and of the head oracle, by one evaluation's."""
    full = Mask.full(loaded.anatomy.heads_per_layer)
    layers, heads = loaded.anatomy.num_layers, loaded.anatomy.heads_per_layer[0]
    rows = []
    Engine.of(loaded).prove_sweep()
    ffns = [full.without_ffns([layer]) for layer in range(layers)]
    single = [full.without_heads([(i, h)]) for i in range(layers) for h in range(heads)]
    # All heads of long prompts are too much to be timed here.
    for name, task, num_fewshot, documents, masks in (
        ("all FFNs", "hellaswag", 5, limit, ffns), ("all heads", "copa", 0, limit // 2, single),
        ("all heads", "copa", 5, limit // 4, single),
    ):
        prepared = prepare(loaded, get_tasks([task], data=data)[task], FewShot(num_fewshot, documents))
        evaluation = wall = passes = 0.0
        for batch in prepared.batches:  # in turns, since a shared machine's speed drifts within minutes
            measure = functools.partial(_measured, loaded, prepared, batch)
            before, _ = _timed(functools.partial(measure, [full]))
            swept, measured = _timed(functools.partial(measure, masks))
            after, _ = _timed(functools.partial(measure, [full]))
            evaluation, wall = evaluation + (before + after) / 2, wall + swept
            passes += measured.layer_tokens / (prepared.tokens * layers)
        rows.append({"what": name, "task": task, "num_fewshot": num_fewshot, "masks": len(masks), "layers": layers,
                     "documents": len(prepared.prompts), "evaluation": evaluation, "wall": wall, "passes": passes})
    return rows


def _measured(loaded: LoadedModel, prepared: Prepared, batch: Batch, masks: list[Mask]) -> Likelihoods:
    packed = dataclasses.replace(prepared.packed, batches=(batch,))
    return Engine.of(loaded).loglikelihoods(packed, masks)


def scaling(loaded: LoadedModel, data: Path) -> list[Row]:
    """Seconds against number of masks, documents, layers and length of prompts; peak memory of a process each."""
    base = {"masks": 1, "documents": 16, "layers": 30, "shots": 5}
    cases = [base, *({**base, name: value} for name, values in
                     (("masks", (10, 100)), ("documents", (32, 64)), ("layers", (10, 20)), ("shots", (0, 1, 10)))
                     for value in values)]
    with tempfile.TemporaryDirectory() as folder:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        return [{**case, **_alone({**case, "model": folder, "data": str(data)})} for case in cases]


def _alone(case: dict[str, Any]) -> dict[str, float]:
    script = f"import against_the_obvious as a; a.measure_alone(**{case!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True,
                          check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_alone(*, masks: int, documents: int, layers: int, shots: int, model: str, data: str) -> None:
    """In a process of its own: measure a task of long prompts and print seconds, tokens and peak memory."""
    torch.set_num_threads(2)
    loaded = load(model, device="cpu")
    if layers < loaded.anatomy.num_layers:
        loaded = _shallow(loaded, layers)
    prepared = prepare(loaded, get_tasks(["piqa"], data=Path(data))["piqa"], FewShot(shots, documents))
    heads = loaded.anatomy.heads_per_layer
    chosen = [Mask.full(heads)] + [prune(heads, "head", random_order(sum(heads), i), 0.3) for i in range(1, masks)]
    Engine.of(loaded).budget()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    before = _peak()
    wall, measured = _timed(lambda: score(loaded, prepared, chosen))
    sys.stdout.write(json.dumps({
        "wall": wall, "tokens": prepared.tokens, "layer_tokens": measured.layer_tokens, "loaded": before,
        "peak": _peak()}) + "\n")


def _peak() -> float:
    """The largest resident memory so far, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def demo(loaded: LoadedModel, data: Path) -> list[Row]:
    """The whole demo in an empty folder, as a user runs it."""
    del data
    with tempfile.TemporaryDirectory() as folder:
        before = _gflops(loaded)
        wall = _command("demo", "--out", f"{folder}/demo")
        after = _gflops(loaded)
        starting = _command("demo", "--out", f"{folder}/another", "--dry-run")
        report = _command("report", f"{folder}/demo")
        kinds: dict[str, tuple[int, float, int]] = {}
        work = 0.0
        for entry in Ledger(Path(folder) / "demo").entries():
            kind = _kind(entry.job)
            n, seconds, tokens = kinds.get(kind, (0, 0.0, 0))
            kinds[kind] = (n + 1, seconds + entry.info["seconds"], tokens + entry.info.get("layer_tokens", 0))
            work += _operations(loaded, entry.info)
    return [{"wall": wall, "measuring": sum(s for _, s, _ in kinds.values()), "kinds": kinds, "starting": starting,
             "report": report,
             "gflops": (before, after), "floor": work / 1e9 / ((before + after) / 2)}]


def _command(*arguments: str) -> float:
    """Seconds that a process of headcount's takes."""
    return _timed(lambda: subprocess.run([sys.executable, "-m", "headcount", *arguments], check=True,
                                         capture_output=True))[0]


def _kind(job: Job) -> str:
    if job["kind"] != "evaluation":
        return f"{job['method']}"
    curve = job["curve"]
    return "full model" if curve["order"] == "none" else f"{curve['component']}s, {curve['order']}"


def _operations(loaded: LoadedModel, info: dict[str, Any]) -> float:
    """Of the blocks' matrix products in an evaluation, FFNs that are off left out; attention's own are not counted."""
    if not info.get("layer_tokens"):
        return 0.0
    anatomy = loaded.anatomy
    ffn = anatomy.parameters_per_ffn(0)
    other = sum(p.numel() for p in anatomy.layers[0].block.parameters()) - ffn
    kept = 1 - sum(m["ffns_removed"] for m in info["masks"]) / (len(info["masks"]) * anatomy.num_layers)
    return 2.0 * float(info["layer_tokens"]) * (other + kept * ffn)


def _gflops(loaded: LoadedModel) -> float:
    """Matrix products of 256 rows by the FFN's first matrix, for a second."""
    d_model = loaded.anatomy.layers[0].d_model
    rows = torch.randn(256, d_model)
    weight = torch.randn(loaded.anatomy.parameters_per_ffn(0) // (3 * d_model), d_model)
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < 1:
        torch.nn.functional.linear(rows, weight)
        n += 1
    return 2e-9 * n * rows.numel() * len(weight) / (time.perf_counter() - started)


def _shallow(loaded: LoadedModel, layers: int) -> LoadedModel:
    """The same model without its upper layers."""
    from headcount.model.load import wrap

    model: Any = loaded.model
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return wrap(model, loaded.tokenizer, "shallow")


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def _alternating(sides: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repetitions + 1):
        for name, work in sides.items():
            seconds = _timed(work)[0]
            if turn:  # the first warms up
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}
