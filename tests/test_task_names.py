"""Names of tasks carry no meaning: tasks called like aggregates, references and donors are tasks like others."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import headcount as hc
import synthetic_study as synthetic
from headcount import terminal
from headcount.analysis.frames import donor_of
from headcount.analysis.rows import Labels, Scoped, labelled
from headcount.analysis.study import TABLES, Study
from headcount.report.cautions import cautions
from headcount.report.headline import headline
from headcount.report.page import sections, tables, write_report
from headcount.study.ledger import Ledger
from headcount.study.masksets import (
    CommonCurve,
    CommonUniformCurve,
    FullModel,
    Grid,
    GridOrder,
    MaskSet,
    OwnCurve,
    RandomCurve,
    SingleFFNs,
    SingleHeads,
    Transfer,
    UniformCurve,
)
from test_page import induction_entry

PLAIN = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima")
ODD = ("mean", "random", "aggregate", "others", "own", "none", "mean of ranks", "mean without own", "prefix_matching",
       "all tasks", "task", "icl: x")
DOCUMENTS, SHOTS = 40, (0, 5)
AGGREGATES = {"all": "mean", "others": "mean without own"}


def right_on(names: tuple[str, ...], task: str, *of: object) -> int:
    """How many of 100 documents are right: told by the task's place, not by its name, and by the mask."""
    return 30 + (7 * names.index(task) + 13 * sum(map(len, map(repr, of)))) % 60


def add(ledger: Ledger, names: tuple[str, ...], task: str, k: int, curve: dict[str, object], component: str,
        fractions: tuple[float, ...], *apart: object) -> None:
    """One entry of evaluations of a task."""
    masks = [{**synthetic._label("head", str(curve["order"]), f), "component": component, "ffn_fraction": g}
             for f, g in ((f, f if component == "both" else 0.0) for f in fractions)]
    rows = [synthetic._rows(right_on(names, task, i, *apart), DOCUMENTS, i) for i in range(len(fractions))]
    if curve["order"] != "grid":
        curve = {**curve, "fractions": list(fractions)}
    job = {**synthetic.of_task("evaluation", task, k, DOCUMENTS), "split": "evaluation", "curve": curve}
    ledger.write(job, pd.concat(rows), {"metric": "acc", "truncated": 0, "tokens": 1, "seconds": 0.1, "masks": masks})


def study_of(folder: Path, names: tuple[str, ...]) -> Study:
    """A study of all that is measured; every task's numbers depend on its place alone."""
    ledger = Ledger(synthetic.write(folder, tasks=names, shots=SHOTS, documents=DOCUMENTS, full=90))
    known = ledger.read_json("study.json") or {}
    spec = {**known["spec"], "measure": ["curves", "grid", "transfer", "induction"], "common_fractions": [0.25],
            "uniform": True}
    groups = {**known["anatomy"], "kv_groups_per_layer": known["anatomy"]["heads_per_layer"]}
    ledger.write_json("study.json", {**known, "spec": spec, "anatomy": groups})
    for entry in list(ledger.entries("importance")):
        rng = np.random.default_rng([names.index(entry.job["task"]), entry.job["num_fewshot"]])
        scores = entry.table["importance"] + 0.02 * rng.random(len(entry.table))
        ledger.path(entry.job).unlink()
        ledger.write(entry.job, entry.table.assign(importance=scores), entry.info)
    everything = [f"importance of {i}" for i in range(len(names))]
    ordered = {"component": "head", "score": "position"}
    for (i, task), k in itertools.product(enumerate(names), SHOTS):
        together = {**ordered, "importance": everything, "aggregate": "mean"}
        add(ledger, names, task, k, {**together, "order": "common"}, "head", (0.25,), "common")
        add(ledger, names, task, k, {**ordered, "order": "uniform", "groups": 4, "importance": "x"}, "head", (0.25,),
            "uniform")
        add(ledger, names, task, k, {**together, "order": "uniform common", "groups": 4}, "head", (0.25,), "shape")
        orders = {"heads": {**ordered, "order": "gradient", "importance": "x"},
                  "ffns": {"component": "ffn", "order": "oracle", "importance": "y"}}
        add(ledger, names, task, k, {"order": "grid", "points": [[0.25, 0.25]], **orders}, "both", (0.25,), "grid")
        for j, donor in enumerate(names):
            if donor != task:
                called = {"donor_is": "task"} if donor in ("mean", "mean without own", "own") else {}
                add(ledger, names, task, k, {**ordered, "order": "transfer", "donor": donor, **called,
                                             "importance": [everything[j]]}, "head", (0.25, 0.5), 2**j)
        for kind, donor in AGGREGATES.items():
            ids = everything if kind == "all" else everything[:i] + everything[i + 1:]
            add(ledger, names, task, k, {**together, "order": "transfer", "donor": donor, "importance": ids}, "head",
                (0.25, 0.5), kind)
    induction_entry(ledger, 0.9)
    return hc.open_study(folder)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Study]:
    return (study_of(tmp_path_factory.mktemp("plain"), PLAIN), study_of(tmp_path_factory.mktemp("odd"), ODD))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_table_is_that_of_the_same_study_under_plain_names(studies: tuple[Study, Study], table: object) -> None:
    plain, odd = (getattr(study, table.name)() for study in studies)  # type: ignore[attr-defined]
    assert len(plain)
    for column in ("task", "other_task", "donor"):
        if column in plain:
            plain[column] = plain[column].replace(dict(zip(PLAIN, ODD, strict=True)))
    # Some rows come in the order of entries' names, which are hashes.
    odd, plain = (frame.sort_values(list(frame), ignore_index=True) for frame in (odd, plain))
    pd.testing.assert_frame_equal(odd, plain, check_exact=True)
    if "scope" in odd:
        assert set(odd.loc[odd["scope"] == "task", "task"]) in (set(ODD), set())
        assert (odd.loc[odd["scope"] != "task", "task"] == "").all()


