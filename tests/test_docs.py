"""What the documentation names is there: tests, files of a study, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headcount.analysis.curves import COLUMNS, FREE_COLUMNS
from headcount.analysis.grid import GRID
from headcount.analysis.transfer import TRANSFER
from headcount.report.page import _CSV

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    module = ""
    for named, test in re.findall(r"(test_\w+\.py)?(?:::(test_\w+))?", page.read_text(encoding="utf-8")):
        module = named or module
        if named:
            assert (ROOT / "tests" / named).exists(), named
        if test:
            assert f"def {test}(" in (ROOT / "tests" / module).read_text(encoding="utf-8"), f"{module}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_linked_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), link


def test_tables_that_the_paper_page_names_are_written() -> None:
    named = set(re.findall(r"tables/(\w+)\.csv", (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")))
    assert named
    assert named <= set(_CSV)


@pytest.mark.parametrize("folder", sorted((ROOT / "docs" / "results").iterdir()), ids=lambda folder: folder.name)
def test_results_have_the_tables_of_this_version(folder: Path) -> None:
    tables = {path.stem: path.read_text(encoding="utf-8") for path in (folder / "tables").glob("*.csv")}
    assert set(tables) == set(_CSV)
    for name, columns in (("curves", COLUMNS), ("free_fractions", FREE_COLUMNS), ("grid", GRID),
                          ("transfer", TRANSFER)):
        assert tables[name].splitlines()[0].split(",") == columns
    for name in ("top_overlaps", "induction_among_important"):
        assert {"p", "p_fewer", "p_in_layers"} <= set(tables[name].splitlines()[0].split(","))
    for text in tables.values():
        assert not re.search(r"[,\"](/|\.\./|~)", text), "no path of the machine that made them"
