"""Likeness of importance beside what another task's order costs: the pairs, Mantel's test, and what is said of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from headcount.analysis.prediction import PREDICTION, predicted, prediction
from headcount.report.page import write_report
from headcount.report.prediction import prediction_sentence
from headcount.stats.ranks import mantel
from test_task_names import PLAIN, study_of


def pairs(tasks: int, cost: Callable[[float, float], float], seed: int = 0) -> pd.DataFrame:
    """Every pair of tasks, with what `cost` makes of the correlation, and noise."""
    rng, names = np.random.default_rng(seed), [f"t{i}" for i in range(tasks)]
    alike = {frozenset(pair): rng.uniform(0.2, 0.9) for pair in itertools.combinations(names, 2)}
    rows = [{"component": "head", "num_fewshot": 5, "task": a, "donor": b, "fraction": 0.5,
             "correlation": alike[frozenset((a, b))], "cost": cost(alike[frozenset((a, b))], rng.normal())}
            for a, b in itertools.permutations(names, 2)]
    table = pd.DataFrame(rows)
    return PREDICTION.frame(table.assign(lost=table["cost"] + 0.1, low=0.0, high=1.0, cost_low=table["cost"] - 0.1,
                                         cost_high=table["cost"] + 0.1))


@pytest.mark.parametrize("n", [4, 5])
def test_mantel_tries_all_permutations(n: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.random((2, n, n))
    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    rho, p = mantel(x, y)
    expected = spearmanr([x[c] for c in off], [y[c] for c in off]).statistic
    assert rho == pytest.approx(expected)
    far = [abs(spearmanr([x[c] for c in off], [y[o[i], o[j]] for i, j in off]).statistic) >= abs(expected) - 1e-12
           for o in itertools.permutations(range(n))]
    assert p == pytest.approx(np.mean(far))


def test_mantel_holds_its_level_where_rows_differ_by_themselves() -> None:
    """Tasks that lose much by any order make no likeness: pairs of a row go together, and p must not forget it."""
    rng = np.random.default_rng(1)
    small = 0
    for _ in range(200):
        alike = rng.random((9, 9))
        losses = rng.normal(size=(9, 1)) + 0.2 * rng.normal(size=(9, 9))
        small += mantel((alike + alike.T) / 2, losses, permutations=200)[1] < 0.05
    assert small / 200 < 0.1


@pytest.mark.parametrize("lacking", [np.array([[0, 1.0], [1, 0]]), np.full((4, 4), 0.5),
                                     np.where(np.arange(16).reshape(4, 4) == 1, np.nan, 0.5)])
def test_mantel_says_nothing_where_there_is_nothing(lacking: np.ndarray) -> None:
    assert np.isnan(mantel(lacking, lacking)).all()
    three = np.arange(9.0).reshape(3, 3)
    assert mantel(three, three)[0] == pytest.approx(1)
    assert np.isnan(mantel(three, three)[1])


def test_a_planted_link_is_told_and_its_absence_too() -> None:
    linked = pairs(6, lambda alike, noise: -0.3 * alike + 0.01 * noise)
    assert predicted(linked, "cost").correlation < -0.9
    assert predicted(linked, "cost").p < 0.01
    said = prediction_sentence(linked, "head")
    assert said.startswith("With 5 shots and 50 % of the heads removed by another task's order, how alike the two "
                           "tasks rank the heads correlates (Spearman, over pairs of 6 tasks) at \N{MINUS SIGN}0.9")
    assert said.endswith("the more alike two tasks rank them, the less one loses by the other's order.")
    loose = prediction_sentence(pairs(6, lambda alike, noise: 0.1 * noise), "head")
    assert loose.endswith("similarity is not shown to predict what another task's order costs.")
    assert prediction_sentence(pairs(3, lambda alike, noise: noise), "head").endswith("too few for a test.")
    assert prediction_sentence(linked, "ffn") == ""
    assert "nothing can be said" in prediction_sentence(linked.iloc[:-1], "head")


def test_pairs_are_those_of_transfer_and_correlations(tmp_path: Path) -> None:
    study = study_of(tmp_path, PLAIN[:4])
    transfer, correlations = study.transfer(), study.correlations()
    table = prediction(transfer, correlations)
    assert table.columns.tolist() == PREDICTION.names
    assert len(table) == 4 * 3 * 2 * 2, "ordered pairs, numbers of shots, fractions"
    for row in table.to_dict("records"):
        of_task = transfer[(transfer["task"] == row["task"]) & (transfer["num_fewshot"] == row["num_fewshot"])]
        (pruned,) = of_task[(of_task["donor"] == row["donor"]) & (of_task["fraction"] == row["fraction"])].to_dict(
            "records")
        (full,) = of_task[of_task["donor_scope"] == "none"].to_dict("records")
        assert row["lost"] == full["accuracy"] - pruned["accuracy"]
        assert (row["cost"], row["cost_low"], row["cost_high"]) == (
            -pruned["difference"], -pruned["difference_high"], -pruned["difference_low"])
        (alike,) = correlations[(correlations["component"] == "head") & (correlations["kind"] == "tasks")
                                & (correlations["num_fewshot"] == row["num_fewshot"])
                                & (correlations["task"] == row["task"]) & (correlations["other_task"] == row["donor"])
                                ].to_dict("records")
        assert (row["correlation"], row["component"]) == (alike["correlation"], "head")
    page = write_report(study, pictures=False).read_text(encoding="utf-8")
    assert "Do tasks that rank alike lose less by each other&#39;s order? (heads)" in page
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tables" / "prediction.csv"), table, check_dtype=False)
