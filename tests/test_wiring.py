"""What was asked reaches what is measured, and what was measured reaches what is said: masks, seeds, passages, bounds.

The parts are tested elsewhere; here every mask, score and bound of a study is made again from its own ingredients.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import headcount as hc
import synthetic_study as synthetic
import tiny
from headcount.analysis.curves import curve_table, free_table
from headcount.analysis.grid import grid_table
from headcount.analysis.points import Points, Removed, compared
from headcount.engine.encode import Request, encode
from headcount.engine.engine import Engine
from headcount.engine.forward import plain_loglikelihoods
from headcount.engine.pack import Budget, batches, pack
from headcount.masks import Component, Mask, prune, random_order, removal_order
from headcount.measure.evaluate import evaluate
from headcount.measure.importance import gradient_importance
from headcount.measure.resampling import halves, resampled, standard_error
from headcount.report.curve_parts import curve_sentence
from headcount.report.importance import ranking
from headcount.stats import ranks
from headcount.stats.intervals import Sample, difference_interval
from headcount.stats.paired import mcnemar
from headcount.study.codec import resampled_from, stored_order
from headcount.study.ledger import Ledger
from headcount.study.masksets import aggregate_order
from headcount.study.plan import TaskFacts, plan
from headcount.study.runner import run_study
from headcount.study.spec import PRESETS, StudySpec
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks

TASKS, UNSEEN = ("icl_plural", "icl_gerund", "icl_agent"), "icl_antonym"
SPEC = StudySpec("tiny", tasks=TASKS, unseen=(UNSEEN,), shots=(0, 1), limit=6, importance_limit=8, fractions=(0.5,),
                 grid_fractions=(0.25, 0.75), transfer_fractions=(0.5, 0.75), transfer_components=("head", "ffn"),
                 measure=("curves", "grid", "transfer"))


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    asked = dataclasses.replace(SPEC, out=tmp_path_factory.mktemp("wiring") / "study")
    return Ledger(run_study(asked, loaded=tiny.loaded("llama")))


def importance_by(ledger: Ledger) -> dict[tuple[str, int, str], pd.DataFrame]:
    return {(e.job["task"], e.job["num_fewshot"], e.job["method"]): e.table for e in ledger.entries("importance")}


def mean_order(tables: list[pd.DataFrame], component: Component) -> list[int]:
    """The order of the mean of scores: of the paper's own for heads, of log-likelihood lost for FFNs."""
    kinds = ("example",) if component == "head" else ("gold_loglikelihood",)
    return removal_order(*(np.mean([t[(t["component"] == component) & (t["score"] == kind)]["importance"].to_numpy()
                                    for t in tables], axis=0) for kind in kinds))


def test_every_mask_of_transfer_and_of_the_grid_is_that_of_the_orders_it_names(ledger: Ledger) -> None:
    known, heads = importance_by(ledger), tiny.loaded("llama").anatomy.heads_per_layer
    seen = set()
    for entry in ledger.entries("evaluation"):
        task, k, curve = entry.job["task"], entry.job["num_fewshot"], entry.job["curve"]
        if curve["order"] in ("transfer", "common"):
            component, donor = curve["component"], curve.get("donor", "mean")
            method = "gradient" if component == "head" else "oracle"
            members = {"mean": TASKS, "mean without own": [t for t in TASKS if t != task], "own": [task]}
            order = mean_order([known[t, k, method] for t in members.get(donor, [donor])], component)
            expected = [prune(heads, component, order, f) for f in curve["fractions"]]
            donor = curve.get("donor", "common")
        elif curve["order"] == "grid":
            component, donor = "both", ""
            own = {c: mean_order([known[task, k, m]], c) for c, m in (("head", "gradient"), ("ffn", "oracle"))}
            expected = [Mask(prune(heads, "head", own["head"], h).heads, prune(heads, "ffn", own["ffn"], f).ffns)
                        for h, f in curve["points"]]
        else:
            continue
        seen |= {(task, k, component, donor)}
        assert [label["mask"] for label in entry.info["masks"]] == [mask.to_json() for mask in expected], entry.job
    others = (*TASKS, "mean", "mean without own", "own", "common")
    donors = [d for t in TASKS for d in [(t, o) for o in others if o != t]]
    assert seen == {(t, k, c, d) for k in (0, 1) for c in ("head", "ffn") for t, d in [*donors, (UNSEEN, "mean")]} | {
        (t, k, "both", "") for t in TASKS for k in (0, 1)}


