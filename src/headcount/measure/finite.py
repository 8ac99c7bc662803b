"""Results that are no numbers stop a measurement with one line: task, document, mask, the part of the model, the cause.

Results are looked at where they lie on the host; the model is asked only when one of them is a NaN or an infinity. Then
what is wrong is measured once more, each text by itself, since a text may have been spoiled by another one in its row:
attention gives the others' tokens no weight, but 0 times NaN is NaN. Weights through which removed heads would write
are blank meanwhile, for the same reason. Where all are numbers now, these are the results; else the first text that has
none is traced through the model (`headcount.model.finite`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from headcount.engine.encode import Request
from headcount.engine.engine import Engine
from headcount.engine.examples import ExampleScores
from headcount.engine.likelihoods import Likelihoods, Packed
from headcount.engine.pack import Budget
from headcount.errors import ModelError
from headcount.masks import Mask, all_heads, ffns_named, heads_named, mask_named
from headcount.model.damage import removed_heads_blank
from headcount.model.finite import Finding, first_no_gradient, first_no_number
from headcount.model.load import LoadedModel

# A text a batch: nothing stands beside it.
_ALONE = Budget(batch_tokens=1, gradient_tokens=1)
# Texts that are measured again before the first of them that has no number is traced.
_CHUNK = 32


def finite_likelihoods(
    loaded: LoadedModel, measured: Likelihoods, masks: Sequence[Mask], packed: Packed,
    requests: Callable[[], Sequence[Request]], named: Callable[[int], str], *, columns: int | None = None,
) -> Likelihoods:
    """Log-likelihoods, all of them numbers.

    Args:
        loaded: The model.
        measured: What the engine gave.
        masks: Under which masks.
        packed: The requests as they were laid out.
        requests: Gives them one by one; asked only where something is no number.
        named: What a request is called, such as "the log-likelihood of document 3".
        columns: The first so many logits count.

    Raises:
        ModelError: If one is no number, wherever it stands.
    """
    if np.isfinite(measured.loglikelihoods).all():
        return measured
    engine, own = Engine.of(loaded), requests()
    values, greedy = measured.loglikelihoods.copy(), measured.greedy.copy()
    for i, mask in enumerate(masks):
        if np.isfinite(values[i]).all():
            continue
        with removed_heads_blank(loaded.anatomy, mask) as blank:
            if blank:
                again = engine.loglikelihoods(packed, [mask], columns=columns)
                values[i], greedy[i] = again.loglikelihoods[0], again.greedy[0]
            for chunk in _chunks(~np.isfinite(values[i])):
                alone = engine.pack([[own[j]] for j in chunk], _ALONE, trees=False)
                again = engine.loglikelihoods(alone, [mask], columns=columns)
                values[i, chunk], greedy[i, chunk] = again.loglikelihoods[0], again.greedy[0]
                wrong = [j for j in chunk if not np.isfinite(values[i, j])]
                if wrong:
                    j = wrong[0]
                    raise _refused(f"{named(j)} is {values[i, j]:g}{_under(mask)}",
                                   _traced(loaded, own[j], mask, values[i, j], columns))
    return measured._replace(loglikelihoods=values, greedy=greedy)


def finite_gradients(
    loaded: LoadedModel, scores: ExampleScores, requests: Sequence[Request], named: Callable[[int], str]
) -> ExampleScores:
    """Gradient scores, all of them numbers.

    Args:
        loaded: The model.
        scores: What the engine gave.
        requests: The examples.
        named: What an example is called.

    Raises:
        ModelError: If one is no number, wherever it stands.
    """
    if np.isfinite(scores.heads).all() and np.isfinite(scores.ffns).all():
        return scores
    heads, ffns = scores.heads.copy(), scores.ffns.copy()
    for chunk in _chunks(~(np.isfinite(heads).all((0, 2)) & np.isfinite(ffns).all((0, 2)))):
        again = Engine.of(loaded).gradients([requests[j] for j in chunk], budget=_ALONE)
        heads[:, chunk], ffns[:, chunk] = again
        for j in chunk:
            if what := _components(loaded, heads[:, j], ffns[:, j]):
                one = requests[j]
                model, anatomy = loaded.model, loaded.anatomy
                finding = (first_no_number(model, anatomy, one.ids, scored=one.scored)
                           or first_no_gradient(model, anatomy, one.ids, one.scored, one.targets)
                           or Finding("the product of what these put out and its gradient, while both are numbers: "
                                      "leave that document out"))
                raise _refused(f"the gradient score of {named(j)} is no number for {what}", finding)
    return ExampleScores(heads, ffns)


def finite_induction(
    loaded: LoadedModel, scores: Float[np.ndarray, "kind text head"], kinds: Sequence[str],
    text: Callable[[int, int], Int[np.ndarray, " pos"]],
) -> None:
    """Refuse induction scores that are no numbers.

    Args:
        loaded: The model, running eager attention.
        scores: Of every text and head.
        kinds: What each kind of score is called.
        text: The token ids of a text, by the index of kind and text.

    Raises:
        ModelError: If one is no number, with text and head.
    """
    wrong = np.argwhere(~np.isfinite(scores))
    if not len(wrong):
        return
    kind, number, _ = (int(x) for x in wrong[0])
    heads = _heads(loaded, ~np.isfinite(scores[kind, number]))
    finding = first_no_number(loaded.model, loaded.anatomy, text(kind, number), scored=np.zeros(1, np.int64))
    finding = finding or Finding(
        "what the output layer reads of what heads write, while the pass itself gives numbers: look at the weights of "
        "the output layer and of the last norm, or use the type float32 (`dtype`)", ("dtype",))
    raise _refused(f"the {kinds[kind].replace('_', ' ')} score of {heads} is no number in random text {number}",
                   finding)


def _traced(
    loaded: LoadedModel, request: Request, mask: Mask, value: float, columns: int | None
) -> Finding:
    """Where a request's forward pass goes wrong, whose log-likelihood is this."""
    found = first_no_number(loaded.model, loaded.anatomy, request.ids, mask, scored=request.scored, columns=columns)
    if found is not None:
        return found
    if not np.isneginf(value):
        return Finding("nothing that a second pass of that prompt alone would show: run it again")
    tokens = ", ".join(repr(loaded.tokenizer.decode([int(t)])) for t in dict.fromkeys(request.targets))
    return Finding(f"the output layer, which gives a token of the continuation ({tokens[:60]}) a logit of -inf: the "
                   "model never writes it, so change that document's options, or leave the task out")


def _refused(what: str, finding: Finding) -> ModelError:
    return ModelError(f"{what}; it goes wrong first in {finding.text}", fields=finding.fields)


def _chunks(wrong: Bool[np.ndarray, " request"]) -> list[list[int]]:
    which = np.flatnonzero(wrong).tolist()
    return [which[i : i + _CHUNK] for i in range(0, len(which), _CHUNK)]


def _components(
    loaded: LoadedModel, heads: Float[np.ndarray, "score head"], ffns: Float[np.ndarray, "score ffn"]
) -> str:
    """The heads and FFNs whose scores are no numbers, named; empty where there are none."""
    layers = [int(layer) for layer in np.flatnonzero(~np.isfinite(ffns).all(0))]
    return ", ".join(filter(None, (_heads(loaded, ~np.isfinite(heads).all(0)), ffns_named(layers))))


def _heads(loaded: LoadedModel, which: Bool[np.ndarray, " head"]) -> str:
    places = all_heads(loaded.anatomy.heads_per_layer)
    return heads_named([places[i] for i in np.flatnonzero(which)])


def _under(mask: Mask) -> str:
    return f" {mask_named(mask)}" if mask_named(mask) else ""

