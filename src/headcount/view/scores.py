"""Importance as arrays, one per (task, number of shots), and the tables that compare them with one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from headcount import tables
from headcount.view import overlap, relations
from headcount.view.points import groups
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


def correlation_table(importance: pd.DataFrame, scores: Mapping[str, str], seed: int) -> pd.DataFrame:
    """`Study.correlations()`; `scores` says which score orders each kind of component."""
    return _together([
        relations.correlations(*measured(importance, component, score), seed=seed).assign(component=component,
                                                                                          score=score)
        for component, score in scores.items()])


def top_table(importance: pd.DataFrame, scores: Mapping[str, str]) -> pd.DataFrame:
    """`Study.top_sets()`; `scores` as above."""
    return _together([relations.top_sets(measured(importance, component, score).scores).assign(component=component)
                      for component, score in scores.items()])


def retained_table(importance: pd.DataFrame, score: str, induction: pd.DataFrame, seed: int) -> pd.DataFrame:
    """`Study.retained()`."""
    found = measured(importance, "head", score).scores
    trained = _trained(induction, found)
    if trained is None:
        return overlap.retained({}, {}, seed=seed)
    primitives = {name: trained[name].to_numpy(np.float64) for name in ("prefix_matching", "copying")}
    return overlap.retained(found, primitives, seed=seed)


def among_important_table(importance: pd.DataFrame, score: str, induction: pd.DataFrame) -> pd.DataFrame:
    """`Study.induction_among_important()`."""
    found = measured(importance, "head", score).scores
    trained = _trained(induction, found)
    if trained is None:
        return overlap.induction_among_important({}, np.zeros(0, bool))
    chosen: Bool[np.ndarray, " head"] = trained["induction"].to_numpy(bool)
    return overlap.induction_among_important(found, chosen)


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
