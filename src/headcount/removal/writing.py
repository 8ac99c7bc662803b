"""What a model writes: greedy continuations of a few prompts, and how much of them it repeats.

Accuracy and perplexity are taken on texts that others wrote. A model that has lost too much may keep both and still
repeat itself as soon as it reads its own words, which the share of repeated 4-grams shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

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
    full, removed = (continuations(loaded, which, prompts, new_tokens) for which in (None, mask))
    return Writing(tuple(prompts), tuple(full), tuple(removed), repeated(loaded.tokenizer, full),
                   repeated(loaded.tokenizer, removed))


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
    found, tokenizer = [], loaded.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else prefix_id(tokenizer)
    with quiet(), torch.no_grad(), ablated(loaded.anatomy, mask) if mask is not None else contextlib.nullcontext():
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long, device=loaded.device)
            if not 0 < ids.shape[1] < loaded.max_length:
                raise OptionError(f"the prompt {prompt[:40]!r} has {ids.shape[1]} tokens, and the window of "
                                  f"{loaded.name} {loaded.max_length}: give another prompt")
            # What a model's own settings would add to plain greedy decoding is named here, too.
            how = GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, pad_token_id=padding,
                max_new_tokens=min(new_tokens, loaded.max_length - ids.shape[1]))
            generate: Any = loaded.model.generate
            written = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
            found.append(str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)))
    return found


def repeated(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """The share of 4-grams of tokens that stood in the same text before; 0 where there is none."""
    grams = again = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        own = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
        grams, again = grams + len(own), again + len(own) - len({*own})
    return again / grams if grams else 0.0
