"""Points that a model can be reduced to: every mask that was measured by one order, and what is gone there.

One model loses one set of heads and FFNs, so a point is of *one* order: that of all tasks together (common curves, the
grid where it went by that order, transfer's steps by it), or one task's own (its curves, its grid, and transfer, where
the other tasks were pruned by it). Rows are over the tasks that were measured under this very mask, as the entries hold
it, and never over tasks that lost different parts. In a study of one task its own order is that of all tasks together.

A point that several entries hold (a step of a curve, and a corner of the grid on fewer documents) is taken from the one
of the most documents. The differences are to the full model on the same documents, by `analysis.points`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from headcount.analysis.points import Points, compared, most_shared, points_of, removed_by
from headcount.analysis.rows import (
    ALL_TASKS,
    COMMON,
    FREE_FORM,
    MEAN,
    OWN,
    OWN_ORDERS,
    TASK,
    Scoped,
    groups,
    most_shots,
    of_task,
)
from headcount.analysis.schema import COMPONENT, NUM_FEWSHOT, OF_SCOPE, Column, Table, columns, interval_of
from headcount.masks import Component, Mask, all_heads
from headcount.stats import intervals
from headcount.study.masksets import CommonCurve, Grid, GridOrder, MaskSet, OwnCurve, Transfer, aggregate_order

_DONOR = (Column("donor_scope", "str", "", "by whose order heads and FFNs go: `all tasks` (together) or `task` (one "
                 "task's own)"),
          Column("donor", "str", "", "name of the task whose order removes; empty where it is that of all tasks"))
REMOVABLE = Table(
    "removable", "What a model can be reduced to: one row per order, number of shots and measured point, the full "
    "model among them.",
    columns(
        OF_SCOPE, _DONOR,
        Column("heads_fraction", "float64", "0..1", "share of all heads that is removed"),
        Column("ffns_fraction", "float64", "0..1", "share of all FFNs that is removed"),
        Column("uniform", "bool", "", "whether heads went so that every layer keeps one shape (curves of `--uniform`)"),
        Column("heads_removed", "int64", "heads", "how many heads are removed"),
        Column("ffns_removed", "int64", "FFNs", "how many FFNs are removed"),
        Column("parameters_removed", "int64", "parameters", "how many parameters that removes"),
        Column("parameters_removed_share", "float64", "0..1", "which share of the model's parameters that is"),
        Column("accuracy", "float64", "0..1", "mean of the task's metric over documents (and tasks)"),
        interval_of("the accuracy"),
        Column("difference", "float64", "-1..1", "accuracy less the full model's, on the same documents"),
        interval_of("the difference", "-1..1", "difference_low", "difference_high"),
        Column("verdict", "str", "", "what the interval says of a loss of the study's margin, point by point: "
               "`within`, `costs more` or `unknown`, which it also is where the full model is not above its baseline"),
        Column("above_baseline", "bool", "", "whether the full model is shown to be above the better of chance and "
               "the best constant answer: else nothing that is lost could be seen"),
        Column("tasks", "int64", "tasks", "how many tasks the row is over"),
        Column("documents", "int64", "documents", "evaluated documents, of all tasks together"),
        Column("mask", "str", "", "digest of what is removed (`Mask.digest`)")),
    "By one task's order, rows of scope `task` are of that task, and rows of scope `mean` of all tasks, where transfer "
    "pruned the others by it. Which heads and FFNs are gone at a point: table `removed`.")
REMOVED = Table(
    "removed", "Which heads and FFNs are gone: one row per order, number of shots and component that goes at some "
    "measured point.",
    columns(
        _DONOR, NUM_FEWSHOT, COMPONENT,
        Column("name", "str", "", "as mask files name it: `L5H1`, head 1 of layer 5; `L3F`, the FFN of layer 3"),
        Column("layer", "int64", "", "number of the layer, from 0"),
        Column("head", "Int64", "", "number of the head in its layer, from 0; missing for FFNs"),
        Column("position", "Int64", "1..", "its place in the order, 1 goes first; missing where the importance that "
               "ordered it is not in the folder"),
        Column("fraction", "float64", "0..1", "the smallest measured share of heads, or FFNs, at which it is gone")),
    "At a point of table `removable` that is not `uniform` the heads are gone whose `fraction` is at most its "
    "`heads_fraction`, and the FFNs whose `fraction` is at most its `ffns_fraction`. `headcount mask` writes this "
    "list for one point.")


class Point(NamedTuple):
    """A measured point: shares of heads and of FFNs that are removed by an order, and whether to one shape a layer."""

    donor: Scoped
    num_fewshot: int
    heads: float
    ffns: float
    uniform: bool = False


@dataclass(frozen=True, eq=False)
class Measured:
    """One task under one mask.

    Attributes:
        rows: Of `Study.evaluations()`, a document each.
        mask: What was removed, as the entry holds it.
        masks: The set of masks that it is one of, which says what ordered them.
    """

    rows: pd.DataFrame
    mask: str
    masks: MaskSet


@dataclass(frozen=True, eq=False)
class Removal:
    """All points of a study.

    Attributes:
        table: `Study.removable()`.
        masks: By digest, what is removed.
        ordered: By order, number of shots and component, a set of masks by that order.
    """

    table: pd.DataFrame
    masks: dict[str, Mask] = field(default_factory=dict)
    ordered: dict[tuple[Scoped, int, Component], MaskSet] = field(default_factory=dict)


def measured_points(
    evaluations: pd.DataFrame, tasks: Sequence[str], held: Callable[[int, int], tuple[str | None, MaskSet]]
) -> dict[Point, dict[str, Measured]]:
    """What was measured of each task at every point of an order, of the most documents where that was done twice.

    Args:
        evaluations: Shown rows, with those columns that only this room needs.
        tasks: Of the study; unseen ones have no part in a point.
        held: The mask that an entry holds, and the set that it is one of, by the entry's number and the mask's in it.
    """
    rows = evaluations[(evaluations["split"] == "evaluation") & evaluations["task"].isin(list(tasks))
                       & evaluations["order"].isin([*OWN_ORDERS, COMMON, "grid", "transfer", *FREE_FORM])
                       & evaluations["donor_scope"].isin([OWN, TASK, ALL_TASKS])]
    rows = rows.assign(uniform=rows["order"].isin(list(FREE_FORM)))
    found: dict[Point, dict[str, Measured]] = {}
    # Of as many documents a curve counts before the grid, and this before transfer: entries come in no order.
    rows = _by_one_common_order(rows)
    rows = rows.sort_values("order", key=lambda order: order.map({"grid": 1, "transfer": 2}).fillna(0), kind="stable")
    for key, group in groups(rows, "task", "num_fewshot", "component", "donor_scope", "donor", "fraction",
                             "ffn_fraction", "uniform", "job", "mask_number"):
        task, k, component, scope, name, fraction, ffn_fraction, uniform, job, number = key
        donor = Scoped(ALL_TASKS) if scope == ALL_TASKS else of_task(str(task if scope == OWN else name))
        shares = {"head": (fraction, 0.0), "ffn": (0.0, fraction)}.get(component, (fraction, ffn_fraction))
        of_heads, of_ffns = (round(float(share), 9) for share in shares)
        point = Point(donor, int(k), of_heads, of_ffns, bool(uniform))
        mask, masks = held(int(job), int(number))
        known = found.setdefault(point, {}).get(str(task))
        if mask is not None and (known is None or len(known.rows) < len(group)):
            found[point][str(task)] = Measured(group, mask, masks)
    return {point: of_tasks for point, of_tasks in found.items() if of_tasks}


def _by_one_common_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Of what goes by the order of all tasks together only what goes by that of the most tasks, the grid's if any."""
    together = rows["donor_scope"] == ALL_TASKS
    dropped: list[int] = []
    for _, of_shots in groups(rows[together], "num_fewshot"):
        most = of_shots[of_shots["members"] == of_shots["members"].max()]
        names = {order: {*order.split()} for order in most["order_of"].unique()}
        grid = next((names[order] for order in most.loc[most["order"] == "grid", "order_of"]), None)
        same = most["order_of"].map(lambda order, n=names, g=grid: g is None or n[order] <= g).astype(bool)
        dropped += of_shots.index.difference(most.index[same]).tolist()
    return rows.drop(index=dropped)


