"""How much a model is given at once: row lengths from timings on the device, batches from free memory.

Three timings of a few blocks tell what packing must know (`headcount.engine.pack.Cost`): a batch of few tokens and one
of eight times as many, both in short rows, give the cost of a batch beside its tokens; the same number of tokens in
long rows tells how much attention adds with the length of rows. The result is kept per device and shape of model, in
`headcount/devices.json` in the user's cache, so that equal runs are laid out alike; what was timed while other
processes kept the cores busy is not kept there, since it says little about the device.

Memory is estimated, not measured: what does not fit after all is halved (`headcount.engine.forward.in_memory`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import time
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import PreTrainedModel

from headcount.engine import neighbours
from headcount.engine.encode import Request
from headcount.engine.kept import keep, kept
from headcount.engine.layout import Layout
from headcount.engine.pack import Batch, Budget, Cost, batches, pack
from headcount.engine.treemask import model_inputs
from headcount.model.anatomy import Anatomy
from headcount.model.held import fetched, held, in_files
from headcount.model.load import LoadedModel
from headcount.model.placement import free_memory

_FILE = "devices.json"
_SHORT, _LONG = 128, 1024
_BLOCKS = 4
_REPETITIONS = 3
# Seconds of a batch that is timed once: what disturbs it is small beside it, and wide models on CPUs take minutes.
_ONCE = 1.0
_FIRST_BATCH, _LARGEST_BATCH = 2048, 65536
_LONGEST_ROW = 8192
# A batch is so many times as large as what it costs beside its tokens: about 3 % are lost.
_WORTH = 32
# Of free memory; on a CPU there is no error to be caught when it is exceeded.
_SHARE = {"cpu": 0.25}


@runtime_checkable
class Placed(Protocol):
    """A model in its place: loaded, or known by its config alone."""

    @property
    def model(self) -> PreTrainedModel:
        """The model, perhaps without weights."""

    @property
    def anatomy(self) -> Anatomy:
        """Its heads and FFNs."""

    @property
    def device(self) -> torch.device:
        """Where token ids go."""


def budget_for(loaded: Placed, cost: Cost) -> Budget:
    """What a model is given at once on its device: batches worth their cost, as far as free memory goes."""
    wanted = int(np.clip(_WORTH * cost.batch, _FIRST_BATCH, _LARGEST_BATCH))
    forward, gradient = bytes_per_token(loaded)
    free = free_memory(loaded.device) * _SHARE.get(loaded.device.type, 0.5)
    return Budget(
        batch_tokens=max(1, int(min(wanted, free / forward))),
        gradient_tokens=max(1, int(min(wanted, free / gradient))),
        longest_row=max(1, int(min(_LONGEST_ROW, free / forward, math.sqrt(free / _bytes_per_pair(loaded))))),
        cost=cost)


def timed_cost(loaded: LoadedModel, layout: Layout) -> Cost:
    """What rows and batches cost on this device, timed now, and kept unless others kept the cores busy meanwhile."""
    try:
        with neighbours.watch(threads_of(loaded)) as load:
            cost = measure_cost(loaded, layout)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return Cost()  # hardly any memory: batches will be halved
    if not load.crowded:
        keep(_FILE, device_key(loaded), dataclasses.asdict(cost))
    return cost


def kept_cost(loaded: Placed) -> Cost | None:
    """What was timed earlier on such a device with a model of that shape; None if nothing was."""
    try:
        return Cost(**kept(_FILE)[device_key(loaded)])
    except (KeyError, TypeError):
        return None


@torch.no_grad()
def measure_cost(loaded: LoadedModel, layout: Layout) -> Cost:
    """What a few blocks cost on batches of short rows and of long ones, laid out as the model takes them."""
    tokens = _FIRST_BATCH
    with _first_blocks(loaded, layout) as timed:
        few, many = _times(timed, (tokens // 8, _SHORT), (tokens, _SHORT))
        # A GPU is not busy with so few tokens: they tell nothing about the cost of one.
        while loaded.device.type != "cpu" and many < 2 * few and tokens < _LARGEST_BATCH:
            tokens *= 4
            few, many = _times(timed, (tokens // 8, _SHORT), (tokens, _SHORT))
        length = min(_LONG, layout.tree_tokens or _LONG)
        each = max((many - few) / (tokens - tokens // 8), 1e-12)
        overhead = float(np.clip(many / each - tokens, 0, _LARGEST_BATCH))
        if not layout.trees or length <= _SHORT:
            return Cost(overhead)
        short, long = _times(timed, (tokens, _SHORT), (tokens, length))
    ratio = max((long / each - overhead) / (short / each - overhead), 1.01)
    return Cost(round(overhead, 1), round(max(_SHORT, (length - _SHORT * ratio) / (ratio - 1)), 1))


def _times(timed: _Timed, *sizes: tuple[int, int]) -> list[float]:
    """Seconds of batches of so many tokens in rows of such a length: the fastest of a few, in turns, or a long one."""
    made = [_random_batch(timed.loaded, timed.layout, *size) for size in sizes]
    fastest = [float("inf")] * len(sizes)
    for turn in range(1 + _REPETITIONS):
        for i, batch in enumerate(made):
            if _ONCE < fastest[i] < float("inf"):
                continue
            seconds = timed(batch)
            if turn or seconds > _ONCE:  # the first warms up
                fastest[i] = min(fastest[i], seconds)
    return fastest


def _random_batch(loaded: LoadedModel, layout: Layout, tokens: int, width: int) -> Batch:
    """Rows of that length: trees of short documents, or single requests where the model takes no trees."""
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    each = min(_SHORT if not layout.trees else _SHORT // 2, loaded.max_length)
    rng = np.random.default_rng(0)
    documents = [[Request(ids, np.zeros(1, np.int64))] for ids in rng.integers(0, vocabulary, (tokens // each, each))]
    made = Budget(width, 10**9, 10**9, cost=Cost(10**9))
    (batch,) = batches(pack(documents, made, trees=layout.trees), made)
    return batch


class _Timed:
    """Runs a batch through the first blocks of a model and takes the time they need."""

    def __init__(self, loaded: LoadedModel, layout: Layout) -> None:
        self.loaded = loaded
        self.layout = layout
        self.started = 0.0

    def __call__(self, batch: Batch) -> float:
        inputs = model_inputs(self.loaded, batch, self.layout.tree_mask)
        with contextlib.suppress(_Enough):
            self.loaded.model(**inputs, use_cache=False)
        _synchronize(self.loaded.device)
        return time.perf_counter() - self.started

    def start(self, *_: Any) -> None:
        """The first block begins."""
        _synchronize(self.loaded.device)
        self.started = time.perf_counter()


@contextlib.contextmanager
def _first_blocks(loaded: LoadedModel, layout: Layout) -> Iterator[_Timed]:
    timed = _Timed(loaded, layout)
    left = in_files(loaded.model)
    blocks: list[nn.Module] = [part.block for part in loaded.anatomy.layers][: 1 if left else _BLOCKS]
    embeddings: Any = loaded.model.get_input_embeddings()
    # Where weights lie in files, reading them is no part of what rows and batches cost.
    here = held([embeddings, *blocks], fetched(embeddings, *blocks)) if left else contextlib.nullcontext()

    def stop(*_: Any) -> None:
        raise _Enough

    handles = [blocks[0].register_forward_pre_hook(timed.start), blocks[-1].register_forward_hook(stop)]
    try:
        with here:
            yield timed
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):  # noqa: N818
    """Ends a pass after the blocks that are timed."""


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def bytes_per_token(loaded: Placed) -> tuple[float, float]:
    """About what a token takes in a forward pass, and in one that keeps activations for gradients."""
    layers = loaded.anatomy.layers
    d_model, size = layers[0].d_model, loaded.model.dtype.itemsize
    inner = max(loaded.anatomy.parameters_per_ffn(i) for i in range(len(layers))) / (2 * d_model)
    one = size * (16 * d_model + 3 * inner) + _LONG * _bytes_per_pair(loaded)
    # Block by block the graph is that of one.
    return one, one if in_files(loaded.model) else one * len(layers)


def _bytes_per_pair(loaded: Placed) -> int:
    """About what two positions of a row take: the mask, and every head's scores where the kernel writes them out."""
    eager = loaded.model.config.get_text_config()._attn_implementation == "eager"
    return loaded.model.dtype.itemsize * (3 * max(loaded.anatomy.heads_per_layer) if eager else 2)


def threads_of(loaded: LoadedModel) -> int:
    """How many threads want a core each while this model runs; beside a GPU it is the one that feeds it."""
    return torch.get_num_threads() if loaded.device.type == "cpu" else 1


def name_of(device: torch.device) -> str:
    """What a device is called: a GPU by its model, others by their kind and that of the machine."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"


def device_key(loaded: Placed) -> str:
    """What timings depend on: device, threads, version, shape, type and attention kernel."""
    anatomy = loaded.anatomy
    return ", ".join(map(str, (
        name_of(loaded.device), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}",
        loaded.model.config.model_type,
        f"{anatomy.num_layers} x {max(anatomy.heads_per_layer)} x {anatomy.layers[0].d_model}", loaded.model.dtype,
        loaded.model.config.get_text_config()._attn_implementation)))
