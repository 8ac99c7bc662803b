"""What a table is: its columns, declared once, each with its type, its unit and its meaning.

The declaration is the check (every table is built through `Table.frame`: columns in order, types right, also of an
empty table), the docstring of the method of `Study` that gives it, and its part of docs/tables.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd

Kind: TypeAlias = Literal["str", "int64", "float64", "bool", "Int64", "boolean"]
# Numbers and truth values that may be missing are float64 (NaN), Int64 and boolean (NA); texts may be missing (NaN).
_IN_WORDS = {"str": "text", "int64": "whole number", "float64": "number", "bool": "true or false",
             "Int64": "whole number, may be missing", "boolean": "true or false, may be missing"}
# What pandas makes of texts: `str` since version 3, `object` before.
_TEXT = pd.Series([""]).dtype


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Its name.
        dtype: Its type in pandas.
        unit: Of its numbers, or their range: "nats", "0..1", "heads"; empty where there is none.
        meaning: What it holds.
    """

    name: str
    dtype: Kind
    unit: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """One table of a study.

    Attributes:
        name: Of the method of `Study` that gives it, and of its CSV file.
        meaning: What it says, and what a row is.
        columns: In order.
        notes: What a reader must know besides.
        further: What columns may follow the declared ones; empty where none may.
        written: Whether the report writes it as CSV.
    """

    name: str
    meaning: str
    columns: tuple[Column, ...]
    notes: str = ""
    further: str = ""
    written: bool = True

    @property
    def names(self) -> list[str]:
        """The names of the declared columns."""
        return [column.name for column in self.columns]

    def frame(self, rows: pd.DataFrame | Iterable[Mapping[str, Any]] = ()) -> pd.DataFrame:
        """The rows as a frame of these columns.

        Args:
            rows: A frame, or one mapping per row; what a row lacks is missing.

        Raises:
            TypeError: If a column is not declared, or holds what its type cannot.
        """
        given = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
        unknown = [str(name) for name in given.columns if name not in self.names]
        if unknown and not self.further:
            raise TypeError(f"table {self.name} has no columns {', '.join(unknown)}")
        columns = {column.name: self._column(column, given) for column in self.columns}
        return pd.DataFrame({**columns, **{name: given[name] for name in unknown}}, index=given.index)

    def _column(self, column: Column, given: pd.DataFrame) -> pd.Series:
        values = given[column.name] if column.name in given else pd.Series(np.nan, given.index, object)
        dtype: Any = _TEXT if column.dtype == "str" else column.dtype
        if values.dtype == dtype:
            return values
        try:
            typed: pd.Series = values.astype(dtype)
        except (TypeError, ValueError) as error:
            raise TypeError(f"column {column.name} of table {self.name} is {column.dtype}: {error}") from error
        if column.dtype == "int64" and not np.array_equal(typed.to_numpy(), values.to_numpy(np.float64)):
            raise TypeError(f"column {column.name} of table {self.name} has parts of whole numbers")
        return typed

    def docstring(self) -> str:
        """The docstring of the method that gives this table."""
        lines = [self.meaning, "", "Columns:"]
        lines += [f"    {column.name} ({_typed(column)}): {column.meaning}" for column in self.columns]
        lines += [f"    Further columns: {self.further}"] if self.further else []
        return "\n".join([*lines, *(["", self.notes] if self.notes else [])])

    def markdown(self) -> str:
        """Its part of docs/tables.md."""
        lines = [f"## {self.name}", "", self.meaning, "", "| column | type | unit or range | meaning |",
                 "|---|---|---|---|"]
        lines += [f"| `{c.name}` | {_IN_WORDS[c.dtype]} | {c.unit} | {c.meaning} |" for c in self.columns]
        lines += ["", f"Further columns: {self.further}"] if self.further else []
        lines += ["", self.notes] if self.notes else []
        return "\n".join(lines)


def _typed(column: Column) -> str:
    return f"{column.dtype}, {column.unit}" if column.unit else column.dtype


def columns(*parts: Column | Sequence[Column]) -> tuple[Column, ...]:
    """Columns and groups of columns that several tables share, one after another."""
    return tuple(column for part in parts for column in ([part] if isinstance(part, Column) else part))


# What the rows of several tables are told apart by.
SCOPE = Column("scope", "str", "", "what the row speaks of: `task`, `mean` (over tasks), `mean of ranks` (over "
               "tasks) or `random` (a random order)")
TASK_NAME = Column("task", "str", "", "name of the task; empty where the row is of no single task")
NUM_FEWSHOT = Column("num_fewshot", "int64", "shots", "number of shots")
COMPONENT = Column("component", "str", "", "`head` or `ffn`")
OF_TASK = (Column("task", "str", "", "name of the task"), NUM_FEWSHOT)
OF_SCOPE = (SCOPE, TASK_NAME, NUM_FEWSHOT)


def interval_of(what: str, unit: str = "0..1", low: str = "low", high: str = "high") -> tuple[Column, Column]:
    """The two bounds of a 95 % interval."""
    return (Column(low, "float64", unit, f"lower bound of the 95 % interval of {what}"),
            Column(high, "float64", unit, "upper bound of it"))


def changes_of(dtype: Kind = "int64") -> tuple[Column, ...]:
    """How many documents changed, and in which direction."""
    return (Column("changed", dtype, "documents", "documents whose metric differs"),
            Column("fell", dtype, "documents", "documents whose metric is lower"),
            Column("rose", dtype, "documents", "documents whose metric is higher"))
