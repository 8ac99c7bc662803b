"""The certificate of a removed model: what was removed, what it cost, what was proved, and how to prove it again.

`headcount.json` says all of it in words that a person can read, with the SHA-256 of every file beside it.
`expected.safetensors` holds the ids of a few short texts and the masked model's logits for them: whoever has a copy of
the folder can load it on a machine of their own and compare (`headcount check`).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM

import headcount
from headcount.errors import ModelError, few, first_line, named
from headcount.masks import Mask
from headcount.model.contracts import FAILURES
from headcount.model.load import LoadedModel, load
from headcount.model.read import quiet
from headcount.model.source import Source
from headcount.model.weight_files import UNREADABLE
from headcount.removal.card import card
from headcount.removal.cost import Savings
from headcount.removal.slicing import TOLERANCE, logits_apart, logits_of

FILE, EXPECTED = "headcount.json", "expected.safetensors"
FORMAT = 1
# A list of numbers or of names of components, over several lines.
_LIST = re.compile(r'\[\n((?:\s*(?:\d+|"L\d+(?:H\d+|F)"),?\n)+)\s*\]')
# What a file is called that may decide what is computed.
_DECIDE = (".safetensors", ".json", ".py", ".bin")
_OF_LICENCE = ("license", "license_name", "license_link", "language")
Backend = Literal["headcount", "transformers"]


def write(
    folder: Path, loaded: LoadedModel, mask: Mask, saved: Savings, format: str, proofs: Sequence[Mapping[str, Any]],
    ids: Tensor, expected: Tensor, chosen: Mapping[str, Any] | None, confirmation: Mapping[str, Any] | None,
    speed: Mapping[str, Any] | None = None,
) -> None:
    """Write the certificate, the expected logits and the model card into a folder that holds all else already."""
    # Not by save_file, whose files nobody but their owner may read.
    (folder / EXPECTED).write_bytes(save({"input_ids": ids.contiguous(), "logits": expected.contiguous()}))
    told = {
        "format": FORMAT, "written_as": format, "headcount": headcount.__version__,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": {"name": loaded.name, "identity": loaded.identity, "class": type(loaded.model).__name__,
                  "dtype": str(loaded.model.dtype).removeprefix("torch."), "notes": list(loaded.notes),
                  "commit": loaded.provenance.get("commit"), "hub": _on_hub(loaded), "licence": _licence(loaded)},
        "removed": {"heads_per_layer": list(loaded.anatomy.heads_per_layer),
                    "heads": [str(head) for head in mask.heads_removed],
                    "ffns": [f"L{layer}F" for layer in mask.ffns_removed]},
        "saved": {**asdict(saved), "share_left": saved.share_left, "prefill_flops_left": saved.time_left},
        "removed_before": _before(loaded), "chosen": chosen, "confirmation": confirmation, "speed": speed,
        "proofs": list(proofs),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__}}
    (folder / "README.md").write_text(card(told), encoding="utf-8")
    told["files"] = {path.name: digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / FILE).write_text(_as_text(told), encoding="utf-8")


def _on_hub(loaded: LoadedModel) -> str | None:
    """The id of the model on the hub; None where it is not from there."""
    source = loaded.provenance.get("source")
    return source if isinstance(source, str) and loaded.provenance.get("commit") is not None else None


def _licence(loaded: LoadedModel) -> dict[str, Any]:
    """What the model's own card says of its licence and language, which are those of what is left of it, too."""
    place, revision = (loaded.provenance.get(name) for name in ("source", "revision"))
    if not isinstance(place, str) or place == "memory" or Path(place).is_file():
        return {}
    card = Source(place, keywords={} if revision is None else {"revision": revision}).card()
    texts = {name: card[name] if isinstance(card.get(name), list) else [card.get(name)] for name in _OF_LICENCE}
    return {name: card[name] for name, said in texts.items() if all(isinstance(one, str) for one in said)}


def _before(loaded: LoadedModel) -> dict[str, Any] | None:
    """What was gone from the model already; None where nothing was."""
    told = getattr(loaded.model.config, "headcount", None)
    if told is None:
        return None
    return {"heads_left_per_layer": list(told["num_heads"]),
            "ffns": [f"L{layer}F" for layer, stays in enumerate(told["ffns"]) if not stays]}


