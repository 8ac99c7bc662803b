"""What a checkpoint holds against what the model got: nothing may be missing, left over, or of another shape.

transformers fills in weights that are missing with random ones, and drops those that the class has no place for: biases
that the config turns off, layers beyond its number of layers, an adapter that is not merged, scales of a quantisation
that it does not know. Each changes what is measured. So both are refused by name, but for tensors that no logit depends
on; these are told by their names and contents, with the reason, in `_HARMLESS`. Of what a class declares to be left
over transformers does not tell: there the names in the files are looked at, for layers beyond the model's own that do
not predict further tokens, and for two names of one parameter. Whole numbers are no weights without a quantisation.

Rotary frequencies that an old checkpoint holds are dropped by transformers, too: they must be those that the model
computes from its config.

A class may also change weights after it got them (Youtu's sets the padding token's embedding to zero). So tensors
are compared with the file where it has the parameter's name and shape, the large ones by some rows. An embedding of
padding that is zero and was not is told in a note; anything else is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from headcount.errors import ModelError
from headcount.model.weight_files import Held, Index, files_passed_over, files_read, held_by, index_of

_ROTARY = re.compile(r"rotary_emb\.inv_freq$")
# A layer's number in a tensor's name, and what tells layers that predict further tokens from those of the model.
_LAYER = re.compile(r"^(.*?\b(?:layers|h|blocks))\.(\d+)\.")
_PREDICTION = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\b|\bmtp\b")
# Old checkpoints hold them in half precision.
_ROTARY_ERROR = 0.01
# Tensors of at most so many numbers are compared with the file whole, of larger ones so many rows and special tokens'.
_WHOLE, _ROWS = 2**16, 16
# Two checkpoints in a folder are compared by tensors of at most so many numbers: norms and biases.
_SMALL = 100_000


class _Kind(NamedTuple):
    """Tensors that may be left over: told by name, and by content where the name alone says too little."""

    name: re.Pattern[str]
    content: Callable[[Tensor, PreTrainedConfig], bool]
    reason: str


def _is_causal_mask(tensor: Tensor, config: PreTrainedConfig) -> bool:
    """Ones in a lower triangle, or in the band of it that is as wide as the config's window."""
    if tensor.dim() < 2 or tensor.shape[:-2].numel() != 1:
        return False
    square = tensor.reshape(tensor.shape[-2:]).int()
    whole, window = torch.ones_like(square).tril(), getattr(config, "window_size", None)
    return torch.equal(square, whole) or (
        isinstance(window, int) and torch.equal(square, whole - whole.tril(-window)))


_HARMLESS = (
    _Kind(re.compile(r"\.(attn|attention)\.(bias|causal_mask)$"), _is_causal_mask,
          "the causal mask, which earlier versions of transformers saved (GPT-2, GPT-J, GPT-NeoX, CodeGen; GPT-Neo's "
          "local layers have a band of it)"),
    _Kind(re.compile(r"\.(attn|attention)\.masked_bias$"), lambda tensor, _: tensor.numel() == 1,
          "the number that stood at masked places, saved by earlier versions of transformers"),
    _Kind(_ROTARY, lambda *_: True, "rotary frequencies, which are compared apart"),
    _Kind(re.compile(r"(^|\.)position_ids$"), lambda tensor, _: not tensor.is_floating_point(),
          "the numbers of positions, saved by earlier versions of transformers"),
    _Kind(re.compile(r"(^|\.)v_head\.summary\.(weight|bias)$"), lambda *_: True,
          "TRL's value head, which reads the last hidden state and which no logit depends on"),
    _Kind(re.compile(r"\._extra_state$"), lambda *_: True, "TransformerEngine's notes on its 8-bit scales"),
)


