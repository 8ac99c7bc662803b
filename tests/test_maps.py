"""Figures of the whole analysis: they hold the planted numbers, and every shape of frame can be drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import vl_convert

import synthetic_frames as frames
from headcount.analysis.correlations import alike_together
from headcount.analysis.induction import induction_heads
from headcount.report.correlations import shots_dots, task_matrix
from headcount.report.grid import grid_map
from headcount.report.importance import depth_bars
from headcount.report.induction import _DOTS, _HEADS, _label_places, induction_maps, induction_scatter, retained_curves
from headcount.report.transfer import transfer_map, unseen_curves

ONE, TWO = frames.TASKS[:1], frames.TASKS[:2]


def drawn(chart: Any) -> dict[str, Any]:
    """The description of a figure, once Vega has drawn it."""
    spec: dict[str, Any] = chart.to_dict()
    assert "<svg" in vl_convert.vegalite_to_svg(spec)
    return spec


def rows_of(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every row of every data set of a figure."""
    for data in spec["datasets"].values():
        yield from data


def test_the_grid_says_accuracies_and_outlines_what_is_within_the_margin() -> None:
    grid = frames.grid(TWO, (0, 5))
    spec = drawn(grid_map(grid, choose=False))
    cells = [r for r in rows_of(spec) if r["outline"] is None]
    edges = [r for r in rows_of(spec) if r["outline"] is not None]
    assert {r["task"] for r in cells} == {"mean"}, "without a menu the mean alone is there"
    mean = grid[grid["scope"] == "mean"]
    at = {(r["shots"], r["x"] + 0.5, r["y"] + 0.5): r for r in cells}
    for k, words in ((0, "no shots"), (5, "5 shots")):
        of_k = mean[mean["num_fewshot"] == k]
        for _, row in of_k.iterrows():
            cell = at[words, frames.STEPS.index(row["heads_fraction"]), frames.STEPS.index(row["ffns_fraction"])]
            assert cell["accuracy"] == round(row["accuracy"], 4)
            assert cell["text"] == f"{row['accuracy']:.2f}".lstrip("0")
        within = of_k.set_index(["heads_fraction", "ffns_fraction"])["within_margin"]
        inside = {(frames.STEPS.index(h), frames.STEPS.index(f)) for (h, f), w in within.items() if w}
        beside = sum((x + a, y + b) not in inside for x, y in inside for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1)))
        assert sum(e["shots"] == words for e in edges) == beside, "a line on every border, and nowhere else"


def test_the_grid_of_the_page_has_a_menu_of_all_tasks() -> None:
    spec = drawn(grid_map(frames.grid(TWO, (5,)), choose=True))
    assert spec["params"][0]["bind"]["options"] == ["mean", *TWO]
    assert {r["task"] for r in rows_of(spec)} == {"mean", *TWO}


def test_a_grid_with_nothing_or_all_within_the_margin_is_drawn() -> None:
    grid = frames.grid(ONE, (5,))
    assert not [r for r in rows_of(drawn(grid_map(grid.assign(within_margin=False), choose=False)))
                if r.get("outline")]
    around = [r for r in rows_of(drawn(grid_map(grid.assign(within_margin=True), choose=False))) if r["outline"]]
    assert len(around) == 4 * len(frames.STEPS)


def test_induction_maps_ring_the_induction_heads() -> None:
    induction = frames.induction(6, 4, circuits=3)
    spec = drawn(induction_maps(induction))
    trained = induction[induction["weights"] == "trained"]
    for data, primitive in zip(spec["datasets"].values(), ("prefix_matching", "copying"), strict=True):
        assert [r["value"] for r in data] == trained[primitive].round(4).tolist()
        assert sum(r["induction"] for r in data) == trained["induction"].sum() >= 3
    scales = [panel["layer"][0]["encoding"]["color"]["scale"]["domain"] for panel in spec["hconcat"]]
    assert scales == [[0, 1], [0, trained["copying"].max()]]
    assert spec["resolve"]["scale"]["color"] == "independent"


def test_the_matrix_is_whole_from_each_pair_once_or_twice() -> None:
    both = frames.correlations(TWO, (5,))
    once = both.drop_duplicates(["component", "kind", "correlation"])
    for table in (both, once):
        cells = {(r["row"], r["column"]): r for r in rows_of(drawn(task_matrix(table, "head")))}
        for a in TWO:
            assert cells[a, a]["framed"], "the diagonal is the task's own reliability"
            for b in (*TWO, "mean", "mean of ranks", "random"):
                assert cells[a, b]["value"] == cells[b, a]["value"]
    planted = both[(both["component"] == "head") & (both["task"] == TWO[0]) & (both["other_task"] == TWO[1])]
    assert cells[TWO]["value"] == planted["correlation"].round(4).iloc[0]


