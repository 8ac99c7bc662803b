"""Paired tests, overlaps of sets, baselines, and marks on results that say little.

Intervals of accuracies and of their differences, and the verdict made of them, are in `headcount.intervals`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binom, hypergeom, norm, rankdata

from headcount.errors import OptionError

RESAMPLES = 2000
LEVEL = 0.95
# Fewer documents than this say little by themselves.
FEW_DOCUMENTS = 50
# A number for each document; those of one passage share it.
Clusters = Int[np.ndarray, " _"]
# A model that gives one answer to so large a share of the documents does not look at them.
CONSTANT_SHARE = 0.95
# Why nothing is claimed of a task whose metric is no share.
NO_INTERVAL = "the metric goes beyond 0 and 1, so that it has no interval and nothing can be ruled out"


def cluster_sums(
    values: Float[np.ndarray, "row doc"], clusters: Clusters
) -> tuple[Float[np.ndarray, "row cluster"], Int[np.ndarray, " cluster"]]:
    """Sum of every row over the documents of each cluster, and how many these are; clusters by rising number.

    Raises:
        OptionError: If there is not one cluster for each document.
    """
    if clusters.shape != values.shape[1:]:
        raise OptionError(f"each document has one cluster: {values.shape[1]} documents, {clusters.size} clusters")
    _, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    return np.add.reduceat(values[:, np.argsort(index, kind="stable")], starts, axis=1), sizes


def interval(
    samples: Float[np.ndarray, "row resample"], level: float = LEVEL
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Lower and upper end of what the middle `level` of each row's samples is."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=1)
    return low, high


def around(
    value: Float[np.ndarray, "..."] | float, resampled: Float[np.ndarray, "resample ..."], level: float = LEVEL
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Interval of what orders of noisy scores give (shares of sets, of scores): centred, as wide as replicates spread.

    A replicate of such scores carries their noise and its own on top, so that its order is further from the truth than
    the measured one, and percentiles would be of something else (see `headcount.ranks`). The interval is the value plus
    and minus 1.96 standard deviations over replicates. It is for the expectation in studies of as many documents, not
    for what unlimited documents would show. In simulated studies it covers in 84 to 97 % of cases, least with noisy
    scores (test_tops.py); not so the rank of a single component, whose interval is by pairs (`headcount.view.scores`).

    Args:
        value: What was measured.
        resampled: The same of every draw of documents.
        level: Of the interval.

    Returns:
        Lower and upper bound; NaN where there are fewer than two draws.
    """
    if len(resampled) < 2:
        unknown = np.full(np.shape(value), np.nan)
        return unknown, unknown
    reach = float(norm.ppf((1 + level) / 2)) * resampled.std(axis=0, ddof=1)
    return np.asarray(value - reach), np.asarray(value + reach)


def mcnemar(
    full: Float[np.ndarray, " doc"], pruned: Float[np.ndarray, "row doc"], *, clusters: Clusters | None = None
) -> Float[np.ndarray, " row"]:
    """Exact two-sided paired test that pruning does as much good as harm, one p-value per row.

    Of the documents whose metric differs (b fell, c rose), as many should have fallen as risen: p is the binomial
    probability of a split at least as uneven as b : c (McNemar 1947, in its exact form). The number of documents that
    did not change plays no part, and p is 1 where none did.

    For metrics other than 0/1 (averages over several orders, partial scores) this is the sign test on differences,
    ties left out: it counts how many documents fell, not how far, so that it may differ from the interval of the mean
    difference.

    Args:
        full: The full model's metric.
        pruned: The metric of each pruned model, on the same documents.
        clusters: The passage of each document: a passage then counts once, by the sum of its differences.
    """
    change = pruned - full
    if clusters is not None:
        change, _ = cluster_sums(change, clusters)
    # Averages such as 2/3 differ from themselves in the last bits, depending on how they were summed.
    fell, rose = (change < -1e-9).sum(axis=1), (change > 1e-9).sum(axis=1)
    return np.asarray(np.minimum(1.0, 2 * binom.cdf(np.minimum(fell, rose), fell + rose, 0.5)))


def holm(p: Float[np.ndarray, " point"]) -> Float[np.ndarray, " point"]:
    """p-values corrected for how many there are (Holm 1979), so that those below .05 hold a false one in 5 % of cases.

    The i-th smallest of m, i from 0, is multiplied by m - i, and is no smaller than those before it. NaN stays NaN and
    does not count.
    """
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


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
    kinds = int(strata.max(initial=-1)) + 1
    total, a, b = (np.bincount(found, minlength=kinds) for found in (strata, strata[set_a], strata[set_b]))
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


