"""Tasks pruned by other tasks' orders: maps, curves, sentences and their table."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import altair as alt
import pandas as pd

from headcount.analysis.rows import (
    ALL_TASKS,
    MEAN,
    OTHER_TASKS,
    OWN,
    RANDOM,
    TASK,
    groups,
    labelled,
    labels_of,
    most_shots,
    of_fraction,
)
from headcount.analysis.study import Study
from headcount.analysis.transfer import over_recipients, transferred
from headcount.report import words as say
from headcount.report.matrix import matrix
from headcount.report.section import Section, Table, mean_first, plain_columns, section, thousandths
from headcount.report.style import COMPONENTS, LEGEND, PALETTE, SHAPES, Chart, dressed, shots_column
from headcount.report.words import NAMES, shots


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
    rows = rows[(rows["donor_scope"] != OWN) | (rows["scope"] == TASK)]
    if rows.empty:
        return None
    labels, own = labels_of(rows), rows["donor_scope"] == OWN
    rows = labelled(rows, labels)
    rows = rows.assign(donor=rows["donor"].where(~own, rows["task"]))
    cells = pd.DataFrame({
        "row": rows["donor"], "column": rows["task"], "num_fewshot": rows["num_fewshot"],
        "shots": rows["num_fewshot"].map(shots),
        "value": 100 * rows["difference"], "low": 100 * rows["difference_low"], "high": 100 * rows["difference_high"],
        "accuracy": rows["accuracy"], "documents": rows["documents"],
        "framed": own,
        "sure": (rows["difference_low"] > 0) | (rows["difference_high"] < 0)}).round(4)
    tooltip = [alt.Tooltip("column:N", title="task"), alt.Tooltip("row:N", title="pruned by the order of"),
               alt.Tooltip("shots:N"), alt.Tooltip("value:Q", title="points to its own order", format="+.1f"),
               alt.Tooltip("low:Q", title="at least", format="+.1f"),
               alt.Tooltip("high:Q", title="at most", format="+.1f"), alt.Tooltip("accuracy:Q", format=".3f"),
               alt.Tooltip("documents:Q")]
    largest = max(1.0, float(cells["value"].abs().max())) if cells["value"].notna().any() else 1.0
    title = (f"points of accuracy against the own order, {100 * rows['fraction'].iloc[0]:.3g} % of "
             f"{COMPONENTS[component]} removed; bold: the 95 % interval excludes 0")
    columns, donors = labels.tasks_first(cells["column"]), set(cells["row"])
    donors_first = labels.tasks_first([name for name in [*columns, *cells["row"]] if name in donors])
    return matrix(cells, donors_first, columns, _whole, title, largest, tooltip, ("pruned by the order of", "task"),
                  bold=labels.summaries)


def _whole(value: float) -> str:
    """`+3`, `0`, `-12`, and a dash where it is not known."""
    if value != value:
        return "\N{EN DASH}"
    return f"{value:+.0f}".replace("+0", "0").replace("-0", "0").replace("-", "\N{MINUS SIGN}")


def unseen_curves(transfer: pd.DataFrame, component: str) -> Chart:
    """Accuracy on tasks that had no part in the order, as the mean order and a random one remove components.

    Args:
        transfer: One row per recipient, donor, number of shots and fraction; fraction 0 is the full model.
        component: "head" or "ffn".
    """
    rows = transferred(transfer, component, unseen=True)
    orders = {ALL_TASKS: "the mean order", RANDOM: "a random order"}
    pruned = rows[(rows["fraction"] > 0) & rows["donor_scope"].isin(list(orders))]
    if pruned.empty:
        return None
    full = rows[rows["fraction"] == 0].drop_duplicates(["task", "num_fewshot"])
    # The full model begins every line.
    started = [full.assign(donor_scope=donor) for donor in dict.fromkeys(pruned["donor_scope"])]
    rows = pd.concat([*started, pruned], ignore_index=True)
    data = rows[["task", "num_fewshot", "accuracy", "low", "high", "documents"]].round(4).assign(
        percent=(100 * rows["fraction"]).round(2), by=rows["donor_scope"].map(orders),
        shots=rows["num_fewshot"].map(shots))
    used = [name for donor, name in orders.items() if (rows["donor_scope"] == donor).any()]
    base = alt.Chart().encode(x=alt.X("percent:Q", title=f"{COMPONENTS[component]} removed (%)",
                                      scale=alt.Scale(domain=[-3, 100], nice=False),
                                      axis=alt.Axis(values=list(range(0, 101, 20)))))
    colour = alt.Color("by:N", title="removed by", scale=alt.Scale(domain=used, range=[PALETTE[0], "#777777"]))
    y = alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]))
    shape = alt.Shape("by:N", title="removed by", scale=alt.Scale(domain=used, range=SHAPES[:2]))
    lines = [base.transform_filter(alt.datum.by == name).mark_line(
        strokeWidth=1.8, strokeDash=[4, 3] if name == orders[RANDOM] else [1, 0]).encode(y=y, color=colour)
        for name in used]
    errors = base.mark_rule(strokeWidth=1.4).encode(y=alt.Y("low:Q", title="accuracy"), y2=alt.Y2("high:Q"),
                                                          color=colour)
    dots = base.mark_point(filled=True, size=48, opacity=1).encode(
        y=y, color=colour, shape=shape,
        tooltip=[alt.Tooltip("task:N"), alt.Tooltip("shots:N"), alt.Tooltip("by:N", title="removed by"),
                 alt.Tooltip("percent:Q", title="removed (%)"), alt.Tooltip("accuracy:Q", format=".3f"),
                 alt.Tooltip("low:Q", format=".3f"), alt.Tooltip("high:Q", format=".3f"), alt.Tooltip("documents:Q")])
    chart = alt.layer(*lines, errors, dots, data=data).properties(width=235, height=150).facet(
        column=shots_column(data), row=alt.Row("task:N", title=None, sort=list(dict.fromkeys(data["task"])),
                                                      header=alt.Header(labelFontSize=12, labelFontWeight="bold")))
    return dressed(chart).configure_legend(orient="top", **LEGEND)


def transfer_sentence(transfer: pd.DataFrame, component: str, *, fraction: float | None = None) -> str:
    """What another order than a task's own costs: the best and the worst donor, the mean order without the task.

    Args:
        transfer: One row per recipient, donor, number of shots and fraction.
        component: "head" or "ffn".
        fraction: Share removed; the one nearest one half unless told.
    """
    rows = transferred(transfer, component, unseen=False)
    rows = rows[(rows["fraction"] > 0) & (rows["donor_scope"] != OWN) & rows["difference"].notna()]
    if rows.empty:
        return ""
    rows = over_recipients(most_shots(of_fraction(rows, fraction)))
    donors = rows[rows["donor_scope"] == TASK].sort_values("difference", kind="stable")
    said = []
    if len(donors) > 1:
        best, worst = donors.iloc[-1], donors.iloc[0]
        each = " (each on the other tasks)" if best["scope"] == MEAN else ""
        said += [f"by {say.points(best)} with the order of {best['donor']}, the best donor of {len(donors)}{each}",
                 f"by {say.points(worst)} with that of {worst['donor']}, the worst"]
    elif len(donors):
        said.append(f"by {say.points(donors.iloc[0])} with the order of {donors['donor'].iloc[0]}")
    for name, called in ((OTHER_TASKS, "the mean order of the other tasks"), (RANDOM, "a random order")):
        row = rows[rows["donor_scope"] == name]
        said += [f"by {say.points(row.iloc[0])} with {called}"] if len(row) else []
    if not said:
        return ""
    return (f"With {say.shots_of(rows)} and {say.share(rows['fraction'].iloc[0])} of the {NAMES[component]} removed, "
            f"accuracy {say.on(rows)} differs from that by a task's own order, in points, {'; '.join(said)}."
            f"{_own_needed(rows)}")


def _own_needed(rows: pd.DataFrame) -> str:
    """How many single donors are shown to be worse than the own order, or better, and the other tasks' mean order."""
    known = rows.dropna(subset=["difference_low", "difference_high"])
    donors, mean = known[known["donor_scope"] == TASK], known[known["donor_scope"] == OTHER_TASKS]
    said = []
    if len(donors):
        worse, better = int((donors["difference_high"] < 0).sum()), int((donors["difference_low"] > 0).sum())
        of = f"the {len(donors)} single donors" if len(donors) > 1 else "the one donor"
        said.append(f"of {of}, {worse} {'is' if worse == 1 else 'are'} shown to be worse than a task's own order and "
                    f"{better} to be better (not corrected for their number)")
    if len(mean):
        low, high = mean["difference_low"].iloc[0], mean["difference_high"].iloc[0]
        shown = "is shown to be worse" if high < 0 else "is shown to be better" if low > 0 else (
            "is shown to be neither better nor worse")
        said.append(f"the other tasks' mean order {shown}")
    return f" {said[0][0].upper()}{'; '.join(said)[1:]}." if said else ""


