"""One self-contained page of a study: words first, then figures, tables and provenance; and the figures as files.

The page carries the code that draws its charts, so it opens offline and for ever. Everything it says is computed from
the study's tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import vl_convert
from markupsafe import Markup

from headcount.analysis.study import Study, open_study
from headcount.report import (
    correlations,
    curves,
    grid,
    headline,
    importance,
    induction,
    top_sets,
    transfer,
    words,
)
from headcount.report.cautions import cautions
from headcount.report.section import Section, Table, plain_columns
from headcount.report.style import save
from headcount.stats.intervals import WITHIN

# The questions, in the order of the page: each has sections and tables. A new one is one more name here.
QUESTIONS = (headline, importance, curves, grid, correlations, top_sets, transfer, induction)
# Tables that are written as CSV: names of files, and of the study's methods.
_CSV = ("curves", "free_fractions", "against_random", "importance", "aggregate_importance", "orders", "depth",
        "agreement", "grid", "correlations", "top_sets", "top_overlaps", "transfer", "induction", "retained",
        "induction_among_important", "degenerate")


def write_report(study: str | Path | Study, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write `report.html`, `figures/` and `tables/` into a study folder; returns the page's path.

    An unfinished study gives the report of what is there.

    Args:
        study: The study folder, or what `open_study` made of it.
        progress: Called with how many of how many figures are drawn.

    Raises:
        StudyError: If there is no study in the folder.
    """
    study = study if isinstance(study, Study) else open_study(study)
    drawn: list[tuple[Section, dict[str, Any]]] = []
    found = sections(study)
    for done, section in enumerate(found):
        if progress is not None:
            progress(done, len(found))
        page, static = section.page(), section.static()
        if page is not None and static is not None:
            drawn.append((section, page.to_dict()))
            save(static, study.folder / "figures" / section.name)
    (study.folder / "tables").mkdir(exist_ok=True)
    for name in _CSV:
        frame: pd.DataFrame = getattr(study, name)()
        frame.to_csv(study.folder / "tables" / f"{name}.csv", index=False)
    path = study.folder / "report.html"
    path.write_text(_page(study, drawn), encoding="utf-8")
    return path


def _page(study: Study, drawn: list[tuple[Section, dict[str, Any]]]) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    captions = {section.name: section.caption for section, _ in drawn}

    def figure(name: str) -> Markup:
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
            f"; a share is called free where {words.told(WITHIN, spec['margin'])}."
            if study.tasks else "no tasks."),
        headline=headline.headline(study),
        cautions=list(cautions(study)),
        sections=[(section.name, section.heading) for section, _ in drawn if section.name != headline.NAME],
        tables=tables(study),
        provenance=list(_provenance(study)),
        figure=figure,
        bundle=Markup(_in_script(vl_convert.javascript_bundle())),  # type: ignore[call-arg]  # noqa: S704
        charts=Markup(_in_script(json.dumps({section.name: spec for section, spec in drawn}))),  # noqa: S704
    )


def sections(study: Study) -> list[Section]:
    """What the study has data for, in the order of the page."""
    return [section for question in QUESTIONS for section in question.sections(study)]


def tables(study: Study) -> list[Table]:
    """The tables of every question, and what says little."""
    found = [table for question in QUESTIONS for table in question.tables(study)]
    weak = study.degenerate()
    return [*found, Table("Results that say little", "And why.", plain_columns(weak))] if len(weak) else found


def _provenance(study: Study) -> Iterator[tuple[str, str]]:
    description, spec = study.description, study.spec
    yield "commands", "; ".join(description.get("commands", [description.get("command", "")])) or "run from Python"
    yield "created", description["created"]
    for name, value in study.model.items():
        yield f"model: {name.replace('_', ' ')}", _plain(value)
    yield "prompts", description.get("layout", "")
    yield "masks", description.get("masks", "one forward pass each")
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


def _in_script(text: str) -> str:
    """Text that cannot end the script element it stands in."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", text, flags=re.IGNORECASE)