def test_points_that_curves_measure_are_planned_once() -> None:
    facts = [TaskFacts(name, name, {0: 9}, {0: 9}) for name in TASKS]
    asked = dataclasses.replace(SPEC, shots=(0,), unseen=(), fractions=(0.25, 0.5, 0.75))
    for parts, points, own in ((("evaluate", "heads", "ffns", "curve", "grid", "transfer"), 4, False),
                               (("grid", "transfer"), 8, True)):
        jobs = plan(asked, "model", (4, 4, 4), facts, parts)  # type: ignore[arg-type]
        grid = [j.key["curve"]["points"] for j in jobs if j.key.get("curve", {}).get("order") == "grid"]
        assert [len(p) for p in grid] == [points] * 3
        assert any(j.key.get("curve", {}).get("donor") == "own" for j in jobs) == own


def test_scores_orders_and_seeds_are_those_that_were_asked_for(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    asked = StudySpec("tiny", tasks=("icl_plural",), shots=(1,), limit=5, importance_limit=6, fractions=(0.5,), seed=7,
                      head_score="example", ffn_order="gradient", random_orders=2, out=tmp_path / "study")
    study = hc.open_study(run_study(asked, loaded=loaded))
    task, heads = get_tasks(["icl_plural"])["icl_plural"], loaded.anatomy.heads_per_layer
    found = gradient_importance(loaded, task, FewShot(1, 6, seed=7))
    masks = {}
    for component, n in (("head", 12), ("ffn", 3)):
        own = removal_order(found[component].scores["example"])
        for order, places in {("gradient", -1): own, ("random", 7): random_order(n, 7),
                              ("random", 8): random_order(n, 8)}.items():
            masks[component, *order] = prune(heads, component, places, 0.5)  # type: ignore[arg-type]
    rows = study.evaluations().query("fraction == 0.5").set_index(["component", "order", "order_seed"])
    assert set(rows.index) == set(masks)
    for key, mask in masks.items():
        direct = evaluate(loaded, task, [mask], num_fewshot=1, limit=5, seed=7)
        np.testing.assert_allclose(rows.loc[[key], "gold_loglikelihood"], direct.gold_loglikelihood[0], atol=1e-5)
    random = study.curves().query("component == 'head' and order == 'random' and fraction == 0.5").iloc[0]
    both = rows.loc[[("head", "random", 7), ("head", "random", 8)]].groupby("doc_id")["correct"].mean()
    assert random["accuracy"] == pytest.approx(both.mean())
    assert not study.tie_scores
    assert study.ordering_scores == {"head": "example", "ffn": "example"}


STORIES = [f"{who} went to the {place} with a red umbrella, met four old friends there, and stayed until evening."
           for who, place in (("Anna", "harbour"), ("The miller", "old theatre"), ("Our dog", "station"))]


def stories(folder: Path) -> str:
    """Three stories, with four questions each."""
    docs = [{"context": f"{story} {question}", "options": [" yes", " no"], "gold": i % 2}
            for story in STORIES for i, question in enumerate(("Late?", "Alone?", "Raining?", "Happy?"))]
    for split in ("train", "validation"):
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, docs)))
    return str(folder)


