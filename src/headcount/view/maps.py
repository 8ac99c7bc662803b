"""Heat maps: the joint grid, induction scores of every head, correlations between tasks, and transfer.

A cell says its number in words as well as in colour wherever it is large enough, and what is special about a cell is
an outline or a dot, so that no map depends on colour alone. Every function returns None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import altair as alt
import numpy as np
import pandas as pd

from headcount.view import charts, words
from headcount.view.charts import COMPONENTS, PALETTE, Chart, dressed
from headcount.view.overlap import PRIMITIVES
from headcount.view.points import MEAN, groups
from headcount.view.scores import name_of
from headcount.view.selection import (
    SUMMARIES,
    alike_together,
    noise_by_shots,
    of_fraction,
    of_score,
    tasks_first,
    transferred,
)
from headcount.view.words import shots

WIDTH = 950  # of the page, in pixels
_LEGEND_LENGTH = 160
_WITHIN = "within the margin of the full model"


def grid_map(grid: pd.DataFrame, *, choose: bool) -> Chart:
    """Accuracy with heads and FFNs removed together; the outline holds the cells within the margin.

    Args:
        grid: One row per task, number of shots and cell.
        choose: With a menu for the task (for the page); otherwise the mean over tasks, or the only task.
    """
    if grid.empty:
        return None
    mean = grid[grid["task"] == MEAN]
    rows = pd.concat([mean, grid[grid["task"] != MEAN]], ignore_index=True)
    rows = rows if choose else rows[rows["task"] == rows["task"].iloc[0]]
    steps = {name: sorted(rows[f"{name}_fraction"].unique()) for name in ("heads", "ffns")}
    rows = rows.assign(shots=rows["num_fewshot"].map(shots),
                       x=rows["heads_fraction"].map(steps["heads"].index) - 0.5,
                       y=rows["ffns_fraction"].map(steps["ffns"].index) - 0.5)
    panels = int(rows["shots"].nunique())
    size = _cell(len(steps["heads"]), panels, 50, most=46)
    x = _step_axis(alt.X, "x", "heads removed (%)", steps["heads"])
    y = _step_axis(alt.Y, "y", "FFNs removed (%)", steps["ffns"])
    cells = alt.Chart().transform_filter("!isValid(datum.outline)").transform_calculate(
        x2="datum.x + 1", y2="datum.y + 1", middle="datum.x + .5", centre="datum.y + .5")
    colour = alt.Color("accuracy:Q", title="accuracy", scale=alt.Scale(scheme="viridis", zero=False, nice=False),
                       legend=alt.Legend(format=".2f", gradientLength=_LEGEND_LENGTH))
    rects = cells.mark_rect().encode(x=x, x2="x2:Q", y=y, y2="y2:Q", color=colour, tooltip=_grid_tooltip())
    text = cells.mark_text(fontSize=11 if size >= 34 else 9).encode(
        x="middle:Q", y="centre:Q", text="text:N",
        color=alt.condition("datum.dark", alt.value("white"), alt.value("black")))
    edges = alt.Chart().transform_filter("isValid(datum.outline)").encode(x="x:Q", x2="x2:Q", y="y:Q", y2="y2:Q")
    width = 2.5 if size >= 34 else 1.8
    halo = edges.mark_rule(stroke="white", strokeWidth=width + 3, strokeCap="square")
    outline = edges.mark_rule(strokeWidth=width, strokeCap="square").encode(
        stroke=alt.Stroke("outline:N", title=None, scale=alt.Scale(domain=[_WITHIN], range=["black"]),
                          legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=2.5, symbolSize=300)))
    data = pd.concat([_grid_cells(rows), _grid_edges(rows)], ignore_index=True)
    chart = alt.layer(rects, text, halo, outline, data=data).properties(
        width=size * len(steps["heads"]), height=size * len(steps["ffns"]))
    chart = charts.of_one_task(chart, rows, choose).facet(column=charts.shots_column(rows))
    return dressed(charts.with_menu(chart, rows, choose)).configure_legend(orient="top", **charts.LEGEND)


def _step_axis(channel: type[alt.X] | type[alt.Y], field: str, title: str, steps: Sequence[float]) -> alt.X | alt.Y:
    labels = [f"{100 * step:.3g}" for step in steps]
    return channel(f"{field}:Q", title=title, scale=alt.Scale(domain=[-0.5, len(steps) - 0.5], nice=False, zero=False),
                   axis=alt.Axis(values=list(range(len(steps))), labelExpr=f"{labels}[datum.value]", grid=False,
                                 ticks=False, domain=False, labelOverlap=False))


def _grid_cells(rows: pd.DataFrame) -> pd.DataFrame:
    columns = ["task", "shots", "x", "y", "heads_removed", "ffns_removed", "parameters_removed_share", "accuracy",
               "low", "high", "difference", "difference_low", "difference_high", "verdict", "documents"]
    of_task = rows.groupby("task")["accuracy"]
    least, most = of_task.transform("min"), of_task.transform("max")
    return rows[columns].round(4).assign(
        text=rows["accuracy"].map(_hundredths),
        # White on the dark half of the colours, which are spread over the accuracies of one task.
        dark=rows["accuracy"] < least + 0.45 * (most - least))


def _grid_edges(rows: pd.DataFrame) -> pd.DataFrame:
    """The borders between cells within the margin and all else, as lines."""
    edges = []
    for (task, panel), of_panel in groups(rows[rows["within_margin"].astype(bool)], "task", "shots"):
        inside = set(zip(of_panel["x"], of_panel["y"], strict=True))
        for x, y in inside:
            sides = {(x - 1, y): (x, x, y, y + 1), (x + 1, y): (x + 1, x + 1, y, y + 1),
                     (x, y - 1): (x, x + 1, y, y), (x, y + 1): (x, x + 1, y + 1, y + 1)}
            edges += [(task, panel, *line) for beside, line in sides.items() if beside not in inside]
    return pd.DataFrame(edges, columns=["task", "shots", "x", "x2", "y", "y2"]).assign(outline=_WITHIN)


def _grid_tooltip() -> list[alt.Tooltip]:
    return [alt.Tooltip("task:N"), alt.Tooltip("shots:N"), alt.Tooltip("heads_removed:Q", title="heads removed"),
            alt.Tooltip("ffns_removed:Q", title="FFNs removed"),
            alt.Tooltip("parameters_removed_share:Q", title="of all parameters", format=".1%"),
            alt.Tooltip("accuracy:Q", format=".3f"), alt.Tooltip("low:Q", format=".3f"),
            alt.Tooltip("high:Q", format=".3f"), alt.Tooltip("difference:Q", title="to the full model", format="+.3f"),
            alt.Tooltip("difference_low:Q", title="at least (95 %)", format="+.3f"),
            alt.Tooltip("difference_high:Q", title="at most (95 %)", format="+.3f"),
            alt.Tooltip("verdict:N", title="of the margin"), alt.Tooltip("documents:Q")]


def induction_maps(induction: pd.DataFrame) -> Chart:
    """Prefix matching and copying of every head, layer by head; a ring marks the induction heads."""
    rows = induction[induction["weights"] == "trained"] if len(induction) else induction
    if rows.empty:
        return None
    layers, heads = int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1
    size = max(4, min(18, (WIDTH - 90) // 2 // heads, 520 // layers))
    across, line = (0.62 * size, 1.8) if size >= 12 else (7.0, 1.2)  # of a ring
    every = 1 if size >= 14 else 2 if size >= 9 else 4  # label
    names = [name_of("head", layer, head) for layer, head in zip(rows["layer"], rows["head"], strict=True)]
    panels = []
    for primitive, title in PRIMITIVES.items():
        # Attention is a share; what copying adds is seldom more than a tenth, and would be all dark on that scale.
        span = [0, 1] if primitive == "prefix_matching" else [min(0, rows[primitive].min()), rows[primitive].max()]
        data = rows[["layer", "head", "induction"]].assign(
            name=names, value=rows[primitive].round(4), deviation=np.sqrt(rows[f"{primitive}_variance"]).round(4),
            previous_token=rows["previous_token"].round(4), ov_copying=rows["ov_copying"].round(4))
        base = alt.Chart(data).encode(
            x=alt.X("head:O", title="head", axis=alt.Axis(labelAngle=0, values=list(range(0, heads, every)))),
            y=alt.Y("layer:O", title="layer (0 is next to the input)", sort="descending",
                    axis=alt.Axis(values=list(range(0, layers, every)))))
        cells = base.mark_rect().encode(
            color=alt.Color("value:Q", title="score", legend=alt.Legend(gradientLength=_LEGEND_LENGTH),
                            scale=alt.Scale(scheme="viridis", domain=span)),
            tooltip=[alt.Tooltip("name:N", title="head"), alt.Tooltip("value:Q", title=title, format=".3f"),
                     alt.Tooltip("deviation:Q", title="standard deviation over texts", format=".3f"),
                     alt.Tooltip("previous_token:Q", title="previous token", format=".3f"),
                     alt.Tooltip("ov_copying:Q", title="OV copying", format=".3f")])
        rings = base.transform_filter("datum.induction").transform_calculate(is_="'induction head'")
        halo = rings.mark_point(stroke="white", strokeWidth=line + 1.6, size=across**2, opacity=1)
        ring = rings.mark_point(strokeWidth=line, size=across**2, opacity=1).encode(
            stroke=alt.Stroke("is_:N", title=None, scale=alt.Scale(domain=["induction head"], range=[PALETTE[1]])))
        panels.append(alt.layer(cells, halo, ring).properties(width=size * heads, height=size * layers, title=title))
    return dressed(alt.hconcat(*panels).resolve_scale(color="independent")).configure_legend(
        orient="top", **charts.LEGEND)


def task_matrix(correlations: pd.DataFrame, component: str, *, score: str | None = None) -> Chart:
    """Rank correlation of importance between tasks, a panel per number of shots; the diagonal is each task's own.

    Panels of scores that are mostly noise are pale, and the title says so.

    Args:
        correlations: One row per pair; each pair once is enough.
        component: "head" or "ffn".
        score: Which score of importance; the first found unless told.
    """
    rows = of_score(correlations, component, score)
    rows = rows[rows["kind"].isin(["tasks", "reliability"]) & (rows["num_fewshot"] >= 0)]
    if rows.empty:
        return None
    turned = rows.rename(columns={"task": "other_task", "other_task": "task"})
    rows = pd.concat([rows, turned]).drop_duplicates(["task", "other_task", "num_fewshot"])
    names = tasks_first([*alike_together(rows), *rows["task"], *rows["other_task"]])
    tooltip = [alt.Tooltip("row:N", title="task"), alt.Tooltip("column:N", title="and"), alt.Tooltip("shots:N"),
               alt.Tooltip("kind:N", title="what"), alt.Tooltip("value:Q", title="Spearman", format=".3f"),
               alt.Tooltip("interval:N", title="95 % interval"), alt.Tooltip("alone:N", title="layers alone give"),
               alt.Tooltip("inside:N", title="within layers"),
               alt.Tooltip("argsort:N", title="the paper's argsort variant")]
    noisy = noise_by_shots(rows)
    cells = pd.DataFrame({
        "row": rows["task"], "column": rows["other_task"], "shots": rows["num_fewshot"].map(shots),
        "kind": rows["kind"].map({"tasks": "two orders", "reliability": "itself, on other examples"}),
        "value": rows["correlation"].round(4), "low": rows["low"].round(4), "high": rows["high"].round(4),
        "interval": [words.within(a, b) for a, b in zip(rows["low"], rows["high"], strict=True)],
        "alone": rows["correlation_layers_alone"].map(words.known), "inside": [
            words.known(r) + words.bracketed(words.within(a, b) if a == a else "")
            for r, a, b in zip(rows["correlation_in_layers"], rows["in_layers_low"], rows["in_layers_high"],
                               strict=True)],
        "argsort": rows["argsort_correlation"].map(words.known), "framed": rows["kind"] == "reliability",
        "pale": rows["num_fewshot"].isin(list(noisy))})
    title = f"rank correlation of the importance of {COMPONENTS[component]}; framed: reliability"
    chart = _matrix(cells, names, names, _hundredths, title, 1.0, tooltip, ("", ""))
    lines = words.noisy(noisy, rows["num_fewshot"].nunique()).split("; ")
    return chart.properties(title=[f"{line[0].upper()}{line[1:]}" for line in lines]) if noisy else chart


def transfer_map(transfer: pd.DataFrame, component: str, *, fraction: float | None = None) -> Chart:
    """What each task loses when it is pruned by another's order instead of its own, in points of accuracy.

    Args:
        transfer: One row per recipient, donor, number of shots and fraction.
        component: "head" or "ffn".
        fraction: Share removed; the one nearest one half unless told.
    """
    rows = transferred(transfer, component, unseen=False)
    rows = of_fraction(rows[rows["fraction"] > 0], fraction)
    # A task's own order stands on the diagonal; there is none of the mean over tasks.
    own = rows["donor"] == "own"
    rows = rows.assign(donor=rows["donor"].where(~own, rows["task"]))[~own | (rows["task"] != MEAN)]
    if rows.empty:
        return None
    cells = pd.DataFrame({
        "row": rows["donor"], "column": rows["task"], "shots": rows["num_fewshot"].map(shots),
        "value": 100 * rows["difference"], "low": 100 * rows["difference_low"], "high": 100 * rows["difference_high"],
        "accuracy": rows["accuracy"], "documents": rows["documents"],
        "framed": (rows["donor"] == rows["task"]) & (rows["task"] != MEAN),
        "sure": (rows["difference_low"] > 0) | (rows["difference_high"] < 0)}).round(4)
    tooltip = [alt.Tooltip("column:N", title="task"), alt.Tooltip("row:N", title="pruned by the order of"),
               alt.Tooltip("shots:N"), alt.Tooltip("value:Q", title="points to its own order", format="+.1f"),
               alt.Tooltip("low:Q", title="at least", format="+.1f"),
               alt.Tooltip("high:Q", title="at most", format="+.1f"), alt.Tooltip("accuracy:Q", format=".3f"),
               alt.Tooltip("documents:Q")]
    largest = max(1.0, float(cells["value"].abs().max())) if cells["value"].notna().any() else 1.0
    title = (f"points of accuracy against the own order, {100 * rows['fraction'].iloc[0]:.3g} % of "
             f"{COMPONENTS[component]} removed; bold: the interval leaves out 0")
    columns, donors = tasks_first(cells["column"]), set(cells["row"])
    return _matrix(cells, tasks_first([name for name in [*columns, *cells["row"]] if name in donors]), columns, _whole,
                   title, largest, tooltip, ("pruned by the order of", "task"))


def _matrix(cells: pd.DataFrame, rows: list[str], columns: list[str], said: Callable[[float], str], title: str,
            largest: float, tooltip: list[alt.Tooltip], axes: tuple[str, str]) -> Chart:
    """Numbers from -largest to largest between two lists of names, a panel per number of shots."""
    # White text is easier to read than black on the darkest blue, never on the orange.
    pale = cells.get("pale", pd.Series(False, cells.index))
    cells = cells.assign(text=cells["value"].map(said), dark=(cells["value"] > 0.88 * largest) & ~pale, pale=pale)
    panels, names = int(cells["shots"].nunique()), 30 + 7 * max(map(len, rows))
    beside = next(n for n in range(panels, 0, -1) if n == 1 or _cell(len(columns), n, names, most=34) >= 21)
    size = _cell(len(columns), beside, names, most=34)
    weight = alt.ExprRef(expr=f"indexof({list(SUMMARIES)}, datum.label) >= 0 ? 'bold' : 'normal'")
    base = alt.Chart().encode(
        x=alt.X("column:N", title=axes[1] or None, sort=columns,
                axis=alt.Axis(labelAngle=-45, labelFontWeight=weight, domain=False, ticks=False)),
        y=alt.Y("row:N", title=axes[0] or None, sort=rows,
                axis=alt.Axis(labelFontWeight=weight, domain=False, ticks=False)))
    ground = base.mark_rect(fill="#ececec", stroke="white").encode(tooltip=tooltip)
    colour = alt.Color("value:Q", title=title, legend=alt.Legend(gradientLength=_LEGEND_LENGTH, titleLimit=800),
                       scale=alt.Scale(domain=[-largest, 0, largest], range=[PALETTE[1], "#fbfbfb", PALETTE[0]]))
    rects = base.mark_rect(stroke="white").encode(
        color=colour, tooltip=tooltip, opacity=alt.condition("datum.pale", alt.value(0.2), alt.value(1)))
    framed = base.transform_filter("datum.framed").mark_rect(fill=None, stroke="black", strokeWidth=1.3)
    text = [base.transform_filter(f"{'' if bold else '!'}datum.sure").mark_text(
        fontSize=8 if size < 24 else 9 if size < 30 else 10, fontWeight="bold" if bold else "normal").encode(
        text="text:N", color=alt.condition("datum.dark", alt.value("white"), alt.value("black")))
        for bold in (False, True)]
    chart = alt.layer(ground, rects, framed, *text, data=cells).properties(
        width=size * len(columns), height=size * len(rows))
    facet = alt.Facet("shots:N", title=None, sort=charts.fewest_first(cells["shots"]),
                      header=alt.Header(labelFontSize=12))
    chart = chart.facet(facet=facet, columns=beside).resolve_axis(x="independent")
    return dressed(chart).configure_legend(orient="top", **charts.LEGEND)


def _cell(columns: int, panels: int, names: int, *, most: int) -> int:
    """How wide a cell may be for so many panels to stand beside names of so many pixels."""
    return max(16, min(most, (WIDTH - names - 26 * panels) // (panels * columns)))


def _hundredths(value: float) -> str:
    """`.62`, `1.0`, `-.10`, and a dash where it is not known."""
    if value != value:
        return "\N{EN DASH}"
    text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}"
    return text.replace("0.", ".", 1).replace("-.00", ".00").replace("-", "\N{MINUS SIGN}")


def _whole(value: float) -> str:
    """`+3`, `0`, `-12`, and a dash where it is not known."""
    if value != value:
        return "\N{EN DASH}"
    return f"{value:+.0f}".replace("+0", "0").replace("-0", "0").replace("-", "\N{MINUS SIGN}")
