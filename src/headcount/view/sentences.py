"""A study in words: what can go, how sure that is, and what a reader must know; computed, never written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from headcount import intervals
from headcount.intervals import COSTS_MORE, UNKNOWN, WITHIN
from headcount.stats import NO_INTERVAL
from headcount.view import primitives, words
from headcount.view.analysis import Study
from headcount.view.curves import COMMON, RANDOM
from headcount.view.points import MEAN, groups
from headcount.view.relations import MEAN_OF_RANKS
from headcount.view.scores import name_of
from headcount.view.selection import RELIABLE, first_differences, own_orders
from headcount.view.words import better_or_worse, millions, number_of, over, score_name, share, shots, signed, told

_TASKS_NAMED = 6
_NAMES = {"head": ("attention head", "attention heads"), "ffn": ("FFN", "FFNs")}


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
    found = primitives.induction_sentence(study.induction(), study.induction_thresholds) if not study.tasks else ""
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
    names, margin = _NAMES[row["component"]][1], study.spec["margin"]
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
        return f"{beginning}{said}{_costs_more(study, row, float(row['free_fraction']))}"
    if row["next_fraction"] != row["next_fraction"]:
        return f"{beginning}no step removes one of the {total} {names}: ask for larger fractions."
    verdict = told(row["next_verdict"], margin, needed=row["next_documents"], documents=row["documents"])
    loses = _costs_more(study, row, float(row["next_fraction"])) if row["order"] == COMMON else ""
    return (f"{beginning}no share of the {names} is shown to be free. Already without {row['next_removed']:.0f} of "
            f"{total} {what} changes by {signed(row['next_difference'])} points (95 % interval "
            f"{words.bounds(row['next_low'], row['next_high'], margin)}): {verdict}.{loses}")


def _costs_more(study: Study, row: pd.Series, fraction: float) -> str:
    """What one set for all tasks costs at this step on single tasks; those at chance have nothing to lose."""
    curves, k = study.curves(), int(row["num_fewshot"])
    at = curves[(curves["order"] == COMMON) & (curves["component"] == row["component"]) & (curves["task"] != MEAN)
                & (curves["num_fewshot"] == k) & (curves["fraction"] == fraction)]
    at = at[[study.above_chance[str(task), k] for task in at["task"]]]
    if at.empty:
        return ""
    worse = at[at["verdict"] == COSTS_MORE].sort_values("difference")
    shown = worse.head(_TASKS_NAMED)
    names = ", ".join(f"{t} ({signed(d)})" for t, d in zip(shown["task"], shown["difference"], strict=True))
    rest = f" and {len(worse) - len(shown)} more" if len(worse) > len(shown) else ""
    within, unknown = (int((at["verdict"] == v).sum()) for v in (WITHIN, UNKNOWN))
    margin = study.spec["margin"]
    said = [f"on {len(worse)} {told(COSTS_MORE, margin)}: {names}{rest}"] if len(worse) else []
    said += [f"on {within} {told(WITHIN, margin)}"] if within else []
    said += [f"on {unknown} its documents cannot tell"] if unknown else []
    return f" Of the {number_of(len(at), 'task')} above chance, {'; '.join(said)}."


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


def _listed(names: list[str], of: int, what: str, most: int = 6) -> str:
    """The names, or where they are many, how many."""
    return ", ".join(names) if len(names) <= most else f"{len(names)} of {of} {what}"


def _interval(row: pd.Series, margin: float) -> str:
    bounds = words.bounds(row["difference_low"], row["difference_high"], margin)
    return f"95 % interval of the difference {bounds} points"


def curve_sentence(study: Study, component: str) -> str:
    """What importance leaves more than random orders do, near half of the components, at the most shots."""
    table = own_orders(study.against_random())
    task = MEAN if (table["task"] == MEAN).any() else study.spec["tasks"][0]
    rows = table[(table["task"] == task) & (table["component"] == component)]
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
    interval = (f", {signed(row['difference_low'])} to {signed(row['difference_high'])} (95 %, paired over documents "
                "and draws)") if known else ""
    spread = f" (single draws {row['draw_low']:.2f} to {row['draw_high']:.2f})" if row["draws"] > 1 else ""
    orders = f"{row['draws']} random orders {row['random']:.2f} on average" if row["draws"] > 1 else (
        f"a random one {row['random']:.2f}")
    return (f"With {shots(int(row['num_fewshot']))} and {share(row['fraction'])} of the {_NAMES[component][1]} "
            f"removed, the measured order leaves {row['accuracy']:.2f}, "
            f"{orders}{spread}: {signed(row['difference'])} points"
            f"{interval}; {shown}.")


def common_sentence(study: Study, component: str) -> str:
    """What one set for all tasks costs beside each task's own order, at the most shots and the largest common step."""
    curves = study.curves()
    rows = curves[(curves["component"] == component) & (curves["task"] == MEAN) & (curves["fraction"] > 0)]
    common = rows[rows["order"] == COMMON]
    if common.empty:
        return ""
    common = common[common["num_fewshot"] == common["num_fewshot"].max()]
    row = common.loc[common["fraction"].idxmax()]
    if np.isnan(row["difference_low"]):
        return ""
    own = own_orders(rows[(rows["num_fewshot"] == row["num_fewshot"]) & (rows["fraction"] == row["fraction"])])
    beside = f" Each task's own order leaves {own['accuracy'].iloc[0]:.2f}." if len(own) else ""
    margin = study.spec["margin"]
    return (f"One set of {share(row['fraction'])} of the {_NAMES[component][1]} for all tasks leaves a mean accuracy "
            f"of {row['accuracy']:.2f}, {signed(row['difference'])} points against the full model "
            f"({words.bounds(row['difference_low'], row['difference_high'], margin)}): {told(row['verdict'], margin)}."
            f"{beside}{_costs_more(study, row, float(row['fraction']))}")


