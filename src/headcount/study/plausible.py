"""Whether an entry without a digest can be what it says: its description and rows against its job.

An earlier version's entry has no digest, so a damaged number in it cannot be told from a measured one. What can be told
is that it does not fit: a job says how many documents were measured under which masks, every mask says how much it
removes, and importance is of every head and FFN. Whatever reads entries may rely on what is checked here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

# Columns by kind of job, as Parquet calls their types.
_EVALUATION = {"mask": "int64", "doc_id": "int64", "passage": "int64", "correct": "double",
               "gold_loglikelihood": "double", "margin": "double", "prediction": "int64", "gold": "int64",
               "num_options": "int64"}
_IMPORTANCE = {"component": "string", "layer": "int64", "head": "int64", "score": "string", "importance": "double",
               "stderr": "double"}
_RESAMPLED = {"first_half": "double", "second_half": "double", "spread": "double", "resampled": "list<element: int8>"}
_INDUCTION = {"layer": "int64", "head": "int64", "prefix_matching": "double", "copying": "double",
              "previous_token": "double", "ov_copying": "double"}
_VARIANCES = dict.fromkeys(("prefix_matching_variance", "copying_variance", "previous_token_variance"), "double")
_SCORES = {"gradient": {"position", "example"}, "oracle": {"accuracy", "gold_loglikelihood"}}
# Under which name a set of masks lists its steps, and what of a step its masks' labels repeat.
_STEPS = {"layers": ("layer",), "heads": ("layer", "head"), "fractions": ("fraction",),
          "points": ("fraction", "ffn_fraction")}
_NO_STEP = {"fraction": 0.0, "ffn_fraction": 0.0, "layer": -1, "head": -1}
_REMOVED = ("heads_removed", "ffns_removed", "parameters_removed")


def implausible(job: Mapping[str, Any], info: Mapping[str, Any], table: pa.Table) -> str:
    """Says what of an entry cannot be as it is; empty where nothing speaks against it.

    Args:
        job: What the entry answers for; its hash is the entry's name, so that this is right.
        info: What else the entry says.
        table: Its rows.
    """
    if not len(table):
        return "it has no rows"
    if job["kind"] == "evaluation":
        return _types(table, _EVALUATION) or _masks(job, info) or _documents(job, table, len(info["masks"]))
    if job["kind"] == "importance":
        resampled = _RESAMPLED if "resampled" in table.column_names else {}
        return (_types(table, _IMPORTANCE) or _types(table, resampled, missing=True) or _scored(job, info, table)
                or _resampled(table))
    if job["kind"] == "induction":
        there = {name: kind for name, kind in _VARIANCES.items() if name in table.column_names}
        return _types(table, _INDUCTION | there, missing=True) or _texts(info) or _heads(table)
    return ""


def _types(table: pa.Table, columns: Mapping[str, str], *, missing: bool = False) -> str:
    """Says which column is not there or of another type, or has holes where it must not."""
    for name, kind in columns.items():
        if name not in table.column_names:
            return f"it has no column {name}"
        if str(table.schema.field(name).type) != kind:
            return f"its column {name} is of another type"
        if not missing and kind != "double" and table[name].null_count:
            return f"its column {name} has holes"
    return ""


def _counts(said: Mapping[str, Any], needed: Sequence[str], others: Sequence[str] = ()) -> str:
    """Says which of these is no number of something; others need not be there."""
    for name in (*needed, *(name for name in others if name in said)):
        if not _is_count(said.get(name)):
            return f"its {name} is no number"
    return ""


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _masks(job: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """Says that the masks are not those of the job."""
    labels, curve = info.get("masks"), job.get("curve")
    if not isinstance(labels, list) or not isinstance(curve, Mapping) or not isinstance(info.get("metric"), str):
        return "it does not say its masks or its metric"
    steps = next((len(curve[name]) for name in _STEPS if isinstance(curve.get(name), list)), 1)
    if len(labels) != steps:
        return f"it has {len(labels)} masks, not {steps}"
    models = set[tuple[int, ...]]()
    for number, label in enumerate(labels):
        if not isinstance(label, Mapping) or not _is_labelled(label, curve, number):
            return f"what it says of mask {number} is not what its job says"
        if (model := _model(label)) is None:
            return f"its mask {number} does not remove what it says"
        models.add(model)
    if len(models) > 1:
        return "its masks are of different models"
    return _counts(info, ("truncated", "tokens"), ("layer_tokens",))


def _is_labelled(label: Mapping[str, Any], curve: Mapping[str, Any], number: int) -> bool:
    """Whether a mask's label repeats what the job says of its step."""
    told = {**_NO_STEP, "order": curve.get("order"), "order_seed": curve.get("order_seed", -1),
            "component": "both" if curve.get("order") == "grid" else curve.get("component", "none")}
    for name, parts in _STEPS.items():
        if isinstance(curve.get(name), list):
            step = curve[name][number]
            told |= dict(zip(parts, step if isinstance(step, list) else [step], strict=True))
    return all(label.get(name, known) == known for name, known in told.items())


