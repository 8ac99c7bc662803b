"""Induction heads: prefix matching and copying of every head (Olsson et al. 2022; Bansal et al. 2023, section 5).

Prefix matching, on BOS and L unique random tokens that stand there R times, over the positions t of repeats 2 to R:

    score = mean over t of the sum over earlier occurrences s of t's token of attention[t, s + 1]

A token's earlier occurrences lie L, 2 L, ... positions back, so these entries are diagonals of the attention matrix;
they are taken as soon as a layer's matrix is there. The paper's code (protocol "paper") counts attention to the first
token besides, at the last position of every repeat. Copying (`headcount.measure.copying`) has texts of R L unique
tokens. The previous-token score is the mean attention to the position before, BOS left out, in the repeated texts.

Cost, in eager forward passes of the same text without logits (SmolLM2, two cores; docs/performance.md): prefix matching
.92 to 1.02, copying 1.2 to 1.6 ("paper": 1.9 to 2.7), and once 2 s for the OV score and what norms do. 98 texts of each
kind: 97,412 tokens, 192 s.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Float, Int
from more_itertools import peekable
from torch import Tensor

from headcount.engine.engine import Engine
from headcount.engine.forward import Progress
from headcount.engine.stream import Stream, Waiting, Wave, fitting
from headcount.errors import ModelError
from headcount.masks import Mask
from headcount.measure.copying import PaperCopying, Reading, Watch, sound_copying
from headcount.measure.finite import finite_induction
from headcount.measure.probes import probe_of
from headcount.measure.texts import REPEATS, Protocol, Texts, drawn_texts, most_texts
from headcount.model.attention import attention_keywords, eager
from headcount.model.circuits import ov_copying
from headcount.model.devices import doubled
from headcount.model.load import LoadedModel
from headcount.results import InductionScores
from headcount.stats import ranks

# Entries of one layer's attention that a batch may have, by device, and on others; eager attention has several copies.
_ENTRIES, _ENTRIES_ELSEWHERE = {"cpu": 2**23}, 2**28
_KINDS = ("prefix_matching", "previous_token", "copying")
# A function from a batch of texts to scores per text and head.
_Work = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "kind batch head"]]
# What passes the model one after another, and what begins to look at it; the last look has the scores.
_Looks = list[tuple[Tensor, Callable[[], Watch]]]


@torch.no_grad()
def induction_scores(
    loaded: LoadedModel,
    *,
    lengths: Sequence[int] | None = None,
    repeats: int = REPEATS,
    seeds: int | None = None,
    seed: int = 1234,
    protocol: Protocol = "sound",
    progress: Progress | None = None,
) -> InductionScores:
    """Prefix matching, copying, previous-token and OV copying scores of every head.

    Args:
        loaded: The model; it runs eager attention meanwhile.
        lengths: Lengths of random sequences, in tokens; None takes seven from 25 to 223 ("paper": all odd ones). Those
            that do not fit, repeated, into the model's window or vocabulary are left out, and the notes say so.
        repeats: How often each sequence stands in a text of prefix matching.
        seeds: How many texts of each length; None takes 14 ("paper": 1).
        seed: Seed of the random texts.
        protocol: "sound" or "paper".
        progress: Called with the number of tokens after each batch.

    Raises:
        OptionError: If an option is out of range, or no length fits.
        ModelError: If the model cannot be measured or hands out no attention probabilities, memory is too small for one
            text, or a score is no number.
    """
    Engine.of(loaded).prove()
    texts, notes = drawn_texts(loaded, lengths, repeats, seeds, seed, protocol)
    with eager(loaded.model):
        reading = Reading.of(loaded, attention_keywords(loaded.name, loaded.model, loaded.anatomy))
        measured = _measured(reading, texts, protocol, progress)
        scores, straight = ov_copying(loaded.model, loaded.anatomy, reading.ends, reading.norms,
                                      probe_of(loaded, reading.told, reading.stream))
    lacking = [layer for layer, ok in enumerate(straight) if not ok.all()]
    if lacking:
        notes.append(f"the OV score is not defined in {len(lacking)} of {loaded.anatomy.num_layers} layers (the first "
                     f"is {lacking[0]}): values there are no linear map of the residual stream")
    return _summary(loaded, measured, texts, protocol, torch.cat(scores).double().numpy(), notes)


def check(loaded: LoadedModel, *, lengths: Sequence[int] | None = None, protocol: Protocol = "sound") -> None:
    """Refuse, before anything is measured, what `induction_scores` would refuse in the end.

    Raises:
        HeadcountError: As it does.
    """
    drawn_texts(loaded, lengths, REPEATS, None, 0, protocol)
    with eager(loaded.model):
        attention_keywords(loaded.name, loaded.model, loaded.anatomy)


def _measured(
    reading: Reading, texts: Texts, protocol: Protocol, progress: Progress | None
) -> Float[np.ndarray, "kind text head"]:
    """The scores of every text and head, in the order of `_KINDS`."""
    loaded, bos = reading.loaded, len(texts.start)
    scores = np.zeros((len(_KINDS), len(texts.members), loaded.anatomy.num_heads))
    entries = entries_on(loaded.device)
    stream, left = reading.stream, list[_Text]()
    for batch in texts.batches(max(loaded.anatomy.heads_per_layer), entries):
        length = texts.members[batch[0]][0]
        for kinds, repeated in ((slice(0, 2), True), (slice(2, 3), False)):
            ids = texts.drawn(batch, repeated=repeated).to(loaded.device)
            looks_at = functools.partial(_prefix_looks, length, texts.repeats, bos, protocol) if repeated else (
                functools.partial(_copying_looks, reading, protocol))
            if stream is not None:
                left += [_Text(kinds, batch, *look) for look in looks_at(ids)]
                continue
            scores[kinds, batch] = _halved(functools.partial(_run, reading, looks_at), ids).numpy()
            if progress is not None:
                progress(ids.numel())
    full, states = [Mask.full(loaded.anatomy.heads_per_layer)], states_of_induction(loaded.model.dtype)
    waiting = peekable(Waiting(text, lambda text: reading.inputs(text.ids), full, states, "") for text in left)
    while stream is not None and waiting:
        _one_pass(reading, stream, waiting, scores, progress)
    finite_induction(loaded, scores, _KINDS,
                     lambda kind, i: texts.drawn([i], repeated=_KINDS[kind] != "copying")[0].numpy())
    return scores


def entries_on(device: torch.device) -> int:
    """How many entries of one layer's attention a batch of texts may have on a device."""
    return _ENTRIES.get(device.type, _ENTRIES_ELSEWHERE)


