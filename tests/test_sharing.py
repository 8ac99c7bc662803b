"""How often layers are computed for masks whose order is not known yet: bounds that hold, and a middle that is near."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from headcount.masks import Mask, layers_run, prune, random_order
from headcount.study import sharing
from headcount.study.jobs import GridOrder
from headcount.study.masksets import Grid, OwnCurve, RandomCurve, SingleFFNs, SingleHeads
from headcount.study.sharing import distinct_masks, layers_of

HEADS = ((4,) * 6, (1, 3, 2, 2), (9,) * 30, (0, 2, 0, 3))
FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def orders(n: int) -> list[list[int]]:
    """Random ones, by layer from either end, and nearly by layer, as importance often is."""
    rng = np.random.default_rng(0)
    sloped = [list(np.argsort(np.arange(n) * sign + rng.normal(0, n / 6, n))) for sign in (1, -1)]
    return [*(random_order(n, 100 + seed) for seed in range(8)), list(range(n)), list(range(n))[::-1],
            *[[int(i) for i in order] for order in sloped]]


def curve(component: str, fractions: tuple[float, ...]) -> OwnCurve:
    return OwnCurve(component=component, order="gradient", importance="", fractions=fractions)


def grid(points: tuple[tuple[float, float], ...]) -> Grid:
    order = GridOrder(component="head", order="gradient", importance="")
    return Grid(heads=order, ffns=order, points=points)


@pytest.mark.parametrize("heads", HEADS, ids=len)
@pytest.mark.parametrize("component", ["head", "ffn"])
def test_no_order_of_a_curve_leaves_the_bounds(heads: tuple[int, ...], component: str) -> None:
    n = sum(heads) if component == "head" else len(heads)
    for fractions in (FRACTIONS, (0.5, 0.9), (0.3,)):
        found = layers_of(curve(component, fractions), heads)
        runs = [layers_run([prune(heads, component, order, f) for f in fractions]) for order in orders(n)]
        assert found.low <= min(runs) <= max(runs) <= found.high
        assert found.low <= found.middle <= found.high


@pytest.fixture
def uncached() -> Iterator[Callable[[], None]]:
    """What was counted by these orders is not kept for others."""
    def clear() -> None:
        sharing._curve.cache_clear()
        sharing._grid.cache_clear()

    yield clear
    clear()


@pytest.mark.parametrize("heads", HEADS, ids=len)
def test_by_an_order_as_many_layers_are_counted_as_its_masks_run(
    heads: tuple[int, ...], uncached: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_ORDERS", 1)
    for own in zip(orders(sum(heads)), orders(len(heads)), strict=True):
        order = dict(zip(("head", "ffn"), own, strict=True))
        monkeypatch.setattr(sharing, "_order", lambda component, *_: np.array(order[component]))  # noqa: B023
        for fractions in (FRACTIONS, (0.5, 0.9), (0.0, 0.3, 1.0)):
            pruned = {c: [prune(heads, c, order[c], f) for f in fractions] for c in order}
            both = [Mask(h.heads, f.ffns) for h, f in itertools.product(*pruned.values())]
            for asked, masks in ((curve("head", fractions), pruned["head"]), (curve("ffn", fractions), pruned["ffn"]),
                                 (grid(tuple(itertools.product(fractions, repeat=2))), both)):
                uncached()
                assert layers_of(asked, heads).middle == layers_run(masks)


@pytest.mark.parametrize("component", ["head", "ffn"])
def test_the_bounds_of_a_curve_are_reached(component: str) -> None:
    """On a model so small that all orders can be tried."""
    heads = (2, 1, 2) if component == "head" else (1,) * 5
    found = layers_of(curve(component, (0.2, 0.4, 0.9)), heads)
    runs = [layers_run([prune(heads, component, order, f) for f in (0.2, 0.4, 0.9)])
            for order in itertools.permutations(range(5))]
    assert (found.low, found.high) == (min(runs), max(runs))


@pytest.mark.parametrize("heads", HEADS, ids=len)
def test_no_orders_of_a_grid_leave_the_bounds(heads: tuple[int, ...]) -> None:
    for points in (tuple((0.8, f) for f in FRACTIONS), tuple(itertools.product((0.2, 0.9), (0.0, 0.5, 0.9))),
                   ((0.5, 0.5),)):
        found = layers_of(grid(points), heads)
        runs = [layers_run([Mask(prune(heads, "head", of_heads, h).heads, prune(heads, "ffn", of_ffns, f).ffns)
                            for h, f in points])
                for of_heads, of_ffns in zip(orders(sum(heads)), orders(len(heads)), strict=True)]
        assert found.low <= min(runs) <= max(runs) <= found.high


def test_the_middle_is_near_what_orders_of_importance_give() -> None:
    """Those of layers that differ, and random ones; SmolLM2's own are in docs/design.md."""
    heads = HEADS[2]
    for component in ("head", "ffn"):
        n = sum(heads) if component == "head" else len(heads)
        runs = [layers_run([prune(heads, component, order, f) for f in FRACTIONS])
                for order in [*orders(n)[:8], *orders(n)[-2:]]]
        assert layers_of(curve(component, FRACTIONS), heads).middle == pytest.approx(np.mean(runs), rel=0.1)


def test_shares_that_round_to_the_same_number_are_one_mask() -> None:
    heads, fractions = (4, 4), (0.0, 0.41, 0.45, 0.49, 0.5, 0.7)
    for component in ("head", "ffn"):
        n = 8 if component == "head" else 2
        asked = RandomCurve(component=component, order_seed=3, fractions=fractions)
        masks = {prune(heads, component, random_order(n, 3), f) for f in fractions}
        assert distinct_masks(asked, heads) == distinct_masks(curve(component, fractions), heads) == len(masks)
    points = tuple(itertools.product(fractions, repeat=2))
    assert distinct_masks(grid(points), heads) == 4 * 2
    assert distinct_masks(SingleFFNs((0, 1)), heads) == 2


def test_what_is_known_is_counted_exactly() -> None:
    heads = HEADS[0]
    assert layers_of(SingleFFNs(tuple(range(6))), heads) == (21, 21, 21)
    assert layers_of(SingleHeads(((0, 1), (5, 3))), heads) == (12, 12, 12)
    drawn = RandomCurve(component="ffn", order_seed=3, fractions=(0.2, 0.5))
    assert layers_of(drawn, heads).middle == layers_run([prune(heads, "ffn", random_order(6, 3), f)
                                                         for f in (0.2, 0.5)])
