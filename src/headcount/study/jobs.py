"""From a job's description of a curve, and the importance that it names, to masks with labels.

Orders come from stored importance, never from memory. The order of several tasks together, the aggregate, goes by the
mean of their scores (as in the paper's code) or by the mean of their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from headcount.masks import Component, Mask, prune, random_order, removal_order
from headcount.study.codec import stored_order, stored_scores

Labelled = list[tuple[Mask, dict[str, Any]]]
_NO_LABEL: dict[str, Any] = {"component": "none", "order": "none", "donor": "", "order_seed": -1, "fraction": 0.0,
                             "ffn_fraction": 0.0, "layer": -1, "head": -1}


def masks_of(
    curve: Mapping[str, Any], heads_per_layer: Sequence[int], importance: Sequence[pd.DataFrame]
) -> Labelled:
    """The masks that a job measures, with what tells them apart.

    Args:
        curve: The job's description of them.
        heads_per_layer: The model's number of heads of every layer.
        importance: Tables of the importance entries that the description names, in its order.
    """
    full = Mask.full(heads_per_layer)
    label = {**_NO_LABEL, "order": curve["order"], "component": curve.get("component", "none")}
    if curve["order"] == "none":
        return [(full, label)]
    if curve["order"] == "single":
        if curve["component"] == "head":
            return [(full.without_heads([(layer, head)]), {**label, "layer": layer, "head": head})
                    for layer, head in curve["heads"]]
        return [(full.without_ffns([i]), {**label, "layer": i}) for i in curve["layers"]]
    if curve["order"] == "grid":
        # As many tasks' entries for heads, then for FFNs.
        half = len(importance) // 2
        orders = (_order_of(curve["heads"], importance[:half]), _order_of(curve["ffns"], importance[half:]))
        label["donor"] = curve.get("donor", "")
        return [(_joint(heads_per_layer, orders, h, f), {**label, "component": "both", "fraction": h,
                                                         "ffn_fraction": f}) for h, f in curve["points"]]
    component: Component = curve["component"]
    if curve["order"] == "random":
        label["order_seed"] = curve["order_seed"]
        n = sum(heads_per_layer) if component == "head" else len(heads_per_layer)
        order = random_order(n, curve["order_seed"])
    else:
        order = _order_of(curve, importance)
        label["donor"] = curve.get("donor", "")
    return [(prune(heads_per_layer, component, order, f), {**label, "fraction": f}) for f in curve["fractions"]]


def score_of(curve: Mapping[str, Any]) -> str:
    """By which score a job's masks are ordered: "example", "gold_loglikelihood", ...; of the grid both, heads first.

    Empty where no importance orders them. A description that names no score is of an oracle's accuracy, with gold
    log-likelihood between equal ones.
    """
    if curve["order"] == "grid":
        return f"{score_of(curve['heads'])} {score_of(curve['ffns'])}"
    return str(curve.get("score", "accuracy")) if "importance" in curve else ""


def _order_of(curve: Mapping[str, Any], importance: Sequence[pd.DataFrame]) -> list[int]:
    return aggregate_order(importance, curve["component"], curve.get("score"), curve.get("aggregate", "mean"))


def aggregate_order(
    tables: Sequence[pd.DataFrame], component: Component, score: str | None, how: str = "mean"
) -> list[int]:
    """The removal order of several tasks' importance together; of one, its own.

    Args:
        tables: Importance tables.
        component: Heads or FFNs.
        score: As in `headcount.study.codec.stored_order`.
        how: "mean" of the scores, or of the "ranks".
    """
    if len(tables) == 1:
        return stored_order(tables[0], component, score)
    if how == "ranks":
        ranks = [np.argsort(stored_order(table, component, score)) for table in tables]
        return removal_order(np.mean(ranks, axis=0))
    scores = [stored_scores(table, component, score) for table in tables]
    return removal_order(*(np.mean(kind, axis=0) for kind in zip(*scores, strict=True)))


def _joint(
    heads_per_layer: Sequence[int], orders: tuple[Sequence[int], Sequence[int]], heads: float, ffns: float
) -> Mask:
    of_heads = prune(heads_per_layer, "head", orders[0], heads)
    return Mask(of_heads.heads, prune(heads_per_layer, "ffn", orders[1], ffns).ffns)
