"""One self-contained page of a study: words first, then figures, tables and provenance; and the figures as files.

The page contains the code that draws its charts, so it needs no network. Everything it says is computed from
the study's tables.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import platformdirs
import vl_convert
from markupsafe import Markup

from headcount.analysis.study import TABLES, Study, open_study
from headcount.report import (
    correlations,
    curves,
    grid,
    headline,
    importance,
    induction,
    prediction,
    removal,
    top_sets,
    transfer,
    words,
)
from headcount.report.cautions import cautions
from headcount.report.section import Section, Table, plain_columns
from headcount.report.style import description, save
from headcount.stats.intervals import WITHIN

# The questions, in the order of the page: each has sections and tables. A new one is one more name here.
QUESTIONS = (headline, importance, curves, grid, removal, correlations, top_sets, transfer, prediction, induction)
# Tables that are written as CSV: names of files, and of the study's methods.
_CSV = tuple(table.name for table in TABLES if table.written)
_FFN = "FFN: the feed-forward block of a layer."
_TERMS = (f"{_FFN} Shots: solved examples in the prompt. Documents: the questions of a task. Points: percentage points "
          "of accuracy.")
# Behind what is kept of the charts' code stands its length.
_LENGTH = "\n// length: "


@dataclass(frozen=True)
class Figure:
    """A section whose figure is drawn.

    Attributes:
        section: What it belongs to.
        vegalite: What the browser draws.
    """

    section: Section
    vegalite: dict[str, Any]


def write_report(
    study: str | Path | Study, progress: Callable[[int, int], None] | None = None, *, pictures: bool = True
) -> Path:
    """Write `tables/`, `report.html` and then `figures/` into a study folder; returns the page's path.

    An unfinished study gives the report of what is there. The page is complete before the first picture is drawn.

    Args:
        study: The study folder, or what `open_study` made of it.
        progress: Called with how many of how many pictures are drawn.
        pictures: Draw the figures as PNG and PDF, too.

    Raises:
        StudyError: If there is no study in the folder.
    """
    study = study if isinstance(study, Study) else open_study(study)
    path, figures = write_page(study)
    if pictures:
        write_pictures(study, figures, progress)
    return path


def write_page(study: Study) -> tuple[Path, list[Figure]]:
    """Write `report.html` and `tables/` into a study's folder; returns the page's path, and the figures on it."""
    figures = [Figure(section, described) for section in sections(study)
               if (described := description(section.page)) is not None]
    (study.folder / "tables").mkdir(exist_ok=True)
    for name in _CSV:
        frame: pd.DataFrame = getattr(study, name)()
        frame.to_csv(study.folder / "tables" / f"{name}.csv", index=False)
    on_page = tables(study)
    for name, frame in (table.file for table in on_page if table.file is not None):
        frame.to_csv(study.folder / "tables" / f"{name}.csv", index=False)
    path = study.folder / "report.html"
    path.write_text(_page(study, figures, on_page, _bundle()), encoding="utf-8")
    return path, figures


def write_pictures(
    study: Study, figures: Sequence[Figure], progress: Callable[[int, int], None] | None = None
) -> None:
    """Write the figures of a page as PNG and PDF into the folder `figures`; `progress` as in `write_report`."""
    for done, figure in enumerate(figures):
        if progress is not None:
            progress(done, len(figures))
        section = figure.section
        static = figure.vegalite if section.static is section.page else description(section.static)
        if static is not None:
            save(static, study.folder / "figures" / section.name)


def _page(study: Study, figures: Sequence[Figure], on_page: Sequence[Table], bundle: str) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    captions = {figure.section.name: figure.section.caption for figure in figures}

    def place(name: str) -> Markup:
        if name not in captions:
            return Markup("<p class='what'>Not measured in this study.</p>")
        return Markup("<figure><div id='{0}' role='group' aria-label='{1}'></div><figcaption>{1}</figcaption></figure>"
                      ).format(name, captions[name])

    spec = study.spec
    heads, ffns, parameters = headline.constants(study.description)
    name = Path(str(study.model.get("name", spec["model"]))).name
    return environment.get_template("page.html.j2").render(
        title=f"{name}: which heads and FFNs does in-context learning need?",
        what=f"{heads} attention heads, {ffns} FFNs, {words.millions(parameters)} parameters; " + (
            f"{words.number_of(len(study.tasks), 'task')} with {words.listed([words.shots(k) for k in spec['shots']])}"
            f". A share of the heads or FFNs is called free where {words.told(WITHIN, spec['margin'])}. {_TERMS}"
            if study.tasks else f"no tasks. {_FFN}"),
        headline=headline.headline(study),
        cautions=[*cautions(study), *_other_requests(study)],
        sections=[(figure.section.name, figure.section.heading) for figure in figures
                  if figure.section.name != headline.NAME],
        tables=on_page,
        provenance=list(_provenance(study)),
        figure=place,
        bundle=Markup(_in_script(bundle)),  # noqa: S704
        charts=Markup(_in_script(json.dumps(  # noqa: S704
            {figure.section.name: figure.vegalite for figure in figures}))),
    )


def sections(study: Study) -> list[Section]:
    """What the study has data for, in the order of the page."""
    return [section for question in QUESTIONS for section in question.sections(study)]


def tables(study: Study) -> list[Table]:
    """The tables of every question, and what says little."""
    of_questions = [table for question in QUESTIONS for table in question.tables(study)]
    weak = study.degenerate()
    if len(weak):
        of_questions.append(Table("Results that say little", "Results that should not be relied on, each with its "
                                                             "reason.",
                                  plain_columns(weak)))
    return of_questions


def _other_requests(study: Study) -> Iterator[str]:
    if others := study.other_requests:
        yield (f"This page shows one of {len(others) + 1} things that the folder was asked for; headcount report "
               f"FOLDER --asked NUMBER shows another. {'. '.join(others)}.")


def _provenance(study: Study) -> Iterator[tuple[str, str]]:
    description, spec = study.description, study.spec
    yield "commands", "; ".join(description.get("commands", [description.get("command", "")])) or "run from Python"
    yield "created", description["created"]
    for name, value in study.model.items():
        yield f"model: {name.replace('_', ' ')}", _plain(value)
    yield "prompts", description.get("layout", "")
    yield "masks", description.get("masks") or "one forward pass each"
    if budget := description.get("budget"):
        yield "rows and batches", _plain(budget)
    for task, known in study.known_tasks.items():
        yield f"task: {task}", (f"documents {known['fingerprint']}; {known['documents'] or 'none'} evaluated, "
                                f"{known['examples'] or 'none'} for importance; metric {known['metric']}")
    yield "options", ", ".join(f"{k} = {_plain(v)}" for k, v in spec.items() if v is not None)
    yield "versions", ", ".join(f"{k} {v}" for k, v in description["versions"].items())


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _bundle() -> str:
    """The code that draws charts in a browser; kept in the user's cache, since making it takes more than a second."""
    version = importlib.metadata.version("vl-convert-python")
    kept = platformdirs.user_cache_path("headcount", appauthor=False) / f"vega-bundle-{version}.js"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        code, _, length = kept.read_text(encoding="utf-8").rpartition(_LENGTH)
        if length == str(len(code)):  # whole
            return code
    made = str(vl_convert.javascript_bundle())  # type: ignore[call-arg]
    with contextlib.suppress(OSError):  # no such place here: made again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        own = kept.with_suffix(f".{os.getpid()}")
        own.write_text(f"{made}{_LENGTH}{len(made)}", encoding="utf-8")
        own.replace(kept)
    return made


def _in_script(text: str) -> str:
    """Text that cannot end the script element it stands in."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", text, flags=re.IGNORECASE)
