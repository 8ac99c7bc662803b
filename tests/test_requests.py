"""A folder that was asked for several things shows each as a folder that was asked for it alone would."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import tiny
from headcount import open_study
from headcount.analysis.study import TABLES
from headcount.report.page import _other_requests as other_requests
from headcount.report.page import write_page
from headcount.study.runner import run_study
from headcount.study.spec import ModelSpec, Part, StudySpec, readers

EVERYTHING: dict[str, Any] = {
    "measure": ("curves", "grid", "transfer", "induction"), "grid_fractions": (0.3, 0.6),
    "transfer_fractions": (0.25, 0.5), "induction_seeds": 2, "induction_lengths": (5, 9)}
Asks = Callable[..., StudySpec]


@pytest.fixture(scope="module")
def asks(tmp_path_factory: pytest.TempPathFactory) -> Asks:
    """Options of a small study; tasks by name."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("alpha", "beta", "gamma")):
        for split, n in (("train", 14), ("validation", 16)):
            rows = [{"context": f"{split} number {50 * number + i} is", "options": [f"{name} one", f"two {i}", "three"],
                     "gold": (7 * i + number) % 3} for i in range(n)]
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def spec(out: Path, tasks: tuple[str, ...] = ("alpha", "beta"), **options: Any) -> StudySpec:
        options["unseen"] = tuple(str(folder / name) for name in options.get("unseen", ()))
        small = {"shots": (0,), "limit": 10, "importance_limit": 6, "fractions": (0.25, 0.5), "random_orders": 2}
        return StudySpec("tiny", tasks=tuple(str(folder / name) for name in tasks), out=out, **small | options)

    return spec


def ask(spec: StudySpec, parts: tuple[Part, ...] | None = None) -> None:
    run_study(spec, loaded=tiny.loaded("llama"), parts=parts)


def tables(folder: Path, asked: int | None = None) -> dict[str, pd.DataFrame]:
    """All tables, rows in an order of their own: that of entries depends on what was measured first."""
    study = open_study(folder, asked)
    found = {}
    for name in (table.name for table in TABLES):
        table = getattr(study, name)()
        keys = [c for c in table if table[c].dtype.kind not in "f" or "fraction" in c]
        found[name] = table.sort_values(keys, key=lambda column: column.astype(str), kind="stable", ignore_index=True)
    return found


def assert_same(shown: dict[str, pd.DataFrame], fresh: dict[str, pd.DataFrame]) -> None:
    for name, table in shown.items():
        pd.testing.assert_frame_equal(table, fresh[name], rtol=1e-4, atol=1e-5, obj=name)


@pytest.mark.parametrize(("first", "then"), [
    ({"limit": 14, "importance_limit": 9}, {}),
    ({**EVERYTHING, "fractions": (0.1, 0.25, 0.5), "grid_fractions": (0.2, 0.6), "random_orders": 4,
      "transfer_components": ("head", "ffn")},
     {**EVERYTHING, "grid_limit": 5, "transfer_limit": 5, "random_fractions": (0.1, 0.25), "ffn_order": "gradient",
      "skip_control": True}),
    ({"measure": ("curves", "grid"), "grid_fractions": (0.3, 0.6)},
     {"measure": ("curves", "grid"), "grid_fractions": (0.3, 0.6), "aggregate": "ranks", "grid_order": "mean",
      "random_orders": 0}),
    ({"shots": (0, 1), "limit": 14}, {"shared_shots": True, "shots": (1,), "limit": 6, "tasks": ("alpha",)}),
    ({"measure": ("transfer",), "unseen": ("gamma",)}, {"measure": ("transfer",), "unseen": ("gamma",), "limit": 13}),
], ids=["fewer documents", "other steps", "other orders", "one of the tasks", "an unseen task"])
def test_each_of_two_requests_is_shown_as_if_it_were_alone(
    first: dict[str, Any], then: dict[str, Any], asks: Asks, tmp_path: Path
) -> None:
    for options in (first, then):
        ask(asks(tmp_path / "both", **options))
    ask(asks(tmp_path / "first", **first))
    ask(asks(tmp_path / "then", **then))
    assert_same(tables(tmp_path / "both"), tables(tmp_path / "then"))
    assert_same(tables(tmp_path / "both", 1), tables(tmp_path / "first"))
    study = open_study(tmp_path / "both")
    assert [line[:2] for line in study.other_requests] == ["1:"]
    (said,) = other_requests(study)
    assert f"--asked NUMBER shows another. {study.other_requests[0]}" in said


