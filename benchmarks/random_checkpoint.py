"""A checkpoint of random weights, written tensor by tensor: models of any size without downloading or holding one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from headcount.removal.shards import Shards


def write(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write config, tokenizer and weights, the config last: a folder that has one is whole.

    Weights of norms are 1, everything else is normal with standard deviation 0.02.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shapes = dict(model.named_parameters())
    shards, generator = Shards(folder, shapes), torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        value = torch.ones(shape.shape, dtype=dtype)
        norm = value.dim() == 1 and name.endswith("weight")
        shards.write(name, value if norm else value.normal_(0, 0.02, generator=generator))
    shards.close()
    tokenizer.save_pretrained(folder)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(folder)
