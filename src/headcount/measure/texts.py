"""Random texts for induction scores: sequences of unique random tokens that are repeated, or as many times longer.

Token ids are drawn, never text. The tokenizer's merges rank tokens by frequency: the first and last 4 % are left out. A
text depends on the seed, its length and its number alone, so that no score depends on batches. The protocol "paper" has
the paper's lengths, one text of each of 25, 27, ... 223; the paper's draw had no seed, this one has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headcount.errors import OptionError
from headcount.model.load import LoadedModel

Protocol = Literal["sound", "paper"]
LENGTHS = (25, 58, 91, 124, 157, 190, 223)
PAPER_LENGTHS = tuple(range(25, 225, 2))
SEEDS = 14
REPEATS = 4
_EXCLUDED = 0.04


def drawn_texts(
    loaded: LoadedModel, lengths: Sequence[int] | None, repeats: int, seeds: int | None, seed: int, protocol: Protocol
) -> tuple[Texts, list[str]]:
    """The texts, and what must be told of them; arguments as of `headcount.measure.induction.induction_scores`.

    Raises:
        OptionError: If an option is out of range, or no length fits.
    """
    chosen, seeds = _options(lengths, repeats, seeds, protocol)
    tokens, notes = usable_tokens(loaded.tokenizer, loaded.model)
    start = [] if loaded.tokenizer.bos_token_id is None else [int(loaded.tokenizer.bos_token_id)]
    if not start:
        left_out = ", which copying leaves out of view" if protocol == "sound" else ""
        notes.append(f"the tokenizer has no BOS token: texts begin with a random token{left_out}")
    kept, too_long = _fitting(chosen, repeats, loaded.max_length, len(start), len(tokens))
    notes += too_long
    members = [(length, number) for length in kept for number in range(seeds)]
    notes += _windows(loaded, max(kept), repeats)
    return Texts(tokens, start, repeats, seed, members), notes


def _windows(loaded: LoadedModel, longest: int, repeats: int) -> list[str]:
    """Which layers cannot see a whole text; `longest` is that of a sequence."""
    config = loaded.model.config.get_text_config()
    kinds = (getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
             or ["sliding_attention"] * loaded.anatomy.num_layers)
    notes = []
    for kind, name in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size"),
                       ("local", "window_size")):
        window, layers = getattr(config, name, None), list(kinds).count(kind)
        if window and layers and window <= longest * repeats:
            none = "no" if window <= longest else "not every"
            notes.append(f"attention in {layers} of {loaded.anatomy.num_layers} layers sees {window} tokens at most: "
                         f"in the longest texts heads there reach {none} earlier occurrence of a token")
    return notes


def _options(
    lengths: Sequence[int] | None, repeats: int, seeds: int | None, protocol: Protocol
) -> tuple[tuple[int, ...], int]:
    if repeats < 2:
        raise OptionError(f"a sequence must stand at least 2 times in a text, not {repeats}")
    paper = protocol == "paper"
    chosen = tuple(dict.fromkeys(lengths)) if lengths is not None else PAPER_LENGTHS if paper else LENGTHS
    seeds = (1 if paper else SEEDS) if seeds is None else seeds
    if not chosen or min(chosen) < 2 or seeds < 1:
        raise OptionError("induction heads need lengths of at least 2 tokens, and at least 1 text of each")
    return chosen, seeds


def _fitting(
    lengths: Sequence[int], repeats: int, window: int, bos: int, tokens: int
) -> tuple[list[int], list[str]]:
    """The lengths whose texts fit into the window, and whose copying texts have unique tokens; and what is left out."""
    longest = min((window - bos) // repeats, tokens // repeats)
    kept = [n for n in lengths if n <= longest]
    limits = f"window of {window} tokens, {tokens} tokens to draw from"
    if not kept:
        raise OptionError(f"no random sequence fits, standing {repeats} times ({limits}): the shortest has "
                          f"{min(lengths)} tokens, and {longest} would do: give shorter lengths (lengths; "
                          "--induction-lengths, --lengths)")
    out = len(kept) < len(lengths)
    return kept, [f"random sequences of more than {longest} tokens are left out ({limits})"] if out else []


def texts_of(
    lengths: Sequence[int] | None, seeds: int | None, protocol: Protocol, *, window: int, tokens: int, has_bos: bool
) -> tuple[list[int], list[str]]:
    """How many tokens each random text has that `induction_scores` reads, of one kind; and what is left out.

    Args:
        lengths: As in `induction_scores`.
        seeds: As there.
        protocol: As there.
        window: The model's window in tokens.
        tokens: How many tokens there are to draw from.
        has_bos: Whether texts begin with BOS.

    Raises:
        OptionError: If an option is out of range, or no length fits.
    """
    chosen, number = _options(lengths, REPEATS, seeds, protocol)
    kept, left_out = _fitting(chosen, REPEATS, window, int(has_bos), tokens)
    return [has_bos + REPEATS * length for length in kept for _ in range(number)], left_out


def most_texts(length: int, repeats: int, heads: int, entries: int) -> int:
    """How many texts a batch has, so that one layer's attention has at the most so many entries."""
    return max(1, entries // (heads * (length * repeats + 1) ** 2))


def usable_tokens(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[Int[np.ndarray, " token"], list[str]]:
    """The ids that texts are drawn from, most frequent first where that is known, and notes.

    Where the tokenizer has merges (BPE), they are ranked by frequency: tokens that merges make, without the 4 % of the
    lowest and of the highest ranks. Otherwise every token but special and added ones.
    """
    known = tokenizer.get_vocab()
    embeddings: Any = model.get_input_embeddings()
    size = min(int(embeddings.num_embeddings), int(model.config.get_text_config().vocab_size))
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    # Several merges can make one token: its first rank counts.
    ranked = list(dict.fromkeys(known[made] for made in _merged(tokenizer) if made in known))
    notes = []
    if ranked:
        out = int(_EXCLUDED * len(ranked))
        ranked = ranked[out : len(ranked) - out]
    else:
        ranked = sorted(known.values())
        notes.append("the tokenizer has no merges that would rank its tokens by frequency: all but special ones are "
                     "drawn from")
    return np.array([i for i in ranked if i not in special and i < size], np.int64), notes


def _merged(tokenizer: Any) -> list[str]:
    """What the merges of a BPE tokenizer make, in their order; empty for other tokenizers."""
    ranks = getattr(tokenizer, "bpe_ranks", None)
    if ranks:
        return ["".join(pair) for pair in sorted(ranks, key=ranks.__getitem__)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    model = json.loads(backend.to_str())["model"]
    prefix = model.get("continuing_subword_prefix") or ""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or ()]
    return [left + right.removeprefix(prefix) for left, right in pairs]


@dataclass(frozen=True, eq=False)
class Texts:
    """What texts are made of.

    Args:
        tokens: Ids to draw from.
        start: BOS, or nothing.
        repeats: How often a sequence stands in a text, or how many times longer it is.
        seed: Seed of the random texts.
        members: Length and number of each.
    """

    tokens: Int[np.ndarray, " token"]
    start: list[int]
    repeats: int
    seed: int
    members: Sequence[tuple[int, int]]

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of sequences that there are texts of."""
        return tuple(dict.fromkeys(length for length, _ in self.members))

    def drawn(self, chosen: Sequence[int], *, repeated: bool) -> Int[Tensor, "batch pos"]:
        """BOS and a sequence of unique tokens that is repeated, or one that is so many times longer."""
        rows = []
        for length, number in (self.members[i] for i in chosen):
            generator = np.random.default_rng([self.seed, length, number, int(repeated)])
            own = generator.choice(self.tokens, length if repeated else length * self.repeats, replace=False)
            rows.append(np.concatenate([self.start, np.tile(own, self.repeats if repeated else 1)]).astype(np.int64))
        return torch.from_numpy(np.stack(rows))

    def batches(self, heads: int, entries: int) -> Iterator[list[int]]:
        """Texts of one length each, so many that one layer's attention has that many entries."""
        for length in self.lengths:
            own = [i for i, member in enumerate(self.members) if member[0] == length]
            most = most_texts(length, self.repeats, heads, entries)
            yield from (own[i : i + most] for i in range(0, len(own), most))
