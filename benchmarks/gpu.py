"""Model FLOP utilisation of every measurement, on random weights of real shapes; made for GPUs, runs on any device.

`python benchmarks/gpu.py` measures OPT-125m, 1.3B, 6.7B and Llama-3-8B, each resident (all weights on the device) and
streamed (weights in files, block by block), prints a table, keeps it in benchmarks/results/gpu_DEVICE.json, and writes
docs/performance.md anew. Every shape is written as a checkpoint of random weights first (bfloat16: 13 GB of 6.7B; into
a temporary folder, or where --folder says, which keeps it). What does not fit is skipped, and what fails is a row that
says so.

plain       the same rows, as plain causal ones, through the unmodified model; logits of the last position of each
lm-eval     lm_eval.models.huggingface.HFLM given the same requests, on the same model
scoring     log-likelihoods of all requests under the full model
gradients   importance of all heads and FFNs, on one option of each document
oracle      scoring with single FFNs off: as many masks as layers
sweep       scoring under ten masks: the full model, and 10 to 90 % of heads off by one random order

The documents are random tokens: shots that all share, a question each, four options of eight tokens, all of one length,
so that hardly anything is padded. Needed operations are those that `headcount plan` counts, positions that blocks
computed for several masks once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from headcount.engine.waiting import wait_asleep

wait_asleep()

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

import random_checkpoint
from gpu_page import table
from headcount.engine import neighbours
from headcount.engine.budget import threads_of
from headcount.engine.encode import Request
from headcount.engine.engine import Engine, Packed
from headcount.engine.pack import Budget, batches, pack
from headcount.errors import HeadcountError, OptionError
from headcount.masks import Mask, prune, random_order
from headcount.model.devices import on_device
from headcount.model.load import LoadedModel, load
from headcount.model.placement import filled, free_memory, placement
from headcount.model.without_weights import Shape, bundled_shapes, shape_of
from headcount.study.costs import flops_of, memory_of
from headcount.study.devices import device_of
from headcount.study.plan import GRADIENT_PASSES
from headcount.study.tokens import Work

Row = dict[str, Any]
WAYS = ("resident", "streamed")
SHAPES = {"opt-125m": "facebook/opt-125m", "opt-1.3b": "facebook/opt-1.3b", "opt-6.7b": "facebook/opt-6.7b",
          "opt-13b": "facebook/opt-13b", "llama-3-8b": "meta-llama/Meta-Llama-3-8B", "tiny": None}
DEFAULT = ("opt-125m", "opt-1.3b", "opt-6.7b", "llama-3-8b")
# Devices whose peak `headcount plan` knows, by the names under which drivers tell them.
_KNOWN = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100",
          "NVIDIA GeForce RTX 4090": "4090"}
_OPTION_TOKENS, _QUESTION_TOKENS = 8, 60
# lm-eval's batch size is the largest of these whose logits, three times over, fit into this share of free memory.
_BATCH_SIZES, _LOGITS_SHARE = (64, 16, 4, 1), 0.25
_ROOT = Path(__file__).resolve().parents[1]


class Measurement(NamedTuple):
    """One of a model's measurements.

    Attributes:
        what: Its name.
        run: Does it and gives the layer-tokens that it computed.
        work: What one pass over its documents computes.
        masks: How many times logits are wanted.
    """

    what: str
    run: Callable[[], int]
    work: Work
    masks: int = 1


class Peak(NamedTuple):
    """FLOP/s that the device computes at most, and who says so; None where nobody does."""

    flops: float | None
    source: str


def config_of(name: str) -> PreTrainedConfig:
    """The config of one of `SHAPES`."""
    bundled = SHAPES[name]
    if bundled is None:
        return AutoConfig.for_model("opt", vocab_size=2048, hidden_size=64, word_embed_proj_dim=64, ffn_dim=256,
                                    num_hidden_layers=2, num_attention_heads=4)
    known = bundled_shapes()[bundled]
    return AutoConfig.for_model(known["model_type"], **known["config"])


def shape_without_weights(config: PreTrainedConfig, dtype: str, device: str) -> Shape:
    """The shape of a config, for counting operations and memory."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return shape_of(folder, dtype=dtype, device=device)