def check(
    name: str, model: PreTrainedModel, told: Mapping[str, Any], folder: Path | None,
    held: Mapping[str, Held] | None = None,
) -> tuple[str, ...]:
    """Refuse a model that did not get exactly what its checkpoint holds.

    Values that the model does not have (on the meta device) are not compared.

    Args:
        name: The model, as the user named it.
        model: As it was loaded, with sizes that do not match ignored.
        told: What `from_pretrained` tells of loading.
        folder: Where the checkpoint's files lie; None where that is not known (nothing is then known to be harmless).
        held: What the files hold (`tensors`), where that has been looked at.

    Returns:
        What must be said of the model.

    Raises:
        ModelError: Which names the tensors.
    """
    missing, wrong = sorted(told["missing_keys"]), sorted(told["mismatched_keys"])
    if wrong:
        first, there, here = wrong[0]
        raise ModelError(f"{name} holds {_some(len(wrong), 'tensor')} of other sizes than its config says (the first "
                         f"is {first}: {_size(there)} in the checkpoint, {_size(here)} by config.json): put back the "
                         "config.json that belongs to these weights")
    files = [] if folder is None else files_read(folder, named_weights(model))
    if held is None:
        held = tensors(name, files)
    if folder is not None:
        _check_index(name, model, missing, index_of(folder, named_weights(model)), held)
    if missing:
        raise ModelError(f"{name} lacks {len(missing)} of the model's weights (the first is {missing[0]}): the "
                         "checkpoint is of another class of model, or not whole; download it again, or name the model "
                         "that it belongs to")
    left = sorted(told["unexpected_keys"])
    if left := [key for key in left if not _is_harmless(key, held, model.config)]:
        raise ModelError(f"{name} holds {_some(len(left), 'tensor')} that {type(model).__name__} has no place for with "
                         f"this config, and drops (the first is {left[0]}): put back the config.json that belongs to "
                         "these weights; to measure what is left without them, load it with transformers and wrap it")
    _check_hidden(name, model, held)
    _check_numbers(name, model, held, _quantisation(folder))
    check_rotary(name, model, held)
    notes = _check_values(name, model, held)
    return notes if folder is None else (*notes, *_passed_over(files, files_passed_over(folder, files), held))


def named_weights(model: PreTrainedModel) -> str | None:
    """The file of weights, or index of shards, that a model's config names; None where it names none."""
    named: str | None = getattr(model.config, "transformers_weights", None)
    return named


def tensors(name: str, files: Iterable[Path]) -> dict[str, Held]:
    """All tensors of a checkpoint's files, by the names that they have there.

    Raises:
        ModelError: If a file is missing or damaged, or two hold a tensor of the same name.
    """
    found: dict[str, Held] = {}
    for one in (one for path in files for one in held_by(path)):
        if one.name in found:
            raise ModelError(f"{name} holds {one.name} twice, in {found[one.name].path.name} and {one.path.name}: "
                             "leave one of them out")
        found[one.name] = one
    return found


def _check_index(
    name: str, model: PreTrainedModel, missing: Collection[str], index: Index | None, held: Mapping[str, Held]
) -> None:
    """Refuse an index of tensors that are not there, but for those that the model has without them (tied weights)."""
    prefix, own = f"{model.base_model_prefix}.", model.state_dict().keys() - {*missing}
    absent = [key for key in (index.shards if index is not None else ()) if key not in held
              and not {key, f"{prefix}{key}", key.removeprefix(prefix)} & own
              and not any(kind.name.search(key) for kind in _HARMLESS)]
    if index is not None and absent:
        raise ModelError(f"{name} lacks {_some(len(absent), 'tensor')} that its {index.path.name} names (the first is "
                         f"{absent[0]}, in {index.shards[absent[0]]}): download the checkpoint again, or put back the "
                         "index that belongs to it")


