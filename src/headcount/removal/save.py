"""A smaller model written as transformers loads it: a folder that is whole, or not there at all.

`transformers`: safetensors, a config of a type of its own, and one file of Python that narrows the family's class
(`headcount.model.narrowed`; its text goes along). Blocks are written one after another, as they are made and proved.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import headcount
from headcount.errors import ModelError, OptionError
from headcount.model import narrowed as runtime
from headcount.model.removed import base_of, name_of
from headcount.removal.narrow import Plan, Walk, rest, saved_tensors, tensors
from headcount.removal.shards import Shards

CODE = "modeling_headcount"
_TEMPLATE = '''

from {config_module} import {config}  # noqa: E402
from {model_module} import {model}  # noqa: E402


class {new_config}({config}):
    """The family's config, with `headcount`: how small every layer is."""

    model_type = "{model_type}"


class {new_model}({model}):
    """The family's model without the heads and FFNs that were removed."""

    config_class = {new_config}

    def __init__(self, config):
        super().__init__(config)
        narrow(self, config.headcount)
'''


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
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        os.chmod(folder, 0o777 & ~_umask())
        folder.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OptionError(f"the disk was full before all of {out} was written ({needed / 1e9:.2f} GB are needed): "
                              "nothing of it is left; make space, and give the same command") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_place(out: Path, needed: int) -> None:
    """Refuse a folder that is there, or has no place.

    Raises:
        OptionError: With what to do.
    """
    if out.exists():
        raise OptionError(f"{out} exists already: name another folder, or delete it", fields=("out",))
    parent = next(place for place in out.absolute().parents if place.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OptionError(f"there is not enough space for {out}: it takes {needed / 1e9:.2f} GB, and "
                          f"{free / 1e9:.2f} GB are free there: name a folder on another disk, or make space")


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
    write_config(plan.empty, base, folder)


def write_config(empty: PreTrainedModel, base: type[PreTrainedModel], folder: Path) -> None:
    """Write the config, and the code that it names."""
    config: Any = empty.config
    new = {"AutoConfig": name_of(base.config_class), "AutoModelForCausalLM": name_of(base)}
    config.auto_map = {auto: f"{CODE}.{name}" for auto, name in new.items()}
    config.architectures = [name_of(base)]
    config.save_pretrained(folder)
    (folder / f"{CODE}.py").write_text(code(base), encoding="utf-8")


def code(base: type[PreTrainedModel]) -> str:
    """The Python that goes along: how modules are narrowed, and two classes."""
    of_base: Any = base.config_class
    head = f"# Written by headcount {headcount.__version__}; needs torch and transformers alone.\n"
    return head + inspect.getsource(runtime).rstrip() + _TEMPLATE.format(
        config_module=of_base.__module__, config=of_base.__name__, model_module=base.__module__, model=base.__name__,
        new_config=name_of(of_base), new_model=name_of(base), model_type=runtime.PREFIX + of_base.model_type)


def _check_class(base: type[PreTrainedModel]) -> None:
    if not base.__module__.startswith("transformers."):
        raise ModelError(f"{base.__name__} comes with its own code, of which no smaller class can be made: use "
                         "`format='masked'`", fields=("format='masked'",))