def test_the_matrix_tells_companions_and_marks_noise() -> None:
    table = frames.correlations(TWO, (0, 5))
    spec = drawn(task_matrix(table, "head"))
    cells = {(r["row"], r["column"], r["shots"]): r for r in rows_of(spec)}
    assert cells[TWO[0], TWO[1], "5 shots"]["inside"] == "0.55 (0.50 to 0.60)"
    assert cells[TWO[0], TWO[1], "5 shots"]["alone"] == "0.63"
    assert not any(r["pale"] for r in cells.values())
    assert "title" not in spec
    ffns = next(r for r in rows_of(drawn(task_matrix(table, "ffn"))))
    assert ffns["inside"] == ffns["alone"] == "\N{EN DASH}", "nothing in a tooltip is called null"
    low = (table["kind"] == "reliability") & (table["num_fewshot"] == 0) & (table["scope"] != "random")
    noisy = table.assign(correlation=table["correlation"].where(~low, 0.2))
    spec = drawn(task_matrix(noisy, "head"))
    assert {(r["shots"], r["pale"]) for r in rows_of(spec)} == {("no shots", True), ("5 shots", False)}
    assert not any(r["dark"] for r in rows_of(spec) if r["pale"]), "no white on pale"
    assert spec["title"] == ["With no shots scores are mostly noise: reliability is below 0.5 for 2 of 2 orders"]


def test_dots_of_noise_are_pale_and_say_so() -> None:
    table = frames.correlations(TWO, (0, 5))
    low = (table["kind"] == "reliability") & (table["component"] == "ffn") & (table["scope"] != "random")
    heads, ffns = drawn(shots_dots(table.assign(correlation=table["correlation"].where(~low, 0.2))))["hconcat"]
    assert heads["title"] == "Attention heads"
    assert ffns["title"]["subtitle"] == "scores are mostly noise: reliability is below 0.5 for 4 of 4 orders"
    opacities = [[layer["mark"]["opacity"] for layer in panel["layer"][2:]] for panel in (heads, ffns)]
    assert opacities == [[1, 1], [0.25, 0.25]]


def test_the_transfer_map_is_of_the_middle_fraction_unless_told() -> None:
    transfer = frames.transfer(TWO, (5,))
    for fraction, told in ((0.5, None), (0.3, 0.3)):
        cells = {(r["row"], r["column"]): r for r in rows_of(drawn(transfer_map(transfer, "head", fraction=told)))}
        planted = transfer[(transfer["fraction"] == fraction) & (transfer["donor"] == TWO[0])].set_index("task")
        for task, of_mean in ((TWO[1], TWO[1]), ("mean", "")):
            assert cells[TWO[0], task]["value"] == pytest.approx(100 * planted.loc[of_mean, "difference"], abs=1e-3)
        assert cells[TWO[0], TWO[0]]["framed"]
        assert cells[TWO[0], TWO[0]]["text"] == "0"
        assert not cells["mean", "mean"]["framed"]
        assert not any(column in ("mathqa", "lambada_openai") for _, column in cells)


def test_the_scatter_names_induction_heads_and_draws_both_thresholds() -> None:
    spec = drawn(induction_scatter(frames.induction(6, 4, circuits=3), frames.THRESHOLDS))
    assert len(spec["hconcat"]) == 2, "trained and random weights"
    found = list(rows_of(spec))
    names = {r["name"] for r in found if r.get("what") == "induction head"}
    assert {r["name"] for r in found if "x" in r} <= names
    assert sum(set(r) == set(frames.THRESHOLDS) for r in found) >= 1


@pytest.mark.parametrize("seed", range(4))
def test_names_in_the_scatter_do_not_lie_on_one_another(seed: int) -> None:
    found = frames.induction(12, 12, random=False, circuits=30, seed=seed)
    places = _label_places(induction_heads(found), {"prefix_matching": 1.0, "copying": 1.0})
    x, y = places["x"].to_numpy() * _DOTS, places["y"].to_numpy() * _HEADS
    half = places["name"].str.len().to_numpy() * 3.3
    apart = (abs(x[:, None] - x) >= half[:, None] + half - 1e-6) | (abs(y[:, None] - y) >= 11 - 1e-6)
    assert len(places) > 3
    assert apart[~np.eye(len(places), dtype=bool)].all()


def test_shots_are_compared_once_per_pair_beside_a_random_order() -> None:
    table = frames.correlations(TWO, (0, 1, 5)).assign(score="position")
    table.loc[(table["scope"] == "mean") & (table["other_scope"] == "random"), "correlation"] = 0.07
    spec = drawn(shots_dots(table))
    random = [data for data in spec["datasets"].values() if data[0]["task"] == "random order"]
    for data in spec["datasets"].values():
        if data in random:
            assert {r["correlation"] for r in data} == {0.07}, "beside the mean over tasks"
            continue
        assert len(data) == 3 * 3, "three pairs for two tasks and their mean"
        assert {r["pair"] for r in data} == {"no shots and 1 shot", "no shots and 5 shots", "1 shot and 5 shots"}
    assert random


