"""A study in words: what can go, how sure that is, and what a reader must know; computed, never written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from headcount import stats
from headcount.view import primitives
from headcount.view.analysis import Study
from headcount.view.points import MEAN, groups
from headcount.view.relations import MEAN_OF_RANKS
from headcount.view.scores import name_of
from headcount.view.selection import first_differences
from headcount.view.words import millions, over, shots, signed

_NAMES = {"head": ("attention head", "attention heads"), "ffn": ("FFN", "FFNs")}


def constants(description: Mapping[str, Any]) -> tuple[int, int, int]:
    """Number of heads, of FFNs, and of parameters of a study's model."""
    anatomy = description["anatomy"]
    return sum(anatomy["heads_per_layer"]), len(anatomy["heads_per_layer"]), anatomy["parameters"]


def headline(study: Study) -> list[str]:
    """How many heads and FFNs can go, most shots first: one sentence each."""
    table = study.free_fractions()
    summary = table[table["task"] == MEAN] if (table["task"] == MEAN).any() else table
    ordered = summary.sort_values(["num_fewshot", "component"], ascending=[False, False], kind="stable")
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
    heads, ffns, _ = constants(study.description)
    total = heads if row["component"] == "head" else ffns
    names = _NAMES[row["component"]][1]
    margin = f"{100 * study.spec['margin']:.3g} points"
    what = "mean accuracy" if row["task"] == MEAN else f"accuracy on {row['task']}"
    beginning = f"With {shots(int(row['num_fewshot']))}, "
    if row["free_fraction"] == 0:
        curves = study.curves()
        same = (curves[["task", "num_fewshot", "component", "order"]]
                == row[["task", "num_fewshot", "component", "order"]]).all(axis=1)
        removing = curves[same & (curves["removed"] > 0)]
        if removing.empty:
            return f"{beginning}no step removes one of the {total} {names}: ask for larger fractions."
        first = removing.iloc[0]
        return (f"{beginning}no share of the {names} is shown to be free: already without {first['removed']} of "
                f"{total} {what} changes by {signed(first['difference'])} points ({_interval(first)}), and a loss of "
                f"{margin} or more cannot be ruled out.")
    return (f"{beginning}{100 * row['free_fraction']:.3g} % of the {names} ({row['removed']:.0f} of {total}, "
            f"{millions(row['parameters_removed'])} parameters) can go: {what} is then {row['accuracy']:.3f}, the full "
            f"model's {row['full_accuracy']:.3f} ({_interval(row)}; up to there a loss of {margin} or more is ruled "
            f"out at every step).{_on_those_above_chance(row)}")


def _on_those_above_chance(row: pd.Series) -> str:
    """What a mean hides where some of its tasks have little to lose."""
    tasks, able = int(row["tasks"]), int(row["above_chance"])
    if able in (0, tasks):
        return ""
    low, high = row["above_chance_low"], row["above_chance_high"]
    interval = f"{signed(low)} to {signed(high)}" if low < high else "no document changed"
    return (f" The full model is shown to be above both chance and the best constant answer on {able} of the {tasks} "
            f"tasks of that mean; on {'that' if able == 1 else 'those'} alone the difference is "
            f"{signed(row['above_chance_difference'])} points ({interval}; tasks and share were chosen on these "
            "documents).")


def _listed(names: list[str], of: int, what: str, most: int = 6) -> str:
    """The names, or where they are many, how many."""
    return ", ".join(names) if len(names) <= most else f"{len(names)} of {of} {what}"


def _interval(row: pd.Series) -> str:
    return (f"95 % interval of the difference {signed(row['difference_low'])} to "
            f"{signed(row['difference_high'])} points")


def curve_sentence(study: Study, component: str) -> str:
    """What the measured order and a random one leave near half of the components, at the most shots."""
    curves = study.curves()
    task = MEAN if (curves["task"] == MEAN).any() else study.spec["tasks"][0]
    rows = curves[(curves["task"] == task) & (curves["component"] == component)]
    if rows.empty:
        return ""
    rows = rows[rows["num_fewshot"] == rows["num_fewshot"].max()]
    measured = rows[~rows["order"].isin(["random", "none"])].set_index("fraction")
    random = rows[rows["order"] == "random"].set_index("fraction")
    both = measured.index.intersection(random.index)
    if len(both) < 2:
        return ""
    gap = min(both, key=lambda fraction: (abs(fraction - 0.5), fraction))
    one, other = measured.loc[gap], random.loc[gap]
    apart = ("" if one["low"] > other["high"] else ": worse than at random" if one["high"] < other["low"]
             else "; the two intervals overlap")
    return (f"With {shots(int(one['num_fewshot']))} and {100 * gap:.3g} % of the {_NAMES[component][1]} removed, the "
            f"measured order leaves {one['accuracy']:.2f} "
            f"({one['low']:.2f} to {one['high']:.2f}), a random one {other['accuracy']:.2f} "
            f"({other['low']:.2f} to {other['high']:.2f}){apart}.")


def differences_sentence(study: Study, component: str) -> str:
    """From which step on accuracy is shown to differ from the full model's, at the most shots."""
    found = first_differences(study.curves())
    found = found[found["component"] == component]
    if found.empty:
        return ""
    found = found[found["num_fewshot"] == found["num_fewshot"].max()]
    whole, single = found[found["task"] == MEAN], found.loc[found["task"] != MEAN, "fraction"]
    names, k = _NAMES[component][1], int(found["num_fewshot"].iloc[0])
    said = [f"{_first(whole['fraction'])} of the {names} on all tasks' documents together"] if len(whole) else []
    said.append(f"on single tasks (not corrected for how many they are) {_first(single)}" if said or len(single) > 1
                else f"{_first(single)} of the {names} on {found['task'].iloc[0]}")
    return (f"With {shots(k)} accuracy is shown to differ from the full model's (McNemar's paired test over documents, "
            f"p < 0.05 as corrected for a curve's steps by Holm's method) {'; '.join(said)}.")


