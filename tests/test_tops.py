"""Sets of the most important components: counted one by one, planted, and with intervals over documents that cover."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from headcount.errors import OptionError
from headcount.masks import removal_order
from headcount.view import tops

RNG = np.random.default_rng(0)
SCORES = {(task, k): RNG.random(60) for k in (0, 5) for task in ("red", "green", "blue")}
RESAMPLED = {key: values + 0.1 * RNG.normal(size=(30, 60)) for key, values in SCORES.items()}


def top(scores: np.ndarray, size: int) -> set[int]:
    return set(removal_order(scores)[len(scores) - size :])


@given(st.integers(2, 4), st.integers(4, 25), st.integers(0, 1000), st.floats(0, 1))
def test_top_sets_are_counted(tasks: int, n: int, seed: int, fraction: float) -> None:
    rng = np.random.default_rng(seed)
    # Few values, so that ties are many: they go by position, as in pruning.
    scores = {(f"task{i}", 1): rng.integers(0, 5, n).astype(float) for i in range(tasks)}
    found, pairs = tops.top_sets(scores, [fraction]), tops.top_overlaps(scores, None, [fraction])
    size = int(np.floor(fraction * n + 1e-9))
    if size == 0:
        assert found.empty
        assert pairs.empty
        return
    sets = [top(values, size) for values in scores.values()]
    row = found.iloc[0]
    assert (row["num_fewshot"], row["size"], row["tasks"]) == (1, size, tasks)
    assert row["common"] == len(set.intersection(*sets)) == round(row["share"] * size)
    shared = [len(a & b) for a, b in itertools.combinations(sets, 2)]
    assert row["pair_mean_share"] == pytest.approx(np.mean(shared) / size)
    assert row["expected"] == pytest.approx(n * (size / n) ** tasks)
    assert pairs["common"].tolist() == shared
    for row in pairs.itertuples():
        at_least = sum(hypergeom.pmf(c, n, size, size) for c in range(row.common, n + 1))
        assert row.p == pytest.approx(at_least)
        assert row.p_fewer == pytest.approx(1 - at_least + hypergeom.pmf(row.common, n, size, size))
        assert row.expected == pytest.approx(size * size / n)


def test_planted_top_sets() -> None:
    scores = {("red", 0): np.arange(10.0), ("green", 0): np.array([0.0, 1, 2, 3, 4, 9, 6, 7, 8, 5])}
    found = tops.top_sets(scores, (0.05, 0.1, 0.3, 1.0)).set_index("fraction")
    assert found.index.tolist() == [0.1, 0.3, 1.0], "a top set of no component says nothing"
    assert found["common"].tolist() == [0, 2, 10]
    assert found["low"].isna().all(), "nothing is known of documents"


@pytest.mark.parametrize("aggregate", ["mean", "ranks"])
def test_tasks_and_their_aggregate_are_held_against_other_scores(aggregate: str) -> None:
    other = np.random.default_rng(3).random(60)
    found = tops.top_overlaps(SCORES, {"prefix_matching": other}, (0.2,), resampled=RESAMPLED, aggregate=aggregate)
    beside = found[found["other"] == "prefix_matching"].set_index(["task", "num_fewshot"])
    name = "mean" if aggregate == "mean" else "mean of ranks"
    assert set(beside.index) == {(task, k) for task in ("red", "green", "blue", name) for k in (0, 5)}
    whole = np.mean([values if aggregate == "mean" else np.argsort(np.argsort(values))
                     for (_, k), values in SCORES.items() if k == 5], axis=0)
    assert beside.loc[(name, 5), "common"] == len(top(whole, 12) & top(other, 12))
    row = beside.loc[("red", 0)]
    counts = [len(top(values, 12) & top(other, 12)) for values in RESAMPLED["red", 0]]
    reach = 1.959964 * np.std(counts, ddof=1)
    assert row["common"] == len(top(SCORES["red", 0], 12) & top(other, 12))
    assert row["low"] == pytest.approx(max(0, row["common"] - reach))
    assert row["high"] == pytest.approx(min(12, row["common"] + reach))
    pair = found[(found["task"] == "red") & (found["other"] == "green") & (found["num_fewshot"] == 5)].iloc[0]
    counts = [len(top(a, 12) & top(b, 12)) for a, b in zip(RESAMPLED["red", 5], RESAMPLED["green", 5], strict=True)]
    assert pair["high"] - pair["common"] == pytest.approx(1.959964 * np.std(counts, ddof=1))
    shared = tops.top_sets(SCORES, (0.2,), resampled=RESAMPLED).set_index("num_fewshot").loc[5]
    every = [len(top(a, 12) & top(b, 12) & top(c, 12)) / 12 for a, b, c in zip(
        *(RESAMPLED[task, 5] for task in ("red", "green", "blue")), strict=True)]
    assert shared["high"] - shared["share"] == pytest.approx(1.959964 * np.std(every, ddof=1))


def test_depth_counts_thirds_of_the_layers() -> None:
    layers = [layer for layer in range(6) for _ in range(10)]
    middle = np.where(np.isin(layers, [2, 3]), 1.0, 0.1) + 0.001 * np.arange(60)
    scores = {(task, 5): middle for task in ("red", "green")}
    found = tops.depth(scores, layers).set_index(["task", "third"])
    assert set(found.index) == {(t, third) for t in ("red", "green", "mean") for third in tops.THIRDS}
    assert found["share"].tolist() == [0, 1, 0] * 3
    assert set(found["important"]) == {12}
    assert found["expected"].tolist() == pytest.approx([1 / 3] * 9)
    drawn = tops.depth(SCORES, layers, resampled=RESAMPLED).set_index(["task", "num_fewshot", "third"])
    early = [sum(layers[i] < 2 for i in top(values, 12)) / 12 for values in RESAMPLED["red", 5]]
    row = drawn.loc[("red", 5, "early")]
    assert row["share"] == sum(layers[i] < 2 for i in top(SCORES["red", 5], 12)) / 12
    assert row["high"] == pytest.approx(min(1, row["share"] + 1.959964 * np.std(early, ddof=1)))


def test_ties_go_by_the_next_score_in_every_draw() -> None:
    scores, ties = np.array([[1.0, 1, 0, 0], [2, 2, 1, 1]]), np.array([[1.0, 2, 2, 1], [2, 1, 1, 2]])
    np.testing.assert_array_equal(tops.placed(scores, ties), [[2, 3, 1, 0], [3, 2, 0, 1]])
    np.testing.assert_array_equal(tops.placed(scores), [[2, 3, 0, 1], [2, 3, 0, 1]])


def test_an_aggregate_has_draws_where_all_its_tasks_have() -> None:
    some = {key: values for key, values in RESAMPLED.items() if key != ("blue", 5)}
    _, draws = tops.with_aggregate(SCORES, some)
    assert ("mean", 0) in draws
    assert ("mean", 5) not in draws
    np.testing.assert_allclose(draws["mean", 0][7], np.mean([some[task, 0][7] for task in ("red", "green", "blue")], 0))


def test_little_or_nothing_is_no_error() -> None:
    assert tops.top_sets({}).empty
    assert tops.top_overlaps({}).empty
    assert tops.depth({}, []).empty
    assert tops.top_overlaps({("red", 0): np.arange(9.0)}).empty
    holes = {("red", 0): np.array([np.nan, 1, 2, 3, 4]), ("green", 0): np.array([9.0, 1, 2, 3, 4])}
    assert tops.top_sets(holes, [0.5])["size"].tolist() == [2], "of the four that both have scored"
    with pytest.raises(OptionError, match="one length, not 4, 5"):
        tops.top_overlaps({("red", 0): np.arange(5.0)}, {"prefix_matching": np.arange(4.0)})
    with pytest.raises(OptionError, match="between 0 and 1"):
        tops.top_sets({("red", 0): np.arange(5.0), ("green", 0): np.arange(5.0)}, [30])


def test_intervals_of_sets_cover_what_other_documents_give() -> None:
    """Of simulated studies, as many as promised hold the mean over studies of the share in the early third."""
    rng = np.random.default_rng(0)
    heads, documents, studies = 90, 60, 150
    truth, layers = np.exp(0.5 * rng.normal(size=heads)), np.repeat(np.arange(30), 3)
    shares, bounds = [], []
    for _ in range(studies):
        drawn = truth * np.exp(0.8 * rng.normal(size=(documents, heads)))
        counts = rng.multinomial(documents, np.full(documents, 1 / documents), 100)
        row = tops.depth({("red", 0): drawn.mean(axis=0)}, layers.tolist(),
                         resampled={("red", 0): counts @ drawn / documents}).iloc[0]
        shares.append(row["share"])
        bounds.append((row["low"], row["high"]))
    covered = np.mean([low <= np.mean(shares) <= high for low, high in bounds])
    assert 0.9 <= covered <= 1.0
