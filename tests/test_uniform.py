"""Curves whose masks leave every layer the same shape: against brute force, in jobs, in tables, in words."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import headcount as hc
import tiny
from headcount.analysis.uniform import UNIFORM_COST
from headcount.errors import ModelError, OptionError
from headcount.masks import Mask, prune
from headcount.report.curves import sections, tables, task_curves
from headcount.report.headline import headline
from headcount.report.headline import sections as first_sections
from headcount.report.uniform import uniform_sentence
from headcount.study.check import check
from headcount.study.jobs import Evaluation, job_from, name_of
from headcount.study.ledger import Ledger
from headcount.study.masksets import CommonUniformCurve, UniformCurve, steps_of
from headcount.study.plan import PlannedJob, TaskFacts, missing, plan
from headcount.study.prepare import prepare
from headcount.study.runner import run_study
from headcount.study.shapes import Shape, shape_of, shares, uniform_mask
from headcount.study.spec import StudySpec
from headcount.terminal import Asked, print_curves

TENTHS = tuple(n / 10 for n in range(1, 10))


def importance_of(scores: np.ndarray, score: str = "example") -> pd.DataFrame:
    """A table of importance, as an entry holds it, from scores by layer and head."""
    return pd.DataFrame([{"component": "head", "layer": layer, "head": head, "score": score, "importance": value}
                         for (layer, head), value in np.ndenumerate(scores)])


def by_brute_force(scores: np.ndarray, groups: int, kept: int) -> list[list[bool]]:
    """The heads that stay, by trying every shape, every set of groups and every set of heads in each."""
    best: tuple[float, int, list[list[bool]]] | None = None
    width = scores.shape[1] // groups
    for g, h in itertools.product(range(1, groups + 1), range(1, width + 1)):
        if g * h != kept:
            continue
        layers, lost = [], 0.0
        for of_layer in scores:
            by_group = of_layer.reshape(groups, width)
            stay = max(itertools.combinations(range(groups), g), key=lambda some: by_group[list(some)].sum())
            row = [False] * len(of_layer)
            for group in stay:
                heads = max(itertools.combinations(range(width), h),
                            key=lambda some, of=by_group[group]: of[list(some)].sum())  # type: ignore[misc]
                for head in heads:
                    row[group * width + head] = True
            layers.append(row)
            lost += float(of_layer[~np.array(row)].sum())
        if best is None or (lost, g) < best[:2]:
            best = lost, g, layers
    assert best is not None
    return best[2]


@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (8, 2), (8, 8), (6, 1), (12, 4)])
def test_the_least_important_shape_is_that_of_brute_force(heads: int, groups: int) -> None:
    full = Shape(groups, heads // groups)
    for seed in range(8):
        scores = np.random.default_rng(seed).exponential(size=(3, heads))
        curve = UniformCurve(component="head", fractions=shares(TENTHS, full), groups=groups, importance="x",
                             score="example")
        for mask, label in curve.masks((heads,) * 3, [importance_of(scores)]):
            kept = round(heads * (1 - label.fraction))
            assert [layer.tolist() for layer in mask.heads] == by_brute_force(scores, groups, kept)
            assert mask.ffns.all()
            assert len(mask.heads_removed) == len(prune((heads,) * 3, "head", range(3 * heads),
                                                        label.fraction).heads_removed), "a free-form one is beside it"
            each = np.stack(mask.heads).reshape(3, groups, -1).sum(axis=2)
            assert len({tuple(sorted(row)) for row in each.tolist()}) == 1
            assert len({*each.reshape(-1).tolist()} - {0}) == 1
            assert label.order == "uniform"


def test_the_common_curve_goes_by_the_mean_of_scores_or_of_ranks() -> None:
    rng = np.random.default_rng(0)
    tasks = [rng.exponential(size=(3, 9)), 100 * rng.exponential(size=(3, 9))]
    ranks = [np.argsort(np.argsort(one.reshape(-1))).reshape(3, 9).astype(float) for one in tasks]
    for how, scores in (("mean", tasks), ("ranks", ranks)):
        curve = CommonUniformCurve(component="head", fractions=(4 / 9 + 1 / 9, 2 / 3), groups=3, importance=("x", "y"),
                                   score="example", aggregate=how)
        masks = curve.masks((9, 9, 9), [importance_of(one) for one in tasks])
        assert [[layer.tolist() for layer in mask.heads] for mask, _ in masks] == [
            by_brute_force(np.mean(scores, axis=0), 3, kept) for kept in (4, 3)], how


@pytest.mark.parametrize(("full", "expected"), [
    (Shape(3, 3), [3, 5, 6, 7, 8]),  # SmolLM2: what is left is 6, 4, 3, 2 or 1 of 9 heads
    (Shape(9, 1), [1, 2, 3, 4, 5, 6, 7, 8]),
    (Shape(1, 4), [1, 2, 3]),
    (Shape(2, 2), [2, 3]),
])
def test_a_curve_has_the_shares_that_shapes_have(full: Shape, expected: Sequence[int]) -> None:
    found = shares(tuple(n / 100 for n in range(1, 100)), full)
    assert found == tuple(n / full.heads for n in expected)


def test_each_fraction_has_the_largest_share_that_does_not_exceed_it() -> None:
    assert shares((0.4, 0.7), Shape(3, 3)) == (1 / 3, 2 / 3)
    assert shares((0.34, 0.5), Shape(3, 3)) == (1 / 3,)
    assert shares((0.1, 0.3), Shape(10, 1)) == (0.1, 0.3), "rounding costs no step"
    with pytest.raises(OptionError, match=r"removes as little as fractions ask for \(0.3 at most\): the smallest share "
                                          r"that one removes is 0.333"):
        shares((0.1, 0.3), Shape(3, 3))
    with pytest.raises(OptionError, match="a layer of one head"):
        shares((0.5,), Shape(1, 1))


def test_equal_heads_go_in_their_order_and_of_equal_shapes_that_of_fewer_groups() -> None:
    mask = uniform_mask(0.5, Shape(2, 2), [np.ones(8)])
    assert [layer.tolist() for layer in mask.heads] == [[False, False, True, True]] * 2
    # The second scores decide where the first are equal.
    mask = uniform_mask(0.5, Shape(2, 2), [np.ones(8), np.array([4.0, 1, 1, 4, 1, 4, 4, 1])])
    assert [layer.tolist() for layer in mask.heads] == [[True, False, False, True], [False, True, True, False]]


@pytest.mark.parametrize(("heads", "groups"), [((4, 4), (2, 4)), ((4, 6), (2, 2)), ((4, 0), (2, 0)), ((), ())])
def test_a_model_of_unlike_layers_is_refused_in_a_line(heads: tuple[int, ...], groups: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="uniform leaves every layer the same shape") as refused:
        shape_of(heads, groups)
    assert "--uniform" in refused.value.on_command_line()
    assert "\n" not in str(refused.value)


TINY = StudySpec("tiny", tasks=("icl_plural", "icl_gerund"), shots=(1,), limit=20, importance_limit=4,
                 ffn_order="gradient", fractions=(0.25, 0.5, 0.8), common_fractions=(0.5,), random_orders=1,
                 random_fractions=(0.5,))
FACTS = [TaskFacts("a", "fa", {1: 9}, {1: 12}), TaskFacts("b", "fb", {1: 7}, {1: 12})]


def jobs_of(**options: Any) -> list[PlannedJob]:
    spec = StudySpec("m", tasks=("a", "b"), **{"shots": (1,), "fractions": (0.4, 0.7), **options})
    return plan(spec, "model", (9, 9), FACTS, groups_per_layer=(3, 3))


def curves_of(jobs: Sequence[PlannedJob | None]) -> dict[tuple[str, str, str], list[float]]:
    """Fractions by task, order and component."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for one in jobs:
        if one is not None and isinstance(job := one.job, Evaluation) and hasattr(job.masks, "fractions"):
            key = job.task, job.masks.order, str(getattr(job.masks, "component", ""))
            found.setdefault(key, []).extend(steps_of(job.masks))
    return found


