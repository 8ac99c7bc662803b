"""Tables of a folder whose runs differ: of documents, of fractions, or of tasks that are done."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from headcount.analysis.curves import curve_points, curve_table
from headcount.analysis.grid import GRID, grid_table
from headcount.analysis.points import most_measured, points_of
from headcount.analysis.rows import labelled
from headcount.analysis.transfer import transfer_table, unshown

JOBS = itertools.count()
TASKS = ("red", "green", "blue")


def rows(task: str, order: str, documents: int, right: float = 0.5, **labels: Any) -> pd.DataFrame:
    """Documents of one mask, of which the first are right."""
    ids = np.arange(documents)
    known = {"task": task, "num_fewshot": 0, "split": "evaluation", "component": "none", "order": order,
             "donor_scope": "own" if order == "grid" else "none", "donor": "",
             "order_seed": -1, "fraction": 0.0, "ffn_fraction": 0.0, "heads_removed": 1, "ffns_removed": 0,
             "parameters_removed": 10, "job": next(JOBS), "members": 1, **labels}
    return pd.DataFrame({**known, "doc_id": ids, "passage": ids, "correct": (ids < right * documents).astype(float),
                         "num_options": 4})


def by(donor: str) -> dict[str, str]:
    """Whose order removes: all tasks', the other tasks', or that of the task of this name."""
    return {"donor_scope": donor, "donor": ""} if donor.endswith(" tasks") else {"donor_scope": "task", "donor": donor}


def transferred(task: str, donors: Sequence[str], fraction: float, documents: int = 20) -> Iterator[pd.DataFrame]:
    """What transfer measures of a task: its own order, and these donors'."""
    yield rows(task, "gradient", documents, 0.8, component="head", fraction=fraction)
    for donor in donors:
        if donor != task:
            yield rows(task, "transfer", documents, 0.5 if task == "red" else 0.7, component="head", **by(donor),
                       fraction=fraction)


def transfer(frames: Sequence[pd.DataFrame], documents: int = 20) -> pd.DataFrame:
    return transfer_table(pd.concat([*(rows(task, "none", documents, 0.9) for task in TASKS), *frames]), ())


