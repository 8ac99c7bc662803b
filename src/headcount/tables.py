"""Between results in memory and the rows of the ledger's entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from headcount.masks import Component, Mask, removal_order
from headcount.results import Evaluations, Importance

_PER_MASK = ("correct", "gold_loglikelihood", "margin", "prediction")
_PER_DOCUMENT = ("gold", "num_options")
_COLUMNS = ("mask", "doc_id", *_PER_MASK, *_PER_DOCUMENT)


def evaluation_table(measured: Evaluations) -> pd.DataFrame:
    """One row per mask and document, in this order; further metrics as further columns."""
    masks, docs = measured.correct.shape
    return pd.DataFrame({
        "mask": np.repeat(np.arange(masks), docs),
        "doc_id": np.tile(measured.doc_ids, masks),
        **{name: getattr(measured, name).reshape(-1) for name in _PER_MASK},
        **{name: np.tile(getattr(measured, name), masks) for name in _PER_DOCUMENT},
        **{name: values.reshape(-1) for name, values in measured.extra_metrics.items()},
    })


def evaluations_from(
    tables: Sequence[pd.DataFrame], infos: Sequence[Mapping[str, Any]], job: Mapping[str, Any]
) -> Evaluations:
    """Evaluations of the same documents, their masks one after another, from the tables of one or more entries."""
    first = tables[0]
    docs = first["doc_id"].nunique()
    table = pd.concat(tables, ignore_index=True)

    def per_mask(name: str) -> np.ndarray:
        return table[name].to_numpy().reshape(-1, docs)

    return Evaluations(
        task=job["task"],
        num_fewshot=job["num_fewshot"],
        metric=infos[0]["metric"],
        masks=tuple(Mask.from_json(m["mask"]) for info in infos for m in info["masks"]),
        doc_ids=first["doc_id"].to_numpy()[:docs],
        correct=per_mask("correct"),
        gold_loglikelihood=per_mask("gold_loglikelihood"),
        margin=per_mask("margin"),
        prediction=per_mask("prediction"),
        gold=first["gold"].to_numpy()[:docs],
        num_options=first["num_options"].to_numpy()[:docs],
        extra_metrics={name: per_mask(name) for name in first.columns if name not in _COLUMNS},
        truncated=infos[0]["truncated"],
        tokens=sum(info["tokens"] for info in infos),
        layer_tokens=sum(info.get("layer_tokens", 0) for info in infos),
    )


def importance_table(importance: Importance) -> pd.DataFrame:
    """One row per component and kind of score; components that were not measured have none."""
    positions = importance.positions
    table = pd.concat([
        pd.DataFrame({
            "component": importance.component,
            "layer": [p.layer for p in positions],
            "head": [p.head for p in positions],
            "score": score,
            "importance": values,
            "stderr": importance.stderrs[score],
        })
        for score, values in importance.scores.items()
    ], ignore_index=True)
    return table[table["importance"].notna()].reset_index(drop=True)


def stored_order(table: pd.DataFrame, component: Component, score: str | None) -> list[int]:
    """The removal order that a stored importance gives; without a score, the oracle's (accuracy, log-likelihood)."""
    scores = [score] if score else ["accuracy", "gold_loglikelihood"]
    rows = table[table["component"] == component]
    chosen = [rows[rows["score"] == s].sort_values(["layer", "head"]) for s in scores]
    return removal_order(*(c["importance"].to_numpy() for c in chosen))
