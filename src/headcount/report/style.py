"""How figures look: palette, fonts, panels by number of shots, menus; one description for the page, PNG and PDF.

Colours are those of Okabe and Ito, told apart by colour-blind readers; random orders are dashed, so that no figure
depends on colour alone.

Channels are objects (`alt.X("low:Q")`), no bare strings: Altair reads all its schemas to wrap each string.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from altair.utils.schemapi import debug_mode

Chart = Any  # Altair's charts have many types, alike for us
alt.data_transformers.disable_max_rows()
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
COMPONENTS = {"head": "attention heads", "ffn": "FFNs"}
LEGEND = {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 260}
# Of Vega-Lite, as Altair writes it: 6.1.
_VEGALITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
_CONFIG = {
    "font": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
    "axis": {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "gridColor": "#e8e8e8"},
    "legend": LEGEND,
    "title": {"fontSize": 13, "fontWeight": "bold", "anchor": "start"},
    "view": {"stroke": None},
}


def description(draw: Callable[[], Chart]) -> dict[str, Any] | None:
    """A figure as Vega-Lite, which the page, PNG and PDF are made from; nothing where there is nothing to draw.

    Altair would check each part against its schema each time it is copied; tests do so once for every figure.
    """
    with debug_mode(False):
        chart = draw()
        return None if chart is None else dict(chart.to_dict(validate=False))


def save(figure: dict[str, Any], path: Path) -> list[Path]:
    """Write a figure as PNG (twice the size) and PDF; returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = {path.with_suffix(".png"): vl_convert.vegalite_to_png(figure, vl_version=_VEGALITE, scale=2),
                path.with_suffix(".pdf"): vl_convert.vegalite_to_pdf(figure, vl_version=_VEGALITE)}
    for file, picture in pictures.items():
        file.write_bytes(picture)
    return list(pictures)


def fewest_first(rows: pd.DataFrame) -> list[str]:
    """Labels of numbers of shots, each once, in the order of the numbers: columns `shots` and `num_fewshot`."""
    return list(dict.fromkeys(rows.sort_values("num_fewshot", kind="stable")["shots"]))


def shots_column(rows: pd.DataFrame) -> alt.Column:
    """A panel per number of shots, few shots first."""
    return alt.Column("shots:N", title=None, sort=fewest_first(rows), header=alt.Header(labelFontSize=12))


def shots_colour(rows: pd.DataFrame) -> alt.Color:
    """The same colour for the same number of shots in every panel; few shots first."""
    names = fewest_first(rows)
    return alt.Color("shots:N", title="shots", scale=alt.Scale(domain=names, range=PALETTE[: len(names)]),
                     legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1))


def of_one_task(chart: Chart, rows: pd.DataFrame, choose: bool) -> Chart:
    """Show the task that the menu names, or the mean (the only task where there is one)."""
    return chart.transform_filter("datum.task == task" if choose else alt.datum.task == rows["task"].iloc[0])


def with_menu(chart: Chart, rows: pd.DataFrame, choose: bool) -> Chart:
    """Add the menu of tasks that `of_one_task` reads, where a figure has one."""
    tasks = list(dict.fromkeys(rows["task"]))
    menu = alt.param(name="task", value=tasks[0], bind=alt.binding_select(options=tasks, name="task "))
    return chart.add_params(menu) if choose else chart


def dressed(chart: Chart) -> Chart:
    """A finished figure in the report's fonts and sizes."""
    return chart.configure(**_CONFIG)


WIDTH = 950  # of the page, in pixels
LEGEND_LENGTH = 160
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
