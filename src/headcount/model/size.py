"""How many bytes a model's weights will take, found before they are read: of their files, or of the config alone.

Files that lie here say it by their lengths. Where they do not (a hub id of which the config is known), the model is
built without weights and counted.
"""

from __future__ import annotations

import json
import os

import torch

from headcount.errors import ModelError
from headcount.model.read import quiet, skeleton
from headcount.model.source import Source
from headcount.model.weight_files import files_read

# A GGUF file's four bits and more become 32.
_DEQUANTISED = 8
# What the model's own class, or what it imports, raises that cannot be built: it is told when the model is loaded.
_NOT_BUILT = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, OSError, ImportError)


def weights_size(source: Source, dtype: str | torch.dtype, *, trust_remote_code: bool = False) -> int:
    """Bytes of a model's weights in memory; 0 where it cannot be known, as of what cannot be loaded either.

    Args:
        source: Where its files are.
        dtype: The type that is wanted; a text is "auto".
        trust_remote_code: Whether code that comes with the model may run.
    """
    if source.gguf is not None:
        return _DEQUANTISED * os.path.getsize(source.gguf)
    try:
        return _of_files(source, dtype) or _of_config(source, dtype, trust_remote_code=trust_remote_code)
    except (ModelError, *_NOT_BUILT):
        return 0


def _of_files(source: Source, dtype: str | torch.dtype) -> int:
    folder = source.folder
    size = 0 if folder is None else sum(path.stat().st_size for path in files_read(folder, None))
    if folder is None or not size or isinstance(dtype, str):
        return size
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = getattr(torch, str(told.get("dtype") or told.get("torch_dtype")), torch.float32)
    return int(size * dtype.itemsize // stored.itemsize)


def _of_config(source: Source, dtype: str | torch.dtype, *, trust_remote_code: bool) -> int:
    with quiet():
        model = skeleton(source, trust_remote_code=trust_remote_code)
    kind = getattr(model.config, "dtype", None) or torch.float32 if isinstance(dtype, str) else dtype
    return sum(p.numel() for p in model.parameters()) * int(kind.itemsize)
