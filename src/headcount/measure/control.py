"""The control of induction: the same model with random weights, in memory or in files."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedModel

from headcount.errors import ModelError
from headcount.model.load import LoadedModel, wrap
from headcount.model.placement import DISK
from headcount.model.random_weights import random_in_files, space_needed


def control_needs(loaded: LoadedModel) -> str:
    """Says what the control (`randomised`) will take of the disk; empty where it takes none.

    Raises:
        ModelError: If the disk has less.
    """
    if DISK in getattr(loaded.model, "hf_device_map", {}).values():
        needed, folder = space_needed(loaded.name, loaded.model)
        return (f"the control of induction, the same model with random weights, will take {needed:,} bytes in {folder} "
                "while it is measured")
    return ""


def randomised(loaded: LoadedModel, seed: int = 0) -> LoadedModel:
    """The same model with random weights, by its own initialisation, and the same tokenizer: a control.

    It takes as much memory as the model, on the same devices; where some of the model's weights lie in files, all of
    its lie in a temporary folder of the user's cache, which goes with it. Weights are the same in both cases. The
    random number generators are left as they were.

    Args:
        loaded: The model.
        seed: Of the weights.

    Raises:
        ModelError: If memory is too small for a second model, or the disk for its files.
    """
    model = loaded.model
    config = copy.deepcopy(model.config)
    with contextlib.suppress(AttributeError):
        del config.quantization_config
    devices = getattr(model, "hf_device_map", {})
    spread = len(set(devices.values())) > 1
    maker: Any = type(model)

    def drawn() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with torch.device("cpu" if spread else loaded.device):
                made: PreTrainedModel = maker._from_config(config, dtype=model.dtype,
                                                           attn_implementation=config._attn_implementation)
        return made

    try:
        if DISK in devices.values():
            space_needed(loaded.name, model)  # raises where the disk has less
            made = random_in_files(loaded.name, drawn, loaded.device, loaded.names)
        else:
            made = drawn()
            if spread:
                made = dispatch_model(made, devices, skip_keys=made._skip_keys_device_placement)
    except RuntimeError as error:
        # The CPU's allocator has no type of its own.
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        raise ModelError(f"memory is too small for {loaded.name} and the same model with random weights beside it, the "
                         "control of copying: leave it out (`skip_control`)",
                         fields=("skip_control",)) from error
    note = f"all weights are random, by the model's own initialisation (seed {seed})"
    control = wrap(made, loaded.tokenizer, f"{loaded.name} (random weights)", loaded.names)
    return dataclasses.replace(control, notes=(*control.notes, note), apply_chat_template=loaded.apply_chat_template,
                               stream_memory=loaded.stream_memory, together=loaded.together)