def differences_sentence(study: Study, component: str) -> str:
    """From which step on accuracy is shown to be worse, or better, than the full model's, at the most shots."""
    found = own_orders(first_differences(study.curves()))
    found = found[found["component"] == component]
    if found.empty:
        return ""
    found = found[found["num_fewshot"] == found["num_fewshot"].max()]
    whole, single = found[found["task"] == MEAN], found[found["task"] != MEAN]
    names, k = _NAMES[component][1], int(found["num_fewshot"].iloc[0])
    said = [f"{_first(whole)} of the {names} on all tasks' documents together"] if len(whole) else []
    said.append(f"on single tasks (not corrected for how many they are) {_first(single)}" if said or len(single) > 1
                else f"{_first(single)} of the {names} on {found['task'].iloc[0]}")
    return (f"With {shots(k)} accuracy is shown to be another than the full model's (McNemar's paired test over "
            f"documents, p < 0.05, corrected for a curve's steps by Holm's method) {'; '.join(said)}.")


def _first(steps: pd.DataFrame) -> str:
    """`first at 20 % (worse)`, `first at 10 to 30 % (3 worse, 1 better; 2 of 6 at no step)`, `at no step`."""
    known = steps.dropna(subset=["fraction"])
    if known.empty:
        return "at no step"
    least, most = share(known["fraction"].min()), share(known["fraction"].max())
    span = least if least == most else f"{least.removesuffix(' %')} to {most}"
    worse, never = int((known["difference"] < 0).sum()), len(steps) - len(known)
    if len(steps) == 1:
        return f"first at {span} ({better_or_worse(known['difference'].iloc[0])})"
    counts = [f"{n} {word}" for n, word in ((worse, "worse"), (len(known) - worse, "better")) if n]
    rest = f"; {never} of {len(steps)} at no step" if never else ""
    return f"first at {span} ({', '.join(counts)}{rest})"


