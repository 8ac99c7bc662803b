"""What heads read and write, found by asking the modules, not by the names of their weights.

Linear maps are read off by probing. In a row of one token a head attends to nothing but itself, so what it puts out
is its value map of what its block was given: rows of plus and minus every basis vector give the map as half the
difference, whatever the projection is called, fused, shared or transposed. A norm on the way divides every basis
vector by the same number, because they are equally long: its gain and its centring are read off with the map, and
its scale is a positive factor that does not matter to what is made of these maps. The same pass tells what lies
between the embeddings and the first block, and between the last block and the output layer. Whether the map is one
is tested on random vectors: values that pass a norm or a gate of their own (latent attention, Gemma-4, Laguna) have
none, and the answer is then NaN. (A sigmoid gate falls out: for plus and minus the same vector it adds up to 1.)

OV copying score (Elhage et al. 2021, "A mathematical framework for transformer circuits"): the eigenvalues l of
W_U W_O W_V W_E, vocabulary x vocabulary, as sum(Re l) / sum(|l|): 1 for a head that raises the logit of what it reads,
-1 for one that lowers it. Those that are not 0 are the eigenvalues of W_V (W_E W_U) W_O, d_head x d_head.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from headcount.errors import ModelError
from headcount.masks import Mask, heads_named
from headcount.model.anatomy import Anatomy, LayerAnatomy
from headcount.model.attention import Visit, attention_seen, fed, one_logit
from headcount.model.damage import damaged
from headcount.model.devices import device_of, doubled
from headcount.model.finite import is_finite
from headcount.model.hooks import ablated
from headcount.model.norms import LayerNorms, zeros
from headcount.model.offloaded import present

# Basis vectors that pass the model at once.
_PROBES = 1024
# Random vectors that test a value map, and how far off it may be, relative to the vector's length.
_TESTS = 4
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE = 0.04
# Against the rounding of biases: a power of two, so that weights themselves are not rounded.
_SCALE = 128.0
# Gives every block of a model rows of one token each, a few rows at a time, and shows what its heads make of them.
Probe = Callable[[Iterable[Tensor], Callable[[int], Visit]], None]


def output_map(part: LayerAnatomy, like: Tensor) -> Float[Tensor, "features d_model"]:
    """A layer's output projection without its bias, in float32: row h * d_head + d is what that feature writes.

    Args:
        part: The layer.
        like: A tensor of the device and type that the projection reads.
    """
    if type(part.out_proj) is nn.Linear and not part.out_proj.weight.is_meta:
        return part.out_proj.weight.detach().float().T  # asking would take a product of the size of the layer's widths
    width = part.num_heads * part.d_head
    written = _project(part, torch.eye(width, dtype=like.dtype, device=like.device) * _SCALE)
    return (written - _project(part, like.new_zeros(1, width))) / _SCALE


def output_bias(part: LayerAnatomy, like: Tensor) -> Float[Tensor, " d_model"]:
    """What the output projection writes for nothing."""
    return _project(part, like.new_zeros(1, part.num_heads * part.d_head))[0]


def _project(part: LayerAnatomy, x: Float[Tensor, "row features"]) -> Float[Tensor, "row d_model"]:
    # Not the call: that would show the probes to hooks.
    projected: Any = part.out_proj.forward(x[None])
    written: Tensor = projected[0].float()
    return written


@dataclass(frozen=True, eq=False)
class BranchNorm:
    """A norm on the attention branch's output, its scale left out (Gemma-2, OLMo-2).

    Args:
        gain: Up to a positive factor.
        centred: Whether it takes the mean away.
    """

    gain: Float[Tensor, " d_model"]
    centred: bool

    def back(self, directions: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The directions whose products with what heads write are those of these with what the norm puts out."""
        scaled = directions * self.gain.to(directions)
        return scaled - scaled.mean(-1, keepdim=True) if self.centred else scaled


def branch_norms(norms: Mapping[int, LayerNorms]) -> dict[int, BranchNorm]:
    """The layers whose attention's output passes a norm before it is added to the residual stream.

    Args:
        norms: From `headcount.model.norms.find_norms`.
    """
    by_layer = {layer: own.attention for layer, own in norms.items()}
    return {layer: _branch_norm(norm) for layer, norm in by_layer.items() if norm is not None}


