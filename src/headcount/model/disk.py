"""A model whose weights stay in their files: transformers builds it without values, and each is read when it is needed.

`from_pretrained` is given the checkpoint's tensors without values (on the meta device), by their names there. So
everything that it does is done by it: types, tied weights, buffers that are computed from the config. Then accelerate's
offloading hooks are put on, with a map that reads from the checkpoint's own files, or from those that it was rewritten
into (`headcount.model.blockfiles`). Buffers that were saved are read at once: they are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import Tensor
from transformers import PreTrainedModel

from headcount.model.anatomy import Names
from headcount.model.block_cache import Rewriting
from headcount.model.blockfiles import BlockFiles, Checkpoint, block_files
from headcount.model.placement import DISK


@dataclass(frozen=True, eq=False)
class InFiles(Mapping[str, Tensor]):
    """The weights of a model by name, each read when it is asked for.

    Attributes:
        files: Where they lie.
    """

    files: BlockFiles

    def __getitem__(self, name: str) -> Tensor:
        return self.files.read_named([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files.names(""))

    def __len__(self) -> int:
        return len(self.files.names(""))


def left_in_files(
    opened: Checkpoint, build: Callable[..., PreTrainedModel], device: str, *, names: Names | None = None,
    progress: Rewriting | None = None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model of a checkpoint, whose weights stay in its files.

    Args:
        opened: The checkpoint.
        build: The class's `from_pretrained`, all arguments given but `state_dict` and `device_map`.
        device: Where it runs.
        names: Names of the model's parts, where they are not found.
        progress: Told before anything is rewritten and after every file.

    Returns:
        The model, and what must be said of it.

    Raises:
        ModelError: If the checkpoint is not the model's, or cannot be read block by block.
    """
    model = build(state_dict=opened.without_values(), device_map={"": "meta"})
    _compute_buffers(model)
    files = block_files(opened, model, model.dtype, names=names, progress=progress)
    # Without values transformers cannot see whether two weights that a checkpoint holds are one, as its config says.
    first = files.tied.get
    model.all_tied_weights_keys = {one: other for one, other in model.all_tied_weights_keys.items()
                                   if first(one, one) == first(other, other)}
    _read_buffers(model, files)
    read_when_called(model, files, torch.device(device))
    return model, files.notes


def read_when_called(model: PreTrainedModel, files: BlockFiles, device: torch.device) -> None:
    """Let each module of a model without weights read its own when it is called.

    Args:
        model: The model; its buffers have values.
        files: Where its weights lie.
        device: Where it runs.
    """
    whole: dict[str, Any] = {"": device}
    attach_align_device_hook_on_blocks(model, whole, offload={"": True}, weights_map=InFiles(files),
                                       skip_keys=model._skip_keys_device_placement)
    model.hf_device_map = {"": DISK}  # type: ignore[assignment]


def _compute_buffers(model: PreTrainedModel) -> None:
    """Give buffers that no file holds their values, as `from_pretrained` does where a model is in memory."""
    model._move_missing_keys_from_meta_to_device(set(), None, None, None)  # type: ignore[arg-type]
    for name, _ in model.named_non_persistent_buffers():
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        owner._is_hf_initialized = False  # it was, without values
    model._initialize_missing_keys(is_quantized=False)


def _read_buffers(model: PreTrainedModel, files: BlockFiles) -> None:
    saved = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    for name, value in files.read_named(saved).items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = value.clone()
