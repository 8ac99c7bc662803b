"""The house is as docs/design.md draws it: what stands at the root, which room may use which, no circle, few floors."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from headcount.measure.induction import prefix_matching
from headcount.report import cautions
from headcount.report.page import QUESTIONS

SOURCE = Path(__file__).resolve().parents[1] / "src" / "headcount"
ROOT = {"__init__", "__main__", "errors", "masks", "mask_file", "results", "code_files", "cli", "terminal",
        "terminal_plan"}
# Everything may use these.
SHARED = {"errors", "masks", "mask_file", "results", "code_files"}
# Which rooms a room may use, itself left out; of a room in part, its files.
ARROWS = {
    "stats": set(),
    "tasks": {"stats"},
    "model": {"tasks.hub"},
    "engine": {"model"},
    "measure": {"engine", "model", "tasks", "stats"},
    "removal": {"measure", "engine", "model", "tasks", "stats"},
    "study": {"measure", "engine", "model", "tasks"},
    "analysis": {"stats", "study.described", "study.ledger", "study.codec", "study.jobs", "study.spec",
                 "study.masksets", "study.shapes", "study.shown"},
    "report": {"analysis", "stats"},
}
# Libraries that one place alone may import.
DOORS = {"lm_eval": ("tasks",), "altair": ("report",), "vl_convert": ("report",), "cyclopts": ("cli",),
         "rich": ("terminal", "terminal_plan"), "ray": ("study",),
         "torch": ("model", "engine", "measure", "removal", "study"),
         "transformers": ("model", "engine", "measure", "removal", "tasks")}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, without the package's own; definitions of tasks are data."""
    files = [path for path in SOURCE.rglob("*.py") if "data" not in path.relative_to(SOURCE).parts]
    return {".".join(path.relative_to(SOURCE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
            for path in files}


def imported(module: str) -> Iterator[str]:
    """What a module imports anywhere in it, by full name; of the package itself the names of modules."""
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inside = f"{node.module}.{alias.name}".removeprefix("headcount.")
                own = (node.module or "").split(".")[0] == "headcount"
                yield f"headcount.{inside}" if own and inside in modules() else str(node.module)


def uses(module: str) -> set[str]:
    """Other modules of the package that a module imports."""
    found = {name.removeprefix("headcount.") for name in imported(module) if name.startswith("headcount.")}
    return found - {module}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_the_root_holds_what_belongs_to_no_room() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} == ROOT
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(ARROWS)


@pytest.mark.parametrize("of", ARROWS)
def test_arrows_point_down(of: str) -> None:
    for module in modules():
        if room(module) == of:
            for other in uses(module):
                allowed = {of, *SHARED, *ARROWS[of]}
                assert room(other) in allowed or other in allowed, f"{module} uses {other}"


def test_there_is_no_circle() -> None:
    sorter = graphlib.TopologicalSorter({module: uses(module) for module in modules()})
    try:
        sorter.prepare()
    except graphlib.CycleError as circle:
        raise AssertionError(" uses ".join(circle.args[1])) from None


@pytest.mark.parametrize("of", ["analysis", "report"])
def test_a_room_has_four_floors_at_most(of: str) -> None:
    @functools.cache
    def floor(module: str) -> int:
        return max((1 + floor(other) for other in uses(module) if room(other) == of), default=0)

    floors = {module: floor(module) for module in modules() if room(module) == of}
    assert max(floors.values()) <= 3, {module: n for module, n in floors.items() if n > 3}


@pytest.mark.parametrize("question", ["importance", "curves", "grid", "transfer", "correlations", "top_sets",
                                      "prediction", "induction", "removal"])
def test_a_question_has_the_same_name_on_both_sides(question: str) -> None:
    assert {f"analysis.{question}", f"report.{question}"} <= modules().keys()


def test_no_question_of_the_report_imports_another() -> None:
    questions = {question.__name__.removeprefix("headcount.") for question in (*QUESTIONS, cautions)}
    assert questions <= modules().keys()
    assert {(module, other) for module in questions for other in uses(module) & questions} == set()


def test_the_tree_in_design_is_todays() -> None:
    text = (SOURCE.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    unnamed = {module for module in modules() if module.rpartition(".")[2] not in ("__init__", "__main__")
               and not re.search(rf"\b{module.rpartition('.')[2]}\b", text)}
    assert unnamed == set()


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_its_door(library: str) -> None:
    users = {module for module in modules() if any(room(name) == library for name in imported(module))}
    assert users, library
    assert {room(module) for module in users} <= set(DOORS[library]), users


def test_each_room_says_who_lives_there() -> None:
    for of in ARROWS:
        told = ast.get_docstring(modules()[f"{of}.__init__"]) or ""
        assert 2 <= len(told.splitlines()) <= 8, of


def test_shapes_are_checked_wherever_there_are_some() -> None:
    told = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    (listed,) = re.findall(r"--jaxtyping-packages=(\S+),beartype\.beartype", told)
    checked = tuple(listed.split(","))
    with_shapes = {f"headcount.{name}" for name in modules() if "jaxtyping" in set(imported(name))}
    assert with_shapes
    unchecked = {name for name in with_shapes if not any(f"{name}.".startswith(f"{one}.") for one in checked)}
    assert unchecked == set()


def test_a_wrong_shape_is_noticed_while_tests_run() -> None:
    with pytest.raises(TypeCheckError):
        prefix_matching(torch.zeros(1, 2, 3), 2, 2, 1)
