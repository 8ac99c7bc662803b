"""Attention probabilities as they are computed: one layer at a time, seen by a hook and dropped.

Every attention of transformers hands its probabilities out beside its output when it runs eagerly; two families only
when asked (Falcon, OpenAI-GPT). To ask all would keep those of all layers until the end. Rows need not sum to 1: where
there are sinks (GPT-OSS), some of it goes to no position.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from headcount.errors import ModelError
from headcount.model.anatomy import Anatomy
from headcount.model.devices import device_of
from headcount.model.offloaded import present

# A layer, what its output projection reads (batch pos head d_head), and its attention (batch head pos pos).
Visit = Callable[[int, Tensor, Tensor], None]


@contextlib.contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Run attention in the implementation that writes its probabilities out; the model gets its own back."""
    before = _implementations(model.config)
    if _are_eager(before):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _implementations(config: PreTrainedConfig) -> Any:
    """The implementation of a config and, where it has parts, of each: a multimodal model's text may have another."""
    parts = {name: told for name in config.sub_configs
             if (part := getattr(config, name, None)) is not None and (told := _implementations(part)) is not None}
    return {"": config._attn_implementation, **parts} if parts else config._attn_implementation


def _are_eager(implementations: Any) -> bool:
    if isinstance(implementations, dict):
        return all(map(_are_eager, implementations.values()))
    return implementations in (None, "eager")


@contextlib.contextmanager
def attention_seen(anatomy: Anatomy, visit: Visit, layer: int | None = None) -> Iterator[None]:
    """Show every layer's heads and their attention, as soon as it is computed; the model keeps no probabilities.

    Args:
        anatomy: Of the model.
        visit: Is shown them.
        layer: The one layer to show; None: all.

    Raises:
        ModelError: While the model runs, if a layer hands out no probabilities.
    """
    projected: dict[int, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for i, part in enumerate(anatomy.layers):
            if not part.num_heads or layer not in (None, i):  # all were removed, or nobody asked
                continue

            def read(module: nn.Module, args: Any, layer: int = i) -> None:
                projected[layer] = args[0]

            def attended(module: nn.Module, args: Any, output: Any, layer: int = i) -> Any:
                part = anatomy.layers[layer]
                at = _place(output, part.num_heads)
                if at is None:
                    raise ModelError(f"layer {layer} hands out no attention probabilities")
                attention = output[at]
                shape = (attention.shape[0], attention.shape[2], part.num_heads, part.d_head)
                visit(layer, projected.pop(layer).reshape(shape), attention)
                return type(output)(attention.new_empty(0) if k == at else x for k, x in enumerate(output))

            hooks.callback(part.out_proj.register_forward_pre_hook(read).remove)
            hooks.callback(part.attention.register_forward_hook(attended).remove)
        yield


def _place(output: Any, num_heads: int) -> int | None:
    """Where an attention's output has its probabilities (batch head pos pos)."""
    for k, x in enumerate(output if isinstance(output, (tuple, list)) else ()):
        if k and isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == num_heads and x.shape[2] == x.shape[3]:
            return k
    return None


def attention_keywords(name: str, model: PreTrainedModel, anatomy: Anatomy) -> dict[str, bool]:
    """What a model that runs eagerly must be told, so that its attentions hand out their probabilities.

    Raises:
        ModelError: If they do not, whatever it is told, or if heads write into several residual streams.
    """
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        entered[:] = [args[0] if args else kwargs["hidden_states"]]

    ids = torch.zeros(1, 3, dtype=torch.long, device=device_of(model))
    # Asked last: most models then keep the probabilities of all layers until the end.
    for told in ({}, {"output_attentions": True}):
        handle = anatomy.layers[0].block.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with torch.no_grad(), attention_seen(anatomy, lambda layer, z, attention: None):
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **told)
        except ModelError as e:
            failure = e
        else:
            if entered[0].dim() > ids.dim() + 1:
                raise ModelError(f"{name} ({model.config.model_type}): its heads write into {entered[0].shape[-2]} "
                                 "residual streams, of which no single one is what the output layer reads: its "
                                 "induction heads cannot be measured")
            return told
        finally:
            handle.remove()
    raise ModelError(f"{name} ({model.config.model_type}): {failure}, also with eager attention and output_attentions: "
                     "its induction heads cannot be measured")


def embedded_tokens(model: PreTrainedModel) -> Int[np.ndarray, " token"]:
    """The ids of tokens whose embeddings are numbers: all but of damaged models."""
    embeddings: Any = model.get_input_embeddings()
    with present(embeddings):
        rows: Tensor = torch.isfinite(embeddings.weight.detach()).all(-1)
    return rows.nonzero().flatten().cpu().numpy()


@contextlib.contextmanager
def fed(
    anatomy: Anatomy, hidden: Float[Tensor, "batch pos d_model"] | None, layer: int | None = None
) -> Iterator[list[Tensor]]:
    """Give every block the same hidden states: these, or (None) what the first block is given.

    Args:
        anatomy: Of the model.
        hidden: The hidden states.
        layer: The one layer whose block is given them; None: all.

    Yields:
        A list that will hold what the first block was given by the model itself.
    """
    first: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        own = args[0] if args else kwargs["hidden_states"]
        if module is anatomy.layers[0].block:
            first[:] = [own.clone()]
        # A copy, since some blocks write into their input.
        given = (first[0] if hidden is None else hidden).to(own).clone()
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

    with contextlib.ExitStack() as hooks:
        for part in anatomy.layers if layer is None else anatomy.layers[layer : layer + 1]:
            hooks.callback(part.block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield first


@contextlib.contextmanager
def one_logit(model: PreTrainedModel) -> Iterator[None]:
    """Give the output layer a single position: nobody reads the logits."""
    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:1, :1], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()
