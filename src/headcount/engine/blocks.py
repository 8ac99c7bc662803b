"""Blocks called by themselves: what each is given, what kind of output it has, and how a pass ends after the last one.

transformers has no way to run one block, so blocks are called as the model calls them. A pass in which every block
hands its input on catches the arguments that each is given (`entered`); no block computes anything in it. After the
last block follows a pass of one token a row, in which the last block puts out the kept vectors and the model computes
its final norm and output layer (`finished`). That all this equals the plain forward pass is nowhere promised: contract
3 (`headcount.engine.proof`) proves it on the model.

This is what every schedule of blocks begins and ends with; a block's own computation is `headcount.engine.step`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from headcount.model.anatomy import Anatomy, LayerAnatomy
from headcount.model.devices import device_of

# Kept positions that pass the output layer together, unless one mask has more.
_FINISHED = 256
Owner = TypeVar("Owner")
Inputs = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Block:
    """One block, and the kinds of output that it and its attention have.

    Attributes:
        part: Its modules.
        output: An output of the block, seen once: a tensor, a tuple or a list.
        attention: An output of its attention, seen once; None where attention adds more to its projection.
    """

    part: LayerAnatomy
    output: Any
    attention: Any

    def output_like(self, hidden: Float[Tensor, "*_"]) -> Any:
        """A hidden state in the kind of output that the block has."""
        return like(self.output, hidden, keep=False)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments that a block is given beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Caught(Exception):  # noqa: N818
    """Ends the pass that catches arguments."""


def learned(
    model: PreTrainedModel, anatomy: Anatomy, ids: Int[Tensor, "batch pos"], told: Mapping[str, bool] | None = None
) -> list[Block]:
    """The blocks of a model with the kinds of their outputs, seen in a plain pass of two tokens.

    Args:
        model: The model.
        anatomy: Its blocks.
        ids: Tokens.
        told: What else the model is told, by which its blocks may put out more.
    """
    projections: dict[int, Tensor] = {}
    attentions: dict[int, Any] = {}
    outputs: dict[int, Any] = {}
    with contextlib.ExitStack() as hooks:
        for i, part in enumerate(anatomy.layers):
            def projected(module: nn.Module, args: Any, output: Any, layer: int = i) -> None:
                projections[layer] = output

            def attended(module: nn.Module, args: Any, output: Any, layer: int = i) -> None:
                hidden = first(output)
                plain = torch.equal(hidden, projections[layer].reshape(hidden.shape))
                attentions[layer] = output if plain else None

            def left(module: nn.Module, args: Any, output: Any, layer: int = i) -> None:
                outputs[layer] = output

            for module, hook in ((part.out_proj, projected), (part.attention, attended), (part.block, left)):
                hooks.callback(module.register_forward_hook(hook).remove)
        model(input_ids=ids[:1, :2], use_cache=False, **(told or {}))
    return [Block(part, outputs[i], attentions[i]) for i, part in enumerate(anatomy.layers)]


def entered(
    model: PreTrainedModel, blocks: Sequence[Block], inputs: Inputs
) -> tuple[Float[Tensor, "batch pos d_model"], list[Call]]:
    """The embeddings of a batch, and the arguments that each block is given beside the hidden state.

    Args:
        model: The model.
        blocks: All its blocks, in order.
        inputs: The model's keyword arguments.
    """
    calls: list[Call] = []
    embeddings: list[Tensor] = []

    def catch(block: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            calls.append(Call(args[1:], kwargs))
            embeddings.append(hidden)
            if block is blocks[-1]:
                raise _Caught
            return block.output_like(hidden)

        return forward

    with replaced({block.part.block: catch(block) for block in blocks}), contextlib.suppress(_Caught):
        model(**inputs, use_cache=False)
    return embeddings[0], calls


def finished(
    model: PreTrainedModel, blocks: Sequence[Block], leaves: Iterable[tuple[Owner, Float[Tensor, "kept d_model"]]]
) -> Iterator[tuple[Owner, Float[Tensor, "kept vocabulary"]]]:
    """Logits of vectors that the last block put out; a few owners' vectors pass the output layer together.

    Args:
        model: The model.
        blocks: All its blocks, in order.
        leaves: Vectors and whose they are; taken one by one, as they are needed.
    """
    waiting: list[tuple[Owner, Tensor]] = []
    held = 0
    for owner, kept in leaves:
        if held + len(kept) > _FINISHED:
            yield from _logits(model, blocks, waiting)
            waiting, held = [], 0
        waiting.append((owner, kept))
        held += len(kept)
    yield from _logits(model, blocks, waiting)


def _logits(
    model: PreTrainedModel, blocks: Sequence[Block], waiting: Sequence[tuple[Owner, Tensor]]
) -> Iterator[tuple[Owner, Float[Tensor, "kept vocabulary"]]]:
    if not waiting:
        return
    logits: Any = logits_of_vectors(model, blocks, torch.cat([kept for _, kept in waiting]))
    for (owner, _), part in zip(waiting, logits.split([len(kept) for _, kept in waiting]), strict=True):
        yield owner, part


def logits_of_vectors(
    model: PreTrainedModel, blocks: Sequence[Block], hidden: Float[Tensor, "vector d_model"]
) -> Float[Tensor, "vector vocabulary"]:
    """Logits where the last block puts out these vectors, each at a position of its own."""
    # One token a row: no position is beyond the window, and models that reshape to their input's shape can.
    rows = hidden[:, None]
    embeddings: Any = model.get_input_embeddings()

    def nothing(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(*ids.shape, embeddings.weight.shape[1], dtype=rows.dtype, device=ids.device)

    def last(*_: Any, **__: Any) -> Any:
        return blocks[-1].output_like(rows)

    # Embeddings are not looked up: where weights lie in files, the matrix would be read for every batch.
    with handed_on(blocks[:-1]), replaced({embeddings: nothing, blocks[-1].part.block: last}):
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=device_of(model))
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, 0]
        return logits


def handed_on(blocks: Sequence[Block]) -> contextlib.AbstractContextManager[None]:
    """While it is open every block hands its input on, and computes nothing."""
    def passed(block: Block) -> Callable[..., Any]:
        return lambda *args, **kwargs: block.output_like(args[0] if args else kwargs["hidden_states"])

    return replaced({block.part.block: passed(block) for block in blocks})


@contextlib.contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another `forward`; each gets back what it had, its class's or its own (accelerate's)."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def first(output: Any) -> Tensor:
    """The hidden state in what a block or an attention puts out: itself, or the first of several."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def like(output: Any, hidden: Tensor, *, keep: bool = True) -> Any:
    """The same kind of output (a tensor, a tuple or a list) with another hidden state; the rest is kept, or None."""
    if not isinstance(output, (tuple, list)):
        return hidden
    return type(output)([hidden, *(output[1:] if keep else [None] * (len(output) - 1))])
