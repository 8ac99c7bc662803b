"""Which components matter: importance over tasks, how sure ranks and orders are, and where the important ones lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from headcount.analysis.rows import MEAN, MEAN_OF_RANKS, TASK, Scoped, groups, of_task
from headcount.analysis.schema import (
    COMPONENT,
    OF_SCOPE,
    OF_TASK,
    Column,
    Table,
    columns,
    interval_of,
)
from headcount.analysis.scores import (
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
    places_in,
    rows_of,
    scored,
    with_aggregate,
)
from headcount.masks import count
from headcount.stats import ranks
from headcount.stats.ranks import rank_correlation
from headcount.study.jobs import Done, ImportanceJob, OracleImportance

_PLACE = (Column("layer", "int64", "", "number of the layer, from 0"),
          Column("head", "Int64", "", "number of the head in its layer, from 0; missing for FFNs"))
_SCORE = Column("score", "str", "", "which score: `position`, `example` (of the gradient); `accuracy`, "
                "`gold_loglikelihood` (of the oracle: what is lost without the component)")
_METHOD = Column("method", "str", "", "`gradient` or `oracle`")
_IMPORTANCE = Column("importance", "float64", "nats; of accuracy -1..1", "the score, mean over training documents")
IMPORTANCE = Table(
    "importance", "Importance: one row per task, number of shots, component and score.",
    columns(OF_TASK, COMPONENT, _PLACE, _METHOD, _SCORE, _IMPORTANCE,
            Column("stderr", "float64", "as importance", "standard error over training documents, those of a passage "
                   "together"),
            Column("num_examples", "int64", "documents", "training documents that it is measured on")))
AGGREGATE_IMPORTANCE = Table(
    "aggregate_importance", "Importance over tasks: one row per component and score, for the mean of the tasks' scores "
    "and for the mean of their ranks.",
    columns(OF_SCOPE, COMPONENT, _PLACE, _METHOD, _SCORE,
            Column("importance", "float64", "as of tasks; of ranks 0..1", "mean of the scores (the paper's aggregate), "
                   "or of the ranks"),
            Column("stderr", "float64", "as importance", "standard error of the mean over these very tasks; missing "
                   "for ranks"),
            Column("rank", "int64", "1..", "1 goes last"),
            interval_of("the rank: it comes after all that are shown to be above it, before all that are shown to be "
                        "below, by paired comparisons", "1..", "rank_low", "rank_high")),
    "Components that a task lacks have no row; with one task alone the rows are of that task. `--aggregate` says which "
    "of the two orders removes.")
ORDERS = Table(
    "orders", "How reliable the order by every score is: one row per task (and their mean), number of shots, "
    "component, method and score.",
    columns(OF_SCOPE, COMPONENT, _METHOD, _SCORE,
            Column("orders", "bool", "", "whether this score orders such components in this study"),
            Column("reliability", "float64", "0..1", "share of the score's variance that is not noise of its "
                   "documents"),
            Column("distinct", "int64", "values", "distinct values of the score"),
            Column("components", "int64", "components", "how many were scored"),
            Column("documents", "int64", "documents", "training documents that it is measured on")))
AGREEMENT = Table(
    "agreement", "How well gradient scores rank components as their oracle does: one row per task, number of shots, "
    "component, score and oracle.",
    columns(OF_TASK, COMPONENT,
            Column("score", "str", "", "the gradient's score: `position` or `example`"),
            Column("oracle", "str", "", "what is lost without the component: `accuracy` or `gold_loglikelihood`"),
            Column("correlation", "float64", "-1..1", "Spearman's; missing where all are equal"),
            interval_of("the correlation, over components", "-1..1"),
            Column("components", "int64", "components", "how many both have scored")),
    "The oracle's own noise, few documents and few distinct values, lowers the correlation.")
DEPTH = Table(
    "depth", "Where the most important heads lie: one row per task (and the aggregate), number of shots and third of "
    "the layers.",
    columns(OF_SCOPE,
            Column("fraction", "float64", "0..1", "which share of the heads counts as the most important"),
            Column("third", "str", "", "`early`, `middle` or `late`; a layer counts to the third that its middle is "
                   "in"),
            Column("share", "float64", "0..1", "share of the most important heads that lies there"),
            interval_of("the share, over documents"),
            Column("expected", "float64", "0..1", "the third's share of all heads"),
            Column("important", "int64", "heads", "how many the most important are"),
            Column("between_layers", "float64", "0..1", "share of the variance of log importance that lies between "
                   "layers; alike for the three thirds"),
            Column("between_layers_by_chance", "float64", "0..1", "the same of scores that have no trend over depth")))


def importance_rows(entries: Iterable[Done[ImportanceJob]]) -> pd.DataFrame:
    """The columns of `Study.importance()`, and besides what importance was resampled to."""
    tables = [entry.table.assign(task=entry.job.task, num_fewshot=entry.job.num_fewshot,
                                 method=entry.job.method, num_examples=entry.info["num_examples"])
              for entry in entries]
    if not tables:
        return IMPORTANCE.frame()
    table = pd.concat(tables, ignore_index=True)
    # Oracles of a sample of heads and of all of them may both be there.
    table = table.drop_duplicates(["task", "num_fewshot", "component", "layer", "head", "method", "score"])
    table["head"] = table["head"].astype("Int64").where(table["component"] == "head")
    return table


def distinct_values(entries: Iterable[Done[ImportanceJob]]) -> dict[tuple[str, int], int]:
    """How many distinct accuracies each FFN oracle found, by (task, number of shots)."""
    distinct = {(entry.job.task, entry.job.num_fewshot): entry.info["distinct_values"] for entry in entries
                if isinstance(entry.job, OracleImportance)}
    return dict(sorted(distinct.items()))


THIRDS = ("early", "middle", "late")


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
        The table `DEPTH`.
    """
    everything, draws = with_aggregate(scores, resampled, aggregate)
    of_tasks, n = known_places(everything, draws)
    there = scored(scores)
    at = np.asarray(layers)[there]
    third = (2 * at + 1) * 3 // (2 * (num_layers or max(layers, default=0) + 1))
    by_chance = (len(np.unique(at)) - 1) / max(n - 1, 1)
    size = max(1, count(fraction, n))
    rows = list[dict[str, Any]]()
    for ((scoped, k), at_task), (i, name) in itertools.product(of_tasks.items(), enumerate(THIRDS)):
        if (third == i).any():
            shares = ((at_task >= n - size) & (third == i)).sum(axis=1) / size
            low, high = bounds_around(shares, 1)
            between = ranks.between_layers(everything[scoped, k][there], at)
            rows.append({**scoped._asdict(), "num_fewshot": k, "fraction": fraction, "third": name, "share": shares[0],
                         "low": low, "high": high, "expected": float((third == i).mean()), "important": size,
                         "between_layers": between,
                         "between_layers_by_chance": by_chance if between == between else math.nan})
    return DEPTH.frame(rows)


