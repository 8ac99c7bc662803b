"""Tables to figures: one description (Vega-Lite, through Altair) for the page, PNG and PDF.

Colours are those of Okabe and Ito, told apart by colour-blind readers; random orders are dashed, so that no figure
depends on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from headcount.view.points import MEAN
from headcount.view.scores import mean_importance, name_of
from headcount.view.words import shots

Chart = Any  # Altair's charts have many types, alike for us

alt.data_transformers.disable_max_rows()

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
COMPONENTS = {"head": "attention heads", "ffn": "FFNs"}
_BY = {"gradient": "each task's own order", "oracle": "each task's own order", "common": "one order for all tasks",
       "random": "at random"}
_DASHES = {"each task's own order": [1, 0], "one order for all tasks": [1, 3], "at random": [4, 3]}
_OWN = 'datum.by == "each task\'s own order"'
LEGEND = {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 260}
_CONFIG = {
    "font": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
    "axis": {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "gridColor": "#e8e8e8"},
    "legend": LEGEND,
    "title": {"fontSize": 13, "fontWeight": "bold", "anchor": "start"},
    "view": {"stroke": None},
}


def headline(curves: pd.DataFrame, free: pd.DataFrame, baselines: dict[int, float]) -> Chart:
    """Mean accuracy as heads, and as FFNs, go: by importance and at random, with intervals and free fractions.

    Args:
        curves: `Study.curves()`.
        free: `Study.free_fractions()`.
        baselines: Chance (or the best constant answer) by number of shots.
    """
    task = summary_task(curves)
    rows = curves[curves["task"] == task]
    panels = [
        _curve_panel(rows[rows["component"] == c], free[(free["task"] == task) & (free["component"] == c)], baselines)
        .properties(width=285, height=240, title=f"{COMPONENTS[c][0].upper()}{COMPONENTS[c][1:]} removed")
        for c in ("head", "ffn") if (rows["component"] == c).any()
    ]
    return dressed(alt.hconcat(*panels))


def task_curves(curves: pd.DataFrame, component: str) -> Chart:
    """Accuracy of every task as one kind of component goes: small multiples, the mean first."""
    rows = _labelled(curves[(curves["component"] == component)])
    tasks = list(dict.fromkeys([*([MEAN] if (rows["task"] == MEAN).any() else []), *rows["task"]]))
    x = alt.X("percent:Q", title=f"{COMPONENTS[component]} removed (%)", scale=alt.Scale(domain=[0, 100]))
    base = alt.Chart().encode(x=x)
    band = base.transform_filter(_OWN).mark_area(opacity=0.15).encode(
        y=alt.Y("low:Q", title="accuracy", scale=alt.Scale(domain=[0, 1])), y2="high:Q", color=shots_colour(rows))
    line = base.mark_line(strokeWidth=1.8).encode(y="accuracy:Q", color=shots_colour(rows), strokeDash=_orders(rows))
    dots = base.mark_circle(size=16, opacity=1).encode(y="accuracy:Q", color=shots_colour(rows),
                                                       tooltip=_curve_tooltip())
    chart = alt.layer(band, line, dots, data=rows).properties(width=180, height=125).facet(
        facet=alt.Facet("task:N", title=None, sort=tasks, header=alt.Header(labelFontSize=12, labelFontWeight="bold")),
        columns=4)
    return dressed(chart).configure_legend(orient="top", **LEGEND)


def head_map(importance: pd.DataFrame, score: str, *, choose: bool) -> Chart:
    """Importance of every head, layer by head.

    Args:
        importance: `Study.importance()`.
        score: Which gradient score.
        choose: With a menu for the task (for the page); otherwise the mean over tasks, a panel per number of shots.
    """
    of_heads = importance[(importance["component"] == "head") & (importance["method"] == "gradient")]
    beside = "position" if score == "example" else "example"
    rows, other = (_with_mean(of_heads[of_heads["score"] == name]) for name in (score, beside))
    places = ["task", "num_fewshot", "layer", "head"]
    other = other.assign(other=other.groupby(places[:2])["importance"].rank(ascending=False, method="min"))
    rows = rows.merge(other[[*places, "other"]], on=places, how="left")
    rows["rank"] = rows.groupby(places[:2])["importance"].rank(ascending=False, method="min")
    rows["name"] = [name_of("head", layer, head) for layer, head in zip(rows["layer"], rows["head"], strict=True)]
    rows["importance"] = rows["importance"].map(lambda x: float(f"{x:.4g}"))
    # Tasks differ in scale; the colour is the share of the largest, so that panels can be compared.
    largest = rows.groupby(["task", "num_fewshot"])["importance"].transform("max")
    rows["share"] = (rows["importance"] / largest.where(largest > 0, 1)).round(4)
    rows["shots"] = rows["num_fewshot"].map(shots)
    layers, heads = int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1
    size = max(4, min(20, 520 // max(layers, heads)))
    columns = ["task", "shots", "layer", "head", "name", "importance", "share", "stderr", "rank", "other"]
    chart = alt.Chart(rows[columns]).mark_rect().encode(
        x=alt.X("head:O", title="head", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("layer:O", title="layer (0 is next to the input)", sort="descending", axis=alt.Axis(labelOverlap=True)),
        color=alt.Color("share:Q", title=["share of the largest", f"by {score}"],
                        scale=alt.Scale(type="sqrt", scheme="viridis", domain=[0, 1])),
        tooltip=[alt.Tooltip("name:N", title="head"), alt.Tooltip("task:N"), alt.Tooltip("shots:N"),
                 alt.Tooltip("importance:Q", format=".3g"),
                 alt.Tooltip("stderr:Q", title="standard error", format=".2g"),
                 alt.Tooltip("rank:Q", title=f"rank by {score}"), alt.Tooltip("other:Q", title=f"rank by {beside}")],
    ).properties(width=size * heads, height=size * layers)
    return dressed(with_menu(of_one_task(chart, rows, choose).facet(column=shots_column(rows)), rows, choose))


def ffn_bars(importance: pd.DataFrame, scores: Sequence[str], *, choose: bool) -> Chart:
    """Importance of every FFN by layer, a row of panels for each score, the first one above; `choose` as in `head_map`.

    Args:
        importance: `Study.importance()`.
        scores: Which scores, those that were not measured are left out.
        choose: With a menu for the task.
    """
    rows = importance[(importance["component"] == "ffn") & importance["score"].isin(list(scores))]
    rows = _with_mean(rows)
    rows["name"] = [f"L{layer}F" for layer in rows["layer"]]
    rows["shots"] = rows["num_fewshot"].map(shots)
    rows["low"], rows["high"] = rows["importance"] - rows["stderr"], rows["importance"] + rows["stderr"]
    known = {"accuracy": "accuracy lost without it", "gold_loglikelihood": "log-likelihood lost (nats)"}
    titles = {score: known.get(score, "gradient score (nats)") for score in scores}
    width = max(220, min(420, 9 * (int(rows["layer"].max()) + 1)))
    panels = []
    for name, title in titles.items():
        of_score = rows[rows["score"] == name]
        if of_score.empty:
            continue
        x = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
        base = alt.Chart().encode(x=x)
        bars = base.mark_bar(color=PALETTE[0]).properties(name=f"{name}_bars").encode(
            y=alt.Y("importance:Q", title=title),
            tooltip=[alt.Tooltip("name:N", title="FFN"), "task:N", "shots:N", alt.Tooltip("importance:Q", format=".3g"),
                     alt.Tooltip("stderr:Q", title="standard error", format=".2g")])
        errors = base.transform_filter("isValid(datum.stderr)").mark_rule(color="#333").encode(y="low:Q", y2="high:Q")
        columns = ["task", "shots", "layer", "name", "importance", "stderr", "low", "high"]
        layered = alt.layer(bars, errors, data=of_score[columns]).properties(width=width, height=150)
        panels.append(of_one_task(layered, rows, choose).facet(column=shots_column(rows))
                      .resolve_scale(y="independent"))
    return dressed(with_menu(alt.vconcat(*panels), rows, choose))


def save(chart: Chart, path: Path) -> list[Path]:
    """Write a figure as PNG (twice the size) and PDF; returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [path.with_suffix(".png"), path.with_suffix(".pdf")]
    chart.save(str(found[0]), scale_factor=2)
    chart.save(str(found[1]))
    return found