def rank_correlation(
    x: Float[np.ndarray, " component"], y: Float[np.ndarray, " component"], *, seed: int = 0,
    resamples: int = RESAMPLES, level: float = LEVEL,
) -> tuple[float, float, float]:
    """Spearman's correlation of two scores, with a percentile interval over components drawn with replacement.

    NaN where one of the scores has a single value, or there are fewer than three components.
    """
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    found = pearson(rankdata(x[draws], axis=1), rankdata(y[draws], axis=1))
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(pearson(rankdata(x)[None], rankdata(y)[None])[0]), float(low), float(high)


def pearson(x: Float[np.ndarray, "row component"], y: Float[np.ndarray, "row component"]) -> Float[np.ndarray, " row"]:
    """Pearson's correlation of each row of x and y, NaN where one is constant; of ranks it is Spearman's."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a draw of equal values has no correlation
        return np.asarray((x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1)))


def chance(num_options: Int[np.ndarray, " doc"]) -> float:
    """Expected accuracy of guessing; 0 where there are no options, since then the answer must be produced."""
    return float(np.where(num_options > 0, 1 / np.maximum(num_options, 1), 0.0).mean())


def baseline(num_options: Int[np.ndarray, " doc"], constant: float | int = 0.0) -> float:
    """What a model gets without reading the documents: the better of guessing and the best constant answer.

    Args:
        num_options: How many options each document has.
        constant: What the best answer gets that can be given to all documents, 0 where there is none: an option is
            scored by its text, and its place is seen by nobody.
    """
    return max(chance(num_options), float(constant))


def degenerate(
    correct: Float[np.ndarray, " doc"], prediction: Int[np.ndarray, " doc"], num_options: Int[np.ndarray, " doc"], *,
    low: float, above: bool, clusters: Clusters | None = None, constant: float | int = 0.0,
    places: Collection[int] | None = None,
) -> list[str]:
    """Why one model's result on one task says little: plain reasons, none if it is in order.

    Args:
        correct: The task's metric.
        prediction: Index of the option that the model took.
        num_options: How many options each document has.
        low: Lower 95 % bound of the mean metric.
        above: Whether it is shown to be above the baseline (`headcount.intervals.above_baseline`).
        clusters: The passage of each document: passages are then what must not be few.
        constant: As in `baseline`.
        places: The options that say the same in all documents, by index: one of them can be a constant answer, while
            others, taken always, are different answers. None where nobody looked: then all, if there is such an answer.
    """
    found: list[str] = []
    n = len(correct) if clusters is None else len(np.unique(clusters))
    what = "documents" if n == len(correct) else "passages"
    if n < FEW_DOCUMENTS:
        found.append(f"{n} {what}, fewer than {FEW_DOCUMENTS}: intervals are wide and rough")
    option, share = most_predicted(prediction, num_options)
    same = option in places if places is not None else constant > 0
    if same and share >= CONSTANT_SHARE:
        found.append(f"option {option + 1} is the answer to {100 * share:.0f} % of the documents, whatever they say")
    to_beat = baseline(num_options, constant)
    if np.isnan(low):
        found.append(NO_INTERVAL)
    elif not above:
        found.append(f"accuracy {correct.mean():.2f} is not shown to be above {to_beat:.2f}, which guessing"
                     f"{' or a constant answer' if constant > 0 else ''} gets (corrected for the number of tasks)")
    return found


def most_predicted(prediction: Int[np.ndarray, " doc"], num_options: Int[np.ndarray, " doc"]) -> tuple[int, float]:
    """The option index taken most often, and for which share of the documents that have a choice; (-1, 0) if none."""
    chosen = prediction[num_options > 1]
    if len(chosen) == 0:
        return -1, 0.0
    counts = np.bincount(chosen)
    return int(counts.argmax()), float(counts.max() / len(chosen))


def few_distinct(distinct: int, components: int) -> list[str]:
    """Whether an oracle tells components apart: the reason why not, if fewer than half as many values as components."""
    if 2 * distinct >= components:
        return []
    return [f"the oracle found {distinct} distinct values for {components} components, so that ties decide the order"]
