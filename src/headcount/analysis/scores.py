"""Importance as arrays, one per (task, number of shots), over components that all of them have scored.

A top set holds the last `floor(fraction * n)` components of the order of removal, those that pruning keeps longest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from headcount.analysis.rows import MEAN, MEAN_OF_RANKS, Scoped, groups, of_task
from headcount.analysis.schema import Column
from headcount.errors import OptionError
from headcount.masks import removal_order
from headcount.stats.resampling import around
from headcount.stats.sets import hypergeometric_overlap, overlap_within
from headcount.study.codec import resampled_from

# One array per (task, number of shots).
ScoreKey = tuple[str, int]
Scores = Mapping[ScoreKey, Float[np.ndarray, " _"]]
Rows = Mapping[ScoreKey, Float[np.ndarray, "_ _"]]
# The same of tasks and of their aggregate.
ScopedKey = tuple[Scoped, int]
AnyKey = TypeVar("AnyKey", ScoreKey, ScopedKey)
Name = TypeVar("Name")


def by_shots(keys: Iterable[tuple[Name, int]]) -> dict[int, list[Name]]:
    """The tasks of each number of shots, fewest shots first."""
    tasks: dict[int, list[Name]] = {}
    for task, k in sorted(keys, key=lambda key: key[1]):
        tasks.setdefault(k, []).append(task)
    return tasks


def scored(scores: Mapping[Any, Float[np.ndarray, " _"]]) -> Bool[np.ndarray, " component"]:
    """Which components all of these have scored."""
    return np.isfinite(np.stack(list(scores.values()))).all(axis=0) if scores else np.zeros(0, bool)


def check_lengths(*of_components: Mapping[Any, Float[np.ndarray, "..."]] | None) -> None:
    """Refuse arrays that do not have one number for each component of one model.

    Raises:
        OptionError: If there are any.
    """
    lengths = {values.shape[-1] for table in of_components if table for values in table.values()}
    if len(lengths) > 1:
        raise OptionError(f"scores of one model have one length, not {', '.join(map(str, sorted(lengths)))}")


PRIMITIVES = {"prefix_matching": "prefix matching", "copying": "copying"}  # and how people say them
TOP = 0.2  # the share that is called the most important
# The place of every component in orders of removal, 0 the first to go: row 0 as measured, then of every draw.
Places = Mapping[ScopedKey, Int[np.ndarray, "row component"]]


def places(
    scores: Mapping[AnyKey, Float[np.ndarray, " _"]], resampled: Mapping[AnyKey, Float[np.ndarray, "_ _"]] | None = None
) -> dict[AnyKey, Int[np.ndarray, "row component"]]:
    """Where each component stands in the order of removal, as measured and of every draw of documents.

    Args:
        scores: Importance by (task, or what else, number of shots); no component may lack one.
        resampled: Bootstrap replicates of each.

    Returns:
        By the same keys: 0 for the first to go, in a row for what was measured and one per replicate.

    Raises:
        OptionError: If the arrays are not of one model's components.
    """
    check_lengths(scores, resampled)
    return {key: placed(np.concatenate([values[None], (resampled or {}).get(key, np.empty((0, len(values))))]))
            for key, values in scores.items()}


def placed(
    scores: Float[np.ndarray, "row component"], ties: Float[np.ndarray, "row component"] | None = None
) -> Int[np.ndarray, "row component"]:
    """Where each component stands in the order of removal that a row gives, 0 for the first to go.

    Args:
        scores: What decides; row 0, which was measured, is rounded as in pruning (`headcount.masks.removal_order`).
        ties: What decides between equal ones; last comes the component's number.
    """
    further = (ties,) if ties is not None else ()
    measured = np.array([removal_order(*(values[0] for values in (scores, *further)))], np.int64)
    # The last key decides.
    drawn = np.lexsort([values[1:] for values in (*further, scores)], axis=-1)
    at = np.empty(scores.shape, np.int64)
    np.put_along_axis(at, np.concatenate([measured.reshape(1, -1), drawn]), np.arange(scores.shape[1])[None], axis=1)
    return at


def with_aggregate(
    scores: Scores, resampled: Rows | None = None, aggregate: str = "mean"
) -> tuple[dict[ScopedKey, Float[np.ndarray, " component"]], dict[ScopedKey, Float[np.ndarray, "resample component"]]]:
    """Scores and replicates of the tasks, and of their aggregate where there are several: its scope says which it is.

    Args:
        scores: Importance by (task, number of shots). An aggregate has no number for components that one of them lacks.
        resampled: Bootstrap replicates of each; an aggregate has them where all its tasks have.
        aggregate: "mean" of the tasks' scores, or of their "ranks".
    """
    everything = {(of_task(task), k): values for (task, k), values in scores.items()}
    draws = {(of_task(task), k): values for (task, k), values in (resampled or {}).items()}
    there = scored(scores)
    for k, tasks in by_shots(everything).items():
        if len(tasks) > 1:
            fit = min(len(draws.get((task, k), ())) for task in tasks)
            rows = np.stack([np.concatenate([everything[task, k][None],
                                             draws.get((task, k), everything[task, k][None])[:fit]])
                             for task in tasks])
            whole = np.full(rows.shape[1:], np.nan)
            known = rows[..., there]
            whole[:, there] = mean_of_places(known) if aggregate == "ranks" else known.mean(axis=0)
            key = (Scoped(MEAN_OF_RANKS if aggregate == "ranks" else MEAN), k)
            everything[key] = whole[0]
            if fit:
                draws[key] = whole[1:]
    return everything, draws


def mean_of_places(
    scores: Float[np.ndarray, "task row component"], ties: Float[np.ndarray, "task row component"] | None = None
) -> Float[np.ndarray, "row component"]:
    """Mean over tasks of each component's place in the order of removal, which is what `--aggregate ranks` prunes by.

    Args:
        scores: What decides; row 0 was measured.
        ties: What decides between equal ones.
    """
    return np.asarray(np.mean([placed(own, None if ties is None else ties[i]) for i, own in enumerate(scores)], axis=0))


def known_places(
    scores: Mapping[AnyKey, Float[np.ndarray, " _"]], resampled: Mapping[AnyKey, Float[np.ndarray, "_ _"]] | None
) -> tuple[dict[AnyKey, Int[np.ndarray, "row component"]], int]:
    """Places among the components that all of these have scored, and how many these are."""
    check_lengths(scores, resampled)
    there = scored(scores)
    return places({key: values[there] for key, values in scores.items()},
                  {key: values[:, there] for key, values in (resampled or {}).items()}), int(there.sum())


def bounds_around(values: Float[np.ndarray, " row"] | Int[np.ndarray, " row"], most: float | int) -> Iterator[float]:
    """The interval of row 0 by the spread of the others, between 0 and `most`."""
    for bound in around(float(values[0]), values[1:].astype(np.float64)):
        yield float(np.clip(bound, 0, most))


class Measured(NamedTuple):
    """One kind of component's scores: means, means over resampled documents, and over halves of them."""

    scores: dict[ScoreKey, Float[np.ndarray, " _"]]
    resampled: dict[ScoreKey, Float[np.ndarray, "_ _"]]
    halves: dict[ScoreKey, Float[np.ndarray, "_ _"]]