def test_the_page_and_the_terminal_tell_tasks_from_aggregates(
    studies: tuple[Study, Study], capsys: pytest.CaptureFixture[str]
) -> None:
    captions = [{section.name: section.caption for section in sections(study)} for study in studies]
    assert captions[0].keys() == captions[1].keys()
    assert {"transfer_head", "grid", "retained", "cross_task_head", "cross_shot"} <= captions[1].keys()
    assert "Not measured in this study" not in write_report(studies[1], pictures=False).read_text(
        encoding="utf-8")
    assert len(list(cautions(studies[0]))) == len(list(cautions(studies[1])))
    plain, odd = (headline(study) for study in studies)
    assert len(plain) == len(odd)
    (of_odd,) = (table.frame for table in tables(studies[1]) if table.title == "Accuracy of the full model")
    assert of_odd["task"].tolist() == [*["(mean)"] * 2, *(task for task in ODD for _ in SHOTS)]
    for frame in (table.frame for study in studies for table in tables(study)):
        assert "task" not in frame or (frame["task"] != "").all(), "every row says what it is of"
    assert not {"scope", "donor scope"} & {str(column) for table in tables(studies[1]) for column in table.frame}
    asked = terminal.Asked(ODD, SHOTS)
    terminal.print_accuracy(studies[1], asked)
    terminal.print_curves(studies[1], asked)
    terminal.print_importance(studies[1], asked, "head")
    terminal.print_induction(studies[1])
    terminal.print_summary(studies[1], Path("report.html"))
    said = capsys.readouterr().out
    assert "icl: x: accuracy" in said
    assert "(mean): accuracy" in said
    alone = terminal.Asked(("mean", "own"), (5,)).of(studies[1].curves(), studies[1])
    assert set(zip(alone["scope"], alone["task"], strict=True)) == {("task", "mean"), ("task", "own")}


def test_labels_are_words_that_no_task_has() -> None:
    rows = pd.DataFrame({"scope": ["task", "mean", "task"], "task": ["mean", "", "(mean)"]})
    assert labelled(rows)["task"].tolist() == ["mean", "((mean))", "(mean)"]
    labels = Labels(frozenset({"a", "random"}))
    assert labels.tasks_first(["mean", "random", "a", "(random)"]) == ["random", "a", "mean", "(random)"]


OF_HEADS = {"component": "head", "fractions": (0.5,)}
ORDERS = [GridOrder(component=component, order="gradient", importance="x") for component in ("head", "ffn")]


@pytest.mark.parametrize(("masks", "donor"), [
    (Transfer(donor="mean", importance=("x", "y"), **OF_HEADS), Scoped("all tasks")),
    (Transfer(donor="mean without own", importance=("x", "y"), **OF_HEADS), Scoped("other tasks")),
    (Transfer(donor="own", importance=("x",), **OF_HEADS), Scoped("own")),
    (Transfer(donor="own", donor_is="task", importance=("x",), **OF_HEADS), Scoped("task", "own")),
    (Transfer(donor="copa", importance=("x",), **OF_HEADS), Scoped("task", "copa")),
    (Grid(heads=ORDERS[0], ffns=ORDERS[1], points=((0.5, 0.5),), donor="mean"), Scoped("all tasks")),
    (Grid(heads=ORDERS[0], ffns=ORDERS[1], points=((0.5, 0.5),)), Scoped("own")),
    (CommonCurve(importance=("x", "y"), **OF_HEADS), Scoped("all tasks")),
    (OwnCurve(order="oracle", importance="x", **OF_HEADS), Scoped("own")),
    (UniformCurve(groups=2, importance="x", **OF_HEADS), Scoped("own")),
    (CommonUniformCurve(groups=2, importance=("x", "y"), **OF_HEADS), Scoped("all tasks")),
    (RandomCurve(order_seed=7, **OF_HEADS), Scoped("random")),
    (FullModel(), Scoped("none")), (SingleFFNs((0,)), Scoped("none")), (SingleHeads(((0, 1),)), Scoped("none"))])
def test_whose_order_removes_is_told_by_the_masks(masks: MaskSet, donor: Scoped) -> None:
    assert donor_of(masks) == donor
