"""Whether an entry without a digest can be what it says: its description and rows against its job.

An earlier version's entry has no digest, so a damaged number in it cannot be told from a measured one. What can be told
is that it does not fit: a job says how many documents were measured under which masks, every mask says how much it
removes, and importance is of every head and FFN. Whatever reads entries may rely on what is checked here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from headcount.errors import HeadcountError
from headcount.masks import Mask

# Letters of numpy's kinds of types: whole numbers, numbers, text.
_EVALUATION = {"mask": "i", "doc_id": "i", "passage": "i", "correct": "f", "gold_loglikelihood": "f", "margin": "f",
               "prediction": "i", "gold": "i", "num_options": "i"}
_IMPORTANCE = {"component": "text", "layer": "i", "head": "i", "score": "text", "importance": "f", "stderr": "f"}
_INDUCTION = {"layer": "i", "head": "i", "prefix_matching": "f", "copying": "f", "previous_token": "f",
              "ov_copying": "f"}
_RESAMPLED = {"first_half": "f", "second_half": "f", "spread": "f"}
_SCORES = {"gradient": {"position", "example"}, "oracle": {"accuracy", "gold_loglikelihood"}}
# Under which name a set of masks lists its steps, and what of a step its masks' labels repeat.
_STEPS = {"layers": ("layer",), "heads": ("layer", "head"), "fractions": ("fraction",),
          "points": ("fraction", "ffn_fraction")}


def implausible(job: Mapping[str, Any], info: Mapping[str, Any], table: pd.DataFrame) -> str:
    """Says what of an entry cannot be as it is; empty where nothing speaks against it.

    Args:
        job: What the entry answers for; its hash is the entry's name, so that this is right.
        info: What else the entry says.
        table: Its rows.
    """
    if not len(table):
        return "it has no rows"
    kinds = {"evaluation": (_EVALUATION, _evaluation), "importance": (_IMPORTANCE, _importance),
             "induction": (_INDUCTION, _induction)}
    if job["kind"] not in kinds:
        return ""
    columns, rest = kinds[job["kind"]]
    return _types(table, columns) or rest(job, info, table)


def _types(table: pd.DataFrame, columns: Mapping[str, str]) -> str:
    """Says which column is missing or of another type."""
    for name, kind in columns.items():
        if name not in table:
            return f"it has no column {name}"
        if not _is(table[name], kind):
            return f"its column {name} is of another type"
    return ""


def _is(values: pd.Series, kind: str) -> bool:
    if kind == "text":
        return bool(values.map(lambda value: isinstance(value, str)).all())
    return isinstance(values.dtype, np.dtype) and values.dtype.kind == kind


def _count(info: Mapping[str, Any], *names: str) -> str:
    """Says which of these, where it is there, is no number of something."""
    return next((f"{name} is no count" for name in names if name in info and not _whole(info[name])), "")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _evaluation(job: Mapping[str, Any], info: Mapping[str, Any], table: pd.DataFrame) -> str:
    labels, curve = info.get("masks"), job.get("curve")
    if not isinstance(labels, list) or not isinstance(curve, Mapping) or not labels:
        return "it does not say its masks"
    if not isinstance(info.get("metric"), str):
        return "it does not say its metric"
    steps = next((len(curve[name]) for name in _STEPS if isinstance(curve.get(name), list)), 1)
    if len(labels) != steps:
        return f"it has {len(labels)} masks, not {steps}"
    return (_count({"truncated": None, **info}, "truncated", "tokens", "layer_tokens")
            or next(filter(None, (_label(label, curve, i) for i, label in enumerate(labels))), "")
            or _shapes(labels) or _documents(job, table, len(labels)))


def _label(label: Any, curve: Mapping[str, Any], number: int) -> str:
    """Says what of a mask's label contradicts the job, or the mask itself."""
    wrong = f"the label of mask {number} does not fit"
    if not isinstance(label, Mapping):
        return wrong
    told = {"order": curve.get("order"), "order_seed": curve.get("order_seed", -1),
            "component": "both" if curve.get("order") == "grid" else curve.get("component", "none")}
    for name, parts in _STEPS.items():
        if isinstance(curve.get(name), list):
            step = curve[name][number]
            told |= dict(zip(parts, step if isinstance(step, Sequence) else (step,), strict=False))
    defaults = {"fraction": 0.0, "ffn_fraction": 0.0, "layer": -1, "head": -1}
    if any(label.get(name, known) != known for name, known in (defaults | told).items()):
        return wrong
    if _count({"heads_removed": None, "ffns_removed": None, "parameters_removed": None, **label},
              "heads_removed", "ffns_removed", "parameters_removed"):
        return wrong
    try:
        mask = Mask.from_json(label["mask"])
    except (HeadcountError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return f"mask {number} cannot be read"
    removed = len(mask.heads_removed), len(mask.ffns_removed)
    return "" if removed == (label["heads_removed"], label["ffns_removed"]) else f"mask {number} removes something else"


def _shapes(labels: Sequence[Mapping[str, Any]]) -> str:
    """Says that not all masks are of one model."""
    shapes = {json.dumps([[len(heads) for heads in mask["heads"]], len(mask["ffns"])])
              for mask in (json.loads(label["mask"]) for label in labels)}
    return "" if len(shapes) == 1 else "its masks are of different models"


def _documents(job: Mapping[str, Any], table: pd.DataFrame, masks: int) -> str:
    """Says that there is not one row for every mask and document, or that masks tell of different documents."""
    documents = len(table) // masks
    if len(table) != masks * documents or documents != job.get("documents", documents):
        return f"it has {len(table)} rows of {masks} masks"
    if not np.array_equal(table["mask"], np.repeat(np.arange(masks), documents)):
        return "its rows are not in the order of its masks"
    for name in ("doc_id", "passage", "gold", "num_options"):
        values = table[name].to_numpy().reshape(masks, documents)
        if (values != values[0]).any():
            return f"its masks do not have the same {name}"
    first = table["doc_id"].to_numpy()[:documents]
    if len(np.unique(first)) != documents or first.min() < 0 or (table["num_options"] < 0).any():
        return "its documents cannot be told apart"
    further = [name for name in table.columns if name not in _EVALUATION]
    if any(not _is(table[name], "f") and not _is(table[name], "i") for name in further):
        return f"its metrics {', '.join(map(str, further))} are not all numbers"
    return "" if np.isfinite(table["correct"]).all() else "its metric is no number"


def _importance(job: Mapping[str, Any], info: Mapping[str, Any], table: pd.DataFrame) -> str:
    oracle = job.get("method") == "oracle"
    wrong = _count({"num_examples": None, **({"distinct_values": 0} if oracle else {}), **info},
                   "num_examples", "truncated", "distinct_values")
    if oracle and "component" not in job and "distinct_values" not in info:
        wrong = wrong or "distinct_values is missing"
    components = {"head", "ffn"} if not oracle else {job.get("component", "ffn")}
    if set(table["component"]) != components or set(table["score"]) != _SCORES.get(str(job.get("method")), set()):
        return wrong or "its components or scores are not those that its job asks for"
    return wrong or _places(table, sampled=job.get("sample") is not None) or _resampled(table)


def _places(table: pd.DataFrame, *, sampled: bool) -> str:
    """Says that not every component of a model has its scores; of a sample of heads no more can be told."""
    wrong = "its heads and FFNs are not those of a model"
    known: dict[str, list[tuple[int, int]]] = {}
    both: Any = ["component", "score"]
    for (component, _), rows in table.groupby(both, sort=False):
        places = sorted(zip(rows["layer"].tolist(), rows["head"].tolist(), strict=True))
        if known.setdefault(component, places) != places or len(set(places)) != len(places):
            return wrong
    for component, places in known.items():
        heads: dict[int, list[int]] = {}
        for layer, head in places:
            heads.setdefault(layer, []).append(head)
        whole = all(found == list(range(len(found))) for found in heads.values())
        if component == "ffn" and ({head for _, head in places} != {-1} or [*heads] != list(range(len(heads)))):
            return wrong
        if component == "head" and not sampled and not whole:
            return wrong
        if min(heads) < 0 or (component == "head" and min(places, key=lambda place: place[1])[1] < 0):
            return wrong
    return "" if np.isfinite(table["importance"]).all() else "its importance is no number"


def _resampled(table: pd.DataFrame) -> str:
    """Says that resampled means are there, but not as they are written."""
    if "resampled" not in table:
        return ""
    draws = table["resampled"].dropna()
    alike = {(len(values), values.dtype) for values in draws if isinstance(values, np.ndarray)}
    if len(alike) > 1 or any(dtype != np.int8 for _, dtype in alike) or any(
            not isinstance(values, np.ndarray) for values in draws):
        return "its resampled means are not alike"
    return _types(table, _RESAMPLED)


def _induction(job: Mapping[str, Any], info: Mapping[str, Any], table: pd.DataFrame) -> str:
    wrong = _count({"sequences": None, **info}, "sequences", "repeats")
    reliability, notes, lengths = info.get("reliability", {}), info.get("notes", []), info.get("lengths", [])
    if not isinstance(reliability, Mapping) or not all(isinstance(r, float | int) for r in reliability.values()):
        return wrong or "its reliability is no number"
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        return wrong or "its notes are no text"
    if not isinstance(lengths, list) or not all(map(_whole, lengths)):
        return wrong or "its lengths are no counts"
    further = [name for name in table.columns if name not in _INDUCTION]
    wrong = wrong or _types(table, dict.fromkeys(further, "f"))
    return wrong or _places(table.assign(component="head", score="", importance=0.0), sampled=False)
