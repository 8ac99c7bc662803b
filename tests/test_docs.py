"""What the documentation names is there: tests, files of a study, links."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from headcount.analysis.schema import Table
from headcount.analysis.study import TABLES, Study

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


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
    assert named <= {table.name for table in TABLES if table.written}


# Tables that came after the results were measured; they are made of the entries, which are not kept here.
LATER = {"removable", "removed"}


@pytest.mark.parametrize("folder", sorted((ROOT / "docs" / "results").iterdir()), ids=lambda folder: folder.name)
def test_results_have_the_tables_of_this_version(folder: Path) -> None:
    tables = {path.stem: path.read_text(encoding="utf-8") for path in (folder / "tables").glob("*.csv")}
    assert set(tables) == {table.name for table in TABLES if table.written} - LATER
    for table in TABLES:
        if table.name in tables:
            assert tables[table.name].splitlines()[0].split(",") == table.names
    for text in tables.values():
        assert not re.search(r"[,\"](/|\.\./|~)", text), "no path of the machine that made them"


def test_the_page_of_tables_is_that_of_their_declarations() -> None:
    import tables_page

    assert (ROOT / "docs" / "tables.md").read_text(encoding="utf-8") == tables_page.page(), "make tables"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_method_says_what_the_columns_of_its_table_mean(table: Table) -> None:
    said = getattr(Study, table.name).__doc__
    assert said == table.docstring()
    for column in table.columns:
        assert f"    {column.name} (" in said
        assert column.meaning in said
