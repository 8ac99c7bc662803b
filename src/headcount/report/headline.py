"""The first words of a study: how much can go, and how sure that is; computed, never written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from headcount.analysis.curves import COMMON
from headcount.analysis.points import MEAN, groups
from headcount.analysis.study import Study
from headcount.report import words
from headcount.report.curves import (
    BANDS,
    costs_more,
    curve_sentence,
    free_fractions_table,
    headline_figure,
    summary_task,
)
from headcount.report.induction import induction_sentence
from headcount.report.section import Section, Table, mean_first, plain_columns, section, thousandths
from headcount.report.words import COMPONENT_NAMES, millions, share, shots, signed, told
from headcount.stats.intervals import WITHIN

# Of the figure that stands before all sections.
NAME = "headline"


def constants(description: Mapping[str, Any]) -> tuple[int, int, int]:
    """Number of heads, of FFNs, and of parameters of a study's model."""
    anatomy = description["anatomy"]
    return sum(anatomy["heads_per_layer"]), len(anatomy["heads_per_layer"]), anatomy["parameters"]


def headline(study: Study) -> list[str]:
    """How many heads and FFNs can go, most shots first: each task by its own order, then one set for all tasks."""
    table = study.free_fractions()
    summary = table[table["task"] == MEAN] if (table["task"] == MEAN).any() else table
    ordered = summary.assign(common=summary["order"] == COMMON).sort_values(
        ["num_fewshot", "component", "common"], ascending=[False, False, True], kind="stable")
    sentences: list[str] = []
    for k, of_k in groups(ordered, "num_fewshot"):
        undefined = of_k["free_fraction"].isna()
        if undefined.all():
            sentences.append(f"With {shots(int(k))} nothing can be said: {of_k['reason'].iloc[0]}.")
        else:
            sentences += [_can_go(study, row) for _, row in of_k[~undefined].iterrows()]
    if sentences:
        return [*_unfinished(study), *sentences]
    found = induction_sentence(study.induction(), study.induction_thresholds) if not study.tasks else ""
    return [found or "This study has no pruning curves yet."]


def _unfinished(study: Study) -> Iterator[str]:
    """That means over tasks are not over all of them yet."""
    planned, numbers = len(study.spec["tasks"]), sorted(study.spec["shots"])
    done = {k: len(study.finished_tasks(k)) for k in numbers}
    if min(done.values(), default=planned) < planned:
        counts = ", ".join(f"{n} with {shots(k)}" for k, n in done.items())
        yield (f"Not every task is measured at every number of shots: of {planned} tasks, {counts}. Means are over "
               "those alone.")


def _can_go(study: Study, row: pd.Series) -> str:
    """One claim of how much can go: of each task by its own order, or of one set for all tasks."""
    heads, ffns, _ = constants(study.description)
    total = heads if row["component"] == "head" else ffns
    names, margin = COMPONENT_NAMES[row["component"]][1], study.spec["margin"]
    what = "mean accuracy" if row["task"] == MEAN else f"accuracy on {row['task']}"
    by = f"one set of {names} for all tasks" if row["order"] == COMMON else (
        "each task by its own order" if row["task"] == MEAN else "by its own order")
    beginning = f"With {shots(int(row['num_fewshot']))}, {by}: "
    if row["free_fraction"] > 0:
        said = (f"{share(row['free_fraction'])} of the {names} ({row['removed']:.0f} of {total}, "
                f"{millions(row['parameters_removed'])} parameters) can go. {what[0].upper()}{what[1:]} is then "
                f"{row['accuracy']:.3f}, the full model's {row['full_accuracy']:.3f} ({_interval(row, margin)}; up to "
                f"there {told(WITHIN, margin)} at every step).")
        if row["order"] != COMMON:
            return f"{beginning}{said}{_on_those_above_chance(row)}"
        return f"{beginning}{said}{costs_more(study, row, float(row['free_fraction']))}"
    if row["next_fraction"] != row["next_fraction"]:
        return f"{beginning}no step removes one of the {total} {names}: ask for larger fractions."
    verdict = told(row["next_verdict"], margin, needed=row["next_documents"], documents=row["documents"])
    loses = costs_more(study, row, float(row["next_fraction"])) if row["order"] == COMMON else ""
    return (f"{beginning}no share of the {names} is shown to be free. Already without {row['next_removed']:.0f} of "
            f"{total} {what} changes by {signed(row['next_difference'])} points (95 % interval "
            f"{words.bounds(row['next_low'], row['next_high'], margin)}): {verdict}.{loses}")


def _on_those_above_chance(row: pd.Series) -> str:
    """What a mean hides where some of its tasks have little to lose."""
    tasks, able = int(row["tasks"]), int(row["above_chance"])
    if able in (0, tasks):
        return ""
    low, high = row["above_chance_low"], row["above_chance_high"]
    interval = f"{signed(low)} to {signed(high)}"
    return (f" The full model is shown to be above both chance and the best constant answer on {able} of the {tasks} "
            f"tasks of that mean; on {'that' if able == 1 else 'those'} alone the difference is "
            f"{signed(row['above_chance_difference'])} points ({interval}; tasks and share were chosen on these "
            "documents).")


def _interval(row: pd.Series, margin: float) -> str:
    bounds = words.bounds(row["difference_low"], row["difference_high"], margin)
    return f"95 % interval of the difference {bounds} points"


def sections(study: Study) -> Iterator[Section]:
    """The figure at the head of the page: mean accuracy as heads, and FFNs, go."""
    curves = study.curves()
    pruned = curves[curves["component"] != "none"]
    if pruned.empty:
        return
    task = summary_task(pruned)
    measured = pruned.loc[pruned["task"] == task, "num_fewshot"].unique()
    baselines = {int(k): study.baseline(task, int(k)) for k in measured}
    yield section(
        NAME, "How much can go", lambda: headline_figure(pruned, study.free_fractions(), baselines),
        "Accuracy as the least important components go: each task by its own order (solid), all tasks by one order "
        "(dotted), random orders (dashed).", BANDS, "A diamond marks the free fraction, "
        f"the largest share at which {words.told(WITHIN, study.spec['margin'])}, as at every step up to it.",
        curve_sentence(study, "head"))


def tables(study: Study) -> Iterator[Table]:
    """How much can go, and the full model's accuracy."""
    free = mean_first(study.free_fractions())
    if len(free):
        yield free_fractions_table(study, free)
    curves = study.curves()
    full = mean_first(curves[curves["fraction"] == 0].drop_duplicates(["task", "num_fewshot"]))
    full = thousandths(full, "accuracy", "low", "high")
    if len(full):
        yield Table("Accuracy of the full model", "With 95 % interval over documents.",
                    plain_columns(full[["task", "num_fewshot", "accuracy", "low", "high", "documents"]]))