def documents(vocabulary: int, number: int, shots: int) -> list[list[Request]]:
    """Shots that all share, then a question each, then four options."""
    rng = np.random.default_rng(0)
    shared = rng.integers(2, vocabulary, shots)
    made = []
    for _ in range(number):
        context = np.concatenate([shared, rng.integers(2, vocabulary, _QUESTION_TOKENS)])
        options = [rng.integers(2, vocabulary, _OPTION_TOKENS) for _ in range(4)]
        made.append([Request(np.concatenate([context, o])[:-1], o) for o in options])
    return made


def budget_of(engine: Engine, loaded: LoadedModel) -> Budget:
    """The engine's own, but with rows that fit into the window: a plain forward pass reads them, too."""
    budget = engine.budget()
    return dataclasses.replace(budget, longest_row=min(budget.longest_row, loaded.max_length))


def measurements(loaded: LoadedModel, docs: Sequence[Sequence[Request]], budget: Budget) -> list[Measurement]:
    """All measurements of a model."""
    engine = Engine.of(loaded)
    packed, requests = engine.pack(docs, budget), [request for doc in docs for request in doc]
    examples = [doc[0] for doc in docs]
    scored = Work.of(packed.batches)
    single = Work.of(batches(pack([[r] for r in requests], budget, trees=False), budget))
    alone = Work.of(batches(pack([[r] for r in examples], budget, trees=False), budget, gradients=True))
    layers, heads = loaded.anatomy.num_layers, loaded.anatomy.heads_per_layer
    full = Mask.full(heads)
    order = random_order(sum(heads), 0)
    curve = [prune(heads, "head", order, step / 10) for step in range(10)]
    singles = [full.without_ffns([layer]) for layer in range(layers)]

    def gradients() -> int:
        engine.gradients(examples, budget=budget)
        return int(GRADIENT_PASSES * layers * alone.tokens)

    def swept(masks: Sequence[Mask]) -> Callable[[], int]:
        return lambda: engine.loglikelihoods(packed, masks).layer_tokens

    last = dataclasses.replace(scored, places=sum(len(batch.lengths) for batch in packed.batches))
    return [Measurement("plain", lambda: _plain(loaded, packed), last),
            Measurement("lm-eval", _lm_eval(loaded, requests, layers * int(single.tokens)), single),
            Measurement("scoring", swept([full]), scored),
            Measurement("gradients", gradients, alone, GRADIENT_PASSES),
            Measurement("oracle", swept(singles), scored, len(singles)),
            Measurement("sweep", swept(curve), scored, len(curve))]


@torch.no_grad()
def _plain(loaded: LoadedModel, packed: Packed) -> int:
    for batch in packed.batches:
        loaded.model(input_ids=on_device(batch.ids, loaded.device), use_cache=False, logits_to_keep=1)
    return loaded.anatomy.num_layers * packed.tokens


def _lm_eval(loaded: LoadedModel, requests: Sequence[Request], layer_tokens: int) -> Callable[[], int]:
    """lm-eval's side, which is made when it first runs: whatever fails there is that measurement's alone."""
    made: list[Any] = []

    def run() -> int:
        from lm_eval.models.huggingface import HFLM

        if not made:
            made.append(HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=loaded.max_length,
                             batch_size=_batch_size(loaded, max(len(r.ids) for r in requests))))
            made[0]._device = loaded.device  # of weights in files it is told none
            made.append([(("", ""), r.ids[: len(r.ids) + 1 - len(r.targets)].tolist(), r.targets.tolist())
                         for r in requests])
        made[0]._loglikelihood_tokens(made[1], disable_tqdm=True)
        return layer_tokens

    return run


def _batch_size(loaded: LoadedModel, length: int) -> int:
    each = 3 * length * int(loaded.model.config.get_text_config().vocab_size) * loaded.model.dtype.itemsize
    free = _LOGITS_SHARE * free_memory(loaded.device)
    return next((size for size in _BATCH_SIZES if size * each <= free), _BATCH_SIZES[-1])