def _curve_panel(rows: pd.DataFrame, free: pd.DataFrame, baselines: dict[int, float]) -> Chart:
    labelled = _labelled(rows)
    base = alt.Chart(labelled).encode(x=alt.X("percent:Q", title="removed (%)", scale=alt.Scale(domain=[0, 100]),
                                                    axis=alt.Axis(values=list(range(0, 101, 20)))))
    y = alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]))
    band = base.transform_filter(_OWN).mark_area(opacity=0.18).encode(
        y=alt.Y("low:Q", title="accuracy"), y2="high:Q", color=shots_colour(labelled))
    line = base.mark_line(strokeWidth=2).encode(y=y, color=shots_colour(labelled), strokeDash=_orders(labelled))
    dots = base.mark_circle(size=30, opacity=1).encode(y=y, color=shots_colour(labelled), tooltip=_curve_tooltip())
    guess = pd.DataFrame({"accuracy": sorted(set(baselines.values()))[:1]})
    chance = alt.Chart(guess).mark_rule(color="#888", strokeDash=[2, 3]).encode(y="accuracy:Q")
    word = alt.Chart(guess).mark_text(align="left", dx=4, color="#666", fontSize=10).encode(
        y="accuracy:Q", x=alt.datum(100), text=alt.value("guessing"))
    marks = free[free["free_fraction"] > 0].assign(percent=lambda t: 100 * t["free_fraction"], by=lambda t: t[
        "order"].map(_BY), shots=lambda t: t["num_fewshot"].map(shots))
    layers = [band, chance, word, line, dots]
    if len(marks):
        # Filled where each task goes by its own order, hollow where all go by one.
        layers.append(alt.Chart(marks).mark_point(shape="diamond", size=190, filled=True, strokeWidth=2,
                                                  opacity=1).encode(
            fill=alt.condition(_OWN, shots_colour(labelled), alt.value("white")),
            stroke=alt.condition(_OWN, alt.value("black"), shots_colour(labelled)),
            x="percent:Q", y="accuracy:Q", color=shots_colour(labelled),
            tooltip=[alt.Tooltip("percent:Q", title="free (%)"), alt.Tooltip("by:N", title="removed"), "shots:N",
                     alt.Tooltip("accuracy:Q", format=".3f")]))
    return alt.layer(*layers)


