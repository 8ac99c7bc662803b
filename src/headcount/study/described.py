"""study.json, which says what a folder was asked for: what every version wrote into it, and what this one adds."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from headcount.errors import StudyError
from headcount.study.ledger import REMEDY
from headcount.study.spec import Part, parts_of


class _Shots(TypedDict, total=False):
    documents: int | None
    examples: int | None
    shared_shots: bool


class _Task(TypedDict, total=False):
    fingerprint: Required[str]
    metric: str
    documents: int | None
    examples: int | None
    by_shots: dict[str, _Shots]
    constant_answer: float | None
    constant_places: list[int] | None
    notes: list[str]


class _Request(TypedDict, total=False):
    spec: dict[str, Any]
    parts: list[str]
    tasks: dict[str, _Task]
    unseen: dict[str, _Task]


class _Anatomy(TypedDict, total=False):
    heads_per_layer: Required[list[Annotated[int, Field(ge=0)]]]
    kv_groups_per_layer: list[Annotated[int, Field(ge=0)]]
    parameters: int
    parameters_per_head: list[int]
    parameters_per_ffn: list[int]


class _Cost(TypedDict):
    batch: float
    doubled: float


class _Budget(TypedDict):
    device: str
    batch_tokens: int
    gradient_tokens: int
    longest_row: int
    cost: _Cost


class _Description(_Request, total=False):
    """What of study.json is read; everything but the first of its parts came later or may be absent."""

    asked: Annotated[list[_Request], Field(min_length=1)]
    anatomy: _Anatomy
    budget: _Budget | None
    commands: list[str]
    masks: str | None


@functools.cache
def _adapter() -> Any:
    return TypeAdapter(_Description)


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
    asked = description.get("asked")
    places = {"": description} | {f"asked.{i}.": one for i, one in enumerate(asked if isinstance(asked, list) else [])
                                  if isinstance(one, dict) and "spec" in one}
    for place, one in places.items():
        if not isinstance(spec := one["spec"], dict):
            raise damaged(f"{place}spec is no object")
        for name in ("tasks", "shots", "measure"):
            if not isinstance(spec.get(name), list):
                raise damaged(f"{place}spec.{name} is no list")
        for name, kind, called in (("protocol", str, "text"), ("seed", int, "whole number")):
            if not isinstance(spec.get(name, kind()), kind):
                raise damaged(f"{place}spec.{name} is no {called}")
    if not isinstance(description["model"].get("fingerprint"), str):
        raise damaged("model.fingerprint is no text")
    for task, known in description["tasks"].items():
        if not isinstance(known, dict) or not isinstance(known.get("fingerprint"), str):
            raise damaged(f"tasks.{task}.fingerprint is no text")
    if any("by_shots" in known for known in description["tasks"].values()) and "anatomy" not in description:
        raise damaged("anatomy is no object")
    try:
        _adapter().validate_python(dict(description), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def parts_asked(request: Mapping[str, Any]) -> list[Part]:
    """What of a study a saved request asked for; earlier versions did not say, and head oracles may be among it."""
    spec = request.get("spec", {})
    legacy = [*parts_of({"measure": spec.get("measure", ()), "tasks": spec.get("tasks", ())}), "head_oracle"]
    parts: list[Part] = request.get("parts", legacy if spec else [])
    return parts
