"""Intervals that hold on few documents, and the one verdict that is made of them.

**Differences** (pruned - full, document by document). Tango's score interval (1998) holds all d whose test statistic
`(rose - fell - n d) / sqrt(n (2 q + d (1 - d)))` lies within +-z, q the share of documents that fall, as likely as can
be if the difference is d. Where no document of n changed it still reaches from -z^2 / (n + z^2) to the same above 0:
189 unchanged documents are the fewest that rule out a loss of two points. A bootstrap has no width there, and ruled out
two points in 67 % of studies of 20 documents that lose exactly these.

Four things are added, each held by tests (test_intervals.py):

- *Half a change* is taken off the estimate for the bound that lies nearer to 0, as a continuity correction: the score
  interval's bound on that side is too near where few documents changed ("costs more" was said falsely in 5 %).
- *A mean over tasks* is one sample of documents of all tasks, of as many as it is worth: `N = s / V`, where s is the
  variance of one document's change, all tasks put together, and V the estimated variance of the mean over tasks, each
  task by itself (a stratified sample). For tasks that lose alike and have n documents each, N is all documents. This
  has more power than the square root of summed squares of single intervals (MOVER, Donner and Zou 2010): with 12 tasks
  of 50 documents none of which changes it rules out 0.6 points, MOVER 2.1.
- *Documents of one passage* stand or fall together: V sums their changes first (a cluster-robust variance), with
  Student's t for the number of passages in place of z.
- V is uncertain where few documents changed. So N counts two changes more, at the worst: of the task with the fewest
  documents, and as if all documents of a passage always changed together (Kish 1965: `(sum m)^2 / sum m^2` passages).

Metrics that are no 0/1 count by their parts: a document that falls by .3 is three tenths of one that fell. A number
between 0 and 1 varies no more than a 0/1 of the same mean, so these intervals are too wide rather than too narrow.
Metrics beyond 0 and 1 have no interval (NaN), and nothing is ruled out.

**Accuracies** have Wilson's score interval (1927), of a sample worth as many documents, with half a document as
continuity correction on the side of 1/2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float
from scipy.special import betainc, ndtr, ndtri, stdtrit

from headcount.stats.paired import holm
from headcount.stats.resampling import LEVEL, Clusters, cluster_sums

Verdict: TypeAlias = Literal["within", "costs more", "unknown"]
WITHIN: Verdict = "within"
COSTS_MORE: Verdict = "costs more"
UNKNOWN: Verdict = "unknown"
# Halvings of an interval of length 2: what is left is below the tolerance of `verdict`.
_HALVINGS = 34
# 49/50 - 50/50 and 33/50 - 34/50 lie on two sides of -.02 by their last bits: both count as equal to it.
_EQUAL = 1e-9
# Changes that are counted beside those that were seen.
_MORE = 2


class Bounds(NamedTuple):
    """Lower and upper ends of intervals."""

    low: Float[np.ndarray, " row"]
    high: Float[np.ndarray, " row"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One task's documents, each row a mask.

    Args:
        values: A metric of every document, or its changes.
        clusters: Equal numbers for documents of one passage; None where every document stands for itself.
        bounded: Whether the metric lies within 0 and 1, so that its changes have an interval.
    """

    values: Float[np.ndarray, "row doc"]
    clusters: Clusters | None = None
    bounded: bool = True

    @functools.cached_property
    def passages(self) -> float:
        """How many documents these are worth where those of a passage are all alike (Kish 1965)."""
        if self.clusters is None:
            return float(self.values.shape[1])
        _, sizes = np.unique(self.clusters, return_counts=True)
        return float(sizes.sum() ** 2 / (sizes**2).sum())

    def variance_of_mean(self, of_one: Float[np.ndarray, " row"], z: float) -> Float[np.ndarray, " row"]:
        """The mean's variance, documents of a passage together; with Student's t for few passages.

        Args:
            of_one: The variance of one document's value, the least that is counted.
            z: The normal quantile of the interval.
        """
        n = self.values.shape[1]
        alone = np.asarray(of_one / max(n - 1, 1))
        if self.clusters is None or self.passages == n:
            return alone
        apart, sizes = cluster_sums(self.values - self.values.mean(1, keepdims=True), self.clusters)
        number = len(sizes)
        if number < 2:
            return np.full(len(self.values), np.inf)
        robust = (apart**2).sum(1) * number / (number - 1) / n**2
        return np.asarray(np.maximum(alone, robust * (stdtrit(number - 1, ndtr(z)) / z) ** 2))


