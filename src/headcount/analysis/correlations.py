"""Does one order serve all? Importance compared between tasks, and between numbers of shots (Bansal et al. 2023).

Everything here takes the scores of one kind of component and one kind of score, one array per (task, number of shots),
and gives tables of Spearman's correlation of *scores*. The paper's code correlates argsort lists instead; what that
would have given stands beside (see `headcount.stats.ranks`). What of a correlation is only depth (which layers matter
to both), and what is left within layers, stand beside as well.

The documents of two tasks are independent; those of one task at two numbers of shots are the same ones. So resampled
means and halves of one task must be made alike at every number of shots: the same draws of the same documents, and the
same documents in each half.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from headcount.analysis.rows import (
    MEAN,
    MEAN_OF_RANKS,
    RANDOM,
    RELIABLE,
    TASK,
    Scoped,
    of_task,
    single_tasks,
)
from headcount.analysis.schema import COMPONENT, OF_SCOPE, Column, Table, columns, interval_of
from headcount.analysis.scores import Rows, Scores, by_shots, check_lengths, layers_of, measured, scored
from headcount.masks import random_order
from headcount.stats import ranks
from headcount.stats.ranks import pearson

CORRELATIONS = Table(
    "correlations", "Spearman's correlation of importance between tasks, and between numbers of shots: one row for "
    "each ordered pair, so that a matrix is one pivot.",
    columns(
        COMPONENT,
        Column("score", "str", "", "the score that orders such components"),
        OF_SCOPE,
        Column("other_scope", "str", "", "what it is compared with, as `scope`"),
        Column("other_task", "str", "", "name of the other task; empty where it is no single task"),
        Column("other_shots", "int64", "shots", "its number of shots; -1 for a random order beside numbers of shots"),
        Column("correlation", "float64", "-1..1", "Spearman's correlation of the scores; of the kind `reliability` "
               "what the score would correlate with itself, measured on as many other documents (Spearman-Brown from "
               "halves)"),
        interval_of("the correlation over documents, for studies of as many of them; missing without replicates; of a "
                    "random order the band that holds 95 % of random orders", "-1..1"),
        Column("ceiling", "float64", "0..1", "the most that can be expected of scores so noisy: the square root of the "
               "product of both reliabilities; noise of shared documents, in `shots`, may lift a correlation above it"),
        Column("disattenuated", "float64", "-1..1", "estimate of what would be found with unlimited documents"),
        Column("argsort_correlation", "float64", "-1..1", "Spearman's correlation of argsort lists, the paper's "
               "variant"),
        Column("correlation_in_layers", "float64", "-1..1", "correlation of ranks without their layer's mean rank: how "
               "alike two scores rank heads of one layer; missing where layers are not known or have one component"),
        interval_of("it", "-1..1", "in_layers_low", "in_layers_high"),
        Column("correlation_layers_alone", "float64", "-1..1", "what of the correlation is left when the heads of "
               "every layer swap their scores at random: that part is depth alone"),
        Column("kind", "str", "", "`tasks` (two tasks at one number of shots), `shots` (two numbers of shots of one "
               "task) or `reliability` (the diagonal of both)")),
    "An aggregate holds the task it is compared with, which would correlate it with itself: that task is left out of "
    "it. The two aggregates are compared as they are; between numbers of shots an aggregate is over the tasks that "
    "have both. No rows where fewer than three components are scored by all.")
_PAIR = ("correlation", "low", "high", "ceiling", "disattenuated", "argsort_correlation", "correlation_in_layers",
         "in_layers_low", "in_layers_high", "correlation_layers_alone")
# A task, an aggregate or a random order, at a number of shots.
_Key: TypeAlias = tuple[Scoped, int]


class _Ranked(NamedTuple):
    """One score: row 0 the mean over all documents, 1 and 2 over two halves (NaN if unknown), then over each draw.

    Attributes:
        values: The score.
        ranks: Its ranks.
        inside: Ranks without their layer's mean; NaN where layers are not known, or have one component each.
        layers: Of every component; all in one where they are not known.
    """

    values: Float[np.ndarray, "row component"]
    ranks: Float[np.ndarray, "row component"]
    inside: Float[np.ndarray, "row component"]
    layers: Int[np.ndarray, " component"]


def correlations(
    scores: Scores, resampled: Rows | None = None, halves: Rows | None = None, *, layers: Sequence[int] | None = None,
    seed: int = 0, component: str = "", score: str = "",
) -> pd.DataFrame:
    """Spearman's correlation of importance between tasks, and between numbers of shots: the table `CORRELATIONS`.

    Args:
        scores: Importance by (task, number of shots), means over training documents. Components that one of them
            lacks (NaN: oracles may score a sample) are left out of all.
        resampled: Bootstrap replicates of each (draw x component), for intervals.
        halves: Its means over the two halves of the documents (2 x component), for reliabilities.
        layers: Of every component, where a layer has several.
        seed: Of the random order.
        component: Heads or FFNs, for the table.
        score: Which score it is, for the table.

    Raises:
        OptionError: If the arrays are not of one model's components.
    """
    check_lengths(scores, resampled, halves)
    known = scored(scores)
    if known.sum() < 3:
        return CORRELATIONS.frame()
    at = np.zeros(int(known.sum()), np.int64) if layers is None else np.asarray(layers)[known]
    ranked = {key: _ranked_score(key, scores, resampled, halves, known, at) for key in scores}
    noise = _random(at, seed)
    return CORRELATIONS.frame({"component": component, "score": score, **row} for row in itertools.chain(
        _between_tasks(ranked, noise), _between_shots(ranked, noise)))


def _between_tasks(ranked: Mapping[tuple[str, int], _Ranked], noise: _Ranked) -> Iterator[dict[str, Any]]:
    """Rows of the kinds "tasks" and "reliability", by number of shots."""
    random = Scoped(RANDOM)
    for k, tasks in by_shots(ranked).items():
        single = {of_task(task): ranked[task, k] for task in tasks}
        whole = {name: how(single.values()) for name, how in _AGGREGATES.items()} if len(tasks) > 1 else {}
        for name, one in (single | whole).items():
            yield _reliability((name, k), one)
        yield _reliability((random, k), noise)
        for a, b in itertools.combinations(single, 2):
            yield from _pair((a, k), (b, k), single[a], single[b], "tasks")
        for name, task in itertools.product(whole, single):
            others = _AGGREGATES[name](one for other, one in single.items() if other != task)
            yield from _pair((task, k), (name, k), single[task], others, "tasks")
        if whole:
            mean, of_ranks = whole
            yield from _pair((mean, k), (of_ranks, k), whole[mean], whole[of_ranks], "tasks")
        for name, one in (single | whole).items():
            yield from _pair((name, k), (random, k), one, noise, "tasks")


def _between_shots(ranked: Mapping[tuple[str, int], _Ranked], noise: _Ranked) -> Iterator[dict[str, Any]]:
    """Rows of the kind "shots", by task, then aggregates."""
    shots, random = sorted(by_shots(ranked)), (Scoped(RANDOM), -1)
    for task in dict.fromkeys(task for task, _ in ranked):
        by_k = {k: ranked[task, k] for k in shots if (task, k) in ranked}
        for a, b in itertools.combinations(by_k, 2):
            yield from _pair((of_task(task), a), (of_task(task), b), by_k[a], by_k[b], "shots")
        if len(by_k) > 1:
            for k, one in by_k.items():
                yield from _pair((of_task(task), k), random, one, noise, "shots")
    compared: dict[_Key, _Ranked] = {}
    for (a, b), (name, how) in itertools.product(itertools.combinations(shots, 2), _AGGREGATES.items()):
        both = [task for task, k in ranked if k == a and (task, b) in ranked]
        if len(both) > 1:
            # An unfinished study may have other tasks at other numbers of shots: those would be compared, not shots.
            one, other = (how(ranked[task, k] for task in both) for k in (a, b))
            compared |= {(name, a): one, (name, b): other}
            yield from _pair((name, a), (name, b), one, other, "shots")
    for key, one in compared.items():
        yield from _pair(key, random, one, noise, "shots")
    if len(shots) > 1:
        yield _reliability(random, noise)


def _row(a: _Key, b: _Key, kind: str, **values: float) -> dict[str, Any]:
    """One row; what of its numbers is not given is not known."""
    of_a, of_b = ({f"{before}scope": one.scope, f"{before}task": one.task}
                  for before, (one, _) in (("", a), ("other_", b)))
    return {**of_a, "num_fewshot": a[1], **of_b, "other_shots": b[1], **dict.fromkeys(_PAIR, np.nan), **values,
            "kind": kind}


def _pair(a: _Key, b: _Key, x: _Ranked, y: _Ranked, kind: str) -> Iterator[dict[str, Any]]:
    """The rows (a, b) and (b, a) of two scores' correlation."""
    rows, n = min(len(x.ranks), len(y.ranks)), x.ranks.shape[1]
    rho, random = pearson(x.ranks[:rows], y.ranks[:rows]), RANDOM in (a[0].scope, b[0].scope)
    if random:
        high = ranks.random_band(n)
        low, most, unlimited = -high, np.nan, np.nan
    else:
        low, high = ranks.document_interval(float(rho[0]), rho[3:], n)
        most = ranks.ceiling(_split_half(x.ranks), _split_half(y.ranks))
        unlimited = ranks.disattenuated(x.ranks[1:3], y.ranks[1:3])
    lists = ranks.argsort_correlation(x.values[0], y.values[0])
    of_layers = _of_layers(x, y, random=random)
    numbers = dict(zip(_PAIR, (float(rho[0]), low, high, most, unlimited, lists, *of_layers), strict=True))
    for one, other in ((a, b), (b, a)):
        yield _row(one, other, kind, **numbers)