def test_passages_reach_evaluations_importance_and_entries(tmp_path: Path) -> None:
    loaded, place = tiny.loaded("llama"), stories(tmp_path / "stories")
    task = get_tasks([place])["stories"]
    passages = np.repeat(np.arange(3), 4)
    measured = evaluate(loaded, task)
    assert measured.passages is not None
    assert measured.passages.tolist() == passages.tolist()
    prompts = task.prompts("examples")
    requests = encode(loaded.tokenizer, [p.pairs[p.gold] for p in prompts], loaded.max_length)
    heads, _ = Engine.of(loaded).gradients(requests)
    found = gradient_importance(loaded, task, FewShot())["head"]
    np.testing.assert_allclose(found.stderrs["position"], standard_error(heads[0], passages), rtol=1e-3)
    ids = np.array([p.doc_id for p in prompts], np.int64)
    np.testing.assert_allclose(found.halves["position"], halves(heads[0], passages, ids, name="stories"), rtol=1e-3)
    np.testing.assert_allclose(found.resampled["position"], resampled(heads[0], passages, ids, name="stories"),
                               rtol=1e-3)
    asked = StudySpec("tiny", tasks=(place,), shots=(0,), fractions=(0.5,), out=tmp_path / "study")
    study = hc.open_study(run_study(asked, loaded=loaded))
    assert study.evaluations()["passage"].nunique() == 3
    entry = next(e for e in Ledger(study.folder).entries("importance") if e.job["method"] == "gradient")
    rows = entry.table.query("component == 'head' and score == 'position'")
    np.testing.assert_allclose(rows[["first_half", "second_half"]].to_numpy().T, found.halves["position"], rtol=1e-5)
    steps = np.abs(found.resampled["position"] - found.scores["position"]).max(0) / 127
    assert (np.abs(resampled_from(rows) - found.resampled["position"]) <= steps + 1e-12).all()


def points(values: dict[Any, np.ndarray], full: np.ndarray, passages: np.ndarray | None = None) -> Points:
    own = np.arange(len(full)) if passages is None else passages
    return Points(full, own, 0.25, values, {key: of_key[None] for key, of_key in values.items()},
                  {key: Removed(2, 2, 10) for key in values})


def test_intervals_and_tests_take_passages_together() -> None:
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(25), 4)
    tasks = []
    for _ in range(2):
        full = np.repeat(rng.random(25) < 0.8, 4).astype(float)
        pruned = np.where(np.repeat(rng.random(25) < 0.3, 4), 1 - full, full)
        tasks.append(points({"x": pruned}, full, owners))
    found = compared(tasks, ["x"])
    apart = [dataclasses.replace(t, passages=np.arange(100)) for t in tasks]
    alone = compared(apart, ["x"])["x"]
    # Of each passage one document, as all of it changes together: a sample of 25.
    whole = [Sample((t.values["x"] - t.full).reshape(25, 4)[:, :1].T) for t in tasks]
    expected = difference_interval(whole)
    assert [found["x"].difference_low, found["x"].difference_high] == pytest.approx(
        [expected.low[0], expected.high[0]], abs=0.03)
    assert found["x"].difference_low < alone.difference_low - 0.03
    assert found["x"].difference_high > alone.difference_high + 0.03
    changes = [(t.values["x"] - t.full).reshape(25, 4).sum(1) for t in tasks]
    fell, rose = (sum(int((c * sign > 0).sum()) for c in changes) for sign in (-1, 1))
    full, pruned = np.zeros(fell + rose), np.r_[-np.ones(fell), np.ones(rose)][None]
    assert found["x"].p == pytest.approx(float(mcnemar(full, pruned)[0])), "50 passages, not 25 and not 200"


def two_steps() -> dict[int, dict[str, Points]]:
    """100 documents: without some four fall and four rise; without more sixty fall."""
    full = (np.arange(100) < 80).astype(float)
    shuffled, fallen = full.copy(), full.copy()
    shuffled[:4], shuffled[-4:], fallen[:60] = 0, 1, 0
    values: dict[Any, np.ndarray] = {("head", "gradient", 0.1): shuffled, ("head", "gradient", 0.2): fallen}
    return {5: {"red": points(values, full)}}


