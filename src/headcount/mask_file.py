"""Mask files: which heads and FFNs of which model are removed, as small JSON that people read and write.

    {
      "headcount_mask": 1,
      "model": "HuggingFaceTB/SmolLM2-135M",
      "identity": "2-4f0c...",
      "heads_per_layer": [9, 9, 9],
      "removed_heads": ["L0H1", "L0H7", "L2H0"],
      "removed_ffns": ["L1F"],
      "from": {"study": "my-study", "order": "mean"}
    }

`headcount_mask` is the version of the format. `model` is a name for people. `identity` says which model it is, weights,
config, tokenizer and all (`LoadedModel.identity`); without it any model with these numbers of heads is taken. Layers,
heads and FFNs count from 0, and `L5H1` is head 1 of layer 5. `from` is free: where the mask comes from, what was
measured there. It has the digest of the mask that was measured (`mask_digest`): where the lists were edited since, what
it says of the measurement is dropped. All but `headcount_mask`, `model` and `heads_per_layer` may be left out.

Nothing is guessed: what a person can get wrong by hand (a key that is not known, a head that the model does not have, a
name twice) is refused with the value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headcount.errors import DataError, OptionError, first_line
from headcount.masks import Head, Mask

FORMAT = 1
_KEYS = ("headcount_mask", "model", "identity", "heads_per_layer", "removed_heads", "removed_ffns", "from")
_NEEDED = ("headcount_mask", "model", "heads_per_layer")
# Names as `Head` prints them: the same head cannot be written in two ways.
_NUMBER = "(0|[1-9][0-9]{0,5})"
_HEAD, _FFN = re.compile(f"L{_NUMBER}H{_NUMBER}"), re.compile(f"L{_NUMBER}F")
# Beyond these a file holds something else than a mask, and a number no heads of a model.
_MOST_BYTES, _MOST = 16 * 2**20, 100_000


@dataclass(frozen=True)
class MaskFile:
    """A mask, and the model that it is for.

    Attributes:
        mask: Which heads and FFNs are kept.
        model: What the model is called.
        identity: Which model it is (`LoadedModel.identity`); empty where that is not known.
        source: Where the mask comes from, as plain JSON.
    """

    mask: Mask
    model: str
    identity: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's text, a line for every layer that loses heads; `read_mask` reads it back."""
        by_layer: dict[int, list[str]] = {}
        for head in self.mask.heads_removed:
            by_layer.setdefault(head.layer, []).append(json.dumps(str(head)))
        heads = "[" + ",".join(f"\n    {', '.join(names)}" for names in by_layer.values()) + "\n  ]" * bool(by_layer)
        parts = {"headcount_mask": str(FORMAT), "model": json.dumps(self.model),
                 "identity": json.dumps(self.identity),
                 "heads_per_layer": json.dumps(self.mask.heads_per_layer),
                 "removed_heads": heads if by_layer else "[]",
                 "removed_ffns": json.dumps([f"L{layer}F" for layer in self.mask.ffns_removed]),
                 "from": json.dumps(dict(self.source), allow_nan=False, indent=2).replace("\n", "\n  ")}
        if not self.identity:
            del parts["identity"]
        return "{\n" + ",\n".join(f'  "{name}": {value}' for name, value in parts.items()) + "\n}\n"

    def write(self, path: str | Path) -> None:
        """Write the file, in place of one that is there."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


def read_mask(path: str | Path) -> MaskFile:
    """The mask in a file.

    Raises:
        DataError: If it cannot be read, or is no mask file: with the file and the value.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"mask file {path} cannot be read ({error.strerror or error})", fields=("mask",)) from error
    try:
        return _mask_from(_object_in(raw))
    except _WrongError as wrong:
        raise DataError(f"mask file {path}: {wrong}", fields=("mask",)) from wrong


def check_mask(file: MaskFile, name: str, identity: str, heads_per_layer: Sequence[int]) -> None:
    """Refuse the mask of another model.

    Args:
        file: From `read_mask`.
        name: What the model is called.
        identity: `LoadedModel.identity`.
        heads_per_layer: The model's number of heads of every layer.

    Raises:
        OptionError: If the model has other numbers of heads, or is not the one that the file names.
    """
    theirs, ours = file.mask.heads_per_layer, tuple(heads_per_layer)
    of = f"the `mask` is of another model ({file.model})"
    if len(theirs) != len(ours):
        raise OptionError(f"{of}: of {len(theirs)} layers, and {name} has {len(ours)}", fields=("mask",))
    for layer, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if their != our:
            raise OptionError(f"{of}: of {their} heads in layer {layer}, and {name} has {our} there", fields=("mask",))
    if file.identity and file.identity != identity:
        raise OptionError(f"{of}: {name} has the same numbers of heads, but other weights, config, type, code or "
                          f"tokenizer ({_short(identity)}, in the file {_short(file.identity)}); to remove the same "
                          "heads and FFNs from it take the line \"identity\" out of the file", fields=("mask",))


