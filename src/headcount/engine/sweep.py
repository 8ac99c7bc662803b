"""The layer sweep: many masks through a model at once, sharing all layers before their first difference.

Masks are a tree: two masks that agree on the layers before l have one hidden state there. The sweep goes down that tree
with one hidden state per distinct prefix, so that single FFNs off, in each of L layers, cost (L+1)/2 forward passes
instead of L+1. Where masks part in a layer, its attention is computed once, and the branches start at its output
projection; a removed FFN is not computed, and a branch that differs by nothing else costs nothing.

The way of fewest masks is taken first, to its end, and the fork is forgotten before its last way: every fork that is
kept has at least as many masks left as went on, so that for n masks no more than log2(n) hidden states wait.

transformers has no way to run one block, so blocks are called as the model calls them: a pass in which every block
hands its input on catches the arguments that each is given, and after the last block a pass of one token, in which the
last block hands out the kept positions, computes the final norm and the output layer. Blocks may pass mutable
arguments on to one another (keys and values that later layers use, in Gemma-4): every branch owns a copy. That all this
equals the plain forward pass is nowhere promised: contract 3 (`headcount.engine.proof`) proves it on the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from headcount.masks import Mask, Way, any_head, ways
from headcount.model.anatomy import Anatomy, LayerAnatomy
from headcount.model.hooks import layer_ablated

# Kept positions that pass the output layer together, unless one mask has more.
_FINISHED = 256
Inputs = Mapping[str, Any]
# The arguments of a block beside the hidden state.
_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Sweep:
    """What a sweep needs to know of a model, and what it counts.

    Args:
        model: In eval mode.
        anatomy: Its heads and FFNs.
        layer_tokens: Positions that blocks computed so far, layers added up; a branch that shares the attention and
            removes the FFN counts none.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    layer_tokens: int = 0
    _outputs: dict[int, Any] = field(default_factory=dict)
    _attentions: dict[int, Any] = field(default_factory=dict)

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
        waiting: list[tuple[list[int], Tensor]] = []
        held = 0
        for owners, hidden in self._leaves(inputs, masks):
            kept = hidden[rows.to(hidden.device), positions.to(hidden.device)]
            if held + len(kept) > _FINISHED:
                yield from self._finished(waiting)
                waiting, held = [], 0
            waiting.append((owners, kept))
            held += len(kept)
        yield from self._finished(waiting)

    def _finished(
        self, waiting: Sequence[tuple[list[int], Tensor]]
    ) -> Iterator[tuple[list[int], Float[Tensor, "kept vocabulary"]]]:
        if not waiting:
            return
        logits = self._after_blocks(torch.cat([kept for _, kept in waiting])).logits[:, 0]
        for (owners, _), part in zip(waiting, logits.split([len(kept) for _, kept in waiting]), strict=True):
            yield owners, part

    def _after_blocks(self, hidden: Float[Tensor, "vector d_model"]) -> Any:
        """The model's output where the last block puts out these vectors, each at a position of its own."""
        # One token a row: no position is beyond the window, and models that reshape to their input's shape can.
        rows = hidden[:, None]
        blocks = [part.block for part in self.anatomy.layers]

        def passed(layer: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                own = rows if layer == len(blocks) - 1 else args[0] if args else kwargs["hidden_states"]
                return self._like_output(layer, own)

            return forward

        with _replaced({block: passed(i) for i, block in enumerate(blocks)}):
            embeddings: Any = self.model.get_input_embeddings()
            first = torch.zeros(len(rows), 1, dtype=torch.long, device=_device(embeddings))
            return self.model(input_ids=first, use_cache=False)

    def _leaves(
        self, inputs: Inputs, masks: Sequence[Mask]
    ) -> Iterator[tuple[list[int], Float[Tensor, "batch pos d_model"]]]:
        """The last block's output of every distinct mask."""
        hidden, calls = self._caught(inputs)
        forks = [self._fork(_Branch(0, hidden, list(range(len(masks))), {}), masks, calls[0])]
        while forks:
            branch = self._taken(forks[-1], masks, calls[forks[-1].branch.layer])
            if not forks[-1].ways:
                forks.pop()
            if branch.layer == self.anatomy.num_layers:
                yield branch.masks, branch.hidden
            else:
                forks.append(self._fork(branch, masks, calls[branch.layer]))

    def _caught(self, inputs: Inputs) -> tuple[Tensor, list[_Call]]:
        """The embeddings, and the arguments that each block is given beside them."""
        calls: list[_Call] = []
        entered: list[Tensor] = []
        blocks = [part.block for part in self.anatomy.layers]

        def catch(layer: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                calls.append((args[1:], kwargs))
                entered.append(hidden)
                if layer == len(blocks) - 1:
                    raise _Caught
                return self._like_output(layer, hidden)

            return forward

        if not self._outputs:
            self._learn(inputs)
        with _replaced({block: catch(i) for i, block in enumerate(blocks)}), contextlib.suppress(_Caught):
            self.model(**inputs, use_cache=False)
        return entered[0], calls

    def _learn(self, inputs: Inputs) -> None:
        """See in a plain pass what kind of output blocks and attentions have; None where more than the projection."""
        projections: dict[int, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for i, part in enumerate(self.anatomy.layers):
                def projected(module: nn.Module, args: Any, output: Any, layer: int = i) -> None:
                    projections[layer] = output

                def attended(module: nn.Module, args: Any, output: Any, layer: int = i) -> None:
                    first = _first(output)
                    plain = torch.equal(first, projections[layer].reshape(first.shape))
                    self._attentions[layer] = output if plain else None

                def left(module: nn.Module, args: Any, output: Any, layer: int = i) -> None:
                    self._outputs[layer] = output

                for module, hook in ((part.out_proj, projected), (part.attention, attended), (part.block, left)):
                    hooks.callback(module.register_forward_hook(hook).remove)
            self.model(input_ids=inputs["input_ids"][:1, :2], use_cache=False)

    def _like_output(self, layer: int, hidden: Tensor) -> Any:
        """A hidden state in the kind of output that a block has: a tensor, a tuple or a list."""
        return _like(self._outputs[layer], hidden, keep=False)

    def _fork(self, branch: _Branch, masks: Sequence[Mask], call: _Call) -> _Fork:
        """The ways in which the branch's masks treat a layer, and what they share of it; counts what it will cost."""
        parted = ways(masks, branch.masks, branch.layer)
        shared = self._attention(branch, parted, call) if len(parted) > 1 or not any_head(parted) else None
        attended = shared is None or shared.z is None
        self.layer_tokens += branch.hidden.shape[-3:-1].numel() * (sum(ffn for _, ffn in parted) or int(attended))
        return _Fork(branch, shared, sorted(parted.items(), key=lambda way: -len(way[1])))

    def _taken(self, fork: _Fork, masks: Sequence[Mask], call: _Call) -> _Branch:
        """One block for the way of fewest masks, which is taken off the fork."""
        (_, ffn), owners = fork.ways.pop()
        branch, shared = fork.branch, fork.attention
        part, heads = self.anatomy.layers[branch.layer], masks[owners[0]].heads[branch.layer]
        first = shared is not None and shared.z is None
        state = _copied(branch.state)
        args, kwargs = _owned(call, state)
        with layer_ablated(part, heads, ffn), shared.computed_once() if shared else contextlib.nullcontext():
            output = part.block(branch.hidden.clone(), *args, **kwargs)
        if first:  # what the attention, computed once, keeps for later layers is every way's
            branch.state.update(_copied(state))
        return _Branch(branch.layer + 1, _first(output), owners, state)

    def _attention(self, branch: _Branch, parted: Mapping[Way, Any], call: _Call) -> _Attention:
        """The attention that ways share; of no heads nothing is computed, unless later layers may read it."""
        part, seen = self.anatomy.layers[branch.layer], self._attentions[branch.layer]
        attention = _Attention(part, plain=seen is not None)
        if not any_head(parted) and seen is not None and not any(map(_is_mutable, (*call[0], *call[1].values()))):
            attention.z = branch.hidden.new_zeros((*branch.hidden.shape[:-1], part.num_heads * part.d_head))
            attention.output = _like(seen, branch.hidden, keep=False)
        return attention


@dataclass(frozen=True, eq=False)
class _Branch:
    """A hidden state before a layer, the masks that share it, and its own copies of mutable arguments."""

    layer: int
    hidden: Tensor
    masks: list[int]
    state: dict[int, Any]


@dataclass(frozen=True, eq=False)
class _Fork:
    """A branch, the attention that its ways share in the next layer, and the ways left, most masks first."""

    branch: _Branch
    attention: _Attention | None
    ways: list[tuple[Way, list[int]]]


class _Caught(Exception):  # noqa: N818
    """Ends the pass that catches arguments."""


class _Attention:
    """One layer's attention: computed by the first branch, the others begin at its output projection.

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
        if self.z is None:
            with self._watched():
                yield
        else:
            with _replaced({self.part.attention: self._branched}):
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
            first = _first(output)
            if not self.plain:
                self.rest = first - projections[0].reshape(first.shape)
            self.output = _like(output, first.clone())

        # Before the gate, which stands there already: what it hands on is one branch's.
        handles = [out_proj.register_forward_pre_hook(before, prepend=True), out_proj.register_forward_hook(after),
                   attention.register_forward_hook(leave, prepend=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _branched(self, *args: Any, **kwargs: Any) -> Any:
        projected = self.part.out_proj(self.z)  # through this branch's gate
        own = projected.reshape(_first(self.output).shape)
        return _like(self.output, own if self.rest is None else own + self.rest)


@contextlib.contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
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


def _owned(call: _Call, state: dict[int, Any]) -> _Call:
    """A block's arguments with the branch's own copy in place of every mutable one."""
    def own(value: Any) -> Any:
        return state.setdefault(id(value), _copy(value)) if _is_mutable(value) else value

    args, kwargs = call
    return tuple(own(a) for a in args), {name: own(v) for name, v in kwargs.items()}


def _first(output: Any) -> Tensor:
    """The hidden state in what a block or an attention puts out: itself, or the first of several."""
    first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first


def _like(output: Any, first: Tensor, *, keep: bool = True) -> Any:
    """Another first item in the same kind of output: a tensor, a tuple or a list."""
    if not isinstance(output, (tuple, list)):
        return first
    return type(output)([first, *(output[1:] if keep else [None] * (len(output) - 1))])


def _is_mutable(value: Any) -> bool:
    return isinstance(value, (MutableMapping, MutableSequence))


def _copied(state: dict[int, Any]) -> dict[int, Any]:
    return {key: _copy(value) for key, value in state.items()}


def _copy(value: Any) -> Any:
    """Containers are copied, tensors in them are not: blocks put new ones in, they do not write into old ones."""
    if not _is_mutable(value):
        return value
    twin = copy.copy(value)
    for key, item in value.items() if isinstance(value, MutableMapping) else enumerate(value):
        twin[key] = _copy(item)
    return twin


def _device(embeddings: Any) -> torch.device:
    device: torch.device = embeddings.weight.device
    return device if device.type != "meta" else torch.device(embeddings._hf_hook.execution_device)
