"""Masks and orders against what their definitions say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headcount.errors import OptionError
from headcount.masks import Head, Mask, all_heads, prune, random_order, removal_order


def test_full_keeps_everything_and_removals_add_up() -> None:
    full = Mask.full([2, 3])
    assert full.is_full
    assert full.heads_removed == []
    less = full.without_heads([(1, 2), (0, 0)]).without_ffns([1])
    assert less.heads_removed == [Head(0, 0), Head(1, 2)]
    assert less.ffns_removed == [1]
    assert full.is_full, "a mask never changes"
    assert str(Head(1, 2)) == "L1H2"


def test_users_lists_become_a_mask_that_cannot_be_written() -> None:
    mask = Mask(heads=[[True, False], [True]], ffns=[True, False])
    assert mask.heads_removed == [Head(0, 1)]
    with pytest.raises(ValueError, match="read-only"):
        mask.heads[0][0] = False


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_json_and_digest_tell_masks_apart(heads: list[list[bool]], data: st.DataObject) -> None:
    ffns = data.draw(st.lists(st.booleans(), min_size=len(heads), max_size=len(heads)))
    mask = Mask(heads, ffns)
    again = Mask.from_json(mask.to_json())
    assert again == mask
    assert again.digest() == mask.digest()
    other = Mask(heads, [not ffns[0], *ffns[1:]])
    assert other != mask
    assert other.digest() != mask.digest()


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(0, 10))
def test_pruning_removes_the_floor_of_the_least_important(scores: list[float], tenths: int) -> None:
    order = removal_order(np.array(scores))
    mask = prune([len(scores)], "head", order, tenths / 10)
    gone = {h.head for h in mask.heads_removed}
    assert len(gone) == math.floor(len(scores) * tenths / 10 + 1e-9)
    largest = max(map(abs, scores))
    rounded = [float(f"{s:.4e}") if abs(s) >= 1e-12 * largest else 0.0 for s in scores]
    kept = set(range(len(scores))) - gone
    assert not gone or not kept or max(rounded[i] for i in gone) <= min(rounded[i] for i in kept)


def test_floor_does_not_lose_a_component_to_binary_fractions() -> None:
    assert len(prune([10], "head", list(range(10)), 0.7).heads_removed) == 7
    assert len(prune([5, 5], "head", list(range(10)), 0.3).heads_removed) == 3


def test_ties_go_by_the_next_score_then_by_position() -> None:
    assert removal_order(np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.0, 5.0, 2.0, 0.0])) == [2, 1, 0, 3]


def test_scores_that_agree_in_five_digits_are_ties() -> None:
    assert removal_order(np.array([1.000001, 1.0])) == [0, 1]
    zero = np.mean([0.1, 0.2, -0.3])
    assert zero != 0
    assert removal_order(np.array([zero, 0.0, 1.0]), np.array([2.0, 1.0, 0.0])) == [1, 0, 2], "ties of zero"
    assert removal_order(np.array([1.0001, 1.0])) == [1, 0]


def test_orders_count_heads_over_layers_of_different_width() -> None:
    mask = prune([1, 3], "head", [3, 0, 1, 2], 0.5)
    assert mask.heads_removed == [Head(0, 0), Head(1, 2)]
    assert all_heads([1, 3])[3] == Head(1, 2)
    assert prune([1, 3], "ffn", [1, 0], 0.5).ffns_removed == [1]


def test_random_order_is_a_permutation_and_hangs_on_the_seed() -> None:
    assert sorted(random_order(50, 1)) == list(range(50))
    assert random_order(50, 1) == random_order(50, 1) != random_order(50, 2)


@pytest.mark.parametrize("act", [
    lambda: Mask([[True]], [True, False]),
    lambda: Mask([np.array([1])], [True]),
    lambda: Mask.full([2]).without_heads([(0, 2)]),
    lambda: Mask.full([2]).without_ffns([1]),
    lambda: prune([2], "head", [0, 1], 1.5),
    lambda: prune([2], "head", [0, 0], 0.5),
    lambda: prune([2], "head", [0], 0.5),
])
def test_what_makes_no_sense_is_refused(act: object) -> None:
    with pytest.raises(OptionError):
        act()  # type: ignore[operator]
