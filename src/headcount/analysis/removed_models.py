"""Models that were removed by a study: copies of their certificates, `removed/NAME.json` in the study's folder.

`headcount remove --study` puts one there for every folder that it writes; the key `speed`, where it is there, is what
`headcount.removal.speed` measured. Anyone may have edited such a file, so all that is read of it is looked at; one that
cannot be read is told by its name, and stops nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from headcount.errors import OptionError, first_line
from headcount.masks import Mask

FOLDER = "removed"
SIDES = ("full", "masked", "removed")
_HEAD, _FFN = re.compile(r"L(\d{1,6})H(\d{1,6})"), re.compile(r"L(\d{1,6})F")
# Beyond these a file is no certificate.
_MOST_BYTES, _MOST_HEADS = 16 * 2**20, 10**6


class SideSpeed(NamedTuple):
    """What was measured of one side: bytes of weights, the most memory, tokens a second of prefill and decoding."""

    bytes: float
    peak_bytes: float
    prefill: float
    decode: float


@dataclass(frozen=True)
class RemovedModel:
    """What a certificate says.

    Attributes:
        name: Of the file.
        damage: Why it cannot be read; all else is then empty.
        mask: What is kept.
        identity: Of the model that it was removed from (`LoadedModel.identity`).
        format: How it was written: "transformers", "stock" or "masked".
        parameters: Of the full model.
        parameters_left: What is left of them; of a masked model as many are zeros, and all are there.
        bytes_left: What its weights take on disk.
        chosen: What the study said of the point, in words.
        confirmed: What the confirmation on other documents said, in words; empty where there was none.
        speed: By side, what was measured.
        timed: On what, in words.
        peak_measured: Whether the most memory is measured; else it is weights and cache.
    """

    name: str
    damage: str = ""
    mask: Mask | None = None
    identity: str = ""
    format: str = ""
    parameters: int = 0
    parameters_left: int = 0
    bytes_left: int = 0
    chosen: str = ""
    confirmed: str = ""
    speed: Mapping[str, SideSpeed] = field(default_factory=dict)
    timed: str = ""
    peak_measured: bool = False


def removed_models(study: Path) -> list[RemovedModel]:
    """Every model of which a certificate lies in a study's folder, by name."""
    folder = study / FOLDER
    return [_read(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []


def _read(path: Path) -> RemovedModel:
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            return RemovedModel(path.stem, "it is longer than any certificate")
        return _from(path.stem, json.loads(raw))
    except (OSError, ValueError, KeyError, TypeError, OptionError, RecursionError) as error:
        said = f"{error.args[0]} is missing" if isinstance(error, KeyError) else first_line(error)
        return RemovedModel(path.stem, said or "it is no certificate")


def _from(name: str, told: Any) -> RemovedModel:
    """Raises KeyError, TypeError, ValueError or OptionError where it is no certificate."""
    saved, removed = _dict(told, "saved"), _dict(told, "removed")
    parameters, left = _count(saved, "parameters"), _count(saved, "parameters_left")
    if not 0 < left <= parameters:
        raise ValueError(f"it says that {left:,} of {parameters:,} parameters are left")
    speed = told.get("speed")
    return RemovedModel(
        name, "", _mask(removed), str(_dict(told, "model").get("identity") or ""), str(told.get("written_as") or ""),
        parameters, left, _count(saved, "bytes_left"), _sentence(told, "chosen"), _sentence(told, "confirmation"),
        {} if speed is None else {side: _side(_dict(_dict(told, "speed"), "sides"), side) for side in SIDES},
        "" if speed is None else f"{_count(speed, 'prefill_tokens')} tokens; {speed.get('device')}, "
        f"{speed.get('dtype')}" + ("; other processes took cores meanwhile" if speed.get("crowded") is True else ""),
        speed is not None and speed.get("peak_measured") is True)


def _mask(removed: Mapping[str, Any]) -> Mask:
    sizes = removed["heads_per_layer"]
    if not isinstance(sizes, list) or not sizes or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError("heads_per_layer is no list of numbers")
    if sum(sizes) + len(sizes) > _MOST_HEADS:
        raise ValueError(f"it says that the model has {sum(sizes):,} heads")
    heads = [_numbers(_HEAD, name) for name in _list(removed, "heads")]
    ffns = [_numbers(_FFN, name) for name in _list(removed, "ffns")]
    return Mask.full(sizes).without_heads((layer, head) for layer, head in heads).without_ffns(
        layer for (layer,) in ffns)


def _numbers(pattern: re.Pattern[str], name: Any) -> list[int]:
    found = pattern.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"{name!r} is the name of no head or FFN")
    return [int(number) for number in found.groups()]


def _side(sides: Mapping[str, Any], name: str) -> SideSpeed:
    side = _dict(sides, name)
    numbers = [side[key] for key in SideSpeed._fields]
    for key, number in zip(SideSpeed._fields, numbers, strict=True):
        if type(number) not in (int, float) or not (math.isfinite(number) and number > 0):
            raise ValueError(f"{key} of side {name} is {number!r}")
    return SideSpeed(*map(float, numbers))


def _dict(told: Any, name: str) -> dict[str, Any]:
    found = told[name] if isinstance(told, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"it has no {name}")
    return found


def _list(told: Mapping[str, Any], name: str) -> list[Any]:
    found = told[name]
    if not isinstance(found, list):
        raise ValueError(f"{name} is no list")
    return found


def _count(told: Mapping[str, Any], name: str) -> int:
    found = told[name]
    if type(found) is not int or found < 0:
        raise ValueError(f"{name} is {found!r}, no number of them")
    return found


def _sentence(told: Mapping[str, Any], name: str) -> str:
    found = told.get(name)
    return str(found.get("sentence") or "") if isinstance(found, dict) else ""
