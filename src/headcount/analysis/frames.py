"""Entries of the ledger as frames: one row per document and mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import pandas as pd

from headcount.study.jobs import score_of
from headcount.study.ledger import Entry, job_id

# An entry's job and what is known of its result, without the table.
Described: TypeAlias = Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]
_LABELS = ("component", "order", "donor", "order_seed", "fraction", "ffn_fraction", "layer", "head", "heads_removed",
           "ffns_removed", "parameters_removed")
_EVALUATION = ["task", "num_fewshot", "split", *_LABELS, "score", "job", "members", "order_of", "doc_id",
               "passage", "correct"]


def current(jobs: Iterable[Mapping[str, Any]], model: str) -> Callable[[Mapping[str, Any]], bool]:
    """Which jobs are of a model, and of its gradient scores as they were last defined.

    Where a model norms what its branches put out, an earlier version took gradient scores before that norm. A folder
    that was begun with it may hold both: then what rests on the earlier scores is passed over, curves too.

    Args:
        jobs: The folder's jobs of importance.
        model: The model's fingerprint; two processes may have begun the folder with different ones.
    """
    earlier = {job_id({k: v for k, v in job.items() if k != "through_norms"}) for job in jobs if "through_norms" in job}

    def chosen(job: Mapping[str, Any]) -> bool:
        return job["model"] == model and not (earlier and earlier & {job_id(job), *_importance_of(job)})

    return chosen


def _importance_of(job: Mapping[str, Any]) -> list[str]:
    """The entries of importance that a curve's orders are read from."""
    curve = job.get("curve", {})
    found = [order.get("importance", []) for order in (curve, curve.get("heads", {}), curve.get("ffns", {}))
             if isinstance(order, Mapping)]
    return [name for names in found for name in ([names] if isinstance(names, str) else names)]


def evaluation_rows(entries: Iterable[Entry], aggregate: str) -> pd.DataFrame:
    """`Study.evaluations()`, and besides: job (number of the entry), members (tasks that its order is of).

    Args:
        entries: Evaluation entries.
        aggregate: An aggregate may have been taken of scores first and of ranks later; the last one asked for is shown.
    """
    frames = []
    for number, entry in enumerate(entries):
        curve = entry.job["curve"]
        together = curve.get("heads", curve)  # of the grid
        if together.get("aggregate", aggregate) != aggregate:
            continue
        labels = pd.DataFrame([{name: mask.get(name, -1) for name in _LABELS} for mask in entry.info["masks"]])
        labels.insert(0, "mask", range(len(labels)))
        for name in ("split", "num_fewshot", "task"):
            labels.insert(1, name, entry.job[name])
        members = together.get("importance", [])
        labels = labels.assign(score=score_of(curve), job=number, order_of=" ".join(sorted(_importance_of(entry.job))),
                               members=len(members) if isinstance(members, list) else 1)
        frames.append(labels.merge(entry.table, on="mask").drop(columns="mask"))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=_EVALUATION)


def of_one_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the orders of all tasks together one for each number of shots and kind of component, the same for all tasks.

    A folder that tasks were added to has orders of fewer tasks too, and one whose tasks were asked for apart has
    several of as many: what goes by two of them is no one set. Kept is that of the most tasks, on the most tasks. Of
    transfer earlier ones of fewer tasks stay, which may have been measured on more documents.
    """
    by_mean = rows["order"].isin(["grid", "transfer"]) & (rows["donor"] == "mean")
    together = (rows["order"] == "common") | by_mean
    dropped: list[int] = []
    for (order, *_), of_kind in rows[together].groupby(["order", "num_fewshot", "component"]):
        known = of_kind.groupby("order_of").agg(members=("members", "first"), tasks=("task", "nunique"),
                                                first=("task", "min"))
        # Names decide between equals, so that heads and FFNs are of the same tasks.
        best = known.sort_values(["members", "tasks", "first"], ascending=[False, False, True]).iloc[0]
        others = of_kind[of_kind["order_of"] != best.name]
        dropped += others.index[(order != "transfer") | (others["members"] == best["members"])].tolist()
    kept: pd.DataFrame = rows.drop(index=dropped)
    return kept


def evaluated(full_models: pd.DataFrame) -> dict[str, tuple[int, str]]:
    """By task, how many documents stand for themselves (passages, where some share one), and in words."""
    found = {}
    for task, of_task in full_models.groupby("task", sort=False):
        documents, passages = of_task["doc_id"].nunique(), of_task["passage"].nunique()
        found[str(task)] = (passages, str(documents) if passages == documents else
                            f"{documents} of {passages} passages")
    return found


def truncated(entries: Described) -> dict[tuple[str, int], int]:
    """How many requests were cut to fit the window, by (task, number of shots), where any were."""
    found: dict[tuple[str, int], int] = {}
    for job, info in entries:
        if job["kind"] != "induction":
            # Evaluated and training documents have entries of their own: neither may hide the other's count.
            key = (job["task"], job["num_fewshot"])
            found[key] = max(found.get(key, 0), info.get("truncated", 0))
    return {key: n for key, n in sorted(found.items()) if n}
