"""Importance as arrays, one per (task, number of shots), over components that all of them have scored.

A top set holds the last `floor(fraction * n)` components of the order of removal, those that pruning keeps longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from headcount.analysis.points import MEAN, groups
from headcount.errors import OptionError
from headcount.masks import removal_order
from headcount.stats.resampling import around
from headcount.study.codec import resampled_from

MEAN_OF_RANKS, RANDOM = "mean of ranks", "random"
# One array per (task, number of shots).
ScoreKey = tuple[str, int]
Scores = Mapping[ScoreKey, Float[np.ndarray, " _"]]
Rows = Mapping[ScoreKey, Float[np.ndarray, "_ _"]]


def by_shots(keys: Iterable[ScoreKey]) -> dict[int, list[str]]:
    """The tasks of each number of shots, fewest shots first."""
    found: dict[int, list[str]] = {}
    for task, k in sorted(keys, key=lambda key: key[1]):
        found.setdefault(k, []).append(task)
    return found


def scored(scores: Scores) -> Bool[np.ndarray, " component"]:
    """Which components all of these have scored."""
    return np.isfinite(np.stack(list(scores.values()))).all(axis=0) if scores else np.zeros(0, bool)


def check_lengths(*of_components: Mapping[Any, Float[np.ndarray, ...]] | None) -> None:
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
Places = Mapping[ScoreKey, Int[np.ndarray, "row component"]]


def places(scores: Scores, resampled: Rows | None = None) -> dict[ScoreKey, Int[np.ndarray, "row component"]]:
    """Where each component stands in the order of removal, as measured and of every draw of documents.

    Args:
        scores: Importance by (task, number of shots); no component may lack one.
        resampled: Bootstrap replicates of each.

    Returns:
        By (task, number of shots): 0 for the first to go, in a row for what was measured and one per replicate.

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
    found = np.empty(scores.shape, np.int64)
    np.put_along_axis(found, np.concatenate([measured.reshape(1, -1), drawn]), np.arange(scores.shape[1])[None], axis=1)
    return found


def with_aggregate(
    scores: Scores, resampled: Rows | None = None, aggregate: str = "mean"
) -> tuple[dict[ScoreKey, Float[np.ndarray, " component"]], dict[ScoreKey, Float[np.ndarray, "resample component"]]]:
    """Scores and replicates of the tasks, and of their aggregate where there are several: "mean" or "mean of ranks".

    Args:
        scores: Importance by (task, number of shots). An aggregate has no number for components that one of them lacks.
        resampled: Bootstrap replicates of each; an aggregate has them where all its tasks have.
        aggregate: "mean" of the tasks' scores, or of their "ranks".
    """
    found, draws = dict(scores), dict(resampled or {})
    there = scored(scores)
    for k, tasks in by_shots(scores).items():
        if len(tasks) > 1:
            fit = min(len(draws.get((task, k), ())) for task in tasks)
            rows = np.stack([np.concatenate([scores[task, k][None], draws.get((task, k), scores[task, k][None])[:fit]])
                             for task in tasks])
            whole = np.full(rows.shape[1:], np.nan)
            known = rows[..., there]
            whole[:, there] = mean_of_places(known) if aggregate == "ranks" else known.mean(axis=0)
            key = (MEAN_OF_RANKS if aggregate == "ranks" else MEAN, k)
            found[key] = whole[0]
            if fit:
                draws[key] = whole[1:]
    return found, draws


def mean_of_places(
    scores: Float[np.ndarray, "task row component"], ties: Float[np.ndarray, "task row component"] | None = None
) -> Float[np.ndarray, "row component"]:
    """Mean over tasks of each component's place in the order of removal, which is what `--aggregate ranks` prunes by.

    Args:
        scores: What decides; row 0 was measured.
        ties: What decides between equal ones.
    """
    return np.asarray(np.mean([placed(own, None if ties is None else ties[i]) for i, own in enumerate(scores)], axis=0))


def known_places(scores: Scores, resampled: Rows | None) -> tuple[Places, int]:
    """Places among the components that all of these have scored, and how many these are."""
    check_lengths(scores, resampled)
    there = scored(scores)
    return places({key: values[there] for key, values in scores.items()},
                  {key: values[:, there] for key, values in (resampled or {}).items()}), int(there.sum())


