"""A heat map of numbers between two lists of names, a panel per number of shots.

A cell says its number in words as well as in colour wherever it is large enough, and what is special about a cell is
an outline or a dot, so that no map depends on colour alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import altair as alt
import pandas as pd

from headcount.report.style import LEGEND, LEGEND_LENGTH, PALETTE, WIDTH, Chart, dressed, fewest_first


def matrix(cells: pd.DataFrame, rows: list[str], columns: list[str], said: Callable[[float], str], title: str,
            largest: float, tooltip: list[alt.Tooltip], axes: tuple[str, str], *, bold: Sequence[str]) -> Chart:
    """Numbers from -largest to largest between two lists of names, a panel per number of shots; some names `bold`."""
    # White text is easier to read than black on the darkest blue, never on the orange.
    pale = cells.get("pale", pd.Series(False, cells.index))
    cells = cells.assign(text=cells["value"].map(said), dark=(cells["value"] > 0.88 * largest) & ~pale, pale=pale)
    panels, names = int(cells["shots"].nunique()), 30 + 7 * max(map(len, rows))
    beside = next(n for n in range(panels, 0, -1) if n == 1 or cell_size(len(columns), n, names, most=34) >= 21)
    size = cell_size(len(columns), beside, names, most=34)
    weight = alt.ExprRef(expr=f"indexof({list(bold)}, datum.label) >= 0 ? 'bold' : 'normal'")
    base = alt.Chart().encode(
        x=alt.X("column:N", title=axes[1] or None, sort=columns,
                axis=alt.Axis(labelAngle=-45, labelFontWeight=weight, domain=False, ticks=False)),
        y=alt.Y("row:N", title=axes[0] or None, sort=rows,
                axis=alt.Axis(labelFontWeight=weight, domain=False, ticks=False)))
    ground = base.mark_rect(fill="#ececec", stroke="white").encode(tooltip=tooltip)
    colour = alt.Color("value:Q", title=title, legend=alt.Legend(gradientLength=LEGEND_LENGTH, titleLimit=800),
                       scale=alt.Scale(domain=[-largest, 0, largest], range=[PALETTE[1], "#fbfbfb", PALETTE[0]]))
    rects = base.mark_rect(stroke="white").encode(
        color=colour, tooltip=tooltip, opacity=alt.condition("datum.pale", alt.value(0.2), alt.value(1)))
    framed = base.transform_filter("datum.framed").mark_rect(fill=None, stroke="black", strokeWidth=1.3)
    text = [base.transform_filter(f"{'' if sure else '!'}datum.sure").mark_text(
        fontSize=8 if size < 24 else 9 if size < 30 else 10, fontWeight="bold" if sure else "normal").encode(
        text=alt.Text("text:N"), color=alt.condition("datum.dark", alt.value("white"), alt.value("black")))
        for sure in (False, True)]
    chart = alt.layer(ground, rects, framed, *text, data=cells).properties(
        width=size * len(columns), height=size * len(rows))
    facet = alt.Facet("shots:N", title=None, sort=fewest_first(cells),
                      header=alt.Header(labelFontSize=12))
    chart = chart.facet(facet=facet, columns=beside).resolve_axis(x="independent")
    return dressed(chart).configure_legend(orient="top", **LEGEND)


def cell_size(columns: int, panels: int, names: int, *, most: int) -> int:
    """How wide a cell may be for so many panels to stand beside names of so many pixels."""
    return max(16, min(most, (WIDTH - names - 26 * panels) // (panels * columns)))


def hundredths(value: float) -> str:
    """`.62`, `1.0`, `-.10`, and a dash where it is not known."""
    if value != value:
        return "\N{EN DASH}"
    text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}"
    return text.replace("0.", ".", 1).replace("-.00", ".00").replace("-", "\N{MINUS SIGN}")
