"""Which masks one evaluation measures, and what tells them apart: one class for each kind of set.

A set is part of what its entry answers for, so it says everything that its masks depend on: an order is named by the
entries of importance that it is read from, never by what is in memory. The order of several tasks together, the
aggregate, goes by the mean of their scores (as in the paper's code) or by the mean of their ranks.

Sets of several masks are made of steps (fractions, points of the grid, single components), which do not depend on one
another: a step that another entry of the same order holds need not be measured again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float
from pydantic import ConfigDict

from headcount.masks import Component, Head, Mask, blocks_run, prune, random_order, removal_order
from headcount.study.codec import stored_order, stored_scores
from headcount.study.shapes import shape_of, uniform_mask

Method: TypeAlias = Literal["gradient", "oracle"]
_PLURAL = {"head": "heads", "ffn": "FFNs"}
Step: TypeAlias = Any  # a fraction, a pair of fractions, a layer, or a (layer, head)
# The donor whose order is that of all tasks together, of all but the one that is pruned, and the pruned task itself.
AGGREGATE, OTHERS, OWN = "mean", "mean without own", "own"
RESERVED_DONORS = (AGGREGATE, OTHERS, OWN)
# A description with a field that is not known here is of a later version, and no job of this one.
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Label:
    """What tells a mask from the others of a study; saved beside it.

    Attributes:
        order: By what components go: "none" (the full model), "single", "gradient", "oracle", "common", "random",
            "transfer", "grid", "uniform" or "uniform common".
        component: What is removed: "none", "head", "ffn" or "both".
        donor: Whose order it is, where it is not the task's own.
        order_seed: Of a random order; -1 of any other.
        fraction: Share removed, of the grid that of the heads.
        ffn_fraction: Of the grid, the share of the FFNs.
        layer: Of a single component; -1 elsewhere.
        head: Of a single head; -1 elsewhere.
    """

    order: str
    component: str = "none"
    donor: str = ""
    order_seed: int = -1
    fraction: float = 0.0
    ffn_fraction: float = 0.0
    layer: int = -1
    head: int = -1


Labelled: TypeAlias = list[tuple[Mask, Label]]


@dataclass(frozen=True)
class FullModel:
    """The full model."""

    order: Literal["none"] = "none"

    STEPS: ClassVar[str] = ""
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of entries of importance that the masks are made from."""
        return ()

    @property
    def title(self) -> str:
        """A few words for people."""
        return "full model"

    def passes(self, heads_per_layer: Sequence[int]) -> float | int:
        """What the masks cost, in forward passes."""
        return 1

    def masks(self, heads_per_layer: Sequence[int], importance: Sequence[pd.DataFrame]) -> Labelled:
        """The masks, with labels; `importance` holds the tables of the entries in `needs`."""
        return [(Mask.full(heads_per_layer), Label(self.order))]


@dataclass(frozen=True)
class SingleFFNs:
    """One FFN off, of each of these layers."""

    layers: tuple[int, ...]
    _: KW_ONLY
    order: Literal["single"] = "single"
    component: Literal["ffn"] = "ffn"

    STEPS: ClassVar[str] = "layers"
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    @property
    def needs(self) -> tuple[str, ...]:
        """As in `FullModel`."""
        return ()

    @property
    def title(self) -> str:
        """As in `FullModel`."""
        return f"one FFN off, layers {self.layers[0]} to {self.layers[-1]}"

    def passes(self, heads_per_layer: Sequence[int]) -> float | int:
        """As in `FullModel`: masks share the layers before they differ."""
        return _passes_of(self, tuple(heads_per_layer))

    def masks(self, heads_per_layer: Sequence[int], importance: Sequence[pd.DataFrame]) -> Labelled:
        """As in `FullModel`."""
        full = Mask.full(heads_per_layer)
        return [(full.without_ffns([i]), Label(self.order, self.component, layer=i)) for i in self.layers]


