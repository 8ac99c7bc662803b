"""Masks that leave every layer the same shape, so that what is left fits a stock model class that names its head size.

A shape is a number of KV groups that every layer keeps, and a number of query heads that every kept group keeps. Of a
model of H heads in G groups a layer there are G * H/G shapes (1 to G groups, 1 to H/G heads in each), the full model's
among them, and a shape of g groups of h heads removes the share 1 - g*h/H of the heads.

- *Which shares make a curve.* For every fraction asked for, the largest share that a shape has and that does not exceed
  it; each share once, the full model's left out.
- *Which shape has a share.* Of several (4 groups of 1, 2 of 2, 1 of 4) the one whose removed heads have the least
  importance together; between equal ones that of fewer groups, since keys and values go with them.
- *Which heads go.* In each layer the groups whose heads have the least importance together, then the least important
  heads of each kept group.

Sums and scores are compared as in all orders: rounded, ties by layer, then group or head (`headcount.masks`).
FFNs are not of this: a class has an FFN in every layer or in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from headcount.errors import ModelError, OptionError, few
from headcount.masks import Mask, removal_order


class Shape(NamedTuple):
    """What every layer has, or keeps: KV groups, and query heads in each."""

    groups: int
    heads_per_group: int

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self.groups * self.heads_per_group


def shape_of(heads_per_layer: Sequence[int], groups_per_layer: Sequence[int]) -> Shape:
    """The one shape of all layers of a model.

    Raises:
        ModelError: If they have none.
    """
    shapes = sorted(set(zip(heads_per_layer, groups_per_layer, strict=False)))
    if len(shapes) != 1 or 0 in shapes[0]:
        told = few([f"{heads} in {groups}" for heads, groups in shapes], "shapes") or "not known"
        raise ModelError("`uniform` leaves every layer the same shape, and this model's layers have no one shape to "
                         f"begin with (heads in KV groups: {told}); leave it out", fields=("uniform",))
    heads, groups = shapes[0]
    return Shape(groups, heads // groups)


def shares(fractions: Sequence[float], full: Shape) -> tuple[float, ...]:
    """The shares of heads that a curve of uniform shapes removes, rising.

    Args:
        fractions: Those asked for.
        full: The model's shape.

    Raises:
        OptionError: If every shape removes more than the largest of these fractions.
    """
    # As numbers of heads: shares are compared as `headcount.masks.count` does, with room for rounding.
    kept = sorted({shape.heads for shape in smaller(full)})
    chosen = {next((n for n in kept if full.heads - n <= fraction * full.heads + 1e-9), full.heads)
              for fraction in fractions} - {full.heads}
    if not chosen:
        least = f"{(full.heads - kept[-1]) / full.heads:.3g}" if kept else ""
        can = f"the smallest share that one removes is {least}" if kept else "a layer of one head has no smaller one"
        raise OptionError(f"no shape of {full.heads} heads in {full.groups} KV groups removes as little as "
                          f"`fractions` ask for ({max(fractions):.3g} at most): {can}", fields=("fractions", "uniform"))
    return tuple(sorted((full.heads - n) / full.heads for n in chosen))


def smaller(full: Shape) -> list[Shape]:
    """All shapes that a layer can be left with but its own, those of few groups first."""
    return [Shape(groups, heads) for groups in range(1, full.groups + 1)
            for heads in range(1, full.heads_per_group + 1) if (groups, heads) != full]


def uniform_mask(share: float, full: Shape, scores: Sequence[Float[np.ndarray, " head"]]) -> Mask:
    """The mask that removes this share of the heads and leaves every layer the same shape.

    Args:
        share: One of `shares`.
        full: The model's shape.
        scores: The heads' importance, by layer, then head; further ones break ties of those before them.

    Raises:
        OptionError: If no shape removes this share.
    """
    kept = [shape for shape in smaller(full) if abs(full.heads - shape.heads - share * full.heads) < 1e-6]
    if not kept:
        raise OptionError(f"no shape of {full.heads} heads in {full.groups} KV groups removes the share {share:.3g}")
    masks = [_kept(shape, full, scores) for shape in kept]
    removed = [np.array([one[~mask.reshape(-1)].sum() for mask in masks]) for one in scores]
    chosen = masks[removal_order(*removed)[0]]
    return Mask(list(chosen.reshape(len(chosen), full.heads)), np.ones(len(chosen), bool))


def _kept(shape: Shape, full: Shape, scores: Sequence[Float[np.ndarray, " head"]]) -> np.ndarray:
    """True for the heads that stay where every layer is left this shape; by layer, group and head of the group."""
    layers = len(scores[0]) // full.heads
    places = _places([one.reshape(layers * full.groups, -1).sum(axis=1) for one in scores])
    groups = _last(places.reshape(layers, full.groups), shape.groups)
    heads = _last(_places(scores).reshape(layers, full.groups, -1), shape.heads_per_group)
    return np.asarray(groups[:, :, None] & heads)


def _places(scores: Sequence[Float[np.ndarray, " component"]]) -> np.ndarray:
    """The place of each component in the removal order of all."""
    return np.argsort(removal_order(*scores))


def _last(places: np.ndarray, number: int) -> np.ndarray:
    """True for so many along the last axis, those that go last."""
    return np.asarray(np.argsort(np.argsort(places, axis=-1), axis=-1) >= places.shape[-1] - number)
