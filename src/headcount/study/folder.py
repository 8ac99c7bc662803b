"""What stands in a study's folder already, and whether a study may go on there.

A folder belongs to one model, one protocol and one set of seeds: options whose metadata say that they bind. Everything
else belongs to jobs. Tasks, numbers of shots and further measurements are added to those that were asked for before;
of other options the last ones asked for are shown, and what was asked before is kept in a list.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from headcount.errors import StudyError
from headcount.study.ledger import Ledger
from headcount.study.spec import ModelSpec, StudySpec, fields_that, scores_of

# What a run was asked, and what it knew then of tasks.
ASKED = ("spec", "tasks", "unseen")


def previous(ledger: Ledger) -> dict[str, Any] | None:
    """What study.json of an earlier run says; None in a folder that is new or empty.

    Raises:
        StudyError: If the folder (or one that it lies in) is a file or cannot be written to, or holds something else.
    """
    there = next(place for place in (ledger.folder, *ledger.folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise StudyError(f"{there} is a file; out names a folder", fields=("out",))
    if not os.access(there, os.W_OK):
        raise StudyError(f"{there} cannot be written to; choose another out", fields=("out",))
    description = ledger.read_json("study.json")
    if description is None and ledger.folder.is_dir() and any(
            not f.name.startswith(".") for f in ledger.folder.iterdir()):
        raise StudyError(f"{ledger.folder} is not empty and holds no study; choose another out", fields=("out",))
    if description is not None:
        check_description(description, ledger.folder / "study.json")
    return description


def check_description(description: Mapping[str, Any], path: Path) -> None:
    """Refuse a study.json that lacks what every version wrote, or holds another type there.

    Raises:
        StudyError: With the file and the field.
    """
    for name in ("spec", "model", "tasks"):
        if not isinstance(description.get(name), dict):
            raise _damaged(path, f"{name} is no object")
    for name in ("tasks", "shots", "measure"):
        if not isinstance(description["spec"].get(name), list):
            raise _damaged(path, f"spec.{name} is no list")
    for name, kind, called in (("protocol", str, "text"), ("seed", int, "whole number")):
        if not isinstance(description["spec"].get(name, kind()), kind):
            raise _damaged(path, f"spec.{name} is no {called}")
    if not isinstance(description["model"].get("fingerprint"), str):
        raise _damaged(path, "model.fingerprint is no text")
    for task, known in description["tasks"].items():
        if not isinstance(known, dict) or not isinstance(known.get("fingerprint"), str):
            raise _damaged(path, f"tasks.{task}.fingerprint is no text")


def _damaged(path: Path, what: str) -> StudyError:
    return StudyError(f"{path} is damaged ({what}); choose another out, or delete that folder", fields=("out",))


def check_options(spec: StudySpec, before: Mapping[str, Any] | None, folder: Path) -> None:
    """Refuse other options than the folder's, of those that bind it.

    Raises:
        StudyError: Which names the option.
    """
    if before is None:
        return
    known, asked = before["spec"], spec.to_json()
    defaults = {f.name: f.default for f in dataclasses.fields(spec)}
    for name in fields_that(type(spec), "binds"):
        # An option that a folder does not know came after it: it was measured as by default.
        was = known.get(name, defaults[name])
        if was != asked[name]:
            raise StudyError(f"{folder} holds another study ({name} was {was}, is {asked[name]}); choose another out, "
                             "or give the same options", fields=(name, "out"))


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
    spec: StudySpec, before: Mapping[str, Any] | None, model: str, tasks: Mapping[str, str], unseen: Collection[str],
    folder: Path,
) -> None:
    """Refuse another model, or other documents, than the folder's; both by fingerprint.

    The split that importance is measured on is part of a task's fingerprint: with another one everything is measured
    anew, beside what is there.

    Raises:
        StudyError: Which names what differs.
    """
    if before is None:
        return
    if before["model"]["fingerprint"] != model:
        raise StudyError(f"{folder} holds a study of another model ({before['model'].get('name')}, other weights, "
                         "type or tokenizer); choose another out", fields=("out",))
    same_split = before["spec"].get("examples_split", "train") == spec.examples_split
    for name, fingerprint in tasks.items():
        if name in unseen and name in before["tasks"]:
            raise StudyError(f"task {name!r} is among the tasks of {folder}, whose orders it has a part in: it is no "
                             "unseen one there; choose another out", fields=("out",))
        known = before["tasks"].get(name) or before.get("unseen", {}).get(name)
        if known is not None and known["fingerprint"] != fingerprint and same_split:
            raise StudyError(f"{folder} holds a study of other documents of task {name!r}, or of another definition of "
                             "it; choose another out", fields=("out",))


def merged_spec(
    spec: StudySpec, before: Mapping[str, Any] | None, tasks: Sequence[str], unseen: Sequence[str]
) -> dict[str, Any]:
    """The options to be kept: lists of what was ever asked for; where now no tasks are named, the others as before."""
    new = spec.to_json() | {"tasks": list(tasks), "unseen": list(unseen)}
    old = (before or {}).get("spec", {})
    of_induction = fields_that(StudySpec, "induction")
    # What this run has nothing to say of stays as it was.
    kept = {*(() if "induction" in spec.measure else of_induction)}
    if old.get("tasks") and not tasks:
        of_model = {*(f.name for f in dataclasses.fields(ModelSpec)), *fields_that(StudySpec, "binds")}
        kept |= new.keys() - {*of_model, *of_induction, "measure"}
    new |= {name: old[name] for name in kept & old.keys()}
    if not old.get("tasks") and tasks:
        old = {"measure": old.get("measure", [])}
    together = {name: list(dict.fromkeys([*old.get(name, []), *new[name]])) for name in fields_that(StudySpec, "grows")}
    return new | together | {"unseen": [name for name in together["unseen"] if name not in together["tasks"]]}


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What is known now; where this run did not look, what was known. Of numbers of shots, those of this run anew."""
    known = {key: old.get(key) if value is None else value for key, value in new.items()}
    if "by_shots" in known:
        before = old.get("by_shots", {})
        known["by_shots"] = before | {k: merged(before.get(k, {}), of_k) for k, of_k in new["by_shots"].items()}
    return known


def asked_before(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All that was asked of a folder, oldest first, this run last; what was asked twice stands where it was last."""
    asked = {name: now[name] for name in ASKED}
    earlier = [] if before is None else before.get("asked") or [{name: before.get(name, {}) for name in ASKED}]
    return [*(one for one in earlier if not _alike(one, asked)), asked]


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs show the same: what the later one adds to lists does not count."""
    passed_over = fields_that(StudySpec, "grows") + fields_that(StudySpec, "means")
    return all(one["spec"].get(name) == value for name, value in other["spec"].items()
               if name not in passed_over) and all(
        task in other["tasks"] and {k: v for k, v in known.get("by_shots", {}).items()
                                    if other["tasks"][task].get("by_shots", {}).get(k) != v} == {}
        for task, known in one["tasks"].items())
