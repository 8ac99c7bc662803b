"""Importance between tasks and shots: planted worlds, and the same numbers by loops and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata, spearmanr

from headcount.analysis.correlations import correlations as correlation_rows
from headcount.analysis.rows import labelled
from headcount.errors import OptionError
from headcount.masks import random_order
from headcount.stats import ranks
from headcount.stats.ranks import pearson

HEADS, DRAWS = 40, 30
TASKS = ("red", "green", "blue")
KEYS = [(task, k) for k in (0, 5) for task in TASKS]


def correlations(*scores: dict, **options: object) -> pd.DataFrame:
    """The table with its rows called as people call them: "mean", "mean of ranks", "random"."""
    return labelled(correlation_rows(*scores, **options))  # type: ignore[arg-type]


def rho(x: np.ndarray, y: np.ndarray) -> float:
    return float(spearmanr(x, y).statistic)


def world(seed: int = 0) -> tuple[dict, dict, dict]:
    """Scores of three tasks at two k, of documents that the two k of a task share."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=HEADS)
    scores, resampled, halves = {}, {}, {}
    for task in TASKS:
        own = truth + 0.4 * rng.normal(size=HEADS)
        counts = rng.multinomial(60, np.full(60, 1 / 60), DRAWS)
        shared = rng.normal(size=(60, HEADS))
        for k in (0, 5):
            documents = np.exp(own + 0.1 * k * truth + shared + rng.normal(size=(60, HEADS)))
            scores[task, k] = documents.mean(axis=0)
            halves[task, k] = np.stack([documents[::2].mean(axis=0), documents[1::2].mean(axis=0)])
            resampled[task, k] = counts @ documents / 60
    return scores, resampled, halves


def table(seed: int = 0) -> pd.DataFrame:
    found = correlations(*world(seed), seed=3)
    keys = ["kind", "task", "num_fewshot", "other_task", "other_shots"]
    assert not found.duplicated(keys).any()
    return found.set_index(keys).sort_index()


def test_every_correlation_is_scipys() -> None:
    scores, _, _ = world()
    found = table()["correlation"]
    for k in (0, 5):
        for a, b in itertools.permutations(TASKS, 2):
            assert found["tasks", a, k, b, k] == pytest.approx(rho(scores[a, k], scores[b, k]))
    for task, (a, b) in itertools.product(TASKS, ((0, 5), (5, 0))):
        assert found["shots", task, a, task, b] == pytest.approx(rho(scores[task, a], scores[task, b]))


def test_an_aggregate_leaves_out_the_task_it_is_compared_with() -> None:
    scores, _, _ = world()
    found = table()["correlation"]
    for task, k in KEYS:
        others = [scores[other, k] for other in TASKS if other != task]
        placed = np.mean([np.argsort(np.argsort(values)) for values in others], axis=0)
        for name, expected in (("mean", np.mean(others, axis=0)), ("mean of ranks", placed)):
            assert found["tasks", task, k, name, k] == pytest.approx(rho(scores[task, k], expected))
            assert found["tasks", name, k, task, k] == found["tasks", task, k, name, k]
    # Unrelated tasks do not correlate with the mean of the others, which they would with a mean that holds them.
    rng = np.random.default_rng(1)
    unrelated = {(task, 0): rng.normal(size=4000) for task in TASKS}
    apart = correlations(unrelated).set_index(["task", "other_task"])["correlation"]
    assert abs(apart["red", "mean"]) < 0.05
    assert rho(unrelated["red", 0], np.mean(list(unrelated.values()), axis=0)) > 0.5


def test_aggregates_between_shots_and_with_each_other() -> None:
    scores, _, _ = world()
    found = table()["correlation"]
    whole = {(name, k): how([scores[task, k] for task in TASKS]) for k in (0, 5) for name, how in (
        ("mean", lambda values: np.mean(values, axis=0)),
        ("mean of ranks", lambda values: np.mean([rankdata(x) for x in values], axis=0)))}
    for name in ("mean", "mean of ranks"):
        assert found["shots", name, 0, name, 5] == pytest.approx(rho(whole[name, 0], whole[name, 5]))
    assert found["tasks", "mean", 5, "mean of ranks", 5] == pytest.approx(rho(whole["mean", 5],
                                                                             whole["mean of ranks", 5]))


