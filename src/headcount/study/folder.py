"""What stands in a study's folder already, and whether a study may go on there.

A folder belongs to one model, one protocol and one set of seeds: options whose metadata say that they bind. Options
that decide how the model is loaded bind by what they lead to: its fingerprint, type and attention kernel. Everything
else belongs to jobs. A run adds to what was asked before, or, where it says otherwise, is a request of its own
(`request`); all requests are kept in a list.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headcount.errors import StudyError
from headcount.study.described import check_description, parts_asked
from headcount.study.ledger import Ledger
from headcount.study.spec import ModelSpec, Part, StudySpec, fields_that, readers, scores_of, with_later

if TYPE_CHECKING:
    from headcount.model.load import LoadedModel

# Names under which different ones are different for sure; others may stand for one of these.
_TYPES = ("float32", "bfloat16", "float16")
_KERNELS = ("eager", "sdpa", "flash_attention_2", "flex_attention")
# What a run was asked, and what it knew then of tasks.
ASKED = ("spec", "parts", "tasks", "unseen")


def previous(ledger: Ledger) -> dict[str, Any] | None:
    """What study.json of an earlier run says; None in a folder that is new or empty.

    Raises:
        StudyError: If the folder (or one that it lies in) is a file or cannot be written to, or holds something else.
            Where only study.json is gone, the entries are found by their names, and the folder counts as new.
    """
    there = next(place for place in (ledger.folder, *ledger.folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise StudyError(f"{there} is a file; `out` names a folder", fields=("out",))
    if not os.access(there, os.W_OK):
        raise StudyError(f"{there} cannot be written to; choose another `out`", fields=("out",))
    description = ledger.read_json("study.json")
    if description is None and ledger.folder.is_dir() and not ledger.is_begun() and any(
            not f.name.startswith(".") for f in ledger.folder.iterdir()):
        raise StudyError(f"{ledger.folder} is not empty and holds no study; choose another `out`", fields=("out",))
    if description is not None:
        check_description(description, ledger.folder / "study.json")
    return description


def check_options(spec: StudySpec, before: Mapping[str, Any] | None, folder: Path) -> None:
    """Refuse other options than the folder's, of those that bind it; of those that load the model, what differs surely.

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
            raise _another(folder, name, was, asked[name])
    for name, sure in (("dtype", _TYPES), ("attn_implementation", _KERNELS)):
        was = before["model"].get(name)
        if was in sure and asked[name] in sure and was != asked[name]:
            raise _another(folder, name, was, asked[name])


def _another(folder: Path, name: str, was: object, now: object) -> StudyError:
    return StudyError(f"{folder} holds another study (`{name}` was {was}, is {now}); choose another `out`, or give the "
                      "same options", fields=(name, "out"))


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


def check_model(loaded: LoadedModel, before: Mapping[str, Any] | None, ledger: Ledger) -> str:
    """Refuse another model than the folder's, whichever options led to it; gives the identity that its entries have.

    A folder of an earlier version goes on by the identity of that version. From then on it holds the present one, too,
    which is compared as well. Where study.json is gone, the entries say which model it was.

    Raises:
        StudyError: Which names what differs.
    """
    from headcount.model.fingerprint import KIND

    folder = ledger.folder
    if before is None:
        models = {str(job.get("model")) for job, _ in ledger.descriptions()}
        if not models or loaded.identity in models:
            return loaded.identity
        if loaded.earlier_identity in models:
            return loaded.earlier_identity
        raise StudyError(f"{folder} holds entries of another model, and no study.json; choose another `out`",
                         fields=("out",))
    known = before["model"]
    for name in ("dtype", "attn_implementation"):
        if known.get(name) not in (None, loaded.provenance[name]):
            raise _another(folder, name, known[name], loaded.provenance[name])
    named: str = known["fingerprint"]
    own = loaded.identity if named.startswith(KIND) else loaded.earlier_identity
    if named != own or known.get("identity", loaded.identity) != loaded.identity:
        raise StudyError(f"{folder} holds a study of another model ({known.get('name')}, other weights, type, code or "
                         "tokenizer); choose another `out`", fields=("out",))
    return own


