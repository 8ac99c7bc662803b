"""Heads and FFNs pruned jointly: the map of the grid, its sentence and its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import altair as alt
import pandas as pd

from headcount.analysis.grid import reachable
from headcount.analysis.rows import ALL_TASKS, MEAN, groups, labelled, most_shots, summary
from headcount.analysis.study import Study
from headcount.report import words
from headcount.report.matrix import cell_size, hundredths
from headcount.report.section import Section, Table, mean_first, plain_columns, section, thousandths
from headcount.report.style import LEGEND, LEGEND_LENGTH, Chart, dressed, of_one_task, shots_column, with_menu
from headcount.report.words import shots
from headcount.stats.baselines import NO_INTERVAL
from headcount.stats.intervals import WITHIN

_WITHIN = "within the margin of the full model"


def grid_map(grid: pd.DataFrame, *, choose: bool) -> Chart:
    """Accuracy with heads and FFNs removed together; the outline holds the cells within the margin.

    Args:
        grid: One row per task, number of shots and cell.
        choose: With a menu for the task (for the page); otherwise the mean over tasks, or the only task.
    """
    if grid.empty:
        return None
    rows = labelled(pd.concat([grid[grid["scope"] == MEAN], grid[grid["scope"] != MEAN]], ignore_index=True))
    rows = rows if choose else rows[rows["task"] == rows["task"].iloc[0]]
    steps = {name: sorted(rows[f"{name}_fraction"].unique()) for name in ("heads", "ffns")}
    rows = rows.assign(shots=rows["num_fewshot"].map(shots),
                       x=rows["heads_fraction"].map(steps["heads"].index) - 0.5,
                       y=rows["ffns_fraction"].map(steps["ffns"].index) - 0.5)
    panels = int(rows["shots"].nunique())
    size = cell_size(len(steps["heads"]), panels, 50, most=46)
    x = _step_axis(alt.X, "x", "heads removed (%)", steps["heads"])
    y = _step_axis(alt.Y, "y", "FFNs removed (%)", steps["ffns"])
    cells = alt.Chart().transform_filter("!isValid(datum.outline)").transform_calculate(
        x2="datum.x + 1", y2="datum.y + 1", middle="datum.x + .5", centre="datum.y + .5")
    colour = alt.Color("accuracy:Q", title="accuracy", scale=alt.Scale(scheme="viridis", zero=False, nice=False),
                       legend=alt.Legend(format=".2f", gradientLength=LEGEND_LENGTH))
    rects = cells.mark_rect().encode(x=x, x2=alt.X2("x2:Q"), y=y, y2=alt.Y2("y2:Q"), color=colour,
                                     tooltip=_grid_tooltip())
    text = cells.mark_text(fontSize=11 if size >= 34 else 9).encode(
        x=alt.X("middle:Q"), y=alt.Y("centre:Q"), text=alt.Text("text:N"),
        color=alt.condition("datum.dark", alt.value("white"), alt.value("black")))
    edges = alt.Chart().transform_filter("isValid(datum.outline)").encode(
        x=alt.X("x:Q"), x2=alt.X2("x2:Q"), y=alt.Y("y:Q"), y2=alt.Y2("y2:Q"))
    width = 2.5 if size >= 34 else 1.8
    halo = edges.mark_rule(stroke="white", strokeWidth=width + 3, strokeCap="square")
    outline = edges.mark_rule(strokeWidth=width, strokeCap="square").encode(
        stroke=alt.Stroke("outline:N", title=None, scale=alt.Scale(domain=[_WITHIN], range=["black"]),
                          legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=2.5, symbolSize=300)))
    data = pd.concat([_grid_cells(rows), _grid_edges(rows)], ignore_index=True)
    chart = alt.layer(rects, text, halo, outline, data=data).properties(
        width=size * len(steps["heads"]), height=size * len(steps["ffns"]))
    chart = of_one_task(chart, rows, choose).facet(column=shots_column(rows))
    return dressed(with_menu(chart, rows, choose)).configure_legend(orient="top", **LEGEND)


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
        text=rows["accuracy"].map(hundredths),
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
            alt.Tooltip("verdict:N", title="loss beside the margin"), alt.Tooltip("documents:Q")]


def grid_sentence(grid: pd.DataFrame, margin: float) -> str:
    """How much can go jointly, beside heads alone and FFNs alone.

    What counts is what can be reached from the full model step by step, each step within the margin.

    Args:
        grid: One row per task, number of shots and cell.
        margin: The loss of accuracy to rule out.
    """
    rows = most_shots(summary(grid))
    if rows.empty:
        return ""
    beginning = f"With {words.shots_of(rows)}, "
    full = rows[(rows["heads_fraction"] == 0) & (rows["ffns_fraction"] == 0)]
    if len(full) and full["low"].isna().iloc[0]:
        return f"{beginning}nothing can be said of what can go jointly: {NO_INTERVAL}."
    # At chance there is nothing to lose.
    above = full["low"].iloc[0] > full["baseline"].iloc[0] if len(full) else True
    if not (above and full["within_margin"].all()):
        return (f"{beginning}nothing can be said of what can go jointly: the full model's accuracy {words.on(rows)}, "
                f"{full['accuracy'].iloc[0]:.2f}, is not shown to be above {full['baseline'].iloc[0]:.2f}, which "
                "guessing or a constant answer gets.")
    free = rows[reachable(rows)].sort_values("parameters_removed_share")
    # Where a share is less than one head or FFN, nothing of them is gone.
    free = free[((free["heads_removed"] > 0) | (free["heads_fraction"] == 0))
                & ((free["ffns_removed"] > 0) | (free["ffns_fraction"] == 0))]
    heads = free.loc[free["ffns_fraction"] == 0, "heads_fraction"].max()
    ffns = free.loc[free["heads_fraction"] == 0, "ffns_fraction"].max()
    alone = f"alone, at the grid's steps, {words.share(heads)} of the heads or {words.share(ffns)} of the FFNs can go"
    joint = free[(free["heads_removed"] > 0) & (free["ffns_removed"] > 0)]
    ruled_out = words.told(WITHIN, margin)
    if not ((rows["heads_removed"] > 0) & (rows["ffns_removed"] > 0)).any():
        return f"{beginning}no cell removes both heads and FFNs: ask for larger --grid-fractions."
    if joint.empty:
        both = rows[(rows["heads_removed"] > 0) & (rows["ffns_removed"] > 0)].sort_values("parameters_removed_share")
        first = both.iloc[0]
        alone = f"; {alone}" if heads > 0 or ffns > 0 else ""
        return (f"{beginning}heads and FFNs are not shown to be free jointly: without "
                f"{words.share(first['heads_fraction'])} of the heads and {words.share(first['ffns_fraction'])} of the "
                f"FFNs, accuracy {words.on(rows)} changes by "
                f"{words.points(first)} points: {words.told(first['verdict'], margin)}{alone}.")
    best = joint.iloc[-1]
    end = rows[["heads_fraction", "ffns_fraction"]].max()
    edge = ", and the grid goes no further" if (best[end.index] == end).all() else ""
    than = f", the full model's {full['accuracy'].iloc[0]:.3f}" if len(full) else ""
    return (f"{beginning}{words.share(best['heads_fraction'])} of the heads and {words.share(best['ffns_fraction'])} "
            f"of the FFNs can go jointly, {words.percent(best['parameters_removed_share'])} of all parameters{edge}; "
            f"{alone}. Accuracy {words.on(rows)} is then {best['accuracy']:.3f}{than} (95 % interval of the difference "
            f"{words.between(best)} points; {ruled_out} at every step of a path there).")


def sections(study: Study) -> Iterator[Section]:
    """The map of the grid."""
    grid = study.grid()
    if grid.empty:
        return
    yield section(
        "grid", "Heads and FFNs together", lambda: grid_map(grid, choose=True),
        grid_sentence(grid, study.spec["margin"]),
        f"Accuracy on the first documents of every task ({grid['documents'].max()} of all tasks), removed by "
        + ("the orders of all tasks together" if (grid["order"] == ALL_TASKS).any() else "each task's own orders")
        + f"; the line encloses cells where {words.told(WITHIN, study.spec['margin'])}, tested one by one: of "
        "many cells that lose about as much, a few are enclosed by chance. Where the full model is not above its "
        "baseline, no cell is enclosed.", static=lambda: grid_map(grid, choose=False))


def tables(study: Study) -> Iterator[Table]:
    """The grid in numbers."""
    grid = study.grid()
    if len(grid):
        rows = thousandths(mean_first(grid), "accuracy", "difference_low", "difference_high",
                            "parameters_removed_share")
        yield Table("Heads and FFNs together", "Accuracy on the grid's documents; the difference to the full model's.",
                    plain_columns(rows[["task", "num_fewshot", "heads_fraction", "ffns_fraction",
                                         "parameters_removed_share", "accuracy", "difference_low", "difference_high",
                                         "verdict", "documents"]]))