class _WrongError(Exception):
    """What is wrong with a file's content, without the file's name."""


def _object_in(raw: bytes) -> dict[str, Any]:
    if len(raw) > _MOST_BYTES:
        raise _WrongError("it is longer than any mask; a mask file is what `headcount mask` prints")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        known = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        utf_16 = " but UTF-16, as some shells write what is sent into a file; save it as UTF-8" if known else ""
        raise _WrongError(f"it is no UTF-8 text{utf_16}") from error
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError as error:
        raise _WrongError("it is nested too deeply for a mask") from error
    except json.JSONDecodeError as error:
        raise _WrongError(f"it is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except ValueError as error:
        raise _WrongError(f"it is not JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise _WrongError(f"a mask is a JSON object {{...}}, not {_shown(found)}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two equal keys JSON would silently keep the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _WrongError(f"key {_shown(name)} stands there twice")
        found[name] = value
    return found


def _no_constant(name: str) -> None:
    raise _WrongError(f"{name} is no number of JSON")


def _mask_from(raw: Mapping[str, Any]) -> MaskFile:
    if "headcount_mask" not in raw:
        raise _WrongError(f"it says no \"headcount_mask\": {FORMAT}, by which a mask file is known")
    version = raw["headcount_mask"]
    if version != FORMAT or isinstance(version, bool | float):
        raise _WrongError(f"\"headcount_mask\" is {_shown(version)}; this version of headcount reads format {FORMAT}")
    if unknown := [name for name in raw if name not in _KEYS]:
        raise _WrongError(f"key {_shown(unknown[0])} is not known; there are {', '.join(_KEYS)}")
    for name in _NEEDED:
        if name not in raw:
            raise _WrongError(f"\"{name}\" is missing")
    for name in ("model", "identity"):
        if not isinstance(raw.get(name, ""), str):
            raise _WrongError(f"\"{name}\" is a text, not {_shown(raw[name])}")
    if not isinstance(raw.get("from", {}), dict):
        raise _WrongError(f"\"from\" is an object {{...}}, not {_shown(raw['from'])}")
    full = Mask.full(_heads_per_layer(raw["heads_per_layer"]))
    heads, layers = full.heads_per_layer, len(full.heads_per_layer)
    gone = [Head(layer, head) for layer, head in _named(raw, "removed_heads", _HEAD, "heads", "L5H1")]
    for one in gone:
        if one.layer >= layers:
            raise _WrongError(f"there is no head {one}: the model has {layers} layers, 0 to {layers - 1}")
        if one.head >= heads[one.layer]:
            raise _WrongError(f"there is no head {one}: layer {one.layer} has {heads[one.layer]} heads, counted from 0")
    ffns = [layer for (layer,) in _named(raw, "removed_ffns", _FFN, "FFNs", "L3F")]
    for layer in ffns:
        if layer >= layers:
            raise _WrongError(f"there is no FFN L{layer}F: the model has {layers} layers, 0 to {layers - 1}")
    mask, source = full.without_heads(gone).without_ffns(ffns), raw.get("from", {})
    if source.get("mask_digest", mask.digest()) != mask.digest():
        source = {name: source[name] for name in ("study", "order", "num_fewshot") if name in source} | {
            "edited": True, "sentence": "The mask of a measured point was edited by hand: what is removed was measured "
                                        "by no study."}
    return MaskFile(mask, raw["model"], raw.get("identity", ""), source)


def _heads_per_layer(value: Any) -> list[int]:
    if not isinstance(value, list) or not 0 < len(value) <= _MOST:
        raise _WrongError(f"\"heads_per_layer\" is a list of the number of heads of every layer, not {_shown(value)}")
    for layer, number in enumerate(value):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= _MOST:
            raise _WrongError(f"\"heads_per_layer\" says {_shown(number)} of layer {layer}, no number of heads")
    if sum(value) > 10 * _MOST:
        raise _WrongError(f"\"heads_per_layer\" comes to {sum(value)} heads, more than any model has")
    return value


def _named(raw: Mapping[str, Any], key: str, form: re.Pattern[str], kind: str, example: str) -> list[tuple[int, ...]]:
    """The numbers in the names of a list, each of which stands there once."""
    value = raw.get(key, [])
    if not isinstance(value, list):
        raise _WrongError(f"\"{key}\" is a list of {kind} such as [\"{example}\"], not {_shown(value)}")
    found: dict[str, tuple[int, ...]] = {}
    for name in value:
        match = form.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise _WrongError(f"\"{key}\" names {kind} as \"{example}\", not {_shown(name)}")
        if name in found:
            raise _WrongError(f"\"{key}\" names {name} twice")
        found[name] = tuple(map(int, match.groups()))
    return list(found.values())


def _shown(value: Any) -> str:
    """A value as JSON writes it, cut short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _short(identity: str) -> str:
    return f"{identity[:14]}..." if len(identity) > 14 else identity or "unknown"
