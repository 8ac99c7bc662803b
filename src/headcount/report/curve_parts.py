"""What figures and sentences of pruning curves share: the headline's and those of single tasks."""

from __future__ import annotations

import altair as alt
import pandas as pd

from headcount.analysis.rows import FREE_FORM, MEAN, TASK, UNIFORM, UNIFORM_COMMON, own_orders
from headcount.analysis.study import Study
from headcount.report.style import shots_colour
from headcount.report.words import COMPONENT_NAMES, better_or_worse, number_of, share, shots, signed, told
from headcount.stats.intervals import COSTS_MORE, UNKNOWN, WITHIN

BY = {"gradient": "each task's own order", "oracle": "each task's own order", "common": "one order for all tasks",
       UNIFORM: "own order, one shape", UNIFORM_COMMON: "one order, one shape",
       "random": "at random"}
_DASHES = {"each task's own order": [1, 0], "one order for all tasks": [1, 3], BY[UNIFORM]: [9, 2],
           BY[UNIFORM_COMMON]: [9, 2, 1, 2], "at random": [4, 3]}
OF_OWN_ORDER = 'datum.by == "each task\'s own order"'
_OF_ONE_SHAPE = f'datum.by == "{BY[UNIFORM]}" || datum.by == "{BY[UNIFORM_COMMON]}"'
_TASKS_NAMED = 6
BANDS = "Bands are 95 % intervals over documents; point at a mark for its numbers."


def curve_data(rows: pd.DataFrame) -> pd.DataFrame:
    """What a figure of curves draws of rows of `Study.curves()`, rounded, in percent and words."""
    rows = rows[rows["order"] != "none"]
    columns = ["task", "num_fewshot", "accuracy", "low", "high", "removed", "parameters_removed", "difference",
               "difference_low", "difference_high", "verdict"]
    return rows[columns].round(4).assign(
        p=rows["p"].map(lambda p: float(f"{p:.2g}")), percent=(100 * rows["fraction"]).round(2),
        by=rows["order"].map(BY), shots=rows["num_fewshot"].map(shots))


def order_dashes(rows: pd.DataFrame) -> alt.StrokeDash:
    """The dashes that tell orders apart, of those that are there; `rows` as `curve_data` gives them."""
    used = {name: dash for name, dash in _DASHES.items() if (rows["by"] == name).any()}
    return alt.StrokeDash("by:N", title="removed", scale=alt.Scale(domain=list(used), range=list(used.values())),
                          legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=2, symbolSize=300, labelLimit=260))


def shape_words(curves: pd.DataFrame) -> str:
    """How a figure draws curves that leave every layer the same shape; empty where there are none."""
    return ("Squares on long dashes: every layer keeps the same shape, which a stock model class that names its head "
            "size can hold (with dots between the dashes where one order is for all tasks)."
            ) if curves["order"].isin([*FREE_FORM]).any() else ""


def curve_marks(base: alt.Chart, rows: pd.DataFrame, size: int) -> list[alt.Chart]:
    """A mark at every step: dots, and hollow squares where every layer keeps the same shape; `rows` as drawn."""
    encoded = base.encode(y=alt.Y("accuracy:Q"), color=shots_colour(rows), tooltip=curve_tooltip())
    if not rows["by"].isin([BY[order] for order in FREE_FORM]).any():
        return [encoded.mark_circle(size=size, opacity=1)]
    of_others, of_shapes = f"!({_OF_ONE_SHAPE})", f"datum.percent > 0 && ({_OF_ONE_SHAPE})"
    return [encoded.transform_filter(of_others).mark_circle(size=size, opacity=1),
            encoded.transform_filter(of_shapes).mark_point(shape="square", size=1.8 * size, filled=False, fill="white",
                                                           strokeWidth=1.5, opacity=1)]