def bounds_around(found: Float[np.ndarray, " row"] | Int[np.ndarray, " row"], most: float | int) -> Iterator[float]:
    """The interval of row 0 by the spread of the others, between 0 and `most`."""
    for bound in around(float(found[0]), found[1:].astype(np.float64)):
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
    found = Measured({}, {}, {})
    places = {place: i for i, place in enumerate(components(rows))}
    for (task, k), of_key in groups(rows, "task", "num_fewshot"):
        key = (str(task), int(k))
        at = [places[place] for place in zip(of_key["layer"], of_key["head"].fillna(-1), strict=True)]
        found.scores[key] = _placed(of_key["importance"].to_numpy(np.float64)[None], at, len(places))[0]
        if "resampled" in of_key and of_key["resampled"].notna().all():
            halves = of_key[["first_half", "second_half"]].to_numpy(np.float64).T
            found.halves[key] = _placed(halves, at, len(places))
            found.resampled[key] = _placed(resampled_from(of_key), at, len(places))
    return found


def components(rows: pd.DataFrame) -> list[tuple[int, int]]:
    """Layer and head (-1 for FFNs) of every component there is, in the order of `measured`'s arrays."""
    return sorted(set(zip(rows["layer"].tolist(), rows["head"].fillna(-1).tolist(), strict=True)))


def name_of(component: str, layer: int, head: object) -> str:
    """`L5H1` for a head, `L5F` for an FFN."""
    return f"L{layer}H{head}" if component == "head" else f"L{layer}F"


def rows_of(found: Measured, keys: Sequence[ScoreKey]) -> Float[np.ndarray, "task row component"]:
    """What was measured, then as many draws as all of these have."""
    draws = min(len(found.resampled.get(key, ())) for key in keys)
    return np.stack([np.concatenate([found.scores[key][None], found.resampled[key][:draws]]) if draws else
                     found.scores[key][None] for key in keys])


def alike_rows(*found: Float[np.ndarray, "*_ row component"]) -> list[Float[np.ndarray, "*_ row component"]]:
    """As many rows of each as all of them have."""
    rows = min(values.shape[-2] for values in found)
    return [values[..., :rows, :] for values in found]


def ordered(importance: pd.DataFrame, component: str, score: str, tie: str | None) -> Measured:
    """Scores as in `measured`; where another decides between equal ones, each component's place in that order."""
    known = measured(importance, component, score)
    if tie is None:
        return known
    second = measured(importance, component, tie)
    found = Measured({}, {}, {})
    for key in known.scores:
        rows, ties = alike_rows(*(rows_of(m, [key])[0] for m in (known, second)))
        there = np.isfinite(rows[0])
        places = np.full(rows.shape, np.nan)
        places[:, there] = placed(rows[:, there], ties[:, there])
        found.scores[key], found.resampled[key] = places[0], places[1:]
    return found


def trained_scores(induction: pd.DataFrame, scores: Mapping[ScoreKey, Float[np.ndarray, " _"]]) -> pd.DataFrame | None:
    """The model's own induction scores by layer, then head, where importance is there to be held against them."""
    found = induction[induction["weights"] == "trained"].sort_values(["layer", "head"])
    return found if len(found) and scores else None


def layers_of(importance: pd.DataFrame, score: str) -> list[int]:
    """Of every head that has this score, in the order of `measured`'s arrays."""
    rows = importance[(importance["component"] == "head") & (importance["score"] == score)]
    return [layer for layer, _ in components(rows)]


def primitive_scores(trained: pd.DataFrame) -> dict[str, Float[np.ndarray, " head"]]:
    """Prefix matching and copying of every head, by name."""
    return {name: trained[name].to_numpy(np.float64) for name in PRIMITIVES}


def concatenated(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Frames below one another; the first, with its columns, where all are empty."""
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


def _placed(
    values: Float[np.ndarray, "row some"], at: list[int], n: int
) -> Float[np.ndarray, "row component"]:
    found = np.full((len(values), n), np.nan)
    found[:, at] = values
    return found