def largest_batch(texts: Iterable[int], bos: int, heads: int, device: torch.device) -> tuple[int, int]:
    """How many tokens the largest batch of texts of these numbers of tokens has, and each text of it.

    Args:
        texts: Tokens of every text.
        bos: How many of them are BOS.
        heads: The most that a layer has.
        device: On which texts are read.
    """
    return max((tokens * min(number, most_texts(tokens - bos, 1, heads, entries_on(device))), tokens)
               for tokens, number in Counter(texts).items())


def states_of_induction(dtype: torch.dtype) -> int:
    """How many hidden states of a text wait between two blocks: its own, and directions in float32 beside it."""
    return 1 + 4 // dtype.itemsize


@dataclass(frozen=True, eq=False)
class _Text:
    """Texts that are read from files block by block, with others.

    Attributes:
        kinds: Which scores they are for.
        members: Which texts they are.
        ids: Their tokens, as the model reads them.
        look: Begins to look at them; what is looked at may take memory.
    """

    kinds: slice
    members: list[int]
    ids: Int[Tensor, "row pos"]
    look: Callable[[], Watch]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.ids.numel()


def _one_pass(
    reading: Reading, stream: Stream, waiting: peekable[Waiting[_Text]],
    scores: Float[np.ndarray, "kind text head"], progress: Progress | None,
) -> None:
    """Fill in the scores of as many texts as may wait between two blocks."""
    output: Any = reading.loaded.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    waves = stream.enter(waiting)
    with fitting(waves, ""), stream.at_hand(output):
        watches = {id(wave): wave.batch.look() for wave in waves}

    def seen(layer: int, wave: Wave[_Text]) -> contextlib.AbstractContextManager[None]:
        return watches[id(wave)].over(reading.loaded.anatomy, layer)

    with fitting(waves, ""):
        for _ in stream.through(waves, seen):
            pass
    for wave in waves:
        if (result := watches[id(wave)].result) is None:
            continue
        scores[wave.batch.kinds, wave.batch.members] = result().numpy()
        if progress is not None:
            progress(wave.batch.tokens)


