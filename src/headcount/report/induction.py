"""Induction scores, and how much of them is left as heads are removed: maps, scatter, curves, sentences, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from headcount.analysis.induction import induction_heads
from headcount.analysis.rows import (
    AGGREGATES,
    RANDOM,
    labelled,
    labels_of,
    most_shots,
    of_fraction,
    of_scope,
    single_tasks,
    summary,
)
from headcount.analysis.scores import PRIMITIVES, TOP, name_of
from headcount.analysis.study import Study
from headcount.report import words as say
from headcount.report.induction_heads import NAMED, induction_sentence
from headcount.report.section import Section, Table, plain_columns, section
from headcount.report.sets import chance_words, overlap_sentence, sets_table
from headcount.report.style import LEGEND, LEGEND_LENGTH, PALETTE, SHAPES, WIDTH, Chart, dressed, fewest_first
from headcount.report.words import shots


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
            color=alt.Color("value:Q", title="score", legend=alt.Legend(gradientLength=LEGEND_LENGTH),
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
        orient="top", **LEGEND)


_LABELLED = 14  # heads at most; others tell their names when pointed at
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
    return dressed(alt.hconcat(*panels)).configure_legend(orient="top", **LEGEND)


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
    text = alt.Chart(places).mark_text(fontSize=10).encode(x=alt.X("x:Q"), y=alt.Y("y:Q"), text=alt.Text("name:N"))
    return alt.layer(*lines, dots, text).properties(width=_DOTS, height=_HEADS, title=title)


def _label_places(heads: pd.DataFrame, limits: Mapping[str, float]) -> pd.DataFrame:
    """Where the names of the strongest heads go: beside their dots, clear of other dots and names, or nowhere."""
    wide, high = limits["prefix_matching"] / _DOTS, limits["copying"] / _HEADS  # of a pixel
    dots = list(zip(heads["prefix_matching"] / wide, heads["copying"] / high, strict=True))
    taken, places = [(x, y, 5.0, 5.0) for x, y in dots], []
    for name, (x, y) in list(zip(heads["name"], dots, strict=True))[:_LABELLED]:
        half = 3.3 * len(name)
        for dx, dy in ((half + 9, 0), (-half - 9, 0), (0, 13), (0, -13)):
            box = (x + dx, y + dy, half, 5.5)
            inside = half < box[0] < _DOTS + 40 - half and 6 < box[1] < _HEADS + 10
            if inside and not any(abs(box[0] - a) < half + w and abs(box[1] - b) < 5.5 + h for a, b, w, h in taken):
                taken.append(box)
                places.append({"name": name, "x": box[0] * wide, "y": box[1] * high})
                break
    return pd.DataFrame(places, columns=["name", "x", "y"])


def retained_curves(retained: pd.DataFrame) -> Chart:
    """Share of each primitive left as heads are removed by importance: mean bold, tasks thin, random orders grey."""
    rows = retained[retained["retained"].notna()]
    if rows.empty:
        return None
    labels = labels_of(rows)
    bold = labelled(summary(rows), labels)["task"].iloc[0]
    rows = labelled(rows, labels)
    panels = []
    for primitive, title in PRIMITIVES.items():
        of_primitive = rows[rows["primitive"] == primitive]
        if len(of_primitive):
            panels.append(_retained_panel(of_primitive, str(bold)).properties(
                width=370, height=280, title=f"{title[0].upper()}{title[1:]}"))
    return dressed(alt.hconcat(*panels)).configure_legend(orient="top", **LEGEND)


def _retained_panel(rows: pd.DataFrame, bold: str) -> Chart:
    starts = rows.drop_duplicates(["task", "num_fewshot"]).assign(
        fraction=0.0, retained=1.0, low=1.0, high=1.0, random_mean=1.0, random_low=1.0, random_high=1.0)
    rows = pd.concat([starts, rows[rows["fraction"] > 0]], ignore_index=True)
    data = pd.DataFrame({"task": rows["task"], "num_fewshot": rows["num_fewshot"],
                         "shots": rows["num_fewshot"].map(shots), "removed": 100 * rows["fraction"],
                         "left": 100 * rows["retained"], "low": 100 * rows["low"], "high": 100 * rows["high"]}).round(2)
    grey = rows[(rows["task"] == bold) & rows["random_mean"].notna()].groupby("fraction", as_index=False)[
        ["random_mean", "random_low", "random_high"]].mean()
    grey = (100 * grey).round(2).assign(name="random orders (95 %)")
    x = alt.X("removed:Q", title="heads removed (%)", scale=alt.Scale(domain=[0, 100]),
              axis=alt.Axis(values=list(range(0, 101, 20))))
    y = alt.Y("left:Q", title="score retained (%)", scale=alt.Scale(domain=[0, 100]))
    band = alt.Chart(grey).mark_area(opacity=0.9).encode(
        x=alt.X("fraction:Q", title="heads removed (%)"), y=alt.Y("random_low:Q", title="score retained (%)"),
        y2=alt.Y2("random_high:Q"), fill=alt.Fill("name:N", title=None, scale=alt.Scale(range=["#d9d9d9"]),
                                             legend=alt.Legend(symbolType="square", symbolStrokeWidth=0)))
    middle = alt.Chart(grey).mark_line(color="#777", strokeDash=[4, 3], strokeWidth=1.4).encode(
        x=alt.X("fraction:Q"), y=alt.Y("random_mean:Q"))
    of_bold, single = data[data["task"] == bold], data[data["task"] != bold]
    names = fewest_first(data)
    colour = alt.Color("shots:N", title=None, scale=alt.Scale(domain=names, range=PALETTE[: len(names)]),
                       legend=alt.Legend(symbolOpacity=1))
    shape = alt.Shape("shots:N", title=None, scale=alt.Scale(domain=names, range=SHAPES[: len(names)]))
    tooltip = [alt.Tooltip("task:N"), alt.Tooltip("shots:N"), alt.Tooltip("removed:Q", title="heads removed (%)"),
               alt.Tooltip("left:Q", title="score retained (%)", format=".1f"),
               alt.Tooltip("low:Q", title="at least", format=".1f"),
               alt.Tooltip("high:Q", title="at most", format=".1f")]
    thin = alt.Chart(single).mark_line(strokeWidth=0.8, opacity=0.35).encode(
        x=x, y=y, color=colour, detail=alt.Detail("task:N"), tooltip=tooltip)
    line = alt.Chart(of_bold).mark_line(strokeWidth=2.6).encode(x=x, y=y, color=colour)
    dots = alt.Chart(of_bold).mark_point(filled=True, size=55, opacity=1).encode(
        x=x, y=y, color=colour, shape=shape, tooltip=tooltip)
    return alt.layer(band, middle, *([thin] if len(single) else []), line, dots)


_DEFINITIONS = ("Prefix matching: how much a head attends, from a token, to the tokens that followed its earlier "
                "occurrences. Copying: how much a head raises the logit of the token that it attends to.")
RELIABLE = 0.8  # halves that agree less than this make a score noisy


def scatter_sentence(induction: pd.DataFrame, thresholds: Mapping[str, float]) -> str:
    """How many heads reach the one score and the other, and what is drawn; arguments as in `induction_sentence`."""
    trained = induction[induction["weights"] == "trained"]
    if trained.empty:
        return ""
    prefix, copying = (trained[name] >= thresholds[name] for name in PRIMITIVES)
    known = thresholds["copying"] == thresholds["copying"]
    also = (f", {copying.sum()} that of copying and {(prefix & copying).sum()} both. Lines are the thresholds" if known
            else ". The line is its threshold")
    beside = ("; the second panel is the same model with random weights, which has learnt nothing"
              if (induction["weights"] == RANDOM).any() else "; random weights were not measured")
    reach = "reaches" if prefix.sum() == 1 else "reach"
    return f"{prefix.sum()} of {len(trained)} heads {reach} the threshold of prefix matching{also}{beside}."


def texts_sentence(notes: Mapping[str, Any]) -> str:
    """What the scores are means over, and how reliable they are; `notes` as in `Study.induction_notes`."""
    if "sequences" not in notes:
        return ""
    lengths = [int(n) for n in notes["lengths"]]
    listed = ", ".join(map(str, lengths)) if len(lengths) < NAMED else f"{lengths[0]} to {lengths[-1]}"
    known = {PRIMITIVES[name]: value for name, value in notes["reliability"].items()
             if name in PRIMITIVES and value == value}
    agreed = " and ".join(f"{value:.2f} for {name}" for name, value in known.items())
    reliable = (f" Reliability (split halves of the texts, corrected to all of them by Spearman-Brown): {agreed}."
                if agreed else "")
    times = notes["repeats"]
    return (f"Means over {notes['sequences']} texts: for prefix matching {listed} random tokens, repeated "
            f"{times} times; for copying {times} times as many random tokens, all different.{reliable}")


def reliability_caution(reliabilities: Mapping[str, float]) -> str:
    """Which of the two primitives is measured noisily: halves of the sequences rank the heads differently."""
    of_primitives = {PRIMITIVES[name]: value for name, value in reliabilities.items() if name in PRIMITIVES}
    if any(value != value for value in of_primitives.values()):
        return "There are too few texts to tell how reliable these scores are."
    weak = [name for name, value in of_primitives.items() if value < RELIABLE]
    if not weak:
        return ""
    return (f"The reliability of {' and '.join(weak)} is below {RELIABLE}: "
            f"{'these scores are' if len(weak) > 1 else 'this score is'} noisy, and so is the list of induction heads.")


def retained_sentence(retained: pd.DataFrame, *, fraction: float | None = None) -> str:
    """Which share of each primitive the important heads hold, beside random ones."""
    rows = most_shots(of_fraction(summary(retained[retained["retained"].notna()]), fraction))
    if rows.empty:
        return ""
    said = []
    for primitive, row in rows.drop_duplicates("primitive").set_index("primitive").iterrows():
        hedged = say.bracketed(say.interval(row, 100, " %"))
        held = f"{say.percent(row['retained'])} of all {PRIMITIVES.get(str(primitive), str(primitive))}{hedged}"
        if row["random_mean"] == row["random_mean"]:
            more = ("more than" if row["retained"] > row["random_high"] else "less than"
                    if row["retained"] < row["random_low"] else "within what")
            held += (f", {more} random orders leave ({say.percent(row['random_mean'])}; 95 % of them "
                      f"{100 * row['random_low']:.0f} to {100 * row['random_high']:.0f} %)")
        said.append(held)
    by = f"by importance {say.on(rows)}"
    return (f"With {say.shots_of(rows)} and {say.share(rows['fraction'].iloc[0])} of the heads removed {by}, the "
            f"others hold {', and '.join(said)}.")


def among_important_sentence(among: pd.DataFrame, *, fraction: float | None = None) -> str:
    """How many of the induction heads are among the important ones, beside what chance gives."""
    rows = most_shots(of_fraction(among[among["induction_heads"] > 0], fraction, TOP))
    if rows.empty:
        return ""
    whole, single = summary(rows), single_tasks(rows)["common"]
    row = whole.iloc[0]
    spread = f"; on single tasks {say.span(single)} of them are" if row["scope"] in AGGREGATES and len(single) else ""
    hedged = say.bracketed(say.interval(row))
    heads = "head" if row["induction_heads"] == 1 else "heads"
    verb = "is" if row["common"] == 1 else "are"
    return (f"With {say.shots_of(rows)}, {row['common']:.0f}{hedged} of the {row['induction_heads']:.0f} induction "
            f"{heads} {verb} among the {row['important']:.0f} heads ({say.share(row['fraction'])}) most important "
            f"{say.on(whole)}; {chance_words(row)}; p: two-sided, hypergeometric{spread}.")


def induction_heads_table(induction: pd.DataFrame) -> pd.DataFrame:
    """All induction heads, those of random weights at the end, with their scores and standard errors."""
    of_weights = [induction_heads(induction[induction["weights"] == weights]) for weights in ("trained", RANDOM)]
    rows = pd.concat(of_weights, ignore_index=True)
    errors = {name: np.sqrt(rows[f"{name}_variance"].astype(float) / rows["sequences"].astype(float))
              for name in (*PRIMITIVES, "previous_token")}
    scores = {name.replace("_", " "): [f"{value:.3f}" + (f" \N{PLUS-MINUS SIGN} {error:.3f}" if error == error else "")
                                       for value, error in zip(rows[name], of_name, strict=True)]
              for name, of_name in errors.items()}
    return pd.DataFrame({"head": rows["name"], "weights": rows["weights"], **scores,
                         "OV copying": rows["ov_copying"].map("{:.3f}".format)})


def among_important_rows(among: pd.DataFrame) -> pd.DataFrame:
    """The induction heads among the important ones, ready to be shown: over tasks every share, of each task a fifth."""
    rows = pd.concat([of_scope(among, *AGGREGATES), of_fraction(single_tasks(among), None, TOP)])
    return sets_table(rows, {"most important": rows["fraction"].map(say.percent), "heads": rows["important"],
                        "induction heads": rows["induction_heads"]})


def sections(study: Study) -> Iterator[Section]:
    """Induction scores, induction heads, and what is retained as heads are removed."""
    induction = study.induction()
    if induction.empty:
        return
    notes = study.induction_notes
    told = [f"{note}." for note in notes.get("notes", ())]
    yield section("induction_maps", "Induction scores of every head", lambda: induction_maps(induction),
                   _DEFINITIONS, texts_sentence(notes),
                   induction_sentence(induction, study.induction_thresholds),
                   reliability_caution(notes.get("reliability", {})), *told)
    yield section("induction_scatter", "Prefix matching against copying", lambda: induction_scatter(
        induction, study.induction_thresholds),
                   scatter_sentence(induction, study.induction_thresholds))
    retained = study.retained()
    if len(retained):
        yield section("retained", "Do induction heads survive pruning?", lambda: retained_curves(retained),
                       retained_sentence(retained),
                       among_important_sentence(study.induction_among_important()),
                       overlap_sentence(study.top_overlaps()), "Grey: 95 % of random orders.")


def tables(study: Study) -> Iterator[Table]:
    """Induction heads, and how many of them are important."""
    if (induction := study.induction())["induction"].fillna(False).any():
        yield Table("Induction heads", "Means over texts with standard errors; those highest on the lower of the two "
                    "scores first.", induction_heads_table(induction))
    if len(among := study.induction_among_important()):
        yield Table("Induction heads among the important ones", "'By chance': what random sets of these sizes have "
                    "in common; 'in the same layers' (and 'p there'): random sets with as many heads in each layer. p: "
                    "two-sided, hypergeometric, not corrected for how many rows there are.",
                    plain_columns(among_important_rows(among)))