def _passed_over(files: list[Path], others: list[Path], held: Mapping[str, Held]) -> tuple[str, ...]:
    """A note, where another checkpoint lies beside the one that was read, and holds other weights."""
    for path in others:
        for one in _if_readable(path):
            mine = held.get(one.name)
            if mine is not None and (mine.shape != one.shape or (
                    math.prod(one.shape) <= _SMALL and not _alike(mine.read(), one.read()))):
                return (f"its folder holds two checkpoints with other weights: {files[0].name} was read, as "
                        f"transformers does, and {path.name} was not",)
    return ()


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in the coarser one's type."""
    dtype = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(dtype), other.to(dtype))


def _if_readable(path: Path) -> list[Held]:
    """The tensors of a file that is not read; none where it is damaged, which does no harm."""
    try:
        return held_by(path)
    except ModelError:
        return []


def _check_values(name: str, model: PreTrainedModel, held: Mapping[str, Held]) -> tuple[str, ...]:
    """Refuse a model some of whose weights are not those of its files; a note where only padding was set to zero."""
    if getattr(model, "hf_quantizer", None) is not None:
        return ()
    padding = {f"{place}.weight": module.padding_idx for place, module in model.named_modules()
               if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None}
    notes, special = [], _special(model.config)
    for key, weight in model.state_dict().items():
        one = held.get(key) or held.get(key.removeprefix(f"{model.base_model_prefix}."))
        if one is None or weight.is_meta or weight.shape != one.shape or not weight.numel() or not weight.dim():
            continue
        pad = padding.get(key)
        zeroed = {pad} if pad is not None and not weight[pad].any() else set()
        if not _equal(weight, one, sorted(_rows(weight, special) - zeroed)):
            raise ModelError(f"{name} has got other numbers in {key} than its checkpoint holds: {type(model).__name__} "
                             "changes them after they are loaded; correct its code, or load the model with "
                             "transformers and wrap it")
        if zeroed and not _equal(weight, one, sorted(zeroed)):
            notes.append(f"{type(model).__name__} sets the embedding of token {pad}, padding, to zero, which the "
                         "checkpoint does not")
    return tuple(notes)