def _first(fractions: pd.Series) -> str:
    """`first at 20 %`, `first at 10 to 30 % (on 2 of 5 at no step)`, `at no step`."""
    known = fractions.dropna()
    if known.empty:
        return "at no step"
    least, most = (f"{100 * x:.3g}" for x in (known.min(), known.max()))
    never = f" (on {len(fractions) - len(known)} of {len(fractions)} at no step)" if len(known) < len(fractions) else ""
    return f"first at {least}{'' if least == most else f' to {most}'} %{never}"


def importance_sentence(study: Study, component: str) -> str:
    """Which components matter most over tasks, at the most shots, how sure their ranks are, and where they lie."""
    ranked = ranking(study, component)
    if ranked.empty:
        return ""
    ranked = ranked[ranked["num_fewshot"] == ranked["num_fewshot"].max()]
    beginning = f"With {shots(int(ranked['num_fewshot'].iloc[0]))}"
    where = ranked_on(ranked)
    top = ranked[ranked["useful"]].head(5 if component == "head" else 3)
    if top.empty:
        return f"{beginning} no {_NAMES[component][0]} costs accuracy {where} when it alone is off."
    tenth = ranked.head(max(1, len(ranked) // 10))
    layers = len(study.description["anatomy"]["heads_per_layer"])
    known = top["rank_low"].notna().all()
    names = ", ".join(f"{row['name']} ({row['rank_low']:.0f} to {row['rank_high']:.0f})" if known else str(row["name"])
                      for _, row in top.iterrows())
    ranks = (" (in brackets the 95 % interval of each rank: it comes after all that are shown to matter more, and "
             "before all that are shown to matter less)" if known else "")
    middle = f"; the median layer of the top tenth is {tenth['layer'].median():.0f} of 0 to {layers - 1}"
    return f"{beginning}, {where}, the most important {_NAMES[component][1]} are {names}{ranks}{middle}."


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
                 "otherwise"] if study.tasks else []
        if len(study.induction()):
            other.append("copying from embeddings fed to every layer and the value of the current position alone, "
                         "prefix matching with attention to the first token")
        yield f"Measured as the paper's code does (protocol paper): {'; '.join([*other, 'see docs/paper.md'])}."
    if spec.get("apply_chat_template"):
        yield "Prompts stand in the model's chat template."
    if spec["shared_shots"] and any(spec["shots"]):
        yield ("Shots are shared: one draw per task stands before all its documents, so results hang on that draw; "
               "intervals cover the choice of documents, not of shots.")
    if (study.curves()["order"] == "random").any():
        orders = int(spec["random_orders"])
        drawn = "one draw; its interval covers" if orders == 1 else f"the mean of {orders} draws; its interval covers"
        yield f"The random order is {drawn} the choice of documents, not other draws."
    if study.depth()["low"].notna().any():
        yield ("Intervals of correlations, of sets of heads or FFNs and of what is retained are for studies of as many "
               "documents; in simulations they cover in 84 to 97 % of cases, least where scores are noisy.")
    for task, known in study.known_tasks.items():
        yield from (f"{task}: {note}." for note in known["notes"])
    few = {t: words for t, (n, words) in study.evaluated.items() if n < stats.FEW_DOCUMENTS}
    if few:
        yield (f"Fewer than {stats.FEW_DOCUMENTS} evaluated documents, or passages that they share, so that intervals "
               "are wide and rough: " + ", ".join(f"{t} ({words})" for t, words in few.items()) + ".")
    free = study.free_fractions()
    weak = free[free["free_fraction"].isna() & (free["task"] != MEAN)]
    for k, of_k in groups(weak, "num_fewshot"):
        names = _listed(list(dict.fromkeys(of_k["task"])), len(study.tasks), "tasks")
        yield (f"With {shots(int(k))} the full model is not shown to be above chance, or above a constant answer, on "
               f"{names}; their curves say nothing.")
    layers = len(study.description["anatomy"]["heads_per_layer"])
    coarse = [f"{task} ({k}-shot, {n})" for (task, k), n in study.distinct_values.items() if n < layers / 2]
    if coarse:
        names = _listed(coarse, len(study.distinct_values), "FFN oracles")
        decides = "The order of layers" if spec.get("protocol") == "paper" else "Gold log-likelihood"
        yield (f"{decides} decides much of the order of FFNs where an oracle found fewer than {layers / 2:.0f} "
               f"distinct accuracies: {names}.")
    yield from truncations(study)
    for what, n in study.unshown.items():
        points = "1 measured point" if n == 1 else f"{n} measured points"
        yield (f"Of the {what} {points} {'is' if n == 1 else 'are'} not shown: of fewer documents than others, or what "
               "it would stand beside is not measured.")
    unchanged = study.curves().query("removed > 0 and changed == 0")
    if len(unchanged):
        points = "1 point" if len(unchanged) == 1 else f"{len(unchanged)} points"
        yield (f"At {points} of curves no document changed; intervals of the difference have no width there, though a "
               "change in about 3 of n documents may go unseen.")