@dataclass(frozen=True)
class SingleHeads:
    """One head off, of each of these (layer, head)."""

    heads: tuple[tuple[int, int], ...]
    _: KW_ONLY
    order: Literal["single"] = "single"
    component: Literal["head"] = "head"

    STEPS: ClassVar[str] = "heads"
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    @property
    def needs(self) -> tuple[str, ...]:
        """As in `FullModel`."""
        return ()

    @property
    def title(self) -> str:
        """As in `FullModel`."""
        return f"one head off, {Head(*self.heads[0])} to {Head(*self.heads[-1])}"

    def passes(self, heads_per_layer: Sequence[int]) -> float | int:
        """As in `SingleFFNs`."""
        return _passes_of(self, tuple(heads_per_layer))

    def masks(self, heads_per_layer: Sequence[int], importance: Sequence[pd.DataFrame]) -> Labelled:
        """As in `FullModel`."""
        full = Mask.full(heads_per_layer)
        return [(full.without_heads([(layer, head)]), Label(self.order, self.component, layer=layer, head=head))
                for layer, head in self.heads]


@functools.lru_cache(maxsize=1024)
def _passes_of(singles: SingleFFNs | SingleHeads, heads_per_layer: tuple[int, ...]) -> float:
    """Forward passes of single components; counted once, since all tasks have the same ones."""
    return blocks_run([mask for mask, _ in singles.masks(heads_per_layer, ())]) / len(heads_per_layer)


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Components of one kind removed along an order, in steps.

    Attributes:
        component: What is removed.
        fractions: The steps.
    """

    component: Component
    fractions: tuple[float, ...]

    STEPS: ClassVar[str] = "fractions"
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    @property
    def span(self) -> str:
        """`heads ... 10% to 90%`, around what the order is called."""
        return f", {self.fractions[0]:.0%} to {self.fractions[-1]:.0%}"

    def passes(self, heads_per_layer: Sequence[int]) -> float | int:
        """As in `FullModel`; masks of one curve share little."""
        return len(self.fractions)

    def pruned(self, heads_per_layer: Sequence[int], order: Sequence[int], label: Label) -> Labelled:
        """The order's masks at every step."""
        return [(prune(heads_per_layer, self.component, order, f), dataclasses.replace(label, fraction=f))
                for f in self.fractions]


@dataclass(frozen=True, kw_only=True)
class OwnCurve(_Curve):
    """Removed by the task's own order.

    Attributes:
        order: What the order is made of.
        importance: The entry that it is read from.
        score: Its score; None for an oracle's accuracy, with gold log-likelihood between equal ones.
    """

    order: Method
    importance: str
    score: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """As in `FullModel`."""
        return (self.importance,)

    @property
    def title(self) -> str:
        """As in `FullModel`."""
        return f"{_PLURAL[self.component]} by {self.order}{self.span}"

    def masks(self, heads_per_layer: Sequence[int], importance: Sequence[pd.DataFrame]) -> Labelled:
        """As in `FullModel`."""
        order = aggregate_order(importance, self.component, self.score)
        return self.pruned(heads_per_layer, order, Label(self.order, self.component))


@dataclass(frozen=True, kw_only=True)
class RandomCurve(_Curve):
    """Removed at random.

    Attributes:
        order_seed: Of the order.
    """

    order_seed: int
    order: Literal["random"] = "random"

    @property
    def needs(self) -> tuple[str, ...]:
        """As in `FullModel`."""
        return ()

    @property
    def title(self) -> str:
        """As in `FullModel`."""
        return f"{_PLURAL[self.component]} at random (seed {self.order_seed}){self.span}"

    def masks(self, heads_per_layer: Sequence[int], importance: Sequence[pd.DataFrame]) -> Labelled:
        """As in `FullModel`."""
        n = sum(heads_per_layer) if self.component == "head" else len(heads_per_layer)
        label = Label(self.order, self.component, order_seed=self.order_seed)
        return self.pruned(heads_per_layer, random_order(n, self.order_seed), label)


@dataclass(frozen=True, kw_only=True)
class _SharedCurve(_Curve):
    """Removed by an order that other tasks have a part in.

    Attributes:
        importance: The entries that the order is read from.
        score: As in `OwnCurve`.
        aggregate: How several tasks' importance becomes one: "mean" of the scores, or of the "ranks".
    """

    importance: tuple[str, ...]
    score: str | None = None
    aggregate: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """As in `FullModel`."""
        return self.importance

    def shared_order(self, importance: Sequence[pd.DataFrame]) -> list[int]:
        """The order of all these tasks together."""
        return aggregate_order(importance, self.component, self.score, self.aggregate or "mean")