def measured(importance: pd.DataFrame, component: str, score: str) -> Measured:
    """The scores of all heads, or FFNs; tasks that lack some of them (the oracle of a sample) have NaN there.

    Args:
        importance: Rows of importance entries, with what they were resampled to.
        component: Heads or FFNs.
        score: Which score.
    """
    rows = importance[(importance["component"] == component) & (importance["score"] == score)]
    known = Measured({}, {}, {})
    places = {place: i for i, place in enumerate(components(rows))}
    for (task, k), of_key in groups(rows, "task", "num_fewshot"):
        key = (str(task), int(k))
        at = [places[place] for place in places_in(of_key)]
        known.scores[key] = _placed(of_key["importance"].to_numpy(np.float64)[None], at, len(places))[0]
        if "resampled" in of_key and of_key["resampled"].notna().all():
            halves = of_key[["first_half", "second_half"]].to_numpy(np.float64).T
            known.halves[key] = _placed(halves, at, len(places))
            known.resampled[key] = _placed(resampled_from(of_key), at, len(places))
    return known


def components(rows: pd.DataFrame) -> list[tuple[int, int]]:
    """Layer and head (-1 for FFNs) of every component there is, in the order of `measured`'s arrays."""
    return sorted(set(places_in(rows)))


def places_in(rows: pd.DataFrame) -> list[tuple[int, int]]:
    """Layer and head (-1 for FFNs) of every row."""
    heads = rows["head"].fillna(-1).to_numpy(np.int64)
    return list(zip(rows["layer"].tolist(), heads.tolist(), strict=True))