@pytest.mark.parametrize(("margin", "free", "high"), [(0.02, 0.0, 0.1), (0.1, 0.1, 0.1)])
def test_the_free_fraction_is_of_lower_bounds_and_of_the_margin_asked_for(
    margin: float, free: float, high: float
) -> None:
    table = two_steps()
    curves = curve_table(table, 1000, margin)
    step = curves[curves["fraction"] == 0.1].iloc[0]
    assert -0.1 < step["difference_low"] < -0.02 < step["difference"] < step["difference_high"]
    found = free_table(curves, table, margin, {("red", 5): True}).iloc[0]
    assert (found["free_fraction"], found["free_high"]) == (free, high)


def test_p_values_of_curves_are_corrected_for_their_steps() -> None:
    p = curve_table(two_steps(), 1000, 0.02).set_index("fraction")["p"]
    assert np.isnan(p[0.0])
    assert p[0.1] == 1
    assert p[0.2] == pytest.approx(2 * (2 * 0.5**60), rel=1e-6, abs=0)


@pytest.mark.parametrize(("margin", "within"), [(0.04, [True, True, False, False]), (0.1, [True, True, True, False])])
def test_cells_are_within_the_margin_by_their_lower_bounds(margin: float, within: list[bool]) -> None:
    full = (np.arange(100) < 80).astype(float)
    mixed, fallen = full.copy(), full.copy()
    mixed[:4], mixed[-4:], fallen[:10] = 0, 1, 0
    label = {"task": "red", "num_fewshot": 5, "split": "evaluation", "doc_id": np.arange(100),
             "passage": np.arange(100), "gold": np.arange(100) % 4, "num_options": 4, "job": 0, "members": 0,
             "order_seed": -1, "donor_scope": "own", "donor": ""}
    frames = [pd.DataFrame({**label, "component": "none", "order": "none", "fraction": 0.0, "ffn_fraction": 0.0,
                            "correct": full, "heads_removed": 0, "ffns_removed": 0, "parameters_removed": 0})]
    for h, f, correct in ((0.2, 0.2, full), (0.2, 0.4, mixed), (0.4, 0.4, fallen)):
        frames.append(pd.DataFrame({**label, "component": "both", "order": "grid", "fraction": h, "ffn_fraction": f,
                                    "correct": correct, "heads_removed": 5, "ffns_removed": 6,
                                    "parameters_removed": 100}))
    grid = grid_table(pd.concat(frames), margin, 1000, {"red": 0.3}, {("red", 5): True})
    assert grid["within_margin"].tolist() == within
    assert grid["difference"].round(6).tolist() == [0, 0, 0, -0.1]
    assert grid["parameters_removed_share"].tolist() == [0, 0.1, 0.1, 0.1]
    assert (grid["baseline"] == 0.3).all()


def test_halves_and_draws_of_entries_reach_the_correlations(ledger: Ledger) -> None:
    table = hc.open_study(ledger.folder).correlations().query("component == 'head'")
    known = importance_by(ledger)

    def rows(task: str, k: int) -> pd.DataFrame:
        of_key: pd.DataFrame = known[task, k, "gradient"].query("component == 'head' and score == 'example'")
        return of_key

    def one(a: tuple[str, int], b: tuple[str, int], kind: str) -> pd.Series:
        found = table.query("task == @a[0] and num_fewshot == @a[1] and other_task == @b[0] and other_shots == @b[1] "
                            "and kind == @kind")
        assert len(found) == 1
        return found.iloc[0]

    x, y = (TASKS[0], 0), (TASKS[1], 0)
    for a, b, kind in ((x, y, "tasks"), (x, (TASKS[0], 1), "shots")):
        left, right = rows(*a), rows(*b)
        rho = ranks.spearman(left["importance"].to_numpy(), right["importance"].to_numpy())
        draws = np.array([ranks.spearman(p, q) for p, q in zip(resampled_from(left), resampled_from(right),
                                                                strict=True)])
        found = one(a, b, kind)
        assert found["correlation"] == pytest.approx(rho)
        assert (found["low"], found["high"]) == pytest.approx(ranks.document_interval(rho, draws, len(left)))
    own = rows(*x)
    split = ranks.spearman(own["first_half"].to_numpy(), own["second_half"].to_numpy())
    assert split < 1
    assert one(x, x, "reliability")["correlation"] == pytest.approx(ranks.reliability(split))