@dataclass(frozen=True, kw_only=True)
class CommonCurve(_SharedCurve):
    """Removed by the order of all tasks together, as one smaller model for all of them would be."""

    order: Literal["common"] = "common"

    @property
    def title(self) -> str:
        """As in `FullModel`."""
        return f"{_PLURAL[self.component]} by the order of all tasks{self.span}"

    def masks(self, heads_per_layer: Sequence[int], importance: Sequence[pd.DataFrame]) -> Labelled:
        """As in `FullModel`."""
        return self.pruned(heads_per_layer, self.shared_order(importance), Label(self.order, self.component))


@dataclass(frozen=True, kw_only=True)
class UniformCurve(_Curve):
    """Heads removed by the task's own order so that every layer keeps the same shape (`headcount.study.shapes`).

    Attributes:
        groups: KV groups of every layer of the model.
        importance: The entry that the order is read from.
        score: As in `OwnCurve`.
    """

    groups: int
    importance: str
    score: str | None = None
    order: Literal["uniform"] = "uniform"

    @property
    def needs(self) -> tuple[str, ...]:
        """As in `FullModel`."""
        return (self.importance,)

    @property
    def title(self) -> str:
        """As in `FullModel`."""
        return f"{_PLURAL[self.component]} in one shape{self.span}"

    def masks(self, heads_per_layer: Sequence[int], importance: Sequence[pd.DataFrame]) -> Labelled:
        """As in `FullModel`."""
        scores = aggregate_scores(importance, self.component, self.score)
        return _of_one_shape(self, heads_per_layer, scores)


@dataclass(frozen=True, kw_only=True)
class CommonUniformCurve(_SharedCurve):
    """The same by the order of all tasks together, as one smaller model for all of them would be.

    Attributes:
        groups: As in `UniformCurve`.
    """

    groups: int
    order: Literal["uniform common"] = "uniform common"

    @property
    def title(self) -> str:
        """As in `FullModel`."""
        return f"{_PLURAL[self.component]} in one shape by the order of all tasks{self.span}"

    def masks(self, heads_per_layer: Sequence[int], importance: Sequence[pd.DataFrame]) -> Labelled:
        """As in `FullModel`."""
        scores = aggregate_scores(importance, self.component, self.score, self.aggregate or "mean")
        return _of_one_shape(self, heads_per_layer, scores)


def _of_one_shape(
    curve: UniformCurve | CommonUniformCurve, heads_per_layer: Sequence[int],
    scores: Sequence[Float[np.ndarray, " head"]],
) -> Labelled:
    """The masks of every step of a curve that leaves layers of one shape."""
    full = shape_of(heads_per_layer, [curve.groups] * len(heads_per_layer))
    return [(uniform_mask(f, full, scores), Label(curve.order, curve.component, fraction=f)) for f in curve.fractions]


@dataclass(frozen=True, kw_only=True)
class Transfer(_SharedCurve):
    """Removed by the order of another task, or of several.

    Attributes:
        donor: Whose order: a task, or `AGGREGATE`, `OTHERS`, `OWN`.
        donor_is: "task" where a task has one of these names, so that it is told apart; else None.
    """

    donor: str
    donor_is: Literal["task"] | None = None
    order: Literal["transfer"] = "transfer"

    @property
    def title(self) -> str:
        """As in `FullModel`."""
        return f"{_PLURAL[self.component]} by the order of {self.donor}{self.span}"

    def masks(self, heads_per_layer: Sequence[int], importance: Sequence[pd.DataFrame]) -> Labelled:
        """As in `FullModel`."""
        label = Label(self.order, self.component, self.donor)
        return self.pruned(heads_per_layer, self.shared_order(importance), label)


