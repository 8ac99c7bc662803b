"""What a row speaks of (a task, an aggregate of tasks, a reference), and which rows figures and sentences speak of.

Names of tasks are free text and carry no meaning: a column `scope` says what a row is of, and `task` is empty where it
is of no single task. Where people read them, aggregates and references are called by words that no task has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

# Scopes of rows.
TASK, MEAN, MEAN_OF_RANKS, RANDOM = "task", "mean", "mean of ranks", "random"
# Scopes of donors, whose order removes, besides TASK and RANDOM: nothing is removed, the task's own order, the order of
# all tasks together, that of all but the one that is pruned.
NONE, OWN, ALL_TASKS, OTHER_TASKS = "none", "own", "all tasks", "other tasks"
AGGREGATES = (MEAN, MEAN_OF_RANKS)
# A task's own orders; the one order for all tasks, that of their importance together.
OWN_ORDERS, COMMON = ("gradient", "oracle"), "common"
# Both of these where every layer is left the same shape, and the orders that free-form curves go by.
UNIFORM, UNIFORM_COMMON = "uniform", "uniform common"
FREE_FORM = {UNIFORM: OWN_ORDERS, UNIFORM_COMMON: (COMMON,)}
# The orders by which what goes is the same for all tasks.
ONE_SET = (COMMON, UNIFORM_COMMON)
RELIABLE = 0.5  # of an order that is less reliable, most of what tells components apart is noise
# How scopes are called where people read them, in the order of their rows, below the tasks.
_WORDS = {MEAN: "mean", MEAN_OF_RANKS: "mean of ranks", ALL_TASKS: "mean", OTHER_TASKS: "mean without own",
          RANDOM: "random", OWN: "own", NONE: "none"}


class Scoped(NamedTuple):
    """What a row speaks of, or whose order removes: the task of that name, or what the scope says."""

    scope: str
    task: str = ""


def of_task(task: str) -> Scoped:
    """A single task."""
    return Scoped(TASK, task)


@dataclass(frozen=True)
class Labels:
    """How rows are called where people read them: tasks by their names, all else by a word that no task has.

    Attributes:
        tasks: The names of tasks that stand beside one another.
    """

    tasks: frozenset[str]

    def word(self, scope: str) -> str:
        """What an aggregate or a reference is called: in brackets where a task is called so."""
        word = _WORDS.get(scope, scope)
        while word in self.tasks:
            word = f"({word})"
        return word

    def column(self, scopes: pd.Series, tasks: pd.Series) -> pd.Series:
        """What each row is called."""
        words = {scope: self.word(scope) for scope in set(scopes) - {TASK}}
        return pd.Series([words.get(scope, task) for scope, task in zip(scopes, tasks, strict=True)], scopes.index,
                         dtype=tasks.dtype)

    @property
    def summaries(self) -> list[str]:
        """What aggregates and random orders are called, in the order of their rows, below the tasks."""
        return [self.word(scope) for scope in (MEAN, MEAN_OF_RANKS, OTHER_TASKS, RANDOM)]

    def tasks_first(self, labels: Iterable[str]) -> list[str]:
        """Every label once, as they come; then the mean, the mean of ranks, the mean without own, and random."""
        unique, last = list(dict.fromkeys(labels)), self.summaries
        return [label for label in unique if label not in last] + [label for label in last if label in unique]


def labels_of(*tables: pd.DataFrame) -> Labels:
    """The labels of tables that are read beside one another."""
    return Labels(frozenset(
        str(task) for table in tables for name, scope in (
            ("task", "scope"), ("other_task", "other_scope"), ("donor", "donor_scope")) if scope in table
        for task in table.loc[table[scope] == TASK, name].unique()))


def labelled(table: pd.DataFrame, labels: Labels | None = None) -> pd.DataFrame:
    """The table with labels for people in its columns `task`, `other_task` and `donor`; scopes stay."""
    labels = labels_of(table) if labels is None else labels
    pairs = (("scope", "task"), ("other_scope", "other_task"), ("donor_scope", "donor"))
    return table.assign(**{name: labels.column(table[scope], table[name]) for scope, name in pairs if scope in table})


def groups(table: pd.DataFrame, *columns: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """The rows of every combination of values of these columns, in the order in which they first stand there."""
    yield from table.groupby(columns[0] if len(columns) == 1 else list(columns), sort=False)


def of_scope(table: pd.DataFrame, *scopes: str) -> pd.DataFrame:
    """The rows of these scopes."""
    rows: pd.DataFrame = table[table["scope"].isin(scopes)]
    return rows


def single_tasks(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of single tasks."""
    return of_scope(table, TASK)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the mean over tasks (or of the mean of their ranks), or of the only (else the first) task."""
    for scope in AGGREGATES:
        if len(rows := of_scope(table, scope)):
            return rows
    return table[table["task"] == table["task"].iloc[0]] if len(table) else table


def mean_or_first(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the mean over tasks, or of the first task."""
    rows = of_scope(table, MEAN)
    return rows if len(rows) or table.empty else table[table["task"] == table["task"].iloc[0]]


def most_shots(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the most shots."""
    rows: pd.DataFrame = table[table["num_fewshot"] == table["num_fewshot"].max()]
    return rows


def of_score(table: pd.DataFrame, component: str, score: str | None = None) -> pd.DataFrame:
    """The rows of one kind of component and of one score, the first there is unless told."""
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


def own_orders(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each task's own order: neither the common one nor random ones, nor those of one shape."""
    return table[table["order"].isin(OWN_ORDERS)]
