"""What checks the types of arguments and results while tests run: every function of the package but those in others.

A function that is made at each call of another would be prepared each time, which took a twentieth of the tests.
"""

from __future__ import annotations

from typing import Any

import jaxtyping
from beartype import beartype

_jaxtyped = jaxtyping.jaxtyped


def outermost(function: Any) -> Any:
    """The function with its types checked, where it is made once."""
    return function if _is_inner(function) else beartype(function)


def _only_outermost(*functions: Any, **options: Any) -> Any:
    """What jaxtyping's import hook decorates functions with; those in others are left as they are."""
    decorate = _jaxtyped(*functions, **options)
    return decorate if functions else lambda function: function if _is_inner(function) else decorate(function)


def _is_inner(function: Any) -> bool:
    return "<locals>" in getattr(function, "__qualname__", "")


jaxtyping.jaxtyped = _only_outermost