def test_tasks_that_rank_alike_stand_together() -> None:
    table = frames.correlations(frames.TASKS[:4], (5,))
    a, b, c, d = frames.TASKS[:4]
    near = {frozenset((a, d)): 0.95, frozenset((d, b)): 0.9, frozenset((a, b)): 0.85}
    pairs = [near.get(frozenset(pair), 0.2) for pair in zip(table["task"], table["other_task"], strict=True)]
    found = alike_together(table.assign(correlation=pairs).query("component == 'head' and kind == 'tasks'"))
    assert found in ([a, d, b, c], [b, d, a, c], [c, b, d, a], [c, a, d, b])
    spec = drawn(task_matrix(table.assign(correlation=pairs), "head"))
    axes = json.dumps(spec)
    assert json.dumps([*found, "mean", "mean of ranks", "random"]) in axes, "the matrix is in this order"
    assert alike_together(frames.correlations(TWO, (5,))) == list(TWO), "two are neighbours anyway"
    unknown = frames.correlations(frames.TASKS[:4], (5,), known=False)
    assert alike_together(unknown[unknown["kind"] == "tasks"]) == []


def test_unseen_tasks_start_at_the_full_model() -> None:
    found = list(rows_of(drawn(unseen_curves(frames.transfer(TWO, (5,)), "head"))))
    assert {r["task"] for r in found} == {"mathqa", "lambada_openai"}
    assert [r["accuracy"] for r in found if r["percent"] == 0] == [0.5] * 4
    assert {r["percent"] for r in found} == {0, 30, 50, 70}


def test_retained_begins_with_everything() -> None:
    found = list(rows_of(drawn(retained_curves(frames.retained(TWO, (5,))))))
    assert all(r["left"] == 100 for r in found if r.get("removed") == 0)
    assert {r["left"] for r in found if r.get("removed") == 50 and r["task"] == "mean"} == {
        round(100 * (1 - 0.5**3.0), 2), round(100 * (1 - 0.5**1.1), 2)}


def test_depth_has_bars_over_tasks_with_intervals() -> None:
    found = list(rows_of(drawn(depth_bars(frames.depth(TWO, (5,))))))
    of_mean = [r for r in found if r["whole"]]
    assert [r["third"] for r in of_mean] == ["early", "middle", "late"]
    assert [(r["low"], r["share"], r["high"]) for r in of_mean] == [(5, 10, 15), (70, 75, 80), (10, 15, 20)]
    assert [r["expected"] for r in of_mean] == [33.3] * 3


@pytest.mark.parametrize("draw", [
    lambda: grid_map(frames.grid(ONE, (0,), (0.0, 0.5)), choose=True),
    lambda: induction_maps(frames.induction(2, 3, random=False, circuits=1)),
    lambda: induction_scatter(frames.induction(4, 4).assign(induction=False), frames.THRESHOLDS),
    lambda: task_matrix(frames.correlations(ONE, (0,)), "ffn"),
    lambda: task_matrix(frames.correlations(TWO, (0,), known=False), "head"),
    lambda: transfer_map(frames.transfer(ONE, (0,)), "head"),
    lambda: transfer_map(frames.transfer(TWO, (0,)).assign(difference=np.nan), "head"),
    lambda: shots_dots(frames.correlations(ONE, (0, 5))),
    lambda: unseen_curves(frames.transfer(ONE, (0,)).query("donor_scope == 'all tasks'"), "head"),
    lambda: retained_curves(frames.retained(ONE, (0,)).assign(random_mean=np.nan)),
    lambda: depth_bars(frames.depth(ONE, (0,), known=False)),
])
def test_small_and_unknown_frames_are_drawn(draw: Callable[[], Any]) -> None:
    assert any(rows_of(drawn(draw())))


def test_nothing_to_draw_is_none() -> None:
    def none(table: pd.DataFrame) -> pd.DataFrame:
        return table[:0]

    assert grid_map(none(frames.grid()), choose=True) is None
    assert induction_maps(none(frames.induction())) is None
    assert induction_scatter(none(frames.induction()), frames.THRESHOLDS) is None
    assert task_matrix(none(frames.correlations()), "head") is None
    assert transfer_map(frames.transfer(), "ffn") is None
    assert shots_dots(frames.correlations(shots=(5,))) is None
    assert shots_dots(frames.correlations(known=False)) is None
    assert unseen_curves(frames.transfer(unseen=()), "head") is None
    assert retained_curves(none(frames.retained())) is None
    assert depth_bars(none(frames.depth())) is None
