"""Which rows of a table figures and sentences speak of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from headcount.analysis.points import MEAN
from headcount.analysis.scores import MEAN_OF_RANKS, RANDOM

WITHOUT_OWN = "mean without own"
SUMMARIES = (MEAN, MEAN_OF_RANKS, WITHOUT_OWN, RANDOM)  # the order of their rows, below the tasks
AGGREGATES = (MEAN, MEAN_OF_RANKS)
RELIABLE = 0.5  # of an order that is less reliable, most of what tells components apart is noise


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the mean over tasks (or of the mean of their ranks), or of the only (else the first) task."""
    if table.empty:
        return table
    found = [name for name in AGGREGATES if (table["task"] == name).any()]
    return table[table["task"] == (found or [table["task"].iloc[0]])[0]]


def most_shots(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the most shots."""
    rows: pd.DataFrame = table[table["num_fewshot"] == table["num_fewshot"].max()]
    return rows


def of_score(table: pd.DataFrame, component: str, score: str | None = None) -> pd.DataFrame:
    """The rows of one kind of component and of one score, the first found unless told."""
    rows = table[table["component"] == component]
    if rows.empty:
        return rows
    return rows[rows["score"] == (rows["score"].iloc[0] if score is None else score)]


def of_fraction(table: pd.DataFrame, fraction: float | None, near: float = 0.5) -> pd.DataFrame:
    """The rows of one fraction: of the one nearest to `near`, the smaller of two, unless told."""
    if table.empty:
        return table
    if fraction is None:
        fraction = float(min(set(table["fraction"]), key=lambda f: (round(abs(f - near), 6), f)))
    return table[np.isclose(table["fraction"], fraction)]


def tasks_first(names: Sequence[str] | pd.Series) -> list[str]:
    """Every name once, as they come; then the mean, the mean of ranks, the mean without own, and random."""
    found = list(dict.fromkeys(names))
    return [n for n in found if n not in SUMMARIES] + [n for n in SUMMARIES if n in found]
