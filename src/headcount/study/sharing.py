"""How often layers are computed for a set of masks: exactly where its masks are known, else between bounds.

Masks that are swept share the layers before their first difference (`headcount.masks.blocks_run`). The full model,
single components, random orders and curves of one shape are known before anything is measured; curves, transfer and
the grid go by orders that are not. For these there are bounds that no order leaves, and a middle: the mean over many
drawn orders. Importance differs between layers, and little between neighbouring ones, so that masks part later than by
random orders: a component's drawn importance is a random walk over the layers, of variance 1, plus noise of its own of
standard deviation `_NOISE`, near what was run of SmolLM2 (docs/design.md, 4.14).

The bounds of a curve. Its masks are nested, so that neighbouring fractions part at the first layer that has a component
of those which the larger fraction removes besides. These sets have known sizes and nothing in common. A parting costs
the layers behind it, its own included where heads part. It comes earliest where the i-th set holds the i-th component
of the model, and latest where the sets lie at the model's end, the smallest last (the smallest first is the order in
which a sum of finishing times is least). Of the grid: no more than every mask by itself behind the first layer; no less
than every mask parting where the last of its boundaries may lie, and layers without heads and FFN left out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from headcount.masks import Component, count, layers_run
from headcount.study.masksets import (
    CommonCurve,
    CommonUniformCurve,
    FullModel,
    Grid,
    MaskSet,
    OwnCurve,
    RandomCurve,
    SingleFFNs,
    SingleHeads,
    Transfer,
    UniformCurve,
    steps_of,
)

# Drawn orders that the middle is a mean over, and a component's own part in its drawn importance.
_ORDERS = 60
_NOISE = 0.75


class Layers(NamedTuple):
    """How often a layer is computed over a job's positions: at least, about, at most."""

    low: float | int
    middle: float | int
    high: float | int

    @classmethod
    def exactly(cls, layers: float | int) -> Layers:
        """A number that is known."""
        return cls(layers, layers, layers)

    def times(self, factor: float | int) -> Layers:
        """So many times as much."""
        return Layers(self.low * factor, self.middle * factor, self.high * factor)

    def plus(self, other: Layers) -> Layers:
        """Both together."""
        return Layers(self.low + other.low, self.middle + other.middle, self.high + other.high)

    @property
    def exact(self) -> bool:
        """Whether it is known."""
        return self.low == self.high


NONE = Layers(0, 0, 0)


def layers_of(masks: MaskSet, heads_per_layer: tuple[int, ...]) -> Layers:
    """How often a layer is computed for a set of masks, of a model that can be run layer by layer.

    Args:
        masks: The set.
        heads_per_layer: The model's number of heads of every layer.
    """
    layers = len(heads_per_layer)
    if isinstance(masks, FullModel):
        return Layers.exactly(layers)
    if isinstance(masks, SingleFFNs | SingleHeads | RandomCurve):
        return _known(masks, heads_per_layer)
    if isinstance(masks, Grid):
        return _grid(masks.points, heads_per_layer)
    if isinstance(masks, UniformCurve | CommonUniformCurve):
        return Layers.exactly(layers * len(masks.fractions))  # each leaves the first layer another shape
    return _curve(masks.component, masks.fractions, heads_per_layer)


@functools.lru_cache(maxsize=4096)
def _known(masks: SingleFFNs | SingleHeads | RandomCurve, heads_per_layer: tuple[int, ...]) -> Layers:
    return Layers.exactly(layers_run([mask for mask, _ in masks.masks(heads_per_layer, ())]))


@functools.lru_cache(maxsize=4096)
def _curve(component: Component, fractions: tuple[float, ...], heads_per_layer: tuple[int, ...]) -> Layers:
    layers = len(heads_per_layer)
    places = _places(component, heads_per_layer)
    sizes = _sizes(fractions, len(places))
    if len(fractions) < 2 or not sizes:
        return Layers.exactly(layers)
    behind = layers if component == "head" else layers - 1  # where FFNs part, the layer itself is computed once
    # What no fraction removes, and what the first one does, need not be at the end.
    latest = [places[len(places) - taken] for taken in itertools.accumulate(sorted(sizes))]
    low = layers + sum(behind - place for place in latest)
    high = layers + sum(behind - place for place in places[: len(sizes)])
    if component == "ffn":  # of a layer without heads that loses its FFN nothing is left to compute
        low -= min(heads_per_layer.count(0), count(max(fractions), layers)) * (1 + len(sizes))
    middle = _middle([(f, 0.0) if component == "head" else (0.0, f) for f in fractions], heads_per_layer)
    return Layers(low, float(np.clip(middle, low, high)), high)


