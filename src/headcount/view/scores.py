"""Importance as arrays, one per (task, number of shots), and the tables that compare them with one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from headcount import tables
from headcount.masks import removal_order
from headcount.view import overlap, relations
from headcount.view.points import MEAN, groups
from headcount.view.relations import Key


class Measured(NamedTuple):
    """One kind of component's scores: means, means over resampled documents, and over halves of them."""

    scores: dict[Key, Float[np.ndarray, " _"]]
    resampled: dict[Key, Float[np.ndarray, "_ _"]]
    halves: dict[Key, Float[np.ndarray, "_ _"]]


def measured(importance: pd.DataFrame, component: str, score: str) -> Measured:
    """The scores of all heads, or FFNs; tasks that lack some of them (the oracle of a sample) have NaN there.

    Args:
        importance: Rows of importance entries, with what they were resampled to.
        component: Heads or FFNs.
        score: Which score.
    """
    rows = importance[(importance["component"] == component) & (importance["score"] == score)]
    found = Measured({}, {}, {})
    places = {place: i for i, place in enumerate(sorted(set(zip(rows["layer"], rows["head"].fillna(-1), strict=True))))}
    for (task, k), of_key in groups(rows, "task", "num_fewshot"):
        key = (str(task), int(k))
        at = [places[place] for place in zip(of_key["layer"], of_key["head"].fillna(-1), strict=True)]
        found.scores[key] = _placed(of_key["importance"].to_numpy(np.float64)[None], at, len(places))[0]
        if "resampled" in of_key and of_key["resampled"].notna().all():
            halves = of_key[["first_half", "second_half"]].to_numpy(np.float64).T
            found.halves[key] = _placed(halves, at, len(places))
            found.resampled[key] = _placed(tables.resampled_from(of_key), at, len(places))
    return found


def name_of(component: str, layer: int, head: object) -> str:
    """`L5H1` for a head, `L5F` for an FFN."""
    return f"L{layer}H{head}" if component == "head" else f"L{layer}F"


def mean_importance(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over tasks of each component's importance, by number of shots, method and score.

    The standard error is that of the mean over these very tasks, whose documents are independent.
    """
    keys = ["num_fewshot", "component", "layer", "head", "method", "score"]
    groups = table.assign(square=table["stderr"] ** 2).groupby(keys, dropna=False, as_index=False, sort=False)
    mean: pd.DataFrame = groups.agg(importance=("importance", "mean"), square=("square", _sum_known),
                                    n=("square", "size"))
    mean["stderr"] = np.sqrt(mean["square"]) / mean["n"]
    return mean.drop(columns=["square", "n"]).assign(task=MEAN)


def _sum_known(values: pd.Series) -> float:
    """NaN where one of them is: an unknown error is not none."""
    return float(values.sum(skipna=False))


def most_important_first(rows: pd.DataFrame, ties: pd.DataFrame) -> pd.DataFrame:
    """Rows of importance from the end of the order in which pruning goes.

    Args:
        rows: Of one score and kind of component.
        ties: Of the score that decides between equal ones; what is still equal goes by layer, then head.
    """
    places = ["task", "num_fewshot", "layer", "head"]
    both = rows.merge(ties[[*places, "importance"]], on=places, suffixes=("", "_tie"))
    order = ["importance", "importance_tie", "layer", "head"]
    return both.sort_values(order, ascending=False, kind="stable").drop(columns="importance_tie")


def correlation_table(importance: pd.DataFrame, scores: Mapping[str, str], seed: int) -> pd.DataFrame:
    """`Study.correlations()`; `scores` says which score orders each kind of component."""
    return _together([
        relations.correlations(*measured(importance, component, score), seed=seed).assign(component=component,
                                                                                          score=score)
        for component, score in scores.items()])


def top_table(importance: pd.DataFrame, scores: Mapping[str, str], ties: Mapping[str, str]) -> pd.DataFrame:
    """`Study.top_sets()`; `scores` as above, `ties` the score that decides between equal ones, as in pruning."""
    found = []
    for component, score in scores.items():
        of_tasks = measured(importance, component, score).scores
        if component in ties:
            second = measured(importance, component, ties[component]).scores
            of_tasks = {key: _placed_by(values, second[key]) for key, values in of_tasks.items()}
        found.append(relations.top_sets(of_tasks).assign(component=component))
    return _together(found)


def _placed_by(
    values: Float[np.ndarray, " component"], ties: Float[np.ndarray, " component"]
) -> Float[np.ndarray, " component"]:
    """Each component's place in the order by values, then by what decides between equal ones; NaN where unknown."""
    known = np.flatnonzero(np.isfinite(values))
    places = np.full(len(values), np.nan)
    places[known[removal_order(values[known], ties[known])]] = np.arange(len(known))
    return places


def retained_table(
    importance: pd.DataFrame, score: str, induction: pd.DataFrame, seed: int, aggregate: str
) -> pd.DataFrame:
    """`Study.retained()`."""
    found = measured(importance, "head", score).scores
    trained = _trained(induction, found)
    if trained is None:
        return overlap.retained({}, {}, seed=seed)
    primitives = {name: trained[name].to_numpy(np.float64) for name in ("prefix_matching", "copying")}
    return overlap.retained(found, primitives, seed=seed, aggregate=aggregate)


def among_important_table(
    importance: pd.DataFrame, score: str, induction: pd.DataFrame, aggregate: str
) -> pd.DataFrame:
    """`Study.induction_among_important()`; empty where it is not known which heads are induction heads."""
    found = measured(importance, "head", score).scores
    trained = _trained(induction, found)
    if trained is None or trained["induction"].isna().any():
        return overlap.induction_among_important({}, np.zeros(0, bool))
    chosen: Bool[np.ndarray, " head"] = trained["induction"].to_numpy(bool)
    return overlap.induction_among_important(found, chosen, aggregate=aggregate)


def _trained(induction: pd.DataFrame, scores: Mapping[Key, Float[np.ndarray, " _"]]) -> pd.DataFrame | None:
    """The model's own induction scores by layer, then head, where importance is there to be held against them."""
    found = induction[induction["weights"] == "trained"].sort_values(["layer", "head"])
    return found if len(found) and scores else None


def _together(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


def _placed(
    values: Float[np.ndarray, "row some"], at: list[int], n: int
) -> Float[np.ndarray, "row component"]:
    found = np.full((len(values), n), np.nan)
    found[:, at] = values
    return found
