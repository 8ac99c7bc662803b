"""A table is what its declaration says: its columns in order, their types, also when it is empty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import headcount as hc
import synthetic_study as synthetic
from headcount.analysis.schema import Column, Table
from headcount.analysis.study import TABLES
from headcount.study.ledger import Ledger

TABLE = Table("sizes", "One row per thing.", (
    Column("name", "str", "", "what it is called"), Column("size", "float64", "m", "how long it is"),
    Column("count", "int64", "things", "how many there are"), Column("known", "boolean", "", "whether it is known")))


def test_a_frame_has_the_declared_columns_in_order_with_their_types() -> None:
    frame = TABLE.frame([{"count": 2.0, "name": "a"}, {"name": "b", "size": 1, "count": 3, "known": True}])
    assert frame.columns.tolist() == TABLE.names == ["name", "size", "count", "known"]
    assert frame["count"].tolist() == [2, 3]
    assert np.isnan(frame.loc[0, "size"])
    assert frame["known"].isna().tolist() == [True, False]
    for of in (frame, TABLE.frame()):
        assert [str(dtype) for dtype in of.dtypes[1:]] == ["float64", "int64", "boolean"]
        assert of["name"].dtype == pd.Series(["text"]).dtype


@pytest.mark.parametrize(("row", "said"), [
    ({"count": 1, "weight": 2}, "table sizes has no columns weight"),
    ({"size": 1.0}, "column count of table sizes is int64"), ({"count": 1.5}, "column count of table sizes has parts"),
    ({"count": 1, "size": "long"}, "column size of table sizes")])
def test_what_is_not_declared_is_refused(row: dict[str, object], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        TABLE.frame([row])


def test_columns_that_may_follow_come_after_the_declared_ones() -> None:
    more = Table("sizes", "", TABLE.columns, further="other metrics")
    assert more.frame([{"extra": 0.5, "count": 1}]).columns.tolist() == [*TABLE.names, "extra"]
    assert "Further columns: other metrics" in more.docstring()


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "empty"])
def test_every_table_of_a_study_is_as_declared(tmp_path: Path, measured: bool) -> None:
    study = hc.open_study(synthetic.write(tmp_path, evaluations=measured, importance=measured))
    for table in TABLES:
        frame = getattr(study, table.name)()
        pd.testing.assert_frame_equal(frame, table.frame(frame))
        assert frame.columns.tolist() == table.names
        frame["changed by a reader"] = 1
        assert "changed by a reader" not in getattr(study, table.name)()


def test_masks_of_single_heads_are_rows_of_evaluations(tmp_path: Path) -> None:
    """Their description has a list of heads where that of a grid has the order of heads."""
    ledger = Ledger(synthetic.write(tmp_path, tasks=("red",), shots=(5,)))
    before = len(hc.open_study(tmp_path).evaluations())
    job = {**synthetic.of_task("evaluation", "red", 5, 50), "split": "examples",
           "curve": {"order": "single", "component": "head", "heads": [[0, 1], [2, 3]]}}
    masks = [{**synthetic._label("none", "single", 0.0), "component": "head", "layer": layer, "head": head}
             for layer, head in ((0, 1), (2, 3))]
    rows = pd.concat([synthetic._rows(40, 50, i) for i in range(2)])
    ledger.write(job, rows, {"metric": "acc", "truncated": 0, "tokens": 1, "seconds": 0.1, "masks": masks})
    found = hc.open_study(tmp_path).evaluations()
    assert len(found) == before + 100
    single = found[found["order"] == "single"]
    assert single.drop_duplicates("layer")[["layer", "head", "donor_scope"]].to_numpy().tolist() == [
        [0, 1, "none"], [2, 3, "none"]]
