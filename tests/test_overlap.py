"""Importance against induction: planted orders, sums by loops, and what chance gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom, rankdata

from headcount.analysis.induction import induction_among_important, retained
from headcount.analysis.rows import labelled
from headcount.errors import OptionError
from headcount.masks import removal_order

RNG = np.random.default_rng(0)
SCORES = {(task, k): RNG.random(50) for k in (0, 5) for task in ("red", "green")}
PRIMITIVES = {"prefix_matching": RNG.random(50) ** 4, "copying": RNG.random(50)}


@pytest.mark.parametrize("aggregate", ["mean", "ranks"])
def test_retained_is_summed_head_by_head(aggregate: str) -> None:
    fractions = [0.0, 0.13, 0.5, 1.0]
    found = retained(SCORES, PRIMITIVES, fractions, draws=20, aggregate=aggregate)
    assert len(found) == 2 * 3 * 2 * len(fractions)
    for row in found.itertuples():
        whole = row.scope == ("mean" if aggregate == "mean" else "mean of ranks")
        tasks = ["red", "green"] if whole else [row.task]
        scores = [SCORES[task, row.num_fewshot] for task in tasks]
        importance = sum(scores if aggregate == "mean" else map(rankdata, scores)) / len(tasks)
        gone = removal_order(importance)[: math.floor(row.fraction * 50 + 1e-9)]
        left = sum(v for head, v in enumerate(PRIMITIVES[row.primitive]) if head not in gone)
        assert row.retained == pytest.approx(left / PRIMITIVES[row.primitive].sum(), abs=1e-12)
        assert row.random_mean == pytest.approx(1 - len(gone) / 50)
    assert (found[found["fraction"] == 0]["retained"] == 1).all()
    assert (found[found["fraction"] == 1]["retained"] == 0).all()


def test_planted_retention() -> None:
    score = np.array([3.0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    best = {("red", 0): 10 - np.arange(10.0)}  # the two heads that match prefixes are the most important ones
    worst = {("red", 0): np.arange(10.0)}
    assert retained(best, {"p": score}, [0.5, 0.8, 0.9])["retained"].tolist() == [1, 1, 0.75]
    assert retained(worst, {"p": score}, [0.1, 0.2, 0.7])["retained"].tolist() == [0.25, 0, 0]


def test_the_band_is_that_of_random_orders() -> None:
    found = retained(SCORES, PRIMITIVES, [0.3], draws=4000)
    values = PRIMITIVES["prefix_matching"]
    rng = np.random.default_rng(9)
    drawn = [values[rng.permutation(50)[15:]].sum() / values.sum() for _ in range(4000)]
    row = found[found["primitive"] == "prefix_matching"].iloc[0]
    np.testing.assert_allclose([row["random_low"], row["random_high"]], np.quantile(drawn, [0.025, 0.975]), atol=0.015)
    assert row["random_mean"] == pytest.approx(np.mean(drawn), abs=0.01)
    assert found.groupby("primitive")["random_low"].nunique().eq(1).all(), "one band for every task"
    again = retained(SCORES, PRIMITIVES, [0.3], draws=4000)
    assert found.equals(again), "the draws are seeded"


def test_intervals_are_those_of_the_same_counts_over_resampled_scores() -> None:
    rng = np.random.default_rng(1)
    resampled = {key: values + 0.1 * rng.normal(size=(40, 50)) for key, values in SCORES.items()}
    flags = np.arange(50) % 7 == 0
    whole = {**resampled, ("mean", 5): (resampled["red", 5] + resampled["green", 5]) / 2}
    found = labelled(retained(SCORES, PRIMITIVES, [0.3], resampled=resampled)).set_index(["task", "num_fewshot"])
    among = labelled(induction_among_important(SCORES, flags, [0.3], resampled=resampled)).set_index(
        ["task", "num_fewshot"])
    assert not found.isna().any(axis=None)
    for key in (("red", 0), ("green", 5), ("mean", 5)):
        drawn = []
        for values in whole[key]:
            left = removal_order(values)[15:]
            drawn.append((PRIMITIVES["copying"][left].sum() / PRIMITIVES["copying"].sum(), flags[left[20:]].sum()))
        spreads = 1.959964 * np.std(drawn, axis=0, ddof=1)
        row = found[found["primitive"] == "copying"].loc[key]
        assert row["high"] - row["retained"] == pytest.approx(spreads[0])
        assert row["retained"] - row["low"] == pytest.approx(spreads[0])
        assert among.loc[key, "high"] == pytest.approx(min(8, among.loc[key, "common"] + spreads[1]))
        assert among.loc[key, "low"] == pytest.approx(max(0, among.loc[key, "common"] - spreads[1]))


def test_nothing_to_retain_is_no_number() -> None:
    found = retained({("red", 0): np.arange(4.0)}, {"p": np.zeros(4)}, [0.5])
    assert found[["retained", "random_low", "random_high"]].isna().all(axis=None)
    assert set(found["task"]) == {"red"}, "one task has no mean"


@given(st.integers(0, 10_000), st.integers(1, 30), st.floats(0, 1))
def test_induction_heads_among_the_important_are_counted(seed: int, n: int, fraction: float) -> None:
    rng = np.random.default_rng(seed)
    scores = {("red", 0): rng.integers(0, 6, n).astype(float)}
    flags = rng.random(n) < 0.3
    row = induction_among_important(scores, flags, [fraction]).iloc[0]
    size = math.floor(fraction * n + 1e-9)
    chosen = set(removal_order(scores["red", 0])[n - size:])
    assert row["important"] == size
    assert row["induction_heads"] == flags.sum()
    assert row["common"] == sum(head in chosen for head in np.flatnonzero(flags))
    assert row["expected"] == pytest.approx(size * flags.sum() / n)
    at_least = sum(hypergeom.pmf(c, n, size, flags.sum()) for c in range(int(row["common"]), n + 1))
    assert row["p"] == pytest.approx(at_least)
    assert row["p_fewer"] == pytest.approx(1 - at_least + hypergeom.pmf(row["common"], n, size, flags.sum()))


def test_planted_induction_heads() -> None:
    scores = {(task, 5): np.arange(100.0) for task in ("red", "green")}
    found = labelled(induction_among_important(scores, np.arange(100) >= 95)).set_index(["task", "fraction"])
    assert set(found.index) == {(t, f) for t in ("red", "green", "mean") for f in (0.1, 0.2, 0.3, 0.5)}
    one = found.loc[("mean", 0.1)]
    assert (one["important"], one["induction_heads"], one["common"], one["expected"]) == (10, 5, 5, 0.5)
    assert one["p"] == pytest.approx(math.comb(10, 5) / math.comb(100, 5))
    assert found.loc[("red", 0.5), "p"] == pytest.approx(math.comb(50, 5) / math.comb(100, 5))


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(OptionError, match="never negative"):
        retained(SCORES, {"p": np.full(50, -0.1)})
    with pytest.raises(OptionError, match="one length, not 20, 50"):
        retained(SCORES, {"p": np.ones(20)})
    with pytest.raises(OptionError, match="one length, not 20, 50"):
        induction_among_important(SCORES, np.ones(20, bool))
    with pytest.raises(OptionError, match="a score for each"):
        induction_among_important({("red", 0): np.array([1, np.nan])}, np.ones(2, bool))
    with pytest.raises(OptionError, match="between 0 and 1"):
        retained(SCORES, PRIMITIVES, [30])
