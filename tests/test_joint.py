"""Grid, transfer and induction of a whole small study: masks are those asked for, tables say what entries hold."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import headcount as hc
import tiny
from headcount.analysis.rows import labelled
from headcount.analysis.study import Study
from headcount.errors import ModelError, OptionError, StudyError
from headcount.masks import Mask, prune, random_order, removal_order
from headcount.measure.evaluate import evaluate
from headcount.measure.induction import induction_scores
from headcount.model import random_weights
from headcount.report.cautions import cautions
from headcount.report.page import _CSV, write_report
from headcount.study.codec import importance_table, resampled_from, stored_order
from headcount.study.ledger import Ledger, job_id
from headcount.study.masksets import aggregate_order
from headcount.study.plan import TaskFacts, plan
from headcount.study.prepare import prepare
from headcount.study.runner import run_study
from headcount.study.spec import StudySpec
from headcount.tasks.load import get_tasks

TASKS, UNSEEN = ("icl_plural", "icl_gerund", "icl_agent"), "icl_antonym"
SPEC = StudySpec(
    "tiny", tasks=TASKS, unseen=(UNSEEN,), shots=(0, 1), limit=9, importance_limit=8, fractions=(0.25, 0.5),
    grid_fractions=(0.25, 0.75), grid_limit=6, transfer_fractions=(0.5,), transfer_limit=7,
    transfer_components=("head", "ffn"), measure=("curves", "grid", "transfer", "induction"), induction_seeds=1)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    asked = dataclasses.replace(SPEC, out=tmp_path_factory.mktemp("joint") / "study")
    return hc.open_study(run_study(asked, loaded=tiny.loaded("llama")))


def orders(study: Study, task: str, k: int) -> dict[str, list[int]]:
    entries = [e for e in Ledger(study.folder).entries("importance")
               if e.job["task"] == task and e.job["num_fewshot"] == k]
    tables = {e.job["method"]: e.table for e in entries}
    return {"head": stored_order(tables["gradient"], "head", "example"),
            "ffn": stored_order(tables["oracle"], "ffn", "gold_loglikelihood")}


def correct(name: str, k: int, mask: Mask, limit: int) -> float:
    measured = evaluate(tiny.loaded("llama"), get_tasks([name])[name], [mask], num_fewshot=k, limit=limit)
    return float(measured.accuracy[0])


@pytest.mark.parametrize("k", [0, 1])
def test_the_grid_is_every_pair_of_prunings(study: Study, k: int) -> None:
    grid, heads = study.grid(), tiny.loaded("llama").anatomy.heads_per_layer
    own = orders(study, "icl_gerund", k)
    rows = grid[(grid["task"] == "icl_gerund") & (grid["num_fewshot"] == k)]
    assert len(rows) == 9, "full, two of heads, two of FFNs, and four of both"
    for row in rows.to_dict("records"):
        mask = Mask(prune(heads, "head", own["head"], row["heads_fraction"]).heads,
                    prune(heads, "ffn", own["ffn"], row["ffns_fraction"]).ffns)
        assert row["documents"] == 6
        assert row["accuracy"] == pytest.approx(correct("icl_gerund", k, mask, 6))
        assert (row["heads_removed"], row["ffns_removed"]) == (len(mask.heads_removed), len(mask.ffns_removed))
    mean = grid[(grid["scope"] == "mean") & (grid["num_fewshot"] == k)].set_index(["heads_fraction", "ffns_fraction"])
    each = grid[(grid["scope"] == "task") & (grid["num_fewshot"] == k)]
    by_hand = each.groupby(["heads_fraction", "ffns_fraction"])["accuracy"].mean()
    np.testing.assert_allclose(mean.loc[by_hand.index, "accuracy"], by_hand)


@pytest.mark.parametrize("component", ["head", "ffn"])
def test_transfer_prunes_by_the_donors_order(study: Study, component: str) -> None:
    heads = tiny.loaded("llama").anatomy.heads_per_layer
    transfer = labelled(study.transfer())
    rows = transfer[(transfer["component"] == component) & (transfer["num_fewshot"] == 1)]
    of_task = rows[rows["task"] == "icl_plural"].set_index("donor")
    assert set(of_task.index) == {"none", "own", "random", "icl_gerund", "icl_agent", "mean", "mean without own"}
    assert (of_task["documents"] == 7).all()
    expected = {name: orders(study, name, 1)[component] for name in ("icl_gerund", "icl_agent")}
    expected["own"] = orders(study, "icl_plural", 1)[component]
    draws = [prune(heads, component, random_order(len(expected["own"]), SPEC.seed + i), 0.5)  # type: ignore[arg-type]
             for i in range(SPEC.random_orders)]
    assert of_task.loc["random", "accuracy"] == pytest.approx(np.mean([correct("icl_plural", 1, m, 7) for m in draws]))
    for donor, order in expected.items():
        mask = prune(heads, component, order, 0.5)  # type: ignore[arg-type]
        assert of_task.loc[donor, "accuracy"] == pytest.approx(correct("icl_plural", 1, mask, 7))
    difference = of_task["accuracy"] - of_task.loc["own", "accuracy"]
    np.testing.assert_allclose(of_task["difference"].drop("none"), difference.drop("none"), atol=1e-12)
    assert of_task.loc["none", ["difference", "p"]].isna().all(), "compared with which fraction's own order?"
    mean = rows[rows["task"] == "mean"].set_index("donor")
    others = rows[(rows["donor"] == "icl_gerund") & rows["task"].isin(("icl_plural", "icl_agent"))]
    assert mean.loc["icl_gerund", "accuracy"] == pytest.approx(others["accuracy"].mean())
    unseen = rows[rows["task"] == UNSEEN]
    assert set(unseen["donor"]) == {"none", "mean", "random"}
    assert unseen["unseen"].all()
    assert UNSEEN not in set(study.curves()["task"])


def test_the_aggregate_order_is_that_of_the_mean_or_of_the_ranks(study: Study) -> None:
    tables = [e.table for e in Ledger(study.folder).entries("importance")
              if e.job["num_fewshot"] == 1 and e.job["method"] == "gradient"]
    scores = np.stack([t[(t["component"] == "head") & (t["score"] == "position")]["importance"] for t in tables])
    assert aggregate_order(tables, "head", "position") == removal_order(scores.mean(axis=0))
    places = [[sorted(range(scores.shape[1]), key=lambda i: (row[i], i)).index(j) for j in range(scores.shape[1])]
              for row in scores]
    assert aggregate_order(tables, "head", "position", "ranks") == removal_order(np.mean(places, axis=0))


def test_induction_scores_of_a_study_are_those_of_the_function(study: Study) -> None:
    found, direct = study.induction(), induction_scores(tiny.loaded("llama"), seeds=1)
    trained = found[found["weights"] == "trained"].sort_values(["layer", "head"])
    for name in ("prefix_matching", "copying", "previous_token", "ov_copying"):
        np.testing.assert_allclose(trained[name], getattr(direct, name), atol=1e-6)
    assert set(found["weights"]) == {"trained", "random"}
    most = found.loc[found["weights"] == "random", "copying"].max()
    high = (found["prefix_matching"] >= SPEC.prefix_threshold) & (found["copying"] >= most)
    assert (found["induction"] == high).all()
    assert set(study.retained()["primitive"]) == {"prefix_matching", "copying"}


def test_correlations_have_intervals_over_documents(study: Study) -> None:
    found = study.correlations()
    pairs = found[(found["kind"] == "shots") & found["task"].isin(TASKS) & (found["other_shots"] >= 0)]
    pairs = pairs[pairs["component"] == "head"]  # three FFNs often lose the same accuracy
    assert pairs["low"].notna().all()
    assert (pairs["low"] <= pairs["correlation"]).all()
    assert (pairs["correlation"] <= pairs["high"]).all()
    assert set(found["component"]) == {"head", "ffn"}


def test_the_report_has_all_of_it(study: Study) -> None:
    text = write_report(study.folder).read_text(encoding="utf-8")
    for heading in ("Heads and FFNs together", "Do tasks need the same heads?", "Does the order of one task serve",
                    "Does the order of all tasks serve an unseen one?", "Induction scores of every head",
                    "Do induction heads survive pruning?", "Does the order depend on the number of shots?"):
        assert heading in text, heading
    assert {f.stem for f in (study.folder / "tables").iterdir()} == {*_CSV, "prediction"}
    assert {f.name for f in (study.folder / "figures").iterdir()} >= {
        f"{name}.{kind}" for kind in ("png", "pdf")
        for name in ("grid", "transfer_head", "transfer_ffn", "unseen_head", "induction_maps", "retained")}
    assert "84 to 97 % of these 95 % intervals held" in " ".join(cautions(study))
    depth = study.depth()
    assert depth["low"].notna().all(), "importance was resampled"


def test_more_can_be_measured_in_a_folder_that_is_there(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    base = dataclasses.replace(SPEC, out=tmp_path / "study", tasks=TASKS[:2], shots=(0,), unseen=())
    run_study(dataclasses.replace(base, tasks=(), measure=("induction",)), loaded=loaded)
    first = hc.open_study(tmp_path / "study")
    assert len(first.induction())
    assert first.curves().empty
    write_report(first, pictures=False)
    run_study(dataclasses.replace(base, measure=("curves",)), loaded=loaded)
    run_study(dataclasses.replace(base, measure=("transfer",)), loaded=loaded)
    grown = run_study(dataclasses.replace(base, tasks=TASKS, measure=("transfer",)), loaded=loaded)
    study = hc.open_study(grown)
    assert study.spec["tasks"] == list(TASKS)
    assert study.spec["measure"] == ["induction", "curves", "transfer"]
    assert study.spec["limit"] == SPEC.limit
    # The aggregate is that of most tasks, not a mixture with the one that was measured first.
    mean = study.transfer().query("task == 'icl_plural' and donor_scope == 'all tasks' and component == 'head'")
    tables = [e.table for e in Ledger(grown).entries("importance") if e.job["method"] == "gradient"]
    mask = prune(loaded.anatomy.heads_per_layer, "head", aggregate_order(tables, "head", "position"), 0.5)
    assert mean["accuracy"].tolist() == pytest.approx([correct("icl_plural", 0, mask, 7)])
    # Of scores and of ranks, the aggregate that was asked for last.
    run_study(dataclasses.replace(base, tasks=TASKS, measure=("transfer",), aggregate="ranks"), loaded=loaded)
    ranked = hc.open_study(grown)
    jobs = {e.job["curve"].get("aggregate") for e in Ledger(grown).entries("evaluation")}
    assert jobs == {None, "mean", "ranks"}
    mask = prune(loaded.anatomy.heads_per_layer, "head", aggregate_order(tables, "head", "position", "ranks"), 0.5)
    rows = ranked.evaluations().query(
        "task == 'icl_plural' and order == 'transfer' and donor_scope == 'all tasks' and component == 'head'")
    assert len(rows) == 7
    assert rows["correct"].mean() == pytest.approx(correct("icl_plural", 0, mask, 7))
    with pytest.raises(OptionError, match="both tasks and unseen"):
        prepare(dataclasses.replace(base, unseen=TASKS[:1], measure=("transfer",)), loaded=loaded)
    with pytest.raises(StudyError, match="is no unseen one there"):
        prepare(dataclasses.replace(base, tasks=TASKS[:2], unseen=TASKS[2:], measure=("transfer",)), loaded=loaded)
    # Options of induction are those of the last run that has any, in a folder that has tasks too.
    asked = dataclasses.replace(base, tasks=(), measure=("induction",), induction_lengths=(9, 5), induction_seeds=2,
                                prefix_threshold=0.5, skip_control=True)
    run_study(asked, loaded=loaded)
    again = dataclasses.replace(base, measure=("curves",), aggregate="ranks")
    last = hc.open_study(run_study(again, loaded=loaded))
    assert last.induction_notes["lengths"] == [5, 9]
    assert set(last.induction()["sequences"]) == {4}
    assert set(last.induction()["weights"]) == {"trained"}, "the control that is there is of other texts"
    assert last.induction()["induction"].isna().all()
    assert last.induction_thresholds["prefix_matching"] == 0.5
    assert last.spec["measure"] == ["induction", "curves", "transfer"]
    assert last.spec["tasks"] == list(TASKS)
    # Another aggregate, of fewer tasks, and transfer is not among it: a request of its own.
    other = hc.open_study(run_study(dataclasses.replace(again, aggregate="mean"), loaded=loaded))
    assert (other.spec["measure"], other.spec["tasks"]) == (["induction", "curves"], list(TASKS[:2]))
    assert other.transfer().empty
    assert len(hc.open_study(grown, asked=len(other.other_requests)).transfer()) == len(last.transfer()) > 0


def test_a_task_that_was_unseen_may_get_an_order_of_its_own(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    base = dataclasses.replace(SPEC, out=tmp_path / "study", tasks=TASKS[:2], shots=(0,), measure=("transfer",),
                               transfer_components=("head",))
    before = hc.open_study(run_study(base, loaded=loaded))
    assert before.known_tasks.keys() == {*TASKS[:2], UNSEEN}
    more = dataclasses.replace(base, tasks=(*TASKS[:2], UNSEEN), unseen=(TASKS[2],))
    after = hc.open_study(run_study(more, loaded=loaded))
    assert after.spec["tasks"] == [*TASKS[:2], UNSEEN]
    assert after.spec["unseen"] == [TASKS[2]]
    rows = after.transfer().query(f"task == '{UNSEEN}'")
    assert {"own", *TASKS[:2]} <= set(labelled(rows)["donor"])
    assert not rows["unseen"].any()


def test_two_tasks_give_no_order_twice() -> None:
    facts = [TaskFacts(name, name, {0: 9}, {0: 9}) for name in TASKS]
    asked = dataclasses.replace(SPEC, shots=(0,), measure=("transfer",), unseen=(), transfer_components=("head",))
    for many, donors in ((2, {"mean", *TASKS[:2], "own"}), (3, {"mean", "mean without own", *TASKS, "own"})):
        jobs = plan(asked, "model", (4, 4, 4), facts[:many], ("transfer",))
        found = [j.key["curve"] for j in jobs if j.key.get("curve", {}).get("order") == "transfer"]
        assert {c["donor"] for c in found} == donors
    alone = plan(asked, "model", (4, 4, 4), [facts[0], dataclasses.replace(facts[1], unseen=True)], ("transfer",))
    found = [(j.key["task"], j.key["curve"]["donor"]) for j in alone if j.key.get("curve", {}).get("donor")]
    assert found == [(TASKS[1], "mean")], "a single task has no other order than its own"


def test_a_folder_that_lost_its_full_model_still_has_tables(study: Study, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.folder, copy)
    ledger = Ledger(copy)
    for entry in ledger.entries("evaluation"):
        if entry.job["curve"]["order"] == "none" and entry.job["num_fewshot"] == 1:
            (copy / "entries" / f"evaluation-{job_id(entry.job)}.parquet").unlink()
    found = hc.open_study(copy)
    for table in (found.grid(), found.transfer(), found.curves()):
        assert set(table["num_fewshot"]) == {0}
    measured = found.evaluations().query("order == 'grid' and num_fewshot == 1")
    cells = len(measured.drop_duplicates(["task", "fraction", "ffn_fraction"]))
    assert any(f"Of the grid {cells} measured points are not shown" in line for line in cautions(found))
    assert not study.unshown


def test_a_mean_of_unfinished_transfer_is_over_the_tasks_that_are_done(study: Study, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.folder, copy)
    for entry in Ledger(copy).entries("evaluation"):
        curve = entry.job["curve"]
        if (entry.job["task"], curve.get("donor"), curve.get("component")) == (TASKS[0], TASKS[1], "head"):
            (copy / "entries" / f"evaluation-{job_id(entry.job)}.parquet").unlink()
    rows = labelled(hc.open_study(copy).transfer()).query(
        "component == 'head' and num_fewshot == 1 and fraction == 0.5")
    mean, each = rows[rows["task"] == "mean"].set_index("donor"), rows.set_index(["task", "donor"])["accuracy"]
    assert mean.loc["own", "accuracy"] == pytest.approx(each[[(t, "own") for t in TASKS[1:]]].mean())
    assert mean.loc[TASKS[0], "accuracy"] == pytest.approx(each[[(t, TASKS[0]) for t in TASKS[1:]]].mean())
    assert mean.loc[TASKS[1], "accuracy"] == pytest.approx(each[TASKS[2], TASKS[1]]), "a donor to all but itself"


def test_without_the_control_nobody_is_called_an_induction_head(tmp_path: Path) -> None:
    asked = dataclasses.replace(SPEC, out=tmp_path / "study", shots=(0,), unseen=(), measure=("curves", "induction"),
                                skip_control=True)
    loaded = tiny.loaded("llama")
    found = hc.open_study(run_study(asked, loaded=loaded))
    assert set(found.induction()["weights"]) == {"trained"}
    assert found.induction()["induction"].isna().all()
    assert found.induction_among_important().empty
    assert "was not measured" in write_report(found, pictures=False).read_text(encoding="utf-8")
    told = hc.open_study(run_study(dataclasses.replace(asked, copying_threshold=0.01), loaded=loaded))
    assert told.induction()["induction"].notna().all()
    assert len(told.induction_among_important())


def test_what_induction_would_refuse_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = dataclasses.replace(SPEC, out=tmp_path / "study", shots=(0,), unseen=(), measure=("curves", "induction"))
    with pytest.raises(OptionError, match="no random sequence fits"):
        prepare(dataclasses.replace(asked, induction_lengths=(500,)), loaded=tiny.loaded("llama"))
    loaded = tiny.loaded("llama")
    monkeypatch.setattr(loaded.model, "hf_device_map", {"": "disk"}, raising=False)
    monkeypatch.setattr(random_weights.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"takes 1,\d{3},\d{3} bytes in .* 1,000 are left: .*\(skip_control\)"):
        prepare(asked, loaded=loaded)
    assert not (tmp_path / "study").exists()


def test_nothing_is_left_to_do_in_a_finished_folder(study: Study) -> None:
    runner = prepare(dataclasses.replace(SPEC, out=study.folder), loaded=tiny.loaded("llama"))
    assert not runner.todo()
    parts = ("grid", "transfer")
    alone = plan(dataclasses.replace(SPEC, measure=parts), "model", (4, 4, 4), runner.facts, parts)
    points = [p for j in alone for p in j.key.get("curve", {}).get("points", ())]
    assert len(points) == 6 * 8, "without curves the grid has its own edges"
    donors = {j.key["curve"]["donor"] for j in alone if j.key.get("curve", {}).get("order") == "transfer"}
    assert "own" in donors


def test_a_draw_that_costs_nothing_ties_with_what_never_cost_anything() -> None:
    # A quarter of the largest distance is 31.75 steps, kept as 32.
    rows = pd.DataFrame({"importance": [-1 / 60, 0.0], "spread": [4 / 60, 0.0],
                         "resampled": [np.array([32, -127], np.int8), np.zeros(2, np.int8)]})
    drawn = resampled_from(rows)
    assert drawn[0].tolist() == [0.0, 0.0]
    assert drawn[1, 0] < -0.02


def test_resampled_means_survive_the_entry() -> None:
    task = get_tasks(["icl_plural"])["icl_plural"]
    measured = hc.head_importance(tiny.loaded("llama"), task, limit=8)
    table = importance_table(measured)

    rows = table[table["score"] == "position"]
    spread = np.abs(measured.resampled["position"] - measured.scores["position"]).max(axis=0)
    assert (np.abs(resampled_from(rows) - measured.resampled["position"]) <= spread / 250).all()