def unseen_sentence(transfer: pd.DataFrame, component: str, *, fraction: float | None = None) -> str:
    """What tasks that no order was made from keep under the mean order; arguments as in `transfer_sentence`."""
    rows = transferred(transfer, component, unseen=True)
    pruned = rows[(rows["fraction"] > 0) & rows["donor_scope"].isin([ALL_TASKS, RANDOM])]
    pruned = most_shots(of_fraction(pruned, fraction))
    full = rows[(rows["fraction"] == 0) & (rows["num_fewshot"] == pruned["num_fewshot"].max())]
    said = []
    for task, of_task in groups(pruned, "task"):
        mean, random = (of_task[of_task["donor_scope"] == scope] for scope in (ALL_TASKS, RANDOM))
        if len(mean):
            beside = [f"{called} {say.accuracy(measured.iloc[0])}" for called, measured in (
                ("full model", full[full["task"] == task]), ("random order", random)) if len(measured)]
            said.append(", ".join([f"{task} {say.accuracy(mean.iloc[0])}", *beside]))
    if not said:
        return ""
    return (f"Accuracy on tasks that had no part in the order, with {say.shots_of(pruned)} and "
            f"{say.share(pruned['fraction'].iloc[0])} of the {NAMES[component]} removed by the mean order: "
            f"{'; '.join(said)}.")


