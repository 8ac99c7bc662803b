"""What the documentation names is there: tests, files of a study, links."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import cyclopts
import pytest

import opt66b_page
from headcount import cli
from headcount.analysis.schema import Table
from headcount.analysis.study import TABLES, Study
from headcount.study.spec import PRESETS

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_taken(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in re.findall(r"^    headcount (.*?)(?: +#.*)?$", page.read_text(encoding="utf-8"), re.M):
        tokens = shlex.split(command)
        monkeypatch.setattr(cli.app, "config", ())
        if "--preset" in tokens:
            at = tokens.index("--preset")
            of_verb = {tokens[0]: PRESETS[tokens[at + 1]]}
            monkeypatch.setattr(cli.app, "config", (cyclopts.config.Dict(of_verb, source="--preset"),))
            del tokens[at : at + 2]
        cli.app.parse_args(tokens, exit_on_error=False, print_error=False)


def test_what_the_opt_66b_page_says_of_its_shape_is_what_was_kept() -> None:
    page = opt66b_page.PAGE.read_text(encoding="utf-8")
    assert page == opt66b_page.filled(page, {"shape": opt66b_page.shape_run()})


@pytest.mark.long
def test_the_opt_66b_page_has_the_plan_of_this_version() -> None:
    page = opt66b_page.PAGE.read_text(encoding="utf-8")
    assert page == opt66b_page.filled(page, opt66b_page.blocks()), "python benchmarks/opt66b_page.py"


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
