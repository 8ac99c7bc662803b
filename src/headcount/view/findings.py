"""What the tables of a whole analysis say: a sentence for each figure, hedged by its intervals, computed from the data.

Every sentence is of the most shots and of the mean over tasks (of importance, where that was asked for, the mean of
ranks; with one task, of that one), and of the fraction nearest one half (a fifth for sets of the most important heads),
unless it says otherwise or is told. It is empty where there is nothing to say.
"""

from __future__ import annotations

import pandas as pd

from headcount.intervals import WITHIN
from headcount.stats import NO_INTERVAL
from headcount.view import words as say
from headcount.view.points import MEAN, groups
from headcount.view.relations import RANDOM
from headcount.view.selection import (
    AGGREGATES,
    SUMMARIES,
    WITHOUT_OWN,
    between_shots,
    most_shots,
    noise,
    noise_by_shots,
    of_fraction,
    of_score,
    over_recipients,
    reachable,
    summary,
    transferred,
)
from headcount.view.tops import TOP
from headcount.view.words import shots

_NAMES = {"head": "heads", "ffn": "FFNs"}


def grid_sentence(grid: pd.DataFrame, margin: float) -> str:
    """How much can go jointly, beside heads alone and FFNs alone.

    What counts is what can be reached from the full model step by step, each step within the margin.

    Args:
        grid: One row per task, number of shots and cell.
        margin: The loss of accuracy to rule out.
    """
    rows = most_shots(summary(grid))
    if rows.empty:
        return ""
    beginning = f"With {say.shots_of(rows)}, "
    full = rows[(rows["heads_fraction"] == 0) & (rows["ffns_fraction"] == 0)]
    if len(full) and full["low"].isna().iloc[0]:
        return f"{beginning}nothing can be said of what can go jointly: {NO_INTERVAL}."
    # At chance there is nothing to lose.
    above = full["low"].iloc[0] > full["baseline"].iloc[0] if len(full) else True
    if not (above and full["within_margin"].all()):
        return (f"{beginning}nothing can be said of what can go jointly: the full model's accuracy {say.on(rows)}, "
                f"{full['accuracy'].iloc[0]:.2f}, is not shown to be above {full['baseline'].iloc[0]:.2f}, which "
                "guessing or a constant answer gets.")
    free = rows[reachable(rows)].sort_values("parameters_removed_share")
    # Where a share is less than one head or FFN, nothing of them is gone.
    free = free[((free["heads_removed"] > 0) | (free["heads_fraction"] == 0))
                & ((free["ffns_removed"] > 0) | (free["ffns_fraction"] == 0))]
    heads = free.loc[free["ffns_fraction"] == 0, "heads_fraction"].max()
    ffns = free.loc[free["heads_fraction"] == 0, "ffns_fraction"].max()
    alone = f"alone, at the grid's steps, {say.share(heads)} of the heads or {say.share(ffns)} of the FFNs can go"
    joint = free[(free["heads_removed"] > 0) & (free["ffns_removed"] > 0)]
    ruled_out = say.told(WITHIN, margin)
    if not ((rows["heads_removed"] > 0) & (rows["ffns_removed"] > 0)).any():
        return f"{beginning}no cell removes both heads and FFNs: ask for larger fractions."
    if joint.empty:
        both = rows[(rows["heads_removed"] > 0) & (rows["ffns_removed"] > 0)].sort_values("parameters_removed_share")
        first = both.iloc[0]
        alone = f"; {alone}" if heads > 0 or ffns > 0 else ""
        return (f"{beginning}heads and FFNs are not shown to be free jointly: without "
                f"{say.share(first['heads_fraction'])} of the heads and {say.share(first['ffns_fraction'])} of the "
                f"FFNs accuracy {say.on(rows)} changes by "
                f"{say.points(first)} points, {say.told(first['verdict'], margin)}{alone}.")
    best = joint.iloc[-1]
    end = rows[["heads_fraction", "ffns_fraction"]].max()
    edge = ", and the grid goes no further" if (best[end.index] == end).all() else ""
    than = f", the full model's {full['accuracy'].iloc[0]:.3f}" if len(full) else ""
    return (f"{beginning}{say.share(best['heads_fraction'])} of the heads and {say.share(best['ffns_fraction'])} of "
            f"the FFNs can go jointly, {say.percent(best['parameters_removed_share'])} of all parameters{edge}; "
            f"{alone}. Accuracy {say.on(rows)} is then {best['accuracy']:.3f}{than} (95 % interval of the difference "
            f"{say.between(best)} points; {ruled_out} at every step of a path there).")