def donors_of_mean(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    found = labelled(transfer(frames))
    return found[found["scope"] == "mean"].set_index(["donor", "fraction"])


@pytest.mark.parametrize("orders", [["gradient"], ["gradient", "random"]])
def test_random_orders_of_a_task_that_was_unseen_are_no_curve_of_it(orders: list[str]) -> None:
    steps = [rows("red", order, 20, component="head", fraction=f) for order in orders for f in (0.3, 0.5)]
    unseen = [rows("red", "random", 10, component="head", fraction=f) for f in (0.3, 0.35)]
    wanted = {order: [0.3, 0.5] for order in ("gradient", "random")}
    points = curve_points(pd.concat([rows("red", "none", 20), *steps, *unseen]), {"red": 0.25}, wanted)
    curves = curve_table(points, 100, 0.02)
    assert (curves["documents"] == 20).all()
    assert set(zip(curves["order"], curves["fraction"], strict=True)) == {(o, f) for o in orders for f in (0, 0.3, 0.5)}


def test_a_random_order_that_two_jobs_measured_counts_once() -> None:
    """A task that was unseen has the first random order at transfer's fractions, on all documents here."""
    full = rows("red", "none", 20)
    drawn = [rows("red", "random", 20, right, component="head", fraction=0.3, order_seed=seed)
             for seed, right in ((7, 0.9), (8, 0.3), (9, 0.3))]
    again = [rows("red", "random", 20, 0.9, component="head", fraction=f, order_seed=7) for f in (0.3, 0.35)]
    curves = curve_table(curve_points(pd.concat([full, *drawn, *again]), {"red": 0.25}, {"random": [0.3]}), 100, 0.02)
    assert curves["fraction"].tolist() == [0, 0.3]
    assert curves["accuracy"].iloc[1] == pytest.approx(0.5)
    moved = list(transferred("red", ["green"], 0.3))
    table = transfer_table(pd.concat([full, *drawn, *again, *moved]), ())
    assert table.set_index(["donor_scope", "fraction"]).loc[("random", 0.3), "accuracy"] == pytest.approx(0.5)


def test_a_larger_grid_is_not_cut_to_an_older_smaller_one() -> None:
    def cells(fractions: Sequence[float], documents: int) -> list[pd.DataFrame]:
        return [rows("red", "grid", documents, component="both", fraction=h, ffn_fraction=f, ffns_removed=1)
                for h in fractions for f in fractions]

    full, old, new = rows("red", "none", 60), cells([0.2, 0.4], 10), cells([0.5, 0.7], 60)
    both = grid_table(pd.concat([full, *old, *new]), 0.02, 100, {}, {})
    assert set(both["documents"]) == {60}
    assert set(both["heads_fraction"]) == {0.0, 0.5, 0.7}
    under_way = grid_table(pd.concat([full, *cells([0.2, 0.4], 40), *new[:1]]), 0.02, 100, {}, {})
    assert set(under_way["documents"]) == {40}
    assert set(under_way["heads_fraction"]) == {0.0, 0.2, 0.4, 0.5}, "the new cell is shown on the old ones' documents"


def test_documents_of_a_smaller_run_need_not_have_the_smallest_numbers() -> None:
    """Protocol "paper" shuffles documents before it takes the first so many."""
    def cells(fractions: Sequence[float], documents: int, right: float) -> list[pd.DataFrame]:
        return [rows("red", "grid", documents, right, component="both", fraction=h, ffn_fraction=f, ffns_removed=1)
                for h in fractions for f in fractions]

    together = pd.concat([rows("red", "none", 60, 0.9), *cells([0.2, 0.4], 40, 0.3), *cells([0.5], 60, 0.4),
                          *(rows("red", "gradient", 60, 0.7, component="head", fraction=f) for f in (0.2, 0.5))])
    moved = [*transferred("red", TASKS, 0.3, 10), *transferred("red", TASKS, 0.5, 60), rows("red", "none", 60, 0.9)]
    numbers = np.random.default_rng(0).permutation(60)
    for table in (lambda frame: grid_table(frame, 0.02, 100, {}, {}), lambda frame: transfer_table(frame, ())):
        for frame in (together, pd.concat(moved)):
            plain, shuffled = (table(f) for f in (frame, frame.assign(doc_id=numbers[frame["doc_id"]])))
            known = ["task", "accuracy", "difference", "documents", "changed"]
            pd.testing.assert_frame_equal(shuffled[known], plain[known])


def test_without_rows_of_masks_documents_are_in_the_order_of_their_numbers() -> None:
    """So that draws of documents are alike at every number of shots."""
    full = rows("red", "none", 10)
    shuffled = full.assign(doc_id=np.random.default_rng(0).permutation(10))
    found = points_of(shuffled.iloc[:0], shuffled).full
    np.testing.assert_array_equal(found, shuffled.sort_values("doc_id")["correct"])


def test_a_larger_transfer_is_not_cut_to_an_older_smaller_one() -> None:
    old = [frame for task in TASKS for frame in transferred(task, TASKS, 0.3, 10)]
    new = [frame for task in TASKS for frame in transferred(task, TASKS, 0.5, 60)]
    found = transfer([*old, *new], 60)
    assert unshown(pd.concat([*old, *new]), GRID.frame(), found) == {"transfer": len(TASKS) * 2}
    pruned = found[found["fraction"] > 0]
    assert set(pruned["fraction"]) == {0.5}
    assert set(pruned.query("scope != 'mean'")["documents"]) == {60}


def test_most_is_kept_where_points_are_of_unlike_numbers_of_documents() -> None:
    assert most_measured([]) == 0
    assert most_measured([10, 60]) == 60
    assert most_measured([40, 60]) == 40
    assert most_measured([10] * 6 + [60]) == 10


def test_an_aggregate_of_fewer_tasks_is_taken_where_the_larger_one_has_too_few_documents() -> None:
    donors = [frame for task in TASKS for frame in transferred(task, TASKS, 0.5, 60)]
    means = [rows(task, "transfer", documents, right, component="head", **by("all tasks"), fraction=0.5,
                  members=members)
             for task in TASKS for documents, members, right in ((60, 3, 0.5), (20, 4, 0.9))]
    found = transfer([*donors, *means], 60).set_index(["task", "donor_scope"])
    assert found.loc[("red", "all tasks"), "accuracy"] == pytest.approx(0.5)
    assert found.loc[("red", "all tasks"), "documents"] == 60


def test_a_donors_mean_lacks_no_task_but_the_donor() -> None:
    complete = [frame for task in TASKS for frame in transferred(task, (*TASKS, "all tasks"), 0.5)]
    partly = [*complete, *(frame for task in TASKS[:2] for frame in transferred(task, ["other tasks"], 0.5))]
    random = rows("red", "random", 20, 0.1, component="head", fraction=0.5)
    found = donors_of_mean([*partly, random])
    assert set(found.index.get_level_values("donor")) == {"none", "own", "mean", *TASKS}
    assert found.loc[("red", 0.5), "accuracy"] == pytest.approx(0.7), "a donor to all but itself"
    assert found.loc[("green", 0.5), "accuracy"] == pytest.approx(0.6)
    every = [*partly, *transferred("blue", ["other tasks"], 0.5)]
    assert ("mean without own", 0.5) in donors_of_mean(every).index


def test_the_full_models_mean_is_not_beside_means_over_other_tasks() -> None:
    done = [frame for task in TASKS for frame in transferred(task, TASKS, 0.3)]
    found = donors_of_mean([*done, *(frame for task in TASKS[:2] for frame in transferred(task, TASKS, 0.7))])
    assert "none" not in found.index.get_level_values("donor")
    assert found.loc[("own", 0.3), "documents"] == 60
    assert found.loc[("own", 0.7), "documents"] == 40
    assert "none" in donors_of_mean(done).index.get_level_values("donor")
