"""A study's tables against planted numbers and slow loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

import synthetic_study as synthetic
from headcount.analysis.importance import mean_importance
from headcount.analysis.points import Points, finished
from headcount.analysis.rows import labelled
from headcount.analysis.study import open_study
from headcount.errors import StudyError
from headcount.report.cautions import cautions
from headcount.report.headline import headline
from headcount.report.importance import ranking
from headcount.report.page import sections, tables, write_report
from headcount.study.ledger import Ledger, job_id


def pick(table: pd.DataFrame, **values: object) -> pd.DataFrame:
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def test_curves_are_what_was_planted(tmp_path: Path) -> None:
    curves = labelled(open_study(synthetic.write(tmp_path)).curves())
    for task in (*synthetic.TASKS, "mean"):
        for (component, order), right in synthetic.RIGHT.items():
            curve = pick(curves, task=task, num_fewshot=5, component=component, order=order)
            assert curve["fraction"].tolist() == [0.0, *synthetic.FRACTIONS]
            np.testing.assert_allclose(curve["accuracy"], np.array(right) / 100)
            np.testing.assert_allclose(curve["difference"], np.array(right) / 100 - 0.8)
            assert (curve["low"] <= curve["accuracy"]).all()
            assert (curve["high"] >= curve["accuracy"]).all()
            assert curve["changed"].tolist() == [(80 - n) * (2 if task == "mean" else 1) for n in right]
            assert (curve["documents"] == (200 if task == "mean" else 100)).all()
            n, size = (24, 100) if component == "head" else (6, 1000)
            removed = [int(n * f) for f in (0, *synthetic.FRACTIONS)]
            assert curve["removed"].tolist() == removed
            assert curve["parameters_removed"].tolist() == [size * r for r in removed]
            np.testing.assert_allclose(curve["parameters_removed_share"], np.array(removed) * size / 20_000)


def test_intervals_equal_a_slow_bootstrap(tmp_path: Path) -> None:
    curves = labelled(open_study(synthetic.write(tmp_path)).curves())
    rng = np.random.default_rng(5)
    full, pruned = np.arange(100) < 80, np.arange(100) < 60
    for task, tasks in (("red", 1), ("mean", 2)):
        drawn = []
        for _ in range(4000):
            of_tasks = []
            for _ in range(tasks):
                documents = rng.integers(0, 100, 100)
                of_tasks.append((pruned[documents].mean(), pruned[documents].mean() - full[documents].mean()))
            drawn.append(np.mean(of_tasks, axis=0))
        point = pick(curves, task=task, num_fewshot=5, component="head", order="random", fraction=0.25).iloc[0]
        expected = np.quantile(drawn, [0.025, 0.975], axis=0)
        np.testing.assert_allclose([point["low"], point["high"]], expected[:, 0], atol=0.015)
        np.testing.assert_allclose([point["difference_low"], point["difference_high"]], expected[:, 1], atol=0.015)


def test_free_fractions_are_what_was_planted(tmp_path: Path) -> None:
    free = labelled(open_study(synthetic.write(tmp_path)).free_fractions())
    for task in (*synthetic.TASKS, "mean"):
        heads = pick(free, task=task, num_fewshot=5, component="head").iloc[0]
        # 100 unchanged documents rule out 3.7 points at the most, 200 of both tasks 1.9.
        known = (0.5, 12, 1200) if task == "mean" else (0, 0, 0)
        assert (heads["free_fraction"], heads["removed"], heads["parameters_removed"]) == known
        if task == "mean":
            assert heads[["next_fraction", "next_verdict"]].tolist() == [0.75, "costs more"]
        else:
            assert heads[["next_fraction", "next_verdict", "next_documents"]].tolist() == [0.25, "unknown", 189]
        assert pick(free, task=task, num_fewshot=5, component="ffn").iloc[0]["free_fraction"] == 0
        none = pick(free, task=task, num_fewshot=0)
        assert none["free_fraction"].isna().all()
        assert none["reason"].str.contains("not shown to be above 0.25").all()
    assert "random" not in set(free["order"])


def test_a_share_that_removes_nothing_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "FRACTIONS", [0.1, 0.5, 0.75])
    monkeypatch.setattr(synthetic, "RIGHT", {("ffn", "oracle"): (80, 80, 60, 30)})
    study = open_study(synthetic.write(tmp_path, shots=(5,)))
    assert study.curves()["removed"].tolist() == [0, 0, 3, 4] * 3
    assert (study.free_fractions()["free_fraction"] == 0).all(), "a tenth of six FFNs is none of them"
    (said,) = headline(study)
    assert "Already without 3 of 6" in said
    monkeypatch.setattr(synthetic, "FRACTIONS", [0.05, 0.1, 0.15])
    none = open_study(synthetic.write(tmp_path / "none", shots=(5,)))
    assert "no step removes one of the 6 FFNs" in headline(none)[0]
    assert "a loss of more than 2 points is shown" in said, "-20 points are no doubt"


def test_the_baseline_is_that_of_the_best_constant_answer_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = synthetic._rows
    monkeypatch.setattr(synthetic, "_rows", lambda *of: rows(*of).assign(gold=0))
    ledger = Ledger(synthetic.write(tmp_path, tasks=("red",), shots=(5,)))
    description = synthetic.spec(("red",), (5,))
    baselines = []
    for constant in (0.9, 0.6, 0.0, None):
        known = {**description["tasks"]["red"], "constant_answer": constant}  # type: ignore[index]
        ledger.write_json("study.json", {**description, "tasks": {"red": known}})
        study = open_study(tmp_path)
        baselines.append(study.baseline("red", 5))
        assert study.free_fractions()["free_fraction"].isna().all() == (constant == 0.9)
    assert baselines == [0.9, 0.6, 0.25, 0.25]


def test_tables_have_the_columns_that_are_promised(tmp_path: Path) -> None:
    study = open_study(synthetic.write(tmp_path))
    evaluations = study.evaluations()
    assert {"task", "num_fewshot", "split", "component", "order", "order_seed", "fraction", "layer", "doc_id",
            "correct", "gold_loglikelihood", "margin", "prediction", "gold", "num_options", "heads_removed",
            "ffns_removed", "parameters_removed"} <= set(evaluations.columns)
    assert len(evaluations) == 2 * 2 * 100 * (1 + 4 * 3)
    importance = study.importance()
    assert importance[importance["component"] == "ffn"]["head"].isna().all()
    assert len(importance) == 2 * 2 * (2 * 24 + 2 * 6 + 2 * 6)
    evaluations["task"] = "changed"
    assert set(study.evaluations()["task"]) == set(synthetic.TASKS), "readers get copies"


def test_mean_importance_is_the_mean_over_tasks(tmp_path: Path) -> None:
    table = open_study(synthetic.write(tmp_path)).importance()
    table.loc[(table["task"] == "red"), "importance"] *= 3
    mean = mean_importance(table)
    one = pick(mean, num_fewshot=5, component="head", layer=2, head=1, score="position").iloc[0]
    assert one["importance"] == pytest.approx(2 * 0.031)
    assert one["stderr"] == pytest.approx(np.sqrt(2) * 0.001 / 2)


@pytest.mark.parametrize("parts", [{"evaluations": False}, {"importance": False},
                                   {"evaluations": False, "importance": False}])
def test_an_unfinished_study_opens(tmp_path: Path, parts: dict[str, bool]) -> None:
    study = open_study(synthetic.write(tmp_path, **parts))
    assert len(study.evaluations()) > 0 or not parts.get("evaluations", True)
    assert len(study.curves()) == 0 or parts.get("evaluations", True)
    assert len(study.importance()) > 0 or not parts.get("importance", True)
    assert isinstance(headline(study)[0], str)
    assert list(cautions(study))


def test_a_task_under_way_costs_the_others_nothing(tmp_path: Path) -> None:
    done = open_study(synthetic.write(tmp_path / "done"))
    assert not headline(done)[0].startswith("Not every task")
    folder = synthetic.write(tmp_path / "more", tasks=("red", "green", "blue"))
    ledger = Ledger(folder)
    for entry in ledger.entries("evaluation"):
        if entry.job["task"] == "blue" and entry.job["curve"].get("order") in ("oracle", "random"):
            (folder / "entries" / f"evaluation-{job_id(entry.job)}.parquet").unlink()
    under_way = open_study(folder)
    for table in ("curves", "free_fractions"):
        expected, found = pick(getattr(done, table)(), scope="mean"), pick(getattr(under_way, table)(), scope="mean")
        pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True))
    assert under_way.finished_tasks(5) == ["red", "green"]
    assert under_way.baseline(None, 5) == done.baseline(None, 5)
    assert headline(under_way)[0] == (
        "Not every task is measured at every number of shots: of 3 tasks, 2 with no shots, 2 with 5 shots. "
        "Means are over these tasks only.")


def test_points_that_one_task_has_beside_the_others_are_no_reason_to_leave_these_out() -> None:
    full = np.ones(4)
    tasks = {name: Points(full, np.arange(4), 0.5, dict.fromkeys(range(count), full))
             for name, count in (("few", 3), ("more", 4), ("as few", 3), ("begun", 1), ("not begun", 0))}
    assert list(finished(tasks)) == ["few", "more", "as few"]
    assert list(finished({"not begun": tasks["not begun"]})) == ["not begun"]
    assert finished({}) == {}


def test_what_is_said_is_what_was_planted(tmp_path: Path) -> None:
    study = open_study(synthetic.write(tmp_path))
    first, second, third = headline(study)
    assert first.startswith("With 5 shots, each task by its own order: 50 % of the attention heads (12 of 24, 0.0 M "
                            "parameters) can go. Mean")
    assert "a loss of 2 points or more is ruled out at every step up to this share" in first
    assert second.startswith("With 5 shots, each task by its own order: no share of the FFNs is shown to be free. "
                             "Already without 1 of 6, mean accuracy changes by \N{MINUS SIGN}20.0 points")
    assert second.endswith("a loss of more than 2 points is shown.")
    assert third.startswith("With no shots nothing can be said")
    told = " ".join(cautions(study))
    for expected in ("weights are made up", "Shots are shared", "red, green", "distinct accuracies in green (0-shot, "
                                                                              "2)"):
        assert expected in told
    assert "only be ruled out with 189 documents or more" in told
    many = open_study(synthetic.write(tmp_path / "many", documents=200))
    assert "only be ruled out" not in " ".join(cautions(many))
    ranked = ranking(study, "head")
    assert ranked[ranked["num_fewshot"] == 5]["name"].tolist()[:2] == ["L5H3", "L5H2"]


def test_rows_come_in_an_order_that_does_not_depend_on_hashes(tmp_path: Path) -> None:
    names = tuple("zmbqa")
    study = open_study(synthetic.write(tmp_path, tasks=names))
    for table in (study.evaluations(), study.importance()):
        assert list(dict.fromkeys(zip(table["task"], table["num_fewshot"], strict=True))) == [
            (task, k) for task in names for k in (0, 5)]
    curves = study.curves()
    expected = [("head", "gradient"), ("head", "random"), ("ffn", "oracle"), ("ffn", "random")]
    for _, curve in curves.groupby(["scope", "task", "num_fewshot"]):
        assert list(dict.fromkeys(zip(curve["component"], curve["order"], strict=True))) == expected


def test_truncation_in_one_entry_is_not_hidden_by_another(tmp_path: Path) -> None:
    ledger = Ledger(synthetic.write(tmp_path))
    full = next(e for e in ledger.entries("evaluation") if e.job["curve"] == {"order": "none"})
    for i in range(4):  # before and after the others, by file name
        ledger.write({**full.job, "split": "examples", "documents": i}, full.table, {**full.info, "truncated": 3})
    assert open_study(tmp_path).truncated == {(full.job["task"], full.job["num_fewshot"]): 3}


def test_what_is_free_says_how_many_documents_changed(tmp_path: Path) -> None:
    free = labelled(open_study(synthetic.write(tmp_path)).free_fractions())
    heads = pick(free, task="red", num_fewshot=5, component="head").iloc[0]
    assert heads["changed"] == 0
    assert heads["next_low"] == pytest.approx(-0.037, abs=0.001), "an interval of nothing seen has a width"


def test_every_order_says_how_reliable_it_is(tmp_path: Path) -> None:
    study = open_study(synthetic.write(tmp_path))
    found, keys = labelled(study.orders()), ["task", "num_fewshot", "component", "method", "score"]
    assert not found.duplicated(keys).any()
    assert set(found["task"]) == {*synthetic.TASKS, "mean"}
    heads = found.set_index(keys).loc["red", 5, "head", "gradient", "position"]
    values = [0.01 * (layer + 1) + 0.001 * head for layer in range(synthetic.LAYERS) for head in range(synthetic.HEADS)]
    assert heads["reliability"] == pytest.approx(1 - 0.001**2 / np.var(values, ddof=1))
    assert heads[["distinct", "components", "documents"]].tolist() == [24, 24, 50]
    mean = found.set_index(keys).loc["mean", 5, "head", "gradient", "position"]
    assert mean["reliability"] == pytest.approx(1 - 0.001**2 / 2 / np.var(values, ddof=1))
    assert mean["documents"] == 100
    oracle = found.set_index(keys).sort_index().loc["green", 0, "ffn", "oracle"]
    assert oracle["distinct"].tolist() == [2, 2]
    ordering = study.ordering_scores
    assert found["orders"].tolist() == [ordering[c] == s for c, s in zip(found["component"], found["score"],
                                                                         strict=True)]
    (table,) = (t for t in tables(study) if t.title == "How reliable the orders are")
    assert len(table.frame) == 3 * 2 * 2, "of two tasks and their mean, at two numbers of shots, heads and FFNs"
    first = table.frame.query("component == 'head'").iloc[0]
    assert first[["task", "shots", "score"]].tolist() == ["mean", 0, f"{ordering['head']} (gradient)"]
    one = table.frame.query("task == 'red' and component == 'head'").iloc[0]
    assert one["reliability of other scores"].endswith(f"(gradient) {heads['reliability']:.2f}")
    write_nothing = open_study(synthetic.write(tmp_path / "none", importance=False))
    assert write_nothing.orders().empty
    assert not [t for t in tables(write_nothing) if t.title == "How reliable the orders are"]


def test_chance_within_layers_is_that_of_the_heads_layers(tmp_path: Path) -> None:
    study = open_study(synthetic.write(tmp_path))
    overlaps, importance = study.top_overlaps(), study.importance()
    assert overlaps.loc[overlaps["component"] == "ffn", "expected_in_layers"].isna().all()
    row = pick(overlaps, component="head", task="red", other_task="green", num_fewshot=5, fraction=0.3).iloc[0]
    heads = pick(importance, component="head", score="position", task="red", num_fewshot=5)
    top = heads.nlargest(int(row["size"]), "importance")["layer"].value_counts()
    assert row["expected_in_layers"] == pytest.approx(sum(top**2 / synthetic.HEADS)), "both have the same scores"
    assert pick(study.depth(), task="red", num_fewshot=5)["third"].tolist() == ["early", "middle", "late"]


def test_a_mean_says_what_tasks_above_chance_lose(tmp_path: Path) -> None:
    """Of two tasks one is at its constant answer's accuracy and keeps it; the other loses twice what the mean does."""
    ledger = Ledger(synthetic.write(tmp_path, shots=(5,)))
    description = synthetic.spec(shots=(5,))
    description["spec"]["margin"] = 0.55  # type: ignore[index]
    description["tasks"]["green"]["constant_answer"] = 0.8  # type: ignore[index]
    ledger.write_json("study.json", description)
    for entry in list(ledger.entries("evaluation")):
        if entry.job["task"] == "green" and entry.job["curve"] != {"order": "none"}:
            unharmed = entry.table.assign(correct=(entry.table["doc_id"] < 80).astype(float))
            ledger.path(entry.job).unlink()
            ledger.write(entry.job, unharmed, entry.info)
    study = open_study(tmp_path)
    free = labelled(study.free_fractions()).query("component == 'head'").set_index("task")
    red, mean = free.loc["red"], free.loc["mean"]
    assert (mean["free_fraction"], red["free_fraction"]) == (0.75, 0.75)
    assert mean["difference_low"] < -0.2 < mean["difference_high"]
    assert mean[["tasks", "above_chance"]].tolist() == [2, 1]
    assert mean["above_chance_difference"] == pytest.approx(-0.4)
    bounds = ["difference_low", "difference_high"]
    assert mean[["above_chance_low", "above_chance_high"]].tolist() == pytest.approx(red[bounds].tolist())
    assert free.loc["green", "above_chance"] == 0
    assert np.isnan(free.loc["green", "above_chance_difference"])
    said = headline(study)[0]
    assert "on 1 of the 2 tasks of that mean; on that one alone the difference is \N{MINUS SIGN}40.0 points" in said
    assert "tasks and share were chosen on these documents" in said
    assert not any("of that mean" in line for line in headline(
        open_study(synthetic.write(tmp_path / "both", shots=(5,))))), "nothing where every task is above chance"


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_measured_so_far_can_be_shown(tmp_path: Path, seed: int) -> None:
    folder = synthetic.write(tmp_path)
    rng = np.random.default_rng(seed)
    for path in sorted((folder / "entries").iterdir()):
        if rng.random() < seed / 8:
            path.unlink()
    study = open_study(folder)
    assert headline(study)
    assert list(cautions(study))
    for section in sections(study):
        for figure in (section.page(), section.static()):
            assert figure is None or "NaN" not in figure.to_json()
    assert all(table.rows for table in tables(study))


