"""What stands in a study's folder already, and whether a study may go on there.

A folder belongs to one model, one data set and one set of options. Tasks, numbers of shots and further measurements
may be added; anything else that would change what a finished entry means is refused.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from headcount.errors import StudyError
from headcount.study.ledger import Ledger
from headcount.study.spec import ModelSpec, StudySpec, scores_of

# Options that do not change what an entry means; all others must be the same whenever a folder is used.
_FREE = ("tasks", "shots", "measure", "unseen", "out", "data", "head_sample", "head_score", "ffn_order", "ffn_score",
         "random_orders", "random_fractions", "common_fractions", "grid_fractions", "grid_order", "grid_limit",
         "transfer_fractions", "transfer_limit", "transfer_components", "aggregate", "induction_seeds",
         "induction_lengths", "skip_control", "prefix_threshold", "copying_threshold", "device", "device_map", "margin",
         "row_tokens", "batch_tokens", "model")
# What induction scores depend on: they are of a model, not of tasks.
_OF_MODEL = (*(f.name for f in dataclasses.fields(ModelSpec)), "protocol", "seed")
# What a run that measures them says of them.
_OF_INDUCTION = ("induction_seeds", "induction_lengths", "skip_control", "prefix_threshold", "copying_threshold")
_LISTS = ("tasks", "shots", "unseen", "measure")


def previous(ledger: Ledger) -> dict[str, Any] | None:
    """What study.json of an earlier run says; None in a folder that is new or empty.

    Raises:
        StudyError: If the folder (or one that it lies in) is a file or cannot be written to, or holds something else.
    """
    there = next(place for place in (ledger.folder, *ledger.folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise StudyError(f"{there} is a file; --out names a folder")
    if not os.access(there, os.W_OK):
        raise StudyError(f"{there} cannot be written to; choose another --out")
    found = ledger.read_json("study.json")
    if found is None and ledger.folder.is_dir() and any(not f.name.startswith(".") for f in ledger.folder.iterdir()):
        raise StudyError(f"{ledger.folder} is not empty and holds no study; choose another --out")
    return found


def check_options(spec: StudySpec, before: Mapping[str, Any] | None, folder: Path) -> None:
    """Refuse other options than the folder's.

    Raises:
        StudyError: Which names the option.
    """
    if before is None:
        return
    known = before["spec"]
    defaults = {f.name: f.default for f in dataclasses.fields(spec)}
    # Where either side has no tasks, options that are about tasks bind nobody.
    of_model = not spec.tasks or not known["tasks"]
    for name, value in spec.to_json().items():
        # An option that a folder does not know came after it: it was measured as by default.
        was = known.get(name, defaults[name])
        if name not in _FREE and was != value and not (of_model and name not in _OF_MODEL):
            raise StudyError(f"{folder} holds another study (--{name.replace('_', '-')} was {was}, "
                             f"is {value}); choose another --out, or give the same options")


def other_orders(spec: StudySpec, before: Mapping[str, Any] | None) -> str:
    """Says that a folder's curves follow other scores than those asked for now; empty where they do not."""
    known = (before or {}).get("spec", {})
    if not known.get("tasks"):
        return ""
    was, now, told = scores_of(known), spec.scores, []
    for component, name in (("head", "heads"), ("ffn", "FFNs")):
        if was[component] != now[component]:
            by_gradient = component == "ffn" and was["ffn"] == was["head"]
            option = f"--{'head' if by_gradient else component}-score {was[component]}"
            if component == "ffn" and by_gradient != (spec.ffn_order == "gradient"):
                option = f"--ffn-order {'gradient' if by_gradient else 'oracle'} {option}"
            told.append(f"{name} by {was[component]} (to go on with these: {option})")
    if not told:
        return ""
    return (f"this folder's curves remove {' and '.join(told)}; new ones, heads by {now['head']} and FFNs by "
            f"{now['ffn']}, are measured beside them and shown instead")


def check_data(
    before: Mapping[str, Any] | None, model: str, tasks: Mapping[str, str], unseen: Collection[str], folder: Path
) -> None:
    """Refuse another model, or other documents, than the folder's; both by fingerprint.

    Raises:
        StudyError: Which names what differs.
    """
    if before is None:
        return
    if before["model"]["fingerprint"] != model:
        raise StudyError(f"{folder} holds a study of another model ({before['model'].get('name')}, other weights, "
                         "type or tokenizer); choose another --out")
    for name, fingerprint in tasks.items():
        if name in unseen and name in before["tasks"]:
            raise StudyError(f"task {name!r} is among the --tasks of {folder}, whose orders it has a part in: it is no "
                             "unseen one there; choose another --out")
        known = before["tasks"].get(name) or before.get("unseen", {}).get(name)
        if known is not None and known["fingerprint"] != fingerprint:
            raise StudyError(f"{folder} holds a study of other documents of task {name!r}, or of another definition of "
                             "it; choose another --out")


def merged_spec(
    spec: StudySpec, before: Mapping[str, Any] | None, tasks: Sequence[str], unseen: Sequence[str]
) -> dict[str, Any]:
    """The options to be kept: lists of what was ever asked for; where now no tasks are named, the others as before."""
    new = spec.to_json() | {"tasks": list(tasks), "unseen": list(unseen)}
    old = (before or {}).get("spec", {})
    # What this run has nothing to say of stays as it was.
    kept = {*(() if "induction" in spec.measure else _OF_INDUCTION)}
    if old.get("tasks") and not tasks:
        kept |= new.keys() - {*_OF_MODEL, *_OF_INDUCTION, "measure"}
    new |= {name: old[name] for name in kept & old.keys()}
    if not old.get("tasks") and tasks:
        old = {"measure": old.get("measure", [])}
    together = {name: list(dict.fromkeys([*old.get(name, []), *new[name]])) for name in _LISTS}
    return new | together | {"unseen": [name for name in together["unseen"] if name not in together["tasks"]]}


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What is known now; where this run did not look, what was known."""
    return {key: old.get(key) if value is None else value for key, value in new.items()}