def importance_sentence(study: Study, component: str) -> str:
    """Which components matter most over tasks, at the most shots, how sure their ranks are, and where they lie."""
    ranked = ranking(study, component)
    if ranked.empty:
        return ""
    ranked = ranked[ranked["num_fewshot"] == ranked["num_fewshot"].max()]
    beginning = f"With {shots(int(ranked['num_fewshot'].iloc[0]))}"
    where = ranked_on(ranked)
    top = ranked[ranked["useful"]].head(5 if component == "head" else 3)
    score = score_name(study.ordering_scores[component])
    if top.empty:
        return f"{beginning} no {_NAMES[component][0]} is of use {where} by {score} when it alone is off."
    tenth = ranked.head(max(1, len(ranked) // 10))
    layers = len(study.description["anatomy"]["heads_per_layer"])
    known = top["rank_low"].notna().all()
    names = ", ".join(f"{row['name']} ({row['rank_low']:.0f} to {row['rank_high']:.0f})" if known else str(row["name"])
                      for _, row in top.iterrows())
    ranks = (" (in brackets the 95 % interval of each rank: it comes after all that are shown to matter more, and "
             "before all that are shown to matter less)" if known else "")
    middle = f"; the median layer of the top tenth is {tenth['layer'].median():.0f} of 0 to {layers - 1}"
    return f"{beginning}, {where}, the most important {_NAMES[component][1]} by {score} are {names}{ranks}{middle}."


def ranked_on(ranked: pd.DataFrame) -> str:
    """What rows of a ranking, at one number of shots, are of: the mean over tasks, or the only one."""
    return over(str(ranked["task"].iloc[0]))


def ranking(study: Study, component: str) -> pd.DataFrame:
    """Components by importance over tasks, the most important first, with their names; by number of shots."""
    table = study.aggregate_importance()
    rows = table[(table["component"] == component) & (table["score"] == study.ordering_scores[component])]
    # Ranks are never negative: whether a component is of use is told by its mean score.
    places = ["num_fewshot", "layer", "head"]
    useful = rows[rows["task"] != MEAN_OF_RANKS].assign(useful=rows["importance"] > 0)[[*places, "useful"]]
    left_out = MEAN if study.spec.get("aggregate") == "ranks" else MEAN_OF_RANKS
    rows = rows[rows["task"] != left_out].merge(useful, on=places)
    names = [name_of(component, layer, head) for layer, head in zip(rows["layer"], rows["head"], strict=True)]
    return rows.assign(name=names).sort_values(["num_fewshot", "rank"])


def truncations(study: Study, tasks: Sequence[str] | None = None, shots: Sequence[int] | None = None) -> Iterator[str]:
    """Where prompts did not fit the model's window; of all tasks and numbers of shots, or of some."""
    for (task, k), n in study.truncated.items():
        if (tasks is not None and task not in tasks) or (shots is not None and k not in shots):
            continue
        yield f"{task}, {k}-shot: {n} requests were longer than the model's window and lost their beginning."


def cautions(study: Study) -> Iterator[str]:
    """What a reader must know before believing a figure."""
    spec = study.spec
    yield from (f"Model: {note}." for note in study.model.get("notes", ()))
    if spec.get("protocol") == "paper":
        other = ["FFN oracles on the reported documents, the last layer's heads by another denominator, text encoded "
                 "otherwise, documents shuffled, other draws of shots"] if study.tasks else []
        if len(study.induction()):
            other.append("copying from embeddings fed to every layer and the value of the current position alone, "
                         "prefix matching with attention to the first token")
        yield f"Measured as the paper's code does (protocol paper): {'; '.join([*other, 'see docs/paper.md'])}."
        if study.paper_versions == {1}:
            yield ("Measured by an earlier version of protocol paper: the first documents instead of the first of the "
                   "shuffled ones, other draws of shots, all logits; a new run measures anew.")
        elif 1 in study.paper_versions:
            yield "What an earlier version of protocol paper measured in this folder is left out."
    if spec.get("apply_chat_template"):
        yield "Prompts stand in the model's chat template."
    if spec["shared_shots"] and any(spec["shots"]):
        yield ("Shots are shared: one draw per task stands before all its documents, so results depend on that draw; "
               "intervals cover the choice of documents, not of shots.")
    yield from _of_orders(study)
    if study.depth()["low"].notna().any():
        yield ("Intervals of correlations, of sets of heads or FFNs and of what is retained say what another "
               "study with the same number of documents would find; in simulations they hold in 84 to 97 % of cases, "
               "least often where scores are noisy.")
    for task, known in study.known_tasks.items():
        yield from (f"{task}: {note}." for note in known["notes"])
    yield from _of_documents(study)
    yield from truncations(study)
    for what, n in study.unshown.items():
        points = "1 measured point" if n == 1 else f"{n} measured points"
        yield (f"Of the {what} {points} {'is' if n == 1 else 'are'} not shown: of fewer documents than others, or what "
               "it would stand beside is not measured.")


def _of_orders(study: Study) -> Iterator[str]:
    """What a reader must know of the orders by which components go."""
    if study.hidden_scores:
        yield (f"This folder also has curves by other scores, which are not shown (nor are grids and transfers by "
               f"them): {', '.join(study.hidden_scores)}; "
               "--head-score, --ffn-score and --ffn-order ask for them.")
    random = study.curves()
    if (random["order"] == RANDOM).any() and study.against_random()["draws"].max() < 2:
        yield "There is one random order: what another would leave is not known."
    common = random[(random["order"] == COMMON) & (random["fraction"] > 0)]
    if len(common) and len(study.tasks) > 1 and not (common["task"] == MEAN).any():
        yield (f"One order for all tasks is measured on {common['task'].nunique()} of {len(study.tasks)} tasks, so "
               "that there is no mean of it: run the study with all its tasks together.")
    by = study.ordering_scores
    orders = study.orders() if len(study.importance()) else pd.DataFrame()
    if len(orders):
        weak = orders[(orders["score"] == orders["component"].map(by)) & (orders["reliability"] < RELIABLE)]
        for component, of_component in groups(weak, "component"):
            named = [f"{task} ({k}-shot, {r:.2f})" for task, k, r in zip(
                of_component["task"], of_component["num_fewshot"], of_component["reliability"], strict=True)]
            total = int(((orders["component"] == component) & (orders["score"] == by[component])).sum())
            yield (f"The order of {_NAMES[component][1]} by {score_name(by[component])} is mostly noise (reliability"
                   f", 1 - stderr\N{SUPERSCRIPT TWO}/variance, below {RELIABLE:.1g}), so that its curves say "
                   f"little of what is needed: {_listed(named, total, 'orders')}.")
    layers = len(study.description["anatomy"]["heads_per_layer"])
    coarse = [f"{task} ({k}-shot, {n})" for (task, k), n in study.distinct_values.items()
              if n < layers / 2 and by["ffn"] == "accuracy"]
    if coarse:
        names = _listed(coarse, len(study.distinct_values), "FFN oracles")
        decides = "the order of layers" if study.spec.get("protocol") == "paper" else "gold log-likelihood"
        yield (f"Many FFNs cost the same accuracy, and {decides} decides between them: fewer than {layers / 2:.0f} "
               f"distinct accuracies in {names}.")


def _of_documents(study: Study) -> Iterator[str]:
    """Where documents are too few, or say nothing."""
    margin = study.spec["margin"]
    least = intervals.unchanged_needed(margin)
    few = {t: how_many for t, (n, how_many) in study.evaluated.items() if n < least}
    if few:
        named = _listed([f"{t} ({how_many})" for t, how_many in few.items()], len(study.evaluated), "tasks")
        yield (f"On a single task a loss of {words.points_of(margin)} can only be ruled out with {least} documents or "
               f"more, even if none of them changes; fewer (or fewer passages that they share) are evaluated on "
               f"{named}.")
    curves = study.curves()
    without = list(dict.fromkeys(curves.loc[curves["low"].isna() & (curves["task"] != MEAN), "task"]))
    if without:
        yield (f"The metric of {_listed(without, len(study.tasks), 'tasks')} goes beyond 0 and 1, so that it has no "
               "interval: nothing can be ruled out there, nor on a mean over tasks.")
    free = study.free_fractions()
    weak = free[free["free_fraction"].isna() & (free["task"] != MEAN) & (free["reason"] != NO_INTERVAL)]
    for k, of_k in groups(weak, "num_fewshot"):
        names = _listed(list(dict.fromkeys(of_k["task"])), len(study.tasks), "tasks")
        yield (f"With {shots(int(k))} the full model is not shown to be above chance, or above a constant answer, on "
               f"{names} (an exact test, corrected for the number of tasks); their curves say nothing.")
