"""Where in a TOML file a key is defined; knows TOML text only, not what a policy is."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# A longer value is taken for the whole rest: its line may then be that of a statement before it.
MAX_TRIES = 100
MAX_PARTS = 32
"""Parts of a dotted key. A parser's time grows with their square: 64 KiB of `a.a.a...` take it a minute."""

_MANY_PARTS = re.compile(rf"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{MAX_PARTS}}}""", re.ASCII)


def line_of_endless_key(text: str) -> int | None:
    """The line of the first key of more than `MAX_PARTS` dotted parts, which is not worth parsing; None without one."""
    found = _MANY_PARTS.search(text)
    return None if found is None else text.count("\n", 0, found.start()) + 1


def line_of(text: str, keys: Sequence[str | int]) -> int:
    """The line where the statement that defines `keys`, or as much of it as exists, begins (from 1).

    Found by parsing ever longer beginnings of the file: what TOML itself says cannot disagree with TOML. A
    path that exists in one exists in every longer one, so a binary search needs only a few parses.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    path = list(keys)
    while path and not _defines(_parsed(lines, len(lines)), path):
        path.pop()
    if not path:
        return 1
    low, high = 0, len(lines)  # `low` lines parse and lack the path, `high` lines have it
    while high - low > 1:
        # A beginning that ends within a value of several lines does not parse: try the nearest that does.
        near = sorted(range(low + 1, high), key=lambda end: abs(2 * end - low - high))[:MAX_TRIES]
        end, parsed = next(((n, p) for n in near if (p := _parsed(lines, n)) is not None), (low, None))
        if parsed is None:  # all in between is one value
            break
        low, high = (low, end) if _defines(parsed, path) else (end, high)
    while low < high - 1 and (not lines[low].strip() or lines[low].lstrip().startswith("#")):
        low += 1
    return low + 1


def _parsed(lines: list[str], count: int) -> Mapping[str, Any] | None:
    return _loaded("\n".join(lines[:count]) + "\n")


@functools.lru_cache(maxsize=128)
def _loaded(text: str) -> Mapping[str, Any] | None:
    # Kept: a file with several mistakes has the same beginnings parsed for each of them.
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError):
        return None
    return values


def _defines(value: Any, path: Sequence[str | int]) -> bool:
    for key in path:
        if isinstance(value, Mapping) and key in value:
            value = value[str(key)]
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return False
    return True
