"""Memory, hours and money from counts: what a device is given, and how long it takes.

A model that fits into the usable part of a device's memory, or of several, is *resident*: copies of it work side by
side, as many as fit. One that does not fit is *streamed*: its weights are read block by block, once a pass. A pass
takes as long as the slower of reading and computing, and before that its first block is read alone. Computing is FLOPs
over the share of the peak that is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from headcount.engine.budget import bytes_per_token
from headcount.engine.pack import Budget
from headcount.model.circuits import probes_of
from headcount.model.without_weights import Shape
from headcount.study.devices import JOB_SECONDS, Device
from headcount.study.tokens import Work

# Maps of the residual stream in float32: from the embeddings, to the output layer, of all tokens' products, of these
# together, and a layer's output projection.
_MAPS = 5
# What heads put out of a row in double precision, and a row's hidden states in the model's type, at once.
_WIDE, _NARROW = 3, 10
Way: TypeAlias = Literal["resident", "part streamed", "streamed", "too large"]


@dataclass(frozen=True)
class Memory:
    """What a run keeps in memory, in bytes; activations are estimated as they are for choosing batches.

    Attributes:
        weights: All weights.
        block: The largest block's.
        output: The output layer's.
        batch: Activations of a batch that is scored.
        gradients: Activations of an example whose gradients are wanted, of all blocks; 0 where none are.
        induction: What induction scores are made with, such as maps of the residual stream; 0 where none are wanted.
    """

    weights: int
    block: int
    output: int
    batch: int
    gradients: int
    induction: int = 0

    @property
    def resident(self) -> int:
        """At the most, with the whole model in memory."""
        return self.weights + max(self.batch, self.gradients, self.induction)

    @property
    def streamed(self) -> int:
        """At the most, where blocks are read one after another: two of them, or the output layer, and a batch."""
        return max(2 * self.block, self.output) + max(self.batch, self.induction)


class Passes(NamedTuple):
    """How often the weights are read where a model is streamed: to score, and for gradients."""

    scoring: int
    gradients: int


@dataclass(frozen=True)
class OnDevice:
    """What a study takes on a device.

    Attributes:
        device: The device.
        way: "resident", "part streamed" where the gradients of an example do not fit beside the weights,
            "streamed", or "too large".
        copies: How many copies of the model work side by side.
        hours: About how long it takes; NaN where it is too large.
        computing: Hours of computing alone.
        reading: Hours of reading weights alone.
        bytes_read: What is read of weights, but for loading a resident model.
        passes: How often the weights are read where the model is streamed.
        money: What it costs; None where no price was given.
    """

    device: Device
    way: Way
    copies: int
    hours: float
    computing: float
    reading: float
    bytes_read: float | int
    passes: Passes
    money: float | None


def flops_of(shape: Shape, work: Work, layers: float | int, masks: int) -> float:
    """Floating-point operations of passes over documents: 2 a parameter, 4 a channel of attention and pair.

    Args:
        shape: The model.
        work: What one pass over the documents computes.
        layers: How many times a layer is computed, all passes together.
        masks: How many times logits are.
    """
    return float(2 * work.tokens * layers * shape.mean_active_parameters
                 + 4 * work.pairs * layers * shape.attention_width + 2 * work.places * masks * shape.output_parameters)


def memory_of(shape: Shape, budget: Budget, longest: float | int, *, induction: bool = False) -> Memory:
    """What a run keeps in memory.

    Args:
        shape: The model.
        budget: How large batches are.
        longest: Tokens of an example whose gradients are wanted; 0 where none are.
        induction: Whether induction scores are wanted.
    """
    size, (forward, gradient) = shape.model.dtype.itemsize, bytes_per_token(shape)
    return Memory(shape.anatomy.num_parameters * size, max(shape.block_parameters) * size,
                  shape.output_parameters * size, int(forward * max(budget.batch_tokens, longest)),
                  int(gradient * longest), _of_induction(shape) if induction else 0)


def _of_induction(shape: Shape) -> int:
    """Bytes of maps, of what is known of every head's circuit, and of work on the rows that are probed at once."""
    d_model, size = shape.anatomy.layers[0].d_model, shape.model.dtype.itemsize
    circuits = sum(part.num_heads * part.d_head ** 2 for part in shape.anatomy.layers) * 8
    _, rows = probes_of(d_model)
    return _MAPS * 4 * d_model**2 + circuits + rows * d_model * (_WIDE * 8 + _NARROW * size)


class Waits(NamedTuple):
    """Bytes that wait between blocks: all together, and of a batch."""

    together: float
    batch: float


def passes_of(scored: Iterable[Waits], gradients: Iterable[Waits], waiting: float | int) -> Passes:
    """How often the weights are read where the model is streamed, with as many jobs together as hidden states allow.

    A pass ends where the next batch does not fit: half a batch before memory is full, on average.

    Args:
        scored: Scored prompts, a hidden state for each mask; of all jobs that are ready together
            (`headcount.study.queue.rounds`).
        gradients: The same of examples, every block's input; forwards and backwards are a reading each.
        waiting: How many bytes may wait.
    """
    def passes(of_round: Waits) -> int:
        if of_round.together <= waiting:
            return 1
        return math.ceil(of_round.together / max(waiting - of_round.batch / 2, min(of_round.batch, waiting)))

    scoring, backward = (sum(map(passes, of_rounds)) for of_rounds in (scored, gradients))
    return Passes(scoring, 2 * backward)


def hours_on(
    device: Device, dtype: str, flops: float, memory: Memory, passes: Passes, price: float | int | None, *,
    streamed: bool = False, jobs: int = 0,
) -> OnDevice:
    """What a study takes on a device.

    Args:
        device: The device.
        dtype: The type of the model's numbers.
        flops: What is computed.
        memory: What a run keeps in memory.
        passes: How often the weights are read where the model is streamed.
        price: Of an hour of one of these devices.
        streamed: Whether that is asked for, also where the model fits.
        jobs: How many jobs they are.
    """
    usable, copies, read = device.usable, device.number, 0
    each = math.ceil(memory.weights / max(1.0, usable - memory.batch))
    way: Way = "resident"
    if memory.batch < usable and each <= device.number and not streamed:
        copies = device.number // each
        if memory.resident > each * usable:
            way, read = "part streamed", passes.gradients
    else:
        way, read = ("streamed", sum(passes)) if memory.streamed <= usable else ("too large", 0)
    computing = (flops / device.flops(dtype) + jobs * JOB_SECONDS) / 3600 / copies
    reading = memory.weights * read / device.read_speed / 3600
    first = memory.block * read / device.read_speed / 3600
    hours = math.nan if way == "too large" else max(computing, reading) + first
    return OnDevice(device, way, copies, hours, computing, reading, memory.weights * read, passes,
                    None if price is None else hours * price * device.number)