def tasks_sentence(correlations: pd.DataFrame, component: str, *, score: str | None = None) -> str:
    """How alike tasks rank the components: the median pair, the most unlike and the most alike.

    Args:
        correlations: One row per pair of tasks, or of numbers of shots.
        component: "head" or "ffn".
        score: Which score of importance; the first found unless told.
    """
    rows = of_score(correlations, component, score)
    rows = rows[rows["kind"].isin(["tasks", "reliability"]) & rows["correlation"].notna()]
    noisy = say.noisy(noise_by_shots(rows), rows.loc[rows["num_fewshot"] >= 0, "num_fewshot"].nunique())
    rows = most_shots(rows)
    between = rows[rows["kind"] == "tasks"]
    pairs = between[~between["task"].isin(SUMMARIES) & ~between["other_task"].isin(SUMMARIES)]
    # Each pair once: tables may hold both ways round.
    once = [a < b if ((pairs["task"] == b) & (pairs["other_task"] == a)).any() else a != b
            for a, b in zip(pairs["task"], pairs["other_task"], strict=True)]
    pairs = pairs[pd.Series(once, index=pairs.index, dtype=bool)].sort_values("correlation", kind="stable")
    if pairs.empty:
        return ""
    least, most = pairs.iloc[0], pairs.iloc[-1]
    beginning = f"With {say.shots_of(rows)}, two tasks' importance of {_NAMES[component]} correlates (Spearman) at "
    if len(pairs) == 1:
        said = [f"{beginning}{say.estimate(least)}"]
    else:
        known = pairs["low"].notna()
        above = f"; {(pairs['low'] > 0).sum()} of {known.sum()} intervals lie above 0" if known.any() else ""
        said = [f"{beginning}{say.number(pairs['correlation'].median())} (median of {len(pairs)} pairs), from "
                f"{say.estimate(least)} for {least['task']} and {least['other_task']} to {say.estimate(most)} for "
                f"{most['task']} and {most['other_task']}{above}"]
    own = rows.loc[(rows["kind"] == "reliability") & ~rows["task"].isin(SUMMARIES), "correlation"]
    random = between.loc[~between["task"].isin(SUMMARIES) & (between["other_task"] == RANDOM), "correlation"]
    said += [f"one task's with itself, on other examples, at {say.number(own.median())}"] if len(own) else []
    said += [f"a random order with a task's at {say.number(random.median())}"] if len(random) else []
    return (f"{_first_of_all(noisy)}{'; '.join(said)}.{_only_depth(pairs, component, 'two tasks agree')}"
            f"{_argsorts(pairs)}")


def _first_of_all(noisy: str) -> str:
    """That scores are mostly noise comes before all that is said of them."""
    return f"{noisy[0].upper()}{noisy[1:]}. " if noisy else ""


def _only_depth(pairs: pd.DataFrame, component: str, agree: str) -> str:
    """Which part of a correlation is only depth, and what there is within layers, with its interval or how many."""
    known = pairs[pairs["correlation_in_layers"].notna()]
    if known.empty:
        return ""
    alone, inside = (say.number(known[f"correlation_{name}"].median()) for name in ("layers_alone", "in_layers"))
    low, high, n = known["in_layers_low"], known["in_layers_high"], known["in_layers_low"].notna().sum()
    if len(known) == 1:
        hedged = say.bracketed(say.within(low.iloc[0], high.iloc[0]) if n else "")
    else:
        hedged = say.bracketed("median", f"{(low > 0).sum()} of {n} intervals lie above 0" if n else "")
    return (f" Knowing a {_NAMES[component][:-1]}'s layer alone gives a correlation of {alone}; within layers {agree} "
            f"at {inside}{hedged}.")


def _argsorts(pairs: pd.DataFrame) -> str:
    found = pairs["argsort_correlation"].dropna()
    return (f" The paper's argsort variant of the correlation is {say.number(found.median())}"
            f"{' (median)' if len(found) > 1 else ''}." if len(found) else "")