def mean_importance(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over tasks of each component's importance, by number of shots, method and score.

    The standard error is that of the mean over these very tasks, whose documents are independent.
    """
    keys = ["num_fewshot", "component", "layer", "head", "method", "score"]
    by_component = table.groupby(keys, dropna=False, as_index=False, sort=False)
    mean: pd.DataFrame = by_component.agg(importance=("importance", "mean"))
    # Rows of each component together, in their order; an unknown error is not none.
    number = by_component.ngroup().to_numpy()
    order = np.argsort(number, kind="stable")
    starts = np.flatnonzero(np.diff(number[order], prepend=-1))
    squares = table["stderr"].to_numpy(np.float64)[order] ** 2
    sizes = np.diff(starts, append=len(order))
    sums = np.array([part.sum() for part in np.split(squares, starts[1:])]) if len(order) else squares
    return mean.assign(stderr=np.sqrt(sums) / sizes, scope=MEAN, task="")


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
    tables = []
    for (component, score), rows in groups(importance, "component", "score"):
        tie = ties.get(component) if score == scores[component] else None
        second = measured(importance, component, tie) if tie else None
        known = measured(rows, component, score)
        there = np.array([(layer, head) for layer, head in components(rows)])[scored(known.scores)]
        errors = _errors_by_place(mean_importance(rows))
        for k, tasks in by_shots(known.scores).items():
            for scoped, (values, places) in _together_by(known, second, [(task, k) for task in tasks]):
                rank = len(there) - places
                low, high = ranks.rank_intervals(values[0], values[1:], rank)
                tables.append(pd.DataFrame({
                    **scoped._asdict(), "num_fewshot": k, "component": component, "layer": there[:, 0],
                    "head": pd.array(there[:, 1], "Int64") if component == "head" else pd.array(
                        [pd.NA] * len(there), "Int64"),
                    "method": rows["method"].iloc[0], "score": score, "importance": values[0],
                    "stderr": np.nan if scoped.scope == MEAN_OF_RANKS else [
                        errors[k, layer, head] for layer, head in there.tolist()],
                    "rank": rank, "rank_low": low, "rank_high": high}))
    return AGGREGATE_IMPORTANCE.frame(pd.concat(tables, ignore_index=True) if tables else ())


def _errors_by_place(mean: pd.DataFrame) -> dict[tuple[int, int, int], float]:
    """Standard errors by number of shots, layer and head (-1 for FFNs)."""
    places = zip(mean["num_fewshot"].tolist(), mean["layer"].tolist(), mean["head"].fillna(-1).tolist(), strict=True)
    return dict(zip(places, mean["stderr"].tolist(), strict=True))


def _together_by(
    known: Measured, second: Measured | None, keys: Sequence[ScoreKey]
) -> Iterator[tuple[Scoped, tuple[Float[np.ndarray, "row component"], Int[np.ndarray, " component"]]]]:
    """Mean and mean of ranks of these tasks (of a single one itself), and places in the order that the first row gives.

    Rows are what was measured, then draws.
    """
    there = scored(known.scores)
    rows = rows_of(known, keys)[..., there]
    ties = None
    if second is not None:
        rows, ties = alike_rows(rows, rows_of(second, keys)[..., there])
    if len(keys) == 1:
        yield of_task(keys[0][0]), (rows[0], placed(rows[0, :1], None if ties is None else ties[0, :1])[0])
        return
    mean = rows.mean(axis=0)
    yield Scoped(MEAN), (mean, placed(mean[:1], None if ties is None else ties[:, :1].mean(axis=0))[0])
    of_ranks = mean_of_places(rows, ties)
    yield Scoped(MEAN_OF_RANKS), (of_ranks / max(there.sum() - 1, 1), placed(of_ranks[:1])[0])


def depth_table(importance: pd.DataFrame, score: str, aggregate: str, num_layers: int) -> pd.DataFrame:
    """`Study.depth()`."""
    known = measured(importance, "head", score)
    return depth(known.scores, layers_of(importance, score), num_layers=num_layers,
                 resampled=known.resampled, aggregate=aggregate)


def orders_table(importance: pd.DataFrame, scores: Mapping[str, str]) -> pd.DataFrame:
    """`Study.orders()`; `scores` as above. Values are told apart as in orders (`headcount.masks.removal_order`)."""
    keys = ["scope", "task", "num_fewshot", "component", "method", "score"]
    scoped = importance.assign(scope=TASK)
    documents = importance.drop_duplicates(keys[1:]).groupby(keys[2:], as_index=False)["num_examples"].sum()
    mean = mean_importance(importance).merge(documents, on=keys[2:]) if importance["task"].nunique() > 1 else None
    rows: list[dict[str, Any]] = []
    for key, of_key in groups(pd.concat([scoped, mean]), *keys):
        values, errors = (of_key[name].to_numpy(np.float64) for name in ("importance", "stderr"))
        known = dict(zip(keys, key, strict=True))
        rows.append({**known, "orders": scores[known["component"]] == known["score"],
                     "reliability": ranks.score_reliability(values, errors),
                     "distinct": len({float(f"{x:.4e}") for x in values}), "components": len(values),
                     "documents": int(of_key["num_examples"].iloc[0])})
    return ORDERS.frame(rows)


def agreement_table(importance: pd.DataFrame) -> pd.DataFrame:
    """`Study.agreement()`."""
    rows: list[dict[str, Any]] = []
    for (task, k, component), rows_of_task in groups(importance, "task", "num_fewshot", "component"):
        places = {place: i for i, place in enumerate(components(rows_of_task))}
        scores = {}
        for method_and_score, of_score in groups(rows_of_task, "method", "score"):
            at = [places[place] for place in places_in(of_score)]
            scores[method_and_score] = np.full(len(places), np.nan)
            scores[method_and_score][at] = of_score["importance"].to_numpy(np.float64)
        for score, lost in itertools.product(("position", "example"), ("accuracy", "gold_loglikelihood")):
            if ("gradient", score) in scores and ("oracle", lost) in scores:
                both = np.stack([scores["gradient", score], scores["oracle", lost]])
                both = both[:, ~np.isnan(both).any(axis=0)]
                rho, low, high = rank_correlation(both[0], both[1])
                rows.append({"task": task, "num_fewshot": k, "component": component, "score": score, "oracle": lost,
                             "correlation": rho, "low": low, "high": high, "components": both.shape[1]})
    return AGREEMENT.frame(rows)
