"""Intervals and tests against loops and scipy, and against what they promise, in simulated studies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from headcount.errors import OptionError
from headcount.stats import ranks
from headcount.stats.baselines import baseline, chance, degenerate, few_distinct, most_predicted
from headcount.stats.paired import holm, mcnemar
from headcount.stats.ranks import pearson, rank_correlation
from headcount.stats.resampling import around, interval
from headcount.stats.sets import hypergeometric_overlap, overlap_within


def test_intervals_around_are_as_wide_as_replicates_spread() -> None:
    replicates = np.random.default_rng(0).normal(0.2, [0.1, 0.3], (4000, 2))
    low, high = around(np.array([0.5, 0.5]), replicates)
    np.testing.assert_allclose(high - 0.5, [0.196, 0.588], rtol=0.05)
    np.testing.assert_allclose(0.5 - low, high - 0.5)
    assert np.isnan(around(0.5, replicates[:1, 0])).all(), "one draw has no spread"


def test_interval_is_the_percentiles() -> None:
    low, high = interval(np.arange(1001.0)[None])
    np.testing.assert_allclose([low[0], high[0]], [25, 975])


def test_chance_and_the_constant_answer() -> None:
    assert chance(np.array([2, 4, 0])) == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert baseline(np.array([1, 1])) == 1, "one option is no choice"
    first, options = np.zeros(60, np.int64), np.full(60, 4)
    assert baseline(options) == 0.25, "no model sees an option's place"
    assert baseline(options, 0.4) == 0.4
    right = np.ones(60)
    assert degenerate(right, first, options, low=0.99, above=True) == []
    all_one = {"low": 0.99, "above": False, "constant": 1.0}
    assert len(degenerate(right, first, options, **all_one, places=[0])) == 2
    assert len(degenerate(right, first, options, **all_one, places=[])) == 1, "many answers"
    assert len(degenerate(right, first, options, **all_one)) == 2, "nobody looked"


def test_rank_correlation_is_scipys_and_its_interval_covers() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    y[:5] = y[0]  # ties
    rho, low, high = rank_correlation(x, y)
    assert rho == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert low < rho < high
    # The true rank correlation of this pair of normals is 6/pi asin(rho/2), rho = 1/sqrt(2).
    true = 6 / np.pi * np.arcsin(np.sqrt(0.5) / 2)
    inside = 0
    for _ in range(200):
        x = rng.normal(size=100)
        _, low, high = rank_correlation(x, x + rng.normal(size=100), resamples=300)
        inside += low <= true <= high
    assert inside / 200 > 0.88
    assert all(np.isnan(v) for v in rank_correlation(np.ones(5), x[:5]))
    assert all(np.isnan(v) for v in rank_correlation(x[:2], x[:2]))


@pytest.mark.parametrize("values", [1, 3, 1000])
def test_ranks_of_draws_are_those_of_the_drawn_scores(values: int) -> None:
    rng = np.random.default_rng(values)
    scores = rng.integers(0, values, 40).astype(np.float64)
    draws = rng.integers(0, 40, (25, 40))
    np.testing.assert_array_equal(ranks._ranks_of_draws(scores, draws), ranks.ranks(scores[draws]))


def test_mcnemar_is_scipys_binomial_test() -> None:
    rng = np.random.default_rng(0)
    full = (rng.random(80) < 0.7).astype(float)
    pruned = np.where(rng.random((30, 80)) < np.linspace(0, 0.6, 30)[:, None], rng.integers(0, 2, (30, 80)), full)
    for p, row in zip(mcnemar(full, pruned), pruned, strict=True):
        fell, rose = int(((full == 1) & (row == 0)).sum()), int(((full == 0) & (row == 1)).sum())
        expected = scipy.stats.binomtest(rose, fell + rose).pvalue if fell + rose else 1.0
        assert p == pytest.approx(expected)
    # Partial scores: signs of differences; 0.1 + 0.2 against 0.3 is a tie.
    full, pruned = np.array([0.3, 0.5, 0.5, 1.0]), np.array([[0.1 + 0.2, 0.4, 0.0, 0.9]])
    assert mcnemar(full, pruned)[0] == pytest.approx(2 * 0.5**3)


def test_mcnemar_counts_a_passage_once() -> None:
    passages = np.repeat(np.arange(4), 10)
    full, pruned = np.ones(40), np.zeros((1, 40))
    pruned[0, passages == 3] = 1
    assert mcnemar(full, pruned)[0] < 1e-8
    assert mcnemar(full, pruned, clusters=passages)[0] == pytest.approx(2 * 0.5**3)


def test_mcnemar_is_wrong_no_more_often_than_it_says() -> None:
    rng = np.random.default_rng(2)
    full = (rng.random(150) < 0.7).astype(float)
    # As many answers are lost as won, on average.
    swapped = np.where(full == 1, rng.random((2000, 150)) >= 0.1 / full.mean(), rng.random((2000, 150)) < 0.1
                       / (1 - full.mean())).astype(float)
    assert (mcnemar(full, swapped) < 0.05).mean() <= 0.05


@given(st.lists(st.one_of(st.just(float("nan")), st.floats(0, 1)), max_size=12))
def test_holm_goes_down_step_by_step(values: list[float]) -> None:
    found = holm(np.array(values, dtype=float))
    known = sorted(v for v in values if not np.isnan(v))
    for value, corrected in zip(values, found, strict=True):
        if np.isnan(value):
            assert np.isnan(corrected)
            continue
        # The worst of all smaller ones, each times the number that are no smaller by rank.
        last = max(i for i, v in enumerate(known) if v == value)
        candidates = [known[i] * (len(known) - i) for i in range(last + 1)]
        assert corrected == pytest.approx(min(1.0, max(candidates)))


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm(np.array([0.04, np.nan, 0.01, 0.03])), [0.06, np.nan, 0.03, 0.06])


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_overlap_of_sets_by_counting_them(total: int, a: int, b: int) -> None:
    a, b = min(a, total), min(b, total)
    first = set(range(a))
    shared = [len(first & set(second)) for second in itertools.combinations(range(total), b)]
    for common in set(shared):
        more, fewer, expected = hypergeometric_overlap(total, a, b, common)
        assert more == pytest.approx(np.mean([s >= common for s in shared]))
        assert fewer == pytest.approx(np.mean([s <= common for s in shared]))
        assert expected == pytest.approx(np.mean(shared))
    with pytest.raises(OptionError, match="in common"):
        hypergeometric_overlap(total, a, b, max(shared) + 1)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), max_size=9))
def test_overlap_within_layers_by_counting_every_set(things: list[tuple[int, bool, bool]]) -> None:
    strata = np.array([s for s, _, _ in things], np.int64)
    one, other = (np.array([thing[i] for thing in things], bool) for i in (1, 2))
    chosen = [itertools.combinations(np.flatnonzero(strata == s), int(other[strata == s].sum())) for s in range(3)]
    shared = [sum(one[i] for of_one in sets for i in of_one) for sets in itertools.product(*map(list, chosen))]
    common = int((one & other).sum())
    found = overlap_within(strata, one, other)
    assert found == pytest.approx((np.mean([s >= common for s in shared]), np.mean([s <= common for s in shared]),
                                   np.mean(shared)), abs=1e-12)
    together = overlap_within(np.zeros_like(strata), one, other)
    assert together == pytest.approx(hypergeometric_overlap(len(one), int(one.sum()), int(other.sum()), common))


def test_degenerate_results_are_marked() -> None:
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 2, 200)
    options = np.full(200, 2)
    right = np.where(rng.random(200) < 0.9, gold, 1 - gold)
    assert degenerate((right == gold).astype(float), right, options, low=0.85, above=True, constant=0.53) == []
    constant = np.where(np.arange(200) < 192, 1, 0)  # 96 %
    correct = (constant == gold).astype(float)
    reasons = degenerate(correct, constant, options, low=0.45, above=False, constant=0.53, places=[0, 1])
    assert reasons[0] == "option 2 is the answer to 96 % of the documents, whatever they say"
    assert reasons[1].startswith(f"accuracy {correct.mean():.2f} is not shown to be above")
    few = degenerate((right == gold).astype(float), right, options, low=0.85, above=True,
                           clusters=np.arange(200) // 5)
    assert few == ["40 passages, fewer than 50: intervals are wide and rough"]
    assert degenerate(np.ones(49), gold[:49], options[:49], low=1.0, above=True)[0].startswith("49 documents,")
    # No options: the answer is produced, and there is nothing to be constant about. One: there is no choice.
    for options, marked in ((0, []), (1, ["accuracy 1.00 is not shown to be above 1.00, which guessing "
                                          "gets (corrected for the number of tasks)"])):
        zeros = np.zeros(60, int)
        assert degenerate(np.ones(60), zeros, zeros + options, low=1.0, above=not marked) == marked


def test_the_predicted_option_and_the_baseline() -> None:
    assert most_predicted(np.array([2, 2, 0, 0, 0]), np.array([4, 4, 4, 1, 1])) == (2, pytest.approx(2 / 3))
    assert most_predicted(np.array([0]), np.array([1])) == (-1, 0.0)
    assert baseline(np.array([2, 2, 2, 2]), 0.75) == 0.75
    assert baseline(np.array([2, 4, 4])) == pytest.approx(1 / 3)
    assert baseline(np.array([0])) == 0


def test_an_oracle_with_few_values_is_marked() -> None:
    assert few_distinct(15, 30) == []
    assert few_distinct(14, 30) == ["the oracle found 14 distinct values for 30 components, so that ties decide "
                                          "the order"]


def test_rank_numbers_are_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (2, 40)).astype(float)
    assert ranks.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert np.isnan(ranks.spearman(x[:2], y[:2]))
    lists = np.argsort(x, kind="stable"), np.argsort(y, kind="stable")
    assert ranks.argsort_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(*lists).statistic)
    assert ranks.reliability(0.5) == pytest.approx(2 / 3)
    assert ranks.reliability(-0.2) == -0.2
    assert np.isnan(ranks.ceiling(-0.2, 0.5))
    assert np.isnan(ranks.disattenuated(*ranks.ranks(np.stack([[x, -x], [y, y]]))))
    assert ranks.disattenuated(*ranks.ranks(np.stack([[x, x], [y, y]]))) == pytest.approx(ranks.spearman(x, y))


def test_an_interval_of_a_perfect_correlation_is_a_number() -> None:
    low, high = ranks.document_interval(1.0, np.array([0.9, 1.0, 0.95]), 10)
    assert 0.5 < low < 1
    assert high == 1
    assert np.isnan(ranks.document_interval(float("nan"), np.array([0.9, 1.0]), 10)).all()
    assert np.isnan(ranks.document_interval(0.5, np.array([np.nan, 0.4]), 10)).all()
    few = np.array([np.nan, *np.full(19, 0.5)])
    assert not np.isnan(ranks.document_interval(0.5, few, 10)).any(), "one of twenty"
    few[1] = np.nan
    assert np.isnan(ranks.document_interval(0.5, few, 10)).all(), "single documents decide"


# How alike the tasks are, how noisy documents are, and whether both scores are of the same documents.
@pytest.mark.parametrize(("alike", "noise", "shared"), [(0.7, 1.0, False), (0.95, 1.0, False), (0.95, 1.8, False),
                                                        (0.9, 1.0, True)])
def test_rank_correlations_over_documents(alike: float, noise: float, shared: bool) -> None:
    """Centred intervals cover what another study finds on average, percentiles do not; halves tell the noise."""
    rng = np.random.default_rng(0)
    components, documents, trials = 120, 100, 120
    z = rng.normal(size=(2, components))
    z[1] = alike * z[0] + np.sqrt(1 - alike**2) * z[1]
    unlimited = ranks.spearman(z[0], z[1])

    def study() -> np.ndarray:
        """Two scores of every document; documents differ in scale, and noise has heavy tails."""
        scale = np.exp(0.5 * rng.normal(size=(1 if shared else 2, documents, 1)))
        common = noise * rng.normal(size=(1, documents, components)) if shared else 0.0
        own = (0.5 if shared else 1) * noise * rng.normal(size=(2, documents, components))
        return np.asarray(scale * np.exp(0.8 * z[:, None] + common + own))

    def rho(scores: np.ndarray) -> float:
        return ranks.spearman(scores[0].mean(axis=0), scores[1].mean(axis=0))

    expected = np.mean([rho(study()) for _ in range(400)])
    again = np.mean([ranks.spearman(study()[0].mean(axis=0), study()[0].mean(axis=0)) for _ in range(100)])
    centred, percentile, reliabilities, clean = 0, 0, [], []
    for _ in range(trials):
        scores = study()
        draws = rng.multinomial(documents, np.full(documents, 1 / documents), (2, 200))
        if shared:
            draws[1] = draws[0]
        replicates = pearson(*(ranks.ranks(d @ s) for d, s in zip(draws, scores, strict=True)))
        low, high = ranks.document_interval(rho(scores), replicates, components)
        centred += low <= expected <= high
        low, high = np.quantile(replicates, [0.025, 0.975])
        percentile += low <= expected <= high
        halves = np.stack([scores[:, ::2].mean(axis=1), scores[:, 1::2].mean(axis=1)], axis=1)
        reliabilities.append(ranks.reliability(ranks.spearman(*halves[0])))
        clean.append(ranks.disattenuated(*ranks.ranks(halves)))
    assert 0.84 <= centred / trials <= 0.99
    assert percentile < centred
    assert np.mean(reliabilities) == pytest.approx(again, abs=0.04)
    assert abs(np.mean(clean) - unlimited) < max(0.02, abs(expected - unlimited) / 4)
