"""What a removal saves, told before anything is computed: parameters, bytes, and the arithmetic of a prefill.

Arithmetic is counted by torch itself (`FlopCounterMode`) on models without weights, for one text of 512 tokens: what
the matrix products and attention of a prefill take, with the logits of the last position alone, as generation has it
(`headcount.removal.speed` times the same pass). A mixture of experts chooses its experts by the values, so that it
cannot be counted without them.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from headcount.masks import Mask
from headcount.model.anatomy import parameters_once
from headcount.model.contracts import FAILURES
from headcount.model.load import LoadedModel
from headcount.model.tensor_format import size
from headcount.removal.slicing import Plan, saved_tensors
from headcount.stats.words import percent

TOKENS = 512


@dataclass(frozen=True)
class Savings:
    """Full against removed.

    Attributes:
        parameters: Of the full model.
        parameters_left: Of the removed one.
        bytes_left: What its weights take on disk.
        flops: Of a prefill of the full model; None where they cannot be counted.
        flops_left: Of the removed one.
        heads: Heads of the full model.
        heads_removed: How many of them go.
        ffns: FFNs of the full model.
        ffns_removed: How many of them go.
    """

    parameters: int
    parameters_left: int
    bytes_left: int
    flops: int | None
    flops_left: int | None
    heads: int
    heads_removed: int
    ffns: int
    ffns_removed: int

    @property
    def share_left(self) -> float:
        """Which share of the parameters is left."""
        return self.parameters_left / self.parameters

    @property
    def time_left(self) -> float | None:
        """Which share of a prefill's arithmetic is left."""
        return None if self.flops is None or self.flops_left is None else self.flops_left / self.flops

    def __str__(self) -> str:
        return (f"{self.heads_removed} of {self.heads} heads and {self.ffns_removed} of {self.ffns} FFNs go: "
                f"{self.what_is_left}")

    @property
    def what_is_left(self) -> str:
        """Parameters, bytes and arithmetic, in words."""
        text = (f"{self.parameters / 1e6:,.1f} M parameters become {self.parameters_left / 1e6:,.1f} M "
                f"({percent(1 - self.share_left, 1)} less), {self.bytes_left / 1e6:,.0f} MB on disk")
        if self.time_left is None:
            return text
        return (f"{text}; a prefill of {TOKENS} tokens should take {percent(1 - self.time_left, 1)} less time, going "
                "by its arithmetic")


def savings(plan: Plan) -> Savings:
    """What a removal saves."""
    loaded, mask = plan.loaded, plan.mask
    return Savings(
        loaded.anatomy.num_parameters, sum(p.numel() for p in plan.empty.parameters()),
        sum(map(size, saved_tensors(plan.empty).values())), flops(_on_meta(loaded.model)), flops(plan.empty),
        loaded.anatomy.num_heads, len(mask.heads_removed), loaded.anatomy.num_layers, len(mask.ffns_removed))


def unsaved(loaded: LoadedModel, mask: Mask) -> Savings:
    """What zeros in place of weights save: nothing."""
    parameters = loaded.anatomy.num_parameters
    counted = flops(_on_meta(loaded.model))
    return Savings(parameters, parameters, sum(map(size, parameters_once(loaded.model))), counted, counted,
                   loaded.anatomy.num_heads, len(mask.heads_removed), loaded.anatomy.num_layers, len(mask.ffns_removed))


def flops(model: PreTrainedModel | None) -> int | None:
    """Floating-point operations of one prefill of 512 tokens; None where they depend on values.

    Args:
        model: On the meta device.
    """
    if model is None:
        return None
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    tokens = min(TOKENS, window)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # Whole masks, since to make them out of others values are looked at.
    mask = torch.zeros(1, 1, tokens, tokens, dtype=model.dtype, device="meta")
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, attention_mask=mask, use_cache=False, **last_position(model))
    except (*FAILURES, NotImplementedError):
        return None
    counted = int(counter.get_total_flops())
    return counted or None


def last_position(model: PreTrainedModel) -> dict[str, int]:
    """The argument by which a forward pass gives the logits of the last position alone; empty where there is none."""
    name = "logits_to_keep"
    return {name: 1} if name in inspect.signature(model.forward).parameters else {}


def _on_meta(model: PreTrainedModel) -> PreTrainedModel | None:
    """The same model without weights."""
    of_model: Any = type(model)
    try:
        with torch.device("meta"):
            made: PreTrainedModel = of_model._from_config(copy.deepcopy(model.config)).eval()
    except FAILURES:
        return None
    return made