def curve_tooltip() -> list[alt.Tooltip]:
    """What a mark of a curve says when it is pointed at."""
    return [alt.Tooltip("task:N"), alt.Tooltip("shots:N"), alt.Tooltip("by:N", title="removed"),
            alt.Tooltip("percent:Q", title="removed (%)"), alt.Tooltip("removed:Q", title="how many"),
            alt.Tooltip("parameters_removed:Q", title="parameters", format=","),
            alt.Tooltip("accuracy:Q", format=".3f"), alt.Tooltip("low:Q", format=".3f"),
            alt.Tooltip("high:Q", format=".3f"), alt.Tooltip("difference:Q", title="to the full model", format="+.3f"),
            alt.Tooltip("difference_low:Q", title="at least (95 %)", format="+.3f"),
            alt.Tooltip("difference_high:Q", title="at most (95 %)", format="+.3f"),
            alt.Tooltip("verdict:N", title="loss beside the margin"),
            alt.Tooltip("p:Q", title="p of the difference", format=".2g")]


def costs_more(study: Study, row: pd.Series, fraction: float) -> str:
    """What one set for all tasks costs at this step on single tasks; those at chance have nothing to lose."""
    curves, k = study.curves(), int(row["num_fewshot"])
    at = curves[(curves["order"] == row["order"]) & (curves["component"] == row["component"])
                & (curves["scope"] == TASK) & (curves["num_fewshot"] == k) & (curves["fraction"] == fraction)]
    at = at[[study.above_chance[str(task), k] for task in at["task"]]]
    if at.empty:
        return ""
    worse = at[at["verdict"] == COSTS_MORE].sort_values("difference")
    shown = worse.head(_TASKS_NAMED)
    names = ", ".join(f"{t} ({signed(d)})" for t, d in zip(shown["task"], shown["difference"], strict=True))
    rest = f" and {len(worse) - len(shown)} more" if len(worse) > len(shown) else ""
    within, unknown = (int((at["verdict"] == v).sum()) for v in (WITHIN, UNKNOWN))
    margin = study.spec["margin"]
    said = [f"{told(COSTS_MORE, margin)} on {len(worse)}: {names}{rest}"] if len(worse) else []
    said += [f"{told(WITHIN, margin)} on {within}"] if within else []
    said += [f"the documents cannot tell on {unknown}"] if unknown else []
    return f" Of the {number_of(len(at), 'task')} above chance, {'; '.join(said)}."


def curve_sentence(study: Study, component: str) -> str:
    """What importance leaves more than random orders do, near half of the components, at the most shots."""
    table = own_orders(study.against_random())
    means = table[table["scope"] == MEAN]
    rows = means if len(means) else table[table["task"] == study.spec["tasks"][0]]
    rows = rows[rows["component"] == component]
    if rows.empty:
        return ""
    rows = rows[rows["num_fewshot"] == rows["num_fewshot"].max()]
    row = rows.loc[min(rows.index, key=lambda i: (round(abs(rows["fraction"][i] - 0.5), 9), rows["fraction"][i]))]
    known = row["difference_low"] == row["difference_low"]
    if row["draws"] > 1 and not known:
        shown = "there is no interval"
    elif not known:
        shown = "one draw cannot tell whether that is more than chance: ask for several with --random-orders"
    elif row["difference_low"] > 0 or row["difference_high"] < 0:
        shown = f"the order is shown to be {better_or_worse(row['difference'])} than a random one"
    else:
        shown = "the order is not shown to be better than a random one, nor worse"
    interval = (f" (95 % interval {signed(row['difference_low'])} to {signed(row['difference_high'])}, paired over "
                "documents and draws)") if known else ""
    spread = f" (single draws {row['draw_low']:.2f} to {row['draw_high']:.2f})" if row["draws"] > 1 else ""
    orders = f"{row['draws']} random orders {row['random']:.2f} on average" if row["draws"] > 1 else (
        f"a random one {row['random']:.2f}")
    names = COMPONENT_NAMES[component][1]
    return (f"With {shots(int(row['num_fewshot']))} and {share(row['fraction'])} of the {names} removed, the "
            f"measured order leaves {row['accuracy']:.2f}, {orders}{spread}: a difference of "
            f"{signed(row['difference'])} points{interval}; {shown}.")
