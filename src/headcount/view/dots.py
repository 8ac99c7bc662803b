"""Figures of dots and lines: induction heads, orders at different shots, unseen tasks, what is retained, and depth.

What a colour says, a shape, a place or a word says too. Every function returns None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from headcount.view import charts
from headcount.view.charts import COMPONENTS, PALETTE, Chart, dressed
from headcount.view.overlap import PRIMITIVES
from headcount.view.points import MEAN
from headcount.view.relations import RANDOM
from headcount.view.selection import (
    AGGREGATES,
    between_shots,
    induction_heads,
    noise,
    of_score,
    summary,
    tasks_first,
    transferred,
)
from headcount.view.tops import THIRDS
from headcount.view.words import known, shots

_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
_NAMED = 14  # heads at most; others tell their names when pointed at
_DOTS, _HEADS = 410, 330  # pixels, width and height of the scatter plot


def induction_scatter(induction: pd.DataFrame, thresholds: Mapping[str, float]) -> Chart:
    """Prefix matching against copying of every head, beside the same model with random weights.

    Args:
        induction: One row per head and kind of weights.
        thresholds: What an induction head reaches on each primitive.
    """
    if induction.empty:
        return None
    limits = {p: max(1.02 * max(float(induction[p].max()), thresholds[p]), 0.1) for p in PRIMITIVES}
    panels = [_scatter_panel(induction[induction["weights"] == weights], thresholds, limits, f"{weights} weights")
              for weights in ("trained", RANDOM) if (induction["weights"] == weights).any()]
    return dressed(alt.hconcat(*panels)).configure_legend(orient="top", **charts.LEGEND)


def _scatter_panel(rows: pd.DataFrame, thresholds: Mapping[str, float], limits: Mapping[str, float],
                   title: str) -> Chart:
    places = _label_places(induction_heads(rows), limits)
    names = [f"L{layer}H{head}" for layer, head in zip(rows["layer"], rows["head"], strict=True)]
    data = rows[[*PRIMITIVES, "previous_token", "ov_copying"]].round(4).assign(
        name=names, what=rows["induction"].fillna(False).map({True: "induction head", False: "other head"}))
    x = alt.X("prefix_matching:Q", title="prefix matching", scale=alt.Scale(domain=[0, limits["prefix_matching"]]))
    y = alt.Y("copying:Q", title="copying", scale=alt.Scale(domain=[0, limits["copying"]]))
    what: dict[str, Any] = {"domain": ["induction head", "other head"]}
    dots = alt.Chart(data).mark_point(filled=True).encode(
        x=x, y=y, shape=alt.Shape("what:N", title=None, scale=alt.Scale(**what, range=["diamond", "circle"])),
        color=alt.Color("what:N", title=None, scale=alt.Scale(**what, range=[PALETTE[1], PALETTE[0]])),
        size=alt.Size("what:N", title=None, scale=alt.Scale(**what, range=[90, 22])),
        opacity=alt.Opacity("what:N", title=None, scale=alt.Scale(**what, range=[1, 0.7 if len(rows) < 1000 else 0.3])),
        tooltip=[alt.Tooltip("name:N", title="head"), alt.Tooltip("prefix_matching:Q", title="prefix matching"),
                 alt.Tooltip("copying:Q"), alt.Tooltip("previous_token:Q", title="previous token"),
                 alt.Tooltip("ov_copying:Q", title="OV copying")])
    lines = [alt.Chart(pd.DataFrame([thresholds])).mark_rule(color="#555", strokeDash=[4, 3]).encode(
        **{channel: f"{p}:Q"}) for channel, p in zip(("x", "y"), PRIMITIVES, strict=True)]
    text = alt.Chart(places).mark_text(fontSize=10).encode(x="x:Q", y="y:Q", text="name:N")
    return alt.layer(*lines, dots, text).properties(width=_DOTS, height=_HEADS, title=title)


def _label_places(found: pd.DataFrame, limits: Mapping[str, float]) -> pd.DataFrame:
    """Where the names of the strongest heads go: beside their dots, clear of other dots and names, or nowhere."""
    wide, high = limits["prefix_matching"] / _DOTS, limits["copying"] / _HEADS  # of a pixel
    dots = list(zip(found["prefix_matching"] / wide, found["copying"] / high, strict=True))
    taken, places = [(x, y, 5.0, 5.0) for x, y in dots], []
    for name, (x, y) in list(zip(found["name"], dots, strict=True))[:_NAMED]:
        half = 3.3 * len(name)
        for dx, dy in ((half + 9, 0), (-half - 9, 0), (0, 13), (0, -13)):
            box = (x + dx, y + dy, half, 5.5)
            inside = half < box[0] < _DOTS + 40 - half and 6 < box[1] < _HEADS + 10
            if inside and not any(abs(box[0] - a) < half + w and abs(box[1] - b) < 5.5 + h for a, b, w, h in taken):
                taken.append(box)
                places.append({"name": name, "x": box[0] * wide, "y": box[1] * high})
                break
    return pd.DataFrame(places, columns=["name", "x", "y"])


def shots_dots(correlations: pd.DataFrame, *, scores: Mapping[str, str] | None = None) -> Chart:
    """How alike two numbers of shots rank the components of each task: Spearman's correlation with its interval.

    A panel of scores that are mostly noise is pale, and says so.

    Args:
        correlations: One row per pair.
        scores: Which score of importance by kind of component; the first found unless told.
    """
    panels = []
    for component, title in COMPONENTS.items():
        of_component = of_score(correlations, component, (scores or {}).get(component))
        rows = between_shots(of_component)
        if rows["correlation"].notna().any():
            reason = noise(of_component[of_component["kind"].isin(["shots", "reliability"])])
            words = alt.TitleParams(f"{title[0].upper()}{title[1:]}", subtitle=reason)
            panels.append(_shots_panel(rows, _beside_random(of_component, rows["task"]), pale=bool(reason)).properties(
                title=words if reason else words.text, width=330))
    if not panels:
        return None
    return dressed(alt.hconcat(*panels)).configure_legend(orient="top", **charts.LEGEND)


def _beside_random(rows: pd.DataFrame, tasks: pd.Series) -> pd.DataFrame:
    """A random order held against the mean over tasks (or the only one), a row per number of shots."""
    whole = MEAN if (tasks == MEAN).any() else tasks.iloc[0]
    rows = rows[(rows["kind"] == "shots") & (rows["task"] == whole) & (rows["other_task"] == RANDOM)]
    pairs = [f"{whole}, {shots(k)}, and a random order" for k in rows["num_fewshot"]]
    return rows.assign(task=f"{RANDOM} order", pair=pairs)[["task", "pair", "correlation", "low", "high"]].round(4)


def _shots_panel(rows: pd.DataFrame, random: pd.DataFrame, *, pale: bool) -> Chart:
    rows = rows.sort_values(["num_fewshot", "other_shots"], kind="stable")
    data = pd.DataFrame({"task": rows["task"], "correlation": rows["correlation"], "low": rows["low"],
                         "high": rows["high"], "pair": [f"{shots(a)} and {shots(b)}" for a, b in zip(
                             rows["num_fewshot"], rows["other_shots"], strict=True)],
                         "inside": rows["correlation_in_layers"].map(known),
                         "alone": rows["correlation_layers_alone"].map(known)}).round(4)
    pairs, tasks = list(dict.fromkeys(data["pair"])), tasks_first(rows["task"])
    summaries = [name for name in tasks if name.startswith(MEAN)]
    low = np.floor(5 * min(0.0, float(data[["low", "correlation"]].min().min()), float(random["low"].min()))) / 5
    y = alt.Y("task:N", title=None, scale=alt.Scale(paddingInner=0.25),
              sort=[*summaries, *(t for t in tasks if t not in summaries), f"{RANDOM} order"],
              axis=alt.Axis(domain=False, ticks=False, grid=True, labelFontWeight=alt.ExprRef(
                  expr=f"indexof({summaries}, datum.label) >= 0 ? 'bold' : 'normal'")))
    base = alt.Chart(data).encode(y=y, yOffset=alt.YOffset("pair:N", scale=alt.Scale(domain=pairs)))
    colour = alt.Color("pair:N", title=None, scale=alt.Scale(domain=pairs, range=PALETTE[: len(pairs)]))
    shape = alt.Shape("pair:N", title=None, scale=alt.Scale(domain=pairs, range=_SHAPES[: len(pairs)]))
    x = alt.X("correlation:Q", title="rank correlation of importance", scale=alt.Scale(domain=[low, 1]),
              axis=alt.Axis(labelFlush=False))
    opacity = 0.25 if pale else 1
    dots = base.mark_point(filled=True, size=42, opacity=opacity).encode(
        x=x, color=colour, shape=shape,
        tooltip=["task:N", alt.Tooltip("pair:N", title="shots"), alt.Tooltip("correlation:Q", format=".3f"),
                 alt.Tooltip("low:Q", title="95 % interval from", format=".3f"),
                 alt.Tooltip("high:Q", title="to", format=".3f"),
                 alt.Tooltip("alone:N", title="layers alone give"), alt.Tooltip("inside:N", title="within layers")])
    lines = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.6, opacity=opacity).encode(
        x="low:Q", x2="high:Q", color=colour)
    # All in the middle of their row; without an offset of their own rows would be no higher than one of them.
    grey = alt.Chart(random.assign(offset=pairs[len(pairs) // 2])).encode(y=y, yOffset=alt.YOffset(
        "offset:N", scale=alt.Scale(domain=pairs)))
    band = grey.mark_rule(color="#bbb", strokeWidth=5).encode(x="low:Q", x2="high:Q")
    beside = grey.mark_tick(color="#555", thickness=2).encode(
        x=x, tooltip=[alt.Tooltip("pair:N", title="what"), alt.Tooltip("correlation:Q", format=".3f"),
                      alt.Tooltip("low:Q", title="95 % of random orders from", format=".3f"),
                      alt.Tooltip("high:Q", title="to", format=".3f")])
    return alt.layer(band, beside, lines, dots).properties(height=alt.Step(max(8, 22 // max(1, len(pairs)))))


def unseen_curves(transfer: pd.DataFrame, component: str) -> Chart:
    """Accuracy on tasks that had no part in the order, as the mean order and a random one remove components.

    Args:
        transfer: One row per recipient, donor, number of shots and fraction; fraction 0 is the full model.
        component: "head" or "ffn".
    """
    rows = transferred(transfer, component, unseen=True)
    orders = {MEAN: "the mean order", RANDOM: "a random order"}
    pruned = rows[(rows["fraction"] > 0) & rows["donor"].isin(list(orders))]
    if pruned.empty:
        return None
    full = rows[rows["fraction"] == 0].drop_duplicates(["task", "num_fewshot"])
    # The full model begins every line.
    started = [full.assign(donor=donor) for donor in dict.fromkeys(pruned["donor"])]
    rows = pd.concat([*started, pruned], ignore_index=True)
    data = rows[["task", "accuracy", "low", "high", "documents"]].round(4).assign(
        percent=(100 * rows["fraction"]).round(2), by=rows["donor"].map(orders), shots=rows["num_fewshot"].map(shots))
    used = [name for donor, name in orders.items() if (rows["donor"] == donor).any()]
    base = alt.Chart().encode(x=alt.X("percent:Q", title=f"{COMPONENTS[component]} removed (%)",
                                      scale=alt.Scale(domain=[-3, 100], nice=False),
                                      axis=alt.Axis(values=list(range(0, 101, 20)))))
    colour = alt.Color("by:N", title="removed by", scale=alt.Scale(domain=used, range=[PALETTE[0], "#777777"]))
    y = alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]))
    shape = alt.Shape("by:N", title="removed by", scale=alt.Scale(domain=used, range=_SHAPES[:2]))
    lines = [base.transform_filter(alt.datum.by == name).mark_line(
        strokeWidth=1.8, strokeDash=[4, 3] if name == orders[RANDOM] else [1, 0]).encode(y=y, color=colour)
        for name in used]
    errors = base.mark_rule(strokeWidth=1.4).encode(y=alt.Y("low:Q", title="accuracy"), y2="high:Q", color=colour)
    dots = base.mark_point(filled=True, size=48, opacity=1).encode(
        y=y, color=colour, shape=shape,
        tooltip=["task:N", "shots:N", alt.Tooltip("by:N", title="removed by"),
                 alt.Tooltip("percent:Q", title="removed (%)"), alt.Tooltip("accuracy:Q", format=".3f"),
                 alt.Tooltip("low:Q", format=".3f"), alt.Tooltip("high:Q", format=".3f"), alt.Tooltip("documents:Q")])
    chart = alt.layer(*lines, errors, dots, data=data).properties(width=235, height=150).facet(
        column=charts.shots_column(data), row=alt.Row("task:N", title=None, sort=list(dict.fromkeys(data["task"])),
                                                      header=alt.Header(labelFontSize=12, labelFontWeight="bold")))
    return dressed(chart).configure_legend(orient="top", **charts.LEGEND)


def retained_curves(retained: pd.DataFrame) -> Chart:
    """Share of each primitive that is left as heads go by importance: the mean bold, tasks thin, random orders grey."""
    rows = retained[retained["retained"].notna()]
    if rows.empty:
        return None
    bold = summary(rows)["task"].iloc[0]
    panels = []
    for primitive, title in PRIMITIVES.items():
        of_primitive = rows[rows["primitive"] == primitive]
        if len(of_primitive):
            panels.append(_retained_panel(of_primitive, str(bold)).properties(
                width=370, height=280, title=f"{title[0].upper()}{title[1:]}"))
    return dressed(alt.hconcat(*panels)).configure_legend(orient="top", **charts.LEGEND)


def _retained_panel(rows: pd.DataFrame, bold: str) -> Chart:
    starts = rows.drop_duplicates(["task", "num_fewshot"]).assign(
        fraction=0.0, retained=1.0, low=1.0, high=1.0, random_mean=1.0, random_low=1.0, random_high=1.0)
    rows = pd.concat([starts, rows[rows["fraction"] > 0]], ignore_index=True)
    data = pd.DataFrame({"task": rows["task"], "shots": rows["num_fewshot"].map(shots),
                         "removed": 100 * rows["fraction"], "left": 100 * rows["retained"], "low": 100 * rows["low"],
                         "high": 100 * rows["high"]}).round(2)
    grey = rows[(rows["task"] == bold) & rows["random_mean"].notna()].groupby("fraction", as_index=False)[
        ["random_mean", "random_low", "random_high"]].mean()
    grey = (100 * grey).round(2).assign(name="random orders (95 %)")
    x = alt.X("removed:Q", title="heads removed (%)", scale=alt.Scale(domain=[0, 100]),
              axis=alt.Axis(values=list(range(0, 101, 20))))
    y = alt.Y("left:Q", title="score retained (%)", scale=alt.Scale(domain=[0, 100]))
    band = alt.Chart(grey).mark_area(opacity=0.9).encode(
        x=alt.X("fraction:Q", title="heads removed (%)"), y=alt.Y("random_low:Q", title="score retained (%)"),
        y2="random_high:Q", fill=alt.Fill("name:N", title=None, scale=alt.Scale(range=["#d9d9d9"]),
                                             legend=alt.Legend(symbolType="square", symbolStrokeWidth=0)))
    middle = alt.Chart(grey).mark_line(color="#777", strokeDash=[4, 3], strokeWidth=1.4).encode(
        x="fraction:Q", y="random_mean:Q")
    of_bold, single = data[data["task"] == bold], data[data["task"] != bold]
    names = charts.fewest_first(data["shots"])
    colour = alt.Color("shots:N", title=None, scale=alt.Scale(domain=names, range=PALETTE[: len(names)]),
                       legend=alt.Legend(symbolOpacity=1))
    shape = alt.Shape("shots:N", title=None, scale=alt.Scale(domain=names, range=_SHAPES[: len(names)]))
    tooltip = ["task:N", "shots:N", alt.Tooltip("removed:Q", title="heads removed (%)"),
               alt.Tooltip("left:Q", title="score retained (%)", format=".1f"),
               alt.Tooltip("low:Q", title="at least", format=".1f"),
               alt.Tooltip("high:Q", title="at most", format=".1f")]
    thin = alt.Chart(single).mark_line(strokeWidth=0.8, opacity=0.35).encode(
        x=x, y=y, color=colour, detail="task:N", tooltip=tooltip)
    line = alt.Chart(of_bold).mark_line(strokeWidth=2.6).encode(x=x, y=y, color=colour)
    dots = alt.Chart(of_bold).mark_point(filled=True, size=55, opacity=1).encode(
        x=x, y=y, color=colour, shape=shape, tooltip=tooltip)
    return alt.layer(band, middle, *([thin] if len(single) else []), line, dots)


def depth_bars(depth: pd.DataFrame) -> Chart:
    """Share of the most important heads in each third of the layers: bars over tasks with intervals, dots for tasks.

    Args:
        depth: `Study.depth()`.
    """
    if depth.empty:
        return None
    shares = {name: (100 * depth[name]).round(1) for name in ("share", "low", "high", "expected")}
    data = depth.assign(shots=depth["num_fewshot"].map(shots), **shares)
    data["whole"] = data["task"] == summary(data)["task"].iloc[0]
    base = alt.Chart().encode(x=alt.X("third:N", title="third of the layers", sort=list(THIRDS),
                                      axis=alt.Axis(labelAngle=0, ticks=False)))
    title = f"of the top {100 * depth['fraction'].iloc[0]:.0f} % of heads (%)"
    y = alt.Y("share:Q", title=title, scale=alt.Scale(domain=[0, 100]))
    tooltip = ["task:N", "shots:N", "third:N", alt.Tooltip("share:Q", title="share (%)"), alt.Tooltip("low:Q"),
               alt.Tooltip("high:Q"), alt.Tooltip("expected:Q", title="of all heads (%)")]
    whole = base.transform_filter("datum.whole")
    bars = whole.mark_bar(color=PALETTE[5]).encode(y=y, tooltip=tooltip)
    tick = whole.mark_tick(thickness=2, color="black", bandSize=52).encode(y=alt.Y("expected:Q", title=title))
    errors = whole.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.6).encode(
        y=alt.Y("low:Q", title=title), y2="high:Q")
    dots = base.transform_filter("!datum.whole").mark_circle(size=20, color=PALETTE[1], opacity=0.8).encode(
        y=y, tooltip=tooltip)
    name = data.loc[data["whole"], "task"].iloc[0]
    bar = f"{name} over tasks; dots: single tasks" if name in AGGREGATES else name
    words = f"bars: {bar}; lines: share of all heads"
    chart = alt.layer(bars, dots, errors, tick, data=data.drop(columns="num_fewshot")).properties(
        width=alt.Step(64), height=200).facet(column=charts.shots_column(data))
    return dressed(chart.properties(title=alt.TitleParams(words, fontSize=12, fontWeight="normal")))