@torch.no_grad()
def _branch_norm(norm: nn.Module) -> BranchNorm:
    generator = torch.Generator().manual_seed(0)
    like = zeros(norm)
    size = len(like)
    # No mean that could be taken away, and nothing near 0 to divide by.
    signs = torch.arange(size) % 2 * 2.0 - 1
    probe = (1 + torch.rand(size, generator=generator) / 2) * signs
    probe = (probe - probe.mean()).to(like)

    def odd(x: Tensor) -> Tensor:
        plus: Tensor = norm(x[None, None])
        minus: Tensor = norm(-x[None, None])
        return (plus - minus).reshape(-1).float() / 2

    gain = odd(probe) / probe.float()
    kept = odd(torch.ones_like(probe)).norm()
    return BranchNorm(gain, bool(kept < 0.05 * gain.norm()))


@torch.no_grad()
def parts_behind_norm(
    part: LayerAnatomy, norm: nn.Module, heads: Float[Tensor, "batch pos head d_head"],
    written: Float[Tensor, "batch pos d_model"], directions: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch pos head"]:
    """How far what a norm on attention's output writes moves along a direction if a head is there, each head by itself.

    The norm itself is asked what it makes of the branch without the head, so that nothing need be known of its formula.

    Args:
        part: The layer.
        norm: The norm on its attention's output.
        heads: What the output projection read.
        written: What the norm wrote then.
        directions: What the difference is multiplied with, such as gradients of the loss.
    """
    projected: Any = part.out_proj.forward(heads.flatten(-2))
    rows = output_map(part, heads).to(heads).reshape(part.num_heads, part.d_head, -1)
    parts = []
    # A head at a time: what all of them write would take the memory of as many residual streams.
    for h in range(part.num_heads):
        without: Tensor = norm(projected - heads[..., h, :] @ rows[h])
        parts.append(((written - without).float() * directions.float()).sum(-1))
    return torch.stack(parts, -1)


@dataclass(frozen=True, eq=False)
class EndMaps:
    """What lies before the first block and after the last, up to positive factors.

    Args:
        entry: From embeddings to the residual stream: projection (OPT-350M) or norm (BLOOM), else the identity.
        exit: From the residual stream to what the output layer reads: the final norm's gain, centred where it is a
            LayerNorm, and a projection where there is one.
    """

    entry: Float[Tensor, "d_embedding d_model"]
    exit: Float[Tensor, "d_model d_unembedding"]


@torch.no_grad()
def end_maps(model: PreTrainedModel, anatomy: Anatomy) -> EndMaps:
    """Read both off, in float32, on the device of the embeddings."""
    sizes = anatomy.layers[0].d_model, _embedding_size(model)
    entries, exits = [], []
    for chosen in _slices(max(sizes)):
        basis = _basis(model, max(sizes), chosen)
        with fed(anatomy, basis[:, None, : sizes[0]]) as first, _ends_fed(model, anatomy, basis) as left:
            _run(model, anatomy, len(basis))
        entries.append(_odd(first[0])[: max(0, sizes[1] - chosen.start)])
        exits.append(_odd(left[0])[: max(0, sizes[0] - chosen.start)])
    return EndMaps(torch.cat(entries).to(device_of(model)), torch.cat(exits).to(device_of(model)))


def _embedding_size(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[1])


def probes_of(d_model: int) -> tuple[int, int]:
    """How many rows `ov_copying` gives every block of a model of this width, and at the most at once."""
    return 2 * (d_model + _TESTS), 2 * max(min(_PROBES // 2, d_model), _TESTS)


def _slices(size: int) -> list[slice]:
    """The basis vectors of a space, a part at a time."""
    return [slice(start, min(start + _PROBES // 2, size)) for start in range(0, size, _PROBES // 2)]


def _basis(model: PreTrainedModel, size: int, chosen: slice) -> Float[Tensor, "row d"]:
    """Some basis vectors, then the same with the other sign."""
    rows = torch.zeros(chosen.stop - chosen.start, size, dtype=model.dtype, device=device_of(model))
    rows.diagonal(chosen.start).fill_(1)
    return torch.cat([rows, -rows])


def _odd(outputs: Float[Tensor, "*batch d"]) -> Float[Tensor, "row d"]:
    """Half of what the sign of the rows changed; biases and positions cancel."""
    plus, minus = outputs.reshape(outputs.shape[0], -1).float().chunk(2)
    return (plus - minus) / 2


@contextlib.contextmanager
def _ends_fed(
    model: PreTrainedModel, anatomy: Anatomy, rows: Float[Tensor, "row d"]
) -> Iterator[list[Tensor]]:
    """Put these rows out as embeddings and out of the last block; the list will hold what the output layer reads."""
    left: list[Tensor] = []

    def embedded(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return rows[:, None, : output.shape[-1]].to(output)

    def last(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, (tuple, list)) else output
        own = rows[:, None, : first.shape[-1]].to(first)
        return type(output)([own, *output[1:]]) if isinstance(output, (tuple, list)) else own

    def leaving(module: nn.Module, args: Any) -> None:
        left[:] = [args[0].clone()]

    # Before the hook of `_run`, which keeps one row.
    handles = [model.get_input_embeddings().register_forward_hook(embedded),
               anatomy.layers[-1].block.register_forward_hook(last),
               model.get_output_embeddings().register_forward_pre_hook(leaving)]  # type: ignore[no-untyped-call]
    try:
        yield left
    finally:
        for handle in handles:
            handle.remove()


def _run(model: PreTrainedModel, anatomy: Anatomy, rows: int, told: Mapping[str, bool] | None = None) -> None:
    """A pass of rows of one token, without FFNs and with logits of one row."""
    with ablated(anatomy, heads_alone(anatomy)), one_logit(model):
        model(**one_token(model, rows), use_cache=False, **(told or {}))


def heads_alone(anatomy: Anatomy) -> Mask:
    """The mask of a model without FFNs."""
    return Mask([[True] * n for n in anatomy.heads_per_layer], [False] * anatomy.num_layers)


def one_token(model: PreTrainedModel, rows: int) -> dict[str, Tensor]:
    """So many rows of one token, as the model's keyword arguments."""
    ids = torch.zeros(rows, 1, dtype=torch.long, device=device_of(model))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def unembedding(model: PreTrainedModel, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_unembedding"]:
    """The output layer's rows of these tokens, in float32."""
    layer: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with present(layer):
        rows: Tensor = layer.weight.detach()[ids.to(layer.weight.device)].to(ids.device, torch.float32)
    return rows


def unembedding_bias(model: PreTrainedModel, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The output layer's biases of these tokens; zeros where it has none."""
    layer: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with present(layer):
        if getattr(layer, "bias", None) is None:
            return torch.zeros(ids.shape, device=ids.device)
        rows: Tensor = layer.bias.detach()[ids.to(layer.bias.device)].to(ids.device, torch.float32)
    return rows


def keys(
    part: LayerAnatomy, directions: Float[Tensor, "*batch d_model"], like: Tensor, norm: BranchNorm | None
) -> Float[Tensor, "*batch head d_head"]:
    """What each head's output must be multiplied with to give the product of what it writes with a direction."""
    turned = directions.to(like.device)
    turned = norm.back(turned) if norm is not None else turned
    return (turned @ output_map(part, like).T).reshape(*turned.shape[:-1], part.num_heads, part.d_head)


@torch.no_grad()
def ov_copying(
    model: PreTrainedModel, anatomy: Anatomy, ends: EndMaps, norms: Mapping[int, BranchNorm], probe: Probe
) -> tuple[list[Float[Tensor, " head"]], list[Bool[Tensor, " head"]]]:
    """The OV copying score of every head of every layer, and whether the head's values are a linear map.

    Args:
        model: Running eager attention.
        anatomy: Its heads.
        ends: From `end_maps`.
        norms: From `branch_norms`.
        probe: Gives its blocks rows: `probed`, or where its weights lie in files, block by block.

    Returns:
        Scores in -1 .. 1, NaN where values are no linear map or the circuit is 0; and where they are one.
    """
    size = anatomy.layers[0].d_model
    turned = ends.entry.T @ _token_products(model) @ ends.exit.T
    if not is_finite(turned):
        ends_of = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
        raise ModelError("the OV copying score reads the embeddings and the output layer of all tokens, and not all of "
                         f"them are numbers{_blamed(ends_of, model)}")
    tests = torch.randn(_TESTS, size, generator=torch.Generator().manual_seed(0)).to(turned)
    wide = doubled(turned[:0])
    small = [wide.new_zeros(p.num_heads, p.d_head, p.d_head) for p in anatomy.layers]
    told_of = [wide.new_zeros(_TESTS, p.num_heads, p.d_head) for p in anatomy.layers]
    straight: list[Tensor] = [torch.empty(0, dtype=torch.bool)] * anatomy.num_layers  # of layers without heads

    def visit(chosen: slice, layer: int, z: Tensor, attention: Tensor) -> None:
        part = anatomy.layers[layer]
        values = _values(part, z, attention)
        told_of[layer] += torch.einsum("ui,ihd->uhd", tests[:, chosen].to(values), values).to(told_of[layer].device)
        read = keys(part, turned[chosen], z, norms.get(layer))
        small[layer] += torch.einsum("ihd,ihe->hde", values, doubled(read)).to(small[layer].device)

    def check(layer: int, z: Tensor, attention: Tensor) -> None:
        seen = _values(anatomy.layers[layer], z, attention).to(told_of[layer].device)
        straight[layer] = _parallel(seen, told_of[layer]) <= _TOLERANCE.get(model.dtype, _COARSE)

    chosen = _slices(size)
    # Each layer is shown the tests last, when all that is told of them is there.
    probe(itertools.chain((_basis(model, size, one) for one in chosen), [torch.cat([tests, -tests]).to(model.dtype)]),
          lambda i: functools.partial(visit, chosen[i]) if i < len(chosen) else check)
    for layer, matrices in enumerate(small):
        if bad := torch.nonzero(~torch.isfinite(matrices).flatten(1).all(1)).flatten().tolist():
            raise ModelError(f"the OV circuit of {heads_named([(layer, h) for h in bad])} is no number"
                             f"{_blamed([anatomy.layers[layer].attention], model)}")
    scores = [torch.where(ok.cpu(), _copying_of(s.cpu()), torch.nan) for s, ok in zip(small, straight, strict=True)]
    return scores, [ok.cpu() for ok in straight]


def _blamed(modules: Iterable[nn.Module], model: PreTrainedModel) -> str:
    names = damaged(modules, model)
    return (f": {', '.join(names[:3])} are NaN or infinite; the checkpoint is damaged: download or convert it again"
            if names else ": leave induction heads out")


def _values(part: LayerAnatomy, z: Tensor, attention: Tensor) -> Float[Tensor, "row head d_head"]:
    """Half of what the rows' sign changed in values: of one token, outputs divided by the attention to it (sinks)."""
    own = doubled(z[:, 0]) / doubled(attention[:, :, 0, 0, None])
    plus, minus = own.chunk(2)
    return (plus - minus) / 2


def probed(
    model: PreTrainedModel, anatomy: Anatomy, told: Mapping[str, bool], parts: Iterable[Float[Tensor, "row d_model"]],
    visit_of: Callable[[int], Visit],
) -> None:
    """Give every block some rows, a pass of the model for each part of them.

    Args:
        model: Running eager attention.
        anatomy: Its heads.
        told: From `attention_keywords`.
        parts: The rows.
        visit_of: What is shown every layer's heads and attention, by the number of the part.
    """
    for i, rows in enumerate(parts):
        with fed(anatomy, rows[:, None]), attention_seen(anatomy, visit_of(i)):
            _run(model, anatomy, len(rows), told)


def _parallel(
    seen: Float[Tensor, "test head d_head"], expected: Float[Tensor, "test head d_head"]
) -> Float[Tensor, " head"]:
    """How far two vectors are from parallel, relative to their length: each head's worst of the tests."""
    a, b = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30) for x in (seen, expected))
    apart: Tensor = (a - b).norm(dim=-1)
    return apart.amax(0)


def _copying_of(small: Float[Tensor, "head d_head d_head"]) -> Float[Tensor, " head"]:
    eigenvalues: Tensor = torch.linalg.eigvals(small)
    return eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)


def _token_products(model: PreTrainedModel) -> Float[Tensor, "d_embedding d_unembedding"]:
    """The sum over tokens of embedding times unembedding: all that is ever needed of the vocabulary."""
    embeddings: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with present(embeddings), present(output):
        device = embeddings.weight.device
        total = torch.zeros(embeddings.weight.shape[1], output.weight.shape[1], device=device)
        for e, u in zip(embeddings.weight.detach().split(8192), output.weight.detach().split(8192), strict=False):
            n = min(len(e), len(u))
            total.addmm_(e[:n].float().T, u[:n].to(device).float())
    return total.to(device_of(model))
