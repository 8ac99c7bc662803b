"""What a smaller model costs and what it buys: accuracy against parameters, and the models that were removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import altair as alt
import pandas as pd

from headcount.analysis.removal import costs
from headcount.analysis.removed_models import FOLDER, SIDES, RemovedModel, removed_models
from headcount.analysis.rows import MEAN
from headcount.analysis.study import Study
from headcount.report import words
from headcount.report.section import Section, Table, section
from headcount.report.style import PALETTE, Chart, dressed

FULL, HEADS, FFNS, BOTH, ONE_SHAPE = ("nothing (full model)", "heads alone", "FFNs alone", "heads and FFNs",
                                      "heads, every layer one shape")
_GUESSED, _WIDTH = "guessing", 640
_LEGEND = ["removed (labels: % of the", "heads / % of the FFNs)"]
# How kinds of points are drawn: colour, shape.
_KINDS = {FULL: ("black", "diamond"), HEADS: (PALETTE[0], "circle"), FFNS: (PALETTE[1], "triangle-up"),
          BOTH: (PALETTE[2], "square"), ONE_SHAPE: (PALETTE[3], "cross")}
# Sizes that the sentence tells the best point of.
_SIZES = (0.9, 0.75, 0.5)


def cost_figure(rows: pd.DataFrame, baseline: float, models: Mapping[str, str]) -> Chart:
    """Accuracy against the share of the parameters that is left, with the best points at each size joined.

    Args:
        rows: From `headcount.analysis.removal.costs`.
        baseline: What guessing, or a constant answer, gets.
        models: Names of removed models by the digests of their masks.
    """
    if rows.empty:
        return None
    data = _points(rows, models)
    kinds = [kind for kind in _KINDS if (data["kind"] == kind).any()]
    colours, shapes = ([_KINDS[kind][i] for kind in kinds] for i in (0, 1))
    base = alt.Chart(data).encode(
        x=alt.X("left:Q", title="parameters left (% of the full model's)",
                scale=alt.Scale(zero=False, nice=False, padding=24)),
        color=alt.Color("kind:N", title=_LEGEND, scale=alt.Scale(domain=kinds, range=colours),
                        legend=alt.Legend(symbolOpacity=1)))
    y = alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(zero=False))
    guessed = alt.Chart(pd.DataFrame([{"accuracy": baseline, "what": _GUESSED}])).encode(y=y)
    front = base.transform_filter("datum.front").encode(
        x=alt.X("left:Q"), y=y, color=alt.value("#57606a"), order=alt.Order("left:Q"))
    curves = base.transform_filter(
        f"datum.kind == '{HEADS}' || datum.kind == '{FFNS}'").mark_line(strokeWidth=1, opacity=0.6)
    layers = [
        guessed.mark_rule(strokeDash=[4, 3], color="#57606a"),
        guessed.mark_text(align="right", dx=-4, dy=-6, color="#57606a", fontSize=11).encode(
            x=alt.value(_WIDTH), text=alt.Text("what:N")),
        base.mark_rule(opacity=0.25).encode(y=alt.Y("low:Q", title="accuracy"), y2=alt.Y2("high:Q")),
        curves.encode(y=y),
        front.mark_line(interpolate="step-after", strokeWidth=2),
        base.mark_point(filled=True, opacity=1, size=55).encode(
            y=y, tooltip=_tooltip(),
            shape=alt.Shape("kind:N", title=_LEGEND, scale=alt.Scale(domain=kinds, range=shapes))),
        front.transform_filter(f"datum.kind != '{FULL}'").mark_text(
            align="right", dx=-6, dy=-8, fontSize=10).encode(text=alt.Text("what:N"))]
    if models and (data["model"] != "").any():
        chosen = base.transform_filter("datum.model != ''").encode(y=y, color=alt.value("black"))
        layers += [chosen.mark_point(shape="circle", size=260, strokeWidth=2, filled=False, opacity=1),
                   chosen.mark_text(align="left", dx=11, dy=12, fontSize=12, fontWeight="bold").encode(
                       text=alt.Text("model:N"))]
    return dressed(alt.layer(*layers).properties(width=_WIDTH, height=380))


def _points(rows: pd.DataFrame, models: Mapping[str, str]) -> pd.DataFrame:
    heads, ffns = rows["heads_removed"] > 0, rows["ffns_removed"] > 0
    kind = [ONE_SHAPE if one else {(False, False): FULL, (True, False): HEADS, (False, True): FFNS}.get((h, f), BOTH)
            for h, f, one in zip(heads, ffns, rows["uniform"], strict=True)]
    columns = ["heads_removed", "ffns_removed", "difference", "difference_low", "difference_high", "verdict",
               "documents"]
    return rows[columns].round(4).assign(
        kind=kind, left=(100 * rows["left"]).round(2), accuracy=rows["shown"].round(4), front=rows["front"],
        low=rows["shown_low"].clip(0, 1).round(4), high=rows["shown_high"].clip(0, 1).round(4),
        what=[f"{100 * h:.3g}/{100 * f:.3g}" for h, f in zip(
            rows["heads_fraction"], rows["ffns_fraction"], strict=True)],
        heads=[words.share(h) for h in rows["heads_fraction"]], ffns=[words.share(f) for f in rows["ffns_fraction"]],
        model=[models.get(mask, "") for mask in rows["mask"]])


def _tooltip() -> list[alt.Tooltip]:
    return [alt.Tooltip("kind:N", title="removed"), alt.Tooltip("heads:N", title="of the heads"),
            alt.Tooltip("heads_removed:Q", title="how many"), alt.Tooltip("ffns:N", title="of the FFNs"),
            alt.Tooltip("ffns_removed:Q", title="how many"),
            alt.Tooltip("left:Q", title="parameters left (%)"), alt.Tooltip("accuracy:Q", format=".3f"),
            alt.Tooltip("low:Q", format=".3f"), alt.Tooltip("high:Q", format=".3f"),
            alt.Tooltip("difference:Q", title="to the full model", format="+.3f"),
            alt.Tooltip("difference_low:Q", title="at least (95 %)", format="+.3f"),
            alt.Tooltip("difference_high:Q", title="at most (95 %)", format="+.3f"),
            alt.Tooltip("verdict:N", title="loss beside the margin"), alt.Tooltip("documents:Q")]


def cost_sentence(rows: pd.DataFrame) -> str:
    """The most accurate point at a few sizes, with what it loses.

    Args:
        rows: From `headcount.analysis.removal.costs`.
    """
    if rows.empty:
        return ""
    full, where = rows.iloc[0], f"With {words.shots_of(rows)} {words.on(rows)}"
    if not full["above_baseline"]:
        return (f"{where} nothing can be said of what smaller models lose: the full model's accuracy, "
                f"{full['accuracy']:.2f}, is not shown to be above what guessing or a constant answer gets.")
    said, told = list[str](), set[str]()
    for size in _SIZES:
        small = rows[rows["front"] & (rows["left"] <= size + 1e-9)]
        if small.empty or (best := small.sort_values("difference", kind="stable").iloc[-1])["mask"] in told:
            continue
        told.add(best["mask"])
        known = best["difference_low"] == best["difference_low"]
        interval = f" ({'' if said else '95 % interval '}{words.between(best)})" if known else ""
        said.append(f"with at most {words.percent(size)} of the parameters the model without {_without(best)}, whose "
                    f"accuracy changes by {words.signed(best['difference'])} points{interval}")
    if not said:
        return (f"{where} all measured points keep more than {words.percent(_SIZES[0])} of the parameters.")
    return (f"{where} the full model's accuracy is {full['accuracy']:.3f}. Most accurate of what was measured: "
            f"{'; '.join(said)}.")


def _without(row: pd.Series) -> str:
    gone = [f"{words.share(row[f'{part}_fraction'])} of the {name}" for part, name in (("heads", "heads"), (
        "ffns", "FFNs")) if row[f"{part}_removed"] > 0]
    return " and ".join(gone) + (" (every layer of one shape)" if row["uniform"] else "")


def _caption(rows: pd.DataFrame, models: Sequence[RemovedModel], marked: Mapping[str, str]) -> str:
    of_all = rows["scope"].iloc[0] == MEAN
    by = "the order of all tasks together" if of_all else f"the order of {rows['task'].iloc[0]}"
    least, most = rows["documents"].min(), rows["documents"].max()
    said = [f"Each mark is a model that lost the least important heads or FFNs by {by}, as one smaller model would; "
            f"vertical lines are 95 % intervals of its accuracy over {most:,} documents. Whether a point "
            "differs from the full model is told by the difference on the same documents: point at a mark."]
    if least < most:
        said.append(f"Some points are of fewer documents ({least:,}): each is drawn as the full model's accuracy plus "
                    "its difference to the full model on its own.")
    said.append("The grey steps join the points that no other one beats with as few parameters, labelled with heads "
                "removed / FFNs removed in %. Picked from many by their own result, they look better than they are on "
                "other documents.")
    if marked:
        said.append("Circles: models that were written by headcount remove, by name.")
    elsewhere = [one.name for one in models if one.mask is not None and one.mask.digest() not in marked]
    if elsewhere:
        said.append(f"Not among these points: {words.few(elsewhere)} (see the table of removed models).")
    return " ".join(said)


def sections(study: Study) -> Iterator[Section]:
    """Accuracy against cost, where several sizes of one model were measured."""
    rows = costs(study.removable())
    if rows.empty:
        return
    models = [one for one in removed_models(study.folder) if not _of_another(one, study)]
    by_mask: dict[str, list[str]] = {}
    for one in models:
        if one.mask is not None:
            by_mask.setdefault(one.mask.digest(), []).append(one.name)
    marked = {mask: ", ".join(names) for mask, names in by_mask.items() if (rows["mask"] == mask).any()}
    of_one = rows["scope"].iloc[0] != MEAN
    baseline = study.baseline(rows["task"].iloc[0] if of_one else None, int(rows["num_fewshot"].iloc[0]))
    yield section("accuracy_against_cost", "What a smaller model costs",
                  lambda: cost_figure(rows, baseline, marked), cost_sentence(rows), _caption(rows, models, marked))


def _of_another(one: RemovedModel, study: Study) -> bool:
    """Whether a certificate is known to be of another model than the study's."""
    ours = study.model.get("identity")
    heads = tuple(study.description["anatomy"]["heads_per_layer"])
    return (one.mask is not None and one.mask.heads_per_layer != heads) or bool(
        ours and one.identity and ours != one.identity)


