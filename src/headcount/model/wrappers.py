"""What may stand around or inside a model in memory, so that gates would not act on it: taken off, or refused.

Heads and FFNs are switched off by hooks. Compiled code may have been made without them and then passes them over;
scripted modules have none; adapters that are not merged split a head's matrix into several; integer kernels pass no
gradients. `plain` gives the model that is measured: where a wrapper holds the unmodified model, that; else it refuses.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from headcount.errors import ModelError

# Modules of these packages compute with integers, or not in Python, and pass no gradients.
_INTEGER = ("torch.ao.nn", "torch.nn.quantized", "torch.nn.intrinsic")


def plain(name: str, model: object) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The unmodified model inside what was given, and what must be said of that.

    Args:
        name: What errors call it.
        model: A model of transformers, or one inside torch.compile, DataParallel or DistributedDataParallel.

    Raises:
        ModelError: If it is no model of transformers, or holds modules on which gates do not act.
    """
    inner, notes = _without_wrappers(model)
    if not isinstance(inner, PreTrainedModel):
        if _is_adapter(inner):
            raise _not_merged(name, type(inner).__name__)
        raise ModelError(f"wrap takes a language model of transformers, not a {type(inner).__name__}: pass what "
                         "AutoModelForCausalLM.from_pretrained gives")
    for place, module in inner.named_modules():
        _check_module(name, place, module)
        for tensor in module.parameters(recurse=False):
            if tensor.device.type == "meta" and not hasattr(module, "_hf_hook"):
                raise ModelError(f"{place} of {name} has no weights (they are on the device meta): load the model with "
                                 "from_pretrained, then wrap it")
    return inner, notes


def hooked(model: nn.Module) -> list[str]:
    """Names of the modules that carry somebody's hooks on their forward pass, which are not transformers' own."""
    everywhere = ["all modules (torch's global hooks)"] * bool(
        torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    own = [place or type(model).__name__ for place, module in model.named_modules()
           for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
           if not str(getattr(hook, "__module__", "")).startswith("transformers.")]
    return everywhere + own


def _without_wrappers(model: object) -> tuple[object, tuple[str, ...]]:
    compiled, parallel = False, False
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if inner is not None:
            model, compiled = inner, True
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model, parallel = model.module, True
        elif isinstance(model, nn.Module) and _is_compiled(model):
            # Compiled in place: a copy of the outer module, with the same parts, is not.
            model.eval()
            model, compiled = copy.copy(model), True
            model._compiled_call_impl = None
            model.__dict__.pop("forward", None)
        else:
            break
    taken = [name for name, there in (("torch.compile", compiled), ("data parallelism", parallel)) if there]
    return model, (f"{' and '.join(taken)} taken off: the model is measured as it was before",) if taken else ()


def _check_module(name: str, place: str, module: nn.Module) -> None:
    where = place or type(module).__name__
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise ModelError(f"{where} of {name} is scripted or traced, and gates do not act on such a module: pass the "
                         "model before torch.jit or torch.fx was applied")
    if hasattr(module, "_orig_mod") or _is_compiled(module):
        raise ModelError(f"{where} of {name} is compiled by itself, and gates may not act on it: pass the model before "
                         "torch.compile was applied to its parts")
    if _is_adapter(module):
        raise _not_merged(name, where)
    if type(module).__module__.startswith(_INTEGER):
        raise ModelError(f"{where} of {name} is quantised to integers ({type(module).__name__}), and no gradients pass "
                         "it: pass the model before quantisation")


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled in place, as a whole or by its `forward`."""
    forward = module.__dict__.get("forward")
    return module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")


def _is_adapter(module: object) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def _not_merged(name: str, where: str) -> ModelError:
    return ModelError(f"{name} has an adapter that is not merged ({where}), so that a head's weights are in several "
                      "matrices: pass what its merge_and_unload() gives")