def _of_layers(x: _Ranked, y: _Ranked, *, random: bool) -> tuple[float, float, float, float]:
    """The correlation within layers, its bounds, and what the layers alone give; NaN where layers say nothing."""
    if np.isnan(x.inside[0]).any():
        return (float("nan"),) * 4
    rows = min(len(x.inside), len(y.inside))
    rho = pearson(x.inside[:rows], y.inside[:rows])
    # Each layer's mean is taken out: what is left varies as freely as ranks of so many components fewer.
    free = len(x.layers) - len(np.unique(x.layers)) + 1
    high = ranks.random_band(free)
    bounds = (-high, high) if random else ranks.document_interval(float(rho[0]), rho[3:], free)
    return float(rho[0]), *bounds, ranks.layers_alone(x.ranks[0], y.ranks[0], x.layers)


def _reliability(key: _Key, one: _Ranked) -> dict[str, Any]:
    """The diagonal; a random order is known without noise."""
    if key[0].scope == RANDOM:
        whole, inside = 1.0, np.nan if np.isnan(one.inside[0]).any() else 1.0
    else:
        whole, inside = _split_half(one.ranks), _split_half(one.inside)
    return _row(key, key, "reliability", correlation=whole, argsort_correlation=1.0, correlation_in_layers=inside)


