"""What the most important components of tasks have in common, in sentences and tables."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from headcount.analysis.rows import (
    AGGREGATES,
    TASK,
    groups,
    most_shots,
    of_fraction,
    of_scope,
    single_tasks,
)
from headcount.analysis.scores import PRIMITIVES, TOP
from headcount.analysis.study import Study
from headcount.report.section import Section, Table, plain_columns
from headcount.report.sets import sets_table


def overlap_rows(overlaps: pd.DataFrame) -> pd.DataFrame:
    """Top sets in pairs, ready to be shown: of the size nearest one fifth, at the most shots of either component."""
    rows = pd.concat([most_shots(of_fraction(of_one, None, TOP)) for _, of_one in groups(overlaps, "component")])
    rows = pd.concat([of_scope(rows, *AGGREGATES), single_tasks(rows)])
    names = {"head": "heads", "ffn": "FFNs"}
    others = rows["other_task"].where(rows["other_scope"] == TASK, rows["other_scope"].map(PRIMITIVES))
    return sets_table(rows, {"and": others, "of": rows["component"].map(names),
                        "size": rows["size"]})


def sections(study: Study) -> Iterator[Section]:
    """None: its sentence stands below the correlations of heads."""
    yield from ()


def tables(study: Study) -> Iterator[Table]:
    """What top sets have in common, all together and in pairs."""
    if len(top := study.top_sets()):
        yield Table("What top sets have in common", "The share of each task's most important components that is common "
                    "to all tasks, with its 95 % interval over documents, and the share that two tasks have in common "
                    "on average.",
                    plain_columns(top.round(3)))
    if len(overlaps := study.top_overlaps()):
        yield Table("Top sets in pairs", "The most important fifth of a task's heads or FFNs (and of those of all "
                    "tasks together) beside that of another task, or beside as many heads that are highest on an "
                    "induction score. 'By chance': what random sets have in common; 'in the same layers' (and 'p "
                    "there'): random sets with as many heads in each layer. p: two-sided, hypergeometric, not "
                    "corrected for how many pairs there are. Other sizes and numbers of shots: "
                    "tables/top_overlaps.csv, where p and p_fewer are one-sided.",
                    overlap_rows(overlaps))
