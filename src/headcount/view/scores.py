"""Importance as arrays, one per (task, number of shots), and the tables that compare them with one another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from headcount import ranks, stats, tables
from headcount.view import overlap, relations, tops
from headcount.view.points import MEAN, groups
from headcount.view.relations import MEAN_OF_RANKS, Key

_ORDERS = ["task", "num_fewshot", "component", "method", "score", "orders", "reliability", "distinct", "components",
           "documents"]
_AGREEMENT = ["task", "num_fewshot", "component", "score", "oracle", "correlation", "low", "high", "components"]
_AGGREGATE = ["task", "num_fewshot", "component", "layer", "head", "method", "score", "importance", "stderr", "rank",
              "rank_low", "rank_high"]


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
    places = {place: i for i, place in enumerate(components(rows))}
    for (task, k), of_key in groups(rows, "task", "num_fewshot"):
        key = (str(task), int(k))
        at = [places[place] for place in zip(of_key["layer"], of_key["head"].fillna(-1), strict=True)]
        found.scores[key] = _placed(of_key["importance"].to_numpy(np.float64)[None], at, len(places))[0]
        if "resampled" in of_key and of_key["resampled"].notna().all():
            halves = of_key[["first_half", "second_half"]].to_numpy(np.float64).T
            found.halves[key] = _placed(halves, at, len(places))
            found.resampled[key] = _placed(tables.resampled_from(of_key), at, len(places))
    return found


def components(rows: pd.DataFrame) -> list[tuple[int, int]]:
    """Layer and head (-1 for FFNs) of every component there is, in the order of `measured`'s arrays."""
    return sorted(set(zip(rows["layer"].tolist(), rows["head"].fillna(-1).tolist(), strict=True)))


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
    return _concatenated([
        relations.correlations(*measured(importance, component, score), seed=seed,
                               layers=_layers(importance, score) if component == "head" else None).assign(
            component=component, score=score)
        for component, score in scores.items()])


def aggregate_table(importance: pd.DataFrame, scores: Mapping[str, str], ties: Mapping[str, str]) -> pd.DataFrame:
    """`Study.aggregate_importance()`.

    Args:
        importance: Rows of importance entries.
        scores: Which score orders each kind of component.
        ties: Which decides between equal ones, where one does.
    """
    found = []
    for (component, score), rows in groups(importance, "component", "score"):
        tie = ties.get(component) if score == scores[component] else None
        second = measured(importance, component, tie) if tie else None
        known = measured(rows, component, score)
        there = np.array([(layer, head) for layer, head in components(rows)])[relations.scored(known.scores)]
        mean = mean_importance(rows).set_index(["num_fewshot", "layer"])
        for k, tasks in relations.by_shots(known.scores).items():
            for name, (values, places) in _together_by(known, second, [(task, k) for task in tasks]):
                rank = len(there) - places
                low, high = ranks.rank_intervals(values[0], values[1:], rank)
                frame = pd.DataFrame({"layer": there[:, 0], "head": there[:, 1], "importance": values[0], "rank": rank,
                                      "rank_low": low, "rank_high": high})
                errors = mean.loc[k].reset_index()[["layer", "head", "stderr"]].fillna({"head": -1})
                frame = frame.merge(errors, on=["layer", "head"])
                found.append(frame.assign(
                    task=name, num_fewshot=k, component=component, score=score, method=rows["method"].iloc[0],
                    stderr=np.nan if name == MEAN_OF_RANKS else frame["stderr"],
                    head=frame["head"].astype("Int64").where(frame["head"] >= 0)))
    return pd.concat(found, ignore_index=True)[_AGGREGATE] if found else pd.DataFrame(columns=_AGGREGATE)


