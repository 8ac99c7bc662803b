"""Model FLOP utilisation of every measurement, on random weights of real shapes; made for GPUs, runs on any device.

`python benchmarks/gpu.py --peak-tflops 989` prints, per model and measurement, tokens per second and the share of the
device's peak that the needed operations make up. Needed are, for a token of a row of n, 2 x (parameters of the blocks)
and 4 x n x d_model per layer for attention; a backward pass through activations alone needs as much again. Layers that
masks share count once. The documents are random tokens: 64 of them behind five shots, four options each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from headcount.engine.waiting import wait_asleep

wait_asleep()

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from headcount.engine.encode import Request
from headcount.engine.engine import Engine
from headcount.engine.pack import Batch, Budget, batches, pack
from headcount.masks import Mask, prune, random_order
from headcount.model.load import LoadedModel, wrap


def _opt(d_model: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "opt", "hidden_size": d_model, "word_embed_proj_dim": d_model, "num_hidden_layers": layers,
            "num_attention_heads": heads, "ffn_dim": 4 * d_model}


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _opt(64, 2, 4),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "llama-3-8b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                   "max_position_embeddings": 8192},
}


def model_of(shape: str, device: str, dtype: torch.dtype) -> LoadedModel:
    """A model of that shape with random weights, made on the device."""
    config = AutoConfig.for_model(**SHAPES[shape])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    words = Tokenizer(models.WordLevel({"a": 0}))
    return wrap(model, PreTrainedTokenizerFast(tokenizer_object=words), shape)


def documents(vocabulary: int, number: int, shots: int) -> list[list[Request]]:
    """Shots, then a question each, then four options."""
    rng = np.random.default_rng(0)
    shared = rng.integers(2, vocabulary, shots)
    made = []
    for _ in range(number):
        context = np.concatenate([shared, rng.integers(2, vocabulary, 60)])
        options = [rng.integers(2, vocabulary, 8) for _ in range(4)]
        made.append([Request(np.concatenate([context, o])[:-1], o) for o in options])
    return made


def measure(loaded: LoadedModel, number: int, shots: int) -> list[tuple[str, int, float, float]]:
    """Per measurement: tokens, seconds and needed operations."""
    docs = documents(loaded.model.config.vocab_size, number, shots)
    engine = Engine.of(loaded)
    budget, packed = engine.budget(), engine.pack(docs)
    layers, heads = loaded.anatomy.num_layers, loaded.anatomy.heads_per_layer
    full = Mask.full(heads)
    singles = [full.without_ffns([layer]) for layer in range(layers)]
    curve = [prune(heads, "head", random_order(sum(heads), 0), f / 10) for f in range(1, 10)]
    rows = []
    for what, masks in (("one mask", [full]), ("nine masks of a curve", curve), ("FFN oracle", singles)):
        seconds, result = _timed(loaded, lambda masks=masks: engine.loglikelihoods(packed, masks))
        passes = result.layer_tokens / (layers * packed.tokens)
        rows.append((what, result.layer_tokens // layers, seconds, passes * _operations(loaded, packed.batches)))
    requests = [doc[0] for doc in docs]
    alone = batches(pack([[r] for r in requests], budget, trees=False), budget, gradients=True)
    seconds, _ = _timed(loaded, lambda: engine.gradients(requests, budget=budget))
    rows.append(("gradient importance", sum(b.tokens for b in alone), seconds, 2 * _operations(loaded, alone)))
    return rows


def _operations(loaded: LoadedModel, packed: Sequence[Batch]) -> float:
    parameters = sum(p.numel() for part in loaded.anatomy.layers for p in part.block.parameters())
    attention = 4 * loaded.anatomy.layers[0].d_model * loaded.anatomy.num_layers
    return float(sum(int(b.lengths.sum()) * 2 * parameters + int((b.lengths**2).sum()) * attention for b in packed))


def _timed(loaded: LoadedModel, work: Callable[[], Any]) -> tuple[float, Any]:
    work()  # warms up
    _synchronize(loaded)
    started = time.perf_counter()
    result = work()
    _synchronize(loaded)
    return time.perf_counter() - started, result


def _synchronize(loaded: LoadedModel) -> None:
    if loaded.device.type != "cpu":
        torch.accelerator.synchronize(loaded.device)


def main() -> None:
    """Measure the shapes that are named and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", choices=[*SHAPES, []], default=[s for s in SHAPES if s != "tiny"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--shots", type=int, default=400, help="tokens of the shots before every document")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak at this type, for the utilisation")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    sys.stdout.write(f"{where}, {options.dtype}, torch {torch.__version__}\n\n"
                     "| model | measurement | tokens | seconds | tokens/s | TFLOP/s | of the peak | batch |\n"
                     "|---|---|--:|--:|--:|--:|--:|--:|\n")
    for shape in options.shapes:
        loaded = model_of(shape, options.device, getattr(torch, options.dtype))
        budget: Budget = Engine.of(loaded).budget()
        for what, tokens, seconds, operations in measure(loaded, options.documents, options.shots):
            speed = operations / seconds / 1e12
            share = f"{speed / options.peak_tflops:.1%}" if options.peak_tflops else "-"
            sys.stdout.write(f"| {shape} | {what} | {tokens:,} | {seconds:.2f} | {tokens / seconds:,.0f} | {speed:.2f} "
                             f"| {share} | {budget.batch_tokens} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
