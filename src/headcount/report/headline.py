"""What a study says first: how much can be removed, and how certain that is; all of it computed from the tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import altair as alt
import pandas as pd

from headcount.analysis.curves import first_differences
from headcount.analysis.rows import (
    COMMON,
    FREE_FORM,
    MEAN,
    ONE_SET,
    TASK,
    UNIFORM,
    UNIFORM_COMMON,
    groups,
    labelled,
    labels_of,
    mean_or_first,
    of_scope,
)
from headcount.analysis.study import Study
from headcount.report import words
from headcount.report.curve_parts import (
    BANDS,
    BY,
    OF_OWN_ORDER,
    costs_more,
    curve_data,
    curve_marks,
    curve_sentence,
    order_dashes,
    shape_words,
)
from headcount.report.induction_heads import induction_sentence
from headcount.report.section import Section, Table, mean_first, plain_columns, section, thousandths
from headcount.report.style import COMPONENTS, Chart, dressed, shots_colour
from headcount.report.words import COMPONENT_NAMES, millions, share, shots, signed, told
from headcount.stats.intervals import UNKNOWN, WITHIN

# Of the figure that stands before all sections.
NAME = "headline"


def constants(description: Mapping[str, Any]) -> tuple[int, int, int]:
    """Number of heads, of FFNs, and of parameters of a study's model."""
    anatomy = description["anatomy"]
    return sum(anatomy["heads_per_layer"]), len(anatomy["heads_per_layer"]), anatomy["parameters"]


def headline(study: Study) -> list[str]:
    """How many heads and FFNs can go, most shots first: each task by its own order, then one set for all tasks.

    Where every layer keeps the same shape, heads are told of after both.
    """
    table = study.free_fractions()
    means = of_scope(table, MEAN)
    summary = means if len(means) else table
    later = {COMMON: 1, UNIFORM: 2, UNIFORM_COMMON: 3}
    ordered = summary.assign(place=[later.get(order, 0) for order in summary["order"]]).sort_values(
        ["num_fewshot", "component", "place"], ascending=[False, False, True], kind="stable")
    sentences: list[str] = []
    for k, of_k in groups(ordered, "num_fewshot"):
        undefined = of_k["free_fraction"].isna()
        if undefined.all():
            sentences.append(f"With {shots(int(k))} nothing can be said: {of_k['reason'].iloc[0]}.")
        else:
            sentences += [_can_go(study, row) for _, row in of_k[~undefined].iterrows()]
    if sentences:
        return [*_unfinished(study), *sentences]
    sentence = induction_sentence(study.induction(), study.induction_thresholds) if not study.tasks else ""
    return [sentence or "This study has no pruning curves yet."]


def _unfinished(study: Study) -> Iterator[str]:
    """That means over tasks are not over all of them yet."""
    planned, numbers = len(study.spec["tasks"]), sorted(study.spec["shots"])
    done = {k: len(study.finished_tasks(k)) for k in numbers}
    if min(done.values(), default=planned) < planned:
        counts = ", ".join(f"{n} with {shots(k)}" for k, n in done.items())
        yield (f"Not every task is measured at every number of shots: of {words.number_of(planned, 'task')}, "
               f"{counts}. Means are over these tasks only.")


def _can_go(study: Study, row: pd.Series) -> str:
    """One claim of how much can go: of each task by its own order, or of one set for all tasks."""
    heads, ffns, _ = constants(study.description)
    total = heads if row["component"] == "head" else ffns
    names, margin = COMPONENT_NAMES[row["component"]][1], study.spec["margin"]
    what = "mean accuracy" if row["scope"] == MEAN else f"accuracy on {row['task']}"
    by = f"one set of {names} for all tasks" if row["order"] in ONE_SET else (
        "each task by its own order" if row["scope"] == MEAN else "by its own order")
    by += ", every layer of the same shape" if row["order"] in FREE_FORM else ""
    beginning = f"With {shots(int(row['num_fewshot']))}, {by}: "
    if row["free_fraction"] > 0:
        said = (f"{share(row['free_fraction'])} of the {names} ({row['removed']:.0f} of {total}, "
                f"{millions(row['parameters_removed'])} parameters) can go. {what[0].upper()}{what[1:]} is then "
                f"{row['accuracy']:.3f}, the full model's {row['full_accuracy']:.3f} ({_interval(row, margin)}; "
                f"{told(WITHIN, margin)} at every step up to this share).")
        if row["order"] not in ONE_SET:
            return f"{beginning}{said}{_on_those_above_chance(row)}"
        return f"{beginning}{said}{costs_more(study, row, float(row['free_fraction']))}"
    if row["next_fraction"] != row["next_fraction"]:
        return f"{beginning}no step removes one of the {total} {names}: ask for larger --fractions."
    verdict = told(row["next_verdict"], margin, needed=row["next_documents"], documents=row["documents"])
    loses = costs_more(study, row, float(row["next_fraction"])) if row["order"] in ONE_SET else ""
    return (f"{beginning}no share of the {names} is shown to be free. Already without {row['next_removed']:.0f} of "
            f"{total}, {what} changes by {signed(row['next_difference'])} points (95 % interval "
            f"{words.bounds(row['next_low'], row['next_high'], margin)}): {verdict}.{loses}")


