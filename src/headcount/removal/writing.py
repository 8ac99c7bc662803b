"""What a model writes: greedy continuations of a few prompts, and how much of them it repeats.

Accuracy and perplexity are taken on texts that others wrote. A model that has lost too much may keep both and still
repeat itself as soon as it reads its own words, which the share of repeated 4-grams shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from headcount.engine.encode import prefix_id
from headcount.errors import OptionError
from headcount.masks import Mask
from headcount.model.hooks import ablated
from headcount.model.load import LoadedModel
from headcount.model.read import quiet

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a girl who",
    "Water boils when",
    "To bake a loaf of bread, first",
)
NEW_TOKENS = 40
_GRAM = 4


@dataclass(frozen=True)
class Writing:
    """What the full and the removed model write after the same prompts.

    Attributes:
        prompts: What both were given.
        full: How the full model goes on.
        removed: How the model without some parts goes on.
        full_repeated: The share of 4-grams that stood in the same continuation before, over all of the full model's.
        removed_repeated: The same of the removed model's.
    """

    prompts: tuple[str, ...]
    full: tuple[str, ...]
    removed: tuple[str, ...]
    full_repeated: float
    removed_repeated: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def write(
    loaded: LoadedModel, mask: Mask, prompts: Sequence[str] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> Writing:
    """What a model writes as it is, and without what a mask leaves out."""
    full, removed = (_written(loaded, which, prompts, new_tokens) for which in (None, mask))
    return Writing(tuple(prompts), tuple(_texts(loaded, full)), tuple(_texts(loaded, removed)), repeated(full),
                   repeated(removed))


def continuations(
    loaded: LoadedModel, mask: Mask | None, prompts: Sequence[str] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> list[str]:
    """The greedy continuation of every prompt, one after another.

    Args:
        loaded: The full model.
        mask: What is kept; None keeps everything.
        prompts: Texts as they are, without a chat template.
        new_tokens: The most that are written of each; less where the model's window or its own end comes first.

    Raises:
        OptionError: If a prompt leaves no room in the model's window, or has no tokens.
    """
    return _texts(loaded, _written(loaded, mask, prompts, new_tokens))


def repeated(continued: Sequence[Sequence[int]]) -> float:
    """The share of 4-grams of tokens that stood in the same continuation before; 0 where there is none.

    Args:
        continued: The tokens as they were written: special ones are in no text, and a tokenizer may
            read many line breaks again as one token.
    """
    grams = again = 0
    for ids in continued:
        own = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
        grams, again = grams + len(own), again + len(own) - len({*own})
    return again / grams if grams else 0.0


def _written(
    loaded: LoadedModel, mask: Mask | None, prompts: Sequence[str], new_tokens: int
) -> list[list[int]]:
    """The tokens of every greedy continuation."""
    found, tokenizer = list[list[int]](), loaded.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else prefix_id(tokenizer)
    gates = ablated(loaded.anatomy, mask) if mask is not None else contextlib.nullcontext()
    with quiet(), torch.no_grad(), gates, _own_settings_off(loaded.model):
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long, device=loaded.device)
            if not 0 < ids.shape[1] < loaded.max_length:
                raise OptionError(f"the prompt {prompt[:40]!r} has {ids.shape[1]} tokens, and the window of "
                                  f"{loaded.name} {loaded.max_length}: give another prompt")
            how = GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=False, pad_token_id=padding,
                max_new_tokens=min(new_tokens, loaded.max_length - ids.shape[1]))
            generate: Any = loaded.model.generate
            written = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
            found.append(written[0, ids.shape[1] :].tolist())
    return found


def _texts(loaded: LoadedModel, continued: Sequence[Sequence[int]]) -> list[str]:
    return [str(loaded.tokenizer.decode([*ids], skip_special_tokens=True)) for ids in continued]


@contextlib.contextmanager
def _own_settings_off(model: PreTrainedModel) -> Iterator[None]:
    """Nothing of a model's own settings counts but its ends: `generate` fills in from them whatever it is not told.

    They may forbid tokens, penalise repetition, stop at strings, or give something else than token ids.
    """
    own: Any = model.generation_config
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=None if own is None else own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own
