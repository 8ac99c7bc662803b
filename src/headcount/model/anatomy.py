"""Where a decoder keeps its heads and FFNs: five short lists of names serve every family, no adapter per model.

`model.get_decoder()` gives the decoder of every family of transformers; its blocks are a ModuleList under one of
`Names.layers`, and in each block the attention, its output projection, the FFN and its down projection are found
under the other four lists (DBRX's attention under a dotted name). Three things differ between families and are found
by looking, not by the model's name: GPT-Neo nests one attention in another; OPT, XGLM and BioGPT have no FFN module
(its two matrices lie in the block); a mixture of experts has no single down projection, so its whole routed block
counts as the FFN's output, and where experts stand beside a dense FFN (Gemma-4), the norm of their sum.

Widths come from weights, counts from the config: d_head = out-projection's inputs // number of heads, because the
config's arithmetic is wrong on Gemma-2 and Qwen3, and modules often carry no number of heads at all.
`headcount.model.contracts` proves on the user's own model that what was found is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from headcount.errors import ModelError, OptionError
from headcount.masks import Mask

# Names that matter for counting parameters only; a family that differs is counted by the rows of its fused projection.
KEYS = ("k_proj",)
VALUES = ("v_proj",)
QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm", "q_ln")
KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm", "k_ln")
# Latent attention: projections with rows of each head, and what all heads read.
LATENT_HEADS = ("q_proj", "q_b_proj", "kv_b_proj")
LATENT_SHARED = ("q_a_proj", "kv_a_proj_with_mqa")
_HEAD_COUNTS = ("num_attention_heads", "num_query_heads", "n_head", "n_heads", "num_heads", "attention_heads")
# The norm that feeds the FFN alone, the first that is there. A norm that feeds attention too (Phi, GPT-J) stays.
_FFN_NORMS = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "ln_mlp", "ln_2", "norm_2", "ffn_norm",
              "post_attention_layernorm", "final_layer_norm")
# In blocks that norm each branch's output (OLMo-2), `post_attention_layernorm` is attention's, not the FFN's.
_FFN_OUTPUT_NORM = "post_feedforward_layernorm"
_EXPERTS = ("experts", "router", "gate")
# Experts in the block itself, beside a dense FFN (Gemma-4), with the norms of their own.
_BESIDE = ("experts", "router", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_1",
           "post_feedforward_layernorm_2")


@dataclass(frozen=True)
class Names:
    """Names to look for, in this order; a name may be dotted.

    Args:
        layers: The decoder's list of blocks.
        attention: The attention in a block.
        out_proj: The attention's output projection.
        ffn: The FFN in a block.
        down_proj: The FFN's last projection, in the FFN or in the block.
    """

    layers: tuple[str, ...] = ("layers", "h", "blocks")
    attention: tuple[str, ...] = ("self_attn", "attn", "attention", "self_attention", "norm_attn_norm.attn")
    out_proj: tuple[str, ...] = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
    ffn: tuple[str, ...] = ("mlp", "ffn", "feed_forward", "block_sparse_moe")
    down_proj: tuple[str, ...] = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2", "Wo")


_NAMES = Names()


@dataclass(frozen=True, eq=False)
class LayerAnatomy:
    """One layer's modules and sizes.

    Args:
        block: The whole layer.
        attention: Its attention.
        out_proj: The attention's output projection; slice h of its input is head h's output.
        ffn: The module that the FFN's input enters; None where its matrices lie in the block, or experts are routed or
            stand beside it.
        ffn_output: The module whose (first) output is the FFN's: the down projection, or the routed block of experts.
        routed: Whether the FFN is a routed block of experts.
        num_heads: Query heads.
        num_kv_heads: KV groups.
        kv_of_head: The KV group that each query head reads.
        ffn_norm: The norm that feeds the FFN alone; None where there is none, or it was removed.
        d_head: Width of a head's output.
        d_model: Width of the residual stream.
        query_parameters: What goes with one head beside its slice of the output projection: query weights and biases.
        out_parameters: Weights of one head in the output projection.
        kv_parameters: Key and value weights and biases of one KV group.
        attention_parameters: What goes with the layer's last head: all of attention but the output projection's bias.
        ffn_parameters: Weights and biases of the FFN, with the norm that feeds it alone.
    """

    block: nn.Module
    attention: nn.Module
    out_proj: nn.Module
    ffn: nn.Module | None
    ffn_output: nn.Module
    routed: bool
    num_heads: int
    num_kv_heads: int
    kv_of_head: tuple[int, ...]
    ffn_norm: nn.Module | None
    d_head: int
    d_model: int
    query_parameters: int
    out_parameters: int
    kv_parameters: int
    attention_parameters: int
    ffn_parameters: int

    @property
    def ffn_input(self) -> nn.Module | None:
        """What the FFN's input enters first: its module, or the one matrix before its output; None if neither is known.

        Of matrices that lie in the block, it is known where there are two, which fit.
        """
        if self.ffn is not None:
            return self.ffn
        down: Any = self.ffn_output
        others: list[Any] = [m for m in self.block.children() if hasattr(m, "in_features") and m is not down]
        fits = len(others) == 1 and others[0].out_features == getattr(down, "in_features", None)
        return others[0] if fits else None


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Where a model keeps its heads and FFNs, and how many parameters each has."""

    layers: tuple[LayerAnatomy, ...]
    num_parameters: int

    @property
    def heads_per_layer(self) -> tuple[int, ...]:
        """The number of query heads of every layer."""
        return tuple(part.num_heads for part in self.layers)

    @property
    def num_layers(self) -> int:
        """The number of layers, each with one FFN."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """The number of query heads of the whole model."""
        return sum(self.heads_per_layer)

    def parameters_per_head(self, layer: int) -> int:
        """What removing one head of a whole layer saves: q and o, and k and v where each head has its own."""
        part = self.layers[layer]
        own = part.kv_parameters if part.num_kv_heads == part.num_heads else 0
        return part.query_parameters + part.out_parameters + own

    def parameters_per_ffn(self, layer: int) -> int:
        """What removing the layer's FFN saves."""
        return self.layers[layer].ffn_parameters

    def parameters_removed(self, mask: Mask) -> int:
        """What physically removing everything this mask leaves out saves.

        A query head takes its query and output weights along, the keys and values of its KV group when it is the
        group's last, and what heads share (norms of queries and keys) when it is the layer's last. The output
        projection's bias stays. An FFN takes all of its own along, and its pre-norm.

        Raises:
            OptionError: If the mask describes a model of other numbers of heads.
        """
        self.check(mask)
        saved = 0
        for part, kept, ffn in zip(self.layers, mask.heads, mask.ffns, strict=True):
            groups = {group for group, stays in zip(part.kv_of_head, kept, strict=True) if stays}
            saved += (int((~kept).sum()) * (part.query_parameters + part.out_parameters)
                      + (part.num_kv_heads - len(groups)) * part.kv_parameters
                      if kept.any() else part.attention_parameters)
            saved += 0 if ffn else part.ffn_parameters
        return saved

    def check(self, mask: Mask) -> None:
        """Refuse a mask of another model.

        Raises:
            OptionError: If the mask describes a model of other numbers of heads.
        """
        if mask.heads_per_layer != self.heads_per_layer:
            raise OptionError(f"the mask is for a model with {_brief(mask.heads_per_layer)} heads per layer, this one "
                              f"has {_brief(self.heads_per_layer)}: make it with Mask.full(anatomy.heads_per_layer)")

    def table(self) -> list[dict[str, int]]:
        """One row per layer, for printing."""
        return [{"layer": i, "heads": part.num_heads, "kv_groups": part.num_kv_heads, "d_head": part.d_head,
                 "parameters_per_head": self.parameters_per_head(i), "parameters_per_ffn": part.ffn_parameters}
                for i, part in enumerate(self.layers)]


