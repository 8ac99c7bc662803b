"""The step: one block, for one hidden state, in every way in which masks treat that block.

The block's attention is computed once, by the first way that is taken; the others begin at its output projection, each
through its own gate. A removed FFN is not computed, and attention of which no way keeps a head is not computed either,
unless the block passes mutable arguments on, in which later layers may read its keys and values. Such arguments
(Gemma-4) are copied for every way, so that ways do not see one another.

A step knows nothing of the masks' tree, nor in which order a schedule goes through layers and batches. It yields one
way after another, and has let go of the hidden state when it yields the last one: while a schedule follows an earlier
way to its end, one hidden state and the shared attention wait here, and then nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from headcount.engine.blocks import Block, Call, first, like, replaced
from headcount.masks import Way, any_head
from headcount.model.anatomy import LayerAnatomy
from headcount.model.hooks import layer_ablated


@dataclass(frozen=True, eq=False)
class State:
    """What goes from block to block.

    Attributes:
        hidden: The hidden state.
        own: The branch's own copies of mutable arguments, by the identity of the argument that was caught.
    """

    hidden: Float[Tensor, "batch pos d_model"]
    own: Mapping[int, Any] = field(default_factory=dict)


class Stepped(NamedTuple):
    """What one way makes of a state, and how many positions were computed for it.

    A way that removes the FFN shares the others' attention and counts no positions. Where no way keeps the FFN, the
    first counts the attention, if that was computed.
    """

    way: Way
    state: State
    positions: int


def step(block: Block, state: State, call: Call, ways: Sequence[Way]) -> Iterator[Stepped]:
    """What a block makes of a state, one way after another in the order given.

    Args:
        block: The block.
        state: What the block before put out.
        call: The arguments that the block is given.
        ways: The distinct ways in which masks treat the block; at least one.
    """
    fork = _Fork(block, state.hidden, dict(state.own), _attention_shared(block, state, call, ways))
    size = state.hidden.shape[-3:-1].numel()
    attended = not any(ffn for _, ffn in ways) and (fork.attention is None or fork.attention.z is None)
    waiting = [fork]
    del state, fork  # what waits is in the list, until the last way takes it out
    for i, way in enumerate(ways):
        positions = size if way[1] or (attended and i == 0) else 0
        yield Stepped(way, _taken(waiting.pop() if i == len(ways) - 1 else waiting[0], call, way), positions)


@dataclass(eq=False)
class _Fork:
    """What the ways share: the block's input, the copies of mutable arguments, and the attention, if shared at all."""

    block: Block
    hidden: Tensor
    own: dict[int, Any]
    attention: _Attention | None


def _taken(fork: _Fork, call: Call, way: Way) -> State:
    """The block computed in one way."""
    heads, ffn = way
    computes = fork.attention is not None and fork.attention.z is None
    own = _copied(fork.own)
    args, kwargs = owned(call, own)
    shared = fork.attention.computed_once() if fork.attention is not None else contextlib.nullcontext()
    with layer_ablated(fork.block.part, np.array(list(heads), bool), ffn), shared:
        output = fork.block.part.block(fork.hidden.clone(), *args, **kwargs)
    if computes:  # what the attention, computed once, keeps for later layers is every way's
        fork.own.update(_copied(own))
    return State(first(output), own)


def _attention_shared(block: Block, state: State, call: Call, ways: Sequence[Way]) -> _Attention | None:
    """The attention that ways share; None for a single way that keeps heads, which runs the block as it is.

    Of no heads nothing is computed, unless later layers may read it.
    """
    if len(ways) == 1 and any_head(ways):
        return None
    part = block.part
    attention = _Attention(part, plain=block.attention is not None)
    arguments = (*call.args, *call.kwargs.values())
    if not any_head(ways) and block.attention is not None and not any(map(is_mutable, arguments)):
        attention.z = state.hidden.new_zeros((*state.hidden.shape[:-1], part.num_heads * part.d_head))
        attention.output = like(block.attention, state.hidden, keep=False)
    return attention


class _Attention:
    """One layer's attention: computed by the first way, the others begin at its output projection.

    Attributes:
        z: What the output projection is given, once it is known.
        output: What the attention puts out, with a hidden state of the right shape in it.
        rest: What it adds to its projection (BLOOM: the residual); None if it is plain and adds nothing.
    """

    def __init__(self, part: LayerAnatomy, *, plain: bool) -> None:
        self.part = part
        self.plain = plain
        self.z: Tensor | None = None
        self.output: Any = None
        self.rest: Tensor | None = None

    @contextlib.contextmanager
    def computed_once(self) -> Iterator[None]:
        """Run the block with its own attention, which is kept, or from what was kept on."""
        if self.z is None:
            with self._watched():
                yield
        else:
            with replaced({self.part.attention: self._branched}):
                yield

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        attention, out_proj = self.part.attention, self.part.out_proj
        projections: list[Tensor] = []

        def before(module: nn.Module, args: Any) -> None:
            self.z = args[0]

        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            projections.append(output)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            hidden = first(output)
            if not self.plain:
                self.rest = hidden - projections[0].reshape(hidden.shape)
            self.output = like(output, hidden.clone())

        # Before the gate, which stands there already: what it hands on is one way's.
        handles = [out_proj.register_forward_pre_hook(before, prepend=True), out_proj.register_forward_hook(after),
                   attention.register_forward_hook(leave, prepend=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _branched(self, *args: Any, **kwargs: Any) -> Any:
        projected = self.part.out_proj(self.z)  # through this way's gate
        own = projected.reshape(first(self.output).shape)
        return like(self.output, own if self.rest is None else own + self.rest)


def owned(call: Call, copies: dict[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with the branch's own copy in place of every mutable one."""
    def own(value: Any) -> Any:
        return copies.setdefault(id(value), _copy(value)) if is_mutable(value) else value

    return tuple(own(a) for a in call.args), {name: own(v) for name, v in call.kwargs.items()}


def is_mutable(value: Any) -> bool:
    """Whether a block may write into an argument for later blocks, as into shared keys and values (Gemma-4)."""
    return isinstance(value, (MutableMapping, MutableSequence))


def _copied(copies: Mapping[int, Any]) -> dict[int, Any]:
    return {key: _copy(value) for key, value in copies.items()}


def _copy(value: Any) -> Any:
    """Containers are copied, tensors in them are not: blocks put new ones in, they do not write into old ones."""
    if not is_mutable(value):
        return value
    twin = copy.copy(value)
    for key, item in value.items() if isinstance(value, MutableMapping) else enumerate(value):
        twin[key] = _copy(item)
    return twin
