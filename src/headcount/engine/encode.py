"""Texts to token ids: a context and a continuation become one request.

The rules are those of lm-evaluation-harness, so that log-likelihoods can be compared: trailing spaces of the context
move to the continuation; context + continuation is encoded as one string and the context's length cut off; an empty
context stands for the tokenizer's beginning-of-sequence token (or end-of-sequence token where it has none); special
tokens are added as the tokenizer does by itself, but not before a string that begins with them already; a request
longer than the window loses its beginning.

The paper's code (protocol "paper") encodes context and continuation apart, each as it stands, without special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from headcount.errors import ModelError, TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase



@dataclass(frozen=True, eq=False)
class Request:
    """A continuation to be scored after a context.

    Attributes:
        ids: What the model reads: context and continuation without the continuation's last token.
        targets: The continuation; its first token is predicted at position `len(ids) - len(targets)`.
        truncated: Whether the context lost its beginning to fit the window.
    """

    ids: Int[np.ndarray, " pos"]
    targets: Int[np.ndarray, " target"]
    truncated: bool = False

    @property
    def scored(self) -> Int[np.ndarray, " target"]:
        """The positions whose next-token distribution scores the targets."""
        return np.arange(len(self.ids) - len(self.targets), len(self.ids))


def encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int, *, apart: bool = False
) -> list[Request]:
    """Encode (context, continuation) pairs.

    Args:
        tokenizer: The model's tokenizer.
        pairs: Contexts and continuations as text.
        max_length: The model's window in tokens.
        apart: Whether context and continuation are encoded one by one, as the paper's code does.

    Raises:
        TaskError: If a continuation has no tokens of its own, or is longer than the window.
        ModelError: If a context is empty and the tokenizer has neither a BOS nor an EOS token.
    """
    if apart:
        return [_request(*_one_by_one(tokenizer, *pair), max_length, pair[1]) for pair in pairs]
    moved = [_move_spaces(context, continuation) for context, continuation in pairs]
    strings = sorted({s for context, continuation in moved if context for s in (context, context + continuation)})
    ids = dict(zip(strings, _encode_strings(tokenizer, strings), strict=True))
    requests = []
    for context, continuation in moved:
        if context:
            context_ids = ids[context]
            continuation_ids = ids[context + continuation][len(context_ids) :]
        else:
            context_ids, continuation_ids = _after_nothing(tokenizer, continuation)
        requests.append(_request(context_ids, continuation_ids, max_length, continuation))
    return requests


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def _encode_strings(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> list[list[int]]:
    prefix = prefix_id(tokenizer)
    beginning = str(tokenizer.decode([prefix])) if prefix is not None else ""
    begun = [bool(beginning) and s.startswith(beginning) for s in strings]
    encoded: list[list[int]] = [[] for _ in strings]
    for special in (True, False):
        chosen = [i for i, b in enumerate(begun) if b != special]
        if chosen:
            # verbose=False: strings over the window are cut below, the tokenizer need not warn of them.
            batch = tokenizer([strings[i] for i in chosen], add_special_tokens=special, verbose=False)["input_ids"]
            for i, one in zip(chosen, batch, strict=True):
                encoded[i] = list(one)
    return encoded


def _after_nothing(tokenizer: PreTrainedTokenizerBase, continuation: str) -> tuple[list[int], list[int]]:
    prefix = prefix_id(tokenizer)
    if prefix is None:
        raise ModelError("an empty context needs a tokenizer with a BOS or EOS token; this one has neither")
    ids = list(tokenizer.encode(continuation, add_special_tokens=False))
    return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)


def _one_by_one(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    if not context:
        return _after_nothing(tokenizer, continuation)
    left, right = tokenizer([context, continuation], add_special_tokens=False, verbose=False)["input_ids"]
    return list(left), list(right)


def prefix_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands before a text without context: BOS, else EOS, as in lm-eval."""
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return prefix if prefix is None else int(prefix)


def _request(context: list[int], continuation: list[int], max_length: int, text: str) -> Request:
    if not continuation:
        raise TaskError(f"the continuation {text[:60]!r} has no tokens of its own; fix that document's options")
    if len(continuation) > max_length:
        raise TaskError(f"the continuation {text[:60]!r} has {len(continuation)} tokens, the model reads {max_length}")
    if not context:
        raise TaskError(f"the context before {text[:60]!r} has no tokens; fix that document's context, or empty it")
    whole = context + continuation
    ids = whole[-(max_length + 1) :][:-1]
    return Request(np.array(ids, np.int64), np.array(continuation, np.int64), truncated=len(whole) > max_length + 1)
