"""Sets of the most important components: counted one by one, planted, and with intervals over documents that cover."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from headcount.analysis.importance import THIRDS, aggregate_table, depth
from headcount.analysis.induction import induction_among_important, retained
from headcount.analysis.rows import Scoped, labelled, of_task
from headcount.analysis.scores import placed, with_aggregate
from headcount.analysis.scores import places as places_of
from headcount.analysis.top_sets import top_overlaps, top_sets
from headcount.errors import OptionError
from headcount.masks import removal_order
from headcount.stats import ranks
from headcount.stats.resampling import around

MEAN, MEAN_OF_RANKS = Scoped("mean"), Scoped("mean of ranks")
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
    found, pairs = top_sets(scores, [fraction]), top_overlaps(scores, None, [fraction])
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
    found = top_sets(scores, (0.05, 0.1, 0.3, 1.0)).set_index("fraction")
    assert found.index.tolist() == [0.1, 0.3, 1.0], "a top set of no component says nothing"
    assert found["common"].tolist() == [0, 2, 10]
    assert found["low"].isna().all(), "nothing is known of documents"


@pytest.mark.parametrize("aggregate", ["mean", "ranks"])
def test_tasks_and_their_aggregate_are_held_against_other_scores(aggregate: str) -> None:
    other = np.random.default_rng(3).random(60)
    found = top_overlaps(SCORES, {"prefix_matching": other}, (0.2,), resampled=RESAMPLED, aggregate=aggregate)
    beside = labelled(found[found["other_scope"] == "prefix_matching"]).set_index(["task", "num_fewshot"])
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
    pair = found[(found["task"] == "red") & (found["other_task"] == "green") & (found["num_fewshot"] == 5)].iloc[0]
    counts = [len(top(a, 12) & top(b, 12)) for a, b in zip(RESAMPLED["red", 5], RESAMPLED["green", 5], strict=True)]
    assert pair["high"] - pair["common"] == pytest.approx(1.959964 * np.std(counts, ddof=1))
    shared = top_sets(SCORES, (0.2,), resampled=RESAMPLED).set_index("num_fewshot").loc[5]
    every = [len(top(a, 12) & top(b, 12) & top(c, 12)) / 12 for a, b, c in zip(
        *(RESAMPLED[task, 5] for task in ("red", "green", "blue")), strict=True)]
    assert shared["high"] - shared["share"] == pytest.approx(1.959964 * np.std(every, ddof=1))


def test_sets_in_the_same_layers_have_more_in_common_by_chance() -> None:
    """Both sets lie in the first of two layers: within layers what they share is just what chance gives."""
    layers = [0] * 20 + [1] * 20
    scores = {("red", 0): np.concatenate([np.tile([4.0, 3], 10), np.tile([2.0, 1], 10)]) + 0.001 * np.arange(40)}
    other = np.concatenate([np.tile([4.0, 4, 3, 3], 5), np.tile([2.0, 2, 1, 1], 5)]) + 0.001 * np.arange(40)
    row = top_overlaps(scores, {"copying": other}, (0.25,), layers=layers).iloc[0]
    assert row[["common", "expected", "expected_in_layers"]].tolist() == pytest.approx([5, 2.5, 5])
    assert row["p"] < 0.1
    assert min(row["p_in_layers"], row["p_fewer_in_layers"]) > 0.5
    flags = other >= np.sort(other)[30]
    among = induction_among_important(scores, flags, (0.25,), layers=layers).iloc[0]
    columns = ["common", "expected", "p", "p_fewer", "expected_in_layers", "p_in_layers", "p_fewer_in_layers"]
    assert among[columns].tolist() == pytest.approx(row[columns].tolist())
    assert top_overlaps(scores, {"copying": other}, (0.25,))["p_in_layers"].isna().all()
    lacking = {("red", 0): np.where(np.arange(40) == 39, np.nan, scores["red", 0])}
    row = top_overlaps(lacking, {"copying": other}, (0.25,), layers=layers).iloc[0]
    assert row["expected_in_layers"] == pytest.approx(9 * 9 / 20)


def test_what_all_tasks_share_by_layers_alone_is_that_of_shuffled_layers() -> None:
    rng = np.random.default_rng(5)
    layers = np.repeat(np.arange(6), 10)
    scores = {(task, 5): layers % 3 + rng.random(60) for task in ("red", "green", "blue")}
    row = top_sets(scores, (0.2,), layers=layers.tolist()).iloc[0]
    common, pairs = [], []
    for _ in range(1500):
        moved = [values[np.lexsort([rng.random(60), layers])] for values in scores.values()]
        sets = [top(values, 12) for values in moved]
        common.append(len(set.intersection(*sets)))
        pairs += [len(a & b) / 12 for a, b in itertools.combinations(sets, 2)]
    assert row["expected_in_layers"] == pytest.approx(np.mean(common), abs=0.1)
    assert row["pair_share_in_layers"] == pytest.approx(np.mean(pairs), abs=0.01)
    assert row["expected_in_layers"] > 2 * row["expected"], "they lie in the same layers"
    assert top_sets(scores, (0.2,))[["expected_in_layers", "pair_share_in_layers"]].isna().all(axis=None)
    lacking = {**scores, ("red", 5): np.where(np.arange(60) == 59, np.nan, scores["red", 5])}
    kept = {key: values[:59] for key, values in scores.items()}
    pd.testing.assert_frame_equal(top_sets(lacking, layers=layers.tolist()),
                                  top_sets(kept, layers=layers[:59].tolist()))


def test_depth_says_how_much_of_importance_lies_between_layers() -> None:
    rng = np.random.default_rng(6)
    layers = np.repeat(np.arange(6), 10)
    scores = {(task, 5): np.exp(layers + rng.normal(size=60)) for task in ("red", "green")}
    found = labelled(depth(scores, layers.tolist())).set_index(["task", "third"])
    for task, values in (("red", scores["red", 5]), ("mean", (scores["red", 5] + scores["green", 5]) / 2)):
        means = [np.log(values)[layers == layer].mean() for layer in layers]
        assert found.loc[task, "between_layers"].tolist() == pytest.approx([np.var(means) / np.var(np.log(values))] * 3)
    assert set(found["between_layers_by_chance"]) == {5 / 59}
    assert depth({("red", 5): -scores["red", 5]}, layers.tolist())["between_layers"].isna().all()


def test_thirds_are_alike_at_both_ends() -> None:
    def sizes(layers: int, **of: int) -> list[int]:
        found = depth({("red", 0): np.arange(float(layers))}, range(layers), **of)
        return [round(share * layers) for share in found["expected"]]

    assert [sizes(n) for n in (2, 3, 4, 5, 30, 32)] == [[1, 1], [1, 1, 1], [1, 2, 1], [2, 1, 2], [10] * 3, [11, 10, 11]]
    assert sizes(2, num_layers=6) == [2], "layers without heads are layers too"


def test_depth_counts_thirds_of_the_layers() -> None:
    layers = [layer for layer in range(6) for _ in range(10)]
    middle = np.where(np.isin(layers, [2, 3]), 1.0, 0.1) + 0.001 * np.arange(60)
    scores = {(task, 5): middle for task in ("red", "green")}
    found = labelled(depth(scores, layers)).set_index(["task", "third"])
    assert set(found.index) == {(t, third) for t in ("red", "green", "mean") for third in THIRDS}
    assert found["share"].tolist() == [0, 1, 0] * 3
    assert set(found["important"]) == {12}
    assert found["expected"].tolist() == pytest.approx([1 / 3] * 9)
    drawn = depth(SCORES, layers, resampled=RESAMPLED).set_index(["task", "num_fewshot", "third"])
    early = [sum(layers[i] < 2 for i in top(values, 12)) / 12 for values in RESAMPLED["red", 5]]
    row = drawn.loc[("red", 5, "early")]
    assert row["share"] == sum(layers[i] < 2 for i in top(SCORES["red", 5], 12)) / 12
    assert row["high"] == pytest.approx(min(1, row["share"] + 1.959964 * np.std(early, ddof=1)))


def test_ties_go_by_the_next_score_in_every_draw() -> None:
    scores, ties = np.array([[1.0, 1, 0, 0], [2, 2, 1, 1]]), np.array([[1.0, 2, 2, 1], [2, 1, 1, 2]])
    np.testing.assert_array_equal(placed(scores, ties), [[2, 3, 1, 0], [3, 2, 0, 1]])
    np.testing.assert_array_equal(placed(scores), [[2, 3, 0, 1], [2, 3, 0, 1]])


def test_aggregates_are_means_of_scores_and_of_places() -> None:
    scores = {("red", 0): np.array([10.0, 30.0, 20.0, 20.0]), ("green", 0): np.array([0.4, 0.3, 0.2, 0.1]),
              ("red", 5): np.zeros(4)}
    found, draws = with_aggregate(scores)
    assert set(found) == {*((of_task(task), k) for task, k in scores), (MEAN, 0)}, "one task has no aggregate"
    assert draws == {}
    np.testing.assert_allclose(found[MEAN, 0], [5.2, 15.15, 10.1, 10.05])
    found, _ = with_aggregate(scores, aggregate="ranks")
    np.testing.assert_allclose(found[MEAN_OF_RANKS, 0], [(0 + 3) / 2, (3 + 2) / 2, (1 + 1) / 2, (2 + 0) / 2])
    found, _ = with_aggregate({**scores, ("red", 5): np.array([1, 2, 3, np.nan])}, aggregate="ranks")
    np.testing.assert_allclose(found[MEAN_OF_RANKS, 0], [1, 1.5, 0.5, np.nan], err_msg="of what all have scored")


@pytest.mark.parametrize("aggregate", ["mean", "ranks"])
def test_an_aggregate_has_draws_where_all_its_tasks_have(aggregate: str) -> None:
    some = {key: values for key, values in RESAMPLED.items() if key != ("blue", 5)}
    name = MEAN if aggregate == "mean" else MEAN_OF_RANKS
    _, draws = with_aggregate(SCORES, some, aggregate)
    assert (name, 0) in draws
    assert (name, 5) not in draws
    own = [RESAMPLED[task, 0][7] for task in ("red", "green", "blue")]
    own = own if aggregate == "mean" else [np.argsort(np.argsort(values)) for values in own]
    np.testing.assert_allclose(draws[name, 0][7], np.mean(own, axis=0))


def test_little_or_nothing_is_no_error() -> None:
    assert top_sets({}).empty
    assert top_overlaps({}).empty
    assert depth({}, []).empty
    assert top_overlaps({("red", 0): np.arange(9.0)}).empty
    holes = {("red", 0): np.array([np.nan, 1, 2, 3, 4]), ("green", 0): np.array([9.0, 1, 2, 3, 4])}
    assert top_sets(holes, [0.5])["size"].tolist() == [2], "of the four that both have scored"
    with pytest.raises(OptionError, match="one length, not 4, 5"):
        top_overlaps({("red", 0): np.arange(5.0)}, {"prefix_matching": np.arange(4.0)})
    with pytest.raises(OptionError, match="between 0 and 1"):
        top_sets({("red", 0): np.arange(5.0), ("green", 0): np.arange(5.0)}, [30])


def simulated(
    noise: float, studies: int, heads: int = 90, documents: int = 60
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What studies of the same two tasks find, with the bounds that each of them gives; and every head's rank."""
    rng = np.random.default_rng(0)
    truth, layers = np.exp(0.5 * rng.normal(size=heads)), np.repeat(np.arange(30), 3).tolist()
    truths = {("red", 0): truth, ("green", 0): truth * np.exp(0.3 * rng.normal(size=heads))}
    primitive = np.where(rng.random(heads) < 0.1, 1.0, 0.05) * rng.random(heads)
    found: dict[str, list[tuple[float, float, float]]] = {
        name: [] for name in ("depth", "retained", "pair", "prefix_matching", "among")}
    of_heads = []
    for _ in range(studies):
        scores, resampled = {}, {}
        for key, truth_of_task in truths.items():
            drawn = truth_of_task * np.exp(noise * rng.normal(size=(documents, heads)))
            counts = rng.multinomial(documents, np.full(documents, 1 / documents), 100)
            scores[key], resampled[key] = drawn.mean(axis=0), counts @ drawn / documents
        rows = {"depth": depth(scores, layers, resampled=resampled), "retained": retained(
            scores, {"p": primitive}, [0.5], resampled=resampled, draws=2), "pair": top_overlaps(
            scores, None, [0.2], resampled=resampled), "prefix_matching": top_overlaps(
            scores, {"prefix_matching": primitive}, [0.2], resampled=resampled).query(
            "other_scope == 'prefix_matching'"),
            "among": induction_among_important(scores, primitive > 0.1, [0.2], resampled=resampled)}
        places = heads - places_of(scores, resampled)["red", 0]
        of_heads.append((places[0], *around(places[0].astype(float), places[1:].astype(float))))
        for name, table in rows.items():
            row = table[table["task"] == "red"].iloc[0]
            value = row[{"depth": "share", "retained": "retained"}.get(name, "common")]
            found[name].append((value, row["low"], row["high"]))
    return {name: np.array(values) for name, values in found.items()}, np.array(of_heads)


