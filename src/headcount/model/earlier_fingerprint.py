"""How versions before digests told models apart: their folders go on by these fingerprints, and no new one is made.

Weights count by the exclusive-or of their rows and columns, in which changes can cancel, and by 64 of their values; a
tokenizer counts by its vocabulary and one sentence. What identifies a model now is in `headcount.model.fingerprint`.
Nothing here may change, since names of entries contain what it gives; so it shares little with that.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from jaxtyping import Shaped, UInt64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headcount.model.fingerprint import described
from headcount.model.offloaded import present

_SAMPLED = 64
# So many 64-bit numbers stay in a core's cache.
_CACHED = 32_768
# Text of many kinds: what a tokenizer makes of it tells its rules apart where vocabularies are equal.
_PROBE = "The  cat's 3,141 naïve\n\tdéjà-vu 日本語 🙂 is_it(x) -> Answer: yes"


def fingerprint(model: PreTrainedModel) -> str:
    """64 hexadecimal digits that are equal for equal config, weights and dtypes.

    Every parameter and persistent buffer goes in with name, shape, dtype, the exclusive-or of the bits of each of its
    rows and columns, and 64 evenly spaced values; weights that were offloaded are fetched, a module at a time.
    """
    digest = hashlib.sha256(f"{type(model).__name__} {described(model.config)}".encode())
    for prefix, module in model.named_modules():
        with present(module, torch.device("cpu")), torch.no_grad():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                if name not in module._non_persistent_buffers_set:
                    digest.update(f"{prefix}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                    digest.update(_content(tensor))
    return digest.hexdigest()


def _content(tensor: Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    if tensor.device.type not in ("cpu", "cuda"):
        tensor = tensor.cpu()
    if tensor.element_size() == 1:
        # The hash knows no 8-bit floats.
        tensor = tensor.contiguous().view(torch.uint8)
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    spaced = torch.linspace(0, tensor.numel() - 1, _SAMPLED, dtype=torch.float64).long().to(tensor.device)
    parts = (*_xors(rows), rows.reshape(-1)[spaced].double())
    return b"".join(p.cpu().numpy().tobytes() for p in parts)


def _xors(rows: Shaped[Tensor, "row column"]) -> tuple[UInt64[Tensor, " column"], UInt64[Tensor, " row"]]:
    """The exclusive-or of the bits of each column, and of each row, all taken as 64-bit numbers."""
    if rows.device.type != "cpu" or not rows.is_floating_point():
        return torch.hash_tensor(rows, 0), torch.hash_tensor(rows, 1)
    # The same, where torch takes seven times as long for the columns of an embedding.
    step = max(1, _CACHED // rows.shape[1])
    columns, own = np.zeros(rows.shape[1], np.uint64), np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), step):
        bits = rows[start : start + step].detach().double().numpy().view(np.uint64)
        columns ^= np.bitwise_xor.reduce(bits, axis=0)
        own[start : start + step] = np.bitwise_xor.reduce(bits, axis=1)
    return torch.from_numpy(columns), torch.from_numpy(own)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, max_length: int, *, chat: bool) -> str:
    """16 hexadecimal digits that are equal for tokenizers that read alike: vocabulary, rules, special tokens, window.

    Args:
        tokenizer: The model's.
        max_length: The window that prompts are cut to.
        chat: Whether its chat template is used, and so counts.
    """
    ids = [list(tokenizer(_PROBE, add_special_tokens=special)["input_ids"]) for special in (True, False)]
    known = [sorted(tokenizer.get_vocab().items()), ids, tokenizer.bos_token_id, tokenizer.eos_token_id, max_length,
             tokenizer.chat_template if chat else None]
    return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()[:16]
