"""Contract 3, on the user's own model: run block by block, sharing between masks, logits are those of the plain pass.

A model that fails it is measured all the same, one plain pass for each mask. The other two contracts are in
`headcount.model.contracts`.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from headcount.engine.sweep import Sweep
from headcount.masks import Mask
from headcount.model.anatomy import Anatomy
from headcount.model.contracts import FAILURES, PROBE_TOKENS, ContractResult, probe_tokens, relative_error
from headcount.model.hooks import ablated


def verify_sweep(model: PreTrainedModel, anatomy: Anatomy) -> ContractResult:
    """Test contract 3: masks that part from the full model in the first, last and some middle layers, and all at once.

    Args:
        model: In eval mode.
        anatomy: Its heads and FFNs.
    """
    name = "run layer by layer, the model computes the same"
    first = probe_tokens(model)
    ids = torch.cat([first, first.flip(1)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows, positions = torch.tensor([0, 1]), torch.tensor([PROBE_TOKENS // 2, PROBE_TOKENS - 1])
    masks = _parting(anatomy)
    worst, where = 0.0, ""
    try:
        with torch.no_grad():
            for owners, logits in Sweep(model, anatomy).logits(inputs, masks, rows, positions):
                for i in owners:
                    with ablated(anatomy, masks[i]):
                        plain = model(**inputs, use_cache=False).logits
                    expected = plain[rows.to(plain.device), positions.to(plain.device)]
                    error = relative_error(logits.cpu().double(), expected.cpu().double())
                    if not error <= worst:
                        worst, where = error, f"{masks[i]}"
    except FAILURES as failure:
        return ContractResult(name, False, float("inf"), f"blocks cannot be called by themselves ({failure})")
    holds = worst <= max(1e-5, 16 * torch.finfo(model.dtype).eps)
    return ContractResult(name, holds, worst, "" if holds else f"it does not for {where}")


def _parting(anatomy: Anatomy) -> list[Mask]:
    full = Mask.full(anatomy.heads_per_layer)
    last = anatomy.num_layers - 1
    masks = [full]
    for layer in sorted({0, last // 3, last // 2, max(last - 1, 0), last}):
        heads = [(layer, h) for h in range(anatomy.heads_per_layer[layer])]
        masks += [full.without_ffns([layer]), full.without_heads(heads[: (len(heads) + 1) // 2]),
                  full.without_heads(heads), full.without_heads(heads).without_ffns([layer])]
    everywhere = [(layer, 0) for layer, n in enumerate(anatomy.heads_per_layer) if n]
    return [*masks, full.without_heads(everywhere), full.without_ffns(range(0, last + 1, 2))]
