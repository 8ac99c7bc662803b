"""Intervals against loops, and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from headcount import stats
from headcount.errors import OptionError


def test_resampled_means_are_means_of_documents_drawn_with_replacement() -> None:
    values = np.array([[0.0, 1.0, 2.0, 7.0]])
    samples = stats.resampled_means(values, seed=3, resamples=20_000)[0]
    assert set(np.round(samples * 4)) <= {a + b + c + d for a in values[0] for b in values[0] for c in values[0]
                                          for d in values[0]}
    assert samples.mean() == pytest.approx(2.5, abs=0.05)
    assert samples.var() == pytest.approx(values.var() / 4, rel=0.05)
    assert (samples == stats.resampled_means(values, seed=3, resamples=20_000)[0]).all()


def test_rows_share_their_draws() -> None:
    values = np.random.default_rng(0).random((1, 30))
    samples = stats.resampled_means(np.concatenate([values, values + 1]), resamples=50)
    np.testing.assert_allclose(samples[1] - samples[0], 1)


def test_interval_is_the_percentiles() -> None:
    low, high = stats.interval(np.arange(1001.0)[None])
    np.testing.assert_allclose([low[0], high[0]], [25, 975])


def test_ninety_five_per_cent_intervals_cover_about_that_often() -> None:
    rng = np.random.default_rng(1)
    paired, means, trials, n, p, lost = 0, 0, 400, 150, 0.7, 0.1
    for _ in range(trials):
        full = (rng.random(n) < p).astype(float)
        pruned = np.where(rng.random(n) < lost / p, 0.0, full)  # loses right answers only: mean loss is 0.1
        samples = stats.resampled_means(np.stack([full, pruned]), seed=int(rng.integers(1 << 30)), resamples=400)
        low, high = stats.interval(samples)
        means += bool(low[0] <= p <= high[0])
        low, high = stats.interval(samples[1:] - samples[0])
        paired += bool(low[0] <= -lost <= high[0])
    assert 0.91 <= means / trials <= 0.98
    assert 0.91 <= paired / trials <= 0.98


@given(st.lists(st.floats(-0.2, 0.2), min_size=1, max_size=9), st.floats(0, 0.1))
def test_free_fraction_is_the_last_step_before_the_first_that_may_lose_more(lows: list[float], margin: float) -> None:
    fractions = [(i + 1) / 10 for i in range(len(lows))]
    expected = 0.0
    for i in range(len(lows)):
        if all(low > -margin + 1e-9 for low in lows[: i + 1]):
            expected = fractions[i]
    assert stats.free_fraction(fractions, lows, margin) == expected


def test_a_later_recovery_does_not_count() -> None:
    assert stats.free_fraction([0.1, 0.2, 0.3], [-0.01, -0.5, 0.0], 0.02) == 0.1


@pytest.mark.parametrize("right", range(2, 50))
def test_a_bound_on_the_margin_is_not_above_it(right: int) -> None:
    low = (right - 1) / 50 - right / 50  # one document of fifty, with whatever last bits
    assert stats.free_fraction([0.0, 0.1], [0.0, low], 0.02) == 0
    assert stats.free_fraction([0.0, 0.1], [0.0, low], 0.021) == 0.1


def test_nothing_removed_is_free_without_a_margin_too() -> None:
    assert stats.free_fraction([0.0, 0.1, 0.2], [0.0, 0.01, -0.01], 0.0) == 0.1


def test_chance_and_the_constant_answer() -> None:
    assert stats.chance(np.array([2, 4, 1])) == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert stats.constant_answer(np.array([0, 1, 1, 1]), np.array([2, 2, 2, 2])) == 0.75
    assert np.isnan(stats.constant_answer(np.array([0, 1]), np.array([2, 3])))
    assert np.isnan(stats.constant_answer(np.array([0, 0]), np.array([1, 1])))


def test_no_documents_no_interval() -> None:
    with pytest.raises(OptionError):
        stats.resampled_means(np.zeros((1, 0)))


def test_rank_correlation_is_scipys_and_its_interval_covers() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    y[:5] = y[0]  # ties
    rho, low, high = stats.rank_correlation(x, y)
    assert rho == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert low < rho < high
    # The true rank correlation of this pair of normals is 6/pi asin(rho/2), rho = 1/sqrt(2).
    true = 6 / np.pi * np.arcsin(np.sqrt(0.5) / 2)
    inside = 0
    for _ in range(200):
        x = rng.normal(size=100)
        _, low, high = stats.rank_correlation(x, x + rng.normal(size=100), resamples=300)
        inside += low <= true <= high
    assert inside / 200 > 0.88
    assert all(np.isnan(v) for v in stats.rank_correlation(np.ones(5), x[:5]))
    assert all(np.isnan(v) for v in stats.rank_correlation(x[:2], x[:2]))
