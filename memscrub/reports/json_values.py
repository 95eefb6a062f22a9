"""Frozen dataclasses as the plain values that JSON has, and back by their annotations; knows none of them."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

# No count is larger; of one without end not even a share can be taken.
_LARGEST = 1 << 64


def plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as what JSON has; infinities (an unbounded margin) become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return None
    return value


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a dataclass's fields, found out once for a list of thousands, and the names of optional ones."""
    # A field with a default may be absent: reports written before it was added stay readable.
    optional = (each.name for each in dataclasses.fields(kind) if each.default is not dataclasses.MISSING)
    return typing.get_type_hints(kind), frozenset(optional)


def rebuilt(kind: Any, value: Any) -> Any:
    """The inverse of `plain`, guided by the type annotation; null in place of a number is infinity.

    Raises TypeError, KeyError, ValueError, AttributeError or OverflowError where the value is not of that type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = [item for item in arguments if item is not type(None)]
        return rebuilt(kind, value)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError("expected a list")
        return tuple(rebuilt(arguments[0], item) for item in value)
    if origin is dict:
        return {str(key): rebuilt(arguments[1], item) for key, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints, optional = _fields(kind)
        given = {name: hint for name, hint in hints.items() if name in value or name not in optional}
        return kind(**{name: rebuilt(hint, value[name]) for name, hint in given.items()})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if kind is float:
        if value is None:
            return math.inf
        if type(value) not in (int, float) or not math.isfinite(value):
            raise TypeError("expected a finite number")
        return float(value)
    if type(value) is not kind:  # True is no number
        raise TypeError(f"expected {kind.__name__}")
    if kind is int and abs(value) > _LARGEST:
        raise ValueError("expected a number of 64 bits")
    return value
