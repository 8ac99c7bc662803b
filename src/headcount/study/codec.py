"""Between results in memory and the rows of the ledger's entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from headcount.masks import Component, Mask, removal_order
from headcount.results import Evaluations, Importance, InductionScores, Score

_PER_MASK = ("correct", "gold_loglikelihood", "margin", "prediction")
_PER_DOCUMENT = ("gold", "num_options")
_COLUMNS = ("mask", "doc_id", "passage", *_PER_MASK, *_PER_DOCUMENT)
# Resampled means are kept as steps of their largest distance to the mean: a two hundred and fifty-fourth is enough.
_STEPS = 127


def evaluation_table(measured: Evaluations) -> pd.DataFrame:
    """One row per mask and document, in this order; further metrics as further columns."""
    masks, docs = measured.correct.shape
    return pd.DataFrame({
        "mask": np.repeat(np.arange(masks), docs),
        "doc_id": np.tile(measured.doc_ids, masks),
        "passage": np.tile(np.arange(docs) if measured.passages is None else measured.passages, masks),
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
        passages=first["passage"].to_numpy()[:docs],
        truncated=infos[0]["truncated"],
        tokens=sum(info["tokens"] for info in infos),
        layer_tokens=sum(info.get("layer_tokens", 0) for info in infos),
    )


def importance_table(importance: Importance) -> pd.DataFrame:
    """One row per component and kind of score; components that were not measured have none.

    Columns: component, layer, head, score, importance, stderr, first_half, second_half, and where there are resampled
    means: resampled, their distances to the importance as bytes, times spread.
    """
    positions = importance.positions
    table = pd.concat([
        pd.DataFrame({
            "component": importance.component,
            "layer": [p.layer for p in positions],
            "head": [p.head for p in positions],
            "score": score,
            "importance": values,
            "stderr": importance.stderrs[score],
            **_spread(importance, score),
        })
        for score, values in importance.scores.items()
    ], ignore_index=True)
    return table[table["importance"].notna()].reset_index(drop=True)


def _spread(importance: Importance, score: Score) -> dict[str, Any]:
    if score not in importance.resampled:
        return {}
    away = (importance.resampled[score] - importance.scores[score]).T
    spread = np.abs(away).max(axis=1)
    steps = np.rint(_STEPS * away / np.where(spread > 0, spread, 1)[:, None])
    return {"first_half": importance.halves[score][0], "second_half": importance.halves[score][1], "spread": spread,
            "resampled": list(np.nan_to_num(steps).astype(np.int8))}


def resampled_from(rows: pd.DataFrame) -> Float[np.ndarray, "resample component"]:
    """The resampled means of an importance table's rows, one column per row."""
    steps = np.stack(rows["resampled"].to_list()).astype(np.float64)
    importance, spread = rows["importance"].to_numpy(), rows["spread"].to_numpy()
    decoded = importance + steps.T * spread / _STEPS
    # A draw without the one document that a component costs gives it 0, and not what is left of a step: it ties.
    return np.asarray(np.where(np.abs(decoded) <= spread / (2 * _STEPS), 0.0, decoded))


def induction_table(scores: InductionScores) -> pd.DataFrame:
    """One row per head: layer, head, its scores, and the variances of those that are means over texts."""
    return pd.DataFrame({
        "layer": [p.layer for p in scores.positions],
        "head": [p.head for p in scores.positions],
        **{name: getattr(scores, name) for name in ("prefix_matching", "copying", "previous_token", "ov_copying")},
        **{f"{name}_variance": values for name, values in scores.variances.items()},
    })


def stored_order(table: pd.DataFrame, component: Component, score: str | None) -> list[int]:
    """The removal order that a stored importance gives; without a score, the oracle's (accuracy, log-likelihood)."""
    return removal_order(*stored_scores(table, component, score))


def stored_scores(
    table: pd.DataFrame, component: Component, score: str | None
) -> list[Float[np.ndarray, " component"]]:
    """The scores that decide an order, the first one first, by layer, then head; `score` as in `stored_order`."""
    rows = table[table["component"] == component]
    chosen = [rows[rows["score"] == s].sort_values(["layer", "head"])
              for s in ([score] if score else ["accuracy", "gold_loglikelihood"])]
    return [c["importance"].to_numpy(np.float64) for c in chosen]