def _rows(weight: Tensor, special: set[int]) -> set[int]:
    """Which rows of a weight are compared with its file: all of a small one, else some and those of special tokens."""
    every = range(len(weight))
    if weight.numel() <= _WHOLE:
        return set(every)
    if weight.dim() > 2:  # stacked experts, which are large: the first and the last
        return {0, every[-1]}
    return {*every[:: max(1, len(weight) // _ROWS)], every[-1]} | (special & {*every})


def _special(config: PreTrainedConfig) -> set[int]:
    """Ids of special tokens, whose embeddings a class may treat otherwise."""
    said = (getattr(config.get_text_config(), f"{name}_token_id", None) for name in ("pad", "bos", "eos", "unk"))
    return {i for one in said for i in (one if isinstance(one, list) else [one]) if isinstance(i, int) and i >= 0}


def _equal(weight: Tensor, one: Held, rows: list[int]) -> bool:
    """Whether a weight's rows are a file's, rounded to the weight's type."""
    if not rows:
        return True
    if len(rows) == len(weight):
        there, here = one.read(), weight
    elif weight.dim() > 2:
        there, here = one.rows(rows, _ROWS), torch.cat([weight[row : row + 1, :_ROWS] for row in rows])
    else:
        there, here = one.rows(rows), weight[rows]
    same = here.cpu() == there.to(weight.dtype)
    return bool((same | there.isnan()).all())


def _check_hidden(name: str, model: PreTrainedModel, held: Mapping[str, Held]) -> None:
    """Refuse whole layers that the class ignores by their number, and two tensors for one parameter."""
    prefix = f"{model.base_model_prefix}."
    own: dict[str, int] = {}
    for key in model.state_dict():
        if found := _LAYER.search(key.removeprefix(prefix)):
            own[found[1]] = max(own.get(found[1], 0), int(found[2]) + 1)
    beyond: dict[tuple[str, int], list[str]] = {}
    for key in held:
        found = _LAYER.search(key.removeprefix(prefix))
        if found and int(found[2]) >= own.get(found[1], int(found[2]) + 1):
            beyond.setdefault((found[1], int(found[2])), []).append(key)
    for (stack, _), keys in beyond.items():
        if not any(_PREDICTION.search(key) for key in keys):
            raise ModelError(f"{name} holds a layer beyond the {own[stack]} of its config (its first tensor is "
                             f"{keys[0]}), which transformers drops: put back the config.json that belongs to these "
                             "weights")
    first: dict[str, str] = {}
    for key in held:
        other = first.setdefault(key.removeprefix(prefix), key)
        if other != key:
            raise ModelError(f"{name} holds two tensors for one parameter, {other} and {key}: leave one of them out")


def _quantisation(folder: Path | None) -> str:
    """The method by which the folder's config says that weights are quantised; empty where it says none."""
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder is not None else {}
        return str((told.get("quantization_config") or {}).get("quant_method", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _check_numbers(name: str, model: PreTrainedModel, held: Mapping[str, Held], quantised: str) -> None:
    """Refuse whole numbers where weights are fractions, and a quantisation that nobody undoes."""
    if getattr(model, "hf_quantizer", None) is not None:
        return
    said = getattr(model.config, "quantization_config", None)
    if said is not None:
        method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", said)
        raise ModelError(f"the config of {name} names a quantisation ({method}) that transformers does not apply: its "
                         "weights would be taken as they lie there; load it with its own library, and wrap it")
    floating = {key for key, parameter in model.named_parameters() if parameter.is_floating_point()}
    for key, one in held.items():
        if one.is_coded and {key, f"{model.base_model_prefix}.{key}"} & floating:
            if quantised:
                raise ModelError(f"{name} is quantised ({quantised}), in a way that transformers does not run on this "
                                 "device: load it where that runs, or dequantise the checkpoint first")
            raise ModelError(f"{name} holds whole or 8-bit numbers for {key}, as a quantised checkpoint does, and its "
                             "config says no quantisation: put back the config.json that belongs to these weights")


def _some(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _size(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _is_harmless(key: str, held: Mapping[str, Held], config: PreTrainedConfig) -> bool:
    kind = next((kind for kind in _HARMLESS if kind.name.search(key)), None)
    # The model's class may put a prefix before the checkpoint's names, or take one off.
    name = next((name for name in held if name == key or key.endswith(f".{name}") or name.endswith(f".{key}")), None)
    return kind is not None and name is not None and kind.content(held[name].read(), config)


def _rotary(model: PreTrainedModel) -> dict[str, Tensor]:
    """The rotary frequencies that a model computed from its config."""
    return {name: buffer for name, buffer in model.named_buffers() if _ROTARY.search(name) and not buffer.is_meta}


def check_rotary(name: str, model: PreTrainedModel, held: Mapping[str, Held]) -> None:
    """Refuse a checkpoint of other rotary frequencies than the model computed from its config, where it has computed.

    Raises:
        ModelError: Which names the tensor.
    """
    own = [frequencies.float().cpu() for frequencies in _rotary(model).values()]
    for key, one in held.items():
        if own and _ROTARY.search(key):
            there = one.read().float()
            expected = [mine for mine in [*own, *_unscaled(model, len(there))] if mine.shape == there.shape]
            errors = [float(((there - mine) / mine).abs().max()) for mine in expected]
            if not min(errors, default=1.0) <= _ROTARY_ERROR:
                raise ModelError(f"{name} holds other rotary frequencies ({key}) than its config says: correct "
                                 "rope_theta or rope_scaling in its config.json")


def _unscaled(model: PreTrainedModel, number: int) -> list[Tensor]:
    """Frequencies without the scaling that the config adds: earlier versions saved these, and scaled positions."""
    said = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    bases = {one["rope_theta"] for one in (said, *said.values()) if isinstance(one, Mapping) and "rope_theta" in one}
    return [1 / base ** (torch.arange(number) / number) for base in bases]