def sections(study: Study) -> Iterator[Section]:
    """Maps of transfer between tasks, and curves of unseen ones; heads, then FFNs."""
    transfer = study.transfer()
    for component, word in (("head", "heads"), ("ffn", "FFNs")):
        if len(transferred(transfer, component, unseen=False)):
            yield section(
                f"transfer_{component}", f"Does the order of one task serve another? ({word})",
                functools.partial(transfer_map, transfer, component),
                transfer_sentence(transfer, component),
                "Accuracy lost or gained, in points, when a task (column) is pruned by the order of a donor (row), "
                "another task, instead of its own; bold where the 95 % interval excludes 0. Intervals are not "
                "corrected for their number.")
        if len(transferred(transfer, component, unseen=True)):
            yield section(
                f"unseen_{component}", f"Does the order of all tasks serve an unseen one? ({word})",
                functools.partial(unseen_curves, transfer, component),
                unseen_sentence(transfer, component))


def tables(study: Study) -> Iterator[Table]:
    """Transfer in numbers."""
    transfer = study.transfer()
    if len(transfer):
        rows = thousandths(mean_first(transfer), "accuracy", "difference", "difference_low", "difference_high")
        yield Table("Pruned by other tasks' orders", "The difference is to the task's own order; on an unseen task, to "
                    "the full model. In the mean, a donor's own task is left out.",
                    plain_columns(rows[["task", "num_fewshot", "component", "donor", "fraction", "accuracy",
                                         "difference", "difference_low", "difference_high", "documents"]]))