def removal_points(
    measured: Mapping[Point, Mapping[str, Measured]], full: pd.DataFrame, margin: float, parameters: int,
    constants: Mapping[str, float], above: Mapping[tuple[str, int], bool],
) -> Removal:
    """All points, with what the study says of each.

    Args:
        measured: From `measured_points`.
        full: The full model's rows of evaluated documents.
        margin: The loss of accuracy that must be ruled out.
        parameters: Of the whole model.
        constants: By task of the study, in its order, what the best constant answer gets.
        above: By task and number of shots, whether the full model is shown to be above its baseline.
    """
    by_task = {(str(task), int(k)): rows for (task, k), rows in groups(full, "task", "num_fewshot")}
    measured = {point: {task: of_tasks[task] for task in constants
                        if task in of_tasks and (task, point.num_fewshot) in by_task}
                for point, of_tasks in measured.items()}
    bases = _Bases(by_task, constants)
    removal, rows = Removal(REMOVABLE.frame()), list[dict[str, Any]]()
    orders = list(dict.fromkeys((point.donor, point.num_fewshot) for point in measured))
    place = {task: number for number, task in enumerate(constants)}
    for donor, k in sorted(orders, key=lambda one: (place.get(one[0].task, -1), one[1])):
        of_order = {point: tasks for point, tasks in measured.items() if point[:2] == (donor, k) and tasks}
        for scoped, members in _of_one_model(donor, of_order, list(constants)):
            rows += _rows(scoped, members, bases, removal, margin, parameters, above)
    return Removal(REMOVABLE.frame(rows), removal.masks, removal.ordered)


