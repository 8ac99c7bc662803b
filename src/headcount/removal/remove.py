"""`remove(model, mask)`: a model without what the mask leaves out, in memory or as a folder, proved equal each time.

Every folder is proved, in float32 whatever its type. *Blocks*, of the default format: each smaller block puts out what
the masked model's does, before it is written. *Logits*: the folder is read again by headcount's own loader, and gives
the logits of the masked model's plain forward pass; where weights lie on the disk both models leave them there, so that
neither need fit into memory. Of a model that stays in memory (`Removed.model`) blocks and logits are compared, too.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headcount.errors import ModelError, OptionError, named
from headcount.mask_file import MaskFile, check_mask
from headcount.masks import Mask, ffns_named
from headcount.model.contracts import FAILURES, probe_tokens
from headcount.model.devices import device_of
from headcount.model.hooks import ablated
from headcount.model.load import LoadedModel, wrap
from headcount.model.offloaded import offloaded
from headcount.model.placement import DISK, dtype_of, fits, placement
from headcount.model.read import Wanted, quiet, read
from headcount.model.size import weights_size
from headcount.model.source import find
from headcount.removal import certificate, stock
from headcount.removal.cost import Savings, savings, unsaved
from headcount.removal.save import check_place, write_transformers, written
from headcount.removal.slicing import (
    TOLERANCE,
    Plan,
    Walk,
    check_kind,
    fill_rest,
    logits_apart,
    logits_of,
    not_known,
    planned,
)

Format = Literal["transformers", "stock", "masked"]
FORMATS: tuple[Format, ...] = ("transformers", "stock", "masked")
PROMPTS = ("The capital of France is", "Once upon a time there was a")
# What differences are told in.
_DEVIATIONS, _RANGE = "standard deviations of what the block puts out", "of the range of the logits"
# How many tokens each of them has, and how many random ones there are besides.
TOKENS = 8


@dataclass(frozen=True, eq=False)
class Removed:
    """What `remove` gives: the model without some heads and FFNs.

    Attributes:
        loaded: The full model, which stays as it is.
        mask: What stays.
        source: Where the mask comes from, for the certificate; empty where that is not known.
    """

    loaded: LoadedModel
    mask: Mask
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        heads, ffns = len(self.mask.heads_removed), len(self.mask.ffns_removed)
        return (f"Removed({heads} of {self.loaded.anatomy.num_heads} heads and {ffns} of "
                f"{self.loaded.anatomy.num_layers} FFNs of {self.loaded.name})")

    @functools.cached_property
    def plan(self) -> Plan:
        """How the model becomes smaller.

        Raises:
            ModelError: If it is of a family of which it is not known what belongs to a head or an FFN.
        """
        return planned(self.loaded, self.mask)

    @functools.cached_property
    def savings(self) -> Savings:
        """What that saves; raises as `plan` does."""
        return savings(self.plan)

    def __str__(self) -> str:
        try:
            return str(self.savings)
        except ModelError:  # nothing but zeros can be written of it
            return repr(self)

    def savings_as(self, format: Format) -> Savings:
        """What a format saves: zeros nothing."""
        return unsaved(self.loaded, self.mask) if format == "masked" else self.savings

    def check(self, format: Format, out: str | Path | None = None) -> None:
        """Refuse what cannot be written, before anything takes time.

        Args:
            format: As in `save`.
            out: As in `save`; None where only the format is of interest.

        Raises:
            OptionError: If the format is unknown or does not fit the mask, the folder exists or the disk is too full.
            ModelError: If it is not known how the model becomes smaller.
        """
        if format not in FORMATS:
            raise OptionError(f"`format` is one of {', '.join(FORMATS)}, not {format!r}", fields=("format",))
        saved = self.savings_as(format)
        if format != "transformers" and offloaded(self.loaded.model):
            raise ModelError(f"the weights of {self.loaded.name} lie on the disk, and only `format='transformers'` is "
                             "written block by block: load it into memory with `device='cpu'`",
                             fields=("format='transformers'", "device='cpu'"))
        if format == "masked" and getattr(self.loaded.model.config, "headcount", None) is not None:
            raise OptionError(f"{self.loaded.name} is smaller than its family's class already, so that zeros would not "
                              "load anywhere: use `format='transformers'`", fields=("format='transformers'",))
        if format == "stock":
            stock.built(self.plan)
        if out is not None:
            check_place(Path(out), saved.bytes_left)

    @functools.cached_property
    def model(self) -> LoadedModel:
        """The smaller model in memory, a model like any other; its logits were compared with the masked model's.

        Raises:
            ModelError: If they are not the same, or the weights of the full model lie on the disk.
        """
        loaded = self.loaded
        if offloaded(loaded.model):
            raise ModelError(f"the weights of {loaded.name} lie on the disk: save the smaller model and load that")
        # A plan of its own: what is saved later is counted, and cut, from one that has no weights.
        ids, plan = prompts(loaded), planned(loaded, self.mask)
        for _ in Walk(plan, ids).blocks():
            pass
        fill_rest(plan)
        plan.empty.requires_grad_(True)
        plan.empty.generation_config = copy.deepcopy(loaded.model.generation_config)
        made = wrap(plan.empty, loaded.tokenizer, f"{loaded.name} (removed)")
        made = dataclasses.replace(made, apply_chat_template=loaded.apply_chat_template)
        _check(made.model, ids, self._masked_logits(ids), "in memory")
        return made

    def save(
        self, out: str | Path, *, format: Format = "transformers", chosen: Mapping[str, Any] | None = None,
        confirmation: Mapping[str, Any] | None = None, speed: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the smaller model into a new folder, with a certificate and a model card.

        Args:
            out: The folder; it must not exist, and does not unless all went well.
            format: "transformers": really smaller; loads with `trust_remote_code=True`, by `headcount.load` without it.
                "stock": a class of transformers as it is, for masks that leave every layer the same shape. "masked":
                the same shapes, with zeros; loads everywhere and saves nothing.
            chosen: Where the mask comes from, for the certificate; by default what its file says.
            confirmation: What the removal cost on documents that chose nothing, for the certificate.
            speed: What was timed (`headcount.removal.speed`), for the certificate.

        Raises:
            OptionError: If the folder exists, the format is unknown or does not fit the mask, or the disk is full.
            ModelError: If the smaller model is not the masked one, or it is not known how it becomes smaller.
        """
        self.check(format, out)
        out, loaded, saved = Path(out), self.loaded, self.savings_as(format)
        ids, told = prompts(loaded), dict(chosen or self.source) or None
        with written(out, saved.bytes_left) as folder:
            write = self._streamed if format == "transformers" else functools.partial(self._whole, format)
            proofs, expected = write(folder, ids)
            certificate.write(folder, loaded, self.mask, saved, format, proofs, ids, expected, told, confirmation,
                              speed)
        return out

    def _streamed(self, folder: Path, ids: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
        """The default format: block by block; then read again."""
        walk = Walk(self.plan, ids)
        write_transformers(walk, folder)
        _write_beside(self.loaded, folder)
        proofs = [_proof("each block, while it was written", walk.worst, _DEVIATIONS)]
        expected = self._masked_logits(ids)
        return [*proofs, self._reloaded(folder, ids, expected)], expected

    def _whole(self, format: Format, folder: Path, ids: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
        """A format whose tensors have transformers' own names and shapes: written by transformers."""
        loaded = self.loaded
        expected = self._masked_logits(ids)
        if format == "stock":
            stock.write_stock(self.plan, folder)
        else:
            stock.write_masked(loaded, self.mask, folder)
        _write_beside(loaded, folder)
        return [self._reloaded(folder, ids, expected)], expected

    def _masked_logits(self, ids: Tensor) -> Tensor:
        """Logits of the masked model, through its plain forward pass."""
        with ablated(self.loaded.anatomy, self.mask):
            return logits_of(self.loaded.model, ids)

    def _reloaded(self, folder: Path, ids: Tensor, expected: Tensor) -> dict[str, Any]:
        """The proof that the folder, read again, is the masked model."""
        loaded = self.loaded
        place = DISK if offloaded(loaded.model) else str(loaded.device)
        kernel = loaded.model.config.get_text_config()._attn_implementation
        with quiet():
            model, _, _ = read(find(str(folder), None), Wanted(str(folder), loaded.model.dtype, place, kernel))
        error = _check(model, ids, expected, "loaded again")
        return _proof("logits of the whole model, loaded again from the files", error, _RANGE)


def remove(model: LoadedModel, mask: Mask | MaskFile) -> Removed:
    """A model without the heads and FFNs that a mask leaves out: really smaller, and proved equal to the masked model.

    Args:
        model: From `headcount.load` or `headcount.wrap`; it stays as it is.
        mask: What is kept: a mask, or a mask file (`headcount.mask_file`, or `study.mask(...).file`), which is
            compared with the model and names where it comes from.

    Raises:
        OptionError: If the mask is of another model, leaves everything as it is, or leaves out what was removed before.
        ModelError: If the model is quantised, or on several devices.
    """
    source: Mapping[str, Any] = {}
    if not isinstance(mask, Mask | MaskFile):
        raise OptionError(f"a model is removed by a Mask or a MaskFile, such as study.mask(...).file, not by a "
                          f"{type(mask).__name__}")
    if isinstance(mask, MaskFile):
        check_mask(mask, model.name, model.identity, model.anatomy.heads_per_layer)
        source, mask = mask.source, mask.mask
    model.anatomy.check(mask)
    if mask.is_full:
        raise OptionError("the mask leaves everything as it is: name heads or FFNs to remove, or choose a point at "
                          "which something goes")
    if again := [layer for layer in mask.ffns_removed if not model.anatomy.layers[layer].ffn_parameters]:
        raise OptionError(f"{ffns_named(again)} of {model.name} {'was' if len(again) == 1 else 'were'} removed before: "
                          "leave out of the mask what is gone")
    check_kind(model)
    return Removed(model, mask, source)


def fits_twice(name: str, revision: str | None, dtype: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a model and its smaller twin, which is loaded again beside it, fit into memory together.

    Args:
        name: As `headcount.load` takes it.
        revision: As there.
        dtype: As there.
        trust_remote_code: As there.
    """
    size = weights_size(find(name, revision), dtype_of(dtype), trust_remote_code=trust_remote_code)
    return fits(2 * size, placement(None, None))


def prompts(loaded: LoadedModel) -> Tensor:
    """A few short texts as tokens, all of one length, and one of random tokens: what logits are compared on."""
    random = probe_tokens(loaded.model)[0].cpu()
    random = random.repeat(-(-TOKENS // len(random)))[:TOKENS]
    rows = [random]
    for text in PROMPTS:
        known = torch.tensor(loaded.tokenizer(text)["input_ids"][:TOKENS], dtype=torch.long)
        rows.append(torch.cat([known, random])[:TOKENS])
    return torch.stack(rows)


def _check(small: PreTrainedModel, ids: Tensor, expected: Tensor, where: str) -> float:
    """How far the smaller model's logits are from the masked model's; too far is refused."""
    try:
        with torch.no_grad():  # in its own type: what is proved is proved in float32
            small(input_ids=ids[:1].to(device_of(small)), use_cache=False)
        error = logits_apart(logits_of(small, ids), expected)
    except FAILURES as failure:
        raise not_known(small, f"{where}, the smaller model does not run ({named(failure)})") from failure
    if not error <= TOLERANCE:
        raise not_known(small, f"{where}, the smaller model's logits differ from the masked model's by "
                        f"{error:.1e} of their spread, where {TOLERANCE:.0e} is allowed")
    return error


def _proof(what: str, largest: float, unit: str) -> dict[str, Any]:
    return {"what": what, "largest": largest, "tolerance": TOLERANCE, "in": unit}


def _write_beside(loaded: LoadedModel, folder: Path) -> None:
    """The tokenizer, and how the model generates."""
    loaded.tokenizer.save_pretrained(folder)
    generation: Any = getattr(loaded.model, "generation_config", None)
    if generation is not None:
        # As it was read: save_pretrained refuses some settings that it reads.
        generation.to_json_file(folder / "generation_config.json")