class Changes(NamedTuple):
    """Changes of a mean, as those of one sample of 0/1 documents.

    Attributes:
        documents: What the sample is worth, in documents.
        fell: The share that fell.
        rose: The share that rose.
        half: Half a change, as a share of one of these documents.
    """

    documents: Float[np.ndarray, " row"]
    fell: Float[np.ndarray, " row"]
    rose: Float[np.ndarray, " row"]
    half: Float[np.ndarray, " row"]


def difference_interval(tasks: Sequence[Sample], level: float = LEVEL) -> Bounds:
    """The score interval of the mean change over documents and tasks (see the head of this file).

    Args:
        tasks: Changes of every task's documents, -1..1; the mean over tasks is unweighted.
        level: Of the interval.

    Returns:
        One interval for each row; NaN where a change is beyond -1 and 1, or there is no document.
    """
    z = float(ndtri((1 + level) / 2))
    return _bounds(changes_of(tasks, z), z)


def changes_of(tasks: Sequence[Sample], z: float) -> Changes:
    """What the tasks' changes come to as one sample; NaN where a change is no share."""
    falls = np.stack([np.maximum(-task.values, 0).mean(1) for task in tasks])
    rises = np.stack([np.maximum(task.values, 0).mean(1) for task in tasks])
    fell, rose = falls.mean(0), rises.mean(0)
    documents, half = _worth(tasks, falls + rises - (rises - falls) ** 2, fell + rose - (rose - fell) ** 2, z)
    beyond = np.any([(np.abs(task.values) > 1 + _EQUAL).any(1) | (not task.bounded) for task in tasks], axis=0)
    return Changes(np.where(beyond, np.nan, documents), fell, rose, half)


def _worth(
    tasks: Sequence[Sample], of_one: Float[np.ndarray, "task row"], together: Float[np.ndarray, " row"], z: float
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """As how many documents of one sample the mean over tasks counts, and half of one of them in documents.

    Args:
        tasks: Whose mean it is.
        of_one: The variance of one document's value, task by task.
        together: The same of all tasks put together.
        z: The normal quantile of the interval.
    """
    variances = np.stack([task.variance_of_mean(own, z) for task, own in zip(tasks, of_one, strict=True)])
    least = min(task.passages for task in tasks) * len(tasks)
    everything = len(tasks) ** 2 / sum(1 / task.values.shape[1] for task in tasks)
    more = _MORE / least
    with np.errstate(invalid="ignore"):
        documents = (together * everything / max(everything - 1, 1) + more) / (
            variances.sum(0) / len(tasks) ** 2 + more / least)
    return documents, 0.5 * np.maximum(1, documents / least)


def _bounds(changes: Changes, z: float) -> Bounds:
    twice, sides = Changes(*(np.tile(each, 2) for each in changes)), np.repeat([-1.0, 1.0], len(changes.fell))
    low, high = np.split(_ends(twice, sides, np.zeros_like(sides), z), 2)
    # Half a change towards 0, and no further than 0: what did not fall must not count as worse for having risen.
    if ((low > 0) | (high < 0)).any():
        side = np.where(low > 0, -1.0, 1.0)
        nearer = _ends(changes, side, side * changes.half, z)
        low, high = np.where(low > 0, np.maximum(0, nearer), low), np.where(high < 0, np.minimum(0, nearer), high)
    return Bounds(low, high)


def _ends(
    changes: Changes, towards: Float[np.ndarray, " row"], shift: Float[np.ndarray, " row"], z: float
) -> Float[np.ndarray, " row"]:
    """Where the statistic leaves +-z on one side of each estimate, by halving.

    Args:
        changes: Of each row.
        towards: The side: -1 or 1.
        shift: How many more documents rose.
        z: The normal quantile of the interval.
    """
    n, fell, rose, _ = changes
    inside, outside = rose - fell, towards
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        within = towards * _statistic(middle, n, fell, rose, shift) >= -z
        inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
    return np.asarray(np.where(np.isnan(n), np.nan, (inside + outside) / 2))


def _statistic(
    d: Float[np.ndarray, " row"], n: Float[np.ndarray, " row"], fell: Float[np.ndarray, " row"],
    rose: Float[np.ndarray, " row"], shift: Float[np.ndarray, " row"],
) -> Float[np.ndarray, " row"]:
    """Tango's statistic of a true difference d, with `shift` more documents that rose."""
    deviation = np.sqrt(n) * _spread(d, fell, rose)
    away = n * (rose - fell - d) + shift
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(deviation > 0, away / deviation, np.sign(away) * np.inf))


