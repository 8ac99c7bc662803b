"""A study folder with planted numbers: what its curves, intervals and free fractions must be is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from headcount.masks import Mask, prune
from headcount.study.ledger import Ledger

LAYERS, HEADS = 6, 4
HEADS_PER_LAYER = [HEADS] * LAYERS
FRACTIONS = [0.25, 0.5, 0.75]
TASKS = ("red", "green")
PARAMETERS_PER_HEAD, PARAMETERS_PER_FFN, PARAMETERS = 100, 1000, 20_000
# How many of 100 documents are right: full model, then after each fraction, by (component, order).
RIGHT = {
    ("head", "gradient"): (80, 80, 80, 40),
    ("head", "random"): (80, 60, 30, 25),
    ("ffn", "oracle"): (80, 60, 30, 25),
    ("ffn", "random"): (80, 30, 30, 25),
}


def spec(tasks: tuple[str, ...] = TASKS, shots: tuple[int, ...] = (0, 5), documents: int = 100) -> dict[str, object]:
    return {
        "spec": {"model": "planted", "tasks": list(tasks), "shots": list(shots), "limit": documents,
                 "importance_limit": 50, "shared_shots": True, "seed": 1, "fractions": FRACTIONS, "random_orders": 1,
                 "ffn_order": "oracle", "head_score": "position", "margin": 0.02, "protocol": "sound",
                 "prefix_threshold": 0.3, "copying_threshold": None, "measure": ["curves"]},
        "model": {"name": "planted <model>", "fingerprint": "abc", "notes": ["weights are made up"]},
        "anatomy": {"heads_per_layer": HEADS_PER_LAYER, "parameters": PARAMETERS,
                    "parameters_per_head": [PARAMETERS_PER_HEAD] * LAYERS,
                    "parameters_per_ffn": [PARAMETERS_PER_FFN] * LAYERS},
        "tasks": {t: {"fingerprint": f"data-{t}", "metric": "acc", "documents": documents, "examples": 50, "notes": []}
                  for t in tasks},
        "commands": ["headcount study planted --tasks red green"], "created": "2026-01-01T00:00:00+00:00",
        "layout": "token trees: planted", "versions": {"headcount": "0"},
    }


def of_task(kind: str, task: str, k: int, documents: int) -> dict[str, object]:
    """What jobs of a task say."""
    shots = {"seed": 1, "shared_shots": True} if k else {}
    return {"kind": kind, "protocol": "sound", "model": "abc", "task": task, "task_fingerprint": f"data-{task}",
            "num_fewshot": k, "documents": documents, **shots}


def _rows(right: int, documents: int, mask: int) -> pd.DataFrame:
    ids = np.arange(documents)
    correct = (ids < right * documents // 100).astype(float)
    return pd.DataFrame({"mask": mask, "doc_id": ids, "passage": ids, "correct": correct, "gold_loglikelihood": -1.0,
                         "margin": 0.5, "prediction": 0, "gold": ids % 4, "num_options": 4})


def _label(component: str, order: str, fraction: float) -> dict[str, object]:
    mask = Mask.full(HEADS_PER_LAYER)
    if component != "none":
        n = LAYERS * HEADS if component == "head" else LAYERS
        mask = prune(HEADS_PER_LAYER, component, list(range(n)), fraction)  # type: ignore[arg-type]
    heads, ffns = len(mask.heads_removed), len(mask.ffns_removed)
    return {"component": component, "order": order, "order_seed": 7 if order == "random" else -1, "fraction": fraction,
            "layer": -1, "heads_removed": heads, "ffns_removed": ffns,
            "parameters_removed": heads * PARAMETERS_PER_HEAD + ffns * PARAMETERS_PER_FFN, "mask": mask.to_json()}


def write(folder: Path, *, tasks: tuple[str, ...] = TASKS, shots: tuple[int, ...] = (0, 5), documents: int = 100,
          full: int = 80, evaluations: bool = True, importance: bool = True) -> Path:
    """Write the folder; without shots the full model is as good as guessing."""
    ledger = Ledger(folder)
    ledger.write_json("study.json", spec(tasks, shots, documents))
    for task in tasks:
        for k in shots:
            job = {**of_task("evaluation", task, k, documents), "split": "evaluation"}
            info = {"metric": "acc", "truncated": 0, "tokens": 1, "seconds": 0.1}
            right = full if k else 25
            if evaluations:
                ledger.write({**job, "curve": {"order": "none"}}, _rows(right, documents, 0),
                             {**info, "masks": [_label("none", "none", 0.0)]})
                for (component, order), planted in RIGHT.items():
                    table = pd.concat([_rows(n if k else 25, documents, i) for i, n in enumerate(planted[1:])])
                    by = {"order_seed": 7} if order == "random" else {"importance": "planted"}
                    curve = {"component": component, "order": order, "fractions": FRACTIONS, **by}
                    score = {"score": "position"} if order == "gradient" else {}
                    ledger.write({**job, "curve": {**curve, **score}}, table,
                                 {**info, "masks": [_label(component, order, f) for f in FRACTIONS]})
            if importance:
                _write_importance(ledger, task, k)
    return folder


def _write_importance(ledger: Ledger, task: str, k: int) -> None:
    layers, heads = np.divmod(np.arange(LAYERS * HEADS), HEADS)
    head_rows = [pd.DataFrame({"component": "head", "layer": layers, "head": heads, "score": s,
                               "importance": 0.01 * (layers + 1) + 0.001 * heads, "stderr": 0.001})
                 for s in ("position", "example")]
    ffn = {"component": "ffn", "layer": np.arange(LAYERS), "head": -1, "stderr": 0.01}
    ffn_rows = [pd.DataFrame({**ffn, "score": s, "importance": 0.1 * np.arange(LAYERS)})
                for s in ("position", "example")]
    base = of_task("importance", task, k, 50)
    ledger.write({**base, "method": "gradient"}, pd.concat([*head_rows, *ffn_rows]), {"num_examples": 50})
    oracle = [pd.DataFrame({**ffn, "score": s, "importance": 0.1 * (np.arange(LAYERS) // 3)})
              for s in ("accuracy", "gold_loglikelihood")]
    ledger.write({**base, "method": "oracle"}, pd.concat(oracle), {"num_examples": 50, "distinct_values": 2})
