"""Copying: whether a head raises the logits of the token that it attends to most (Olsson et al. 2022).

    score[t] = relu(logit - mean)[attended] / sum relu(logit - mean)

over the tokens in view of position t, on a text of unique random tokens; the mean over t is the head's. A position's
logits differ from log-probabilities by one normaliser, which cancels, so only the output layer's rows of tokens in view
are ever read. Every logit is z . (W_O[h] . direction of the token): nothing of the size of heads x d_model is made.

Protocol "sound": raw logits of what the head writes at t, c = z[l,h,t] . W_O[h], without bias, through the gain of a
norm on the branch's output, where there is one, and of the final norm, centred where that is a LayerNorm. In view are
positions 1 to t: the first is left out, BOS or (in tokenizers without one) a random token, since heads rest on it
whatever it is. The mean is over t from 2 on.

Protocol "paper", as the code of Bansal et al. (2023) has it: every block is given the embeddings instead of the
residual stream; logits are probabilities of the head's value of position t itself, through the output projection with
its bias and the output layer, without final norm; BOS is in view, and t begins with the first token. That code knows
OPT; here blocks of any family are run on these inputs, and once more in rows of one token, where a head's output is its
value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headcount.engine.blocks import Inputs
from headcount.engine.stream import Stream, away
from headcount.measure.probes import ends_of, stream_told
from headcount.model.anatomy import Anatomy
from headcount.model.attention import Visit, attention_seen, fed, one_logit
from headcount.model.circuits import (
    BranchNorm,
    EndMaps,
    branch_norms,
    keys,
    output_bias,
    unembedding,
    unembedding_bias,
)
from headcount.model.load import LoadedModel

# A head that writes nothing towards any token raises rounding errors: sums of them, relative to the largest logit.
_FLOOR = 1e-5


@dataclass(frozen=True, eq=False)
class Reading:
    """How a model's heads are read by its output layer.

    Args:
        loaded: The model, running eager attention.
        told: What it must be told, so that attentions hand out their probabilities.
        ends: What lies between the residual stream and its ends.
        norms: Norms on attention's output, by layer.
        stream: The schedule by which its weights are read from files; None where they are in memory.
    """

    loaded: LoadedModel
    told: Mapping[str, bool]
    ends: EndMaps
    norms: Mapping[int, BranchNorm]
    stream: Stream | None

    @classmethod
    def of(cls, loaded: LoadedModel, told: Mapping[str, bool]) -> Reading:
        """Find out, in memory with about two passes of d_model tokens without FFNs, from files without blocks."""
        return cls(loaded, told, ends_of(loaded), branch_norms(loaded.norms), stream_told(loaded, told))

    def away(self, directions: Tensor) -> Tensor:
        """Directions where they wait between two layers: in the host's memory, if the next one is still to be read."""
        return directions if self.stream is None else away(directions)

    def run(self, ids: Int[Tensor, "batch pos"]) -> None:
        """One forward pass, for hooks to see."""
        with one_logit(self.loaded.model):
            self.loaded.model(**self.inputs(ids), use_cache=False)

    def inputs(self, ids: Int[Tensor, "batch pos"]) -> Inputs:
        """The model's keyword arguments."""
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.told}


@dataclass(frozen=True, eq=False)
class Watch:
    """What is looked at of every layer's attention while texts pass it.

    Attributes:
        visit: Is shown a layer's heads and attention.
        result: The scores, once all layers were shown: of every head of the model, by layer, then index; None where
            another look has them.
        around: What is open besides, such as hooks that give blocks other inputs.
    """

    visit: Visit
    result: Callable[[], Float[Tensor, "*kind batch head"]] | None
    around: Callable[[Anatomy, int | None], contextlib.AbstractContextManager[Any]] | None = None

    @contextlib.contextmanager
    def over(self, anatomy: Anatomy, layer: int | None = None) -> Iterator[None]:
        """Look while a layer of a model is computed; None: all of them."""
        around = contextlib.nullcontext() if self.around is None else self.around(anatomy, layer)
        with around, attention_seen(anatomy, self.visit, layer):
            yield


