"""What checks the types of arguments and results while tests run, in less time than jaxtyping's hook takes for it.

The hook prepares every function so that names of dimensions are compared over its arguments and result. That is kept
for functions that name any, and for generators, whose arguments beartype alone would keep alive while they run; others
are checked by beartype alone. A function that is made at each call of another is left as it is: it would be prepared
each time.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

_jaxtyped = jaxtyping.jaxtyped


def _checked(*things: Any, **options: Any) -> Any:
    """What the hook decorates functions and classes with."""
    decorate = _jaxtyped(*things, **options)
    return decorate if things else lambda thing: _prepared(thing, decorate)


def _prepared(thing: Any, decorate: Callable[[Any], Any]) -> Any:
    if not inspect.isfunction(thing):
        return decorate(thing)
    if "<locals>" in thing.__qualname__:
        return thing
    whole = inspect.isgeneratorfunction(thing) or _names_dimensions(thing)
    return decorate(thing) if whole else beartype(thing)


def _names_dimensions(function: Any) -> bool:
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # of what type checkers alone import, what comes later, or what Python cannot read
        return True
    return any(map(_has_array, hints.values()))


def _has_array(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(
        map(_has_array, typing.get_args(hint)))


jaxtyping.jaxtyped = _checked