def find_anatomy(model: PreTrainedModel, names: Names = _NAMES) -> Anatomy:
    """Where this model keeps its heads and FFNs.

    Args:
        model: A decoder-only language model; its weights are not read, so they may be on the meta device.
        names: What to look for, where the model is of a family that names its parts otherwise.

    Raises:
        ModelError: If a block has no attention or FFN under these names (state-space and hybrid models have none), its
            number of heads does not fit its weights, or layers share a module.
    """
    decoder, name, blocks = _decoder(model, names)
    config = getattr(decoder, "config", model.config)
    if not len(blocks):
        raise ModelError("its config describes a model without layers: put back the config.json that belongs to it")
    layers = tuple(_layer(block, f"{name}.{i}", config, i, names) for i, block in enumerate(blocks))
    _check_apart(layers, name)
    return Anatomy(layers, sum(p.numel() for p in parameters_once(model)))


def parameters_once(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """A model's parameters, tied ones once: also where hooks that fetch weights have put apart what is tied."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    names, told = dict[int, str](), set[str]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        kept = tied.get(first, first) if parameter.is_meta else first
        if kept not in told:
            told.add(kept)
            yield parameter



def _check_apart(layers: tuple[LayerAnatomy, ...], name: str) -> None:
    """Refuse layers that are one and the same module, or have parts in common: a gate on one acts on the other, too."""
    for what in ("block", "attention", "out_proj", "ffn_output"):
        first: dict[int, int] = {}
        for i, part in enumerate(layers):
            other = first.setdefault(id(getattr(part, what)), i)
            if other != i:
                raise ModelError(f"{name}.{other} and {name}.{i} share a module ({what}): what is removed from one is "
                                 "removed from the other, so that they cannot be measured as layers of their own; give "
                                 "each layer a copy")


def _decoder(model: PreTrainedModel, names: Names) -> tuple[nn.Module, str, nn.ModuleList]:
    """The decoder, and its list of blocks with the list's name."""
    found: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    # ModernBERT's decoder calls its output layer the decoder. Llama-4's text model is not found by transformers' own
    # look-up, which then hands the whole model back.
    for outer in (found, model.base_model):
        own = _blocks(outer, names)
        if own is not None:
            return outer, *own
        inner = [(name, child, blocks) for name, child in outer.named_children()
                 if (blocks := _blocks(child, names)) is not None]
        if len(inner) > 1:
            told = ", ".join(f"{name} ({type(stack).__name__})" for name, stack, _ in inner)
            raise ModelError(f"{type(outer).__name__} has several stacks of layers ({told}): only a model whose layers "
                             "follow one another in one stack can be measured")
        if inner:
            _, stack, found_in = inner[0]
            return stack, *found_in
    raise _not_found(found, type(found).__name__, "list of layers", "layers", names.layers)


def _blocks(stack: nn.Module, names: Names) -> tuple[str, nn.ModuleList] | None:
    name, blocks = _child(stack, names.layers)
    return (name, blocks) if isinstance(blocks, nn.ModuleList) else None


def _layer(block: nn.Module, where: str, config: PreTrainedConfig, index: int, names: Names) -> LayerAnatomy:
    attention, out_proj = _attention(block, where, names)
    ffn, output = _ffn(block, where, names)
    width, d_model = _size(out_proj, where)
    removed: dict[str, list[int]] | None = getattr(config, "headcount", None)
    heads = _num_heads(config, index) if removed is None else removed["num_heads"][index]
    if removed is not None and (heads == 0) != _is_gone(out_proj):
        raise ModelError(f"{where}: the config says that {heads} heads are left, which the layer does not have: copy "
                         "the folder again")
    if heads == 0 and removed is not None:
        return LayerAnatomy(
            block=block, attention=attention, out_proj=out_proj, ffn=None if output is ffn else ffn, ffn_output=output,
            routed=output is ffn, num_heads=0, num_kv_heads=0, kv_of_head=(), ffn_norm=_pre_norm(block, config),
            d_head=1, d_model=d_model, query_parameters=0, out_parameters=0, kv_parameters=0, attention_parameters=0,
            ffn_parameters=_ffn_parameters(block, ffn, attention, config))
    if heads < 1 or width % heads:
        raise ModelError(f"{where} ({type(block).__name__}): the attention's output projection has {width} inputs, "
                         f"which the config's {heads} attention heads do not divide: attention of this kind is not "
                         "supported")
    d_head = width // heads
    shares: list[int] | None = getattr(attention, "kv_of_head", None)
    groups_said = _said(config, "num_key_value_heads", index) if shares is None else max(shares) + 1
    query, kv, groups = _attention_parameters(attention, out_proj, heads, d_head, groups_said, shares is not None)
    return LayerAnatomy(
        block=block, attention=attention, out_proj=out_proj, ffn=None if output is ffn else ffn, ffn_output=output,
        routed=output is ffn, num_heads=heads, num_kv_heads=groups, d_head=d_head, d_model=d_model,
        kv_of_head=tuple(shares or (head * groups // heads for head in range(heads))),
        ffn_norm=_pre_norm(block, config),
        query_parameters=query, out_parameters=d_head * d_model, kv_parameters=kv,
        attention_parameters=_whole(attention, out_proj), ffn_parameters=_ffn_parameters(block, ffn, attention, config))


def _attention(block: nn.Module, where: str, names: Names) -> tuple[nn.Module, nn.Module]:
    _, attention = _child(block, names.attention)
    if attention is None:
        raise _not_found(block, where, "attention", "attention", names.attention)
    _, out_proj = _child(attention, names.out_proj)
    if out_proj is None:
        _, nested = _child(attention, names.attention)
        if nested is not None:
            attention = nested
            _, out_proj = _child(nested, names.out_proj)
    if out_proj is None:
        raise _not_found(attention, f"{where}'s attention", "output projection", "out_proj", names.out_proj)
    return attention, out_proj


def _ffn(block: nn.Module, where: str, names: Names) -> tuple[nn.Module | None, nn.Module]:
    """The FFN's module, None where its matrices lie in the block, and the module that puts out its output."""
    _, ffn = _child(block, names.ffn)
    if ffn is None:
        _, output = _child(block, names.down_proj)
        if output is None:
            raise _not_found(block, where, "FFN", "ffn", (*names.ffn, *names.down_proj))
        return None, output
    if hasattr(block, _BESIDE[0]):
        # The two are summed nowhere but before this norm, which leaves nothing of nothing.
        _, both = _child(block, (_FFN_OUTPUT_NORM,))
        if both is not None:
            return None, both
    _, output = _child(ffn, names.down_proj)
    if output is None and any(hasattr(ffn, name) for name in _EXPERTS):
        output = ffn
    if output is None:
        raise _not_found(ffn, f"{where}'s FFN", "down projection", "down_proj", names.down_proj)
    return ffn, output


def _child(parent: nn.Module, names: Iterable[str]) -> tuple[str, nn.Module | None]:
    for name in names:
        child: object = parent
        for step in name.split("."):
            child = getattr(child, step, None)
        if isinstance(child, nn.Module):
            return name, child
    return "", None


def _not_found(parent: nn.Module, where: str, what: str, field: str, names: tuple[str, ...]) -> ModelError:
    children = ", ".join(f"{n} ({type(m).__name__})" for n, m in parent.named_children()) or "nothing"
    kind = type(parent).__name__
    called = where if where == kind else f"{where} ({kind})"
    return ModelError(
        f"{called} has no {what}: looked for {', '.join(names)}; it has {children}. "
        "State-space and hybrid models have layers without attention heads and are not supported; if this is ordinary "
        f'attention, call load(..., names=Names({field}=("NAME",)))')


def _num_heads(config: PreTrainedConfig, layer: int) -> int:
    for name in _HEAD_COUNTS:
        if (value := _said(config, name, layer)) is not None:
            return value
    raise ModelError(f"the config of model type {config.model_type!r} names no number of attention heads "
                     f"(looked for {', '.join(_HEAD_COUNTS)}): only models with attention heads can be measured")


def _said(config: PreTrainedConfig, name: str, layer: int) -> int | None:
    """A number that the config gives for all layers or for each; where layers differ it may refuse to give one."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:
        value = getattr(config.per_layer_config[layer], name, None)
    if isinstance(value, (list, tuple)):
        value = value[layer]
    return value if isinstance(value, int) else None


def _size(projection: nn.Module, where: str = "") -> tuple[int, int]:
    """Inputs and outputs of a Linear (of any make), or of GPT-2's transposed Conv1D."""
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):
        sizes = getattr(projection, inputs, None), getattr(projection, outputs, None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    place = f"{where}'s output projection: " if where else ""
    raise ModelError(f"{place}{type(projection).__name__} is no linear projection: it has neither in_features nor nx")


def _parameters(projection: nn.Module) -> int:
    # Not numel(): 4-bit weights are packed.
    inputs, outputs = _size(projection)
    own = 0 if _is_gone(projection) else inputs * outputs
    return own + (outputs if getattr(projection, "bias", None) is not None else 0)


def _is_gone(projection: nn.Module) -> bool:
    """Whether it was removed, all but its bias: its weight is no parameter (`headcount.model.narrowed.Gone`)."""
    return "weight" in dict(projection.named_buffers(recurse=False))


def _attention_parameters(
    attention: nn.Module, out_proj: nn.Module, heads: int, d_head: int, groups_said: int | None, uneven: bool = False
) -> tuple[int, int, int]:
    """Parameters of one head but for its output weights, those of one KV group, and the number of KV groups."""
    linear = [(name, m) for name, m in attention.named_modules()
              if m is not out_proj and (hasattr(m, "in_features") or hasattr(m, "nx"))]
    keys = [m for name, m in linear if name in KEYS]
    values = [m for name, m in linear if name in VALUES]
    beside = sum(p.numel() for p in attention.parameters(recurse=False) if p.shape[:1] == (heads,)) // heads
    if keys:
        # Values are as wide as what heads put out. Gemma-4 has layers without, where keys serve as values.
        groups, rest = divmod(_size((values or keys)[0])[1], d_head)
        if rest or groups < 1 or (heads % groups and not uneven):
            groups = groups_said or heads
        if heads % groups and not uneven:
            raise ModelError(f"{heads} heads cannot share {groups} KV groups: attention of this kind is not supported")
        # Where a norm reads all heads at once, queries and keys of removed heads are still needed for its scale.
        bound_q, own_q = norms_of(attention, QUERY_NORMS, heads)
        bound_k, own_k = norms_of(attention, KEY_NORMS, groups)
        by_head = [m for name, m in linear if name not in (*KEYS, *VALUES) and not (bound_q and name == "q_proj")]
        query = sum(_parameters(m) for m in by_head) // heads + own_q + beside
        return query, sum(_parameters(m) for m in ([] if bound_k else keys) + values) // groups + own_k, groups
    by_head = [m for name, m in linear if name in LATENT_HEADS]
    if by_head and all(name in (*LATENT_HEADS, *LATENT_SHARED) for name, _ in linear):
        # Latent attention: all heads read what is compressed once.
        return sum(_parameters(m) for m in by_head) // heads + beside, 0, groups_said or heads
    if [name for name, _ in linear] == ["q_proj"]:
        # Keys and values are an earlier layer's (Gemma-4).
        return _parameters(linear[0][1]) // heads, 0, groups_said or heads
    outputs = sum(_size(m)[1] for _, m in linear)
    total = sum(_parameters(m) for _, m in linear)
    # Fused: (heads + 2 groups) * d_head outputs.
    groups, rest = divmod(outputs - heads * d_head, 2 * d_head)
    if len(linear) != 1 or rest or groups < 1 or (heads % groups and not uneven):
        # Projections that are shared among all heads in a way that is not known: the output projection's slice alone.
        return 0, 0, groups_said or heads
    row = total // outputs
    return row * d_head + beside, 2 * row * d_head, groups


def norms_of(attention: nn.Module, names: tuple[str, ...], count: int) -> tuple[bool, int]:
    """Whether a norm of queries (or keys) reads all of them at once, and the parameters that each has in norms."""
    _, norm = _child(attention, names)
    bound, own = False, 0
    for weight in (norm.parameters() if norm is not None else ()):
        width = getattr(attention, "head_dim", None) or weight.shape[-1]
        bound |= weight.dim() == 1 and weight.numel() > width
        own += weight.numel() // count if weight.dim() > 1 else 0
    return bound, own


def _whole(attention: nn.Module, out_proj: nn.Module) -> int:
    """All parameters of an attention but its output projection's bias."""
    linear = [m for m in attention.modules() if hasattr(m, "in_features") or hasattr(m, "nx")]
    inside = {id(p) for m in linear for p in m.parameters()}
    bias = _size(out_proj)[1] if getattr(out_proj, "bias", None) is not None else 0
    others = sum(p.numel() for p in attention.parameters() if id(p) not in inside)
    return sum(_parameters(m) for m in linear) + others - bias


def _ffn_parameters(block: nn.Module, ffn: nn.Module | None, attention: nn.Module, config: PreTrainedConfig) -> int:
    if ffn is None and hasattr(block, _BESIDE[0]):
        parts: list[nn.Module] = [m for name in ("mlp", *_BESIDE) if (m := getattr(block, name, None)) is not None]
        own = sum(p.numel() for m in parts for p in m.parameters())
    elif ffn is None:
        own = sum(_parameters(m) for m in block.children() if hasattr(m, "in_features"))
    else:
        linear = [m for m in ffn.modules() if hasattr(m, "in_features") or hasattr(m, "nx")]
        inside = {id(p) for m in linear for p in m.parameters()}
        own = sum(_parameters(m) for m in linear) + sum(p.numel() for p in ffn.parameters() if id(p) not in inside)
    norm = _pre_norm(block, config)
    return own + (0 if norm is None else sum(p.numel() for p in norm.parameters()))


def _pre_norm(block: nn.Module, config: PreTrainedConfig) -> nn.Module | None:
    """The norm that feeds the FFN and nothing else; None where it is applied after the residual add (OPT-350M)."""
    if getattr(config, "do_layer_norm_before", True) is False:
        return None
    if hasattr(block, _FFN_OUTPUT_NORM) and not hasattr(block, _FFN_NORMS[0]):
        return None
    _, norm = _child(block, _FFN_NORMS)
    return norm if norm is not None and any(True for _ in norm.parameters()) else None


def _brief(counts: tuple[int, ...]) -> str:
    return f"{len(counts)} x {counts[0]}" if len(set(counts)) == 1 else str(list(counts))