def test_the_models_own_answer_is_greedy_and_another_is_not() -> None:
    loaded = tiny.loaded("gpt2")
    start = loaded.tokenizer("Count the red cats")["input_ids"]
    ids = list(start)
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    answer = Request(np.array(ids[:-1]), np.array(ids[len(start):]))
    changed = answer.targets.copy()
    changed[-1] = (changed[-1] + 1) % 1000
    other = Request(answer.ids, changed)
    for trees in (True, False):
        packed = list(batches(pack([[answer, other]], Budget(64, 64), trees=trees), Budget(64, 64)))
        _, greedy = plain_loglikelihoods(loaded, packed, 2)
        assert greedy.astype(bool).tolist() == [True, False]


def test_importance_reads_prompts_in_the_chat_template() -> None:
    raw = tiny.loaded("llama")
    chat = dataclasses.replace(raw, apply_chat_template=True)
    task = get_tasks(["icl_plural"])["icl_plural"]
    prompts = task.prompts("examples", FewShot(1, 4), chat=chat.chat)
    assert prompts[0].pairs[0][0].count("<|im_start|>user") == 2
    requests = encode(raw.tokenizer, [p.pairs[p.gold] for p in prompts], raw.max_length)
    found = gradient_importance(chat, task, FewShot(1, 4))["head"].scores["position"]
    np.testing.assert_allclose(found, Engine.of(raw).gradients(requests).heads[0].mean(0), rtol=1e-3)
    plain = gradient_importance(raw, task, FewShot(1, 4))["head"].scores["position"]
    assert np.abs(plain - found).max() > 1e-3 * found.max()


def test_margins_are_to_the_best_of_several_other_options() -> None:
    loaded, task = tiny.loaded("opt"), get_tasks(["icl_plural"])["icl_plural"]
    measured = evaluate(loaded, task, limit=5)
    for i, prompt in enumerate(task.prompts("evaluation", FewShot(limit=5))):
        requests = encode(loaded.tokenizer, list(prompt.pairs), loaded.max_length)
        scores = []
        for request in requests:
            with torch.no_grad():
                logprobs = loaded.model(torch.from_numpy(request.ids)[None]).logits[0].float().log_softmax(-1)
            scores.append(float(logprobs[request.scored, request.targets].sum()))
        assert len(scores) == 4
        best = max(score for j, score in enumerate(scores) if j != prompt.gold)
        assert measured.margin[0, i] == pytest.approx(scores[prompt.gold] - best, abs=2e-4)


def tied(folder: Path, protocol: str = "sound") -> hc.Study:
    """A study whose FFN oracles found two accuracies; log-likelihood goes the other way than layers."""
    ledger = Ledger(synthetic.write(folder, shots=(5,)))
    description = json.loads((folder / "study.json").read_text())
    description["spec"]["protocol"] = protocol
    ledger.write_json("study.json", description)
    for entry in list(ledger.entries("importance")):
        if entry.job["method"] == "oracle":
            ledger.path(entry.job).unlink()
            accuracy, second = [0.0, 0.0, 0.0, 0.1, 0.1, 0.1], [3.0, 2.0, 1.0, 6.0, 5.0, 4.0]
            table = pd.concat([pd.DataFrame({"component": "ffn", "layer": range(6), "head": -1, "score": score,
                                             "importance": values, "stderr": 0.01})
                               for score, values in (("accuracy", accuracy), ("gold_loglikelihood", second))])
            ledger.write(entry.job, table, entry.info)
    return hc.open_study(folder)


@pytest.mark.parametrize(("protocol", "order"), [("sound", [2, 1, 0, 5, 4, 3]), ("paper", [0, 1, 2, 3, 4, 5])])
def test_ffns_of_equal_accuracy_are_ranked_as_they_are_pruned(tmp_path: Path, protocol: str, order: list[int]) -> None:
    study = tied(tmp_path, protocol)
    oracle = next(e.table for e in Ledger(tmp_path).entries("importance") if e.job["method"] == "oracle")
    score = None if protocol == "sound" else "accuracy"
    assert stored_order(oracle, "ffn", score) == order
    assert aggregate_order([oracle, oracle], "ffn", score) == order
    assert ranking(study, "ffn")["layer"].tolist() == order[::-1]