def _of_one_model(
    donor: Scoped, points: Mapping[Point, Mapping[str, Measured]], tasks: Sequence[str]
) -> Iterator[tuple[Scoped, dict[Point, dict[str, Measured]]]]:
    """What rows are of, and the tasks that each point is measured on: of every point the same ones, under one mask."""
    if donor.scope == TASK:
        own = {point: {donor.task: of_tasks[donor.task]} for point, of_tasks in points.items()
               if donor.task in of_tasks}
        yield donor, own
        everywhere = {point: dict(of_tasks) for point, of_tasks in points.items() if len(of_tasks) == len(tasks) > 1}
        yield Scoped(MEAN), _under_one_mask(everywhere)
        return
    known = {task: [point for point, of_tasks in points.items() if task in of_tasks] for task in tasks}
    taken = most_shared({task: of_task for task, of_task in known.items() if of_task})
    shared = {point: {task: of_tasks[task] for task in tasks if task in taken} for point, of_tasks in points.items()
              if of_tasks.keys() >= {*taken}}
    yield (Scoped(MEAN) if len(taken) > 1 else of_task(taken[0])), _under_one_mask(shared)


def _under_one_mask(points: Mapping[Point, dict[str, Measured]]) -> dict[Point, dict[str, Measured]]:
    """Points at which all tasks lost the same heads and FFNs: entries of earlier versions may be ordered otherwise."""
    return {point: of_tasks for point, of_tasks in points.items() if len({one.mask for one in of_tasks.values()}) == 1}


class _Bases:
    """Full models on the documents of points: one `Points` for each task, number of shots and set of documents."""

    def __init__(self, full: Mapping[tuple[str, int], pd.DataFrame], constants: Mapping[str, float]) -> None:
        self.full = full
        self.constants = constants
        self.points: dict[tuple[str, int, bytes], Points] = {}

    def add(self, task: str, point: Point, one: Measured | None) -> tuple[str, int, bytes]:
        """Take in a task at a point, None the full model; gives where its `Points` stand."""
        full = self.full[task, point.num_fewshot]
        rows = full if one is None else one.rows[one.rows["doc_id"].isin(full["doc_id"])]
        key = (task, point.num_fewshot, np.sort(rows["doc_id"].to_numpy(np.int64)).tobytes())
        if key not in self.points:
            self.points[key] = points_of(rows, full, constant=self.constants[task])
        if one is not None and len(rows):
            self.points[key].add(point, rows)
        return key