def test_gradient_and_oracle_are_compared_where_both_scored(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path / "study", tasks=("red",), shots=(5,))
    rng = np.random.default_rng(0)
    layers, heads = np.divmod(np.arange(24), 4)
    lost = rng.normal(size=24)
    lost[::3] = np.nan  # a sample of the heads
    oracle = pd.concat([pd.DataFrame({"component": "head", "layer": layers, "head": heads, "score": score,
                                      "importance": values, "stderr": 0.1})
                        for score, values in (("accuracy", 0 * lost), ("gold_loglikelihood", lost))])
    Ledger(folder).write({**synthetic.of_task("importance", "red", 5, 50), "method": "oracle", "component": "head",
                          "sample": None}, oracle, {"num_examples": 50, "distinct_values": 1})
    found = open_study(folder).agreement().set_index(["component", "score", "oracle"])
    planted = 0.01 * (layers + 1) + 0.001 * heads
    row = found.loc["head", "position", "gold_loglikelihood"]
    seen = ~np.isnan(lost)
    assert row["correlation"] == pytest.approx(spearmanr(planted[seen], lost[seen]).statistic)
    assert row["components"] == seen.sum() == 16
    assert row["low"] < row["correlation"] < row["high"]
    assert np.isnan(found.loc["head", "example", "accuracy"]["correlation"]), "all heads lose the same"
    ffns = spearmanr(np.arange(6), np.arange(6) // 3).statistic
    assert found.loc["ffn", "example", "accuracy"]["correlation"] == pytest.approx(ffns)
    page = write_report(folder, pictures=False).read_text(encoding="utf-8")
    assert f"{row['correlation']:.2f}" in page
    assert "all equal" in page
    assert (folder / "tables" / "agreement.csv").is_file()


def test_a_folder_without_a_study_is_told(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="holds no study"):
        open_study(tmp_path)