def _together_by(
    known: Measured, second: Measured | None, keys: Sequence[Key]
) -> Iterator[tuple[str, tuple[Float[np.ndarray, "row component"], Int[np.ndarray, " component"]]]]:
    """Mean and mean of ranks of these tasks (of a single one itself), and places in the order that the first row gives.

    Rows are what was measured, then draws.
    """
    there = relations.scored(known.scores)
    rows = _rows(known, keys)[..., there]
    ties = None
    if second is not None:
        rows, ties = _alike(rows, _rows(second, keys)[..., there])
    if len(keys) == 1:
        yield keys[0][0], (rows[0], tops.placed(rows[0, :1], None if ties is None else ties[0, :1])[0])
        return
    mean = rows.mean(axis=0)
    yield MEAN, (mean, tops.placed(mean[:1], None if ties is None else ties[:, :1].mean(axis=0))[0])
    of_ranks = tops.mean_of_places(rows, ties)
    yield MEAN_OF_RANKS, (of_ranks / max(there.sum() - 1, 1), tops.placed(of_ranks[:1])[0])


def _rows(found: Measured, keys: Sequence[Key]) -> Float[np.ndarray, "task row component"]:
    """What was measured, then as many draws as all of these have."""
    draws = min(len(found.resampled.get(key, ())) for key in keys)
    return np.stack([np.concatenate([found.scores[key][None], found.resampled[key][:draws]]) if draws else
                     found.scores[key][None] for key in keys])


def _alike(*found: Float[np.ndarray, "*_ row component"]) -> list[Float[np.ndarray, "*_ row component"]]:
    """As many rows of each as all of them have."""
    rows = min(values.shape[-2] for values in found)
    return [values[..., :rows, :] for values in found]


def top_table(importance: pd.DataFrame, scores: Mapping[str, str], ties: Mapping[str, str]) -> pd.DataFrame:
    """`Study.top_sets()`; `scores` and `ties` as above."""
    found = []
    for component, score in scores.items():
        known = ordered(importance, component, score, ties.get(component))
        layers = _layers(importance, score) if component == "head" else None
        found.append(tops.top_sets(known.scores, layers=layers, resampled=known.resampled).assign(component=component))
    return _concatenated(found)


def overlap_table(
    importance: pd.DataFrame, scores: Mapping[str, str], ties: Mapping[str, str], induction: pd.DataFrame,
    aggregate: str,
) -> pd.DataFrame:
    """`Study.top_overlaps()`; `scores` and `ties` as above."""
    found = []
    for component, score in scores.items():
        known = ordered(importance, component, score, ties.get(component))
        trained = _trained(induction, known.scores) if component == "head" else None
        others = _primitives(trained) if trained is not None else None
        layers = _layers(importance, score) if component == "head" else None
        found.append(tops.top_overlaps(known.scores, others, layers=layers, resampled=known.resampled,
                                       aggregate=aggregate).assign(component=component))
    return _concatenated(found)


def depth_table(importance: pd.DataFrame, score: str, aggregate: str, num_layers: int) -> pd.DataFrame:
    """`Study.depth()`."""
    known = measured(importance, "head", score)
    return tops.depth(known.scores, _layers(importance, score), num_layers=num_layers,
                      resampled=known.resampled, aggregate=aggregate)


def ordered(importance: pd.DataFrame, component: str, score: str, tie: str | None) -> Measured:
    """Scores as in `measured`; where another decides between equal ones, each component's place in that order."""
    known = measured(importance, component, score)
    if tie is None:
        return known
    second = measured(importance, component, tie)
    found = Measured({}, {}, {})
    for key in known.scores:
        rows, ties = _alike(*(_rows(m, [key])[0] for m in (known, second)))
        there = np.isfinite(rows[0])
        places = np.full(rows.shape, np.nan)
        places[:, there] = tops.placed(rows[:, there], ties[:, there])
        found.scores[key], found.resampled[key] = places[0], places[1:]
    return found


