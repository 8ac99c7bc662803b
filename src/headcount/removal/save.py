"""A smaller model written as transformers loads it: a folder that is whole, or not there at all.

`transformers`: safetensors, a config of a type of its own, and one file of Python that narrows the family's class
(`headcount.model.narrowed`; its text goes along). Blocks are written one after another, as they are made and proved.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from headcount.errors import ModelError, OptionError
from headcount.model.removed import base_of, name_of, write_code
from headcount.removal.shards import Shards
from headcount.removal.slicing import Plan, Walk, rest, saved_tensors, tensors


@contextlib.contextmanager
def written(out: Path, needed: int) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is there; if anything fails nothing is left of it.

    Args:
        out: The name.
        needed: How many bytes will be written, at least.

    Raises:
        OptionError: If there is something of this name, or not enough space.
    """
    check_place(out, needed)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".headcount-", dir=out.parent))
    try:
        yield folder
        os.chmod(folder, 0o777 & ~_umask())
        if os.path.lexists(out):
            raise OptionError(f"{out} was made by somebody else meanwhile: give the same command with another folder")
        folder.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OptionError(f"the disk was full before all of {out} was written ({needed / 1e9:.2f} GB are needed): "
                              "nothing of it is left; make space, and give the same command") from error
        raise OptionError(f"{out} cannot be written ({error.strerror or error}): nothing of it is left; name a folder "
                          "elsewhere, or change what stops it") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_place(out: Path, needed: int) -> None:
    """Refuse a folder that is there, or has no place.

    Raises:
        OptionError: With what to do.
    """
    try:
        if out.exists() or out.is_symlink():
            raise OptionError(f"{out} exists already: name another folder, or delete it")
        parent = next(place for place in out.absolute().parents if place.exists())
        out.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OptionError(f"no folder can have the name {_shortened(out)} ({error.strerror}): name another") from error
    if not parent.is_dir():
        raise OptionError(f"{out} cannot be made: {parent} is a file; name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OptionError(f"{out} cannot be made: nothing may be written into {parent}; name another folder")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OptionError(f"there is not enough space for {out}: it takes {needed / 1e9:.2f} GB, and "
                          f"{free / 1e9:.2f} GB are free there: name a folder on another disk, or make space")


def _shortened(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-30:]}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def announced(plan: Plan) -> dict[str, Any]:
    """Tensors of the smaller model in the order in which they are written: block by block, then all others."""
    named = saved_tensors(plan.empty)
    prefixes = [f"{plan.blocks}.{i}." for i in range(len(plan.cuts))]
    inside = {name: value for prefix in prefixes for name, value in named.items() if name.startswith(prefix)}
    return inside | named


def write_transformers(walk: Walk, folder: Path) -> None:
    """Write config, code and weights.

    Raises:
        ModelError: If the model's own code lies in its folder: a smaller class cannot be made of it.
    """
    base = base_of(walk.plan.loaded.model)
    _check_class(base)
    plan = walk.plan
    wanted = announced(plan)
    shards = Shards(folder, wanted)
    for number, block in walk.blocks():
        values = tensors(block)
        prefix = f"{plan.blocks}.{number}."
        for name in wanted:
            if name.startswith(prefix):
                shards.write(name, values[name.removeprefix(prefix)])
        del values
        block.to("meta")
    for name, value in rest(plan):
        if name in wanted:
            shards.write(name, value)
    shards.close()
    config: Any = plan.empty.config
    config.architectures = [name_of(base)]
    config.save_pretrained(folder)
    write_code(base, folder)


def _check_class(base: type[PreTrainedModel]) -> None:
    if not base.__module__.startswith("transformers."):
        raise ModelError(f"{base.__name__} comes with its own code, of which no smaller class can be made: use "
                         "`format='masked'`", fields=("format='masked'",))
