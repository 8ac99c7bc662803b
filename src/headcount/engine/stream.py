"""The streamed schedule of the layer sweep: layer by layer, all batches and masks, with one block in memory at a time.

The step is the resident schedule's (`headcount.engine.step`), and so are the tree of masks, the order in which ways are
taken, and the arguments that each block is given. What differs is what waits: there a few hidden states and all
weights, here all hidden states and two blocks (the one that computes, and the next one, which is read meanwhile). So
weights are read once for as many batches as `Stream.memory` lets wait, a *pass*; more batches take more passes.

Batches that wait may belong to different jobs, each with its own masks: what is left of one job and the first of the
next share a pass. On another device than the CPU what waits does so in the host's memory.

Bit for bit this gives what the resident schedule gives on equal batches: each block is called with the same tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Float
from more_itertools import peekable
from torch import Tensor, nn
from transformers import PreTrainedModel

from headcount.engine.blocks import Block, Call, Inputs, entered, finished, learned
from headcount.engine.step import State, step
from headcount.engine.sweep import fewest_first
from headcount.errors import ModelError, OptionError
from headcount.masks import Mask, ways
from headcount.model.contracts import probe_tokens
from headcount.model.devices import device_of
from headcount.model.held import fetched, held, in_files, one_by_one
from headcount.model.load import LoadedModel
from headcount.model.offloaded import fetches
from headcount.model.placement import bytes_told, may_wait


@runtime_checkable
class Counted(Protocol):
    """A batch of any kind."""

    @property
    def tokens(self) -> int:
        """How many positions it has."""


B = TypeVar("B", bound=Counted)
T = TypeVar("T")
# What is open around a wave's step in a layer.
Around = Callable[[int, "Wave[B]"], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class Waiting(Generic[B]):
    """One batch before the first block.

    Attributes:
        batch: Which.
        inputs: Makes it the model's keyword arguments.
        masks: What is kept.
        states: How many hidden states of it will wait at the most.
        smaller: The option that makes such batches smaller; empty where there is none.
    """

    batch: B
    inputs: Callable[[B], Inputs]
    masks: Sequence[Mask]
    states: int
    smaller: str = "batch_tokens"


@dataclass
class Wave(Generic[B]):
    """One batch on its way through the blocks.

    Attributes:
        batch: Which.
        masks: What is kept.
        calls: The arguments that each block is given beside the hidden state.
        nodes: Hidden states, each with the masks (by index) that share it, in the resident schedule's order.
        layer_tokens: Positions that blocks computed for it so far, layers added up.
    """

    batch: B
    masks: Sequence[Mask]
    calls: tuple[Call, ...]
    nodes: list[tuple[list[int], State]]
    layer_tokens: int = 0


@dataclass(frozen=True, eq=False)
class Stream:
    """The streamed schedule of a model.

    Attributes:
        model: In eval mode; its weights lie in files.
        blocks: All its blocks, in order (`headcount.engine.blocks.learned`).
        memory: How many bytes may wait between two blocks; None: a quarter of what is free, or this process's part.
        together: How many processes share that quarter.
    """

    model: PreTrainedModel
    blocks: Sequence[Block]
    memory: int | None = None
    together: int = 1

    def here(self, value: T) -> T:
        """A value whose tensors are on the device that the blocks run on."""
        device = device_of(self.model)
        return with_tensors(value, lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def enter(self, waiting: peekable[Waiting[B]]) -> list[Wave[B]]:
        """The batches of one pass at the first block; embeddings are read once for all.

        Args:
            waiting: Batches that are still to be done: as many as memory lets wait, at least one, are taken.
        """
        embeddings: Any = self.model.get_input_embeddings()
        left = self.memory if self.memory is not None else may_wait() // self.together
        waves: list[Wave[B]] = []
        with self.at_hand(embeddings):
            while waiting and (not waves or left > 0):
                first = waiting.peek()
                hidden, calls = entered(self.model, self.blocks, first.inputs(first.batch))
                needed = bytes_of(calls) + first.states * hidden.untyped_storage().nbytes()
                if not waves and self.memory is not None and needed > self.memory:
                    raise cannot_wait(first.batch.tokens, needed, self.memory, first.smaller)
                left -= needed
                if waves and left < 0:
                    break
                masks = next(waiting).masks
                nodes = [([*range(len(masks))], State(away(hidden)))]
                waves.append(Wave(first.batch, masks, away(tuple(calls)), nodes))
        return waves

    @contextlib.contextmanager
    def at_hand(self, end: nn.Module) -> Iterator[None]:
        """Have the embedding or the output layer in memory, with what stands beside the blocks: norms, positions.

        Args:
            end: Which of the two; the embedding is not called where the model computes logits.
        """
        embeddings: Any = self.model.get_input_embeddings()
        beside = [module for module in self._beside if module is not embeddings]
        modules = [module for module in dict.fromkeys((*end.modules(), *beside)) if fetches(module)]
        with held(modules, fetched(*modules, inside=False)):
            yield

    @functools.cached_property
    def _beside(self) -> list[nn.Module]:
        """What stands beside the blocks in their stack."""
        blocks = [block.part.block for block in self.blocks]
        inside = {module for block in blocks for module in block.modules()}
        stack = next(module for module in self.model.modules()
                     if any(blocks[0] is one for child in module.children() for one in child.children()))
        return [module for module in stack.modules() if module not in inside]

    def through(self, waves: Sequence[Wave[B]], around: Around[B] | None = None) -> Iterator[int]:
        """Take waves through all blocks, each under its masks; yields after each block.

        Args:
            waves: From `enter`.
            around: What is open while a wave passes a layer, such as hooks that look at it.
        """
        for i in one_by_one([block.part.block for block in self.blocks]):
            for wave in waves:
                with around(i, wave) if around is not None else contextlib.nullcontext():
                    self._through_one(i, wave)
            yield i

    def _through_one(self, i: int, wave: Wave[Any]) -> None:
        before, wave.nodes = wave.nodes[::-1], []
        call = self.here(wave.calls[i])
        while before:
            owners, state = before.pop()
            parted = ways(wave.masks, owners, i)
            steps = step(self.blocks[i], self.here(state), call, fewest_first(parted))
            del state  # the step lets go of it before its last way
            for stepped in steps:
                wave.layer_tokens += stepped.positions
                wave.nodes.append((parted[stepped.way], away(stepped.state)))

    def leave(
        self, waves: Sequence[Wave[Any]], kept: Sequence[tuple[Tensor, Tensor]]
    ) -> Iterator[Iterator[tuple[list[int], Float[Tensor, "kept vocabulary"]]]]:
        """Logits of each wave, whose hidden states are given up; the output matrix is read once for all.

        Args:
            waves: Behind the last block.
            kept: Of each, the rows and positions whose logits are wanted.
        """
        output: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        with self.at_hand(output):
            for wave, (rows, positions) in zip(waves, kept, strict=True):
                nodes, wave.nodes = wave.nodes, []
                leaves = ((owners, self.here(state.hidden)[rows, positions]) for owners, state in nodes)
                yield finished(self.model, self.blocks, leaves)


def cannot_wait(tokens: int, needed: int, memory: int, smaller: str, *, counted: bool = False) -> OptionError:
    """Says that a batch of so many tokens takes more memory while it waits than it is given.

    Args:
        tokens: How many it has.
        needed: Bytes that it takes.
        memory: Bytes that may wait.
        smaller: The option that makes batches smaller; empty where there is none.
        counted: Whether `needed` is counted beforehand, and so the least.
    """
    otherwise = f", or smaller batches (`{smaller}`)" if smaller else ""
    takes = f"takes {'at least ' if counted else ''}{bytes_told(needed)} while it waits"
    return OptionError(f"a batch of {tokens:,} tokens {takes}, and `stream_memory` is {bytes_told(memory)}: give more"
                       f"{otherwise}", fields=("stream_memory", *filter(None, [smaller])))


@contextlib.contextmanager
def fitting(waves: Sequence[Wave[Any]], smaller: str = "batch_tokens") -> Iterator[None]:
    """While waves are computed: memory that is too small for one of them beside a block is told in a line.

    Args:
        waves: They.
        smaller: The option that makes such batches smaller; empty where there is none.

    Raises:
        ModelError: If it is.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        most = max(wave.batch.tokens for wave in waves)
        otherwise = f"smaller batches (`{smaller}`), or " if smaller else ""
        raise ModelError(f"memory is too small for a batch of {most:,} tokens beside a block of the model: give "
                         f"{otherwise}less that waits (`stream_memory`) ({error})",
                         fields=(*filter(None, [smaller]), "stream_memory")) from error


