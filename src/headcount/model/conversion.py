"""Which tensors of a checkpoint make which of the model's, by transformers' own mapping of names, before any is read.

`from_pretrained` renames a checkpoint's tensors (`decoder.` to `model.decoder.`, `gamma` to `weight`), adds or takes
off the base model's prefix, and makes some of several (stacked experts) or several of one (fused projections). Its
loader does so while it loads. Here its rules are asked for the names alone (`transformers.core_model_loading`), and
what is made of several is made once of tensors without values, which gives names, shapes and types; so that afterwards
each can be made by itself, from its own tensors alone. Of weights that are tied, the one that the checkpoint holds is
kept; where it holds both and they differ, transformers ties neither, and nor does this.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.loading_report import LoadStateDictInfo

from headcount.errors import ModelError, first_line
from headcount.model.weight_files import Held

# What transformers' conversions raise for tensors that do not fit together.
_UNFIT = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)
# Two tensors are compared so many numbers at a time.
_PART = 2**23


@dataclass(frozen=True, eq=False)
class Source:
    """What one or several tensors of the model are made of.

    Attributes:
        held: Tensors of the checkpoint, with what transformers' rule calls each.
        rule: The rule that makes them; None where the one tensor is taken as it is.
        first: The model's tensor, or the first of several.
        dtype: The type that the model wants them in.
    """

    held: list[tuple[str, Held]]
    rule: Any
    first: str
    dtype: torch.dtype

    def made(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The model's tensors, read and made, by name."""
        return self._made(model, lambda held: held.read(self.dtype))

    def announced(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The same without values, on the meta device."""
        return self._made(model, lambda held: torch.empty(held.shape, dtype=self.dtype, device="meta"))

    def _made(self, model: PreTrainedModel, read: Callable[[Held], Tensor]) -> dict[str, Tensor]:
        if self.rule is None:
            return {self.first: read(self.held[0][1])}
        rule = copy.deepcopy(self.rule)
        for pattern, held in self.held:
            rule.add_tensor(self.first, held.name, pattern, functools.partial(read, held))
        made = rule.convert(self.first, model=model, config=model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


@dataclass(frozen=True, eq=False)
class Conversion:
    """What a checkpoint gives a model.

    Attributes:
        sources: What the model's tensors are made of, each of them once.
        announced: The model's tensors that the checkpoint gives, without values: shapes, and the types wanted.
        tied: Names of the model that are given under another one, and that other one.
        told: What is missing, left over or of another size, as `from_pretrained` tells it
            (`headcount.model.checkpoint.check`).
    """

    sources: tuple[Source, ...]
    announced: Mapping[str, Tensor]
    tied: Mapping[str, str]
    told: Mapping[str, Any]


def convert(name: str, held: Sequence[Held], model: PreTrainedModel, dtype: torch.dtype) -> Conversion:
    """Which of a checkpoint's tensors make which of a model's.

    Args:
        name: The model, as the user named it.
        held: All tensors of the checkpoint.
        model: The model without weights, on the meta device.
        dtype: The type that its weights are wanted in, as `from_pretrained` takes it.

    Raises:
        ModelError: If tensors of the checkpoint do not fit together.
    """
    sources, unexpected = _sources(held, model, dtype)
    own = model.state_dict()
    kept: list[Source] = []
    announced: dict[str, Tensor] = {}
    wrong: set[tuple[str, Any, Any]] = set()
    for source in sources:
        try:
            given = source.announced(model)
        except _UNFIT as e:
            raise ModelError(f"{name} holds tensors for {source.first} that do not fit together ({first_line(e)[:80]}):"
                             " put back the config.json that belongs to these weights") from e
        unexpected |= given.keys() - own.keys()
        wrong |= {(key, one.shape, own[key].shape) for key, one in given.items()
                  if key in own and one.shape != own[key].shape}
        if given.keys() <= own.keys():
            kept.append(source)
            announced |= given
    tied = _tied(model, announced, {source.first: source for source in kept if source.rule is None})
    info = LoadStateDictInfo(missing_keys=own.keys() - announced.keys() - tied.keys(), unexpected_keys=unexpected,
                             mismatched_keys=wrong, error_msgs=[], conversion_errors={}, skipped_pp_keys=set())
    model._adjust_missing_and_unexpected_keys(info)
    told = {"missing_keys": info.missing_keys, "unexpected_keys": info.unexpected_keys,
            "mismatched_keys": info.mismatched_keys}
    return Conversion(tuple(source for source in kept if source.first not in tied),
                      {key: one for key, one in announced.items() if key not in tied}, tied, told)


@dataclass
class _Rules:
    """transformers' rules for a model, and what is found by them."""

    model: PreTrainedModel
    renamings: list[Any] = field(default_factory=list)
    converters: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Rules:
        rules = get_model_conversion_mapping(model)
        return cls(model, [one for one in rules if isinstance(one, WeightRenaming)],
                   [one for one in rules if isinstance(one, WeightConverter)])

    def renamed(self, key: str, own: dict[str, Tensor]) -> tuple[str, str | None]:
        """What a checkpoint's name is in the model, and the pattern of the rule that makes another tensor of it."""
        prefix = self.model.base_model_prefix
        new, pattern = rename_source_key(key, self.renamings, self.converters, prefix, own)
        if new not in own and key in own:
            new, pattern = rename_source_key(key, [], [], prefix, own)
        return new, pattern


def _sources(held: Sequence[Held], model: PreTrainedModel, dtype: torch.dtype) -> tuple[list[Source], set[str]]:
    """What the model's tensors are made of, in the order in which transformers goes; and names that it has not."""
    rules, own = _Rules.of(model), model.state_dict()
    by_pattern = {pattern: one for one in rules.converters for pattern in one.source_patterns}
    # Parts of some models stay in float32.
    plan = model._get_dtype_plan(dtype)
    exempt = build_glob_alternation([*plan])[0] if plan else None
    found: dict[str, Source] = {}
    unexpected: set[str] = set()
    for one in sorted(held, key=lambda one: dot_natural_key(one.name)):
        key, pattern = rules.renamed(one.name, own)
        if key in own:
            wanted = dtype if own[key].dtype == model.dtype else own[key].dtype
            if exempt is not None and exempt.search(key):
                wanted = torch.float32
            source = found.setdefault(key, Source([], None if pattern is None else by_pattern[pattern], key, wanted))
            source.held.append((one.name if pattern is None else pattern, one))
        elif pattern is not None:
            targets = by_pattern[pattern].target_patterns
            unexpected |= {key.replace(targets[0], target) for target in targets}
        else:
            unexpected.add(key)
    return list(found.values()), unexpected


def _tied(model: PreTrainedModel, given: Mapping[str, Tensor], plain: Mapping[str, Source]) -> dict[str, str]:
    """Names that are given under another one: what the class ties, and what is one parameter under two names."""
    groups: dict[str, list[str]] = {}
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        groups.setdefault(source, [source]).append(target)
    tied: dict[str, str] = {}
    for names in groups.values():
        there = [name for name in names if name in given]
        for name in names if there else []:
            if name not in given or (name != there[0] and _same(plain.get(name), plain.get(there[0]))):
                tied[name] = there[0]
    first: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in given:
        if name in parameters:
            first.setdefault(id(parameters[name]), name)
    for name, parameter in parameters.items():
        if name not in given and name not in tied and id(parameter) in first:
            tied[name] = first[id(parameter)]
    return tied


def _same(one: Source | None, other: Source | None) -> bool:
    """Whether two tensors of a checkpoint, each taken as it is, are the same place in a file, or equal."""
    if one is None or other is None:
        return False
    (_, a), (_, b) = one.held[0], other.held[0]
    if (a.path, a.offset, a.shape, a.strides) == (b.path, b.offset, b.shape, b.strides) and a.whole is b.whole:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or not (a.is_plain and b.is_plain):
        return a.shape == b.shape and torch.equal(a.read(), b.read())
    # In parts: an output layer may be as large as memory allows.
    numel = math.prod(a.shape)
    parts = ((start, min(_PART, numel - start)) for start in range(0, numel, _PART))
    return all(torch.equal(a.numbers(*part), b.numbers(*part)) for part in parts)