@dataclass(frozen=True, kw_only=True)
class GridOrder:
    """By what the grid removes one kind of component.

    Attributes:
        component: Heads or FFNs.
        order: What the order is made of.
        importance: The entries that it is read from; a name alone where it is the task's own.
        score: As in `OwnCurve`.
        aggregate: As in `CommonCurve`.
    """

    component: Component
    order: Method
    importance: str | tuple[str, ...]
    score: str | None = None
    aggregate: str | None = None

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    @property
    def needs(self) -> tuple[str, ...]:
        """As in `FullModel`."""
        return (self.importance,) if isinstance(self.importance, str) else self.importance

    def positions(self, importance: Sequence[pd.DataFrame]) -> list[int]:
        """The order itself."""
        return aggregate_order(importance, self.component, self.score, self.aggregate or "mean")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Heads and FFNs removed jointly, at pairs of fractions.

    Attributes:
        heads: By what heads go.
        ffns: By what FFNs go.
        points: Fractions of heads and of FFNs.
        donor: `AGGREGATE` where both orders are those of all tasks together; None where they are the task's own.
    """

    heads: GridOrder
    ffns: GridOrder
    points: tuple[tuple[float, float], ...]
    donor: str | None = None
    order: Literal["grid"] = "grid"

    STEPS: ClassVar[str] = "points"

    @property
    def needs(self) -> tuple[str, ...]:
        """As in `FullModel`: those of the heads, then those of the FFNs."""
        return (*self.heads.needs, *self.ffns.needs)

    @property
    def title(self) -> str:
        """As in `FullModel`."""
        (h, f), (last_h, last_f) = self.points[0], self.points[-1]
        return f"grid, {h:.0%} of heads and {f:.0%} of FFNs to {last_h:.0%} and {last_f:.0%}"

    def passes(self, heads_per_layer: Sequence[int]) -> float | int:
        """As in `FullModel`; masks of the grid share little."""
        return len(self.points)

    def masks(self, heads_per_layer: Sequence[int], importance: Sequence[pd.DataFrame]) -> Labelled:
        """As in `FullModel`."""
        half = len(self.heads.needs)
        heads, ffns = self.heads.positions(importance[:half]), self.ffns.positions(importance[half:])
        label = Label(self.order, "both", self.donor or "")
        return [(Mask(prune(heads_per_layer, "head", heads, h).heads, prune(heads_per_layer, "ffn", ffns, f).ffns),
                 dataclasses.replace(label, fraction=h, ffn_fraction=f)) for h, f in self.points]


# Curves by the order of one task, which names one entry of importance; by one that several tasks may have a part in.
ByOneTask: TypeAlias = OwnCurve | UniformCurve
BySeveral: TypeAlias = CommonCurve | CommonUniformCurve | Transfer
MaskSet: TypeAlias = FullModel | SingleFFNs | SingleHeads | ByOneTask | RandomCurve | BySeveral | Grid


def steps_of(masks: MaskSet) -> tuple[Step, ...]:
    """The steps of a set, none of the full model."""
    return tuple(getattr(masks, masks.STEPS)) if masks.STEPS else ()


def with_steps(masks: MaskSet, steps: Sequence[Step]) -> MaskSet:
    """The same set with other steps; the full model has none."""
    changes: Any = {masks.STEPS: tuple(steps)} if masks.STEPS else {}
    changed: MaskSet = dataclasses.replace(masks, **changes)
    return changed


def aggregate_order(
    tables: Sequence[pd.DataFrame], component: Component, score: str | None, how: str = "mean"
) -> list[int]:
    """The removal order of several tasks' importance together; of one, its own.

    Args:
        tables: Importance tables.
        component: Heads or FFNs.
        score: As in `headcount.study.codec.stored_order`.
        how: "mean" of the scores, or of the "ranks".
    """
    return removal_order(*aggregate_scores(tables, component, score, how))


def aggregate_scores(
    tables: Sequence[pd.DataFrame], component: Component, score: str | None, how: str = "mean"
) -> list[Float[np.ndarray, " component"]]:
    """The scores that decide such an order, the first one first; arguments as in `aggregate_order`."""
    if len(tables) == 1:
        return stored_scores(tables[0], component, score)
    if how == "ranks":
        return [np.mean([np.argsort(stored_order(table, component, score)) for table in tables], axis=0)]
    scores = [stored_scores(table, component, score) for table in tables]
    return [np.mean(kind, axis=0) for kind in zip(*scores, strict=True)]
