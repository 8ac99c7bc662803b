"""Sets of components and what they have in common, in words: what correlations, top sets and induction share.

What sets have in common stands beside what chance gives, and beside what sets with as many heads in each layer have.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from headcount.analysis.rows import labelled, most_shots, of_fraction, summary
from headcount.analysis.scores import PRIMITIVES, TOP
from headcount.report import words as say


def top_sets_sentence(top_sets: pd.DataFrame, *, fraction: float | None = None) -> str:
    """How many of the most important heads all tasks have in common, and two tasks."""
    rows = most_shots(of_fraction(top_sets[top_sets["tasks"] > 1], fraction, TOP))
    if rows.empty:
        return ""
    row = rows.iloc[0]
    tasks = "both tasks" if row["tasks"] == 2 else f"all {row['tasks']:.0f} tasks"
    known = row["expected_in_layers"] == row["expected_in_layers"]
    layers = (f" on average, random sets with as many heads in each layer {row['expected_in_layers']:.1f}"
              if known else "")
    pairs = f"; two tasks share {say.percent(row['pair_mean_share'])} of theirs on average" if row["tasks"] > 2 else ""
    if pairs and known:
        pairs += f" (random sets with as many heads in each layer {say.percent(row['pair_share_in_layers'])})"
    hedged = say.bracketed(say.interval(row, float(row["size"])))
    return (f"With {say.shots_of(rows)}, {row['common']:.0f}{hedged} of each task's {row['size']:.0f} most important "
            f"heads ({say.share(row['fraction'])} of all) {'is' if row['common'] == 1 else 'are'} common to {tasks}; "
            f"random sets have {row['expected']:.1f} in common{layers}{pairs}.")


def overlap_sentence(overlaps: pd.DataFrame, *, fraction: float | None = None) -> str:
    """How many of the most important heads are among those highest on a primitive; `overlaps`: `Study.top_overlaps()`.

    Args:
        overlaps: One row per pair of sets.
        fraction: Size of the sets; that nearest one fifth unless told.
    """
    rows = summary(most_shots(of_fraction(overlaps[overlaps["other_scope"].isin(list(PRIMITIVES))], fraction, TOP)))
    if rows.empty:
        return ""
    said = []
    for _, row in rows.iterrows():
        said.append(f"{row['common']:.0f}{say.bracketed(say.interval(row))} {'is' if row['common'] == 1 else 'are'} "
                    f"among the {row['size']:.0f} highest on {PRIMITIVES[row['other_scope']]}, where "
                    f"{chance_words(row)}")
    row = rows.iloc[0]
    return (f"With {say.shots_of(rows)}, of the {row['size']:.0f} heads ({say.share(row['fraction'])}) most important "
            f"{say.on(rows)} {'; '.join(said)}; p: two-sided, hypergeometric.")


def chance_words(row: pd.Series) -> str:
    """`chance gives 1.6 (p = 0.19), random sets with as many heads in each layer give 0.4 (p = 0.72)`."""
    said = f"chance gives {row['expected']:.1f} ({say.p_value(two_sided(row))})"
    if row["expected_in_layers"] == row["expected_in_layers"]:
        said += (f", random sets with as many heads in each layer give {row['expected_in_layers']:.1f} "
                 f"({say.p_value(two_sided(row, '_in_layers'))})")
    return said


def two_sided(row: pd.Series, suffix: str = "") -> float:
    """Twice the smaller tail: which side it is on was not known before."""
    tail = float(min(row[f"p{suffix}"], row[f"p_fewer{suffix}"]))
    return tail if tail != tail else min(1.0, 2 * tail)


def sets_table(rows: pd.DataFrame, between: Mapping[str, pd.Series]) -> pd.DataFrame:
    """What pairs of sets have in common, ready to be shown; `between` holds what tells the pairs apart."""
    return pd.DataFrame({
        "task": labelled(rows)["task"], "shots": rows["num_fewshot"], **between, "in both": rows["common"],
        "95 % interval": [say.counts(row) for _, row in rows.iterrows()],
        "by chance": rows["expected"].map("{:.1f}".format), "p": _p_column(rows),
        "in the same layers": rows["expected_in_layers"].map(lambda e: f"{e:.1f}" if e == e else ""),
        "p there": _p_column(rows, "_in_layers")})


def _p_column(rows: pd.DataFrame, suffix: str = "") -> list[str]:
    tails = [two_sided(row, suffix) for _, row in rows.iterrows()]
    return ["" if p != p else say.p_number(p) for p in tails]