def _split_half(places: Float[np.ndarray, "row component"]) -> float:
    return ranks.reliability(float(pearson(places[1:2], places[2:3])[0]))


def _ranked_score(
    key: tuple[str, int], scores: Scores, resampled: Rows | None, halves: Rows | None,
    known: Bool[np.ndarray, " component"],
    layers: Int[np.ndarray, " known"],
) -> _Ranked:
    unknown = np.full((2, len(known)), np.nan)
    parts = [scores[key][None], (halves or {}).get(key, unknown), (resampled or {}).get(key, unknown[:0])]
    return _ranked(np.concatenate(parts)[:, known], layers)


def _random(layers: Int[np.ndarray, " component"], seed: int) -> _Ranked:
    """A random order as a score: each component's place in it."""
    places = np.empty((1, len(layers)))
    places[0, random_order(len(layers), seed)] = np.arange(len(layers))
    return _ranked(places, layers)


def _ranked(values: Float[np.ndarray, "row component"], layers: Int[np.ndarray, " component"]) -> _Ranked:
    of_rows, kinds = ranks.ranks(values), len(np.unique(layers))
    inside = ranks.within_layers(of_rows, layers) if 1 < kinds < len(layers) - 1 else np.full(of_rows.shape, np.nan)
    return _Ranked(values, of_rows, inside, layers)


def _mean(members: Iterable[_Ranked]) -> _Ranked:
    tasks = list(members)
    rows = min(len(one.values) for one in tasks)
    return _ranked(np.mean([one.values[:rows] for one in tasks], axis=0), tasks[0].layers)


def _mean_of_ranks(members: Iterable[_Ranked]) -> _Ranked:
    tasks = list(members)
    rows = min(len(one.ranks) for one in tasks)
    return _ranked(_scaled(np.mean([one.ranks[:rows] for one in tasks], axis=0)), tasks[0].layers)


_AGGREGATES: Mapping[Scoped, Callable[[Iterable[_Ranked]], _Ranked]] = {
    Scoped(MEAN): _mean, Scoped(MEAN_OF_RANKS): _mean_of_ranks}