def shots_sentence(correlations: pd.DataFrame, component: str, *, score: str | None = None) -> str:
    """How alike the fewest and the most shots rank the components; arguments as in `tasks_sentence`."""
    rows = of_score(correlations, component, score)
    rows = rows[rows["correlation"].notna()]
    noisy = noise(rows[rows["kind"].isin(["shots", "reliability"])])
    pairs = between_shots(rows)
    if pairs.empty:
        return ""
    few, many = int(pairs["num_fewshot"].min()), int(pairs["other_shots"].max())
    pairs = pairs[(pairs["num_fewshot"] == few) & (pairs["other_shots"] == many)]
    mean, single = pairs[pairs["task"] == MEAN], pairs[~pairs["task"].isin(SUMMARIES)].sort_values("correlation")
    said = [f"{say.estimate(mean.iloc[0])} for the mean over tasks"] if len(mean) else []
    if len(single):
        least, most = single.iloc[0], single.iloc[-1]
        ends = [say.estimate(end, f" on {end['task']}") for end in (least, most)]
        said.append(f"from {ends[0]} to {ends[1]} for single tasks" if len(single) > 1 else ends[0])
    if not said:
        return ""
    return (f"{_first_of_all(noisy)}Importance of {_NAMES[component]} with {shots(few)} and with {shots(many)} "
            f"correlates (Spearman) at {', '.join(said)}."
            f"{_only_depth(mean if len(mean) else single, component, 'they agree')}{_argsorts(single)}"
            f"{_beyond_noise(single)}")


def _beyond_noise(single: pd.DataFrame) -> str:
    """On how many tasks two numbers of shots agree less than scores so noisy can (the root of both reliabilities).

    That is no test: in simulated studies of equal orders noise alone put 5 to 16 % of such intervals below the ceiling
    where it was small, up to 46 % where it had heavy tails, and none where both scores share it (test_relations.py).
    """
    both = single[single["ceiling"].notna() & single["high"].notna()]
    if both.empty:
        return ""
    apart = int((both["high"] < both["ceiling"]).sum())
    if len(both) == 1:
        return (" The interval lies below what the scores' noise allows: the order seems to change, though noise "
                "alone puts about one interval in ten there." if apart else
                " The scores' noise alone could account for that.")
    if apart:
        return (f" On {apart} of {len(both)} tasks the interval lies below what the scores' noise allows; noise alone "
                "puts about one in ten there.")
    return (f" On none of {len(both)} tasks does the interval lie below what the scores' noise allows: noise could "
            "account for it all.")


def transfer_sentence(transfer: pd.DataFrame, component: str, *, fraction: float | None = None) -> str:
    """What another order than a task's own costs: the best and the worst donor found, the mean order without the task.

    Args:
        transfer: One row per recipient, donor, number of shots and fraction.
        component: "head" or "ffn".
        fraction: Share removed; the one nearest one half unless told.
    """
    rows = transferred(transfer, component, unseen=False)
    rows = rows[(rows["fraction"] > 0) & (rows["donor"] != "own") & rows["difference"].notna()]
    if rows.empty:
        return ""
    rows = over_recipients(most_shots(of_fraction(rows, fraction)))
    donors = rows[~rows["donor"].isin(SUMMARIES)].sort_values("difference", kind="stable")
    said = []
    if len(donors) > 1:
        best, worst = donors.iloc[-1], donors.iloc[0]
        each = " (each on the other tasks)" if best["task"] == MEAN else ""
        said += [f"by {say.points(best)} with the order of {best['donor']}, the best donor of {len(donors)}{each}",
                 f"by {say.points(worst)} with that of {worst['donor']}, the worst"]
    elif len(donors):
        said.append(f"by {say.points(donors.iloc[0])} with the order of {donors['donor'].iloc[0]}")
    for name, words in ((WITHOUT_OWN, "the mean order of the other tasks"), (RANDOM, "a random one")):
        row = rows[rows["donor"] == name]
        said += [f"by {say.points(row.iloc[0])} with {words}"] if len(row) else []
    if not said:
        return ""
    return (f"With {say.shots_of(rows)} and {say.share(rows['fraction'].iloc[0])} of the {_NAMES[component]} removed, "
            f"accuracy {say.on(rows)} changes, in points against a task's own order, {'; '.join(said)}."
            f"{_own_needed(rows)}")


def _own_needed(rows: pd.DataFrame) -> str:
    """How many single donors are shown to be worse than the own order, or better, and the other tasks' mean order."""
    known = rows.dropna(subset=["difference_low", "difference_high"])
    donors, mean = known[~known["donor"].isin(SUMMARIES)], known[known["donor"] == WITHOUT_OWN]
    said = []
    if len(donors):
        worse, better = int((donors["difference_high"] < 0).sum()), int((donors["difference_low"] > 0).sum())
        of = f"the {len(donors)} single donors" if len(donors) > 1 else "the one donor"
        said.append(f"of {of} {worse} {'is' if worse == 1 else 'are'} shown to be worse than a task's own order, "
                    f"{better} better (not corrected for their number)")
    if len(mean):
        low, high = mean["difference_low"].iloc[0], mean["difference_high"].iloc[0]
        shown = "is shown to be worse" if high < 0 else "is shown to be better" if low > 0 else (
            "is shown to be neither better nor worse")
        said.append(f"the other tasks' mean order {shown}")
    return f" {said[0][0].upper()}{'; '.join(said)[1:]}." if said else ""