def _on_those_above_chance(row: pd.Series) -> str:
    """What a mean hides where some of its tasks have little to lose."""
    tasks, able = int(row["tasks"]), int(row["above_chance"])
    if able in (0, tasks):
        return ""
    low, high = row["above_chance_low"], row["above_chance_high"]
    interval = f"{signed(low)} to {signed(high)}"
    return (f" The full model is shown to be above both chance and the best constant answer on {able} of the {tasks} "
            f"tasks of that mean; on {'that one' if able == 1 else 'those'} alone the difference is "
            f"{signed(row['above_chance_difference'])} points ({interval}; tasks and share were chosen on these "
            "documents).")


def _interval(row: pd.Series, margin: float) -> str:
    bounds = words.bounds(row["difference_low"], row["difference_high"], margin)
    return f"95 % interval of the difference {bounds} points"


def sections(study: Study) -> Iterator[Section]:
    """The figure at the head of the page: mean accuracy as heads, and FFNs, are removed."""
    curves = study.curves()
    pruned = curves[curves["component"] != "none"]
    if pruned.empty:
        return
    rows = mean_or_first(pruned)
    task = rows["task"].iloc[0] if rows["scope"].iloc[0] == TASK else None
    baselines = {int(k): study.baseline(task, int(k)) for k in rows["num_fewshot"].unique()}
    yield section(
        NAME, "How much can go", lambda: headline_figure(pruned, study.free_fractions(), baselines),
        "Accuracy as the least important components are removed: from each task by its own order (solid), from all "
        "tasks by one order (dotted), in random orders (dashed).", shape_words(pruned), BANDS,
        "A diamond marks the free fraction, "
        f"the largest share at which {words.told(WITHIN, study.spec['margin'])}, as at every step up to it.",
        curve_sentence(study, "head"))


def tables(study: Study) -> Iterator[Table]:
    """How much can go, and the full model's accuracy."""
    free = study.free_fractions()
    if len(free):
        yield free_fractions_table(study, free)
    curves = study.curves()
    full = mean_first(curves[curves["fraction"] == 0].drop_duplicates(["scope", "task", "num_fewshot"]))
    full = thousandths(full, "accuracy", "low", "high")
    if len(full):
        yield Table("Accuracy of the full model", "With its 95 % interval over documents.",
                    plain_columns(full[["task", "num_fewshot", "accuracy", "low", "high", "documents"]]))


def headline_figure(curves: pd.DataFrame, free: pd.DataFrame, baselines: dict[int, float]) -> Chart:
    """Mean accuracy as heads, and as FFNs, are removed: by importance and at random, with intervals and free fractions.

    Args:
        curves: `Study.curves()`.
        free: `Study.free_fractions()`.
        baselines: Chance (or the best constant answer) by number of shots.
    """
    rows = labelled(mean_or_first(curves), labels_of(curves))
    marks = mean_or_first(free)
    panels = [
        _curve_panel(rows[rows["component"] == c], marks[marks["component"] == c], baselines)
        .properties(width=285, height=240, title=f"{COMPONENTS[c][0].upper()}{COMPONENTS[c][1:]} removed")
        for c in ("head", "ffn") if (rows["component"] == c).any()
    ]
    return dressed(alt.hconcat(*panels))