def test_uniform_curves_are_jobs_of_their_own_and_others_keep_their_names() -> None:
    without, asked = jobs_of(), jobs_of(uniform=True)
    names = {name_of(one.job): curve for one in without if (curve := one.key.get("curve", {}))}
    changed = [curve for name, curve in names.items() if name not in {name_of(one.job) for one in asked}]
    assert {(curve["order"], curve["component"]) for curve in changed} == {("gradient", "head"), ("common", "head")}
    assert not [one for one in without if "uniform" in str(one.key)], "without the option there is no word of it"
    found = curves_of(asked)
    thirds = [1 / 3, 2 / 3]
    for task in "ab":
        assert found[task, "uniform", "head"] == found[task, "uniform common", "head"] == thirds
        assert found[task, "gradient", "head"] == found[task, "common", "head"] == sorted([0.4, 0.7, *thirds])
        assert found[task, "oracle", "ffn"] == found[task, "common", "ffn"] == [0.4, 0.7], "FFNs are not of it"
    for one in asked:
        if isinstance(one.job, Evaluation):
            assert job_from(one.key) == one.job
    of_all = " ".join(name_of(one.job) for one in asked)
    assert (len(asked), hashlib.sha256(of_all.encode()).hexdigest()[:16]) == (42, "183899caedf8cdcd"), "these stay"
    shaped = next(one for one in asked if one.key.get("curve", {}).get("order") == "uniform")
    assert shaped.key["curve"]["groups"] == 3
    assert shaped.title == "a, 1-shot: heads in one shape, 33% to 67%"


