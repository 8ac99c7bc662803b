"""Which components matter: importance over tasks, how sure ranks and orders are, and where the important ones lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from headcount.analysis.frames import Described
from headcount.analysis.points import MEAN, groups
from headcount.analysis.scores import (
    MEAN_OF_RANKS,
    TOP,
    Measured,
    Rows,
    ScoreKey,
    Scores,
    alike_rows,
    bounds_around,
    by_shots,
    components,
    known_places,
    layers_of,
    mean_of_places,
    measured,
    placed,
    rows_of,
    scored,
    with_aggregate,
)
from headcount.masks import count
from headcount.stats import ranks
from headcount.stats.ranks import rank_correlation
from headcount.study.ledger import Entry

IMPORTANCE = ["task", "num_fewshot", "component", "layer", "head", "method", "score", "importance", "stderr",
              "num_examples"]


def importance_rows(entries: Iterable[Entry]) -> pd.DataFrame:
    """`Study.importance()`, and besides what importance was resampled to."""
    frames = []
    for entry in entries:
        known = {"task": entry.job["task"], "num_fewshot": entry.job["num_fewshot"], "method": entry.job["method"],
                 "num_examples": entry.info["num_examples"]}
        frames.append(entry.table.assign(**known))
    if not frames:
        return pd.DataFrame(columns=IMPORTANCE)
    table = pd.concat(frames, ignore_index=True)
    # Oracles of a sample of heads and of all of them may both be there.
    table = table.drop_duplicates(["task", "num_fewshot", "component", "layer", "head", "method", "score"])
    table["head"] = table["head"].astype("Int64").where(table["component"] == "head")
    return table


def distinct_values(entries: Described) -> dict[tuple[str, int], int]:
    """How many distinct accuracies each FFN oracle found, by (task, number of shots)."""
    found = {(job["task"], job["num_fewshot"]): info["distinct_values"] for job, info in entries
             if job["method"] == "oracle" and job.get("component", "ffn") == "ffn"}
    return dict(sorted(found.items()))


THIRDS = ("early", "middle", "late")
_DEPTH = ["task", "num_fewshot", "fraction", "third", "share", "low", "high", "expected", "important", "between_layers",
          "between_layers_by_chance"]


def depth(
    scores: Scores, layers: Sequence[int], *, num_layers: int | None = None, resampled: Rows | None = None,
    aggregate: str = "mean", fraction: float = TOP,
) -> pd.DataFrame:
    """Share of the most important components in each third of the layers; a layer counts to the one its middle is in.

    Args:
        scores: Importance by (task, number of shots). Components that one of them lacks are left out of all.
        layers: Of every component.
        num_layers: Of the whole model; as many as these components lie in unless told.
        resampled: Bootstrap replicates of each, for the interval.
        aggregate: "mean" of the tasks' scores, or of their "ranks".
        fraction: Which share counts as the most important; one component at least.

    Returns:
        Columns: task (and the aggregate); num_fewshot; fraction; third ("early", "middle", "late"); share with its 95 %
        interval low, high; expected (the third's share of all components); important (how many the most important are);
        and, alike for the three thirds, between_layers (share of the variance of log importance that lies between
        layers, `headcount.stats.ranks.between_layers`) and between_layers_by_chance (of scores that have no trend).
    """
    everything, draws = with_aggregate(scores, resampled, aggregate)
    found, n = known_places(everything, draws)
    there = scored(scores)
    at = np.asarray(layers)[there]
    third = (2 * at + 1) * 3 // (2 * (num_layers or max(layers, default=0) + 1))
    by_chance = (len(np.unique(at)) - 1) / max(n - 1, 1)
    size = max(1, count(fraction, n))
    rows = list[dict[str, Any]]()
    for ((task, k), of_task), (i, name) in itertools.product(found.items(), enumerate(THIRDS)):
        if (third == i).any():
            shares = ((of_task >= n - size) & (third == i)).sum(axis=1) / size
            between = ranks.between_layers(everything[task, k][there], at)
            rows.append(dict(zip(_DEPTH, (task, k, fraction, name, shares[0], *bounds_around(shares, 1),
                                          float((third == i).mean()), size, between,
                                          by_chance if between == between else math.nan), strict=True)))
    return pd.DataFrame(rows, columns=_DEPTH)


_ORDERS = ["task", "num_fewshot", "component", "method", "score", "orders", "reliability", "distinct", "components",
           "documents"]
_AGREEMENT = ["task", "num_fewshot", "component", "score", "oracle", "correlation", "low", "high", "components"]
_AGGREGATE = ["task", "num_fewshot", "component", "layer", "head", "method", "score", "importance", "stderr", "rank",
              "rank_low", "rank_high"]


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
        there = np.array([(layer, head) for layer, head in components(rows)])[scored(known.scores)]
        mean = mean_importance(rows).set_index(["num_fewshot", "layer"])
        for k, tasks in by_shots(known.scores).items():
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
    known: Measured, second: Measured | None, keys: Sequence[ScoreKey]
) -> Iterator[tuple[str, tuple[Float[np.ndarray, "row component"], Int[np.ndarray, " component"]]]]:
    """Mean and mean of ranks of these tasks (of a single one itself), and places in the order that the first row gives.

    Rows are what was measured, then draws.
    """
    there = scored(known.scores)
    rows = rows_of(known, keys)[..., there]
    ties = None
    if second is not None:
        rows, ties = alike_rows(rows, rows_of(second, keys)[..., there])
    if len(keys) == 1:
        yield keys[0][0], (rows[0], placed(rows[0, :1], None if ties is None else ties[0, :1])[0])
        return
    mean = rows.mean(axis=0)
    yield MEAN, (mean, placed(mean[:1], None if ties is None else ties[:, :1].mean(axis=0))[0])
    of_ranks = mean_of_places(rows, ties)
    yield MEAN_OF_RANKS, (of_ranks / max(there.sum() - 1, 1), placed(of_ranks[:1])[0])


def depth_table(importance: pd.DataFrame, score: str, aggregate: str, num_layers: int) -> pd.DataFrame:
    """`Study.depth()`."""
    known = measured(importance, "head", score)
    return depth(known.scores, layers_of(importance, score), num_layers=num_layers,
                      resampled=known.resampled, aggregate=aggregate)


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
                rho, low, high = rank_correlation(both[:, 0], both[:, 1])
                rows.append(dict(zip(_AGREEMENT, (task, k, component, score, lost, rho, low, high, len(both)),
                                     strict=True)))
    return pd.DataFrame(rows, columns=_AGREEMENT)
