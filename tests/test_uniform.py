"""Curves whose masks leave every layer the same shape: against brute force, in jobs, in tables, in words."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import headcount as hc
import tiny
from headcount.errors import ModelError, OptionError
from headcount.masks import Mask, prune
from headcount.study.jobs import Evaluation, job_from, name_of
from headcount.study.ledger import Ledger
from headcount.study.masksets import CommonUniformCurve, UniformCurve, steps_of
from headcount.study.plan import PlannedJob, TaskFacts, missing, plan
from headcount.study.prepare import prepare
from headcount.study.runner import run_study
from headcount.study.shapes import Shape, shape_of, shares, uniform_mask
from headcount.study.spec import StudySpec

TENTHS = tuple(n / 10 for n in range(1, 10))


def importance_of(scores: np.ndarray, score: str = "example") -> pd.DataFrame:
    """A table of importance, as an entry holds it, from scores by layer and head."""
    return pd.DataFrame([{"component": "head", "layer": layer, "head": head, "score": score, "importance": value}
                         for (layer, head), value in np.ndenumerate(scores)])


def by_brute_force(scores: np.ndarray, groups: int, kept: int) -> list[list[bool]]:
    """The heads that stay, by trying every shape, every set of groups and every set of heads in each."""
    best: tuple[float, int, list[list[bool]]] | None = None
    width = scores.shape[1] // groups
    for g, h in itertools.product(range(1, groups + 1), range(1, width + 1)):
        if g * h != kept:
            continue
        layers, lost = [], 0.0
        for of_layer in scores:
            by_group = of_layer.reshape(groups, width)
            stay = max(itertools.combinations(range(groups), g), key=lambda some: by_group[list(some)].sum())
            row = [False] * len(of_layer)
            for group in stay:
                heads = max(itertools.combinations(range(width), h),
                            key=lambda some, of=by_group[group]: of[list(some)].sum())  # type: ignore[misc]
                for head in heads:
                    row[group * width + head] = True
            layers.append(row)
            lost += float(of_layer[~np.array(row)].sum())
        if best is None or (lost, g) < best[:2]:
            best = lost, g, layers
    assert best is not None
    return best[2]


@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (8, 2), (8, 8), (6, 1), (12, 4)])
def test_the_least_important_shape_is_that_of_brute_force(heads: int, groups: int) -> None:
    full = Shape(groups, heads // groups)
    for seed in range(8):
        scores = np.random.default_rng(seed).exponential(size=(3, heads))
        curve = UniformCurve(component="head", fractions=shares(TENTHS, full), groups=groups, importance="x",
                             score="example")
        for mask, label in curve.masks((heads,) * 3, [importance_of(scores)]):
            kept = round(heads * (1 - label.fraction))
            assert [layer.tolist() for layer in mask.heads] == by_brute_force(scores, groups, kept)
            assert mask.ffns.all()
            assert len(mask.heads_removed) == len(prune((heads,) * 3, "head", range(3 * heads),
                                                        label.fraction).heads_removed), "a free-form one is beside it"
            each = np.stack(mask.heads).reshape(3, groups, -1).sum(axis=2)
            assert len({tuple(sorted(row)) for row in each.tolist()}) == 1
            assert len({*each.reshape(-1).tolist()} - {0}) == 1
            assert label.order == "uniform"


def test_the_common_curve_goes_by_the_mean_of_scores_or_of_ranks() -> None:
    rng = np.random.default_rng(0)
    tasks = [rng.exponential(size=(3, 9)), 100 * rng.exponential(size=(3, 9))]
    ranks = [np.argsort(np.argsort(one.reshape(-1))).reshape(3, 9).astype(float) for one in tasks]
    for how, scores in (("mean", tasks), ("ranks", ranks)):
        curve = CommonUniformCurve(component="head", fractions=(4 / 9 + 1 / 9, 2 / 3), groups=3, importance=("x", "y"),
                                   score="example", aggregate=how)
        masks = curve.masks((9, 9, 9), [importance_of(one) for one in tasks])
        assert [[layer.tolist() for layer in mask.heads] for mask, _ in masks] == [
            by_brute_force(np.mean(scores, axis=0), 3, kept) for kept in (4, 3)], how


@pytest.mark.parametrize(("full", "expected"), [
    (Shape(3, 3), [3, 5, 6, 7, 8]),  # SmolLM2: what is left is 6, 4, 3, 2 or 1 of 9 heads
    (Shape(9, 1), [1, 2, 3, 4, 5, 6, 7, 8]),
    (Shape(1, 4), [1, 2, 3]),
    (Shape(2, 2), [2, 3]),
])
def test_a_curve_has_the_shares_that_shapes_have(full: Shape, expected: Sequence[int]) -> None:
    found = shares(tuple(n / 100 for n in range(1, 100)), full)
    assert found == tuple(n / full.heads for n in expected)


def test_each_fraction_has_the_largest_share_that_does_not_exceed_it() -> None:
    assert shares((0.4, 0.7), Shape(3, 3)) == (1 / 3, 2 / 3)
    assert shares((0.34, 0.5), Shape(3, 3)) == (1 / 3,)
    assert shares((0.1, 0.3), Shape(10, 1)) == (0.1, 0.3), "rounding costs no step"
    with pytest.raises(OptionError, match=r"removes as little as fractions ask for \(0.3 at most\): the smallest share "
                                          r"that one removes is 0.333"):
        shares((0.1, 0.3), Shape(3, 3))
    with pytest.raises(OptionError, match="a layer of one head"):
        shares((0.5,), Shape(1, 1))


def test_equal_heads_go_in_their_order_and_of_equal_shapes_that_of_fewer_groups() -> None:
    mask = uniform_mask(0.5, Shape(2, 2), [np.ones(8)])
    assert [layer.tolist() for layer in mask.heads] == [[False, False, True, True]] * 2
    # The second scores decide where the first are equal.
    mask = uniform_mask(0.5, Shape(2, 2), [np.ones(8), np.array([4.0, 1, 1, 4, 1, 4, 4, 1])])
    assert [layer.tolist() for layer in mask.heads] == [[True, False, False, True], [False, True, True, False]]


@pytest.mark.parametrize(("heads", "groups"), [((4, 4), (2, 4)), ((4, 6), (2, 2)), ((4, 0), (2, 0)), ((), ())])
def test_a_model_of_unlike_layers_is_refused_in_a_line(heads: tuple[int, ...], groups: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="`uniform`|uniform leaves every layer the same shape") as refused:
        shape_of(heads, groups)
    assert "--uniform" in refused.value.on_command_line()
    assert "\n" not in str(refused.value)
