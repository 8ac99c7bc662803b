"""A file that carries the SHA-256 of all its own bytes, so that a single changed bit anywhere in it is found.

The writer puts a key "sha256" at the end of the file's JSON, with 64 zeros as its value. The digest of the whole file
as it then is, zeros included, takes their place. Who checks the file puts the zeros back, takes the digest and
compares it, letter by letter, with what stood there.
"""

from __future__ import annotations

import hashlib

KEY = "sha256"
# What stands in the digest's place while it is taken.
BLANK = "0" * 64
_MARK = f'"{KEY}": "'.encode()


def sealed(data: bytes) -> bytes:
    """The same bytes with their digest in place of the last blank one.

    Args:
        data: A file's bytes; the last `"sha256": "` in them is followed by 64 zeros.

    Raises:
        ValueError: If there is no such place.
    """
    at = _place(data)
    if data[at : at + len(BLANK)] != BLANK.encode():
        raise ValueError("there is no blank digest to fill in")
    return _with(data, at, _digest(data, at))


def is_whole(data: bytes) -> bool:
    """Whether the last digest in these bytes is theirs."""
    at = _place(data)
    return at > 0 and data[at : at + len(BLANK)].decode("latin-1") == _digest(data, at)


def _place(data: bytes) -> int:
    """Where the last digest begins; 0 where there is none."""
    found = data.rfind(_MARK)
    return found + len(_MARK) if found >= 0 else 0


def _digest(data: bytes, at: int) -> str:
    return hashlib.sha256(_with(data, at, BLANK)).hexdigest()


def _with(data: bytes, at: int, digest: str) -> bytes:
    return data[:at] + digest.encode() + data[at + len(BLANK) :]
