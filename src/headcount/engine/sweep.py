"""The resident schedule of the layer sweep: one batch after another, depth-first, with the whole model in memory.

Masks are a tree: two masks that agree on the layers before l have one hidden state there. The sweep goes down that tree
with one hidden state per distinct prefix, so that single FFNs off, in each of L layers, cost (L+1)/2 forward passes
instead of L+1. What happens in a layer where masks part is `headcount.engine.step`'s: attention is computed once, and a
branch that differs by its FFN's absence alone costs nothing.

The way of fewest masks is taken first, to its end, and the step lets go of its hidden state before its last way: every
step that waits has at least as many masks left as went on, so that for n masks no more than log2(n) hidden states wait.

Contract 3 (`headcount.engine.proof`) proves on the model that this equals one forward pass per mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from headcount.engine.blocks import Block, Inputs, entered, finished, learned
from headcount.engine.step import State, Stepped, step
from headcount.masks import Mask, Way, ways
from headcount.model.anatomy import Anatomy


@dataclass
class Sweep:
    """What a sweep needs to know of a model, and what it counts.

    Args:
        model: In eval mode.
        anatomy: Its heads and FFNs.
        layer_tokens: Positions that blocks computed so far, layers added up.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    layer_tokens: int = 0
    _blocks: list[Block] = field(default_factory=list)

    def logits(
        self, inputs: Inputs, masks: Sequence[Mask], rows: Int[Tensor, " kept"], positions: Int[Tensor, " kept"]
    ) -> Iterator[tuple[list[int], Float[Tensor, "kept vocabulary"]]]:
        """Logits at the kept positions of a batch, for the masks (by index) that they belong to; every mask once.

        Args:
            inputs: The model's keyword arguments.
            masks: What is kept.
            rows: The row of each position to keep.
            positions: The position in its row.
        """
        if not self._blocks:
            self._blocks = learned(self.model, self.anatomy, inputs["input_ids"])
        kept = ((owners, hidden[rows.to(hidden.device), positions.to(hidden.device)])
                for owners, hidden in self._leaves(inputs, masks))
        yield from finished(self.model, self._blocks, kept)

    def _leaves(
        self, inputs: Inputs, masks: Sequence[Mask]
    ) -> Iterator[tuple[list[int], Float[Tensor, "batch pos d_model"]]]:
        """The last block's output of every distinct mask."""
        hidden, calls = entered(self.model, self._blocks, inputs)

        def fork(layer: int, state: State, owners: Sequence[int]) -> _Fork:
            parted = ways(masks, owners, layer)
            return _Fork(layer, parted, step(self._blocks[layer], state, calls[layer], fewest_first(parted)))

        forks = [fork(0, State(hidden), range(len(masks)))]
        while forks:
            layer, parted, steps = forks[-1]
            stepped = next(steps, None)
            if stepped is None:
                forks.pop()
                continue
            self.layer_tokens += stepped.positions
            if layer == len(self._blocks) - 1:
                yield parted[stepped.way], stepped.state.hidden
            else:
                forks.append(fork(layer + 1, stepped.state, parted[stepped.way]))


def fewest_first(parted: Mapping[Way, Sequence[int]]) -> list[Way]:
    """The ways in the order in which a schedule takes them: those of fewest masks first."""
    return sorted(parted, key=lambda way: -len(parted[way]))[::-1]


class _Fork(NamedTuple):
    """A layer at which masks part: the masks of each way, and the ways that are still to be taken."""

    layer: int
    parted: Mapping[Way, list[int]]
    steps: Iterator[Stepped]
