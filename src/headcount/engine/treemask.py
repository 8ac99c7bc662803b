"""What a batch is for the model: ids, and the attention mask of its rows.

A batch of token trees needs its own attention mask: position i sees j where j is i itself or stands above it in the
tree. Attention windows count in tokens of a prompt, so in a tree they count in depths: a sliding window of w lets i
see j where `depth_i - depth_j < w`, a chunk of c where `depth_i // c == depth_j // c`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headcount.engine.pack import Batch
from headcount.model.devices import on_device
from headcount.model.load import LoadedModel

# How a model takes the mask of a tree: one for all layers, without or with the window, or one per type of layer.
TreeMask = Literal["plain", "windowed", "by type"]


def model_inputs(
    loaded: LoadedModel, batch: Batch, tree_mask: TreeMask = "plain"
) -> dict[str, Tensor | dict[str, Tensor]]:
    """The model's keyword arguments for a batch: ids, and the mask that its rows need."""
    device = loaded.device
    ids = on_device(batch.ids, device)
    if not batch.is_tree:
        real = np.arange(ids.shape[1])[None] < batch.lengths[:, None]
        return {"input_ids": ids, "attention_mask": on_device(real.astype(np.int64), device)}
    depths = on_device(batch.depths, device)
    masks = {kind: _additive(allowed, loaded.model.dtype) for kind, allowed in _allowed(loaded, batch, depths).items()}
    whole = masks["full_attention"]
    # A model has one window for all its layers, or types of layers that it names.
    windowed = masks.get("sliding_attention", masks.get("chunked_attention", whole))
    chosen = masks if tree_mask == "by type" else windowed if tree_mask == "windowed" else whole
    return {"input_ids": ids, "attention_mask": chosen, "position_ids": depths}


def _allowed(
    loaded: LoadedModel, batch: Batch, depths: Int[Tensor, "batch pos"]
) -> dict[str, Bool[Tensor, "batch pos pos"]]:
    """Which positions see which, by transformers' name of the type of attention."""
    ends = on_device(batch.ends, depths.device)
    index = torch.arange(depths.shape[1], device=depths.device)
    tree = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < ends[:, None, :])
    config = loaded.model.config.get_text_config()
    allowed = {"full_attention": tree}
    if window := getattr(config, "sliding_window", None):
        allowed["sliding_attention"] = tree & (depths[:, :, None] - depths[:, None, :] < window)
    if chunk := getattr(config, "attention_chunk_size", None):
        allowed["chunked_attention"] = tree & (depths[:, :, None] // chunk == depths[:, None, :] // chunk)
    return allowed


def _additive(allowed: Bool[Tensor, "batch pos pos"], dtype: torch.dtype) -> Float[Tensor, "batch one pos pos"]:
    """Added to attention scores, in the model's type: right for eager attention, which adds masks, and for SDPA."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