@pytest.mark.parametrize(("noise", "least"), [(0.8, 0.88), (2.0, 0.78)])
def test_intervals_of_sets_cover_what_other_documents_give(noise: float, least: float) -> None:
    """Of simulated studies, as many as are promised hold what is found on average; and none is far too wide."""
    sets, places = simulated(noise, 80)
    for name, found in sets.items():
        value, low, high = found.T
        covered = np.mean((low <= value.mean()) & (value.mean() <= high))
        assert least <= covered <= 1.0, name
        assert np.mean(high - low) < 1.35 * 2 * 1.96 * value.std(ddof=1), name
    value, low, high = places.transpose(1, 0, 2)
    covered = (low <= value.mean(axis=0)) & (value.mean(axis=0) <= high)
    first = np.mean(covered[value <= 5])
    assert 0.72 <= covered.mean() <= 0.94, "why intervals of ranks are not such ones"
    assert 0.5 <= first < covered.mean(), "those chosen by their rank even less"


def possible(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether all ranks can lie in their ranges at once: each rank in turn goes to the range that ends first."""
    waiting = sorted(zip(low, high, strict=True))
    for rank in range(1, len(low) + 1):
        open_ = [one for one in waiting if one[0] <= rank]
        if not open_ or min(open_, key=lambda one: one[1])[1] < rank:
            return False
        waiting.remove(min(open_, key=lambda one: one[1]))
    return True


@given(st.integers(1, 12), st.integers(2, 9), st.integers(0, 1000), st.booleans())
def test_ranges_of_ranks_hold_the_ranks_and_are_possible_at_once(n: int, draws: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, n).astype(float) if ties else rng.normal(size=n)
    resampled = scores + rng.exponential(1, n) * (rng.integers(-1, 2, (draws, n)) if ties else rng.normal(
        size=(draws, n)))
    measured = n - placed(scores[None])[0]
    low, high = ranks.rank_intervals(scores, resampled, measured)
    assert ((low >= 1) & (low <= measured) & (measured <= high) & (high <= n)).all()
    assert possible(low, high)
    for i in range(n):
        above = below = 0
        for j in range(n):
            reach = 1.959964 * np.std(resampled[:, i] - resampled[:, j], ddof=1)
            # On the edge itself the last bits decide.
            if abs(abs(scores[i] - scores[j]) - reach) < 1e-6 and i != j:
                return
            above += scores[j] - scores[i] > reach
            below += scores[i] - scores[j] > reach
        assert (low[i], high[i]) == (1 + above, n - below)


def test_impossible_ranges_are_found_out() -> None:
    assert not possible(np.array([2, 4, 4, 1, 1]), np.array([4, 4, 4, 1, 3])), "two of them cannot be fourth"
    assert possible(np.array([1, 1, 3]), np.array([2, 2, 3]))
    assert np.isnan(ranks.rank_intervals(np.arange(3.0), np.ones((1, 3)), np.array([3, 2, 1]))).all()


# How far heads differ, how noisy documents are, and whether some documents weigh more on all heads.
@pytest.mark.parametrize(("spread", "noise", "common", "documents"), [
    (0.5, 0.8, 0.0, 60), (0.5, 2.0, 0.0, 60), (0.05, 0.8, 0.0, 60), (1.0, 1.0, 0.5, 60), (0.8, 0.8, 0.3, 20)])
@pytest.mark.parametrize("tasks", [1, 4])
def test_ranges_of_ranks_cover_the_true_ranks(
    spread: float, noise: float, common: float, documents: int, tasks: int
) -> None:
    """Of all heads, and of the five that rank highest, which were chosen by the same documents."""
    rng = np.random.default_rng(0)
    heads, studies = 90, 60
    truth = np.exp(spread * (rng.normal(size=heads) + 0.5 * rng.normal(size=(tasks, heads))))
    ranked = heads - placed(truth.mean(axis=0)[None])[0]
    covered, first = [], []
    for _ in range(studies):
        scores, resampled = np.zeros(heads), np.zeros((200, heads))
        for truth_of_task in truth:
            drawn = truth_of_task * np.exp(noise * rng.normal(size=(documents, heads))
                                     + common * rng.normal(size=(documents, 1)))
            scores += drawn.mean(axis=0) / tasks
            resampled += rng.multinomial(documents, np.full(documents, 1 / documents), 200) @ drawn / documents / tasks
        measured = heads - placed(scores[None])[0]
        low, high = ranks.rank_intervals(scores, resampled, measured)
        covered.append((low <= ranked) & (ranked <= high))
        first.append(covered[-1][measured <= 5].mean())
    assert np.mean(covered) >= 0.95
    assert np.mean(first) >= 0.925


def test_tasks_that_have_no_component_in_common_have_no_sets() -> None:
    apart = {("red", 0): np.array([1.0, 2, np.nan, np.nan]), ("green", 0): np.array([np.nan, np.nan, 1.0, 2])}
    assert top_sets(apart).empty
    assert top_overlaps(apart).empty
    rows = pd.DataFrame({"task": ["red", "red", "green", "green"], "num_fewshot": 0, "component": "head", "layer": 0,
                         "head": pd.array([0, 1, 2, 3], "Int64"), "method": "oracle", "score": "accuracy",
                         "importance": [0.1, 0.2, 0.3, 0.4], "stderr": 0.1})
    assert aggregate_table(rows, {"head": "position", "ffn": "accuracy"}, {}).empty
    known = aggregate_table(rows.assign(head=pd.array([0, 1, 1, 2], "Int64")), {"head": "position", "ffn": ""}, {})
    told = known[["scope", "task", "head", "rank"]]
    assert told.to_numpy().tolist() == [["mean", "", 1, 1], ["mean of ranks", "", 1, 1]]
    assert known.loc[0, "importance"] == pytest.approx(0.25)
