"""Perplexity of a plain text under a model, whole or without what a mask leaves out.

As lm-eval's rolling log-likelihood: every token is predicted once. The text is read in windows as long as the model's
own, 1,024 tokens at most; the first begins with BOS (EOS where there is none), every other with the token before it,
and the last one is moved back so that it is full, too, and scored only where no earlier one was.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headcount.engine.encode import prefix_id
from headcount.errors import DataError, ModelError
from headcount.masks import Mask
from headcount.model.hooks import ablated
from headcount.model.load import LoadedModel

LONGEST = 1024
TEXT = Path(__file__).parent / "data" / "plain_text.txt"
# Positions whose log-probabilities are taken at a time: those of a whole window take a gigabyte in large vocabularies.
_AT_ONCE = 128


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        tokens: Of the text, all of which were predicted.
        bytes: Of the text in UTF-8; what bits are shared out among, so that tokenizers can be compared.
        nats_per_token: The mean negative log-likelihood.
    """

    tokens: int
    bytes: int
    nats_per_token: float

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood in bits, per byte of the text."""
        return self.nats_per_token * self.tokens / self.bytes / math.log(2)

    @property
    def perplexity(self) -> float:
        """Per token; infinite where it is beyond all numbers."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    def to_dict(self) -> dict[str, int | float | None]:
        """Plain data for JSON; None where a number is none."""
        numbers = {"nats_per_token": self.nats_per_token, "bits_per_byte": self.bits_per_byte,
                   "perplexity": self.perplexity}
        return {"tokens": self.tokens, "bytes": self.bytes,
                **{name: value if math.isfinite(value) else None for name, value in numbers.items()}}


def read_text(path: Path | None = None) -> str:
    """A text file, or the text that comes along.

    Raises:
        DataError: If it cannot be read, is not UTF-8, or is empty.
    """
    path = path or TEXT
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the text {path} cannot be read ({error}): name a plain text file in UTF-8") from error
    if not text.strip():
        raise DataError(f"the text {path} is empty: name a file that has text in it")
    return text


def perplexity(loaded: LoadedModel, mask: Mask | None, text: str, longest: int = LONGEST) -> Perplexity:
    """Perplexity of a text, under the model or without what a mask leaves out.

    Args:
        loaded: The full model.
        mask: What is kept; None keeps everything.
        text: Any.
        longest: The most tokens that are read at once, where the model's window is longer.

    Raises:
        DataError: If the text has no tokens.
        ModelError: If the tokenizer has neither a BOS nor an EOS token.
    """
    prefix = prefix_id(loaded.tokenizer)
    if prefix is None:
        raise ModelError(f"a text begins with a BOS or EOS token; the tokenizer of {loaded.name} has neither")
    tokens = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not tokens:
        raise DataError(f"the text {text[:40]!r} has no tokens: give a longer one")
    # The token at each position of `ids` is read to predict the one behind it.
    ids = torch.tensor([prefix, *tokens])
    total = 0.0
    with torch.no_grad(), ablated(loaded.anatomy, mask) if mask is not None else contextlib.nullcontext():
        for start, first, end in windows(len(tokens), min(longest, loaded.max_length)):
            logits = loaded.model(input_ids=ids[None, start:end].to(loaded.device), use_cache=False).logits[0]
            total += _nats(logits[first - start :], ids[first + 1 : end + 1])
    return Perplexity(len(tokens), len(text.encode()), total / len(tokens))


def windows(tokens: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """Where each window begins, which is its first scored position, and where it ends."""
    for first in range(0, tokens, longest):
        end = min(first + longest, tokens)
        yield max(end - longest, 0), first, end


def _nats(logits: Float[Tensor, "pos vocab"], targets: Int[Tensor, " pos"]) -> float:
    """Negative log-likelihood of these targets, summed in double precision."""
    total = 0.0
    for start in range(0, len(targets), _AT_ONCE):
        some, wanted = logits[start : start + _AT_ONCE], targets[start : start + _AT_ONCE]
        nats = torch.nn.functional.cross_entropy(some.float(), wanted.to(some.device), reduction="none")
        total += float(nats.double().sum())
    return total