def _rows(
    scoped: Scoped, points: Mapping[Point, Mapping[str, Measured]], bases: _Bases, removal: Removal, margin: float,
    parameters: int, above: Mapping[tuple[str, int], bool],
) -> Iterator[dict[str, Any]]:
    """Rows of one order, the full model first; those of the same documents are compared together."""
    if not points:
        return
    first, tasks = next(iter(points.items()))
    whole = first._replace(heads=0.0, ffns=0.0, uniform=False)
    by_documents: dict[tuple[tuple[str, int, bytes], ...], list[Point]] = {
        tuple(bases.add(task, whole, None) for task in tasks): [whole]}
    heads_per_layer = Mask.from_json(next(iter(tasks.values())).mask).heads_per_layer
    masks = {whole: Mask.full(heads_per_layer)}
    for point, of_tasks in sorted(points.items()):
        keys = tuple(bases.add(task, point, one) for task, one in of_tasks.items())
        if not all(point in bases.points[key].values for key in keys):
            continue
        by_documents.setdefault(keys, []).append(point)
        some = next(iter(of_tasks.values()))
        masks[point] = Mask.from_json(some.mask)
        components: tuple[tuple[Component, float], ...] = (("head", point.heads), ("ffn", point.ffns))
        for component, share in components:
            if share and not point.uniform:
                removal.ordered.setdefault((point.donor, point.num_fewshot, component), some.masks)
    removal.masks.update({mask.digest(): mask for mask in masks.values()})
    rows: list[tuple[Point, dict[str, Any]]] = []
    for keys, alike in by_documents.items():
        of_tasks_points = [bases.points[key] for key in keys]
        of_keys = compared(of_tasks_points, [None, *(point for point in alike if point != whole)])
        baseline = float(np.mean([points.baseline for points in of_tasks_points]))
        able = (of_keys[None].low > baseline if scoped.scope == MEAN else
                above.get((scoped.task, whole.num_fewshot), False))
        for point in alike:
            one, gone = of_keys[None if point == whole else point], removed_by(of_tasks_points, point)
            told = (intervals.WITHIN if point == whole else
                    intervals.verdict(one.difference_low, one.difference_high, margin))
            rows.append((point, {
                **scoped._asdict(), "num_fewshot": point.num_fewshot, "donor_scope": point.donor.scope,
                "donor": point.donor.task, "heads_fraction": point.heads, "ffns_fraction": point.ffns,
                "uniform": point.uniform,
                "heads_removed": int(gone.heads), "ffns_removed": int(gone.ffns),
                "parameters_removed": int(gone.parameters), "parameters_removed_share": gone.parameters / parameters,
                **{name: getattr(one, name) for name in ("accuracy", "low", "high", "difference", "difference_low",
                                                         "difference_high", "documents")},
                "verdict": told if able else intervals.UNKNOWN, "above_baseline": bool(able), "tasks": len(keys),
                "mask": masks[point].digest()}))
    yield from (row for _, row in sorted(rows, key=lambda row: row[0]))