def test_aggregates_between_shots_are_over_the_tasks_of_both() -> None:
    scores, _, _ = world()
    del scores["blue", 5]
    found = correlations(scores)
    row = found[(found["kind"] == "shots") & (found["task"] == "mean") & (found["other_shots"] == 5)].iloc[0]
    a, b = (scores["red", k] + scores["green", k] for k in (0, 5))
    assert row["correlation"] == pytest.approx(rho(a, b))


def test_the_diagonal_is_the_reliability_and_it_bounds_the_pairs() -> None:
    _, _, halves = world()
    found = table()
    for key in KEYS:
        half = rho(*halves[key])
        assert found.loc[("reliability", *key, *key), "correlation"] == pytest.approx(2 * half / (1 + half))
    mean = np.mean([halves[task, 0] for task in TASKS], axis=0)
    assert found.loc[("reliability", "mean", 0, "mean", 0), "correlation"] == pytest.approx(
        2 * rho(*mean) / (1 + rho(*mean)))
    one = found.loc[("tasks", "red", 0, "green", 0)]
    red, green = (found.loc[("reliability", t, 0, t, 0), "correlation"] for t in ("red", "green"))
    assert one["ceiling"] == pytest.approx(np.sqrt(red * green))
    a, b = halves["red", 0], halves["green", 0]
    expected = (rho(a[0], b[1]) + rho(a[1], b[0])) / 2 / np.sqrt(rho(*a) * rho(*b))
    assert one["disattenuated"] == pytest.approx(expected)
    assert one["disattenuated"] > one["correlation"]


def test_intervals_are_centred_and_as_wide_as_replicates_spread() -> None:
    scores, resampled, _ = world()
    found = table()
    for a, b, kind in ((("red", 0), ("green", 0), "tasks"), (("red", 0), ("red", 5), "shots")):
        row = found.loc[(kind, *a, *b)]
        z = [np.arctanh(rho(x, y)) for x, y in zip(resampled[a], resampled[b], strict=True)]
        centre = np.arctanh(rho(scores[a], scores[b]))
        expected = np.tanh(centre + np.array([-1, 1]) * 1.959964 * np.std(z, ddof=1))
        np.testing.assert_allclose([row["low"], row["high"]], expected, rtol=1e-6)


def test_a_random_order_stands_beside_every_row_with_the_band_of_random_orders() -> None:
    scores, _, _ = world()
    found = table()
    places = np.argsort(random_order(HEADS, 3))
    for task, k in KEYS:
        for row in (found.loc[("tasks", task, k, "random", k)], found.loc[("shots", task, k, "random", -1)],
                    found.loc[("tasks", "random", k, task, k)]):
            assert row["correlation"] == pytest.approx(rho(scores[task, k], places))
            assert row["high"] == -row["low"] == pytest.approx(1.959964 / np.sqrt(HEADS - 1))
    rng = np.random.default_rng(0)
    inside = [abs(rho(places, rng.permutation(HEADS))) <= row["high"] for _ in range(1000)]
    assert 0.93 < np.mean(inside) < 0.97
    for name in ("mean", "mean of ranks"):
        assert ("tasks", name, 5, "random", 5) in found.index
        assert ("shots", name, 5, "random", -1) in found.index


