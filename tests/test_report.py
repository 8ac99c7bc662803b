"""The page: self-contained, complete, and drawn in a real browser without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from altair.utils.schemapi import validate_jsonschema
from altair.vegalite.v6.schema.core import load_schema

import synthetic_study as synthetic
from headcount.errors import StudyError
from headcount.report import page as of_page
from headcount.report.page import write_report
from headcount.report.section import Table
from headcount.report.style import description
from test_task_names import PLAIN, study_of

FIGURES = ("headline", "head_map", "ffn_bars", "head_curves", "ffn_curves")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(synthetic.write(tmp_path_factory.mktemp("study")))


def test_the_page_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    head = text[: text.index("<script>")]
    assert not re.findall(r"(?:src|href)\s*=", head), "no address is loaded"
    assert "@import" not in head
    assert text.count("<script>") == text.count("</script>") == 2


def test_the_page_says_what_was_found(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for expected in ("50 % of the attention heads (12 of 24", "Shots are shared", "weights are made up", "data-red",
                     "headcount study planted", "L5H3", "L5F", "planted &lt;model&gt;"):
        assert expected in text
    assert "1.9 to +1.9" in text, "where no document changed the interval has a width all the same"
    assert text.index("<td>mean</td>") < text.index("<td>red</td>"), "the mean comes first"
    assert "<model>" not in text, "what comes from outside is escaped"


def test_figures_and_tables_are_files_too(page: Path) -> None:
    for name in FIGURES:
        assert (page.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (page.parent / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    for name in ("curves", "free_fractions", "importance"):
        assert (page.parent / "tables" / f"{name}.csv").stat().st_size > 100


def test_a_browser_draws_every_chart(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic", "--enable-logging=stderr",
         "--virtual-time-budget=20000", f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=200, check=False)
    assert "CONSOLE" not in done.stderr or "Uncaught" not in done.stderr, done.stderr[-2000:]
    for name in FIGURES:
        drawn = done.stdout[done.stdout.index(f'id="{name}"') :]
        assert "<svg" in drawn[: drawn.index("<figcaption")], f"{name} is drawn"
    assert done.stdout.count("<select") == 2, "a menu for the task over heads and over FFNs"


@pytest.mark.parametrize("parts", [{"evaluations": False}, {"importance": False}, {"tasks": ("red",), "shots": (5,)}])
def test_an_unfinished_or_small_study_has_a_page(tmp_path: Path, parts: dict[str, object]) -> None:
    text = write_report(synthetic.write(tmp_path, **parts)).read_text(encoding="utf-8")  # type: ignore[arg-type]
    assert ("Not measured in this study" in text) == (parts.get("evaluations") is False)
    assert ("Which heads matter" in text) == ("importance" not in parts)


def test_numbers_are_written_as_people_read_them() -> None:
    cells = {float("nan"): "", 4_859_136.5: "4,859,136", 12.0: "12", 3.0: "3", 0.123456: "0.1235", -0.5: "-0.5"}
    (rows,) = Table("", "", pd.DataFrame([list(cells)])).rows
    assert rows == list(cells.values())


def test_no_study_no_page(tmp_path: Path) -> None:
    with pytest.raises(StudyError):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_code_of_charts_is_kept_and_made_anew_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = of_page._bundle()
    (kept,) = (tmp_path / "headcount").iterdir()
    monkeypatch.setattr(of_page.vl_convert, "javascript_bundle", lambda: pytest.fail("made again"))
    assert of_page._bundle() == made
    kept.write_text(kept.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    monkeypatch.setattr(of_page.vl_convert, "javascript_bundle", lambda: made)
    assert of_page._bundle() == made
    assert kept.read_text(encoding="utf-8").startswith(made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file: nothing can be kept
    assert of_page._bundle() == made


def test_every_figure_is_what_vega_lite_allows(tmp_path: Path) -> None:
    """Charts are not checked while a page is written: here each is, for the page and for pictures."""
    drawn = set()
    for figure in of_page.sections(study_of(tmp_path, PLAIN[:4])):
        for draw in (figure.page, figure.static):
            described = description(draw)
            if described is not None:
                assert validate_jsonschema(described, load_schema(), raise_error=False) is None, figure.name
                drawn.add(figure.name)
    assert drawn >= {*FIGURES, "depth", "cross_task_head", "cross_shot", "grid", "transfer_head", "prediction_head",
                     "induction_maps", "induction_scatter", "retained"}, "of every question"