def removed_table(removal: Removal, importance: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`Study.removed()`.

    Args:
        removal: From `removal_points`.
        importance: Tables of importance by the names of their entries.
    """
    rows: list[dict[str, Any]] = []
    for (scope, name, k), points in groups(
            removal.table[~removal.table["uniform"]], "donor_scope", "donor", "num_fewshot"):
        components: tuple[Component, Component] = ("head", "ffn")
        for component in components:
            share = "heads_fraction" if component == "head" else "ffns_fraction"
            gone = {float(fraction): _gone(removal.masks[mask], component) for fraction, mask in
                    points[[share, "mask"]].sort_values(share).itertuples(index=False, name=None)}
            everything = sorted(set.union(*gone.values()))
            masks = removal.ordered.get((Scoped(str(scope), str(name)), int(k), component))
            order = None if masks is None else _order(masks, component, importance)
            # An order that is read anew counts only where it is the one by which entries' masks were made.
            told = order is not None and all({*order[: len(parts)]} == parts for parts in gone.values())
            place = {position: number for number, position in enumerate(order or ())} if told else {}
            heads = all_heads(next(iter(removal.masks.values())).heads_per_layer)
            of_component = []
            for position in everything:
                layer, head = heads[position] if component == "head" else (position, None)
                of_component.append({
                    "donor_scope": scope, "donor": name, "num_fewshot": k, "component": component,
                    "name": f"L{layer}F" if head is None else f"L{layer}H{head}", "layer": layer,
                    "head": pd.NA if head is None else head,
                    "position": place[position] + 1 if told else pd.NA,
                    "fraction": min(fraction for fraction, parts in gone.items() if position in parts)})
            rows += sorted(of_component, key=lambda row: (row["fraction"], row["position"] if told else 0))
    return REMOVED.frame(rows)


def costs(removable: pd.DataFrame) -> pd.DataFrame:
    """The points that accuracy is drawn against cost of, the full model among them; empty where nothing is pruned.

    They are those by the order of all tasks together at the most shots (in a study of one task, by its own order), of
    table `removable`, with further columns: `left`, the share of the parameters that is left; `shown`, `shown_low` and
    `shown_high`, the accuracy and its interval moved by what the full model's accuracy is more, or less, on all its
    documents than on the point's, so that points of unlike documents stand beside one another as `choose` compares
    them; and `front`, whether no other point has as few parameters and loses as little.
    """
    rows = removable[removable["donor_scope"] == ALL_TASKS]
    if rows.empty and removable.loc[removable["scope"] == TASK, "task"].nunique() == 1:
        rows = removable[removable["scope"] == TASK]
    rows = most_shots(rows).reset_index(drop=True)
    whole = rows[rows["parameters_removed"] == 0]
    if whole.empty or len(whole) == len(rows):
        return rows.iloc[:0].assign(left=[], shown=[], shown_low=[], shown_high=[], front=[])
    # Steps at which not one head or FFN goes are the full model once more.
    whole = whole.sort_values(["documents", "heads_fraction", "ffns_fraction"], ascending=[False, True, True]).iloc[:1]
    rows = pd.concat([whole, rows[rows["parameters_removed"] > 0]], ignore_index=True)
    moved = rows["accuracy"].iloc[0] - (rows["accuracy"] - rows["difference"])
    gone, lost = rows["parameters_removed"].to_numpy(), (-rows["difference"]).round(9).to_numpy()
    beaten = [bool(((gone >= g) & (lost <= x) & ((gone > g) | (lost < x))).any())
              for g, x in zip(gone, lost, strict=True)]
    return rows.assign(left=1 - rows["parameters_removed_share"], shown=rows["accuracy"] + moved,
                       shown_low=rows["low"] + moved, shown_high=rows["high"] + moved, front=[not b for b in beaten])


def _gone(mask: Mask, component: Component) -> set[int]:
    """Positions of what a mask removes, as orders count them."""
    kept = np.concatenate(mask.heads) if component == "head" else mask.ffns
    return {int(position) for position in np.flatnonzero(~kept)}


def _order(masks: MaskSet, component: Component, importance: Mapping[str, pd.DataFrame]) -> list[int] | None:
    """The order that masks go by; None where its importance is not there."""
    by = (masks.heads if component == "head" else masks.ffns) if isinstance(masks, Grid) else masks
    if not isinstance(by, GridOrder | OwnCurve | CommonCurve | Transfer):
        return None
    tables = [importance[name] for name in by.needs if name in importance]
    how = None if isinstance(by, OwnCurve) else by.aggregate
    return aggregate_order(tables, component, by.score, how or "mean") if len(tables) == len(by.needs) > 0 else None
