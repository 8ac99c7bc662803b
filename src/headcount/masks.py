"""Masks: which attention heads and FFNs of a model are kept, and the orders that decide what goes first.

A mask is one boolean array of heads per layer (layers may differ in their number of heads) and one boolean of FFNs;
True means kept. An order lists components from the least to the most important one; pruning a fraction f of n
components removes the first floor(f * n) of them, over the whole model, so that layers are pruned unevenly
(Bansal et al. 2023, section 4).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

from headcount.errors import OptionError, few

Component = Literal["head", "ffn"]
Flags = Shaped[np.ndarray, " _"] | Sequence[bool]
# What masks keep in one layer: the heads' booleans as bytes, and whether the FFN stays.
Way = tuple[bytes, bool]
# Beside the largest score, what a sum leaves that would be zero but for rounding.
_NOTHING = 1e-12


class Head(NamedTuple):
    """One query head; prints as `L5H1`."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


class Mask:
    """Which heads and FFNs are kept; it never changes.

    Args:
        heads: One boolean array (or list) per layer, True for every query head that is kept.
        ffns: One boolean per layer, True where the FFN is kept.

    Raises:
        OptionError: Where the two do not describe the same number of layers, or are not boolean.
    """

    def __init__(self, heads: Iterable[Flags], ffns: Flags) -> None:
        self._heads = tuple(_read_only(h) for h in heads)
        self._ffns = _read_only(ffns)
        if len(self._heads) != len(self._ffns):
            raise OptionError("a mask needs as many FFNs as layers of heads: "
                              f"{len(self._heads)} layers, {len(self._ffns)} FFNs")

    @property
    def heads(self) -> tuple[Bool[np.ndarray, " _"], ...]:
        """One read-only array per layer, True for every query head that is kept."""
        return self._heads

    @property
    def ffns(self) -> Bool[np.ndarray, " layer"]:
        """True for every layer whose FFN is kept; read-only."""
        return self._ffns

    @classmethod
    def full(cls, heads_per_layer: Sequence[int]) -> Mask:
        """Keep everything in a model with these numbers of heads per layer."""
        return cls([np.ones(n, bool) for n in heads_per_layer], np.ones(len(heads_per_layer), bool))

    def without_heads(self, heads: Iterable[tuple[int, int]]) -> Mask:
        """The same mask with these (layer, index) heads removed as well."""
        kept = [h.copy() for h in self.heads]
        for layer, index in heads:
            if not (0 <= layer < len(kept) and 0 <= index < len(kept[layer])):
                raise OptionError(f"there is no head {Head(layer, index)} in a model of {len(kept)} layers")
            kept[layer][index] = False
        return Mask(kept, self.ffns)

    def without_ffns(self, layers: Iterable[int]) -> Mask:
        """The same mask with the FFNs of these layers removed as well."""
        kept = self.ffns.copy()
        for layer in layers:
            if not 0 <= layer < len(kept):
                raise OptionError(f"there is no FFN L{layer}F in a model of {len(kept)} layers")
            kept[layer] = False
        return Mask(self.heads, kept)

    @property
    def heads_per_layer(self) -> tuple[int, ...]:
        """The number of heads of every layer, kept or not."""
        return tuple(len(h) for h in self.heads)

    @property
    def heads_removed(self) -> list[Head]:
        """The removed heads, by layer, then index."""
        return [Head(layer, int(i)) for layer, h in enumerate(self.heads) for i in np.flatnonzero(~h)]

    @property
    def ffns_removed(self) -> list[int]:
        """The layers whose FFN is removed."""
        return [int(i) for i in np.flatnonzero(~self.ffns)]

    @property
    def is_full(self) -> bool:
        """Whether nothing is removed."""
        return bool(self.ffns.all()) and all(bool(h.all()) for h in self.heads)

    def digest(self) -> str:
        """Sixteen hexadecimal digits that are equal for equal masks only."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """A string of JSON, zeros and ones, that `from_json` reads back."""
        return json.dumps({"heads": ["".join("01"[int(k)] for k in h) for h in self.heads],
                           "ffns": "".join("01"[int(k)] for k in self.ffns)})

    @classmethod
    def from_json(cls, text: str) -> Mask:
        """The mask that `to_json` wrote."""
        raw = json.loads(text)
        return cls([_bits(h) for h in raw["heads"]], _bits(raw["ffns"]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        gone = f"{len(self.heads_removed)} heads and {len(self.ffns_removed)} FFNs removed"
        return f"Mask({gone} of {len(self.ffns)} layers)"


def removal_order(*scores: Float[np.ndarray, " component"]) -> list[int]:
    """Positions from the least to the most important component.

    Scores are rounded to five significant digits, and to zero where they are nothing beside the largest, so that orders
    do not depend on the last bits of a sum; ties go by the next array of scores, and last by position (layer, then
    head).

    Args:
        scores: The first decides; each further one breaks ties of those before it.

    Raises:
        OptionError: If a score is NaN or infinite: it has no place in an order.
    """
    for one in scores:
        if len(wrong := np.flatnonzero(~np.isfinite(one))):
            raise OptionError(f"no order can be made of scores of which {len(wrong)} of {len(one)} are no numbers (the "
                              f"first at position {wrong[0]}): leave these components out, or score all of them")
    keys = [_rounded(s) for s in scores]
    return sorted(range(len(keys[0])), key=lambda i: (*(k[i] for k in keys), i))


def random_order(n: int, seed: int) -> list[int]:
    """The positions 0..n-1 shuffled by this seed."""
    return [int(i) for i in np.random.default_rng(seed).permutation(n)]


def count(fraction: float | int, n: int) -> int:
    """How many of n components a fraction is: `floor(fraction * n)`.

    Raises:
        OptionError: If it is no fraction.
    """
    if not 0 <= fraction <= 1:
        raise OptionError(f"a fraction lies between 0 and 1, not {fraction}")
    # The small constant keeps 0.7 * 10 = 6.999... from losing a component.
    return math.floor(fraction * n + 1e-9)


def prune(heads_per_layer: Sequence[int], component: Component, order: Sequence[int], fraction: float) -> Mask:
    """The mask without the `floor(fraction * n)` components that come first in the order.

    Args:
        heads_per_layer: The model's number of heads per layer.
        component: What the order's positions count: heads (by layer, then index) or FFNs.
        order: All n positions, the least important first.
        fraction: Share to remove, 0..1.

    Raises:
        OptionError: If the component is neither, the fraction is out of range, or the order does not list every
            component once.
    """
    if component not in ("head", "ffn"):
        raise OptionError(f"a component is head or ffn, not {component!r}")
    everything = all_heads(heads_per_layer)
    n = len(everything) if component == "head" else len(heads_per_layer)
    if sorted(order) != list(range(n)):
        raise OptionError(f"an order lists each of this model's {n} {component}s once; this one has {len(order)} items")
    gone = order[: count(fraction, n)]
    full = Mask.full(heads_per_layer)
    return full.without_heads(everything[i] for i in gone) if component == "head" else full.without_ffns(gone)


def blocks_run(masks: Sequence[Mask]) -> int:
    """How many times a layer is computed when all these masks are swept, sharing layers before their first difference.

    Masks that part in a layer share its attention, so that one which only removes the FFN there costs nothing.
    """
    count = 0
    groups: list[list[int]] = [list(range(len(masks)))]
    for layer in range(len(masks[0].ffns) if masks else 0):
        parted = [ways(masks, group, layer) for group in groups]
        # Each way that keeps the FFN; where none does, the attention alone, if there are heads.
        count += sum(sum(ffn for _, ffn in found) or int(any_head(found)) for found in parted)
        groups = [members for found in parted for members in found.values()]
    return count


def layers_run(masks: Sequence[Mask], *, shared: bool = True) -> int:
    """How many times a layer is computed when an engine runs these masks; times the positions, its layer-tokens.

    Args:
        masks: What is kept.
        shared: Whether the model can be run layer by layer (contract 3); otherwise each mask is a pass of its own, as a
            single mask always is.
    """
    return blocks_run(masks) if shared and len(masks) > 1 else sum(len(mask.ffns) for mask in masks)


def ways(masks: Sequence[Mask], members: Iterable[int], layer: int) -> dict[Way, list[int]]:
    """How some of the masks part in a layer: heads and FFN kept there, and the masks (by index) that keep these."""
    found: dict[Way, list[int]] = {}
    for i in members:
        found.setdefault((masks[i].heads[layer].tobytes(), bool(masks[i].ffns[layer])), []).append(i)
    return found


def any_head(found: Iterable[Way]) -> bool:
    """Whether any of the ways keeps a head."""
    return any(any(heads) for heads, _ in found)


def all_heads(heads_per_layer: Sequence[int]) -> list[Head]:
    """Every head of a model, by layer, then index: the positions that orders of heads count."""
    return [*_all_heads(tuple(heads_per_layer))]


@functools.lru_cache(maxsize=8)
def _all_heads(heads_per_layer: tuple[int, ...]) -> tuple[Head, ...]:
    """Made once for a model: every pruning of it asks, and a large one has thousands."""
    return tuple(Head(layer, i) for layer, n in enumerate(heads_per_layer) for i in range(n))


def _rounded(scores: Float[np.ndarray, " component"]) -> list[float]:
    nothing = _NOTHING * float(np.abs(scores).max(initial=0.0))
    return [0.0 if abs(x) < nothing else float(f"{x:.4e}") for x in map(float, scores)]


def _bits(text: str) -> Bool[np.ndarray, " component"]:
    return np.array([c == "1" for c in text], bool)


def _read_only(values: Flags) -> Bool[np.ndarray, " component"]:
    array = np.array(values)
    if array.shape == (0,):  # a layer without heads: of no type, where it was a list
        array = array.astype(bool)
    if array.ndim != 1 or array.dtype != bool:
        raise OptionError(f"a mask is made of one-dimensional boolean arrays, not {array.dtype} of shape {array.shape}")
    array.setflags(write=False)
    return array


def heads_named(heads: Sequence[tuple[int, int]]) -> str:
    """`L3H5`; of many the first few and how many more."""
    return few([str(Head(*head)) for head in heads], "heads")


def ffns_named(layers: Sequence[int]) -> str:
    """`L3F`; of many the first few and how many more."""
    return few([f"L{layer}F" for layer in layers], "FFNs")


def mask_named(mask: Mask) -> str:
    """What a mask leaves out, such as "without L0H1 and 3 more heads, L2F"; empty for the full model."""
    heads, ffns = heads_named(mask.heads_removed), ffns_named(mask.ffns_removed)
    return "" if mask.is_full else f"without {', '.join(filter(None, (heads, ffns)))}"