def _curve_panel(rows: pd.DataFrame, free: pd.DataFrame, baselines: dict[int, float]) -> Chart:
    described = curve_data(rows)
    base = alt.Chart(described).encode(x=alt.X("percent:Q", title="removed (%)", scale=alt.Scale(domain=[0, 100]),
                                                    axis=alt.Axis(values=list(range(0, 101, 20)))))
    y = alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]))
    band = base.transform_filter(OF_OWN_ORDER).mark_area(opacity=0.18).encode(
        y=alt.Y("low:Q", title="accuracy"), y2=alt.Y2("high:Q"), color=shots_colour(described))
    line = base.mark_line(strokeWidth=2).encode(y=y, color=shots_colour(described), strokeDash=order_dashes(described))
    guess = pd.DataFrame({"accuracy": sorted(set(baselines.values()))[:1]})
    chance = alt.Chart(guess).mark_rule(color="#888", strokeDash=[2, 3]).encode(y=alt.Y("accuracy:Q"))
    word = alt.Chart(guess).mark_text(align="left", dx=4, color="#666", fontSize=10).encode(
        y=alt.Y("accuracy:Q"), x=alt.datum(100), text=alt.TextValue("guessing"))
    marks = free[free["free_fraction"] > 0].assign(percent=lambda t: 100 * t["free_fraction"], by=lambda t: t[
        "order"].map(BY), shots=lambda t: t["num_fewshot"].map(shots))
    layers = [band, chance, word, line, *curve_marks(base, described, 30)]
    if len(marks):
        # Filled where each task goes by its own order, hollow where all go by one.
        layers.append(alt.Chart(marks).mark_point(shape="diamond", size=190, filled=True, strokeWidth=2,
                                                  opacity=1).encode(
            fill=alt.condition(OF_OWN_ORDER, shots_colour(described), alt.value("white")),
            stroke=alt.condition(OF_OWN_ORDER, alt.value("black"), shots_colour(described)),
            x=alt.X("percent:Q"), y=alt.Y("accuracy:Q"), color=shots_colour(described),
            tooltip=[alt.Tooltip("percent:Q", title="free (%)"), alt.Tooltip("by:N", title="removed"),
                     alt.Tooltip("shots:N"), alt.Tooltip("accuracy:Q", format=".3f")]))
    return alt.layer(*layers)


def free_fractions_table(study: Study, free: pd.DataFrame) -> Table:
    """How much can go, each task by its own order and all by one, and what is known of the next step."""
    margin = study.spec["margin"]
    keys = ["scope", "task", "num_fewshot", "component", "order"]
    first = mean_first(free[keys].merge(first_differences(study.curves()), on=keys, how="left"))
    free = mean_first(free)
    frame = thousandths(free, "accuracy").assign(
        component=free["component"].replace({"head": "heads", "ffn": "FFNs"}),
        removed_by=[("one order" if order in ONE_SET else "own order") + (", one shape" if order in FREE_FORM else "")
                    for order in free["order"]],
        free=[words.share(f) if f == f else "not defined" for f in free["free_fraction"]],
        at_most=[words.share(f) if f == f else "" for f in free["free_high"]],
        interval=[words.bounds(low, high, margin) if fraction > 0 else "" for fraction, low, high in zip(
            free["free_fraction"], free["difference_low"], free["difference_high"], strict=True)],
        next_step=[f"{words.share(f)}: {words.bounds(low, high, margin)}" if f == f else "" for f, low, high
                   in zip(free["next_fraction"], free["next_low"], free["next_high"], strict=True)],
        there=[_next(row) for _, row in free.iterrows()],
        differs_at=[f"{words.share(f)} ({words.better_or_worse(d)})" if f == f else "no step" for f, d in zip(
            first["fraction"], first["difference"], strict=True)])
    shapes = (" 'One shape': every layer keeps as many KV groups, and every group as many heads."
              if free["order"].isin([*FREE_FORM]).any() else "")
    columns = ["task", "num_fewshot", "component", "removed_by", "free", "at_most", "accuracy", "interval", "next_step",
               "there", "differs_at"]
    return Table(
        "Free fractions", f"Free: the largest share at which {words.told(WITHIN, margin)}, as at every step up to it; "
        "unlimited documents might show more, up to 'at most' (both are the ends of a 95 % interval); not defined "
        "where the full model is not shown to be above guessing or a constant answer. Removed by each task's own "
        f"order, or by one order for all tasks.{shapes} Accuracy at the free share, and the 95 % interval of its "
        "difference to the full model in points. Next step: the same for the first step that is not free. 'There': "
        "whether that step is shown to cost more than the margin, or these documents cannot tell, and how many in all "
        "would, if as large a share of them changed. 'Differs at': the first step at which accuracy is shown to be "
        "better or worse than the full model's (McNemar's exact test, p < 0.05, corrected for the curve's steps by "
        "Holm's method).",
        plain_columns(frame[columns]))


def _next(row: pd.Series) -> str:
    """`costs more`; `cannot tell (about 1,900 documents would)`."""
    if row["next_verdict"] != row["next_verdict"]:
        return ""
    if row["next_verdict"] != UNKNOWN:
        return str(row["next_verdict"])
    needed = words.about(row["next_documents"])
    return f"cannot tell ({needed} would)" if needed else "cannot tell"
