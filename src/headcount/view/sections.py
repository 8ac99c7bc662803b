"""The sections of a report, in the order of the paper: a heading, a figure, and a caption computed from the data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from headcount.intervals import COSTS_MORE, WITHIN
from headcount.view import charts, dots, findings, maps, primitives, sentences, words
from headcount.view.analysis import Study
from headcount.view.points import MEAN
from headcount.view.selection import own_orders, transferred

_BANDS = "Bands are 95 % intervals over documents; point at a mark for its numbers."


@dataclass(frozen=True)
class Section:
    """One figure with what is said of it.

    Attributes:
        name: Of its files.
        heading: Of its part of the page.
        caption: What it shows, in words.
        page: Draws it for the page.
        static: Draws it for PNG and PDF.
    """

    name: str
    heading: str
    caption: str
    page: Callable[[], Any]
    static: Callable[[], Any]


def sections(study: Study) -> list[Section]:
    """What the study has data for."""
    found = [*_importance(study), *_curves(study), *_grid(study), *_comparisons(study), *_transfer(study),
             *_induction(study)]
    order = ["headline", "head_map", "depth", "ffn_bars", "head_curves", "ffn_curves", "grid", "cross_task_head",
             "cross_task_ffn", "cross_shot", "transfer_head", "transfer_ffn", "unseen_head", "unseen_ffn",
             "induction_maps", "induction_scatter", "retained"]
    return sorted(found, key=lambda section: order.index(section.name))


def _section(
    name: str, heading: str, draw: Callable[[], Any], *caption: str, static: Callable[[], Any] | None = None
) -> Section:
    return Section(name, heading, " ".join(filter(None, caption)), draw, static or draw)


def _importance(study: Study) -> Iterator[Section]:
    importance, score = study.importance(), study.ordering_scores["head"]
    if (importance["component"] == "head").any():
        yield _section(
            "head_map", "Which heads matter", lambda: charts.head_map(importance, score, choose=True),
            sentences.importance_sentence(study, "head"), f"The colour is a head's importance by "
            f"{words.score_name(score)} as a share of the largest in its panel ('mean' is that of scores); point at a "
            "head for its value, and for its rank by either gradient score.",
            static=lambda: charts.head_map(importance, score, choose=False))
        yield _section(
            "depth", "Where important heads lie", lambda: dots.depth_bars(study.depth()),
            findings.depth_sentence(study.depth()), "Bars: over tasks, with 95 % intervals over documents where they "
            "are known; dots: single tasks; short lines: the share that a third of the layers has of all heads.")
    if (importance["component"] == "ffn").any():
        by = study.ordering_scores["ffn"]
        bars = list(dict.fromkeys([by, "gold_loglikelihood", "accuracy", score]))
        yield _section(
            "ffn_bars", "Which FFNs matter", lambda: charts.ffn_bars(importance, bars, choose=True),
            sentences.importance_sentence(study, "ffn"), _bars(study), "Lines are plus and minus one standard error; "
            "every panel has its own scale.", static=lambda: charts.ffn_bars(importance, bars, choose=False))


def _bars(study: Study) -> str:
    """What the bars of FFNs are."""
    importance = study.importance()
    if not ((importance["component"] == "ffn") & (importance["score"] == "accuracy")).any():
        return "Bars: the gradient score."
    documents = "evaluated" if study.spec["protocol"] == "paper" else "training"
    by = words.score_name(study.ordering_scores["ffn"])
    return (f"From above: {by}, which orders FFNs here, then the other scores. What is lost is measured on {documents} "
            "documents with one FFN off.")


def _curves(study: Study) -> Iterator[Section]:
    curves = study.curves()
    pruned = curves[curves["component"] != "none"]
    if pruned.empty:
        return
    task = charts.summary_task(pruned)
    measured = pruned.loc[pruned["task"] == task, "num_fewshot"].unique()
    baselines = {int(k): study.baseline(task, int(k)) for k in measured}
    yield _section(
        "headline", "How much can go", lambda: charts.headline(pruned, study.free_fractions(), baselines),
        "Accuracy as the least important components go: each task by its own order (solid), all tasks by one order "
        "(dotted), random orders (dashed).", _BANDS, "A diamond marks the free fraction, "
        f"the largest share at which {words.told(WITHIN, study.spec['margin'])}, as at every step up to it.",
        sentences.curve_sentence(study, "head"))
    if (pruned["component"] == "head").any():
        yield _section("head_curves", "Pruning heads, task by task", lambda: charts.task_curves(pruned, "head"),
                       _by_task(study, "head"), sentences.differences_sentence(study, "head"),
                       sentences.common_sentence(study, "head"), _BANDS)
    if (pruned["component"] == "ffn").any():
        yield _section("ffn_curves", "Pruning FFNs, task by task", lambda: charts.task_curves(pruned, "ffn"),
                       _by_task(study, "ffn"), sentences.differences_sentence(study, "ffn"),
                       sentences.common_sentence(study, "ffn"), sentences.curve_sentence(study, "ffn"), _BANDS)


def _by_task(study: Study, component: str) -> str:
    """How the free fraction differs between tasks, at the most shots at which it is defined, and what else is shown."""
    free = own_orders(study.free_fractions())
    free = free[(free["task"] != MEAN) & (free["component"] == component)]
    defined = free[free["free_fraction"].notna()]
    if defined.empty:
        return ("The full model is on no task shown to be above a baseline, so that no free fraction is defined."
                if len(free) else "")
    free = defined[defined["num_fewshot"] == defined["num_fewshot"].max()].sort_values(
        ["free_fraction", "free_high"], kind="stable")
    shots, names = words.shots(int(free["num_fewshot"].iloc[0])), {"head": "heads", "ffn": "FFNs"}[component]
    curves = study.curves()
    last = float(curves.loc[curves["component"] == component, "fraction"].max())
    some, none = free[free["free_fraction"] > 0], free[free["free_fraction"] == 0]
    if len(some):
        least, most = some.iloc[0], some.iloc[-1]
        ends = f"{_free_with_bound(least, last)} on {least['task']}"
        if len(some) > 1:
            ends += f" to {_free_with_bound(most, last)} on {most['task']}"
        of = words.number_of(len(free), "task")
        said = f"a share of the {names} is shown to be free on {len(some)} of {of}: {ends}"
    else:
        said = f"no share of the {names} is shown to be free on any of {words.number_of(len(free), 'task')}"
    if len(none):
        loses = none["next_verdict"] == COSTS_MORE
        counts = [f"{what} on {n}" for n, what in (
            (int(loses.sum()), words.told(COSTS_MORE, study.spec["margin"])),
            (int((~loses).sum()), "these documents cannot tell")) if n]
        beginning = "; at the first step of the others " if len(some) else ": at the first step "
        said += beginning + words.listed(counts) + _enough(none[~loses])
    return f"With {shots} {said}."


def _enough(unknown: pd.DataFrame) -> str:
    """How many documents would tell on the tasks where these cannot."""
    known = unknown["next_documents"].dropna()
    finite = known[known < float("inf")]
    if finite.empty:
        return ""
    return f" ({finite.median():,.0f} documents a task would, in the median, if as large a share of them changed)"


def _bound(row: pd.Series, last: float) -> str:
    """`30 %`, and `90 % or more` where the curve ends there."""
    return f"{words.share(row['free_high'])}{' or more' if row['free_high'] >= last else ''}"


def _free_with_bound(row: pd.Series, last: float) -> str:
    """`10 % (unlimited documents might show up to 30 %)`."""
    more = row["free_high"] > row["free_fraction"] or row["free_high"] >= last
    return words.share(row["free_fraction"]) + (
        f" (unlimited documents might show up to {_bound(row, last)})" if more else "")


def _grid(study: Study) -> Iterator[Section]:
    grid = study.grid()
    if grid.empty:
        return
    yield _section(
        "grid", "Heads and FFNs together", lambda: maps.grid_map(grid, choose=True),
        findings.grid_sentence(grid, study.spec["margin"]),
        f"Accuracy on the first documents of every task ({grid['documents'].max()} of all tasks), removed by "
        + ("the orders of all tasks together" if (grid["order"] == MEAN).any() else "each task's own orders")
        + f"; the line encloses cells where {words.told(WITHIN, study.spec['margin'])}, tested one by one: of "
        "many cells that lose about as much a few are framed by chance. Where the full model is not above its baseline "
        "no cell is framed.", static=lambda: maps.grid_map(grid, choose=False))


def _comparisons(study: Study) -> Iterator[Section]:
    found, top = study.correlations(), study.top_sets()
    words = {"head": "heads", "ffn": "FFNs"}
    for component, score in study.ordering_scores.items():
        rows = found[(found["component"] == component) & (found["kind"] == "tasks")] if len(found) else found
        if len(rows[~rows["task"].isin(["random"]) & ~rows["other_task"].isin(["random"])]):
            yield _section(
                f"cross_task_{component}", f"Do tasks need the same {words[component]}?",
                functools.partial(maps.task_matrix, found, component, score=score),
                findings.tasks_sentence(found, component, score=score),
                findings.top_sets_sentence(top[top["component"] == "head"]) if component == "head" else "",
                "Spearman's correlation of importance; the diagonal is what a score would correlate with itself, "
                "measured on as many other documents. Panels of scores that are mostly noise are pale. The means leave "
                "out the task that they stand beside. Three tasks and more are placed so that those which rank alike "
                "are neighbours.")
    if len(found) and (found["kind"] == "shots").any():
        yield _section("cross_shot", "Does the order depend on the number of shots?",
                       lambda: dots.shots_dots(found, scores=study.ordering_scores),
                       *(findings.shots_sentence(found, c, score=s) for c, s in study.ordering_scores.items()),
                       "In grey a random order beside the scores of each number of shots, and what 95 % of random "
                       "orders reach. Pale: scores that are mostly noise.")


def _transfer(study: Study) -> Iterator[Section]:
    transfer = study.transfer()
    for component, word in (("head", "heads"), ("ffn", "FFNs")):
        if len(transferred(transfer, component, unseen=False)):
            yield _section(
                f"transfer_{component}", f"Does the order of one task serve another? ({word})",
                functools.partial(maps.transfer_map, transfer, component),
                findings.transfer_sentence(transfer, component),
                "Accuracy lost or gained, in points, by pruning with another order than the task's own; bold where the "
                "95 % interval leaves out 0. Intervals are not corrected for how many there are.")
        if len(transferred(transfer, component, unseen=True)):
            yield _section(
                f"unseen_{component}", f"Does the order of all tasks serve an unseen one? ({word})",
                functools.partial(dots.unseen_curves, transfer, component),
                findings.unseen_sentence(transfer, component))


def _induction(study: Study) -> Iterator[Section]:
    induction = study.induction()
    if induction.empty:
        return
    notes = study.induction_notes
    told = [f"{note}." for note in notes.get("notes", ())]
    yield _section("induction_maps", "Induction scores of every head", lambda: maps.induction_maps(induction),
                   primitives.texts_sentence(notes),
                   primitives.induction_sentence(induction, study.induction_thresholds),
                   primitives.reliability_caution(notes.get("reliability", {})), *told)
    yield _section("induction_scatter", "Heads high on both", lambda: dots.induction_scatter(
        induction, study.induction_thresholds),
                   primitives.scatter_sentence(induction, study.induction_thresholds))
    retained = study.retained()
    if len(retained):
        yield _section("retained", "Do induction heads survive pruning?", lambda: dots.retained_curves(retained),
                       primitives.retained_sentence(retained),
                       primitives.among_important_sentence(study.induction_among_important()),
                       primitives.overlap_sentence(study.top_overlaps()), "Grey: 95 % of random orders.")