def orders_table(importance: pd.DataFrame, scores: Mapping[str, str]) -> pd.DataFrame:
    """`Study.orders()`; `scores` as above. Values are told apart as in orders (`headcount.masks.removal_order`)."""
    keys = ["task", "num_fewshot", "component", "method", "score"]
    documents = importance.drop_duplicates(keys).groupby(keys[1:], as_index=False)["num_examples"].sum()
    mean = mean_importance(importance).merge(documents, on=keys[1:]) if importance["task"].nunique() > 1 else None
    rows: list[dict[str, Any]] = []
    for key, of_key in groups(pd.concat([importance, mean]), *keys):
        values, errors = (of_key[name].to_numpy(np.float64) for name in ("importance", "stderr"))
        found = dict(zip(keys, key, strict=True))
        rows.append({**found, "orders": scores[found["component"]] == found["score"],
                     "reliability": ranks.score_reliability(values, errors),
                     "distinct": len({float(f"{x:.4e}") for x in values}), "components": len(values),
                     "documents": int(of_key["num_examples"].iloc[0])})
    return pd.DataFrame(rows, columns=_ORDERS)


def agreement_table(importance: pd.DataFrame) -> pd.DataFrame:
    """`Study.agreement()`."""
    rows: list[dict[str, Any]] = []
    for (task, k, component), of_task in groups(importance, "task", "num_fewshot", "component"):
        wide = of_task.pivot_table(index=["layer", "head"], columns=["method", "score"], values="importance",
                                   dropna=False).dropna(axis=1, how="all")
        for score, lost in itertools.product(("position", "example"), ("accuracy", "gold_loglikelihood")):
            if ("gradient", score) in wide and ("oracle", lost) in wide:
                both = wide[[("gradient", score), ("oracle", lost)]].dropna().to_numpy()
                rho, low, high = stats.rank_correlation(both[:, 0], both[:, 1])
                rows.append(dict(zip(_AGREEMENT, (task, k, component, score, lost, rho, low, high, len(both)),
                                     strict=True)))
    return pd.DataFrame(rows, columns=_AGREEMENT)


def retained_table(
    importance: pd.DataFrame, score: str, induction: pd.DataFrame, seed: int, aggregate: str
) -> pd.DataFrame:
    """`Study.retained()`."""
    found = measured(importance, "head", score)
    trained = _trained(induction, found.scores)
    if trained is None:
        return overlap.retained({}, {}, seed=seed)
    return overlap.retained(
        found.scores, _primitives(trained), resampled=found.resampled, seed=seed, aggregate=aggregate
    )


def among_important_table(
    importance: pd.DataFrame, score: str, induction: pd.DataFrame, aggregate: str
) -> pd.DataFrame:
    """`Study.induction_among_important()`; empty where it is not known which heads are induction heads."""
    found = measured(importance, "head", score)
    trained = _trained(induction, found.scores)
    if trained is None or trained["induction"].isna().any():
        return overlap.induction_among_important({}, np.zeros(0, bool))
    chosen: Bool[np.ndarray, " head"] = trained["induction"].to_numpy(bool)
    return overlap.induction_among_important(found.scores, chosen, layers=_layers(importance, score),
                                             resampled=found.resampled, aggregate=aggregate)


def _trained(induction: pd.DataFrame, scores: Mapping[Key, Float[np.ndarray, " _"]]) -> pd.DataFrame | None:
    """The model's own induction scores by layer, then head, where importance is there to be held against them."""
    found = induction[induction["weights"] == "trained"].sort_values(["layer", "head"])
    return found if len(found) and scores else None


def _layers(importance: pd.DataFrame, score: str) -> list[int]:
    """Of every head that has this score, in the order of `measured`'s arrays."""
    rows = importance[(importance["component"] == "head") & (importance["score"] == score)]
    return [layer for layer, _ in components(rows)]


def _primitives(trained: pd.DataFrame) -> dict[str, Float[np.ndarray, " head"]]:
    return {name: trained[name].to_numpy(np.float64) for name in overlap.PRIMITIVES}


def _concatenated(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


def _placed(
    values: Float[np.ndarray, "row some"], at: list[int], n: int
) -> Float[np.ndarray, "row component"]:
    found = np.full((len(values), n), np.nan)
    found[:, at] = values
    return found