def _spread(
    d: Float[np.ndarray, " row"], fell: Float[np.ndarray, " row"], rose: Float[np.ndarray, " row"]
) -> Float[np.ndarray, " row"]:
    """The standard deviation of one document's change if the true difference is d (Tango 1998, equation 4)."""
    b = -(fell + rose) + (2 - rose + fell) * d
    fall = (np.sqrt(np.maximum(b * b + 8 * fell * d * (1 - d), 0)) - b) / 4
    return np.asarray(np.sqrt(np.maximum(2 * fall + d * (1 - d), 0)))


def accuracy_interval(tasks: Sequence[Sample], level: float = LEVEL) -> Bounds:
    """Wilson's score interval of the mean metric over documents and tasks (see the head of this file).

    Args:
        tasks: The metric of every task's documents, 0..1; the mean over tasks is unweighted.
        level: Of the interval.

    Returns:
        One interval for each row; NaN where a value is beyond 0 and 1.
    """
    z = float(ndtri((1 + level) / 2))
    n, p, half = _accuracies(tasks, z)

    def ends(share: Float[np.ndarray, " row"]) -> Bounds:
        centre, reach = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return Bounds((centre - reach) / (1 + z * z / n), (centre + reach) / (1 + z * z / n))

    plain, less, more = ends(p), ends(np.maximum(p - half / n, 0)), ends(np.minimum(p + half / n, 1))
    return Bounds(np.clip(np.where(p < 0.5, less.low, plain.low), 0, p),
                  np.clip(np.where(p > 0.5, more.high, plain.high), p, 1))


def _accuracies(
    tasks: Sequence[Sample], z: float
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """What the sample is worth in documents, the mean, and half a document; NaN beyond 0 and 1."""
    means = np.stack([task.values.mean(1) for task in tasks])
    p = means.mean(0).clip(0, 1)
    documents, half = _worth(tasks, means * (1 - means), p * (1 - p), z)
    beyond = np.any([((task.values < -_EQUAL) | (task.values > 1 + _EQUAL)).any(1) for task in tasks], axis=0)
    return np.where(beyond, np.nan, documents), means.mean(0), half


def chance_of_so_many(task: Sample, baseline: float | int) -> Float[np.ndarray, " row"]:
    """The probability that a model which gets `baseline` gets at least what was measured (binomial, exact).

    Documents of one passage count as in `accuracy_interval`; parts of documents by the binomial's extension to real
    numbers.
    """
    n, p, _ = _accuracies([task], float(ndtri((1 + LEVEL) / 2)))
    if not 0 < baseline < 1:
        return np.where(p > baseline, 0.0, 1.0)
    right = p * n
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(right > 0, betainc(np.maximum(right, 1e-12), n - right + 1, baseline), 1.0))


def above_baseline(tasks: Sequence[Sample], baselines: Sequence[float]) -> list[bool]:
    """On which of several tasks a model is shown to be above what guessing, or a constant answer, gets.

    One-sided, at half of what is left to chance at `LEVEL`, and corrected for how many tasks are looked at (Holm): of
    16 tasks at chance one or more were called above it in 20 to 34 % of studies before.

    Args:
        tasks: The metric of each task's documents, in one row.
        baselines: Of each task.
    """
    p = np.array([float(chance_of_so_many(task, b)[0]) for task, b in zip(tasks, baselines, strict=True)])
    return [bool(x < (1 - LEVEL) / 2) for x in holm(p)]


