"""What streaming costs: a pass whose weights are read from a disk, beside computing alone and reading alone.

A model of random weights (OPT's layers of width 1,024, a block of 50 MB) is written into a folder. Then, so many times
in turns: reading alone, all blocks by the streamed schedule's own reader and nothing else; computing alone, the same
schedule on the same batches with all weights in memory; and streaming. Before everything that reads, the checkpoint's
pages are dropped from the file cache. Computing has one thread and reading one, so that two cores do both.

Sizes of batches make a pass bound by reading and by computing. `python benchmarks/bench.py streaming` runs it.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast

import random_checkpoint
from headcount.engine import neighbours
from headcount.engine.blocks import Block, learned
from headcount.engine.encode import Request
from headcount.engine.engine import Engine
from headcount.engine.likelihoods import Packed, Wanted, streamed_likelihoods
from headcount.engine.pack import Budget
from headcount.engine.stream import Stream, stream_of
from headcount.masks import Mask
from headcount.model.contracts import probe_tokens
from headcount.model.held import fetched, one_by_one
from headcount.model.load import LoadedModel, load

_WIDTH, _LAYERS, _ROUNDS = 1024, 30, 5
# Documents of 64 tokens: how many of them go through a pass.
_DOCUMENTS = (1, 2, 4, 16)


def streaming(_: LoadedModel, __: Path) -> list[dict[str, Any]]:
    """Seconds of reading, computing and both, for passes of different sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="headcount-streaming-") as folder:
            random_checkpoint.write(Path(folder), _config(), torch.float32, _tokenizer())
            streamed, resident = load(folder, stream=True, stream_memory="4GB"), load(folder, device="cpu")
            for weight in resident.model.parameters():  # pages of a mapped file are not forgotten
                weight.data = weight.data.clone()
            return [_row(streamed, resident, Path(folder), number) for number in _DOCUMENTS]
    finally:
        torch.set_num_threads(threads)


def _config() -> Any:
    return AutoConfig.for_model("opt", vocab_size=2048, hidden_size=_WIDTH, word_embed_proj_dim=_WIDTH,
                                ffn_dim=4 * _WIDTH, num_hidden_layers=_LAYERS, num_attention_heads=16,
                                max_position_embeddings=512)


def _tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))


def _row(streamed: LoadedModel, resident: LoadedModel, folder: Path, number: int) -> dict[str, Any]:
    drawn = np.random.default_rng(0).integers(3, 2048, (number, 65))
    packed = Engine.of(resident).pack([[Request(ids[:-1], ids[-4:])] for ids in drawn],
                                      Budget(row_tokens=64, batch_tokens=512), trees=False)
    full = Mask.full(resident.anatomy.heads_per_layer)
    masks = [full]
    from_files, in_memory = stream_of(streamed), Stream(resident.model, _blocks(resident))
    if from_files is None:
        raise ValueError("the model is not streamed")
    ways: dict[str, Callable[[], object]] = {
        "reading": functools.partial(_read, from_files, folder),
        "computing": functools.partial(_scored, resident, in_memory, packed, masks),
        "streaming": functools.partial(_streamed, streamed, from_files, packed, masks, folder)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with neighbours.watch(2) as load_of_others:
        for _ in range(_ROUNDS):
            for name, way in ways.items():
                seconds[name].append(_timed(way))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"documents": number, "tokens": packed.tokens, "masks": len(masks), "layers": _LAYERS,
            "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")), **medians,
            "ratio": medians["streaming"] / max(medians["reading"], medians["computing"]),
            "others": load_of_others.others}


def _blocks(loaded: LoadedModel) -> list[Block]:
    with torch.no_grad():
        return learned(loaded.model, loaded.anatomy, probe_tokens(loaded.model))


def _timed(way: Callable[[], object]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def _read(stream: Stream, folder: Path) -> None:
    _drop(folder)
    fetched(stream.model.get_input_embeddings())
    for _ in one_by_one([block.part.block for block in stream.blocks]):
        pass
    fetched(stream.model.get_output_embeddings())


def _scored(loaded: LoadedModel, stream: Stream, packed: Packed, masks: list[Mask]) -> None:
    list(streamed_likelihoods(loaded, stream, [Wanted(packed, masks)]))


def _streamed(loaded: LoadedModel, stream: Stream, packed: Packed, masks: list[Mask], folder: Path) -> None:
    _drop(folder)
    _scored(loaded, stream, packed, masks)


def _drop(folder: Path) -> None:
    """Let the system forget the pages of a checkpoint's files that it keeps in memory."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