def _model(label: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The number of heads of every layer that a mask is of; None if it does not remove what its label says."""
    mask = json.loads(label["mask"])
    heads, ffns = mask["heads"], mask["ffns"]
    removed = sum(layer.count("0") for layer in heads), ffns.count("0")
    kept = sum(layer.count("1") for layer in heads), ffns.count("1")
    whole = sum(map(len, heads)) == removed[0] + kept[0] and len(heads) == len(ffns) == removed[1] + kept[1]
    if not whole or _counts(label, _REMOVED) or removed != (label["heads_removed"], label["ffns_removed"]):
        return None
    return tuple(map(len, heads))


def _documents(job: Mapping[str, Any], table: pa.Table, masks: int) -> str:
    """Says that there is not one row for every mask and document, or that masks tell of different documents."""
    documents = len(table) // masks
    if len(table) != masks * documents or documents != job.get("documents", documents):
        return f"it has {len(table)} rows of {masks} masks"
    rows = {name: table[name].to_numpy().reshape(masks, documents)
            for name in ("mask", "doc_id", "passage", "gold", "num_options", "correct")}
    if (rows["mask"] != np.arange(masks)[:, None]).any():
        return "its rows are not in the order of its masks"
    for name in ("doc_id", "passage", "gold", "num_options"):
        if (rows[name] != rows[name][0]).any():
            return f"its masks do not have the same {name}"
    if len(np.unique(rows["doc_id"][0])) != documents or min(rows["doc_id"].min(), rows["num_options"].min()) < 0:
        return "its documents are none"
    further = [name for name in table.column_names if name not in _EVALUATION]
    if wrong := _types(table, dict.fromkeys(further, "double"), missing=True):
        return wrong
    return "" if np.isfinite(rows["correct"]).all() else "its metric is no number"


def _scored(job: Mapping[str, Any], info: Mapping[str, Any], table: pa.Table) -> str:
    """Says that not every component of a model has every score."""
    oracle, of_heads = job.get("method") == "oracle", job.get("component") == "head"
    needed = ["num_examples", *(["distinct_values"] if oracle and not of_heads else [])]
    if wrong := _counts(info, needed, ("truncated", "distinct_values")):
        return wrong
    component, score, layer, head, importance = (
        table[name].to_numpy() for name in ("component", "score", "layer", "head", "importance"))
    expected = {"head", "ffn"} if not oracle else {"head" if of_heads else "ffn"}
    scores = _SCORES.get(str(job.get("method")), set())
    if {*component} != expected or {*score} != scores:
        return "its components or scores are not those of its job"
    for one in expected:
        of_score = [_places(layer[rows], head[rows]) for rows in ((component == one) & (score == s) for s in scores)]
        if any(places != of_score[0] for places in of_score) or not _is_model(
                of_score[0], ffns=one == "ffn", sampled=job.get("sample") is not None):
            return "its heads or FFNs are not those of a model"
    return "" if np.isfinite(importance).all() else "its importance is no number"


def _places(layers: np.ndarray, heads: np.ndarray) -> list[tuple[int, int]]:
    return sorted(zip(layers.tolist(), heads.tolist(), strict=True))


def _is_model(places: Sequence[tuple[int, int]], *, ffns: bool, sampled: bool) -> bool:
    """Whether these (layer, head) are all of a model; of a sample it is only known that none comes twice."""
    if ffns:
        return [*places] == [(layer, -1) for layer in range(len(places))]
    if sampled:
        return len({*places}) == len(places) and all(layer >= 0 and head >= 0 for layer, head in places)
    numbers: dict[int, int] = {}
    for layer, head in places:
        if layer < 0 or head != numbers.get(layer, 0):
            return False
        numbers[layer] = head + 1
    return True


def _resampled(table: pa.Table) -> str:
    """Says that resampled means are there, but not equally many for every component that has some."""
    if "resampled" not in table.column_names:
        return ""
    lengths = {None if values is None else len(values) for values in table["resampled"].to_pylist()} - {None}
    return "" if len(lengths) <= 1 else "its resampled means are not equally many"


def _texts(info: Mapping[str, Any]) -> str:
    """Says what of the texts of random tokens is not as it is written."""
    reliability, notes, lengths = info.get("reliability", {}), info.get("notes", []), info.get("lengths", [])
    if not isinstance(reliability, Mapping) or not all(type(value) in (float, int) for value in reliability.values()):
        return "its reliability is no number"
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        return "its notes are no text"
    if not isinstance(lengths, list) or not all(map(_is_count, lengths)):
        return "its lengths are no numbers"
    return _counts(info, ("sequences",), ("repeats",))


def _heads(table: pa.Table) -> str:
    places = _places(table["layer"].to_numpy(), table["head"].to_numpy())
    return "" if _is_model(places, ffns=False, sampled=False) else "its heads are not those of a model"