def measured(loaded: LoadedModel, shape: Shape, one: Measurement, repetitions: int, peak: Peak) -> Row:
    """One measurement, timed: seconds, operations, and memory; or why it failed."""
    device, cuda = loaded.device, loaded.device.type == "cuda"
    row: Row = {"what": one.what, "device": device.type, "tokens": int(one.work.tokens)}
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        layer_tokens = one.run()  # warms up
        times = []
        with neighbours.watch(threads_of(loaded)) as cores:
            for _ in range(repetitions):
                _synchronize(device)
                started = time.perf_counter()
                one.run()
                _synchronize(device)
                times.append(time.perf_counter() - started)
    except (HeadcountError, RuntimeError) as error:
        return row | {"failed": _line(error)}
    finally:
        if cuda:
            torch.cuda.empty_cache()
    seconds, flops = statistics.median(times), flops_of(shape, one.work, layer_tokens / one.work.tokens, one.masks)
    return row | {"layer_tokens": layer_tokens, "seconds": seconds, "times": times, "flops": flops,
                  "others": cores.others,
                  "utilisation": None if peak.flops is None else flops / seconds / peak.flops,
                  "peak_memory": torch.cuda.max_memory_allocated(device) if cuda else None}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def lacking(shape: Shape, way: str, device: str, longest: int) -> str:
    """Why a shape cannot be measured in a way, by its window and the memory that is free; empty where it can."""
    if longest > shape.max_length:
        return f"a document has {longest} tokens, the model's window {shape.max_length}: give fewer --shots"
    memory = memory_of(shape, Budget(), longest)
    needed = memory.resident if way == "resident" else memory.streamed
    free = free_memory(device) * filled(torch.device(device).type)
    return "" if needed <= free else f"needs {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free"


@contextlib.contextmanager
def checkpoint(name: str, config: PreTrainedConfig, shape: Shape, kept: Path | None) -> Iterator[Path]:
    """A folder with random weights of a shape; goes away again unless a place is named.

    Raises:
        OSError: If there is no room for it.
    """
    needed = shape.anatomy.num_parameters * shape.model.dtype.itemsize
    with contextlib.ExitStack() as opened:
        place = kept or Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="headcount-gpu-")))
        place.mkdir(parents=True, exist_ok=True)
        folder = place / f"{name}-{shape.dtype}"
        if not (folder / "config.json").is_file():
            free = shutil.disk_usage(place).free
            if free < needed:
                raise OSError(f"needs {needed / 1e9:,.1f} GB of disk, {free / 1e9:,.1f} GB are free: name another "
                              "folder with --folder")
            words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})),
                                            **dict.fromkeys(("unk_token", "eos_token"), "a"))
            random_checkpoint.write(folder, config, shape.model.dtype, words)
        yield folder


def rows_of(name: str, options: argparse.Namespace, peak: Peak) -> Iterator[Row]:
    """All measurements of a shape, resident and streamed."""
    config = config_of(name)
    shape = shape_without_weights(config, options.dtype, options.device)
    docs = documents(int(config.vocab_size), options.documents, options.shots)
    reasons = {way: lacking(shape, way, options.device, len(docs[0][0].ids)) for way in options.ways}
    for way in (way for way in options.ways if reasons[way]):
        yield {"model": name, "way": way, "skipped": reasons[way]}
    if all(reasons.values()):
        return
    budget: Budget | None = None
    plain: float | None = None  # seconds an operation of the resident plain pass
    with checkpoint(name, config, shape, options.folder) as folder:
        for way in (way for way in options.ways if not reasons[way]):
            try:
                loaded = load(folder, device=options.device) if way == "resident" else load(folder, stream=True)
                # The same rows and batches in both ways.
                budget = budget or budget_of(Engine.of(loaded), loaded)
                todo = measurements(loaded, docs, budget)
            except (HeadcountError, RuntimeError) as error:
                yield {"model": name, "way": way, "failed": _line(error)}
                continue
            # The peak is that of the device that was asked for.
            own = peak if loaded.device.type == torch.device(options.device).type else Peak(None, "")
            for one in todo:
                row = measured(loaded, shape, one, options.repetitions, own)
                if "failed" not in row:
                    pace = row["seconds"] / row["flops"]
                    plain = pace if (way, one.what) == ("resident", "plain") else plain
                    row["over_plain"] = None if plain is None else pace / plain
                yield {"model": name, "way": way, "batch_tokens": budget.batch_tokens, **row}
            del loaded, todo, one
            gc.collect()
            torch.cuda.empty_cache()  # memory that torch keeps is not free for the next one


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]


