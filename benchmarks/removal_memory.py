"""Memory of a removal whose model stays on the disk: `python benchmarks/removal_memory.py FOLDER`.

A Llama of 7 billion parameters (32 layers, 4,096 wide, random bfloat16 weights, 13.5 GB) is written into FOLDER; half
of its heads and six of its FFNs are removed from it, written and proved. The goal: at its peak the process holds no
more than what it holds once the model is opened, and the two largest blocks (or the output matrix, if larger). Counted
is the resident set, files that are mapped included. It takes 24 GB of disk and some minutes.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT / "tests"))

import random_checkpoint
import tiny
from headcount.masks import Mask
from headcount.model.load import load
from headcount.removal.certificate import certificate_of
from headcount.removal.remove import remove

_CONFIG = LlamaConfig(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
                      num_attention_heads=32, max_position_embeddings=2048)
_RESULTS = Path(__file__).parent / "results" / "large" / "removal_memory.json"


def main(folder: Path) -> None:
    """Write the model where it is not there, remove, and keep what was measured."""
    torch.set_num_threads(2)
    if not (folder / "config.json").is_file():
        random_checkpoint.write(folder, _CONFIG, torch.bfloat16, tiny.tokenizer())
    started = time.perf_counter()
    loaded = load(folder, device_map="disk")
    opened, base = time.perf_counter() - started, _peak()
    full = Mask.full(loaded.anatomy.heads_per_layer)
    order = np.random.default_rng(0).permutation(full_heads := sum(full.heads_per_layer))
    half = [divmod(int(i), 32) for i in order[: full_heads // 2]]
    mask = full.without_heads(half).without_ffns([3, 9, 14, 18, 22, 27])
    block = max(sum(p.numel() * p.element_size() for p in part.block.parameters()) for part in loaded.anatomy.layers)
    output: Any = loaded.model.get_output_embeddings()
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        started = time.perf_counter()
        small = remove(loaded, mask).save(Path(place) / "small")
        seconds = time.perf_counter() - started
        proofs = certificate_of(small)["proofs"]
        written = sum(path.stat().st_size for path in small.iterdir())
    result: Mapping[str, object] = {
        "date": datetime.date.today().isoformat(), "machine": platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(), "parameters": loaded.anatomy.num_parameters, "dtype": str(loaded.model.dtype),
        "block_mb": block / 1e6, "output_mb": output.weight.numel() * output.weight.element_size() / 1e6,
        "base_mb": base, "peak_mb": _peak(), "open_seconds": opened, "seconds": seconds, "written_gb": written / 1e9,
        "proofs": proofs}
    _RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


def _peak() -> float:
    """The largest resident set of this process so far, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


if __name__ == "__main__":
    main(Path(sys.argv[1]))
