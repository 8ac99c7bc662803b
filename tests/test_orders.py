"""Which order is whose: scores beside one another in a folder, one set for all tasks, random orders, the grid's "
  "orders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import headcount as hc
import synthetic_study as synthetic
import tiny
from headcount.analysis.curves import against_random
from headcount.analysis.grid import grid_table
from headcount.analysis.points import Points
from headcount.analysis.rows import labelled
from headcount.errors import OptionError
from headcount.masks import Mask, prune, removal_order
from headcount.report import words
from headcount.report.cautions import cautions
from headcount.report.curves import common_sentence
from headcount.report.headline import _next, headline
from headcount.report.importance import head_map
from headcount.report.page import sections
from headcount.stats import intervals
from headcount.study.folder import other_orders
from headcount.study.jobs import name_of
from headcount.study.ledger import Ledger
from headcount.study.plan import TaskFacts, plan
from headcount.study.prepare import prepare
from headcount.study.runner import run, run_study
from headcount.study.spec import StudySpec, scores_of

TASKS = ("icl_plural", "icl_gerund", "icl_agent")
SPEC = StudySpec("tiny", tasks=TASKS, shots=(1,), limit=6, importance_limit=8, fractions=(0.25, 0.5), random_orders=2,
                 grid_fractions=(0.5,), measure=("curves", "grid"))
FACTS = [TaskFacts(name, name, {1: 9}, {1: 9}) for name in TASKS]


def planned(**changes: object) -> dict[str, dict[str, object]]:
    """Descriptions of curves and grids by title."""
    spec = dataclasses.replace(SPEC, **changes)  # type: ignore[arg-type]
    return {p.title: dict(p.key["curve"]) for p in plan(spec, "model", (4, 4, 4), FACTS, ("curve", "grid"))
            if "curve" in p.key}


@pytest.mark.parametrize(("options", "heads", "ffns"), [
    ({}, "example", "gold_loglikelihood"), ({"protocol": "paper"}, "position", "accuracy"),
    ({"head_score": "position", "ffn_score": "accuracy"}, "position", "accuracy"),
    ({"protocol": "paper", "head_score": "example"}, "example", "accuracy"),
    ({"ffn_order": "gradient"}, "example", "example")])
def test_protocols_order_by_their_own_score_and_one_option_chooses(
    options: dict[str, object], heads: str, ffns: str
) -> None:
    spec = dataclasses.replace(SPEC, **options)  # type: ignore[arg-type]
    assert spec.scores == scores_of(spec.to_json()) == {"head": heads, "ffn": ffns}
    found = planned(**options)
    assert found["icl_plural, 1-shot: heads by gradient, 25% to 50%"]["score"] == heads
    by = "gradient" if ffns == "example" else "oracle"
    # Under protocol sound accuracy is not alone: log-likelihood decides between equal ones, as in folders of before.
    alone = (options.get("protocol"), ffns) != (None, "accuracy")
    assert found[f"icl_plural, 1-shot: FFNs by {by}, 25% to 50%"].get("score") == (ffns if alone else None)


def test_folders_of_earlier_versions_are_read_as_what_they_are() -> None:
    assert scores_of({"head_score": "position", "ffn_order": "oracle"}) == {"head": "position", "ffn": "accuracy"}
    assert scores_of({}) == {"head": "position", "ffn": "accuracy"}
    assert scores_of({"ffn_order": "gradient", "head_score": "example"}) == {"head": "example", "ffn": "example"}


def test_a_folder_begun_by_another_score_goes_on_with_it_when_asked_and_is_never_mixed(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    old = dataclasses.replace(SPEC, out=tmp_path / "study", measure=("curves",), head_score="position",
                              ffn_score="accuracy", random_orders=1, common_fractions=(0.5,))
    folder = run_study(old, loaded=loaded)
    before = hc.open_study(folder).curves()
    assert set(hc.open_study(folder).evaluations()["score"]) == {"", "position", "accuracy"}
    asked_again = prepare(old, loaded=loaded)
    assert not asked_again.todo(), "nothing is measured again"
    assert asked_again.other_orders == ""
    new = dataclasses.replace(old, head_score=None, ffn_score=None)
    runner = prepare(new, loaded=loaded)
    assert runner.other_orders == (
        "this folder's curves remove heads by position (to go on with these: --head-score position) and FFNs by "
        "accuracy (to go on with these: --ffn-score accuracy); new ones, heads by example and FFNs by "
        "gold_loglikelihood, are "
        "measured beside them and shown instead")
    todo = {p.title.split(": ")[1] for p in runner.todo()}
    assert todo == {"heads by gradient, 25% to 50%", "FFNs by oracle, 25% to 50%", "heads by the order of all tasks, "
                    "50% to 50%", "FFNs by the order of all tasks, 50% to 50%"}, "neither oracles nor gradients again"
    run(runner)
    study = hc.open_study(folder)
    assert study.ordering_scores == {"head": "example", "ffn": "gold_loglikelihood"}
    assert study.hidden_scores == ["FFNs by accuracy", "heads by position"]
    said = "which are not shown (nor are grids and transfers by them): FFNs by accuracy, heads by position"
    assert said in " ".join(cautions(study))
    alone = run_study(dataclasses.replace(new, out=tmp_path / "alone"), loaded=loaded)
    pd.testing.assert_frame_equal(study.curves(), hc.open_study(alone).curves())
    run_study(old, loaded=loaded)
    pd.testing.assert_frame_equal(hc.open_study(folder).curves(), before)
    assert other_orders(new, None) == ""


def test_more_random_orders_are_measured_and_not_refused(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    few = dataclasses.replace(SPEC, tasks=TASKS[:1], out=tmp_path, measure=("curves",))
    run_study(few, loaded=loaded)
    more = prepare(dataclasses.replace(few, random_orders=3), loaded=loaded)
    assert [p.key["curve"]["order_seed"] for p in more.todo()] == [1236, 1236], "heads and FFNs, the third order alone"
    run(more)
    draws = hc.open_study(tmp_path).curves().query("order == 'random' and fraction > 0")["draws"]
    assert (draws == 3).all()


def test_fractions_of_random_and_common_orders() -> None:
    default = StudySpec("m", tasks=("a",))
    assert default.random_orders == 5
    assert default.fractions_of_random == (0.2, 0.5)
    assert default.fractions_of_common == (0.1, 0.2, 0.3, 0.4)
    few = StudySpec("m", tasks=("a",), fractions=(0.3,))
    assert (few.fractions_of_random, few.fractions_of_common) == ((0.3,), (0.3,))
    chosen = StudySpec("m", tasks=("a",), random_fractions=(0.7,), common_fractions=(0.6,))
    assert (chosen.fractions_of_random, chosen.fractions_of_common) == ((0.7,), (0.6,))
    with pytest.raises(OptionError, match="random_fractions lie between 0 and 1"):
        StudySpec("m", tasks=("a",), random_fractions=(1.5,))


def test_the_common_order_is_one_set_for_all_tasks_and_that_of_the_mean(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    ledger = Ledger(run_study(dataclasses.replace(SPEC, out=tmp_path, grid_order="mean"), loaded=loaded))
    heads = loaded.anatomy.heads_per_layer
    tables = {(e.job["task"], e.job["method"]): e.table for e in ledger.entries("importance")}

    def mean_order(component: str, method: str, score: str) -> list[int]:
        rows = [t[(t["component"] == component) & (t["score"] == score)].sort_values(["layer", "head"])
                for (_, m), t in tables.items() if m == method]
        return removal_order(np.mean([r["importance"].to_numpy() for r in rows], axis=0))

    by = {"head": mean_order("head", "gradient", "example"), "ffn": mean_order("ffn", "oracle", "gold_loglikelihood")}
    common: dict[tuple[str, float], set[str]] = {}
    for entry in ledger.entries("evaluation"):
        curve = entry.job["curve"]
        for label in entry.info["masks"]:
            if curve["order"] == "common":
                common.setdefault((curve["component"], label["fraction"]), set()).add(label["mask"])
            elif curve["order"] == "grid":
                joint = Mask(prune(heads, "head", by["head"], label["fraction"]).heads,
                             prune(heads, "ffn", by["ffn"], label["ffn_fraction"]).ffns)
                assert label["mask"] == joint.to_json()
                assert label["donor"] == "mean"
    assert common == {(c, f): {prune(heads, c, by[c], f).to_json()}  # type: ignore[arg-type]
                      for c in ("head", "ffn") for f in (0.25, 0.5)}
    study = hc.open_study(tmp_path)
    assert set(study.grid()["order"]) == {"all tasks"}
    assert len(study.grid().query("scope == 'mean'")) == 4, "full, heads alone, FFNs alone, both: none read from curves"
    curves = study.curves()
    assert set(curves["order"]) == {"gradient", "oracle", "common", "random"}
    of_common = labelled(curves[curves["order"] == "common"]).groupby("component")["task"].nunique()
    assert (of_common == 4).all(), "tasks and their mean"
    free = study.free_fractions()
    assert set(free["order"]) == {"gradient", "oracle", "common"}


def test_a_single_task_has_no_order_of_all_tasks() -> None:
    spec = dataclasses.replace(SPEC, tasks=TASKS[:1], grid_order="mean")
    curves = [p.key["curve"] for p in plan(spec, "m", (4, 4), FACTS[:1], ("curve", "grid")) if "curve" in p.key]
    assert not [c for c in curves if c["order"] == "common" or c.get("donor")]


def test_orders_of_more_tasks_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    loaded, of_one_set = tiny.loaded("llama"), "order in ('common', 'uniform common')"
    two = dataclasses.replace(SPEC, tasks=TASKS[:2], out=tmp_path, measure=("curves",), random_orders=0,
                              uniform=True)
    run_study(two, loaded=loaded)
    run_study(dataclasses.replace(two, tasks=TASKS[2:]), loaded=loaded)  # asked alone it has no common order
    three = run_study(dataclasses.replace(two, tasks=TASKS), loaded=loaded)
    members = hc.open_study(three)._evaluations.query(of_one_set)["members"]
    assert set(members) == {2, 3}, "both are kept"
    assert set(hc.open_study(three)._shown.query(of_one_set)["members"]) == {3}, "one is shown"
    found = hc.open_study(three).curves().query(of_one_set)
    assert found["order"].nunique() == 2
    alone = run_study(dataclasses.replace(two, tasks=TASKS, out=tmp_path / "alone"), loaded=loaded)
    expected = hc.open_study(alone).curves().query(of_one_set)
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True))


def with_common(folder: Path, red: int, green: int) -> Path:
    """The planted study with one set of heads for all tasks, which leaves so many of 100 right on each task."""
    ledger = Ledger(synthetic.write(folder, shots=(5,), documents=400))
    description = ledger.read_json("study.json") or {}
    ledger.write_json("study.json", {**description, "spec": {**description["spec"], "common_fractions": [0.25]}})
    for task, right in (("red", red), ("green", green)):
        job = {**synthetic.of_task("evaluation", task, 5, 400), "split": "evaluation",
               "curve": {"component": "head", "order": "common", "score": "position", "importance": ["x", "y"],
                         "aggregate": "mean", "fractions": [0.25]}}
        ledger.write(job, synthetic._rows(right, 400, 0), {"metric": "acc", "truncated": 0, "tokens": 1, "seconds": 0.1,
                                                           "masks": [synthetic._label("head", "common", 0.25)]})
    return folder


def test_what_one_set_costs_is_a_claim_of_its_own(tmp_path: Path) -> None:
    """Each task loses nothing by its own order; one set for both costs green 10 points."""
    study = hc.open_study(with_common(tmp_path, 80, 70))
    own, common, *_ = headline(study)
    assert own.startswith("With 5 shots, each task by its own order: 50 % of the attention heads")
    assert common.startswith("With 5 shots, one set of attention heads for all tasks: no share of the attention heads "
                             "is shown to be free. Already without 6 of 24, mean accuracy changes by \N{MINUS SIGN}5.0 "
                             "points")
    assert "a loss of more than 2 points is shown" in common
    assert common.endswith("Of the 2 tasks above chance, a loss of more than 2 points is shown on 1: green "
                           "(\N{MINUS SIGN}10.0); a loss of 2 points or more is ruled out on 1.")
    free = hc.open_study(with_common(tmp_path / "free", 80, 80))
    said = headline(free)[1]
    assert "for all tasks: 25 % of the attention heads (6 of 24, 0.0 M parameters) can go" in said
    assert said.endswith("Of the 2 tasks above chance, a loss of 2 points or more is ruled out on 2.")
    said = common_sentence(study, "head")
    assert said.startswith("One set of 25 % of the attention heads for all tasks leaves a mean accuracy of 0.75, "
                           "\N{MINUS SIGN}5.0 points against the full model (")
    assert "): a loss of more than 2 points is shown. Each task's own order leaves 0.80." in said


@pytest.mark.parametrize("draws", [2, 5])
def test_intervals_beside_random_orders_are_over_documents_and_draws(draws: int) -> None:
    """True difference: .8 less what random orders leave on average, whose accuracies spread by .05."""
    rng = np.random.default_rng(draws)
    inside, alone = [], []
    for _ in range(100):
        levels = 0.6 + 0.05 * rng.normal(size=draws)
        documents = rng.random((2, 100))
        tasks = {}
        for name, luck in zip(("a", "b"), documents, strict=True):
            own = (luck < 0.8).astype(float)
            random = np.stack([(luck < level).astype(float) for level in levels])
            tasks[name] = Points(np.ones(100), np.arange(100), 0.1,
                                 {("head", "gradient", 0.5): own, ("head", "random", 0.5): random.mean(0)},
                                 {("head", "gradient", 0.5): own[None], ("head", "random", 0.5): random})
        row = against_random({5: tasks}).query("scope == 'mean'").iloc[0]
        inside.append(row["difference_low"] <= 0.2 <= row["difference_high"])
        samples = [t.sample((t.values["head", "gradient", 0.5] - t.values["head", "random", 0.5])[None])
                   for t in tasks.values()]
        low, high = intervals.difference_interval(samples)
        alone.append(low[0] <= 0.2 <= high[0])
        assert row["draw_low"] <= row["random"] <= row["draw_high"]
    assert np.mean(inside) >= 0.925
    assert np.mean(alone) < np.mean(inside), "documents alone leave out the draws"


def test_one_draw_has_no_interval() -> None:
    values = {("head", "gradient", 0.5): np.ones(30), ("head", "random", 0.5): np.zeros(30)}
    points = Points(np.ones(30), np.arange(30), 0.1, values, {key: v[None] for key, v in values.items()})
    row = against_random({5: {"red": points}}).iloc[0]
    assert row[["difference_low", "difference_high"]].isna().all()
    assert row["difference"] == 1


def test_a_metric_beyond_0_and_1_is_told_in_one_line(tmp_path: Path) -> None:
    ledger = Ledger(synthetic.write(tmp_path, tasks=("red",), shots=(5,), documents=200))
    for entry in list(ledger.entries("evaluation")):
        ledger.path(entry.job).unlink()
        ledger.write(entry.job, entry.table.assign(correct=3 * entry.table["correct"]), entry.info)
    study = hc.open_study(tmp_path)
    assert ("The metric of red goes beyond 0 and 1, so that it has no interval: nothing can be ruled out there, nor "
            "on a mean over tasks.") in list(cautions(study))
    assert set(study.curves().query("fraction > 0")["verdict"]) == {"unknown"}
    assert "it has no interval" in study.weak_results()["reason"].iloc[0]
    assert headline(study) == ["With 5 shots nothing can be said: the metric goes beyond 0 and 1, so that "
                                         "it has no interval and nothing can be ruled out."]
    assert "nan" not in " ".join([*cautions(study), *(s.caption for s in sections(study))])


def test_verdicts_in_words() -> None:
    assert words.told("within", 0.02) == "a loss of 2 points or more is ruled out"
    assert words.told("costs more", 0.02) == "a loss of more than 2 points is shown"
    assert words.told("unknown", 0.015, needed=1834, documents=600) == (
        "whether 1.5 points are lost cannot be told with these 600 documents (about 1,900 would tell, if as large a "
        "share of them changed)")
    assert words.told("unknown", 0.02) == "whether 2 points are lost cannot be told with these documents"
    assert "nor with more" in words.told("unknown", 0.02, needed=float("inf"), documents=50)


def test_job_ids_of_curves_differ_by_score() -> None:
    ids = [{name_of(p.job) for p in plan(dataclasses.replace(SPEC, **options), "m", (4, 4, 4), FACTS, ("curve",))
            if p.key.get("curve", {}).get("order") in ("gradient", "oracle", "common")}
           for options in ({}, {"head_score": "position", "ffn_score": "accuracy"})]
    assert not ids[0] & ids[1]
    assert len(ids[0]) == len(ids[1]) == 12


def test_the_map_of_heads_says_which_score_it_shows_and_the_ranks_by_both(tmp_path: Path) -> None:
    ledger = Ledger(synthetic.write(tmp_path, tasks=("red",), shots=(5,), evaluations=False))
    for entry in list(ledger.entries("importance")):
        if entry.job["method"] == "gradient":
            scores = entry.table["importance"]
            turned = np.where(entry.table["score"] == "example", 1 - scores, scores)
            ledger.path(entry.job).unlink()
            ledger.write(entry.job, entry.table.assign(importance=turned), entry.info)
    spec = head_map(hc.open_study(tmp_path).importance(), "position", choose=False).to_dict()
    assert "by position" in json.dumps(spec["spec"]["encoding"]["color"])
    (rows,) = (r for r in spec["datasets"].values() if "share" in r[0])
    ranks = {r["name"]: (r["rank"], r["other"]) for r in rows}
    assert ranks["L5H3"] == (1, 24)
    assert ranks["L0H0"] == (24, 1)


def test_tasks_asked_for_apart_have_no_mean_of_one_set(tmp_path: Path) -> None:
    """Two runs of two tasks each: their orders are two sets, and no mean over four tasks is of one."""
    loaded = tiny.loaded("llama")
    names = (*TASKS, "icl_antonym")
    first = dataclasses.replace(SPEC, tasks=names[:2], out=tmp_path, grid_order="mean", random_orders=0)
    run_study(first, loaded=loaded)
    folder = run_study(dataclasses.replace(first, tasks=names[2:]), loaded=loaded)
    study = hc.open_study(folder)
    common = study.curves().query("order == 'common'")
    assert len(set(common["task"])) == 2, "those of one set"
    assert "mean" not in set(common["scope"])
    assert "One order for all tasks is measured on 2 of 4 tasks" in " ".join(cautions(study))
    whole = run_study(dataclasses.replace(first, tasks=names), loaded=loaded)
    alone = run_study(dataclasses.replace(first, tasks=names, out=tmp_path / "alone"), loaded=loaded)
    for table in ("grid", "curves"):
        found, expected = (getattr(hc.open_study(at), table)() for at in (whole, alone))
        pd.testing.assert_frame_equal(found, expected)


def test_numbers_of_documents_are_whole_in_the_table(tmp_path: Path) -> None:
    study = hc.open_study(synthetic.write(tmp_path, shots=(5,)))
    rows = study.free_fractions().assign(next_verdict="unknown", next_documents=25414.0, documents=400)
    assert {_next(row) for _, row in rows.iterrows()} == {"cannot tell (about 26,000 would)"}
    assert _next(rows.iloc[0].replace({25414.0: np.inf})) == "cannot tell"


def test_a_bound_that_rounds_to_the_margin_shows_that_it_is_not_it() -> None:
    assert words.bounds(-0.0197, 0.004, 0.02) == "\N{MINUS SIGN}1.97 to +0.4"
    assert words.bounds(-0.017, 0.0, 0.02) == "\N{MINUS SIGN}1.7 to 0.0"


def test_the_grid_frames_nothing_of_a_task_that_is_not_shown_to_be_above_chance() -> None:
    label = {"task": "red", "num_fewshot": 5, "split": "evaluation", "doc_id": np.arange(400), "num_options": 4,
             "passage": np.arange(400), "order_seed": -1, "donor_scope": "own", "donor": "",
             "heads_removed": 1, "ffns_removed": 1,
             "parameters_removed": 1, "correct": (np.arange(400) < 200).astype(float)}
    rows = pd.concat([pd.DataFrame({**label, "component": c, "order": o, "fraction": f, "ffn_fraction": f})
                      for c, o, f in (("none", "none", 0.0), ("both", "grid", 0.2))])
    for above in (True, False):
        grid = grid_table(rows, 0.02, 100, {}, {("red", 5): above})
        assert grid["within_margin"].tolist() == [above, above]
        assert set(grid["verdict"]) == {"within" if above else "unknown"}
