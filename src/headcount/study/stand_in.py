"""A stand-in for a tokenizer that is not at hand: it cuts text about where byte-level BPE tokenizers do.

Words with the space before them, numbers, and other signs are pieces, as in GPT-2's rule of splitting; a word of more
than `LONGEST` letters, which such a vocabulary is unlikely to have as one token, is cut into equal parts. A piece's
number is the checksum of its text, so that equal beginnings have equal numbers and are shared when prompts are packed.
Only lengths mean something: they are for plans, never for measuring.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence

# Letters of a word, its space not counted, that are one token.
LONGEST = 9
_PIECES = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+| ?_+|\s+(?!\S)|\s+")


class StandIn:
    """Tells how many tokens a text has, about; it is called as a tokenizer of transformers is.

    Args:
        has_bos: Whether texts begin with a BOS token, as those of OPT and Llama do.
    """

    eos_token_id = 1
    chat_template = None

    def __init__(self, has_bos: bool = False) -> None:
        self.bos_token_id = 0 if has_bos else None

    def __call__(
        self, texts: Sequence[str], add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[list[int]]]:
        """The pieces' numbers, under "input_ids"."""
        start = [0] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [start + self.encode(text) for text in texts]}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The pieces' numbers of one text."""
        return [zlib.crc32(part.encode()) for piece in _PIECES.findall(text) for part in _parts(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        """Nothing: no text begins with it."""
        return ""


def _parts(piece: str) -> list[str]:
    number = max(1, math.ceil(len(piece.strip()) / LONGEST))
    size = math.ceil(len(piece) / number)
    return [piece[start : start + size] for start in range(0, len(piece), size)]