def test_both_kinds_of_matrix_are_one_pivot_without_holes() -> None:
    found = correlations(*world())
    names = {*TASKS, "mean", "mean of ranks", "random"}
    at = found[(found["num_fewshot"] == 5) & (found["other_shots"] == 5)]
    square = at.pivot_table(index="task", columns="other_task", values="correlation")
    assert set(square.index) == set(square.columns) == names
    assert square.notna().all(axis=None)
    np.testing.assert_allclose(square, square.T)
    of = found[found["task"].isin(["red", "random"]) & found["other_task"].isin(["red", "random"])
               & ((found["kind"] == "shots") | ((found["kind"] == "reliability")
                                                & ((found["task"] == "red") | (found["num_fewshot"] == -1))))]
    square = of.pivot_table(index="num_fewshot", columns="other_shots", values="correlation")
    assert square.shape == (3, 3)
    assert square.notna().all(axis=None)


def test_what_the_papers_code_correlates_says_nothing_of_nearly_equal_scores() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=4608)
    scores = {("red", 0): x, ("green", 0): x + 0.05 * rng.normal(size=4608)}
    row = correlations(scores).query("kind == 'tasks' and task == 'red' and other_task == 'green'").iloc[0]
    assert row["correlation"] > 0.99
    assert abs(row["argsort_correlation"]) < 0.1
    slow = spearmanr(np.argsort(scores["red", 0], kind="stable"), np.argsort(scores["green", 0], kind="stable"))
    assert row["argsort_correlation"] == pytest.approx(slow.statistic)
    assert np.isnan(row["low"])
    assert np.isnan(row["ceiling"]), "nothing is known of noise"


def test_components_that_one_task_lacks_are_left_out_of_all() -> None:
    scores, resampled, halves = world()
    kept = np.arange(HEADS) % 3 > 0
    holes = {key: values.copy() for key, values in scores.items()}
    holes["red", 0][~kept] = np.nan
    expected = correlations({key: values[kept] for key, values in scores.items()},
                                      {key: values[:, kept] for key, values in resampled.items()},
                                      {key: values[:, kept] for key, values in halves.items()})
    pd.testing.assert_frame_equal(correlations(holes, resampled, halves), expected)


def test_little_or_nothing_is_no_error() -> None:
    assert correlations({}).empty
    assert correlations({("red", 0): np.arange(2.0), ("green", 0): np.arange(2.0)}).empty
    alone = correlations({("red", 0): np.arange(9.0)})
    assert set(alone["kind"]) == {"tasks", "reliability"}
    assert set(alone["other_task"]) == {"red", "random"}
    flat = correlations({("red", 0): np.zeros(9), ("green", 0): np.arange(9.0)})
    assert np.isnan(flat.set_index(["task", "other_task"]).loc[("red", "green"), "correlation"])
    with pytest.raises(OptionError, match="one length, not 4, 5"):
        correlations({("red", 0): np.arange(5.0), ("green", 0): np.arange(4.0)})


LAYERS = np.repeat(np.arange(8), 5)


def without_layers(scores: np.ndarray) -> np.ndarray:
    """Ranks less their layer's mean, one by one."""
    placed = rankdata(scores)
    return np.array([rank - placed[layer == LAYERS].mean() for rank, layer in zip(placed, LAYERS, strict=True)])


def in_layers(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(without_layers(x), without_layers(y))[0, 1])