def test_what_is_added_is_shown_together(asks: Asks, tmp_path: Path) -> None:
    """Tasks, numbers of shots and measurements that are asked for one after another, with the same options."""
    ask(asks(tmp_path / "grown", tasks=("alpha",)))
    ask(asks(tmp_path / "grown", tasks=("beta",), measure=("curves",)))
    ask(asks(tmp_path / "grown", shots=(1,)))
    grid = {"measure": ("curves", "grid"), "grid_fractions": (0.5,), "shots": (0, 1)}
    ask(asks(tmp_path / "grown", **grid))
    ask(asks(tmp_path / "whole", **grid))
    assert_same(tables(tmp_path / "grown"), tables(tmp_path / "whole"))
    assert open_study(tmp_path / "grown").other_requests == []


def test_a_study_holds_the_verbs_that_went_before(asks: Asks, tmp_path: Path) -> None:
    for part in ("heads", "ffns", "evaluate"):
        ask(asks(tmp_path / "study", tasks=("alpha",)), (part,))  # type: ignore[arg-type]  # one of Part
    ask(asks(tmp_path / "study", tasks=("alpha",)))
    assert open_study(tmp_path / "study").other_requests == []
    # Of another task and number of documents accuracy alone was asked.
    ask(asks(tmp_path / "study", tasks=("beta",), limit=5), ("evaluate",))
    study = open_study(tmp_path / "study")
    assert (study.description["parts"], study.spec["tasks"]) == (["evaluate"], ["beta"])
    assert study.importance().empty
    assert study.other_requests == ["1: measured: curves; tasks alpha; limit 10"]


def test_a_verb_adds_to_a_study_or_is_a_request_of_its_own(asks: Asks, tmp_path: Path) -> None:
    study = asks(tmp_path / "study", **EVERYTHING)
    ask(study)
    before = tables(study.out)
    # What a verb does not read, it has by default, and says nothing of.
    verb = asks(study.out)
    for part in ("evaluate", "heads", "ffns", "curve"):
        ask(verb, (part,))  # type: ignore[arg-type]  # one of Part
    assert_same(tables(study.out), before)
    assert open_study(study.out).other_requests == []
    ask(dataclasses.replace(verb, limit=5), ("evaluate",))
    few = open_study(study.out)
    assert few.evaluations().query("split == 'evaluation'").groupby("task")["doc_id"].nunique().tolist() == [5, 5]
    assert [len(table) for table in (few.curves().query("fraction > 0"), few.grid(), few.transfer())] == [0, 0, 0]
    assert len(few.induction()), "no number of documents says anything of it"
    assert few.other_requests == ["1: measured: curves, grid, transfer, induction; limit 10"]
    page = write_page(few)[0].read_text(encoding="utf-8")
    assert f"--asked NUMBER shows another. {few.other_requests[0]}" in page
    assert_same(tables(study.out, 1), before)
    ask(study)
    assert_same(tables(study.out), before)


def test_a_verb_between_studies_of_another_split(asks: Asks, tmp_path: Path) -> None:
    study = asks(tmp_path / "study", tasks=("alpha",), examples_split="validation", random_orders=0)
    ask(study)
    before = tables(study.out)
    ask(asks(study.out, tasks=("alpha",)), ("evaluate",))
    assert open_study(study.out).curves().query("fraction > 0").empty
    ask(study)
    assert_same(tables(study.out), before)


def test_every_option_says_which_parts_read_it() -> None:
    names = {f.name for f in dataclasses.fields(StudySpec)}
    marked = {f.name for f in dataclasses.fields(StudySpec) if f.metadata.keys() & {"binds", "grows", "means"}}
    loading = {f.name for f in dataclasses.fields(ModelSpec)}
    assert readers().keys() == names - marked - loading
