"""How shares, differences and margins are written: the same in a sentence, on a page and in a terminal."""

from __future__ import annotations

MINUS = "\N{MINUS SIGN}"


def percent(share: float, digits: int = 0) -> str:
    """`12 %`: a measured share."""
    return f"{100 * share:.{digits}f} %"


def signed(difference: float) -> str:
    """`+1.2`: a difference of accuracy in points, with a true minus sign and no sign where it is 0."""
    return f"{100 * difference:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0").replace("-", MINUS)


def points_of(margin: float | int) -> str:
    """`2 points`, `1 point`: a margin as it was asked for."""
    points = f"{100 * margin:.3g}"
    return f"{points} point{'s' * (points != '1')}"