def stream_of(loaded: LoadedModel) -> Stream | None:
    """The streamed schedule of a model whose weights lie in files, kept with it; None where they are in memory."""
    if not in_files(loaded.model):
        return None
    stream = loaded.kept.get(Stream)
    if not isinstance(stream, Stream):
        with torch.no_grad():
            blocks = learned(loaded.model, loaded.anatomy, probe_tokens(loaded.model))
        stream = loaded.kept[Stream] = Stream(loaded.model, blocks, loaded.stream_memory, loaded.together)
    return stream


def away(value: T) -> T:
    """A value whose tensors wait in the host's memory, pinned where it is a GPU's; each once."""
    copies: dict[int, Tensor] = {}

    def away(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor
        if id(tensor) not in copies:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[id(tensor)] = copy.copy_(tensor, non_blocking=tensor.is_cuda)
        return copies[id(tensor)]

    return with_tensors(value, away)


def with_tensors(value: T, moved: Callable[[Tensor], Tensor]) -> T:
    """A value with other tensors in the places of its own; what blocks may write to is left as it is.

    Args:
        value: A tensor, a state, the arguments of a block, or a tuple of these.
        moved: Gives the other tensor.
    """
    made: Any = value  # of the same type; T knows no tuples
    if isinstance(value, Tensor):
        made = moved(value)
    elif isinstance(value, State):
        made = State(moved(value.hidden), value.own)
    elif isinstance(value, Call):
        kwargs = {name: with_tensors(one, moved) for name, one in value.kwargs.items()}
        made = Call(with_tensors(value.args, moved), kwargs)
    elif type(value) is tuple:
        made = tuple(with_tensors(one, moved) for one in made)
    return made  # type: ignore[no-any-return]


def bytes_of(calls: Sequence[Call]) -> int:
    """What the arguments of blocks hold, tensors counted once."""
    found: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for one in value:
                count(one)
        elif isinstance(value, dict):
            for one in value.values():
                count(one)

    for call in calls:
        count(call.args)
        count(dict(call.kwargs))
    return sum(found.values())