def _labelled(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[rows["order"] != "none"]
    columns = ["task", "accuracy", "low", "high", "removed", "parameters_removed", "difference", "difference_low",
               "difference_high", "verdict"]
    return rows[columns].round(4).assign(
        p=rows["p"].map(lambda p: float(f"{p:.2g}")), percent=(100 * rows["fraction"]).round(2),
        by=rows["order"].map(_BY), shots=rows["num_fewshot"].map(shots))


def fewest_first(names: Iterable[str]) -> list[str]:
    """Labels of numbers of shots (`no shots`, `1 shot`, `5 shots`), each once, in the order of the numbers."""
    return sorted(set(names), key=lambda name: int(name.split()[0]) if name[0].isdigit() else 0)


def shots_column(rows: pd.DataFrame) -> alt.Column:
    """A panel per number of shots, few shots first."""
    return alt.Column("shots:N", title=None, sort=fewest_first(rows["shots"]), header=alt.Header(labelFontSize=12))


def shots_colour(rows: pd.DataFrame) -> alt.Color:
    """The same colour for the same number of shots in every panel; few shots first."""
    names = fewest_first(rows["shots"])
    return alt.Color("shots:N", title="shots", scale=alt.Scale(domain=names, range=PALETTE[: len(names)]),
                     legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1))


def _orders(rows: pd.DataFrame) -> alt.StrokeDash:
    used = {name: dash for name, dash in _DASHES.items() if (rows["by"] == name).any()}
    return alt.StrokeDash("by:N", title="removed", scale=alt.Scale(domain=list(used), range=list(used.values())),
                          legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=2, symbolSize=300, labelLimit=260))


def _curve_tooltip() -> list[alt.Tooltip]:
    return [alt.Tooltip("task:N"), alt.Tooltip("shots:N"), alt.Tooltip("by:N", title="removed"),
            alt.Tooltip("percent:Q", title="removed (%)"), alt.Tooltip("removed:Q", title="how many"),
            alt.Tooltip("parameters_removed:Q", title="parameters", format=","),
            alt.Tooltip("accuracy:Q", format=".3f"), alt.Tooltip("low:Q", format=".3f"),
            alt.Tooltip("high:Q", format=".3f"), alt.Tooltip("difference:Q", title="to the full model", format="+.3f"),
            alt.Tooltip("difference_low:Q", title="at least (95 %)", format="+.3f"),
            alt.Tooltip("difference_high:Q", title="at most (95 %)", format="+.3f"),
            alt.Tooltip("verdict:N", title="of the margin"),
            alt.Tooltip("p:Q", title="p of the difference", format=".2g")]


def _with_mean(rows: pd.DataFrame) -> pd.DataFrame:
    if rows["task"].nunique() < 2:
        return rows.copy()
    return pd.concat([mean_importance(rows), rows], ignore_index=True)


def of_one_task(chart: Chart, rows: pd.DataFrame, choose: bool) -> Chart:
    """Show the task that the menu names, or the mean (the only task where there is one)."""
    return chart.transform_filter("datum.task == task" if choose else alt.datum.task == rows["task"].iloc[0])


def with_menu(chart: Chart, rows: pd.DataFrame, choose: bool) -> Chart:
    """Add the menu of tasks that `of_one_task` reads, where a figure has one."""
    tasks = list(dict.fromkeys(rows["task"]))
    menu = alt.param(name="task", value=tasks[0], bind=alt.binding_select(options=tasks, name="task "))
    return chart.add_params(menu) if choose else chart


def summary_task(curves: pd.DataFrame) -> str:
    """The rows that speak for the study: the mean over tasks, or the only task."""
    return MEAN if (curves["task"] == MEAN).any() else str(curves["task"].iloc[0])


def dressed(chart: Chart) -> Chart:
    """A finished figure in the report's fonts and sizes."""
    return chart.configure(**_CONFIG)
