"""What a page is made of: sections (a figure with its caption) and tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from headcount.analysis.rows import MEAN, labelled


@dataclass(frozen=True)
class Section:
    """One figure with what is said of it.

    Attributes:
        name: Of its files.
        heading: Of its part of the page.
        caption: What it shows, in words.
        page: Draws it for the page.
        static: Draws it for PNG and PDF.
    """

    name: str
    heading: str
    caption: str
    page: Callable[[], Any]
    static: Callable[[], Any]


def section(
    name: str, heading: str, draw: Callable[[], Any], *caption: str, static: Callable[[], Any] | None = None
) -> Section:
    """A section; what is empty of its caption is left out."""
    return Section(name, heading, " ".join(filter(None, caption)), draw, static or draw)


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        title: Its heading.
        caption: What its columns mean.
        frame: Its content.
        file: Name and content of a CSV file beside the page, of a table that is no method of `Study`.
    """

    title: str
    caption: str
    frame: pd.DataFrame
    file: tuple[str, pd.DataFrame] | None = None

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [str(c) for c in self.frame.columns]

    @property
    def rows(self) -> list[list[str]]:
        """Cells as text."""
        return [[_cell(value) for value in row] for row in self.frame.itertuples(index=False)]


def mean_first(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the mean over tasks, then those of single tasks, called as people call them."""
    return labelled(pd.concat([table[table["scope"] == MEAN], table[table["scope"] != MEAN]]))


def thousandths(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Accuracies with the same number of digits, so that they can be read down a column."""
    return table.assign(**{c: [f"{x:.3f}" if x == x else "" for x in table[c]] for c in columns})


def plain_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns by the names that people read; labels of tasks say what scopes say."""
    names = {"num_fewshot": "shots", "parameters_removed": "parameters", "full_accuracy": "full model"}
    frame = frame[[column for column in frame if column not in ("scope", "other_scope", "donor_scope")]]
    return frame.rename(columns=lambda c: names.get(str(c), str(c).replace("_", " ")))


def _cell(value: object) -> str:
    if isinstance(value, float):
        if value != value:
            return ""
        # Large numbers are means of parameters, whose decimals say nothing.
        whole = (value == int(value) and abs(value) >= 10) or abs(value) >= 10_000
        return f"{value:,.0f}" if whole else f"{value:.4g}"
    return str(value)