def test_only_what_uniform_curves_add_is_measured_in_a_folder_that_has_the_others() -> None:
    measured = [one.job for one in jobs_of() if isinstance(one.job, Evaluation)]
    left = curves_of(missing([one for one in jobs_of(uniform=True) if one.job not in measured], measured))
    orders = ("gradient", "common", "uniform", "uniform common")
    assert left == {(task, order, "head"): [1 / 3, 2 / 3] for task in "ab" for order in orders}


@pytest.mark.parametrize(("options", "said"), [
    ({"fractions": (0.1, 0.3)}, "--fractions ask for (0.3 at most)"),
    ({"measure": ("grid",)}, "--uniform asks for curves: name them with --measure"),
])
def test_what_has_no_uniform_curve_is_refused_in_a_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as refused:
        jobs_of(uniform=True, **options)
    assert said in refused.value.on_command_line()


def test_a_model_of_unlike_layers_is_refused_before_it_is_timed() -> None:
    loaded = tiny.loaded("llama")
    first, *others = loaded.anatomy.layers
    unlike = dataclasses.replace(loaded.anatomy, layers=(dataclasses.replace(first, num_kv_heads=4), *others))
    with pytest.raises(ModelError, match=r"\(heads in KV groups: 4 in 2 and 4 in 4\)"):
        prepare(dataclasses.replace(TINY, uniform=True), loaded=dataclasses.replace(loaded, anatomy=unlike))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured as by an earlier version, then again by this one, and then with uniform curves."""
    spec = dataclasses.replace(TINY, out=tmp_path_factory.mktemp("study"))
    ledger = Ledger(run_study(spec, loaded=tiny.loaded("llama")))
    description = ledger.read_json("study.json") or {}
    for spec_of in (description["spec"], *(one["spec"] for one in description["asked"])):
        del spec_of["uniform"]
    del description["anatomy"]["kv_groups_per_layer"]
    ledger.write_json("study.json", description)
    hc.open_study(ledger.folder).curves()
    run_study(spec, loaded=tiny.loaded("llama"))
    assert len(hc.open_study(ledger.folder).description["asked"]) == 1, "it is the same request"
    return run_study(dataclasses.replace(spec, uniform=True), loaded=tiny.loaded("llama"))


def test_a_folder_of_before_shows_what_it_showed_and_says_what_is_otherwise(folder: Path) -> None:
    study = hc.open_study(folder)
    assert study.other_requests == ["1: no uniform"]
    before = hc.open_study(folder, asked=1)
    assert set(before.curves()["order"]) == {"gradient", "common", "random"}
    assert set(before.curves().query("order == 'gradient'")["fraction"]) == {0, 0.25, 0.5, 0.8}
    assert before.uniform_cost().empty
    assert not any("shape" in one.title for one in tables(before))
    assert check(folder).holds
    assert not prepare(dataclasses.replace(TINY, out=folder, uniform=True), loaded=tiny.loaded("llama")).todo()


def test_tables_have_uniform_curves_beside_free_form_ones(folder: Path) -> None:
    curves = hc.open_study(folder).curves().query("component == 'head' and scope == 'mean'")
    steps = {order: set(of_order["fraction"]) for order, of_order in curves.groupby("order")}
    assert steps["uniform"] == steps["uniform common"] == {0, 0.5, 0.75}
    assert steps["gradient"] == {0, 0.25, 0.5, 0.75, 0.8}
    assert steps["common"] == {0, 0.5, 0.75}
    at = curves[curves["fraction"] == 0.75].set_index("order")["removed"]
    assert set(at) == {9}
    free = hc.open_study(folder).free_fractions().query("component == 'head'")
    assert set(free["order"]) == {"gradient", "common", "uniform", "uniform common"}


def test_what_a_shape_costs_is_paired_document_by_document(folder: Path) -> None:
    study = hc.open_study(folder)
    rows = study.evaluations().query("split == 'evaluation' and component == 'head'")
    cost = study.uniform_cost()
    assert len(cost) == 2 * 2 * 3, "orders, steps, tasks and their mean"
    for row in cost.to_dict("records"):
        free_form = {"uniform": "gradient", "uniform common": "common"}[row["order"]]
        of_tasks = []
        for task in [row["task"]] if row["task"] else TINY.tasks:
            at = rows[(rows["task"] == task) & np.isclose(rows["fraction"], row["fraction"])]
            right = {order: at[at["order"] == order].set_index("doc_id")["correct"] for order in (
                row["order"], free_form)}
            of_tasks.append(right[row["order"]] - right[free_form])
        away = pd.concat(of_tasks)
        assert row["difference"] == pytest.approx(np.mean([one.mean() for one in of_tasks]))
        assert row["accuracy"] - row["free_form_accuracy"] == pytest.approx(row["difference"])
        assert (row["fell"], row["rose"], row["documents"]) == ((away < 0).sum(), (away > 0).sum(), len(away))
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert cost["changed"].sum() > 0, "the two curves differ"
    masks = {(e.job["task"], label["order"], label["fraction"]): Mask.from_json(label["mask"])
             for e in Ledger(folder).entries("evaluation") for label in e.info["masks"]}
    common = {masks[task, "uniform common", 0.75] for task in TINY.tasks}
    assert len(common) == 1, "one set for all tasks"


def test_the_report_and_the_terminal_say_what_a_shape_costs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = hc.open_study(folder)
    said = uniform_sentence(study.uniform_cost())
    assert said in next(one for one in sections(study) if one.name == "head_curves").caption
    assert "with 1 shot on the mean over tasks: by each task's own order" in said
    assert " at 50 %, " in said
    assert " at 75 %; by one order for all tasks " in said
    (table,) = (one for one in tables(study) if one.title == "Every layer of the same shape")
    assert len(table.rows) == 12
    drawn = json.dumps(task_curves(study.curves(), "head").to_dict())
    assert '"own order, one shape"' in drawn
    assert '"one order, one shape"' in drawn
    assert "square" in drawn
    assert "square" in json.dumps(next(first_sections(study)).page().to_dict())
    assert "one shape" not in json.dumps(task_curves(hc.open_study(folder, asked=1).curves(), "head").to_dict())
    assert any("every layer of the same shape" in one or "nothing can be said" in one for one in headline(study))
    print_curves(study, Asked(TINY.tasks, (1,)))
    printed = " ".join(capsys.readouterr().out.split())
    assert "heads in one shape" in printed
    assert "heads by one order, in one shape" in printed
    assert said in printed


def cost_of(*steps: tuple[str, float, float, float]) -> pd.DataFrame:
    """Rows of the mean over tasks: order, fraction, difference, p."""
    return UNIFORM_COST.frame([{
        "scope": "mean", "task": "", "num_fewshot": 5, "order": order, "fraction": fraction, "removed": 9,
        "difference": d, "difference_low": d - 0.01, "difference_high": d + 0.01, "p": p, "documents": 100,
        "changed": 9, "fell": 5, "rose": 4, "verdict": "unknown"} for order, fraction, d, p in steps])


def test_a_sentence_says_where_a_difference_is_shown() -> None:
    assert uniform_sentence(cost_of()) == ""
    said = uniform_sentence(cost_of(("uniform", 1 / 3, -0.02, 0.5), ("uniform", 2 / 3, -0.1, 0.001),
                                    ("uniform common", 1 / 3, 0.1, 0.01)))
    minus = "\N{MINUS SIGN}"
    assert (f"by each task's own order {minus}2.0 ({minus}3.0 to {minus}1.0) at 33.3 %, {minus}10.0 ({minus}11.0 to "
            f"{minus}9.0) at 66.7 %; by one order for all tasks +10.0 (+9.0 to +11.0) at 33.3 % (points") in said
    assert "It is shown to be worse at 66.7 % by each task's own order; better at 33.3 % by one order for all" in said
    alike = uniform_sentence(cost_of(*(("uniform", f, 0.0, 1.0) for f in (0.1, 0.2, 0.5, 0.7, 0.9))))
    assert "0.0 (\N{MINUS SIGN}1.0 to +1.0) at 10 %, " in alike
    assert " at 20 %" not in alike
    assert " at 50 %, " in alike
    assert "At no step these documents show a difference" in alike