def _scaled(places: Float[np.ndarray, "*rows component"]) -> Float[np.ndarray, "*rows component"]:
    """Ranks 1..n as 0..1. Scaled last: sums of ranks are exact, so that equal means stay equal."""
    return np.asarray((places - 1) / max(places.shape[-1] - 1, 1))


def correlation_table(importance: pd.DataFrame, scores: Mapping[str, str], seed: int) -> pd.DataFrame:
    """`Study.correlations()`; `scores` says which score orders each kind of component."""
    tables = [correlations(*measured(importance, component, score), seed=seed, component=component, score=score,
                           layers=layers_of(importance, score) if component == "head" else None)
              for component, score in scores.items()]
    return CORRELATIONS.frame(pd.concat(tables, ignore_index=True))


def between_shots(correlations: pd.DataFrame) -> pd.DataFrame:
    """One row per task (and aggregate) and pair of numbers of shots, the fewer first."""
    rows = correlations[(correlations["kind"] == "shots") & (correlations["scope"] == correlations["other_scope"])]
    both = rows[["num_fewshot", "other_shots"]]
    rows = rows.assign(num_fewshot=both.min(axis=1), other_shots=both.max(axis=1))
    return rows.drop_duplicates(["component", "score", "scope", "task", "num_fewshot", "other_shots"])


def between_single_tasks(correlations: pd.DataFrame) -> pd.DataFrame:
    """The rows whose both sides are single tasks."""
    rows: pd.DataFrame = correlations[(correlations["scope"] == TASK) & (correlations["other_scope"] == TASK)]
    return rows


def noise(correlations: pd.DataFrame) -> str:
    """Why correlations of one kind of component and one score are not to be read: its scores are mostly noise.

    They are where most of the tasks' reliabilities are below one half; where no reliability is known, most correlations
    between two tasks (or two numbers of shots) lie within what random orders reach.

    Args:
        correlations: The rows that are drawn or spoken of, with the diagonal and those of a random order.

    Returns:
        The reason, in words; empty where there is none.
    """
    single = single_tasks(correlations)
    own = single.loc[single["kind"] == "reliability", "correlation"].dropna()
    weak = int((own < RELIABLE).sum())
    if len(own):
        return (f"scores are mostly noise: reliability is below {RELIABLE} for {weak} of {len(own)} orders"
                if 2 * weak > len(own) else "")
    band = single.loc[single["other_scope"] == RANDOM, "high"].max()
    pairs = between_single_tasks(single)
    pairs = pairs[pairs["correlation"].notna()]
    within = int((pairs["correlation"].abs() <= band).sum())
    return ("scores may be noise: most correlations lie within what random orders reach" if 2 * within > len(pairs)
            else "")


def noise_by_shots(correlations: pd.DataFrame) -> dict[int, str]:
    """As `noise`, of correlations between tasks by number of shots, fewest first; those that can be read have none."""
    rows = correlations[correlations["kind"].isin(["tasks", "reliability"]) & (correlations["num_fewshot"] >= 0)]
    reasons = {int(k): noise(rows[rows["num_fewshot"] == k]) for k in sorted(set(rows["num_fewshot"]))}
    return {k: reason for k, reason in reasons.items() if reason}


def alike_together(pairs: pd.DataFrame) -> list[str]:
    """The tasks in such an order that those which rank alike are neighbours: leaves of a tree of average distances.

    The distance is one minus the rank correlation, mean over numbers of shots; of the orders that the tree allows the
    one with the nearest neighbours (Bar-Joseph et al. 2001, by scipy).

    Args:
        pairs: Correlations between tasks, each pair at least once.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    rows = between_single_tasks(pairs)
    rows = rows[rows["correlation"].notna()]
    names = list(dict.fromkeys([*rows["task"], *rows["other_task"]]))
    square = rows.pivot_table(index="task", columns="other_task", values="correlation").reindex(
        index=names, columns=names).to_numpy(copy=True)
    square = np.where(np.isnan(square), square.T, square)
    distances = 1 - square[np.triu_indices(len(names), 1)]
    if len(names) < 3 or np.isnan(distances).any():
        return names
    # Rounding may leave a correlation a hair above 1.
    tree = linkage(distances.clip(min=0), "average", optimal_ordering=True)
    return [names[i] for i in leaves_list(tree)]
