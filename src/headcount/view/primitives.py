"""What induction scores say, and what of them is left as heads go: sentences and a table, computed from the data.

As in `headcount.view.findings`, a sentence is empty where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from headcount.view import words as say
from headcount.view.points import MEAN
from headcount.view.relations import RANDOM
from headcount.view.selection import (
    PRIMITIVES,
    TOP,
    borderline,
    induction_heads,
    most_shots,
    of_fraction,
    summary,
)

RELIABLE = 0.8  # halves that agree less than this make a score noisy
_NAMED = 8


def induction_sentence(induction: pd.DataFrame, thresholds: Mapping[str, float]) -> str:
    """How many induction heads there are, which, how sure that is, and what random weights reach.

    Args:
        induction: One row per head and kind of weights.
        thresholds: What an induction head reaches on each primitive.
    """
    trained = induction[induction["weights"] == "trained"]
    random = induction[induction["weights"] == RANDOM]
    if trained.empty:
        return ""
    if trained["induction"].isna().any():
        return ("Which heads are high on copying hangs on the same model with random weights, which was not measured; "
                "--copying-threshold sets a limit.")
    found = induction_heads(trained)["name"].tolist()
    limits = " and ".join(f"{name} of at least {thresholds[primitive]:.2g}" for primitive, name in PRIMITIVES.items())
    rest = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    which = f": {', '.join(found[:_NAMED])}{rest}" if found else ""
    # Where copying's limit is the most that random weights reach, none of theirs is found by construction.
    beside = (f" With random weights prefix matching is at most {random['prefix_matching'].max():.2g} and copying "
              f"{random['copying'].max():.2g}." if len(random) else "")
    near = borderline(trained, thresholds)
    unsure = f" {near} lie{'s' * (near == 1)} within one standard error of the line." if near else ""
    return f"{_are(len(found), len(trained)).capitalize()} ({limits}){which}.{unsure}{beside}"


def texts_sentence(notes: Mapping[str, Any]) -> str:
    """What the scores are means over, and how reliable they are; `notes` as in `Study.induction_notes`."""
    if "sequences" not in notes:
        return ""
    lengths = [int(n) for n in notes["lengths"]]
    listed = ", ".join(map(str, lengths)) if len(lengths) < _NAMED else f"{lengths[0]} to {lengths[-1]}"
    known = {PRIMITIVES[name]: value for name, value in notes["reliability"].items()
             if name in PRIMITIVES and value == value}
    agreed = " and ".join(f"{value:.2f} for {name}" for name, value in known.items())
    reliable = f" Reliability (halves of the texts, stepped up to all of them): {agreed}." if agreed else ""
    return (f"Means over {notes['sequences']} texts made of {listed} random tokens, repeated {notes['repeats']} times "
            f"for prefix matching, {notes['repeats']} times as many for copying.{reliable}")


def reliability_caution(reliabilities: Mapping[str, float]) -> str:
    """Which of the two primitives is measured noisily: halves of the sequences rank the heads differently."""
    of_primitives = {PRIMITIVES[name]: value for name, value in reliabilities.items() if name in PRIMITIVES}
    if any(value != value for value in of_primitives.values()):
        return "There are too few texts to tell how reliable these scores are."
    weak = [name for name, value in of_primitives.items() if value < RELIABLE]
    if not weak:
        return ""
    return (f"The reliability of {' and '.join(weak)} is below {RELIABLE}: "
            f"{'these scores are' if len(weak) > 1 else 'this score is'} noisy, and so is the list of induction heads.")


def retained_sentence(retained: pd.DataFrame, *, fraction: float | None = None) -> str:
    """Which share of each primitive the important heads hold, beside random ones."""
    rows = most_shots(of_fraction(summary(retained[retained["retained"].notna()]), fraction))
    if rows.empty:
        return ""
    said = []
    for primitive, row in rows.drop_duplicates("primitive").set_index("primitive").iterrows():
        held = f"{say.percent(row['retained'])} of all {PRIMITIVES.get(str(primitive), str(primitive))}"
        if row["random_mean"] == row["random_mean"]:
            more = ("more than" if row["retained"] > row["random_high"] else "less than"
                    if row["retained"] < row["random_low"] else "within what")
            held += (f", {more} random orders leave ({say.percent(row['random_mean'])}; 95 % of them "
                      f"{100 * row['random_low']:.0f} to {100 * row['random_high']:.0f} %)")
        said.append(held)
    by = f"by importance {'over all tasks' if rows['task'].iloc[0] == MEAN else say.on(rows)}"
    return (f"With {say.shots_of(rows)} and {say.share(rows['fraction'].iloc[0])} of the heads removed {by}, the "
            f"others hold {', and '.join(said)}.")


def among_important_sentence(among: pd.DataFrame, *, fraction: float | None = None) -> str:
    """How many of the induction heads are among the important ones, beside what chance gives."""
    rows = most_shots(of_fraction(among[among["induction_heads"] > 0], fraction, TOP))
    if rows.empty:
        return ""
    row, single = summary(rows).iloc[0], rows.loc[rows["task"] != MEAN, "common"]
    spread = f"; on single tasks {say.span(single)}" if row["task"] == MEAN and len(single) else ""
    few = row["common"] < row["expected"]
    surprise = f"{say.p_value(row['p_fewer' if few else 'p'])} for so {'few' if few else 'many'}"
    return (f"With {say.shots_of(rows)}, {row['common']:.0f} of the {row['induction_heads']:.0f} induction heads are "
            f"among the {row['important']:.0f} heads ({say.share(row['fraction'])}) most important "
            f"{say.over(row['task'])}, chance gives {row['expected']:.1f} ({surprise}, "
            f"hypergeometric){spread}.")


def _are(found: int, of: int) -> str:
    number = "none" if not found else str(found)
    return f"{number} of {of} heads {'is an induction head' if found < 2 else 'are induction heads'}"


def among_important_table(among: pd.DataFrame, *, fraction: float | None = None) -> pd.DataFrame:
    """The induction heads among the important ones, ready to be shown: the mean over tasks first."""
    rows = of_fraction(pd.concat([among[among["task"] == MEAN], among[among["task"] != MEAN]]), fraction, TOP)
    return pd.DataFrame({
        "task": rows["task"], "shots": rows["num_fewshot"], "most important": rows["fraction"].map(say.percent),
        "heads": rows["important"], "induction heads": rows["induction_heads"], "in both": rows["common"],
        "by chance": rows["expected"].map("{:.1f}".format),
        **{words: rows[p].map(say.p_value).str.removeprefix("p ").str.removeprefix("= ")
           for words, p in (("p of so many", "p"), ("p of so few", "p_fewer"))}})
