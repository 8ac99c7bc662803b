"""How many induction heads there are and which: what a study of induction scores says first, and below its maps."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from headcount.analysis.induction import borderline, induction_heads
from headcount.analysis.rows import RANDOM
from headcount.analysis.scores import PRIMITIVES

NAMED = 8  # heads, or lengths of texts, at most


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
                "measured: leave out --skip-control, or set a threshold with --copying-threshold.")
    names = induction_heads(trained)["name"].tolist()
    limits = " and ".join(f"{name} of at least {thresholds[primitive]:.2g}" for primitive, name in PRIMITIVES.items())
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    which = f": {', '.join(names[:NAMED])}{rest}" if names else ""
    reached = (f"{random[name].max():.2g}" for name in PRIMITIVES)
    beside = (f" With random weights{_counted(random, thresholds)} prefix matching is at most "
              f"{' and copying '.join(reached)}." if len(random) else "")
    near = borderline(trained, thresholds)
    unsure = f" {near} lie{'s' * (near == 1)} within one standard error of a threshold." if near else ""
    return f"{_are(len(names), len(trained)).capitalize()} ({limits}){which}.{unsure}{beside}"


def _counted(random: pd.DataFrame, thresholds: Mapping[str, float]) -> str:
    """How many heads of random weights are induction heads, unless they set the limit, which they then hardly reach."""
    if random["copying"].max() <= thresholds["copying"]:
        return ""
    count = int(random["induction"].sum())
    return f" {count} of {len(random)} {'is' if count == 1 else 'are'}:"


def _are(count: int, of: int) -> str:
    number = "none" if not count else str(count)
    return f"{number} of {of} heads {'is an induction head' if count < 2 else 'are induction heads'}"