def _as_text(told: Mapping[str, Any]) -> str:
    """JSON for people: lists of numbers and names stand on one line."""
    text = json.dumps(told, indent=1, ensure_ascii=False)
    return _LIST.sub(lambda found: f"[{', '.join(part.strip() for part in found[1].split(',') if part.strip())}]",
                     text) + "\n"


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class CheckedModel:
    """What a removed model's folder was found to be.

    Attributes:
        folder: Which.
        told: Its certificate.
        changed: Files that are not what was written, are gone, or were written by nobody here and may decide what the
            model computes; not the model card, which anyone may edit.
        backend: By what it was loaded.
        largest: The largest difference of logits to what is expected, relative to their spread.
        allowed: How much it may be.
    """

    folder: Path
    told: Mapping[str, Any]
    changed: tuple[str, ...]
    backend: Backend
    largest: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether logits are those expected, and no file that decides them is another."""
        return self.largest <= self.allowed and not self.changed


def certificate_of(folder: Path) -> dict[str, Any]:
    """What a removed model's certificate says.

    Raises:
        ModelError: If it cannot be read.
    """
    try:
        told: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        known = all(isinstance(told[name], dict) for name in ("files", "model", "removed", "saved"))
        known = known and all(isinstance(told["removed"][name], list) for name in ("heads", "ffns"))
        known = known and isinstance(told["model"]["name"], str)
        known = known and isinstance(getattr(torch, told["model"]["dtype"]), torch.dtype) and told["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"the certificate {folder / FILE} cannot be read ({first_line(error)}): copy the folder again"
                         ) from error
    if not known:
        raise ModelError(f"the certificate {folder / FILE} is damaged, or of another version of headcount: copy the "
                         "folder again")
    return told


def kept_with_study(folder: Path, study: Path) -> None:
    """Put a copy of the certificate into the study that chose what was removed, where its page finds it."""
    text, number = (folder / FILE).read_text(encoding="utf-8"), 1
    name = folder.resolve().name
    place = study / "removed" / f"{name}.json"
    place.parent.mkdir(exist_ok=True)
    while place.exists() and place.read_text(encoding="utf-8") != text:  # another folder of this name
        number += 1
        place = study / "removed" / f"{name}-{number}.json"
    place.write_text(text, encoding="utf-8")


def check(folder: Path, backend: Backend = "headcount", device: str | None = None) -> CheckedModel:
    """Prove a removed model's folder on this machine: its files, and its logits by loading it.

    Args:
        folder: As `Removed.save` wrote it, or a copy.
        backend: Load it by headcount's own loader, or by transformers, which runs the code in the folder.
        device: Where; by default the first GPU, else the CPU.

    Raises:
        ModelError: If its certificate cannot be read, or the model cannot be loaded.
    """
    told = certificate_of(folder)
    files = told["files"]
    changed = (*(name for name, known in files.items()
                 if not (folder / name).is_file() or digest(folder / name) != known),
               *sorted(path.name for path in folder.iterdir()
                       if path.suffix in _DECIDE and path.name not in (*files, FILE)))
    try:
        expected = load_file(folder / EXPECTED)
        ids, wanted = expected["input_ids"], expected["logits"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"{folder / EXPECTED} is damaged or not there: copy the folder again") from error
    code = [name for name in changed if name.endswith((".py", ".json"))]
    if code and backend == "transformers":
        raise ModelError(f"{folder} is not what was written ({few(code)} changed), and transformers would run code "
                         "from it: read what changed, or copy the folder again")
    found = _logits(folder, told, backend, device, ids)
    if found.shape != wanted.shape:
        raise ModelError(f"{folder} gives logits of shape {tuple(found.shape)}, where {tuple(wanted.shape)} is "
                         "expected: copy the folder again")
    return CheckedModel(folder, told, tuple(name for name in changed if name != "README.md"), backend,
                   logits_apart(found, wanted), TOLERANCE)


@torch.no_grad()
def _logits(folder: Path, told: Mapping[str, Any], backend: Backend, device: str | None, ids: Tensor) -> Tensor:
    if backend == "headcount":
        try:
            return logits_of(load(folder, device=device).model, ids)
        except FAILURES as error:
            raise ModelError(f"{folder} does not load as it was written ({named(error)}): copy it again") from error
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=told["written_as"] == "transformers",
                dtype=getattr(torch, told["model"]["dtype"]))
        return logits_of(model.eval().to(device or "cpu"), ids)
    except (*UNREADABLE, *FAILURES, ImportError, SyntaxError, AssertionError) as error:
        raise ModelError(f"transformers cannot load {folder} ({' '.join(str(error).split())[:200]}): copy it again"
                         ) from error
