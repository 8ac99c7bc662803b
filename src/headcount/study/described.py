"""study.json, which says what a folder was asked for: what every version wrote into it, and what this one adds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headcount.errors import StudyError
from headcount.study.ledger import REMEDY
from headcount.study.spec import Part, parts_of


def check_description(description: Mapping[str, Any], path: Path) -> None:
    """Refuse a study.json that lacks what every version wrote, or holds another type there.

    Raises:
        StudyError: With the file and the field.
    """
    def damaged(what: str) -> StudyError:
        return StudyError(f"{path} is damaged ({what}); {REMEDY}", fields=("out",))

    for name in ("spec", "model", "tasks"):
        if not isinstance(description.get(name), dict):
            raise damaged(f"{name} is no object")
    for name in ("tasks", "shots", "measure"):
        if not isinstance(description["spec"].get(name), list):
            raise damaged(f"spec.{name} is no list")
    for name, kind, called in (("protocol", str, "text"), ("seed", int, "whole number")):
        if not isinstance(description["spec"].get(name, kind()), kind):
            raise damaged(f"spec.{name} is no {called}")
    if not isinstance(description["model"].get("fingerprint"), str):
        raise damaged("model.fingerprint is no text")
    for task, known in description["tasks"].items():
        if not isinstance(known, dict) or not isinstance(known.get("fingerprint"), str):
            raise damaged(f"tasks.{task}.fingerprint is no text")


def parts_asked(request: Mapping[str, Any]) -> list[Part]:
    """What of a study a saved request asked for; earlier versions did not say, and head oracles may be among it."""
    spec = request.get("spec", {})
    legacy = [*parts_of({"measure": spec.get("measure", ()), "tasks": spec.get("tasks", ())}), "head_oracle"]
    parts: list[Part] = request.get("parts", legacy if spec else [])
    return parts
