"""docs/tables.md, from the declarations of a study's tables: `python tools/tables_page.py` writes it."""

from __future__ import annotations

from pathlib import Path

from headcount.analysis.study import TABLES

_ROOT = Path(__file__).resolve().parents[1]
_HEAD = """\
# Tables

Written by `make tables` from the declarations beside each table's function (`src/headcount/analysis/`). Each table is a
method of `headcount.open_study(FOLDER)` that gives a pandas frame, and but for `evaluations` a file of the report,
`FOLDER/tables/NAME.csv`.

Names of tasks carry no meaning: a column `scope` says whether a row is of one task or of an aggregate or a reference,
and `task` is empty where it is of no single task.
"""


def page() -> str:
    """The page."""
    listed = ", ".join(f"[{table.name}](#{table.name})" for table in TABLES)
    return "\n".join([_HEAD, f"{listed}.", "", "\n\n".join(table.markdown() for table in TABLES)]) + "\n"


if __name__ == "__main__":
    (_ROOT / "docs" / "tables.md").write_text(page(), encoding="utf-8")