def test_top_sets_of_ffns_are_those_that_pruning_keeps_longest(tmp_path: Path) -> None:
    ledger = Ledger(tied(tmp_path).folder)
    (green,) = (e for e in ledger.entries("importance") if e.job["method"] == "oracle" and e.job["task"] == "green")
    other = green.table.assign(importance=[0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    ledger.path(green.job).unlink()
    ledger.write(green.job, other, green.info)
    found = hc.open_study(tmp_path).top_sets().query("component == 'ffn'").set_index("fraction")
    assert found.loc[0.2, ["size", "common"]].tolist() == [1, 0], "L3 of one task, L5 of the other"
    (tmp_path / "paper").mkdir()
    paper = tied(tmp_path / "paper", "paper").top_sets().query("component == 'ffn'").set_index("fraction")
    assert paper.loc[0.2, "common"] == 1


@pytest.mark.parametrize(("random", "said"), [
    (30, "shown to be better than a random one"), (78, "not shown to be better than a random one, nor worse"),
    (99, "shown to be worse than a random one")])
def test_a_curve_is_told_beside_a_random_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random: int, said: str
) -> None:
    right = {**synthetic.RIGHT, ("head", "random"): (80, random, random, random)}
    monkeypatch.setattr(synthetic, "RIGHT", right)
    folder = synthetic.write(tmp_path, tasks=("red",))
    one = curve_sentence(hc.open_study(folder), "head")
    assert "one draw cannot tell whether that is more than chance" in one
    ledger = Ledger(folder)
    for entry in list(ledger.entries("evaluation")):
        if entry.job["curve"].get("order") == "random":  # two more draws, a document or two apart
            for seed, away in ((8, 1), (9, 2)):
                table = entry.table.assign(correct=np.where(entry.table["doc_id"] < away, 0.0, entry.table["correct"]))
                masks = [{**mask, "order_seed": seed} for mask in entry.info["masks"]]
                job = {**entry.job, "curve": {**entry.job["curve"], "order_seed": seed}}
                ledger.write(job, table, {**entry.info, "masks": masks})
    text = curve_sentence(hc.open_study(folder), "head")
    assert "With 5 shots and 50 % of the attention heads removed, the measured order leaves 0.80" in text
    assert said in text
    assert f"3 random orders 0.{random - 1} on average (single draws 0.{random - 2} to 0.{random})" in text


def test_induction_heads_are_those_high_on_both_scores(tmp_path: Path) -> None:
    ledger = Ledger(synthetic.write(tmp_path, shots=(5,)))
    layer, head = np.divmod(np.arange(24), 4)
    for weights, copying in (("trained", [0.5, 0.1, 0.5, *[0.0] * 21]), ("random", [0.2, *[0.1] * 23])):
        prefix = [0.9, 0.9, 0.2, *[0.0] * 21] if weights == "trained" else [0.0] * 24
        table = pd.DataFrame({"layer": layer, "head": head, "prefix_matching": prefix, "copying": copying,
                              "previous_token": 0.0, "ov_copying": 0.0, "prefix_matching_variance": 0.0,
                              "copying_variance": 0.0, "previous_token_variance": 0.0})
        ledger.write({"kind": "induction", "protocol": "sound", "model": "abc", "weights": weights, "seeds": 14,
                      "seed": 1}, table, {"sequences": 98, "lengths": [25], "repeats": 4, "reliability": {},
                                          "notes": []})
    study = hc.open_study(tmp_path)
    assert study.induction_thresholds == {"prefix_matching": 0.3, "copying": 0.2}
    found = study.induction()
    assert found[found["induction"]][["weights", "layer", "head"]].to_numpy().tolist() == [["trained", 0, 0]]
    among = study.induction_among_important()
    assert set(among["induction_heads"]) == {1}
    assert set(among["common"]) == {0}, "L0H0 is planted as the least important head"


def test_the_control_is_the_same_model_with_random_weights(tmp_path: Path) -> None:
    from headcount.measure.control import randomised
    from headcount.measure.induction import induction_scores

    loaded = tiny.loaded("llama")
    asked = StudySpec("tiny", tasks=(), measure=("induction",), induction_seeds=1, seed=5, out=tmp_path / "study")
    found = hc.open_study(run_study(asked, loaded=loaded)).induction()
    for weights, model in (("trained", loaded), ("random", randomised(loaded, 5))):
        direct = induction_scores(model, seeds=1, seed=5)
        rows = found[found["weights"] == weights]
        np.testing.assert_allclose(rows["copying"], direct.copying, atol=1e-6)
        np.testing.assert_allclose(rows["prefix_matching"], direct.prefix_matching, atol=1e-6)
    apart = found.pivot_table(index=["layer", "head"], columns="weights", values="copying")
    assert (apart["trained"] != apart["random"]).all()


def test_distinct_values_of_an_oracle_are_those_of_accuracy(ledger: Ledger) -> None:
    oracles = [e for e in ledger.entries("importance") if e.job["method"] == "oracle"]
    assert len(oracles) == 6
    for entry in oracles:
        accuracy = entry.table[entry.table["score"] == "accuracy"]["importance"]
        assert entry.info["distinct_values"] == accuracy.nunique()


def test_entries_of_another_version_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headcount.study import ledger as room

    folder = synthetic.write(tmp_path, shots=(5,))
    assert len(hc.open_study(folder).curves())
    monkeypatch.setattr(room, "FORMAT", room.FORMAT + 1)
    assert hc.open_study(folder).curves().empty


def test_importance_over_tasks_is_the_mean_and_the_mean_of_ranks(ledger: Ledger) -> None:
    known, found = importance_by(ledger), hc.open_study(ledger.folder).aggregate_importance()
    for component, method, score in (("head", "gradient", "example"), ("ffn", "oracle", "gold_loglikelihood")):
        tables = [known[task, 1, method] for task in TASKS]
        rows = [t[(t["component"] == component) & (t["score"] == score)] for t in tables]
        values = np.stack([r["importance"].to_numpy() for r in rows])
        of_score = found[(found["component"] == component) & (found["score"] == score) & (found["num_fewshot"] == 1)]
        for name, how in (("mean", "mean"), ("mean of ranks", "ranks")):
            of_name = of_score[of_score["scope"] == name].reset_index(drop=True)
            order = aggregate_order(tables, component, score, how)
            assert of_name.sort_values("rank", ascending=False).index.tolist() == order, "as pruned"
            assert of_name["method"].eq(method).all()
        mean = of_score[of_score["scope"] == "mean"].reset_index(drop=True)
        np.testing.assert_allclose(mean["importance"], values.mean(axis=0))
        np.testing.assert_allclose(mean["stderr"], np.sqrt(sum(r["stderr"].to_numpy() ** 2 for r in rows)) / 3)
        if component == "head":
            draws = np.mean([resampled_from(r) for r in rows], axis=0)
            for i, row in mean.iterrows():
                apart = [values.mean(axis=0)[i] - values.mean(axis=0)[j] for j in range(len(mean))]
                reach = [1.959964 * np.std(draws[:, i] - draws[:, j], ddof=1) for j in range(len(mean))]
                shown = [abs(d) > r for d, r in zip(apart, reach, strict=True)]
                assert row["rank_low"] == 1 + sum(s and d < 0 for s, d in zip(shown, apart, strict=True))
                assert row["rank_high"] == len(mean) - sum(s and d > 0 for s, d in zip(shown, apart, strict=True))


def test_defaults_are_those_that_are_promised() -> None:
    spec = StudySpec("tiny", tasks=TASKS)
    assert spec.grid_fractions == (0.2, 0.4, 0.6, 0.8)
    assert spec.transfer_fractions == (0.3, 0.5, 0.7)
    assert PRESETS["opt66b-study"]["grid_fractions"] == [i / 10 for i in range(1, 10)]