def peak_of(options: argparse.Namespace, title: str) -> Peak:
    """What the device computes at most: as told, or by its maker's data sheet."""
    if options.peak_tflops is not None:
        return Peak(options.peak_tflops * 1e12, "--peak-tflops")
    if title in _KNOWN:
        known = device_of(_KNOWN[title], 0, 0, options.dtype)
        return Peak(known.peak[options.dtype], known.source)
    return Peak(None, "not known: give it with --peak-tflops")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the shapes that are named, keep what was measured, print the table and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)} (default: "
                        f"{' '.join(DEFAULT)})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
                        help="(default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: both)")
    parser.add_argument("--documents", type=int, default=64, help="how many (default: %(default)s)")
    parser.add_argument("--shots", type=int, default=400, help="tokens of the shots before every document (default: "
                        "%(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="timed after one that warms up; the median counts "
                        "(default: %(default)s)")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak at this type (default: of "
                        f"{', '.join(_KNOWN.values())} the data sheet's)")
    parser.add_argument("--folder", type=Path,
                        help="where checkpoints are written, and kept (default: a temporary folder)")
    parser.add_argument("--kept", type=Path, default=_ROOT / "benchmarks" / "results",
                        help="the folder of gpu_DEVICE.json and the page's other results (default: benchmarks/results)")
    parser.add_argument("--page", type=Path, default=_ROOT / "docs" / "performance.md",
                        help="(default: docs/performance.md)")
    options = parser.parse_args(arguments)
    if unknown := sorted({*options.shapes} - {*SHAPES}):
        parser.error(f"there is no shape {unknown[0]!r}: name some of {', '.join(SHAPES)}")
    if min(options.documents, options.shots, options.repetitions) < 1:
        parser.error("--documents, --shots and --repetitions are at least 1")
    try:
        placement(options.device, None)
    except OptionError as error:
        parser.error(str(error))
    kind = torch.device(options.device).type
    options.kept.mkdir(parents=True, exist_ok=True)
    file = options.kept / f"gpu_{kind}.json"
    title = torch.cuda.get_device_name(options.device) if kind == "cuda" else f"{platform.machine()} {kind}"
    peak = peak_of(options, title)
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers", "lm_eval"))
    threads = f", {torch.get_num_threads()} threads" if kind == "cpu" else ""
    result: dict[str, Any] = {
        "when": f"{datetime.date.today().isoformat()}, {title}{threads}, {versions}", "device": title,
        "kind": kind, "dtype": options.dtype, "peak": peak.flops, "peak_source": peak.source,
        "documents": options.documents, "shots": options.shots, "repetitions": options.repetitions, "rows": []}
    for name in options.shapes or DEFAULT:
        try:
            for row in rows_of(name, options, peak):
                _keep(file, result, row)
        except (HeadcountError, RuntimeError, OSError) as error:
            _keep(file, result, {"model": name, "way": "", "skipped": _line(error)})
    sys.stdout.write("\n".join(table(result)) + "\n")
    from performance_page import write

    write(options.kept, options.page)


def _keep(file: Path, result: dict[str, Any], row: Row) -> None:
    """Row by row, so that what was measured is there whatever happens."""
    result["rows"].append(row)
    file.write_text(json.dumps(result), encoding="utf-8")
    told = f"{row['seconds']:.2f} s" if "seconds" in row else row.get("failed") or row["skipped"]
    sys.stderr.write(f"{row['model']} {row['way']} {row.get('what', '')}: {told}\n")


if __name__ == "__main__":
    main()
