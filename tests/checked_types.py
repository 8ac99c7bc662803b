"""What checks the types of arguments and results while tests run: every function of the package but those in others."""

from __future__ import annotations

from typing import Any

from beartype import beartype


def outermost(function: Any) -> Any:
    """The function with its types checked; one that is made at each call of another is left alone, to save time."""
    return function if "<locals>" in function.__qualname__ else beartype(function)
