"""What the tables of a whole analysis say: a sentence for each figure, hedged by its intervals, computed from the data.

Every sentence is of the most shots and of the mean over tasks (or of the only task), and of the fraction nearest one
half (a fifth for sets of the most important heads), unless it says otherwise or is told. It is empty where there is
nothing to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from headcount.view.points import MEAN, groups
from headcount.view.relations import RANDOM
from headcount.view.selection import (
    PRIMITIVES,
    SUMMARIES,
    WITHOUT_OWN,
    between_shots,
    borderline,
    depth,
    induction_heads,
    most_shots,
    of_fraction,
    of_score,
    over_recipients,
    reachable,
    summary,
)
from headcount.view.sentences import shots

RELIABLE = 0.8  # halves that agree less than this make a score noisy
TOP = 0.2  # the share of the heads that is called the most important
_NAMES = {"head": "heads", "ffn": "FFNs"}
_NAMED = 8


def grid_sentence(grid: pd.DataFrame, margin: float, baselines: Mapping[int, float] | None = None) -> str:
    """How much can go jointly, beside heads alone and FFNs alone.

    What counts is what can be reached from the full model step by step, each step within the margin.

    Args:
        grid: One row per task, number of shots and cell.
        margin: The loss of accuracy to rule out.
        baselines: Chance (or the best constant answer) by number of shots; at chance there is nothing to lose.
    """
    rows = most_shots(summary(grid))
    if rows.empty:
        return ""
    beginning, k = f"With {_shots_of(rows)}, ", int(rows["num_fewshot"].iloc[0])
    full = rows[(rows["heads_fraction"] == 0) & (rows["ffns_fraction"] == 0)]
    if baselines and k in baselines and len(full) and not full["low"].iloc[0] > baselines[k]:
        return (f"{beginning}nothing can be said of what can go jointly: the full model's accuracy {_on(rows)}, "
                f"{_accuracy(full.iloc[0])}, is not shown to be above {baselines[k]:.2f}, which guessing or a constant "
                "answer gets.")
    free = rows[reachable(rows)].sort_values("parameters_removed_share")
    heads = free.loc[free["ffns_fraction"] == 0, "heads_fraction"].max()
    ffns = free.loc[free["heads_fraction"] == 0, "ffns_fraction"].max()
    alone = f"alone, {_percent(heads)} of the heads or {_percent(ffns)} of the FFNs can go"
    joint = free[(free["heads_fraction"] > 0) & (free["ffns_fraction"] > 0)]
    loss = f"a loss of {100 * margin:.3g} points or more"
    if joint.empty:
        alone = f"; {alone}" if heads > 0 or ffns > 0 else ", nor are heads or FFNs alone"
        return (f"{beginning}heads and FFNs are not shown to be free jointly: on every way {loss} {_on(rows)} cannot "
                f"be ruled out{alone}.")
    best = joint.iloc[-1]
    end = rows[["heads_fraction", "ffns_fraction"]].max()
    edge = ", and the grid goes no further" if (best[end.index] == end).all() else ""
    than = f", the full model's {full['accuracy'].iloc[0]:.3f}" if len(full) else ""
    return (f"{beginning}{_percent(best['heads_fraction'])} of the heads and {_percent(best['ffns_fraction'])} of the "
            f"FFNs can go jointly, {_percent(best['parameters_removed_share'])} of all parameters{edge}; {alone}. "
            f"Accuracy {_on(rows)} is then {best['accuracy']:.3f}{than} (95 % interval of the difference "
            f"{_between(best)} points; {loss} is ruled out at every step of a way there).")


def induction_sentence(induction: pd.DataFrame, thresholds: Mapping[str, float]) -> str:
    """How many induction heads there are, which, and how many the same model has with random weights.

    Args:
        induction: One row per head and kind of weights.
        thresholds: What an induction head reaches on each primitive.
    """
    trained = induction[induction["weights"] == "trained"]
    random = induction[induction["weights"] == RANDOM]
    if trained.empty:
        return ""
    if any(limit != limit for limit in thresholds.values()):
        return ("Which heads are high on copying hangs on the same model with random weights, which was not measured; "
                "--copying-threshold sets a limit.")
    found = induction_heads(trained)["name"].tolist()
    limits = " and ".join(f"{name} of at least {thresholds[primitive]:.2g}" for primitive, name in PRIMITIVES.items())
    rest = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    which = f": {', '.join(found[:_NAMED])}{rest}" if found else ""
    beside = f" With random weights {_are(int(random['induction'].sum()), len(random))}." if len(random) else ""
    near = borderline(trained, thresholds)
    unsure = f" {near} lie{'s' * (near == 1)} within one standard deviation (over seeds) of the line." if near else ""
    return f"{_are(len(found), len(trained)).capitalize()} ({limits}){which}.{unsure}{beside}"


def texts_sentence(notes: Mapping[str, Any]) -> str:
    """How many texts the scores are means over; `notes` as in `Study.induction_notes`."""
    return f"Means over {notes['sequences']} texts of random tokens." if "sequences" in notes else ""


def reliability_caution(reliabilities: Mapping[str, float]) -> str:
    """Which of the two primitives is measured noisily: halves of the sequences rank the heads differently."""
    weak = {PRIMITIVES.get(name, name.replace("_", " ")): value for name, value in reliabilities.items()
            if value < RELIABLE}
    if not weak:
        return ""
    listed = " and ".join(f"{name} at {value:.2f}" for name, value in weak.items())
    return (f"Halves of the sequences agree on {listed}, less than {RELIABLE}: "
            f"{'these scores are' if len(weak) > 1 else 'this score is'} noisy, and so is the list of induction heads.")


def tasks_sentence(correlations: pd.DataFrame, component: str, *, score: str | None = None) -> str:
    """How alike tasks rank the components: the median pair, the most unlike and the most alike.

    Args:
        correlations: One row per pair of tasks, or of numbers of shots.
        component: "head" or "ffn".
        score: Which score of importance; the first found unless told.
    """
    rows = of_score(correlations, component, score)
    rows = most_shots(rows[rows["kind"].isin(["tasks", "reliability"]) & rows["correlation"].notna()])
    between = rows[rows["kind"] == "tasks"]
    pairs = between[~between["task"].isin(SUMMARIES) & ~between["other_task"].isin(SUMMARIES)]
    # Each pair once: tables may hold both ways round.
    once = [a < b if ((pairs["task"] == b) & (pairs["other_task"] == a)).any() else a != b
            for a, b in zip(pairs["task"], pairs["other_task"], strict=True)]
    pairs = pairs[pd.Series(once, index=pairs.index, dtype=bool)].sort_values("correlation", kind="stable")
    if pairs.empty:
        return ""
    least, most = pairs.iloc[0], pairs.iloc[-1]
    beginning = f"With {_shots_of(rows)}, two tasks' importance of {_NAMES[component]} correlates (Spearman) at "
    if len(pairs) == 1:
        said = [f"{beginning}{_estimate(least)}"]
    else:
        known = pairs["low"].notna()
        above = f"; {(pairs['low'] > 0).sum()} of {known.sum()} intervals lie above 0" if known.any() else ""
        said = [f"{beginning}{_number(pairs['correlation'].median())} (median of {len(pairs)} pairs), from "
                f"{_estimate(least)} for {least['task']} and {least['other_task']} to {_estimate(most)} for "
                f"{most['task']} and {most['other_task']}{above}"]
    own = rows.loc[(rows["kind"] == "reliability") & ~rows["task"].isin(SUMMARIES), "correlation"]
    random = between.loc[~between["task"].isin(SUMMARIES) & (between["other_task"] == RANDOM), "correlation"]
    argsorts = pairs["argsort_correlation"].dropna()
    said += [f"one task's with itself, on other examples, at {_number(own.median())}"] if len(own) else []
    said += [f"a random order with a task's at {_number(random.median())}"] if len(random) else []
    said += [f"argsorts, which the paper's code takes, at {_number(argsorts.median())}"] if len(argsorts) else []
    return "; ".join(said) + "."


def shots_sentence(correlations: pd.DataFrame, component: str, *, score: str | None = None) -> str:
    """How alike the fewest and the most shots rank the components; arguments as in `tasks_sentence`."""
    rows = of_score(correlations, component, score)
    rows = rows[rows["correlation"].notna()]
    pairs = between_shots(rows)
    if pairs.empty:
        return ""
    few, many = int(pairs["num_fewshot"].min()), int(pairs["other_shots"].max())
    pairs = pairs[(pairs["num_fewshot"] == few) & (pairs["other_shots"] == many)]
    mean, single = pairs[pairs["task"] == MEAN], pairs[~pairs["task"].isin(SUMMARIES)].sort_values("correlation")
    said = [f"{_estimate(mean.iloc[0])} for the mean over tasks"] if len(mean) else []
    if len(single):
        least, most = single.iloc[0], single.iloc[-1]
        ends = [_estimate(end, f" on {end['task']}") for end in (least, most)]
        said.append(f"from {ends[0]} to {ends[1]} for single tasks" if len(single) > 1 else ends[0])
    if not said:
        return ""
    return (f"Importance of {_NAMES[component]} with {shots(few)} and with {shots(many)} correlates (Spearman) at "
            f"{', '.join(said)}.{_beyond_noise(rows, single, few, many)}")


def _beyond_noise(rows: pd.DataFrame, single: pd.DataFrame, few: int, many: int) -> str:
    """On how many tasks two numbers of shots agree less than scores so noisy can (the root of both reliabilities)."""
    own = rows[(rows["kind"] == "reliability") & (rows["correlation"] >= 0)].set_index(["num_fewshot", "task"])
    ceilings = {task: (own.loc[(few, task), "correlation"] * own.loc[(many, task), "correlation"]) ** 0.5
                for task in single["task"] if (few, task) in own.index and (many, task) in own.index}
    both = single[single["task"].isin(list(ceilings)) & single["high"].notna()]
    if both.empty:
        return ""
    apart = sum(row["high"] < ceilings[row["task"]] for _, row in both.iterrows())
    if len(both) == 1:
        return (" The interval lies below what the scores' noise allows: the order changes." if apart else
                " The scores' noise alone could account for that.")
    return (f" On {apart} of {len(both)} tasks the interval lies below what the scores' noise allows"
            f"{': there the order changes' if apart else ', which could account for it all'}.")


def transfer_sentence(transfer: pd.DataFrame, component: str, *, fraction: float | None = None) -> str:
    """What another order than a task's own costs: the best and the worst donor found, the mean order without the task.

    Args:
        transfer: One row per recipient, donor, number of shots and fraction.
        component: "head" or "ffn".
        fraction: Share removed; the one nearest one half unless told.
    """
    rows = transfer[(transfer["component"] == component) & ~transfer["unseen"].astype(bool)]
    rows = rows[(rows["fraction"] > 0) & (rows["donor"] != "own") & rows["difference"].notna()]
    if rows.empty:
        return ""
    rows = over_recipients(most_shots(of_fraction(rows, fraction)))
    donors = rows[~rows["donor"].isin(SUMMARIES)].sort_values("difference", kind="stable")
    said = []
    if len(donors) > 1:
        best, worst = donors.iloc[-1], donors.iloc[0]
        said += [f"by {_points(best)} with the order of {best['donor']}, the best donor of {len(donors)}",
                 f"by {_points(worst)} with that of {worst['donor']}, the worst"]
    elif len(donors):
        said.append(f"by {_points(donors.iloc[0])} with the order of {donors['donor'].iloc[0]}")
    for name, words in ((WITHOUT_OWN, "the mean order of the other tasks"), (RANDOM, "a random one")):
        row = rows[rows["donor"] == name]
        said += [f"by {_points(row.iloc[0])} with {words}"] if len(row) else []
    if not said:
        return ""
    return (f"With {_shots_of(rows)} and {_percent(rows['fraction'].iloc[0])} of the {_NAMES[component]} removed, "
            f"accuracy {_on(rows)} changes, in points against a task's own order, {'; '.join(said)}."
            f"{_own_needed(rows)}")


def _own_needed(rows: pd.DataFrame) -> str:
    row = rows[rows["donor"] == WITHOUT_OWN].dropna(subset=["difference_low", "difference_high"])
    if row.empty:
        return ""
    low, high = row["difference_low"].iloc[0], row["difference_high"].iloc[0]
    return (" A task's own order is the better one." if high < 0 else " The other tasks' mean order is the better one."
            if low > 0 else " No gain of a task's own order over the other tasks' mean is shown.")


def unseen_sentence(transfer: pd.DataFrame, component: str, *, fraction: float | None = None) -> str:
    """What tasks that no order was made from keep under the mean order; arguments as in `transfer_sentence`."""
    rows = transfer[(transfer["component"] == component) & transfer["unseen"].astype(bool)]
    pruned = most_shots(of_fraction(rows[(rows["fraction"] > 0) & rows["donor"].isin([MEAN, RANDOM])], fraction))
    full = most_shots(rows[rows["fraction"] == 0])
    said = []
    for task, of_task in groups(pruned, "task"):
        mean, random = of_task[of_task["donor"] == MEAN], of_task[of_task["donor"] == RANDOM]
        if len(mean):
            beside = [f"{words} {_accuracy(found.iloc[0])}" for words, found in (
                ("full model", full[full["task"] == task]), ("random order", random)) if len(found)]
            said.append(", ".join([f"{task} {_accuracy(mean.iloc[0])}", *beside]))
    if not said:
        return ""
    return (f"Accuracy on tasks that had no part in the order, with {_shots_of(pruned)} and "
            f"{_percent(pruned['fraction'].iloc[0])} of the {_NAMES[component]} removed by the mean order: "
            f"{'; '.join(said)}.")


def retained_sentence(retained: pd.DataFrame, *, fraction: float | None = None) -> str:
    """Which share of each primitive the important heads hold, beside random ones."""
    rows = most_shots(of_fraction(summary(retained[retained["retained"].notna()]), fraction))
    if rows.empty:
        return ""
    said = []
    for primitive, row in rows.drop_duplicates("primitive").set_index("primitive").iterrows():
        words = f"{_percent(row['retained'])} of all {PRIMITIVES.get(str(primitive), str(primitive))}"
        if row["random_mean"] == row["random_mean"]:
            more = ("more than" if row["retained"] > row["random_high"] else "less than"
                    if row["retained"] < row["random_low"] else "within what")
            words += (f", {more} random orders leave ({_percent(row['random_mean'])}; 95 % of them "
                      f"{100 * row['random_low']:.0f} to {100 * row['random_high']:.0f} %)")
        said.append(words)
    by = "by mean importance" if rows["task"].iloc[0] == MEAN else f"by importance on {rows['task'].iloc[0]}"
    return (f"With {_shots_of(rows)} and {_percent(rows['fraction'].iloc[0])} of the heads removed {by}, the others "
            f"hold {', and '.join(said)}.")


def among_important_sentence(among: pd.DataFrame, *, fraction: float | None = None) -> str:
    """How many of the induction heads are among the important ones, beside what chance gives."""
    rows = most_shots(of_fraction(among[among["induction_heads"] > 0], fraction, TOP))
    if rows.empty:
        return ""
    row, single = summary(rows).iloc[0], rows.loc[rows["task"] != MEAN, "common"]
    spread = f"; on single tasks {_span(single)}" if row["task"] == MEAN and len(single) else ""
    return (f"With {_shots_of(rows)}, {row['common']:.0f} of the {row['induction_heads']:.0f} induction heads are "
            f"among the {row['important']:.0f} heads ({_percent(row['fraction'])}) most important "
            f"{_over(row['task'])}, chance gives {row['expected']:.1f} ({_p(row['p'])}, hypergeometric){spread}.")


def top_sets_sentence(top_sets: pd.DataFrame, *, fraction: float | None = None) -> str:
    """How many of the most important heads all tasks have in common, and two tasks."""
    rows = most_shots(of_fraction(top_sets[top_sets["tasks"] > 1], fraction, TOP))
    if rows.empty:
        return ""
    row = rows.iloc[0]
    tasks = "both tasks" if row["tasks"] == 2 else f"all {row['tasks']:.0f} tasks"
    pairs = f"; two tasks share {_percent(row['pair_mean_share'])} of theirs on average" if row["tasks"] > 2 else ""
    return (f"With {_shots_of(rows)}, {row['common']:.0f} of each task's {row['size']:.0f} most important heads "
            f"({_percent(row['fraction'])} of all) are common to {tasks}, chance gives "
            f"{row['expected']:.1f}{pairs}.")


def depth_sentence(importance: pd.DataFrame, score: str, *, top: float = TOP) -> str:
    """In which third of the layers the important heads lie.

    Args:
        importance: `Study.importance()`.
        score: Which score of importance.
        top: Which share of all heads counts as the most important.
    """
    table = most_shots(depth(importance, score, top=top))
    if table.empty:
        return ""
    rows, said = summary(table), []
    for _, row in rows.iterrows():
        single = table.loc[(table["task"] != MEAN) & (table["third"] == row["third"]), "share"]
        spread = f" (single tasks {_span((100 * single).round())} %)" if row["task"] == MEAN and len(single) else ""
        said.append(f"{_percent(row['share'])} in the {row['third']} third{spread}")
    return (f"With {_shots_of(rows)}, of the {_percent(top)} of the heads that matter most {_on(rows)} "
            f"({rows['important'].iloc[0]}) lie by depth {', '.join(said)}; of all heads "
            f"{', '.join(f'{100 * e:.0f}' for e in rows['expected'])} % do.")


def among_important_table(among: pd.DataFrame, *, fraction: float | None = None) -> pd.DataFrame:
    """The induction heads among the important ones, ready to be shown: the mean over tasks first."""
    rows = of_fraction(pd.concat([among[among["task"] == MEAN], among[among["task"] != MEAN]]), fraction, TOP)
    return pd.DataFrame({
        "task": rows["task"], "shots": rows["num_fewshot"], "most important": rows["fraction"].map(_percent),
        "heads": rows["important"], "induction heads": rows["induction_heads"], "in both": rows["common"],
        "by chance": rows["expected"].map("{:.1f}".format),
        "p": rows["p"].map(_p).str.removeprefix("p ").str.removeprefix("= ")})


def top_sets_table(top_sets: pd.DataFrame) -> pd.DataFrame:
    """What the most important heads of all tasks have in common, ready to be shown."""
    return pd.DataFrame({
        "shots": top_sets["num_fewshot"], "most important": top_sets["fraction"].map(_percent),
        "heads": top_sets["size"], "tasks": top_sets["tasks"], "common to all": top_sets["common"],
        "share": top_sets["share"].map(_percent), "by chance": top_sets["expected"].map("{:.1f}".format),
        "shared by two tasks": top_sets["pair_mean_share"].map(_percent)})


def _shots_of(rows: pd.DataFrame) -> str:
    return shots(int(rows["num_fewshot"].iloc[0]))


def _on(rows: pd.DataFrame) -> str:
    return _over(str(rows["task"].iloc[0]))


def _over(task: str) -> str:
    return "on the mean over tasks" if task == MEAN else f"on {task}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share == share else "0 %"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}")


def _estimate(row: pd.Series, where: str = "") -> str:
    """`0.62 (0.55 to 0.70)`: a correlation with its interval."""
    known = row["low"] == row["low"] and row["high"] == row["high"]
    interval = f" ({_number(row['low'])} to {_number(row['high'])})" if known else ""
    return f"{_number(row['correlation'])}{where}{interval}"


def _accuracy(row: pd.Series) -> str:
    """`0.62 (0.55 to 0.70)`: an accuracy with its interval."""
    return f"{row['accuracy']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def _points(row: pd.Series) -> str:
    """`+1.2 (-0.3 to +2.0)`: a difference of accuracy with its interval, in points."""
    known = row["difference_low"] == row["difference_low"] and row["difference_high"] == row["difference_high"]
    return _signed(row["difference"]) + (f" ({_between(row)})" if known else "")


def _between(row: pd.Series) -> str:
    return f"{_signed(row['difference_low'])} to {_signed(row['difference_high'])}"


def _signed(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0").replace("-", "\N{MINUS SIGN}")


def _span(values: pd.Series) -> str:
    """`3`, or `1 to 5`."""
    least, most = f"{values.min():.0f}", f"{values.max():.0f}"
    return least if least == most else f"{least} to {most}"


def _are(found: int, of: int) -> str:
    number = "none" if not found else str(found)
    return f"{number} of {of} heads {'is an induction head' if found < 2 else 'are induction heads'}"


def _p(value: float) -> str:
    """`p = 0.03`; `p < 0.001`."""
    if value != value:
        return "p not known"
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"
