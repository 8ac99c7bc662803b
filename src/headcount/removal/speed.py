"""How fast a model runs full, masked and removed, in tokens per second of a prefill and of decoding, and its memory.

A side is a model that is ready to run inside a `with` block: the full one, the full one under a mask's gates, the
smaller one. A round runs each side once, one after the other, so that what else the machine does meanwhile falls on all
alike; what is told is the median over rounds, after one round that warms up. A prefill is what generation begins with:
one forward pass that fills the cache and computes the logits of the last position alone. Decoding is transformers' own
greedy `generate` with that cache; the time before its first token is no part of it.

Parameters, bytes and the cache are counted exactly. The peak is measured on a GPU: the side's weights, and the most
that a prefill takes beside them. On a CPU, where no allocator tells, it is weights and cache, without what layers take
for a moment.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from headcount.engine import neighbours
from headcount.errors import ModelError, OptionError, first_line
from headcount.model.contracts import FAILURES
from headcount.model.hooks import ablated
from headcount.model.read import quiet
from headcount.model.tensor_format import size
from headcount.removal.cost import TOKENS, last_position
from headcount.removal.remove import Removed

ROUNDS = 5
# Tokens of the prompt before decoding, and that are decoded.
PROMPT, NEW = 64, 32
Side = Callable[[], AbstractContextManager[PreTrainedModel]]
Clock = Callable[[], float]


@dataclass(frozen=True)
class SideSpeed:
    """One side.

    Attributes:
        parameters: Of the model as it is in memory.
        bytes: What its weights take.
        cache_bytes: What keys and values of a prefill take; 0 where the model keeps them in its own way.
        peak_bytes: The most memory at once: measured on a GPU, weights and cache on a CPU.
        prefill: Tokens per second of a prefill, the median over rounds.
        decode: Tokens per second of decoding, the median over rounds.
    """

    parameters: int
    bytes: int
    cache_bytes: int
    peak_bytes: int
    prefill: float
    decode: float


@dataclass(frozen=True)
class MeasuredSpeed:
    """Sides that were timed in turns.

    Attributes:
        sides: By name.
        device: Where.
        dtype: Of the weights.
        threads: Of torch on a CPU.
        rounds: How often each side was timed.
        prefill_tokens: Of a prefill.
        prompt_tokens: Of the prompt before decoding.
        new_tokens: That were decoded.
        peak_measured: Whether peaks are measured; else they are weights and cache.
        others: How many cores other processes kept busy meanwhile.
        crowded: Whether they left too few.
    """

    sides: Mapping[str, SideSpeed]
    device: str
    dtype: str
    threads: int
    rounds: int
    prefill_tokens: int
    prompt_tokens: int
    new_tokens: int
    peak_measured: bool
    others: float
    crowded: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "sides": {name: asdict(side) for name, side in self.sides.items()}}


def sides_of(removed: Removed) -> dict[str, Side]:
    """The full model, the same under the mask's gates, and the smaller one, by the names `full`, `masked`, `removed`.

    Gates give an FFN that is off no positions, so that a masked FFN computes nothing; heads compute all the same.

    Raises:
        ModelError: As `Removed.model`.
    """
    full = removed.plan.loaded

    @contextlib.contextmanager
    def masked() -> Iterator[PreTrainedModel]:
        with ablated(full.anatomy, removed.mask):
            yield full.model

    small = removed.model.model
    return {"full": lambda: contextlib.nullcontext(full.model), "masked": masked,
            "removed": lambda: contextlib.nullcontext(small)}


def measured_speed(
    sides: Mapping[str, Side], *, rounds: int = ROUNDS, prefill_tokens: int = TOKENS, prompt_tokens: int = PROMPT,
    new_tokens: int = NEW, clock: Clock = time.perf_counter,
) -> MeasuredSpeed:
    """Time models in turns.

    Args:
        sides: By name, what gives a model that is ready to run; from `sides_of`, or of one's own.
        rounds: How often each is timed.
        prefill_tokens: Of a prefill; where a model reads fewer, as many as it does.
        prompt_tokens: Before decoding.
        new_tokens: That are decoded, at least two.
        clock: Gives seconds.

    Raises:
        OptionError: If there is nothing to time.
        ModelError: If a side does not run, or cannot generate.
    """
    if not sides or rounds < 1 or prefill_tokens < 1 or prompt_tokens < 1 or new_tokens < 2:
        raise OptionError(f"there is nothing to time: `sides` {', '.join(sides) or 'is empty'}, `rounds` {rounds}, "
                          f"`prefill_tokens` {prefill_tokens}, `prompt_tokens` {prompt_tokens} (at least 1 each), "
                          f"`new_tokens` {new_tokens} (at least 2)",
                          fields=("sides", "rounds", "prefill_tokens", "prompt_tokens", "new_tokens"))
    found = {name: _Measured() for name in sides}
    with next(iter(sides.values()))() as model:
        device, dtype = model.device, str(model.dtype).removeprefix("torch.")
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or prefill_tokens
    prefill_tokens = min(prefill_tokens, window)
    prompt_tokens = min(prompt_tokens, max(1, window - new_tokens))
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    with torch.inference_mode(), quiet(), neighbours.watch(threads) as load:
        for number in range(rounds + 1):  # the first warms up
            for name, side in sides.items():
                try:
                    with side() as model:
                        run = _Run(model, clock)
                        seconds = run.prefill(prefill_tokens, found[name])
                        step = run.decode(prompt_tokens, new_tokens)
                except FAILURES as error:
                    raise ModelError(f"{name} cannot be timed: it does not run, or does not generate "
                                     f"({first_line(error)})") from error
                if number:
                    found[name].prefill.append(prefill_tokens / seconds)
                    found[name].decode.append(1 / step)
    return MeasuredSpeed(
        {name: one.side() for name, one in found.items()}, str(device), dtype, threads, rounds, prefill_tokens,
        prompt_tokens, new_tokens, device.type == "cuda", load.others, load.crowded)


@dataclass
class _Measured:
    """What is known of a side so far."""

    parameters: int = 0
    weights: int = 0
    cache: int = 0
    peak: int = 0
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def side(self) -> SideSpeed:
        return SideSpeed(self.parameters, self.weights, self.cache, self.peak, statistics.median(self.prefill),
                         statistics.median(self.decode))


@dataclass(frozen=True)
class _Run:
    """A model that is ready to run."""

    model: PreTrainedModel
    clock: Clock

    def prefill(self, tokens: int, found: _Measured) -> float:
        """Seconds of a prefill; what it takes of memory goes into `found`."""
        ids, wanted = self._ids(tokens), last_position(self.model)
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.model.device)
            before = torch.cuda.memory_allocated(self.model.device)
        start = self._now()
        output: Any = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **wanted)
        seconds = self._now() - start
        tensors = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        found.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        found.weights = sum(map(size, tensors.values()))
        found.cache = _bytes_of(getattr(output, "past_key_values", None))
        beside = torch.cuda.max_memory_allocated(self.model.device) - before if cuda else found.cache
        found.peak = max(found.peak, found.weights + beside)
        return seconds

    def decode(self, prompt: int, new: int) -> float:
        """Seconds of a token behind the first one."""
        ids, watch = self._ids(prompt), _Watch(self._now)
        model: Any = self.model
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, use_cache=True,
                       min_new_tokens=new, max_new_tokens=new, stopping_criteria=StoppingCriteriaList([watch]))
        return (watch.times[-1] - watch.times[0]) / (len(watch.times) - 1)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return self.clock()

    def _ids(self, tokens: int) -> Int[Tensor, "1 pos"]:
        """The same random tokens for every side."""
        drawn = torch.Generator().manual_seed(0)
        vocabulary: int = self.model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (1, tokens), generator=drawn).to(self.model.device)


class _Watch(StoppingCriteria):
    """Stops nothing, and keeps the time of every token."""

    def __init__(self, now: Clock) -> None:
        self.now = now
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(self.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _bytes_of(cache: Any) -> int:
    """What keys and values take."""
    layers = getattr(cache, "layers", ())
    return sum(size(value) for layer in layers for value in vars(layer).values() if isinstance(value, Tensor))