def name_of(component: str, layer: int, head: object) -> str:
    """`L5H1` for a head, `L5F` for an FFN."""
    return f"L{layer}H{head}" if component == "head" else f"L{layer}F"


def rows_of(known: Measured, keys: Sequence[ScoreKey]) -> Float[np.ndarray, "task row component"]:
    """What was measured, then as many draws as all of these have."""
    draws = min(len(known.resampled.get(key, ())) for key in keys)
    return np.stack([np.concatenate([known.scores[key][None], known.resampled[key][:draws]]) if draws else
                     known.scores[key][None] for key in keys])


def alike_rows(*arrays: Float[np.ndarray, "*_ row component"]) -> list[Float[np.ndarray, "*_ row component"]]:
    """As many rows of each as all of them have."""
    rows = min(values.shape[-2] for values in arrays)
    return [values[..., :rows, :] for values in arrays]


def ordered(importance: pd.DataFrame, component: str, score: str, tie: str | None) -> Measured:
    """Scores as in `measured`; where another decides between equal ones, each component's place in that order."""
    known = measured(importance, component, score)
    if tie is None:
        return known
    second = measured(importance, component, tie)
    by_place = Measured({}, {}, {})
    for key in known.scores:
        rows, ties = alike_rows(*(rows_of(m, [key])[0] for m in (known, second)))
        there = np.isfinite(rows[0])
        places = np.full(rows.shape, np.nan)
        places[:, there] = placed(rows[:, there], ties[:, there])
        by_place.scores[key], by_place.resampled[key] = places[0], places[1:]
    return by_place


def trained_scores(induction: pd.DataFrame, scores: Mapping[ScoreKey, Float[np.ndarray, " _"]]) -> pd.DataFrame | None:
    """The model's own induction scores by layer, then head, where importance is there to be held against them."""
    trained = induction[induction["weights"] == "trained"].sort_values(["layer", "head"])
    return trained if len(trained) and scores else None


def layers_of(importance: pd.DataFrame, score: str) -> list[int]:
    """Of every head that has this score, in the order of `measured`'s arrays."""
    rows = importance[(importance["component"] == "head") & (importance["score"] == score)]
    return [layer for layer, _ in components(rows)]


def primitive_scores(trained: pd.DataFrame) -> dict[str, Float[np.ndarray, " head"]]:
    """Prefix matching and copying of every head, by name."""
    return {name: trained[name].to_numpy(np.float64) for name in PRIMITIVES}


def by_chance(
    one: Bool[np.ndarray, " component"], other: Bool[np.ndarray, " component"],
    layers: Int[np.ndarray, " component"] | None,
) -> dict[str, float]:
    """What two sets have in common by chance: the columns `OF_CHANCE`; NaN within layers where these are not known."""
    more, fewer, expected = hypergeometric_overlap(len(one), int(one.sum()), int(other.sum()),
                                                         int((one & other).sum()))
    inside = (math.nan,) * 3 if layers is None else overlap_within(layers, one, other)
    return {"expected": expected, "p": more, "p_fewer": fewer, "expected_in_layers": inside[2],
            "p_in_layers": inside[0], "p_fewer_in_layers": inside[1]}


OF_CHANCE = (
    Column("expected", "float64", "components", "how many random sets of these sizes have in common, on average"),
    Column("p", "float64", "0..1", "probability that random sets have at least as many in common (hypergeometric), not "
           "corrected for the number of rows"),
    Column("p_fewer", "float64", "0..1", "probability that they have at most as many in common"),
    Column("expected_in_layers", "float64", "components", "as `expected`, of random sets with as many components of "
           "each layer as the measured ones; missing for FFNs"),
    Column("p_in_layers", "float64", "0..1", "as `p`, of such sets"),
    Column("p_fewer_in_layers", "float64", "0..1", "as `p_fewer`, of such sets"))


def _placed(
    values: Float[np.ndarray, "row some"], at: list[int], n: int
) -> Float[np.ndarray, "row component"]:
    rows = np.full((len(values), n), np.nan)
    rows[:, at] = values
    return rows