def unseen_sentence(transfer: pd.DataFrame, component: str, *, fraction: float | None = None) -> str:
    """What tasks that no order was made from keep under the mean order; arguments as in `transfer_sentence`."""
    rows = transferred(transfer, component, unseen=True)
    pruned = most_shots(of_fraction(rows[(rows["fraction"] > 0) & rows["donor"].isin([MEAN, RANDOM])], fraction))
    full = rows[(rows["fraction"] == 0) & (rows["num_fewshot"] == pruned["num_fewshot"].max())]
    said = []
    for task, of_task in groups(pruned, "task"):
        mean, random = of_task[of_task["donor"] == MEAN], of_task[of_task["donor"] == RANDOM]
        if len(mean):
            beside = [f"{words} {say.accuracy(found.iloc[0])}" for words, found in (
                ("full model", full[full["task"] == task]), ("random order", random)) if len(found)]
            said.append(", ".join([f"{task} {say.accuracy(mean.iloc[0])}", *beside]))
    if not said:
        return ""
    return (f"Accuracy on tasks that had no part in the order, with {say.shots_of(pruned)} and "
            f"{say.share(pruned['fraction'].iloc[0])} of the {_NAMES[component]} removed by the mean order: "
            f"{'; '.join(said)}.")


def top_sets_sentence(top_sets: pd.DataFrame, *, fraction: float | None = None) -> str:
    """How many of the most important heads all tasks have in common, and two tasks."""
    rows = most_shots(of_fraction(top_sets[top_sets["tasks"] > 1], fraction, TOP))
    if rows.empty:
        return ""
    row = rows.iloc[0]
    tasks = "both tasks" if row["tasks"] == 2 else f"all {row['tasks']:.0f} tasks"
    known = row["expected_in_layers"] == row["expected_in_layers"]
    layers = f", sets with as many heads in each layer {row['expected_in_layers']:.1f}" if known else ""
    pairs = f"; two tasks share {say.percent(row['pair_mean_share'])} of theirs on average" if row["tasks"] > 2 else ""
    pairs += f" (layers alone give {say.percent(row['pair_share_in_layers'])})" if pairs and known else ""
    hedged = say.bracketed(say.interval(row, float(row["size"])))
    return (f"With {say.shots_of(rows)}, {row['common']:.0f}{hedged} of each task's {row['size']:.0f} most important "
            f"heads ({say.share(row['fraction'])} of all) {'is' if row['common'] == 1 else 'are'} common to {tasks}, "
            f"chance gives {row['expected']:.1f}{layers}{pairs}.")


def depth_sentence(depth: pd.DataFrame) -> str:
    """In which third of the layers the important heads lie, and how much of importance is depth.

    Args:
        depth: `Study.depth()`.
    """
    table = most_shots(depth)
    if table.empty:
        return ""
    rows, said = summary(table), []
    for _, row in rows.iterrows():
        single = table.loc[~table["task"].isin(SUMMARIES) & (table["third"] == row["third"]), "share"]
        apart = row["task"] in AGGREGATES and len(single)
        about = [say.counts(row, 100), f"single tasks {say.span((100 * single).round())}" if apart else ""]
        hedged = say.bracketed(*(f"{words} %" for words in about if words))
        said.append(f"{say.percent(row['share'])} lie in the {row['third']} third of the layers{hedged}")
    thirds = [say.percent(e) for e in rows["expected"]]
    holds = (f"each third holds {thirds[0]} of all heads" if len(set(thirds)) == 1 else
             f"these hold {', '.join(thirds)} of all heads")
    return (f"With {say.shots_of(rows)}, of the {rows['important'].iloc[0]} heads "
            f"({say.share(rows['fraction'].iloc[0])}) that matter most {say.on(rows)} {', '.join(said)}; {holds}."
            f"{_between_layers(table, rows)}")


def _between_layers(table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Which share of the variance of log importance lies between layers, on the summary and on single tasks."""
    share, chance = rows["between_layers"].iloc[0], rows["between_layers_by_chance"].iloc[0]
    if share != share:
        return ""
    single = table.loc[~table["task"].isin(SUMMARIES), "between_layers"].dropna()
    apart = rows["task"].iloc[0] in AGGREGATES and len(single)
    hedged = say.bracketed(f"single tasks {say.span((100 * single).round())} %" if apart else "",
                           f"without any trend over depth {say.percent(chance)}")
    return f" {say.percent(share)} of the variance of log importance lies between layers{hedged}."