def sound_copying(reading: Reading, ids: Int[Tensor, "batch pos"]) -> Watch:
    """Looks for copying in texts, by protocol "sound"."""
    directions = reading.away(unembedding(reading.loaded.model, ids[:, 1:]) @ reading.ends.exit.T)
    scores: dict[int, Tensor] = {}

    def visit(layer: int, z: Tensor, attention: Tensor) -> None:
        read = keys(reading.loaded.anatomy.layers[layer], directions, z, reading.norms.get(layer))
        # One row at a time: each takes as much as its attention.
        rows = []
        for i in range(len(z)):
            logits = torch.einsum("thd,shd->hts", z[i, 1:].float(), read[i])
            attended = attention[i, :, 1:, 1:].argmax(-1)
            rows.append(_ratio(logits, attended, _FLOOR)[:, 1:].mean(-1))
        scores[layer] = torch.stack(rows)

    return Watch(visit, lambda: torch.cat([scores[layer].cpu().double() for layer in sorted(scores)], -1)[None])


@dataclass(frozen=True, eq=False)
class PaperCopying:
    """Looks for copying in texts by protocol "paper": at what heads attend to, then at their values.

    Attributes:
        reading: How heads are read.
        ids: The texts; values are looked at in rows of one token, `ids.reshape(-1, 1)`.
    """

    reading: Reading
    ids: Int[Tensor, "batch pos"]
    _embedded: list[Tensor] = field(default_factory=list)
    _attended: dict[int, Tensor] = field(default_factory=dict)

    def attention(self) -> Watch:
        """What each position attends to most, where every block is given the embeddings; it has no result."""
        def visit(layer: int, z: Tensor, attention: Tensor) -> None:
            self._attended[layer] = attention.argmax(-1)

        return Watch(visit, None, self._given_embeddings)

    def values(self) -> Watch:
        """The scores, once attention was looked at."""
        anatomy, model, ids = self.reading.loaded.anatomy, self.reading.loaded.model, self.ids
        scores: dict[int, Tensor] = {}
        directions = unembedding(model, ids)
        if directions.shape[-1] != anatomy.layers[0].d_model:  # a projection before the output layer (OPT-350M)
            directions = directions @ self.reading.ends.exit.T
        directions, biases = self.reading.away(directions), unembedding_bias(model, ids)

        def visit(layer: int, z: Tensor, attention: Tensor) -> None:
            part = anatomy.layers[layer]
            own = directions.to(z.device)
            # Where an attention has sinks, a row of one token does not sum to 1.
            values = (z[:, 0] / attention[:, :, 0, 0, None]).reshape(*ids.shape, *z.shape[2:]).float()
            read = keys(part, own, z, None)
            attended = self._attended.pop(layer)
            always = own @ output_bias(part, z) + biases.to(z.device)
            rows = []
            for i in range(len(ids)):
                logits = torch.einsum("thd,shd->hts", values[i], read[i]) + always[i]
                highest = logits.masked_fill(~_view(logits), -torch.inf).amax(-1, keepdim=True)
                rows.append(_ratio((logits - highest).exp(), attended[i])[:, 1:].mean(-1))
            scores[layer] = torch.stack(rows)

        return Watch(visit, lambda: torch.cat([scores[layer].cpu().double() for layer in sorted(scores)], -1)[None],
                     self._given_tokens)

    @contextlib.contextmanager
    def _given_embeddings(self, anatomy: Anatomy, layer: int | None) -> Iterator[None]:
        """Give every block what the first one is given; that is kept."""
        with fed(anatomy, self._embedded[0] if self._embedded else None, layer) as first:
            yield
        self._embedded[:] = self._embedded or first

    def _given_tokens(self, anatomy: Anatomy, layer: int | None) -> contextlib.AbstractContextManager[Any]:
        """The same, in rows of one token."""
        return fed(anatomy, self._embedded[0].reshape(self.ids.numel(), 1, -1), layer)


def _ratio(
    logits: Float[Tensor, "head pos pos"], attended: Int[Tensor, "head pos"], floor: float = 0.0
) -> Float[Tensor, "head pos"]:
    """The attended token's share of what lies above the mean of the tokens in view.

    It is 0 where nothing lies above it, or no more than `floor` times the largest logit.
    """
    view = _view(logits)
    logits = logits.masked_fill(~view, 0)
    largest = torch.maximum(logits.amax(-1), -logits.amin(-1))
    mean = logits.sum(-1, keepdim=True) / torch.arange(1, len(view) + 1, device=logits.device)[:, None]
    raised = logits.sub_(mean).relu_().mul_(view)
    own, total = raised.gather(-1, attended[..., None])[..., 0], raised.sum(-1)
    # Asked this way round, NaN stays NaN.
    return torch.where(total <= floor * largest, 0, own / total)


def _view(logits: Float[Tensor, "head pos pos"]) -> Tensor:
    return torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).tril()
