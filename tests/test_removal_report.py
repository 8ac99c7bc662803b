"""Accuracy against cost on the page, and the table of removed models, from planted studies and certificates."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import headcount as hc
import synthetic_study as synthetic
from headcount.analysis.removal import costs
from headcount.analysis.removed_models import RemovedModel, removed_models
from headcount.analysis.study import Study
from headcount.masks import Mask
from headcount.report import page
from headcount.report.removal import cost_figure, cost_sentence, sections, tables
from test_maps import drawn, rows_of
from test_removal_choice import STEADY, described, study_of


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_of(tmp_path_factory.mktemp("steady"), STEADY)


def certificate(mask: Mask, **changes: Any) -> dict[str, Any]:
    """As `headcount remove` writes it, as far as it is read."""
    told = {"written_as": "transformers", "model": {"identity": "2-abc-def"},
            "removed": {"heads_per_layer": list(mask.heads_per_layer), "heads": [str(h) for h in mask.heads_removed],
                        "ffns": [f"L{layer}F" for layer in mask.ffns_removed]},
            "saved": {"parameters": 20_000, "parameters_left": 16_000, "bytes_left": 64_000_000},
            "chosen": None, "confirmation": None}
    return {**told, **changes}


def speed(**changes: Any) -> dict[str, Any]:
    """As `MeasuredSpeed.to_dict` gives it."""
    sides = {name: {"parameters": 1, "cache_bytes": 1, "bytes": 10**6 * size, "peak_bytes": 10**6 * (size + 5),
                    "prefill": 1000.0 + size, "decode": 10.5} for name, size in (("full", 80), ("masked", 80),
                                                                                 ("removed", 64))}
    return {"device": "cpu", "dtype": "float32", "prefill_tokens": 512, "crowded": False, "peak_measured": False,
            "sides": sides, **changes}


def put(folder: Path, **files: Any) -> None:
    (folder / "removed").mkdir(exist_ok=True)
    for name, told in files.items():
        text = told if isinstance(told, str) else json.dumps(told)
        (folder / "removed" / f"{name}.json").write_text(text, encoding="utf-8")


def point(study: Study, heads: float, ffns: float) -> pd.Series:
    rows = costs(study.removable())
    return rows[(rows["heads_fraction"] == heads) & (rows["ffns_fraction"] == ffns)].iloc[0]


def test_the_front_is_what_no_other_point_beats(study: Study) -> None:
    rows = costs(study.removable())
    assert len(rows) == 1 + len(STEADY)
    assert set(rows["donor_scope"]) == {"all tasks"}
    points = {(0.0, 0.0): 80, **STEADY}
    left = {one: 20_000 - 100 * int(24 * one[0]) - 1000 * int(6 * one[1]) for one in points}
    front = {one for one in points if not any(
        left[other] <= left[one] and points[other] >= points[one]
        and (left[other], points[other]) != (left[one], points[one]) for other in points)}
    assert {(h, f) for h, f, on in zip(rows["heads_fraction"], rows["ffns_fraction"], rows["front"], strict=True)
            if on} == front
    assert dict(zip(zip(rows["heads_fraction"], rows["ffns_fraction"], strict=True), (20_000 * rows["left"]).round(),
                    strict=True)) == left


def test_points_of_fewer_documents_stand_at_the_full_models_accuracy_and_their_difference(study: Study) -> None:
    table = study.removable()
    fewer = (table["heads_fraction"] > 0) & (table["ffns_fraction"] > 0)
    table.loc[fewer, ["accuracy", "low", "high"]] += 0.1  # the first documents are easy, for the full model as well
    table.loc[fewer, "documents"] = 100
    rows = costs(table)
    pd.testing.assert_series_equal(rows["shown"], costs(study.removable())["shown"])
    pd.testing.assert_series_equal(rows["shown_low"], costs(study.removable())["shown_low"])
    assert (rows["shown"] - rows["difference"]).round(9).nunique() == 1


def test_the_figure_has_every_point_and_joins_the_front(study: Study) -> None:
    rows = costs(study.removable())
    mask = point(study, 0.25, 0.25)["mask"]
    spec = drawn(cost_figure(rows, 0.25, {mask: "mine"}))
    data = [row for row in rows_of(spec) if "kind" in row]
    assert len(data) == len(rows)
    assert {row["kind"] for row in data} == {"nothing (full model)", "heads alone", "FFNs alone", "heads and FFNs"}
    assert [row["accuracy"] for row in data] == rows["accuracy"].round(4).tolist()
    assert [row["what"] for row in data if row["model"] == "mine"] == ["25/25"]
    assert {row["what"] for row in data if row["front"]} == {
        f"{100 * h:g}/{100 * f:g}" for h, f in zip(rows["heads_fraction"], rows["ffns_fraction"], strict=True)
        if rows.set_index(["heads_fraction", "ffns_fraction"])["front"][h, f]}
    assert [row["accuracy"] for row in rows_of(spec) if row.get("what") == "guessing"] == [0.25]
    (steps,) = (layer for layer in spec["layer"] if layer["mark"].get("interpolate"))
    assert steps["transform"] == [{"filter": "datum.front"}]
    assert cost_figure(rows.iloc[:0], 0.25, {}) is None


def test_the_sentence_tells_the_best_point_of_a_few_sizes(study: Study) -> None:
    said = cost_sentence(costs(study.removable()))
    assert said.startswith("With 5 shots on the mean over tasks the full model's accuracy is 0.800. Most accurate "
                           "of what was measured: with at most 90 % of the parameters the model without 25 % of the "
                           "heads and 50 % of the FFNs, whose accuracy changes by 0.0 points (95 % interval ")
    assert "at most 75 %" not in said, "none is so small"
    rows = costs(study.removable())
    smaller = cost_sentence(rows.assign(left=rows["left"] - 0.05))
    assert ("; with at most 75 % of the parameters the model without 50 % of the heads and 50 % of the FFNs, whose "
            "accuracy changes by \N{MINUS SIGN}25.0 points (\N{MINUS SIGN}") in smaller
    assert "at most 50 %" not in smaller
    weak = costs(study.removable()).assign(above_baseline=False)
    assert "nothing can be said" in cost_sentence(weak)
    assert "keep more than 90 %" in cost_sentence(costs(study.removable()).query("left > .9"))


def test_nothing_is_drawn_where_no_model_lost_the_same_parts_on_all_tasks(tmp_path: Path) -> None:
    assert list(sections(hc.open_study(synthetic.write(tmp_path / "own")))) == []
    assert list(sections(hc.open_study(synthetic.write(tmp_path / "none", evaluations=False)))) == []
    # Of one task its own order is that of all.
    (one,) = sections(hc.open_study(synthetic.write(tmp_path / "one", tasks=("red",))))
    assert "by the order of red" in one.caption
    assert one.page() is not None


def test_removed_models_are_marked_and_stand_in_a_table(tmp_path: Path) -> None:
    study_of(tmp_path, STEADY)
    described(tmp_path)
    study = hc.open_study(tmp_path)
    measured = study.mask(heads=0.25, ffns=0.25).mask
    byhand = measured.without_heads([(5, 3)])
    put(tmp_path, measured=certificate(measured, speed=speed(), confirmation={"sentence": "It lost 1 point."}),
        byhand=certificate(byhand, written_as="masked"),
        other=certificate(measured, model={"identity": "2-else"}),
        broken="{", nohead=certificate(measured, removed={"heads_per_layer": [4] * 6, "heads": ["L9H9"], "ffns": []}))
    study = hc.open_study(tmp_path)
    (section,) = sections(study)
    assert [row["model"] for row in rows_of(drawn(section.page())) if row.get("model")] == ["measured"]
    assert "Not among these points: byhand" in section.caption
    (table,) = tables(study)
    cells = table.frame.set_index("name").to_dict("index")
    assert list(cells) == ["broken", "byhand", "measured", "nohead", "other"]
    assert "removed/broken.json cannot be read" in cells["broken"]["what went"]
    assert "there is no head L9H9" in cells["nohead"]["what went"]
    assert cells["measured"] == {
        "what went": "6 of 24 heads, 1 of 6 FFNs", "format": "transformers",
        "parameters": "16,000 (20,000)", "weights, MB": "64 (80)",
        "prefill, tokens/s": "1,080 / 1,080 / 1,064", "decode, tokens/s": "10.5 / 10.5 / 10.5",
        "memory, MB": "85 / 69", "confirmed": "It lost 1 point."}
    assert cells["other"]["what went"].endswith("of another model")
    assert cells["byhand"]["what went"].endswith("(zeros in their place)")
    assert cells["byhand"]["confirmed"] == "not confirmed on other documents"
    assert "Prefill: 512 tokens; cpu, float32" in table.caption
    assert section.name in [one.name for one in page.sections(study)]
    assert table.title in [one.title for one in page.tables(study)]


DAMAGED: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda told: [told],
    "null": lambda told: None,
    "a number": lambda told: 3,
    "nothing saved": lambda told: {k: v for k, v in told.items() if k != "saved"},
    "saved as text": lambda told: {**told, "saved": "much"},
    "parameters as text": lambda told: {**told, "saved": {**told["saved"], "parameters": "many"}},
    "none left": lambda told: {**told, "saved": {**told["saved"], "parameters_left": 0}},
    "more left": lambda told: {**told, "saved": {**told["saved"], "parameters_left": 10**9}},
    "negative heads": lambda told: {**told, "removed": {**told["removed"], "heads_per_layer": [-1]}},
    "infinitely many heads": lambda told: {**told, "removed": {**told["removed"], "heads_per_layer": [10**12]}},
    "heads as a number": lambda told: {**told, "removed": {**told["removed"], "heads": 3}},
    "an FFN as a head": lambda told: {**told, "removed": {**told["removed"], "heads": ["L1F"]}},
    "no model": lambda told: {**told, "model": None},
    "half a speed": lambda told: {**told, "speed": {**speed(), "sides": {"full": {}}}},
    "a speed that is none": lambda told: {**told, "speed": [1]},
    "an infinite speed": lambda told: {**told, "speed": speed(sides={
        name: {**side, "prefill": float("inf")} for name, side in speed()["sides"].items()})},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_certificate_is_named_and_stops_nothing(study: Study, tmp_path: Path, damage: str) -> None:
    whole = certificate(study.mask(heads=0.25, ffns=0.25).mask)
    put(tmp_path, whole=whole, bad=DAMAGED[damage](whole))
    bad, good = removed_models(tmp_path)
    assert (bad.name, bad.mask, bool(bad.damage)) == ("bad", None, True)
    assert "\n" not in bad.damage
    assert good.damage == ""
    assert good.mask == study.mask(heads=0.25, ffns=0.25).mask


def test_files_that_are_no_text_are_damaged_too(tmp_path: Path) -> None:
    put(tmp_path, deep="[" * 100_000, empty="")
    (tmp_path / "removed" / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "removed" / "folder.json").mkdir()
    assert [one.name for one in removed_models(tmp_path) if one.damage] == ["bytes", "deep", "empty", "folder"]
    assert removed_models(tmp_path / "nowhere") == list[RemovedModel]()


def test_what_a_removal_measured_is_what_the_page_reads() -> None:
    """`to_dict` of `headcount.removal.speed`, whose room the page may not import, has what the table wants."""
    from headcount.analysis.removed_models import SideSpeed
    from headcount.removal.speed import MeasuredSpeed
    from headcount.removal.speed import SideSpeed as Timed

    assert {*SideSpeed._fields} <= {*Timed.__dataclass_fields__}
    assert {*speed()} <= {*MeasuredSpeed.__dataclass_fields__}
