"""How fast this machine computes: products of matrices, timed for a moment, in a type of numbers."""

from __future__ import annotations

import math
import time

import torch

# Products of this width, for this long, tell whether a type is slow; less than this share of float32's rate is slow.
_WIDTH, _SECONDS, _SLOW = 256, 0.02, 0.5


def matrix_products(width: int, inner: int, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of products of rows by a matrix of an FFN's shape on this machine: the fastest of a few.

    Sizes double up to 256 rows and the FFN's, as long as a product is over in a part of the time: in some types a CPU
    is a thousand times slower than in others.

    Args:
        width: Rows of the matrix, of large models a part of them.
        inner: Its columns.
        dtype: Type of numbers.
        seconds: About how long it may take.
    """
    most = (256, min(width, 2048), min(inner, 4096))
    sizes, fastest, ends = tuple(min(size, 32) for size in most), 0.0, time.perf_counter() + seconds
    with torch.inference_mode():
        while True:
            rows, matrix = torch.ones(sizes[0], sizes[1], dtype=dtype), torch.ones(sizes[1], sizes[2], dtype=dtype)
            torch.mm(rows, matrix)  # warms up
            started = time.perf_counter()
            torch.mm(rows, matrix)
            took = time.perf_counter() - started
            fastest = max(fastest, 2 * math.prod(sizes) / took)
            if time.perf_counter() > ends or (sizes != most and took > seconds / 5):
                return fastest
            sizes = tuple(min(2 * size, limit) for size, limit in zip(sizes, most, strict=True))


def slow_type(dtype: torch.dtype) -> str:
    """Says that a type of numbers is computed more slowly on this machine's CPU than others are; empty where it is not.

    Many CPUs have instructions for float32 and bfloat16 and none for float16, of which many checkpoints are.
    """
    others = [one for one in (torch.bfloat16, torch.float32) if one != dtype]
    own, *rates = (matrix_products(_WIDTH, _WIDTH, one, _SECONDS) for one in (dtype, *others))
    if own > _SLOW * max(rates):
        return ""
    name, faster = (str(one).removeprefix("torch.") for one in (dtype, others[rates.index(max(rates))]))
    return f"this machine's CPU computes {name} much more slowly than {faster}: as {faster} the model runs faster"
