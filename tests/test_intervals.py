"""Intervals on few documents: Tango's equations, exact error rates, means over tasks, passages, and the verdict."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom, multinomial, norm

from headcount.stats import intervals
from headcount.stats.intervals import Sample, difference_interval, verdict

Z = float(norm.ppf(0.975))
MARGIN = 0.02
# The most that is allowed of what is nominally 2.5 %, and the least of what is nominally 95 %.
FALSE, COVERED = 0.035, 0.925


def changes(n: int, fell: int, rose: int) -> np.ndarray:
    return np.repeat([-1.0, 1.0, 0.0], [fell, rose, n - fell - rose])[None]


def tango(n: int, fell: int, rose: int) -> tuple[float, float]:
    """Tango's interval by a root finder, from the maximum of the likelihood found by a fine grid."""
    def statistic(d: float) -> float:
        q = np.linspace(max(0.0, -d) + 1e-12, (1 - d) / 2 - 1e-12, 400_001)
        with np.errstate(divide="ignore", invalid="ignore"):
            likelihood = (n - fell - rose) * np.log(1 - 2 * q - d) + (fell * np.log(q) if fell else 0) + (
                rose * np.log(q + d) if rose else 0)
        best = q[np.nanargmax(likelihood)]
        return (rose - fell - n * d) / np.sqrt(max(n * (2 * best + d - d * d), 1e-300))

    estimate = (rose - fell) / n
    return (brentq(lambda d: min(statistic(d), 50) - Z, -0.999, estimate - 1e-6, xtol=1e-7),
            brentq(lambda d: max(statistic(d), -50) + Z, estimate + 1e-6, 0.999, xtol=1e-7))


@pytest.mark.parametrize(("n", "fell", "rose"), [(50, 0, 0), (50, 3, 2), (100, 4, 9), (60, 12, 1)])
def test_one_tasks_interval_is_tangos(n: int, fell: int, rose: int) -> None:
    low, high = difference_interval([Sample(changes(n, fell, rose))])
    theirs = tango(n, fell, rose)
    if rose <= fell:  # the other end has the continuity correction
        assert low[0] == pytest.approx(theirs[0], abs=1e-4)
    if rose >= fell:
        assert high[0] == pytest.approx(theirs[1], abs=1e-4)
    assert low[0] <= theirs[0] + 1e-4
    assert high[0] >= theirs[1] - 1e-4


def test_unchanged_documents_rule_out_two_points_from_189_on() -> None:
    assert intervals.unchanged_needed(MARGIN) == 189
    lows = [difference_interval([Sample(np.zeros((1, n)))]).low[0] for n in (20, 188, 189)]
    assert lows[0] < -0.16, "the exact bound is 17 points"
    assert [verdict(low, 0.0, MARGIN) for low in lows] == ["unknown", "unknown", "within"]


def test_losses_and_gains_are_mirror_images() -> None:
    low, high = difference_interval([Sample(np.concatenate([changes(80, 7, 2), changes(80, 2, 7)]))])
    assert low == pytest.approx(-high[::-1], abs=1e-9)


@pytest.mark.parametrize("n", [20, 50, 60, 100, 200])
def test_exact_error_rates_of_one_task(n: int) -> None:
    """Every outcome with up to 70 falls and 70 rises, and its probability: nothing is simulated."""
    outcomes = [(f, r) for f, r in itertools.product(range(min(n, 70) + 1), repeat=2) if f + r <= n]
    stacked = np.concatenate([changes(n, *outcome) for outcome in outcomes])
    low, high = difference_interval([Sample(stacked)])
    counts = np.array([(f, r, n - f - r) for f, r in outcomes])
    for loss, churn in itertools.product((0.02, -0.02, 0.0, 0.05, 0.10), (0.0, 0.005, 0.02, 0.05, 0.10)):
        p = [max(loss, 0) + churn / 2, max(-loss, 0) + churn / 2]
        probability = multinomial.pmf(counts, n, [*p, 1 - sum(p)])
        ruled_out, shown = probability[low > -loss + 1e-9].sum(), probability[high < -loss - 1e-9].sum()
        assert max(ruled_out, shown) <= FALSE, f"a loss of {loss} with churn {churn}"
        assert 1 - ruled_out - shown >= COVERED


