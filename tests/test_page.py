"""What a page says of planted numbers: the aggregate, weak results, first differences, free fractions, sections."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import headcount as hc
import synthetic_study as synthetic
from headcount.analysis.curves import first_differences
from headcount.report.curves import differences_sentence
from headcount.report.importance import importance_sentence
from headcount.report.page import sections, tables, write_report
from headcount.report.style import description
from headcount.study.ledger import Ledger


def test_what_is_said_of_all_tasks_is_of_the_aggregate_that_was_asked_for(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path)
    ledger = Ledger(folder)
    for entry in ledger.entries("importance"):
        if entry.job["task"] == "green" and entry.job["method"] == "gradient":
            heads = (entry.table["component"] == "head").to_numpy()
            # One head is all that matters to the one task, and second to least to the other.
            scores = np.where(heads & (entry.table["layer"] == 0) & (entry.table["head"] == 1), 9.0,
                              entry.table["importance"])
            ledger.path(entry.job).unlink()
            ledger.write(entry.job, entry.table.assign(importance=scores), entry.info)
    description = ledger.read_json("study.json")
    for aggregate, said, first in (("mean", "on the mean over tasks", "L0H1"),
                                   ("ranks", "on the mean of ranks over tasks", "L5H3")):
        ledger.write_json("study.json", {**description, "spec": {**description["spec"], "aggregate": aggregate}})
        study = hc.open_study(folder)
        beginning = f"{said}, the most important attention heads by gradient (per position) are {first}"
        assert beginning in importance_sentence(study, "head")
        assert said in " ".join(section.caption for section in sections(study) if section.name == "depth")
        assert set(study.depth()["scope"]) == {"task", said.removeprefix("on the ").removesuffix(" over tasks")}
    flat = ledger.read_json("study.json")
    for entry in ledger.entries("importance"):
        if entry.job["method"] == "oracle":
            ledger.path(entry.job).unlink()
            ledger.write(entry.job, entry.table.assign(importance=-0.1), entry.info)
    ledger.write_json("study.json", flat)
    said = importance_sentence(hc.open_study(folder), "ffn")
    assert "on the mean of ranks over tasks, no FFN is of use by accuracy lost" in said


def test_weak_results_of_a_study_are_marked_with_their_reasons(tmp_path: Path) -> None:
    ledger = Ledger(synthetic.write(tmp_path, documents=40))
    description = ledger.read_json("study.json")
    known = {task: {**facts, "constant_answer": 0.3, "constant_places": [0] if task == "red" else []}
             for task, facts in description["tasks"].items()}
    ledger.write_json("study.json", {**description, "tasks": known})
    found = hc.open_study(tmp_path).degenerate().set_index(["task", "num_fewshot"])["reason"]
    for k in (0, 5):
        assert found.loc[("red", k)].tolist() == [
            "40 documents, fewer than 50: intervals are wide and rough",
            "option 1 is the answer to 100 % of the documents, whatever they say",
            *(["accuracy 0.25 is not shown to be above 0.30, which guessing or a constant answer gets (corrected for "
              "the number of tasks)"]
              if k == 0 else []),
            "the oracle found 2 distinct values for 6 components, so that ties decide the order"]
        assert not found.loc[("green", k)].str.contains("whatever they say").any(), "one place, but many answers"
    (table,) = (t for t in tables(hc.open_study(tmp_path)) if t.title == "Results that say little")
    assert table.frame["reason"].tolist() == found.tolist()


def test_where_curves_differ_from_the_full_model_is_told(tmp_path: Path) -> None:
    study = hc.open_study(synthetic.write(tmp_path))
    assert differences_sentence(study, "head") == (
        "With 5 shots accuracy is shown to differ from the full model's (McNemar's paired test over documents, p < "
        "0.05, corrected for a curve's steps by Holm's method) first at 75 % (worse) of the attention heads on all "
        "tasks' documents together; on single tasks (not corrected for their number) first at 75 % (2 worse).")
    assert "first at 25 % (worse) of the FFNs" in differences_sentence(study, "ffn")
    found = first_differences(study.curves()).set_index(["task", "num_fewshot", "component"])["fraction"]
    assert found["red", 5, "head"] == 0.75
    assert np.isnan(found["red", 0, "head"])
    curves = study.curves()
    row = curves[(curves["task"] == "red") & (curves["num_fewshot"] == 5) & (curves["component"] == "ffn")
                 & (curves["order"] == "oracle")]
    assert row.set_index("fraction").loc[0.25, "p"] == pytest.approx(2 * 0.5**20), "20 of 100 fell, none rose"
    (table,) = (table for table in tables(study) if table.title == "Free fractions")
    told = table.frame.set_index(["task", "shots", "component"])["differs at"]
    first = {"heads": "75 % (worse)", "FFNs": "25 % (worse)"}
    assert told.to_dict() == {(task, k, component): "no step" if k == 0 else first[component]
                              for task in ("mean", "red", "green") for k in (0, 5) for component in first}
    few = hc.open_study(synthetic.write(tmp_path / "few", tasks=("red",), documents=4, shots=(5,)))
    assert differences_sentence(few, "head").endswith(" at no step of the attention heads on red.")


def induction_entry(ledger: Ledger, reliability: float) -> None:
    layer, head = np.divmod(np.arange(24), 4)
    for weights in ("trained", "random"):
        table = pd.DataFrame({"layer": layer, "head": head, "previous_token": 0.1, "ov_copying": 0.2,
                              "prefix_matching": np.where((layer == 5) & (head > 0) & (weights == "trained"), 0.9,
                                                          0.1 - 0.001 * layer),
                              "copying": 0.2 if weights == "random" else np.where(layer > 3, 0.5, 0.1),
                              "prefix_matching_variance": 0.01, "copying_variance": 0.01,
                              "previous_token_variance": 0.01})
        ledger.write({"kind": "induction", "protocol": "sound", "model": "abc", "weights": weights, "seeds": 14,
                      "seed": 1}, table, {"sequences": 98, "lengths": [25], "repeats": 4, "notes": [],
                                          "reliability": {"prefix_matching": 0.97, "copying": reliability}})


def test_a_page_has_its_sections_in_the_papers_order_and_says_what_is_noisy(tmp_path: Path) -> None:
    ledger = Ledger(synthetic.write(tmp_path))
    induction_entry(ledger, 0.62)
    study = hc.open_study(tmp_path)
    found = sections(study)
    assert [section.name for section in found] == [
        "headline", "head_map", "depth", "ffn_bars", "head_curves", "ffn_curves", "cross_task_head", "cross_task_ffn",
        "cross_shot", "induction_maps", "induction_scatter", "retained"]
    captions = {section.name: section.caption for section in found}
    assert "The reliability of copying is below 0.8: this score is noisy" in captions["induction_maps"]
    assert captions["induction_scatter"].startswith("3 of 24 heads reach the threshold of prefix matching, 8 that of "
                                                    "copying and 3 both.")
    assert ("With 5 shots, of the 4 heads (20 %) most important on the mean over tasks 3 are among the 4 highest on "
            "prefix matching") in captions["retained"]
    assert ("With 5 shots no share of the heads is shown to be free on any of 2 tasks: at the first step these "
            "documents cannot tell on 2 (the median task would need 189 documents") in captions["head_curves"]
    for name, caption in captions.items():
        found = re.sub(r"95 %|1\.96", "", caption)
        assert re.search(r"\d", found), f"{name} says what was found"
    text = write_report(study).read_text(encoding="utf-8")
    assert "below 0.8" in text
    assert "0.900 \N{PLUS-MINUS SIGN} 0.010" in text, "every induction head is listed"
    for name in ("depth", "cross_task_head", "cross_shot", "induction_maps", "induction_scatter", "retained"):
        assert (tmp_path / "figures" / f"{name}.png").exists()
        assert (tmp_path / "figures" / f"{name}.pdf").exists()
    lines = pd.read_csv(tmp_path / "tables" / "top_overlaps.csv").query(
        "other_scope == 'prefix_matching' and scope == 'mean'")
    assert lines.set_index(["num_fewshot", "fraction"]).loc[(5, 0.1), "common"] == 2


def test_every_figure_is_valid_and_the_same_without_validation(tmp_path: Path) -> None:
    ledger = Ledger(synthetic.write(tmp_path))
    induction_entry(ledger, 0.62)
    for section in sections(hc.open_study(tmp_path)):
        for draw in (section.page, section.static):
            # Altair numbers the views as it makes them.
            checked, unchecked = (re.sub(r"(?:view|param)_\d+", "", json.dumps(figure, sort_keys=True))
                                  for figure in (draw().to_dict(), description(draw)))
            assert checked == unchecked, section.name


def test_the_page_is_there_before_its_pictures(tmp_path: Path) -> None:
    synthetic.write(tmp_path)

    def stop(done: int, total: int) -> None:
        assert (done, total) == (0, 9)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, stop)
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert (tmp_path / "tables" / "curves.csv").exists()
    assert not (tmp_path / "figures").exists()
    assert write_report(tmp_path, pictures=False) == tmp_path / "report.html"
    assert not (tmp_path / "figures").exists()


def test_a_single_task_has_captions_with_intervals_too(tmp_path: Path) -> None:
    study = hc.open_study(synthetic.write(tmp_path, tasks=("red",), shots=(5,)))
    captions = {section.name: section.caption for section in sections(study)}
    assert captions["head_curves"].startswith("With 5 shots no share of the heads is shown to be free on any of 1 "
                                              "task: ")
    more = hc.open_study(synthetic.write(tmp_path / "more", tasks=("red",), shots=(5,), documents=200))
    captions = {section.name: section.caption for section in sections(more)}
    assert captions["head_curves"].startswith("With 5 shots a share of the heads is shown to be free on 1 of 1 task: "
                                              "50 % "
                                              "on red. With")
    chance = hc.open_study(synthetic.write(tmp_path / "chance", tasks=("red",), shots=(0,)))
    captions = {section.name: section.caption for section in sections(chance)}
    assert captions["head_curves"].startswith("The full model is not shown to be above a baseline on any task")


@pytest.mark.parametrize(("right", "said"), [
    ((80, 80, 80, 80), "a share of the heads is shown to be free on 2 of 2 tasks: 75 % (unlimited documents might show "
     "75 % or more) on red to 75 % (unlimited documents might show 75 % or more) on green."),
    ((80, 60, 60, 40), "no share of the heads is shown to be free on any of 2 tasks: at the first step a loss of more "
     "than 2 points is shown on 2."),
    ((80, 79, 60, 40), "at the first step these documents cannot tell on 2 (")])
def test_the_free_fraction_of_tasks_is_told_with_what_unlimited_documents_might_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: tuple[int, ...], said: str
) -> None:
    monkeypatch.setattr(synthetic, "RIGHT", {**synthetic.RIGHT, ("head", "gradient"): right})
    study = hc.open_study(synthetic.write(tmp_path, shots=(5,), documents=200))
    assert said in next(section.caption for section in sections(study) if section.name == "head_curves")
