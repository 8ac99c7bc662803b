"""The slow, obvious computation: one request, one forward pass, gates and gradients written out anew.

Nothing here is shared with what it checks but the modules that `headcount.model.anatomy` names and the norms that
`headcount.model.norms` finds: no batches, no trees, no sweep, no scored positions, no frozen parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headcount.engine.encode import Request, encode
from headcount.masks import Mask
from headcount.model.load import LoadedModel
from headcount.tasks.fewshot import FewShot
from headcount.tasks.task import Split, Task


def requests_of(loaded: LoadedModel, task: Task, few_shot: FewShot, split: Split) -> list[Request]:
    """The gold continuation of every document."""
    return encode(loaded.tokenizer, [p.pairs[p.gold] for p in task.prompts(split, few_shot)], loaded.max_length)


def plain_gold(loaded: LoadedModel, requests: Sequence[Request], mask: Mask) -> np.ndarray:
    """Log-likelihood (nats) of every request under a mask, in a pass of its own."""
    with torch.no_grad(), _gated(loaded, mask):
        return np.array([-float(_losses(loaded, request).sum()) for request in requests])


def plain_scores(loaded: LoadedModel, requests: Sequence[Request]) -> dict[str, np.ndarray]:
    """Gradient scores "position" and "example" (rows 0 and 1) of heads and FFNs, by autograd through all parameters."""
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    both = [_scores_of(loaded, request) for request in requests]
    loaded.model.requires_grad_(False)
    return {"head": np.mean([heads for heads, _ in both], 0), "ffn": np.mean([ffns for _, ffns in both], 0)}


def sees_later_tokens(loaded: LoadedModel, request: Request) -> float:
    """How far the logits before a prompt's last token move, relatively, when that token is another."""
    ids = torch.from_numpy(request.ids)[None].long()
    other = ids.clone()
    other[0, -1] = 4 if ids[0, -1] != 4 else 5
    with torch.no_grad():
        first, second = (loaded.model(input_ids=x).logits[0, :-1] for x in (ids, other))
    return float((first - second).abs().max() / first.abs().max())


def _losses(loaded: LoadedModel, request: Request) -> Tensor:
    ids = torch.from_numpy(request.ids)[None].long()
    logprobs = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
    return torch.stack([-logprobs[p, t] for p, t in zip(request.scored, request.targets, strict=True)])


@contextlib.contextmanager
def _gated(loaded: LoadedModel, mask: Mask) -> Iterator[None]:
    """Multiply by zero what a removed head gives to its projection, and what a removed FFN puts out."""
    with contextlib.ExitStack() as hooks:
        for part, heads, ffn in zip(loaded.anatomy.layers, mask.heads, mask.ffns, strict=True):
            kept = torch.from_numpy(np.repeat(np.asarray(heads), part.d_head)).float()

            def slices(module: Any, args: Any, kept: Tensor = kept) -> Any:
                return (args[0] * kept.to(args[0]), *args[1:])

            hooks.callback(part.out_proj.register_forward_pre_hook(slices).remove)
            if not ffn:
                hooks.callback(part.ffn_output.register_forward_hook(_nothing).remove)
        yield


def _nothing(module: Any, args: Any, output: Any) -> Any:
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


def _scores_of(loaded: LoadedModel, request: Request) -> tuple[np.ndarray, np.ndarray]:
    """The two scores of one example, position by position."""
    kept: dict[Any, Tensor] = {}

    def keep(name: Any, value: Tensor) -> None:
        value.retain_grad()
        kept[name] = value

    def watch_input(name: Any) -> Any:
        return lambda module, args: keep(name, args[0])

    def watch_output(name: Any) -> Any:
        # A view goes on, since some blocks add the residual in place; what was kept stays as it was.
        def hook(module: Any, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            keep(name, first)
            return (first * 1, *output[1:]) if isinstance(output, tuple) else first * 1
        return hook

    with contextlib.ExitStack() as hooks:
        for i, part in enumerate(loaded.anatomy.layers):
            norms = loaded.norms.get(i)
            hooks.callback(part.out_proj.register_forward_pre_hook(watch_input(("z", i))).remove)
            written = part.ffn_output if norms is None or norms.ffn is None else norms.ffn
            hooks.callback(written.register_forward_hook(watch_output(("ffn", i))).remove)
            if norms is not None and norms.attention is not None:
                hooks.callback(norms.attention.register_forward_hook(watch_output(("attention", i))).remove)
        _losses(loaded, request).mean().backward()
    loaded.model.zero_grad()
    heads, ffns = [], []
    with torch.no_grad():
        for i in range(loaded.anatomy.num_layers):
            heads += [_both(products) for products in _head_products(loaded, i, kept)]
            ffns.append(_both(_ffn_products(loaded, i, kept)))
    return np.array(heads).T, np.array(ffns).T


def _head_products(loaded: LoadedModel, layer: int, kept: dict[Any, Tensor]) -> Iterator[Tensor]:
    """For each head of a layer: its product with the gradient at every position."""
    part, z = loaded.anatomy.layers[layer], kept["z", layer]
    written = kept.get(("attention", layer))
    for h in range(part.num_heads):
        own = slice(h * part.d_head, (h + 1) * part.d_head)
        if written is None:
            products = (z[..., own] * z.grad[..., own]).reshape(-1, part.d_head).sum(-1)
        else:
            without = z.clone()
            without[..., own] = 0
            left = loaded.norms[layer].attention(part.out_proj(without))
            products = ((written - left.reshape(written.shape)) * written.grad).reshape(-1, part.d_model).sum(-1)
        yield products


def _ffn_products(loaded: LoadedModel, layer: int, kept: dict[Any, Tensor]) -> Tensor:
    written, norms = kept["ffn", layer], loaded.norms.get(layer)
    left = torch.zeros_like(written)
    if norms is not None and norms.ffn is not None:
        left = norms.ffn(left)
    return ((written - left) * written.grad).reshape(-1, written.shape[-1]).sum(-1)


def _both(products: Tensor) -> tuple[float, float]:
    values = products.double()
    return float(values.abs().mean()), float(values.sum().abs())
