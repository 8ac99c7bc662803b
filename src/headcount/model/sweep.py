"""The layer sweep: many masks through a model at once, sharing all layers before their first difference.

Masks are a tree: two masks that agree on the layers before l have one hidden state there. The sweep goes down that tree
with one hidden state per distinct prefix, so that single FFNs off, in each of L layers, cost (L+1)/2 forward passes
instead of L+1. Where masks part in a layer, its attention is computed once, and the branches start at its output
projection; a removed FFN is not computed, and a branch that differs by nothing else costs nothing. Branches of small
batches go through a layer together (`headcount.model.stack`), so that blocks are called less often.

transformers has no way to run one block, so blocks are called as the model calls them: a pass in which every block
hands its input on catches the arguments that each is given, and after the last block a pass of one token, in which the
last block hands out the kept positions, computes the final norm and the output layer. Blocks may pass mutable
arguments on to one another (keys and values that later layers use, in Gemma-4): every branch owns a copy. That all this
equals the plain forward pass is nowhere promised: contract 3 (`headcount.model.contracts`) proves it on the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from headcount.masks import Mask, Way, any_head, ways
from headcount.model.anatomy import Anatomy, LayerAnatomy
from headcount.model.gates import layer_ablated
from headcount.model.stack import can_stack, gated, instead, projection_inputs, tiled

# Kept positions that pass the output layer together.
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
        together: Branches go through a layer together up to so many tokens; 0: one by one.
        layer_tokens: Positions that blocks computed so far, layers added up; a branch that shares the attention and
            removes the FFN counts none.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    together: int = 0
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
            waiting.append((owners, kept))
            held += len(kept)
            if held >= _FINISHED:
                yield from self._finished(waiting)
                waiting, held = [], 0
        yield from self._finished(waiting)

    def _finished(
        self, waiting: Sequence[tuple[list[int], Tensor]]
    ) -> Iterator[tuple[list[int], Float[Tensor, "kept vocabulary"]]]:
        if not waiting:
            return
        logits = self._after_blocks(torch.cat([kept for _, kept in waiting])).logits[:, 0].float()
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
        """The last block's output of every distinct mask; the smallest branches first, so that few states wait."""
        hidden, calls = self._caught(inputs)
        # How many branches go together; blocks on several devices are called one branch at a time.
        devices = set(getattr(self.model, "hf_device_map", {}).values())
        size = max(1, self.together // hidden.shape[:-1].numel()) if len(devices) < 2 else 1
        waiting = [[_Branch(0, hidden, list(range(len(masks))), {})]]
        while waiting:
            group = waiting.pop()
            layer = group[0].layer
            if layer == self.anatomy.num_layers:
                yield from ((branch.masks, branch.hidden) for branch in group)
                continue
            found = sorted(self._advanced(group, masks, calls[layer], size), key=lambda b: -len(b.masks))
            waiting += [found[i : i + size] for i in range(0, len(found), size)]

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

    def _advanced(
        self, group: Sequence[_Branch], masks: Sequence[Mask], call: _Call, size: int
    ) -> list[_Branch]:
        """One block for all branches of a group: together where that can be done."""
        part, parted = self.anatomy.layers[group[0].layer], [ways(masks, b.masks, group[0].layer) for b in group]
        alone = size == 1 or sum(map(len, parted)) == 1 or self._attentions[group[0].layer] is None
        if alone or not can_stack(part, group[0].hidden, call):
            return [made for branch in group for made in self._through(branch, masks, call)]
        return self._stacked(group, parted, masks, call, size)

    def _stacked(
        self, group: Sequence[_Branch], parted: Sequence[Mapping[Way, list[int]]], masks: Sequence[Mask], call: _Call,
        size: int,
    ) -> list[_Branch]:
        """One block, once for all ways that keep the FFN and once for all that do not."""
        layer = group[0].layer
        part, seen = self.anatomy.layers[layer], self._attentions[layer]
        rows, length = group[0].hidden.shape[:2]
        attended = [i for i, way in enumerate(parted) if any_head(way)]
        nothing = group[0].hidden.new_zeros(rows, length, part.num_heads * part.d_head)
        z = dict.fromkeys(range(len(group)), nothing)
        z |= zip(attended, projection_inputs(part, [group[i].hidden for i in attended], call), strict=True)
        for i, way in enumerate(parted):
            self.layer_tokens += rows * length * (sum(ffn for _, ffn in way) or int(i in attended))
        every = np.ones(part.num_heads, bool)
        found: list[_Branch] = []
        for kept in (True, False):
            own = [(i, owners) for i, way in enumerate(parted) for (_, ffn), owners in way.items() if ffn is kept]
            for some in (own[i : i + size] for i in range(0, len(own), size)):
                inputs_of = torch.cat([gated(z[i], masks[owners[0]].heads[layer]) for i, owners in some])
                hidden = torch.cat([group[i].hidden for i, _ in some])
                output = _like(seen, part.out_proj(inputs_of).reshape(hidden.shape), keep=False)
                args, kwargs = tiled(call, len(some), rows)
                with layer_ablated(part, every, kept), _replaced({part.attention: instead(output)}):
                    left = _first(part.block(hidden, *args, **kwargs))
                found += [_Branch(layer + 1, out, owners, {})
                          for out, (_, owners) in zip(torch.split(left, rows), some, strict=True)]
        return found

    def _through(self, branch: _Branch, masks: Sequence[Mask], call: _Call) -> list[_Branch]:
        """One block, once for each way in which the branch's masks treat it."""
        layer = branch.layer
        part = self.anatomy.layers[layer]
        parted = ways(masks, branch.masks, layer)
        found: list[_Branch] = []
        shared = self._attention(branch, parted, call) if len(parted) > 1 or not any_head(parted) else None
        # The way that keeps the FFN comes first: it computes the attention, and counts.
        for (_, ffn), owners in sorted(parted.items(), key=lambda way: not way[0][1]):
            # What the attention, computed once, keeps for later layers is every way's.
            state = branch.state if len(parted) == 1 else _copied(found[0].state if found else branch.state)
            heads = masks[owners[0]].heads[layer]
            args, kwargs = _owned(call, state)
            attended = shared is not None and shared.z is not None
            with layer_ablated(part, heads, ffn), shared.computed_once(heads) if shared else contextlib.nullcontext():
                output = part.block(branch.hidden.clone(), *args, **kwargs)
            if ffn or not attended:
                self.layer_tokens += branch.hidden.shape[-3] * branch.hidden.shape[-2]
            hidden = _first(output)
            found.append(_Branch(layer + 1, hidden, owners, state))
        return found

    def _attention(self, branch: _Branch, parted: Mapping[Way, Any], call: _Call) -> _Attention:
        """The attention that ways share; of no heads nothing is computed, unless later layers may read it."""
        part, seen = self.anatomy.layers[branch.layer], self._attentions[branch.layer]
        attention = _Attention(part, plain=seen is not None)
        if not any_head(parted) and seen is not None and not any(map(_is_mutable, (*call[0], *call[1].values()))):
            shape = (*branch.hidden.shape[:-1], part.num_heads * part.d_head)
            attention.z = branch.hidden.new_zeros(shape)
            attention.output = _like(seen, part.out_proj(attention.z), keep=False)
        return attention


@dataclass(frozen=True, eq=False)
class _Branch:
    """A hidden state before a layer, the masks that share it, and its own copies of mutable arguments."""

    layer: int
    hidden: Tensor
    masks: list[int]
    state: dict[int, Any]


class _Caught(Exception):  # noqa: N818
    """Ends the pass that catches arguments."""


class _Attention:
    """One layer's attention: computed by the first branch, the others begin at its output projection."""

    def __init__(self, part: LayerAnatomy, *, plain: bool) -> None:
        self.part = part
        self.plain = plain  # puts out its projection and nothing else
        self.z: Tensor | None = None
        self.projected: Tensor | None = None
        self.output: Any = None

    @contextlib.contextmanager
    def computed_once(self, heads: Bool[np.ndarray, " head"]) -> Iterator[None]:
        if self.z is None:
            with self._watched():
                yield
        else:
            with _replaced({self.part.attention: self._branched(heads)}):
                yield

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        attention, out_proj = self.part.attention, self.part.out_proj

        def before(module: nn.Module, args: Any) -> None:
            self.z = args[0]

        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            self.projected = output.clone()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.output = _like(output, _first(output).clone())

        # Before the gate, which stands there already: what it hands on is one branch's.
        handles = [out_proj.register_forward_pre_hook(before, prepend=True), out_proj.register_forward_hook(after),
                   attention.register_forward_hook(leave, prepend=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _branched(self, heads: Bool[np.ndarray, " head"]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            projected = self.part.out_proj(self.z)  # through this branch's gate
            first = _first(self.output)
            if self.plain:
                own = projected.reshape(first.shape)
            else:  # attention that adds to its projection (BLOOM: the residual)
                own = first + (projected - self.projected).reshape(first.shape)
            return _like(self.output, own)

        return forward


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