def test_correlations_have_companions_without_depth() -> None:
    scores, resampled, halves = world()
    keys = ["kind", "task", "num_fewshot", "other_task", "other_shots"]
    found = correlations(scores, resampled, halves, layers=LAYERS.tolist(), seed=3)
    pd.testing.assert_frame_equal(found.set_index(keys).sort_index()[["correlation", "low", "high", "ceiling"]],
                                  table()[["correlation", "low", "high", "ceiling"]])
    found = found.set_index(keys).sort_index()
    rng = np.random.default_rng(0)
    for a, b, kind in ((("red", 0), ("green", 0), "tasks"), (("blue", 0), ("blue", 5), "shots")):
        row, x, y = found.loc[(kind, *a, *b)], scores[a], scores[b]
        assert row["correlation_in_layers"] == pytest.approx(in_layers(x, y))
        z = [np.arctanh(in_layers(one, other)) for one, other in zip(resampled[a], resampled[b], strict=True)]
        expected = np.tanh(np.arctanh(in_layers(x, y)) + np.array([-1, 1]) * 1.959964 * np.std(z, ddof=1))
        np.testing.assert_allclose([row["in_layers_low"], row["in_layers_high"]], expected, rtol=1e-6)
        # By layers alone: heads of a layer change places with one another.
        shuffled = [rho(x, y[np.lexsort([rng.random(HEADS), LAYERS])]) for _ in range(2000)]
        assert row["correlation_layers_alone"] == pytest.approx(np.mean(shuffled), abs=0.01)
    half = in_layers(*halves["red", 5])
    own = found.loc[("reliability", "red", 5, "red", 5)]
    assert own["correlation_in_layers"] == pytest.approx(2 * half / (1 + half))
    random = found.loc[("tasks", "red", 0, "random", 0)]
    places = np.argsort(random_order(HEADS, 3))
    assert random["correlation_in_layers"] == pytest.approx(in_layers(scores["red", 0], places))
    inside = [abs(in_layers(scores["red", 0], rng.permutation(HEADS))) <= random["in_layers_high"]
              for _ in range(1000)]
    assert 0.93 < np.mean(inside) < 0.975


def test_what_is_only_depth_is_told_apart_from_what_is_not() -> None:
    rng = np.random.default_rng(1)
    layers = np.repeat(np.arange(30), 9)
    for trend, own, expected in ((1.0, 0.0, (0, 0.9)), (0.0, 1.0, (0.9, 0))):
        depth, heads = trend * rng.normal(size=30)[layers], own * rng.normal(size=270)
        scores = {(task, 0): np.exp(depth + heads + 0.25 * rng.normal(size=270)) for task in ("red", "green")}
        row = correlations(scores, layers=layers.tolist()).query("task == 'red' and other_task == 'green'")
        assert row["correlation"].iloc[0] > 0.8
        assert row[["correlation_in_layers", "correlation_layers_alone"]].iloc[0].tolist() == pytest.approx(
            expected, abs=0.16)
    assert ranks.between_layers(np.exp(layers.astype(float)), layers) == pytest.approx(1)
    noise = [ranks.between_layers(np.exp(rng.normal(size=270)), layers) for _ in range(200)]
    assert np.mean(noise) == pytest.approx(29 / 269, abs=0.01)
    x = rng.random(270)
    means = np.array([np.log(x)[layers == layer].mean() for layer in layers])
    assert ranks.between_layers(x, layers) == pytest.approx(means.var() / np.log(x).var())
    assert np.isnan(ranks.between_layers(x - 0.5, layers)), "no logarithm"
    assert np.isnan(ranks.between_layers(x, np.arange(270))), "one head a layer"
    assert np.isnan(ranks.between_layers(x[:0], layers[:0]))