def check_data(
    spec: StudySpec, before: Mapping[str, Any] | None, tasks: Mapping[str, str], unseen: Collection[str], folder: Path,
) -> None:
    """Refuse other documents than the folder's, by fingerprint.

    The split that importance is measured on is part of a task's fingerprint: with another one everything is measured
    anew, beside what is there.

    Raises:
        StudyError: Which names what differs.
    """
    if before is None:
        return
    same_split = before["spec"].get("examples_split", "train") == spec.examples_split
    for name, fingerprint in tasks.items():
        if name in unseen and name in before["tasks"]:
            raise StudyError(f"task {name!r} is among the tasks of {folder}, whose orders it has a part in: it is no "
                             "unseen one there; choose another `out`", fields=("out",))
        known = before["tasks"].get(name) or before.get("unseen", {}).get(name)
        if known is not None and known["fingerprint"] != fingerprint and same_split:
            raise StudyError(f"{folder} holds a study of other documents of task {name!r}, or of another definition of "
                             "it; choose another `out`", fields=("out",))


def request(
    spec: StudySpec, parts: Sequence[Part], before: Mapping[str, Any] | None, tasks: Sequence[str],
    unseen: Sequence[str],
) -> dict[str, Any]:
    """What is asked of a folder from now on: this run, and of what was asked before all that this run leaves as it was.

    A run says something of the options that its parts read. Where it says otherwise than before, what was asked before
    is another request: of its parts those that read such an option are no longer shown, unless this run measures them
    as well; and if it named tasks or numbers of shots that this run does not name, these are no longer shown, nor any
    other part of tasks. Where it says the same, its parts, tasks and numbers of shots are added to those from before.

    Args:
        spec: What is asked now.
        parts: What of a study this run measures.
        before: What was asked before, as saved.
        tasks: Names of the tasks.
        unseen: Names of those that are only pruned by others' orders.

    Returns:
        Options ("spec") and "parts", to be saved.
    """
    new = spec.to_json() | {"tasks": list(tasks), "unseen": list(unseen)}
    old: Mapping[str, Any] = with_later((before or {}).get("spec", {}))
    read = readers()
    said = {name for name, read_by in read.items() if {*read_by} & {*parts}}
    if not tasks:
        said |= {f.name for f in dataclasses.fields(ModelSpec)}
    silent = read.keys() if tasks else new.keys() - fields_that(StudySpec, "binds")
    otherwise = {name for name in said & read.keys() & old.keys() if old[name] != new[name]}
    kept = [part for part in parts_asked(before or {}) if part in parts or not any(
        part in read[name] for name in otherwise)]
    new |= {name: old[name] for name in (silent - said) & old.keys()}
    names = ("tasks", "shots", "unseen")
    apart = bool(tasks and otherwise) and any({*old.get(name, ())} - {*new[name]} for name in names)
    if apart:
        kept = [part for part in kept if part == "induction"]
    for name in names:
        if old.get("tasks") and not apart:
            new[name] = list(dict.fromkeys([*old.get(name, []), *new[name]]))
    all_parts = list(dict.fromkeys([*kept, *parts]))
    measure = dict.fromkeys([*old.get("measure", ()), *spec.measure])
    new["measure"] = [name for name in measure if name == "curves" or name in all_parts]
    new["unseen"] = [name for name in new["unseen"] if name not in new["tasks"] and "transfer" in all_parts]
    return {"spec": new, "parts": all_parts}


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What is known now; where this run did not look, what was known. Of numbers of shots, those of this run anew."""
    known = {key: old.get(key) if value is None else value for key, value in new.items()}
    if "by_shots" in known:
        before = old.get("by_shots", {})
        known["by_shots"] = before | {k: merged(before.get(k, {}), of_k) for k, of_k in new["by_shots"].items()}
    return known


def asked_before(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All that was asked of a folder, oldest first, what is asked now last; what that shows as well is left out."""
    earlier: list[dict[str, Any]] = []
    if before is not None:
        earlier = before.get("asked") or [{name: before[name] for name in ASKED if name in before}]
    return [*(one for one in earlier if not _is_part(one, now)), {name: now[name] for name in ASKED}]


def _is_part(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether all that an earlier request shows is shown by a later one, too."""
    parts, spec, later = parts_asked(one), with_later(one["spec"]), other["spec"]
    named = all({*spec.get(name, ())} <= {*later[name]} for name in ("tasks", "shots", "unseen"))
    alike = all(spec.get(name) == later[name] for name, read_by in readers().items() if {*read_by} & {*parts})
    documents = all(_same_documents(known, other[kind].get(task, {}))
                    for kind in ("tasks", "unseen") for task, known in one.get(kind, {}).items())
    return named and alike and documents and {*parts} <= {*parts_asked(other)}


def _same_documents(known: Mapping[str, Any], later: Mapping[str, Any]) -> bool:
    """Whether a task has the documents that it had; a run that did not look at a split says None of it."""
    return known["fingerprint"] == later.get("fingerprint") and all(
        number in (None, later.get("by_shots", {}).get(k, {}).get(name))
        for k, numbers in known.get("by_shots", {}).items() for name, number in numbers.items())
