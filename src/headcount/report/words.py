"""Numbers, intervals and counts as people read them: the words that captions, sentences and tables are made of.

Sentences are given with their intervals and computed from the tables. Unless one says otherwise it is about the most
shots, the mean over tasks (the mean of ranks where that was asked for; the task itself where there is one), and the
fraction nearest one half (one fifth for sets of the most important heads); it is empty where there is nothing to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from headcount.analysis.rows import MEAN, MEAN_OF_RANKS
from headcount.errors import few as few
from headcount.errors import listed as listed
from headcount.stats import intervals
from headcount.stats.words import percent as percent
from headcount.stats.words import points_of as points_of
from headcount.stats.words import signed as signed

# More than this is no number of documents that could be had.
_MOST_DOCUMENTS = 1_000_000
# Smaller ones are not told in digits.
_LEAST_P = 0.001


def shots(k: int) -> str:
    """`5 shots`, `1 shot`, `no shots`."""
    return {0: "no shots", 1: "1 shot"}.get(k, f"{k} shots")


def number_of(n: int, thing: str) -> str:
    """`1 task`, `3 tasks`."""
    return f"{n} {thing}{'s' * (n != 1)}"


def millions(n: float | int) -> str:
    """Parameters as people say them: 3.1 M, 2.4 B."""
    return f"{n / 1e9:.1f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def shots_of(rows: pd.DataFrame) -> str:
    """`5 shots`: of rows that have one number of shots."""
    return shots(int(rows["num_fewshot"].iloc[0]))


def on(rows: pd.DataFrame) -> str:
    """`on copa`, `on the mean over tasks`: of rows that are of one task, or of one aggregate."""
    return {MEAN: "on the mean over tasks", MEAN_OF_RANKS: "on the mean of ranks over tasks"}.get(
        rows["scope"].iloc[0], f"on {rows['task'].iloc[0]}")


def share(fraction: float) -> str:
    """A share that an option asked for, with all its digits: `12.5 %`."""
    return f"{100 * fraction:.3g} %" if fraction == fraction else "0 %"


def number(value: float) -> str:
    """`0.62`, with a true minus sign."""
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}")


def known(value: float) -> str:
    """`0.62`, and a dash where it is not known."""
    return number(value) if value == value else "\N{EN DASH}"


def within(low: float, high: float) -> str:
    """`0.55 to 0.70`: an interval of correlations, and a dash where it is not known."""
    return f"{number(low)} to {number(high)}" if low == low and high == high else "\N{EN DASH}"


def estimate(row: pd.Series, where: str = "") -> str:
    """`0.62 (0.55 to 0.70)`: a correlation with its interval."""
    interval = f" ({within(row['low'], row['high'])})" if row["low"] == row["low"] else ""
    return f"{number(row['correlation'])}{where}{interval}"


def accuracy(row: pd.Series) -> str:
    """`0.62 (0.55 to 0.70)`: an accuracy with its interval."""
    return f"{row['accuracy']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def points(row: pd.Series) -> str:
    """`+1.2 (-0.3 to +2.0)`: a difference of accuracy with its interval, in points."""
    known = row["difference_low"] == row["difference_low"] and row["difference_high"] == row["difference_high"]
    return signed(row["difference"]) + (f" ({between(row)})" if known else "")


def between(row: pd.Series) -> str:
    """`-0.3 to +2.0`: the interval of a difference, in points."""
    return f"{signed(row['difference_low'])} to {signed(row['difference_high'])}"


def score_name(score: str) -> str:
    """What a score of importance is called: `gradient (example)`, `gold log-likelihood lost`, ..."""
    return {"example": "gradient (per example)", "position": "gradient (per position)",
            "accuracy": "accuracy lost", "gold_loglikelihood": "gold log-likelihood lost"}.get(score, score)


def told(
    verdict: str, margin: float | int, *, needed: float | int = float("nan"), documents: float | int = float("nan")
) -> str:
    """What a verdict says of a loss of the margin, as all sentences, captions and tables word it.

    Args:
        verdict: "within", "costs more" or "unknown" (`headcount.stats.intervals.verdict`).
        margin: The loss of accuracy, 0..1.
        needed: How many documents would tell.
        documents: How many there are.
    """
    lost = points_of(margin)
    if verdict == intervals.WITHIN:
        return f"a loss of {lost} or more is ruled out"
    if verdict == intervals.COSTS_MORE:
        return f"a loss of more than {lost} is shown"
    here = f"these {documents:,.0f} documents" if documents == documents else "these documents"
    are = "is" if lost == "1 point" else "are"
    return f"whether {lost} {are} lost cannot be told with {here}{_would_tell(needed, documents)}"


def _would_tell(needed: float | int, documents: float | int) -> str:
    """` (about 1,900 would tell)`: how many documents would end a doubt, in two digits; empty where unknown."""
    if needed != needed or needed <= documents:
        return ""
    if not (number := about(needed)):
        return " (nor with more, if they changed alike: the measured loss is about that)"
    return f" ({number} would tell, if as large a share of them changed)"


def about(documents: float | int) -> str:
    """`about 1,900`: a number of documents rounded up to two digits; empty where there are never so many."""
    if documents != documents or documents > _MOST_DOCUMENTS:
        return ""
    step = 10 ** max(0, math.floor(math.log10(max(documents, 1))) - 1)
    return f"about {math.ceil(documents / step) * step:,.0f}"


def bounds(low: float, high: float, margin: float) -> str:
    """`-1.7 to +0.4`: an interval in points; `-1.97`, where rounding would make a bound look like the margin."""
    def one(x: float) -> str:
        near = f"{x:.3f}" == f"{-margin:.3f}" and x != -margin
        return f"{100 * x:+.2f}".replace("-", "\N{MINUS SIGN}") if near else signed(x)

    return f"{one(low)} to {one(high)}"


def better_or_worse(difference: float | int) -> str:
    """`better` or `worse`: a difference that is shown, by its sign."""
    return "better" if difference > 0 else "worse"


def span(values: pd.Series) -> str:
    """`3`, or `1 to 5`."""
    least, most = f"{values.min():.0f}", f"{values.max():.0f}"
    return least if least == most else f"{least} to {most}"


def counts(row: pd.Series, times: float | int = 1) -> str:
    """`3 to 5`: the interval of a count, in whole numbers outwards; nothing where it is not known.

    Args:
        row: Its bounds are `low` and `high`.
        times: What they are shares of.
    """
    low, high = times * row["low"], times * row["high"]
    # 53.999999 of 54 is 54.
    return f"{math.floor(low + 1e-9)} to {math.ceil(high - 1e-9)}" if low == low else ""


def interval(row: pd.Series, times: float | int = 1, unit: str = "") -> str:
    """`95 % interval 3 to 5`, as in `counts`; nothing where it is not known."""
    bounds = counts(row, times)
    return f"95 % interval {bounds}{unit}" if bounds else ""


def bracketed(*said: str) -> str:
    """` (a; b)`: what is not empty, in brackets."""
    known = "; ".join(filter(None, said))
    return f" ({known})" if known else ""


def noisy(by_shots: Mapping[int, str], numbers: int) -> list[str]:
    """`with no shots scores are mostly noise: ...`: a clause for each number of shots; one alone is not named.

    Args:
        by_shots: Reason by number of shots, where scores are noisy.
        numbers: How many numbers of shots there are in all.
    """
    return [reason if numbers == 1 else f"with {shots(k)} {reason}" for k, reason in by_shots.items()]


def p_value(value: float) -> str:
    """`p = 0.03`; `p < 0.001`."""
    if value != value:
        return "p not known"
    return f"p {p_number(value)}" if value < _LEAST_P else f"p = {p_number(value)}"


def p_number(value: float) -> str:
    """`0.03`; `< 0.001`."""
    return f"< {_LEAST_P}" if value < _LEAST_P else f"{value:.2g}"


SINGULAR = {"head": "head", "ffn": "FFN"}
NAMES = {"head": "heads", "ffn": "FFNs"}
COMPONENT_NAMES = {"head": ("attention head", "attention heads"), "ffn": ("FFN", "FFNs")}