@functools.lru_cache(maxsize=4096)
def _grid(points: tuple[tuple[float, float], ...], heads_per_layer: tuple[int, ...]) -> Layers:
    layers, heads = len(heads_per_layer), _places("head", heads_per_layer)
    if len(points) < 2:
        return Layers.exactly(layers)
    masks = sorted({(count(h, len(heads)), count(f, layers)) for h, f in points})
    # Layers that may lose all heads and the FFN: they are not computed then.
    taken = list(itertools.accumulate(sorted(heads_per_layer)))
    gone = [min(int(np.searchsorted(taken, of_heads, side="right")), of_ffns) for of_heads, of_ffns in masks]
    places = [heads[len(heads) - size] for size in _differences(of_heads for of_heads, _ in masks)]
    places += [1 + layers - size for size in _differences(of_ffns for _, of_ffns in masks)]
    last = max(places, default=layers)
    low = layers - min(gone) + (len(masks) - 1) * max(0, layers - last - max(gone))
    high = len({of_heads for of_heads, _ in masks}) + (layers - 1) * len(masks)
    middle = _middle(points, heads_per_layer)
    return Layers(low, float(np.clip(middle, low, high)), high)


def distinct_masks(masks: MaskSet, heads_per_layer: tuple[int, ...]) -> int:
    """How many different masks a set has by any orders: shares of few components round to the same number.

    Args:
        masks: The set.
        heads_per_layer: The model's number of heads of every layer.
    """
    heads, layers = sum(heads_per_layer), len(heads_per_layer)
    if isinstance(masks, Grid):
        return len({(count(h, heads), count(f, layers)) for h, f in masks.points})
    if isinstance(masks, OwnCurve | RandomCurve | CommonCurve | Transfer):
        return len({count(f, heads if masks.component == "head" else layers) for f in masks.fractions})
    return max(1, len(steps_of(masks)))


def _middle(points: Sequence[tuple[float, float]], heads_per_layer: tuple[int, ...]) -> float:
    """The mean over drawn orders of what masks without these shares of heads and FFNs cost."""
    return float(np.mean([_by_a_drawn_order(points, heads_per_layer, seed) for seed in range(_ORDERS)]))


def _by_a_drawn_order(points: Sequence[tuple[float, float]], heads_per_layer: tuple[int, ...], seed: int) -> int:
    """What `layers_run` counts, without making the masks: those of an order are nested."""
    heads, heads_left = _nested("head", [h for h, _ in points], heads_per_layer, seed)
    ffns, ffn_left = _nested("ffn", [f for _, f in points], heads_per_layer, seed)
    total, groups = 0, np.zeros(len(points), int)
    for layer in range(len(heads_per_layer)):
        ways, kept = heads[:, layer] * len(points) + ffns[:, layer], ffn_left[:, layer]
        # Each way that keeps the FFN; of a group that has none, the attention alone, if there are heads.
        total += len({*ways[kept].tolist()}) + len({*groups[heads_left[:, layer]].tolist()} - {*groups[kept].tolist()})
        groups = ways
    return total


def _nested(
    component: Component, fractions: Sequence[float], heads_per_layer: tuple[int, ...], seed: int
) -> tuple[Int[np.ndarray, "mask layer"], Bool[np.ndarray, "mask layer"]]:
    """Of masks by a drawn order: which are alike up to and with each layer, and whether any component is left there."""
    places = np.array(_places(component, heads_per_layer))[_order(component, heads_per_layer, seed)]
    counts, of_mask = np.unique([count(f, len(places)) for f in fractions], return_inverse=True)
    taken = np.array([np.bincount(places[:n], minlength=len(heads_per_layer)) for n in counts])
    # Neighbours differ from the first layer on that one takes more of than the other.
    differ = np.maximum.accumulate(np.diff(taken, axis=0) > 0, axis=1)
    alike = np.vstack([np.zeros_like(taken[:1]), np.cumsum(differ, axis=0)])
    left = taken < np.bincount(places, minlength=len(heads_per_layer))
    return alike[of_mask], left[of_mask]


@functools.lru_cache(maxsize=4 * _ORDERS)
def _order(component: Component, heads_per_layer: tuple[int, ...], seed: int) -> Int[np.ndarray, " component"]:
    """An order as importance makes them."""
    rng = np.random.default_rng([seed, component == "head"])
    walk = np.cumsum(rng.normal(size=len(heads_per_layer)))
    walk = (walk - walk.mean()) / max(float(walk.std()), 1e-9)
    importance = walk[_places(component, heads_per_layer)]
    return np.argsort(importance + _NOISE * rng.normal(size=len(importance)))


def _places(component: Component, heads_per_layer: Sequence[int]) -> list[int]:
    """The layer of every component, in their order."""
    return [layer for layer, n in enumerate(heads_per_layer) for _ in range(n if component == "head" else 1)]


def _sizes(fractions: Sequence[float], n: int) -> list[int]:
    """How many more components each fraction removes than the one before; without those that remove no more."""
    return _differences(count(f, n) for f in fractions)


def _differences(counts: Iterable[int]) -> list[int]:
    rising = sorted(set(counts))
    return [more - less for less, more in itertools.pairwise(rising)]