def drawn(rng: np.random.Generator, n: int, loss: float, churn: float, times: int) -> np.ndarray:
    sure = rng.random((times, n))
    fell, rose = max(loss, 0) + churn / 2, max(-loss, 0) + churn / 2
    return np.where(sure < fell, -1.0, np.where(sure < fell + rose, 1.0, 0.0))


def losses(tasks: int, spread: str) -> list[float]:
    """Losses of two points on the mean: all tasks alike, a single one, or every other task wins."""
    if spread == "even":
        return [MARGIN] * tasks
    if spread == "one":
        return [MARGIN * tasks, *[0.0] * (tasks - 1)]
    pairs = [0.10, -0.06] * (tasks // 2)
    return pairs + [MARGIN] * (tasks - len(pairs))


CASES = [(k, n, churn, spread) for k, n, churn, spread in itertools.product(
    (2, 3, 8, 12, 22), (20, 50, 60, 100, 200), (0.0, 0.02, 0.10), ("even", "one", "mixed"))
    if (k, n) in {(2, 200), (3, 100), (8, 50), (8, 200), (12, 50), (12, 60), (22, 20), (22, 60)}]


@pytest.mark.parametrize(("tasks", "n", "churn", "spread"), CASES)
def test_error_rates_of_means(tasks: int, n: int, churn: float, spread: str) -> None:
    rng = np.random.default_rng([tasks, n, int(100 * churn)])
    times = 1200
    low, high = difference_interval([Sample(drawn(rng, n, loss, churn, times)) for loss in losses(tasks, spread)])
    # Three standard errors of a share of .03 are 1.5 points.
    slack = 3 * np.sqrt(FALSE * (1 - FALSE) / times)
    ruled_out, shown = (low > -MARGIN + 1e-9).mean(), (high < -MARGIN - 1e-9).mean()
    assert ruled_out <= FALSE + slack
    assert shown <= FALSE + slack
    assert 1 - ruled_out - shown >= COVERED - slack


def test_false_claims_at_the_margin_over_all_cases_together() -> None:
    """The same, held without slack: over many cases chance averages out."""
    rng = np.random.default_rng(11)
    wrong, shown = [], []
    for tasks, n, churn, spread in CASES:
        low, high = difference_interval([Sample(drawn(rng, n, loss, churn, 400)) for loss in losses(tasks, spread)])
        wrong.append((low > -MARGIN + 1e-9).mean())
        shown.append((high < -MARGIN - 1e-9).mean())
    assert np.mean(wrong) <= 0.025
    assert np.mean(shown) <= 0.025


def test_tasks_of_unlike_size_whose_smallest_loses_all() -> None:
    rng = np.random.default_rng(3)
    sizes = [60, 100, 200, 200, 1000]
    tasks = [Sample(drawn(rng, n, MARGIN * len(sizes) if n == 60 else 0.0, 0.01, 3000)) for n in sizes]
    low, high = difference_interval(tasks)
    assert (low > -MARGIN + 1e-9).mean() <= FALSE
    assert (high < -MARGIN - 1e-9).mean() <= FALSE


@pytest.mark.parametrize("alike", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sizes", [[2] * 100, [18] * 11, [20] * 50, [30] * 4 + [1] * 80, [2] * 43 + [1] * 114])
def test_passages_count_as_clusters(sizes: list[int], alike: float) -> None:
    """Documents copy their passage's change with probability sqrt(alike): intraclass correlation `alike`."""
    rng = np.random.default_rng([len(sizes), int(10 * alike)])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    for tasks, churn in itertools.product((1, 3), (0.0, 0.02, 0.10)):
        samples = []
        for _ in range(tasks):
            whole = drawn(rng, len(sizes), MARGIN, churn, 800)[:, owners]
            own = drawn(rng, len(owners), MARGIN, churn, 800)
            samples.append(Sample(np.where(rng.random(own.shape) < alike**0.5, whole, own), owners))
        low, high = difference_interval(samples)
        assert (low > -MARGIN + 1e-9).mean() <= FALSE + 0.015
        assert (high < -MARGIN - 1e-9).mean() <= FALSE + 0.015
        assert ((low <= -MARGIN + 1e-9) & (high >= -MARGIN - 1e-9)).mean() >= COVERED - 0.015


def test_a_passage_whose_documents_change_together_is_one_document() -> None:
    owners = np.repeat(np.arange(60), 4)
    together = np.repeat(changes(60, 3, 1), 4, axis=1)
    own = difference_interval([Sample(changes(60, 3, 1))])
    whole = difference_interval([Sample(together, owners)])
    alone = difference_interval([Sample(together)])
    assert whole.low[0] == pytest.approx(own.low[0], abs=0.008)
    assert whole.low[0] <= own.low[0] < alone.low[0]
    nothing = difference_interval([Sample(np.zeros((1, 240)), owners)])
    assert nothing.low[0] == pytest.approx(difference_interval([Sample(np.zeros((1, 60)))]).low[0])


def test_single_documents_are_no_clusters() -> None:
    values = changes(90, 5, 3)
    assert difference_interval([Sample(values, np.arange(90))]) == difference_interval([Sample(values)])


def test_no_loss_is_told_more_often_than_by_mover() -> None:
    """Power where nothing is lost: beside the square root of summed squares (MOVER), as the audit tried it."""
    rng = np.random.default_rng(5)
    tasks = [Sample(drawn(rng, 50, 0.0, 0.02, 500)) for _ in range(12)]
    own = (difference_interval(tasks).low > -MARGIN).mean()
    singles = [difference_interval([task]).low for task in tasks]
    means = np.stack([task.values.mean(1) for task in tasks])
    mover = (means.mean(0) - np.sqrt(((means - np.stack(singles)) ** 2).sum(0)) / 12 > -MARGIN).mean()
    assert own > 0.7 > 2 * mover - 0.1
    unchanged = difference_interval([Sample(np.zeros((1, 50)))] * 12).low[0]
    assert unchanged == pytest.approx(difference_interval([Sample(np.zeros((1, 600)))]).low[0])
    assert unchanged > -0.0065


def test_metrics_between_0_and_1_are_covered_too() -> None:
    """Means of five orders, shares of answers: no interval of theirs is narrower than of 0/1 changes alike in mean."""
    rng = np.random.default_rng(7)
    for n in (20, 50, 200):
        values = drawn(rng, n, 0.06, 0.04, 1500) * rng.choice([0.2, 0.4, 0.6], (1500, n))
        truth = -0.06 * 0.4
        low, high = difference_interval([Sample(values)])
        assert (low > truth + 1e-9).mean() <= FALSE
        assert (high < truth - 1e-9).mean() <= FALSE


def test_a_metric_that_is_no_share_has_no_interval_and_rules_nothing_out() -> None:
    values = np.array([[0.0, 1.7, -1.2], [0.0, 0.0, -1.0]])
    low, high = difference_interval([Sample(values)])
    assert np.isnan(low).tolist() == [True, False]
    assert verdict(low[0], high[0], MARGIN) == "unknown"
    assert np.isnan(intervals.accuracy_interval([Sample(np.array([[0.5, 3.0]]))]).low[0])
    assert np.isnan(intervals.documents_needed([Sample(values)], MARGIN)[0])


@pytest.mark.parametrize("n", [20, 50, 60, 100, 200])
def test_exact_coverage_of_accuracies(n: int) -> None:
    right = np.arange(n + 1)
    low, high = intervals.accuracy_interval([Sample((np.arange(n)[None] < right[:, None]).astype(float))])
    for p in np.arange(0.01, 0.995, 0.01):
        inside = (low <= p + 1e-12) & (high >= p - 1e-12)
        assert binom.pmf(right, n, p)[inside].sum() >= COVERED, p


def test_coverage_of_mean_accuracies() -> None:
    rng = np.random.default_rng(9)
    for n, shares in ((50, [0.5, 0.9, 0.3]), (20, [0.99] * 8), (60, np.linspace(0.2, 0.99, 22)), (100, [0.99, 0.5])):
        tasks = [Sample((rng.random((1500, n)) < p).astype(float)) for p in shares]
        low, high = intervals.accuracy_interval(tasks)
        assert ((low <= np.mean(shares)) & (high >= np.mean(shares))).mean() >= COVERED


def test_accuracies_of_passages() -> None:
    rng = np.random.default_rng(13)
    owners = np.repeat(np.arange(40), 5)
    values = (rng.random((2000, 40)) < 0.6)[:, owners].astype(float)
    low, high = intervals.accuracy_interval([Sample(values, owners)])
    assert ((low <= 0.6) & (high >= 0.6)).mean() >= COVERED


def test_three_verdicts() -> None:
    assert verdict(-0.019, 0.01, MARGIN) == "within"
    assert verdict(-0.15, -0.056, MARGIN) == "costs more", "an interval that proves a loss is no doubt"
    assert verdict(-0.05, -0.01, MARGIN) == "unknown", "a loss is shown, but not one of two points"
    assert verdict(33 / 50 - 34 / 50, 0, MARGIN) == verdict(49 / 50 - 50 / 50, 0, MARGIN) == "unknown", (
        "a loss of the margin itself is not ruled out, whatever its last bits are")
    assert verdict(float("nan"), float("nan"), MARGIN) == "unknown"


@pytest.mark.parametrize(("n", "fell", "rose"), [(50, 0, 0), (60, 1, 1), (100, 4, 0), (60, 3, 5), (50, 12, 1)])
def test_documents_needed_are_the_fewest_that_tell(n: int, fell: int, rose: int) -> None:
    needed = intervals.documents_needed([Sample(changes(n, fell, rose))], MARGIN)[0]
    told = []
    for documents in (needed - 1, needed):
        # As large shares of more documents: parts of documents count by their parts.
        shares = intervals.Changes(*(np.array([x]) for x in (documents, fell / n, rose / n, 0.5)))
        low, high = intervals._bounds(shares, Z)
        told.append(verdict(low[0], high[0], MARGIN))
    assert told[1] != "unknown"
    assert needed == n or told[0] == "unknown"


def test_a_loss_of_the_margin_itself_can_never_be_told() -> None:
    needed = intervals.documents_needed([Sample(np.concatenate([changes(50, 1, 0), np.zeros((1, 50))]))], MARGIN)
    assert needed.tolist() == [np.inf, 189]
    of_tasks = intervals.documents_needed([Sample(np.zeros((1, 10)))] * 3, MARGIN)[0]
    assert of_tasks == 189, "of all tasks together"


@given(st.lists(st.floats(-0.2, 0.2), min_size=1, max_size=9), st.floats(0, 0.1))
def test_free_fraction_is_the_last_step_before_the_first_that_may_lose_more(lows: list[float], margin: float) -> None:
    fractions = [(i + 1) / 10 for i in range(len(lows))]
    expected = 0.0
    for i in range(len(lows)):
        if all(low > -margin + 1e-9 for low in lows[: i + 1]):
            expected = fractions[i]
    assert intervals.free_fraction(fractions, lows, margin) == expected


def test_a_later_recovery_does_not_count() -> None:
    assert intervals.free_fraction([0.1, 0.2, 0.3], [-0.01, -0.5, 0.0], 0.02) == 0.1


@pytest.mark.parametrize("right", range(2, 50))
def test_a_bound_on_the_margin_is_not_above_it(right: int) -> None:
    low = (right - 1) / 50 - right / 50  # one document of fifty, with whatever last bits
    assert intervals.free_fraction([0.0, 0.1], [0.0, low], 0.02) == 0
    assert intervals.free_fraction([0.0, 0.1], [0.0, low], 0.021) == 0.1


def test_nothing_removed_is_free_without_a_margin_too() -> None:
    assert intervals.free_fraction([0.0, 0.1, 0.2], [0.0, 0.01, -0.01], 0.0) == 0.1


STEPS = [i / 10 for i in range(10)]


def _curve(rng: np.random.Generator, n: int, loss: np.ndarray, churn: np.ndarray) -> np.ndarray:
    """Right answers of the full model (.7 of them) and nine steps, which lose and, to an extent of churn, win some."""
    full = rng.random(n) < 0.7
    # Half of a step's documents are lost in other steps too.
    luck = np.where(rng.random((10, n)) < 0.5, rng.random((10, n)), rng.random(n))
    lost, won = full & (luck < ((loss + churn) / 0.7)[:, None]), ~full & (luck < (churn / 0.3)[:, None])
    return np.where(lost, 0.0, np.where(won, 1.0, full))


@pytest.mark.parametrize("documents", [50, 100, 400])
@pytest.mark.parametrize("loss", [
    [0, 0, 0, 0.003, 0.006, 0.01, 0.03, 0.08, 0.2, 0.4],
    [0, 0, 0, 0, 0, 0, 0.15, 0.3, 0.4, 0.45],
    [0, 0.019, 0.019, 0.019, 0.019, 0.019, 0.2, 0.2, 0.2, 0.4],  # five steps just above the margin
    [0, 0, 0, 0, 0, 0, 0.021, 0.021, 0.021, 0.4],  # and three just below
], ids=["smooth", "sharp", "just above", "just below"])
def test_the_free_fractions_interval_holds_the_true_one(documents: int, loss: list[float]) -> None:
    rng = np.random.default_rng(0)
    churn = np.array([0, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.05, 0.06, 0.08])
    truth = intervals.free_fraction(STEPS, [-x for x in loss], 0.02)
    assert truth == 0.5
    studies = [_curve(rng, documents, np.array(loss), churn) for _ in range(400)]
    away = [values - values[0] for values in studies]
    # All studies at once: rows do not touch one another.
    lows = difference_interval([Sample(np.concatenate(away))]).low.reshape(len(away), -1)
    highs = difference_interval([Sample(np.concatenate(away))], 1 - 0.05 / 9).high.reshape(len(away), -1)
    ends = [tuple(intervals.free_fraction(STEPS, bounds.tolist(), 0.02) for bounds in both)
            for both in zip(lows, highs, strict=True)]
    assert [intervals.free_fraction_interval(STEPS, [Sample(own)], 0.02) for own in away[:3]] == ends[:3]
    assert np.mean([low <= truth <= high for low, high in ends]) >= 0.93


def test_where_losses_are_rare_the_free_fraction_is_not_too_sure() -> None:
    """Of 50 documents none of the 2.1 % that are lost is seen in a third of studies: a bootstrap called them free."""
    rng = np.random.default_rng(0)
    for n in (50, 200):
        lost = (rng.random((2000, n)) < 0.021).astype(float)
        assert (difference_interval([Sample(-lost)]).low > -0.02).mean() <= FALSE


def test_of_sixteen_tasks_at_chance_hardly_any_is_called_above_it() -> None:
    rng = np.random.default_rng(19)
    any_called, single = [], []
    for _ in range(400):
        tasks = [Sample((rng.random((1, 100)) < 0.25).astype(float)) for _ in range(16)]
        called = intervals.above_baseline(tasks, [0.25] * 16)
        any_called.append(any(called))
        single.append(intervals.chance_of_so_many(tasks[0], 0.25)[0] < 0.025)
    assert np.mean(any_called) <= 0.035
    assert np.mean(single) <= 0.035
    sure = [Sample((np.arange(100)[None] < right).astype(float)) for right in (90, 25, 50)]
    assert intervals.above_baseline(sure, [0.25] * 3) == [True, False, True]
    assert intervals.above_baseline(sure[:1], [1.0]) == [False]
    assert intervals.above_baseline(sure[:1], [0.0]) == [True], "an answer that must be produced: one is enough"


def test_the_exact_test_of_a_baseline_is_the_binomials() -> None:
    task = Sample((np.arange(40)[None] < np.array([[10], [14], [20]])).astype(float))
    assert intervals.chance_of_so_many(task, 0.25) == pytest.approx(binom.sf(np.array([10, 14, 20]) - 1, 40, 0.25))
