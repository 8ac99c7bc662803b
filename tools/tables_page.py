"""docs/tables.md, from the declarations of a study's tables: `python tools/tables_page.py` writes it."""

from __future__ import annotations

from pathlib import Path

from headcount.analysis.prediction import PREDICTION
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
_MADE = """
The report makes one more table of two of these, and writes it beside them:
`headcount.analysis.prediction.prediction(study.transfer(), study.correlations())` gives it in Python.
"""


def page() -> str:
    """The page."""
    listed = ", ".join(f"[{table.name}](#{table.name})" for table in TABLES)
    of_study = "\n\n".join(table.markdown() for table in TABLES)
    return "\n".join([_HEAD, f"{listed}.", "", of_study, _MADE, PREDICTION.markdown()]) + "\n"


if __name__ == "__main__":
    (_ROOT / "docs" / "tables.md").write_text(page(), encoding="utf-8")