def test_where_layers_say_nothing_there_are_no_companions() -> None:
    companions = ["correlation_in_layers", "in_layers_low", "in_layers_high", "correlation_layers_alone"]
    for layers in (None, list(range(HEADS)), [0] * HEADS):
        assert correlations(*world(), layers=layers)[companions].isna().all(axis=None)
    flat = {("red", 0): LAYERS.astype(float), ("green", 0): np.arange(HEADS)[::-1] // 5 + 0.1}
    row = correlations(flat, layers=LAYERS.tolist()).query("task == 'red' and other_task == 'green'").iloc[0]
    assert np.isnan(row["correlation_in_layers"]), "no bits of rounding are correlated"
    assert row["correlation_layers_alone"] == pytest.approx(-1)
    holes = {key: np.where(np.arange(HEADS) % 3 > 0, values, np.nan) for key, values in world()[0].items()}
    kept = np.arange(HEADS) % 3 > 0
    expected = correlations({key: values[kept] for key, values in holes.items()},
                                      layers=LAYERS[kept].tolist())
    pd.testing.assert_frame_equal(correlations(holes, layers=LAYERS.tolist()), expected)


# How alike the tasks are, how noisy documents are, and whether both scores are of the same documents.
@pytest.mark.parametrize(("alike", "noise", "shared"), [(0.7, 1.0, False), (0.95, 1.8, False), (0.9, 1.0, True),
                                                        (1.0, 1.0, False)])
def test_intervals_within_layers_cover_what_another_study_finds_on_average(
    alike: float, noise: float, shared: bool
) -> None:
    rng = np.random.default_rng(0)
    layers, documents, trials = np.repeat(np.arange(20), 6), 100, 100
    z = rng.normal(size=(2, 120))
    z[1] = alike * z[0] + np.sqrt(1 - alike**2) * z[1]
    z += 2 * np.sin(np.linspace(0, 3, 20))[layers]

    def study() -> np.ndarray:
        scale = np.exp(0.5 * rng.normal(size=(1 if shared else 2, documents, 1)))
        common = noise * rng.normal(size=(1, documents, 120)) if shared else 0.0
        own = (0.5 if shared else 1) * noise * rng.normal(size=(2, documents, 120))
        return np.asarray(scale * np.exp(0.8 * z[:, None] + common + own))

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return pearson(*(ranks.within_layers(ranks.ranks(values), layers) for values in (x, y)))

    expected = np.mean([inside(*study().mean(axis=1)[:, None])[0] for _ in range(300)])
    covered = beyond = 0
    for _ in range(trials):
        scores = study()
        draws = rng.multinomial(documents, np.full(documents, 1 / documents), (2, 200))
        if shared:
            draws[1] = draws[0]
        means = [draw @ of_one / documents for draw, of_one in zip(draws, scores, strict=True)]
        low, high = ranks.document_interval(float(inside(*scores.mean(axis=1)[:, None])[0]), inside(*means), 101)
        covered += low <= expected <= high
        whole = pearson(ranks.ranks(means[0]), ranks.ranks(means[1]))
        _, high = ranks.document_interval(ranks.spearman(*scores.mean(axis=1)), whole, 120)
        own = [ranks.reliability(ranks.spearman(one[::2].mean(axis=0), one[1::2].mean(axis=0))) for one in scores]
        beyond += high < ranks.ceiling(*own)
    assert 0.84 <= covered / trials <= 0.99
    if alike == 1:
        assert 0.04 < beyond / trials < 0.25, "noise alone puts more than one interval in forty below the ceiling"


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_reliability_is_what_a_score_would_correlate_with_itself(noise: float) -> None:
    rng = np.random.default_rng(0)
    truth, documents, found, again = rng.normal(size=300), 50, [], []
    for _ in range(40):
        one, other = truth + np.sqrt(documents) * noise * rng.normal(size=(2, documents, 300))
        found.append(ranks.score_reliability(one.mean(axis=0), one.std(axis=0, ddof=1) / np.sqrt(documents)))
        again.append(np.corrcoef(one.mean(axis=0), other.mean(axis=0))[0, 1])
    assert np.mean(found) == pytest.approx(np.mean(again), abs=0.02)
    assert np.mean(found) == pytest.approx(1 / (1 + noise**2), abs=0.05)


def test_reliability_is_a_share_or_not_known() -> None:
    scores, errors = np.array([1.0, 2.0, 3.0, 6.0]), np.array([0.5, 0.5, 1.0, 1.0])
    assert ranks.score_reliability(scores, errors) == pytest.approx(1 - 0.625 / (14 / 3))
    assert ranks.score_reliability(scores, 9 * errors) == 0, "not below nothing"
    assert ranks.score_reliability(np.ones(4), np.zeros(4)) == 0, "no order at all"
    unknown = np.array([1, 1, 1, np.nan])
    assert np.isnan(ranks.score_reliability(scores, unknown))
    assert np.isnan(ranks.score_reliability(unknown, errors))
    assert np.isnan(ranks.score_reliability(np.ones(1), np.ones(1)))