def verdict(low: float | int, high: float | int, margin: float | int) -> Verdict:
    """What an interval of (pruned - full) says of a loss of `margin`: the three verdicts of all sentences and figures.

    Args:
        low: Its lower end.
        high: Its upper end.
        margin: The loss that must not be reached, 0..1.

    Returns:
        "within": a loss of the margin or more is ruled out. "costs more": a loss of more than the margin is shown.
        "unknown": these documents cannot tell, or there is no interval.
    """
    if low > -margin + _EQUAL:
        return WITHIN
    return COSTS_MORE if high < -margin - _EQUAL else UNKNOWN


def documents_needed(tasks: Sequence[Sample], margin: float | int, level: float = LEVEL) -> Float[np.ndarray, " row"]:
    """How many documents of all tasks together would tell, if as large a share of them fell, and rose, as now.

    It is the fewest, no fewer than there are, with which `verdict` is not "unknown": the statistic of a true loss of
    the margin is then beyond z. Both of its sides are proportional to the root of the number of documents, but for the
    half change that is taken off a loss.

    Args:
        tasks: Changes of every task's documents.
        margin: The loss that is to be ruled out, or shown.
        level: Of the interval.

    Returns:
        One number for each row, infinite where the loss seen is the margin itself, NaN where there is no interval.
    """
    z = float(ndtri((1 + level) / 2))
    n, fell, rose, half = changes_of(tasks, z)
    there = sum(task.values.shape[1] for task in tasks)
    away, spread = np.abs(rose - fell + margin), _spread(np.full_like(n, -margin), fell, rose)
    less = np.where(rose - fell < -margin, half, 0.0)
    with np.errstate(divide="ignore"):
        root = (z * spread + np.sqrt(z * z * spread**2 + 4 * away * less)) / (2 * away)
    # A last digit of the quotient must not add a document.
    return np.asarray(np.ceil(there * np.maximum(root**2 / n, 1) - 1e-6))


def free_fraction(
    fractions: Sequence[float | int], lower_bounds: Sequence[float | int], margin: float | int
) -> float:
    """The largest fraction such that at every step up to it a loss of the margin or more is ruled out.

    Args:
        fractions: The steps, rising; 0 need not be among them.
        lower_bounds: The lower 95 % bound of (pruned - full) at each step.
        margin: The loss to rule out. A bound that equals minus the margin does not.

    Returns:
        The fraction; 0 where already the first step may lose so much. Removing nothing is always free.
    """
    free = 0.0
    for fraction, low in zip(fractions, lower_bounds, strict=True):
        if fraction > 0 and verdict(low, np.inf, margin) != WITHIN:
            break
        free = float(fraction)
    return free


def free_fraction_interval(
    fractions: Sequence[float | int], tasks: Sequence[Sample], margin: float | int, level: float = LEVEL
) -> tuple[float, float]:
    """An interval for the free fraction that unlimited documents would show.

    That fraction is the largest with a true difference above -margin at every step up to it. At the earliest it ends
    before the first step whose *lower* bound allows a loss of the margin: that is `free_fraction`, the interval's
    lower end. At the latest it ends before the first step whose *upper* bound shows such a loss. The lower end is
    wrong only if one bound is, that of the first step which truly loses the margin, so it needs no correction; the
    upper end is wrong if any step up to the truth seems to lose it, so its bounds are shared out among the steps
    (Bonferroni).

    Args:
        fractions: The steps, rising; 0 need not be among them.
        tasks: Changes of every task's documents, a row for each step.
        margin: The loss to rule out.
        level: Of the interval.

    Returns:
        Lower and upper end, both among the fractions or 0. The curve's last step as upper end means: at least that.
    """
    steps = max(sum(fraction > 0 for fraction in fractions), 1)
    low, _ = difference_interval(tasks, level)
    _, high = difference_interval(tasks, 1 - (1 - level) / steps)
    return free_fraction(fractions, low.tolist(), margin), free_fraction(fractions, high.tolist(), margin)


def unchanged_needed(margin: float | int, level: float = LEVEL) -> int:
    """The fewest documents none of which may change for a loss of the margin to be ruled out: 189 for two points."""
    z = float(ndtri((1 + level) / 2))
    return math.floor(z * z * (1 - margin) / margin) + 1
