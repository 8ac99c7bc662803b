"""The safetensors format, for files that are written tensor by tensor: safetensors' own writer takes all at once.

It is public and short: eight bytes with the length of a header, the header as JSON (of every tensor type, shape, and
from which byte to which), and the bytes of all tensors one behind another. Shapes are known before any value is, so the
header is written first, and tensors follow as they come, in the order that it announces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

# Types of numbers by safetensors' names.
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
         "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
         "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
         "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}


def header_of(tensors: Mapping[str, Tensor]) -> bytes:
    """What a safetensors file of these tensors begins with; they may be on the meta device."""
    names = {dtype: name for name, dtype in TYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + size(tensor)
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_values(file: BinaryIO, values: Tensor) -> None:
    """Append a tensor's values to a safetensors file."""
    file.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def size(tensor: Tensor) -> int:
    """A tensor's bytes."""
    return math.prod(tensor.shape) * tensor.element_size()