def tables(study: Study) -> Iterator[Table]:
    """The models that were removed by this study."""
    models = removed_models(study.folder)
    if not models:
        return
    timed = [one for one in models if one.speed]
    rows = [_row(one, study, speeds=bool(timed)) for one in models]
    caption = ("One row per certificate in the folder removed, which headcount remove --study writes: what went, the "
               "parameters and bytes of weights that are left (in brackets the full model's), and what the "
               "confirmation said, on documents that chose nothing.")
    if timed:
        peaks = ("the most memory at once, measured" if all(one.peak_measured for one in timed) else
                 "weights and the cache of keys and values, counted")
        caption += (" Speeds are tokens per second, timed in turns (medians): the full model / the same with heads and "
                    f"FFNs masked / removed. Prefill: {'; '.join(dict.fromkeys(one.timed for one in timed))}. Memory: "
                    f"{peaks}; full / removed.")
    yield Table("Removed models", caption, pd.DataFrame(rows).fillna(""))


def _row(one: RemovedModel, study: Study, *, speeds: bool) -> dict[str, object]:
    if one.mask is None:
        return {"name": one.name, "what went": f"{FOLDER}/{one.name}.json cannot be read ({one.damage}): copy it anew, "
                                               "headcount.json in the removed model's folder"}
    heads, ffns = sum(one.mask.heads_per_layer), len(one.mask.ffns)
    zeros = one.format == "masked"
    went = (f"{len(one.mask.heads_removed)} of {heads} heads, {len(one.mask.ffns_removed)} of {ffns} FFNs"
            + (" (zeros in their place)" if zeros else "") + (" of another model" if _of_another(one, study) else ""))
    full, masked, small = (one.speed.get(side) for side in SIDES)
    left = one.parameters if zeros else one.parameters_left
    row: dict[str, object] = {
        "name": one.name, "what went": went, "format": one.format,
        "parameters": f"{left:,} ({one.parameters:,})",
        "weights, MB": (f"{one.bytes_left / 1e6:,.0f}" if not zeros else "")
        + (f" ({full.bytes / 1e6:,.0f})" if full is not None else "")}
    if speeds:
        known = full is not None and masked is not None and small is not None
        row |= {"prefill, tokens/s": _three([side.prefill for side in (full, masked, small) if side] if known else []),
                "decode, tokens/s": _three([side.decode for side in (full, masked, small) if side] if known else []),
                "memory, MB": f"{full.peak_bytes / 1e6:,.0f} / {small.peak_bytes / 1e6:,.0f}" if full and small else ""}
    return row | {"confirmed": one.confirmed or "not confirmed on other documents"}


def _three(numbers: Sequence[float]) -> str:
    return " / ".join(f"{n:,.0f}" if n >= 100 else f"{n:.1f}" for n in numbers)
