"""What induction scores say, and what of them is left as heads go: sentences and tables, computed from the data.

As in `headcount.view.findings`, a sentence is empty where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from headcount.view import words as say
from headcount.view.overlap import PRIMITIVES
from headcount.view.points import groups
from headcount.view.relations import RANDOM
from headcount.view.selection import (
    AGGREGATES,
    borderline,
    induction_heads,
    most_shots,
    of_fraction,
    summary,
)
from headcount.view.tops import TOP

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
        return ("Which heads are high on copying depends on the same model with random weights, which was not "
                "measured; --copying-threshold sets a limit.")
    found = induction_heads(trained)["name"].tolist()
    limits = " and ".join(f"{name} of at least {thresholds[primitive]:.2g}" for primitive, name in PRIMITIVES.items())
    rest = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    which = f": {', '.join(found[:_NAMED])}{rest}" if found else ""
    reached = (f"{random[name].max():.2g}" for name in PRIMITIVES)
    beside = (f" With random weights{_counted(random, thresholds)} prefix matching is at most "
              f"{' and copying '.join(reached)}." if len(random) else "")
    near = borderline(trained, thresholds)
    unsure = f" {near} lie{'s' * (near == 1)} within one standard error of the line." if near else ""
    return f"{_are(len(found), len(trained)).capitalize()} ({limits}){which}.{unsure}{beside}"


def _counted(random: pd.DataFrame, thresholds: Mapping[str, float]) -> str:
    """How many heads of random weights are induction heads, unless they set the limit, which they then hardly reach."""
    if random["copying"].max() <= thresholds["copying"]:
        return ""
    found = int(random["induction"].sum())
    return f" {found} of {len(random)} {'is' if found == 1 else 'are'}:"


def scatter_sentence(induction: pd.DataFrame, thresholds: Mapping[str, float]) -> str:
    """How many heads reach the one score and the other, and what is drawn; arguments as in `induction_sentence`."""
    trained = induction[induction["weights"] == "trained"]
    if trained.empty:
        return ""
    prefix, copying = (trained[name] >= thresholds[name] for name in PRIMITIVES)
    known = thresholds["copying"] == thresholds["copying"]
    also = (f", {copying.sum()} that of copying and {(prefix & copying).sum()} both. Lines are the thresholds" if known
            else ". The line is its threshold")
    beside = ("; beside the model the same shape with random weights, where nothing was learnt"
              if (induction["weights"] == RANDOM).any() else "; random weights were not measured")
    reach = "reaches" if prefix.sum() == 1 else "reach"
    return f"{prefix.sum()} of {len(trained)} heads {reach} the threshold of prefix matching{also}{beside}."


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
        hedged = say.bracketed(say.interval(row, 100, " %"))
        held = f"{say.percent(row['retained'])} of all {PRIMITIVES.get(str(primitive), str(primitive))}{hedged}"
        if row["random_mean"] == row["random_mean"]:
            more = ("more than" if row["retained"] > row["random_high"] else "less than"
                    if row["retained"] < row["random_low"] else "within what")
            held += (f", {more} random orders leave ({say.percent(row['random_mean'])}; 95 % of them "
                      f"{100 * row['random_low']:.0f} to {100 * row['random_high']:.0f} %)")
        said.append(held)
    by = f"by importance {say.on(rows)}"
    return (f"With {say.shots_of(rows)} and {say.share(rows['fraction'].iloc[0])} of the heads removed {by}, the "
            f"others hold {', and '.join(said)}.")


def among_important_sentence(among: pd.DataFrame, *, fraction: float | None = None) -> str:
    """How many of the induction heads are among the important ones, beside what chance gives."""
    rows = most_shots(of_fraction(among[among["induction_heads"] > 0], fraction, TOP))
    if rows.empty:
        return ""
    row, single = summary(rows).iloc[0], rows.loc[~rows["task"].isin(AGGREGATES), "common"]
    spread = f"; on single tasks {say.span(single)}" if row["task"] in AGGREGATES and len(single) else ""
    hedged = say.bracketed(say.interval(row))
    heads = "head" if row["induction_heads"] == 1 else "heads"
    verb = "is" if row["common"] == 1 else "are"
    return (f"With {say.shots_of(rows)}, {row['common']:.0f}{hedged} of the {row['induction_heads']:.0f} induction "
            f"{heads} {verb} among the {row['important']:.0f} heads ({say.share(row['fraction'])}) most important "
            f"{say.over(row['task'])}; {_by_chance(row)}; p: two-sided, hypergeometric{spread}.")


def overlap_sentence(overlaps: pd.DataFrame, *, fraction: float | None = None) -> str:
    """How many of the most important heads are among those highest on a primitive; `overlaps`: `Study.top_overlaps()`.

    Args:
        overlaps: One row per pair of sets.
        fraction: Size of the sets; that nearest one fifth unless told.
    """
    rows = summary(most_shots(of_fraction(overlaps[overlaps["other"].isin(list(PRIMITIVES))], fraction, TOP)))
    if rows.empty:
        return ""
    said = []
    for _, row in rows.iterrows():
        said.append(f"{row['common']:.0f}{say.bracketed(say.interval(row))} {'is' if row['common'] == 1 else 'are'} "
                    f"among the {row['size']:.0f} highest on {PRIMITIVES[row['other']]}, where {_by_chance(row)}")
    row = rows.iloc[0]
    return (f"With {say.shots_of(rows)}, of the {row['size']:.0f} heads ({say.share(row['fraction'])}) most important "
            f"{say.on(rows)} {'; '.join(said)}; p: two-sided, hypergeometric.")


def _by_chance(row: pd.Series) -> str:
    """`chance gives 1.6 (p = 0.19), layers alone (sets with as many heads in each layer) 0.4 (p = 0.72)`."""
    said = f"chance gives {row['expected']:.1f} ({say.p_value(_two_sided(row))})"
    if row["expected_in_layers"] == row["expected_in_layers"]:
        said += (f", layers alone (sets with as many heads in each layer) {row['expected_in_layers']:.1f} "
                 f"({say.p_value(_two_sided(row, '_in_layers'))})")
    return said


def _two_sided(row: pd.Series, suffix: str = "") -> float:
    """Twice the smaller tail: which side it is on was not known before."""
    tail = float(min(row[f"p{suffix}"], row[f"p_fewer{suffix}"]))
    return tail if tail != tail else min(1.0, 2 * tail)


def _are(found: int, of: int) -> str:
    number = "none" if not found else str(found)
    return f"{number} of {of} heads {'is an induction head' if found < 2 else 'are induction heads'}"


def induction_heads_table(induction: pd.DataFrame) -> pd.DataFrame:
    """All induction heads, those of random weights at the end, with their scores and standard errors."""
    found = [induction_heads(induction[induction["weights"] == weights]) for weights in ("trained", RANDOM)]
    rows = pd.concat(found, ignore_index=True)
    errors = {name: np.sqrt(rows[f"{name}_variance"].astype(float) / rows["sequences"].astype(float))
              for name in (*PRIMITIVES, "previous_token")}
    scores = {name.replace("_", " "): [f"{value:.3f}" + (f" \N{PLUS-MINUS SIGN} {error:.3f}" if error == error else "")
                                       for value, error in zip(rows[name], of_name, strict=True)]
              for name, of_name in errors.items()}
    return pd.DataFrame({"head": rows["name"], "weights": rows["weights"], **scores,
                         "OV copying": rows["ov_copying"].map("{:.3f}".format)})


def among_important_table(among: pd.DataFrame) -> pd.DataFrame:
    """The induction heads among the important ones, ready to be shown: over tasks every share, of each task a fifth."""
    whole = among["task"].isin(AGGREGATES)
    rows = pd.concat([among[whole], of_fraction(among[~whole], None, TOP)])
    return _sets(rows, {"most important": rows["fraction"].map(say.percent), "heads": rows["important"],
                        "induction heads": rows["induction_heads"]})


def overlap_table(overlaps: pd.DataFrame) -> pd.DataFrame:
    """Top sets in pairs, ready to be shown: of the size nearest one fifth, at the most shots of either component."""
    rows = pd.concat([most_shots(of_fraction(of_one, None, TOP)) for _, of_one in groups(overlaps, "component")])
    whole = rows["task"].isin(AGGREGATES)
    rows = pd.concat([rows[whole], rows[~whole]])
    names = {"head": "heads", "ffn": "FFNs"}
    return _sets(rows, {"and": rows["other"].replace(PRIMITIVES), "of": rows["component"].map(names),
                        "size": rows["size"]})


def _sets(rows: pd.DataFrame, between: Mapping[str, pd.Series]) -> pd.DataFrame:
    return pd.DataFrame({
        "task": rows["task"], "shots": rows["num_fewshot"], **between, "in both": rows["common"],
        "95 % interval": [say.counts(row) for _, row in rows.iterrows()],
        "by chance": rows["expected"].map("{:.1f}".format), "p": _p_column(rows),
        "in the same layers": rows["expected_in_layers"].map(lambda e: f"{e:.1f}" if e == e else ""),
        "p there": _p_column(rows, "_in_layers")})


def _p_column(rows: pd.DataFrame, suffix: str = "") -> list[str]:
    found = [_two_sided(row, suffix) for _, row in rows.iterrows()]
    return ["" if p != p else say.p_value(p).removeprefix("p ").removeprefix("= ") for p in found]