def _halved(work: _Work, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "kind batch head"]:
    """A batch's scores; in halves where memory is too small for it."""
    try:
        return work(ids)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        if len(ids) == 1:
            raise ModelError(f"memory is too small for one text of {ids.shape[1]} tokens with eager attention: give "
                             "shorter `lengths`", fields={"lengths": "--induction-lengths"}) from error
    return torch.cat([_halved(work, half) for half in ids.chunk(2)], 1)


def _prefix_looks(length: int, repeats: int, bos: int, protocol: Protocol, ids: Int[Tensor, "batch pos"]) -> _Looks:
    return [(ids, lambda: _prefix_watch(length, repeats, bos, protocol))]


def _copying_looks(reading: Reading, protocol: Protocol, ids: Int[Tensor, "batch pos"]) -> _Looks:
    if protocol == "sound":
        return [(ids, lambda: sound_copying(reading, ids))]
    # Texts pass twice, with other inputs of every block: first whole, then in rows of one token.
    looks = PaperCopying(reading, ids)
    return [(ids, looks.attention), (ids.reshape(-1, 1), looks.values)]


def _prefix_watch(length: int, repeats: int, bos: int, protocol: Protocol) -> Watch:
    scores: dict[int, Tensor] = {}

    def visit(layer: int, z: Tensor, attention: Tensor) -> None:
        scores[layer] = torch.stack([prefix_matching(attention, length, repeats, bos, protocol),
                                    doubled(attention.diagonal(-1, -2, -1)[..., bos:]).mean(-1)])

    return Watch(visit, lambda: torch.cat([scores[layer].cpu() for layer in sorted(scores)], -1))


def _run(
    reading: Reading, looks_at: Callable[[Int[Tensor, "batch pos"]], _Looks], ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, "kind batch head"]:
    """The scores of texts in passes of the model in memory."""
    results = []
    for tokens, look in looks_at(ids):
        watch = look()
        with watch.over(reading.loaded.anatomy):
            reading.run(tokens)
        results += [] if watch.result is None else [watch.result()]
    return results[-1]


def prefix_matching(
    attention: Float[Tensor, "batch head pos pos"], length: int, repeats: int, bos: int, protocol: Protocol = "sound"
) -> Float[Tensor, "batch head"]:
    """Mean over repeats 2 to `repeats` of the attention to tokens that followed earlier occurrences, in float64.

    Args:
        attention: Of `bos` tokens and a sequence of unique tokens that stands there `repeats` times.
        length: Of the sequence.
        repeats: How often it stands there.
        bos: Tokens before it, 0 or 1.
        protocol: "paper" adds attention to the first token at the last position of every repeat but the first.
    """
    counted = (repeats - 1) * length
    # The token at j stood at j - back before, so that j - back + 1 followed.
    total = torch.stack([doubled(attention.diagonal(1 - back, -2, -1)[..., bos + 1 :]).sum(-1)
                         for back in range(length, repeats * length, length)]).sum(0)
    if protocol == "paper":
        ends = [bos + n * length - 1 for n in range(2, repeats + 1)]
        total = total + doubled(attention[..., ends, bos]).sum(-1)
    return total / counted


def _summary(
    loaded: LoadedModel, measured: Float[np.ndarray, "kind text head"], texts: Texts, protocol: Protocol,
    ov: Float[np.ndarray, " head"], notes: Sequence[str],
) -> InductionScores:
    lengths = texts.lengths
    # Halves alternate in each length and from one length to the next, so that both have all.
    first = np.array([(lengths.index(length) + number) % 2 == 0 for length, number in texts.members])
    scores = dict(zip(_KINDS, measured, strict=True))
    n = len(texts.members)
    nothing = np.full(measured.shape[2], np.nan)
    halves = {kind: np.stack([x[half].mean(0) if half.any() else nothing for half in (first, ~first)])
              for kind, x in scores.items()}
    return InductionScores(
        protocol, loaded.anatomy.heads_per_layer, lengths, texts.repeats, texts.seed, n,
        prefix_matching=scores["prefix_matching"].mean(0), copying=scores["copying"].mean(0),
        previous_token=scores["previous_token"].mean(0), ov_copying=ov,
        variances={kind: x.var(0, ddof=1) if n > 1 else nothing for kind, x in scores.items()},
        halves=halves, reliability={kind: split_half(x) for kind, x in halves.items()}, notes=tuple(notes))


def split_half(halves: Float[np.ndarray, "2 head"]) -> float:
    """Reliability of the mean of two halves: Spearman's correlation over heads, stepped up (Spearman-Brown).

    NaN where a half is empty or has a single value.
    """
    return ranks.reliability(ranks.spearman(*halves))
