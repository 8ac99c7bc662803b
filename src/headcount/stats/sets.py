"""How surprising it is that two sets have so much in common."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Bool, Int

from headcount.errors import OptionError


@functools.lru_cache(maxsize=100_000)
def hypergeometric_overlap(total: int, set_a: int, set_b: int, common: int) -> tuple[float, float, float]:
    """How surprising it is that two sets have so much in common.

    Args:
        total: How many things there are.
        set_a: Size of the first set.
        set_b: Size of the second one.
        common: How many things are in both.

    Returns:
        The probability that random sets of these sizes have at least so many in common (hypergeometric), that they have
        at most so many, and how many they have on average.

    Raises:
        OptionError: If there are no such sets.
    """
    from scipy.stats import hypergeom

    sizes_fit = 0 <= set_a <= total and 0 <= set_b <= total
    if not (sizes_fit and max(0, set_a + set_b - total) <= common <= min(set_a, set_b)):
        raise OptionError(f"no sets of {set_a} and {set_b} out of {total} have {common} in common")
    # scipy has no sets out of nothing; those have nothing in common.
    more = float(hypergeom.sf(common - 1, total, set_a, set_b)) if common else 1.0
    fewer = float(hypergeom.cdf(common, total, set_a, set_b)) if total else 1.0
    return more, fewer, set_a * set_b / max(total, 1)


def overlap_within(
    strata: Int[np.ndarray, " thing"], set_a: Bool[np.ndarray, " thing"], set_b: Bool[np.ndarray, " thing"]
) -> tuple[float, float, float]:
    """As `hypergeometric_overlap`, for random sets that have as many things of every stratum as these two.

    What two sets have in common because both lie in the same layers is no surprise then.

    Args:
        strata: The stratum of each thing, from 0 on.
        set_a: Which things are in the first set.
        set_b: Which are in the second one.

    Returns:
        The probability that such sets have at least so many in common, that they have at most so many, and how many
        they have on average.
    """
    from scipy.stats import hypergeom

    kinds = int(strata.max(initial=-1)) + 1
    total, a, b = (np.bincount(members, minlength=kinds) for members in (strata, strata[set_a], strata[set_b]))
    least = np.minimum(a, b)
    counts = np.arange(least.max(initial=0) + 1)
    each = np.asarray(hypergeom.pmf(counts[None], total[:, None], a[:, None], b[:, None]))
    chances = np.ones(1)
    for of_one, most in zip(each, least, strict=True):
        if most:
            chances = np.convolve(chances, of_one[: most + 1])
    common = int((set_a & set_b).sum())
    more, fewer = chances[common:].sum(), chances[: common + 1].sum()
    return min(1.0, float(more)), min(1.0, float(fewer)), float(chances @ np.arange(len(chances)))
