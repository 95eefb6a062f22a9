"""Which elements, rows and columns differ between two versions of a tensor, by its bytes; knows no file and no model.

Rows and columns are those of the last two axes, numbered through over the leading ones (such as experts), matrix 0
first. A tensor of one dimension is one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Mask: TypeAlias = NDArray[np.bool_]

Read: TypeAlias = Callable[[int, int], "bytes | bytearray | memoryview"]
"""The bytes of a tensor from one place to another, counted from its first byte."""

BLOCK = 8 << 20
"""Bytes of each version that are looked at together."""


@dataclass(frozen=True)
class Changes:
    """How many elements differ, and which rows and columns hold them (as `ranges` writes them)."""

    elements: int
    rows: str
    columns: str
    rows_changed: int
    columns_changed: int


def changes(old: Read, new: Read, shape: tuple[int, ...], element_bytes: int, size: int) -> Changes:
    """Compare two versions of a tensor of `size` bytes, a few rows at a time; exact also for -0.0 and NaN."""
    import numpy as np

    if prod(shape) * element_bytes != size:  # several elements share a byte: bytes are compared instead
        shape = (size // element_bytes,)
    height, width = (shape[-2] if len(shape) > 1 else 1), (shape[-1] if shape else 1)
    row = width * element_bytes
    step = max(1, BLOCK // max(1, row)) * row
    rows: list[Mask] = []
    columns: list[Mask] = []
    elements = 0
    for begin in range(0, size, height * row) if size else ():
        end, seen = begin + height * row, np.zeros(width, dtype=bool)
        for at in range(begin, end, step):
            differs = _differs(old(at, min(at + step, end)), new(at, min(at + step, end)), width, element_bytes)
            elements += int(differs.sum())
            rows.append(np.asarray(differs.any(axis=1)))
            seen |= differs.any(axis=0)
        columns.append(seen)
    return Changes(elements, _ranges(rows), _ranges(columns), _count(rows), _count(columns))


def _differs(old: bytes | bytearray | memoryview, new: bytes | bytearray | memoryview, width: int, size: int) -> Mask:
    import numpy as np

    one, other = (np.frombuffer(data, dtype=np.uint8).reshape(-1, width, size) for data in (old, new))
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(size)
    if kind is None:
        return np.asarray((one != other).any(axis=-1))
    return np.asarray(one.view(kind)[..., 0] != other.view(kind)[..., 0])


def _count(masks: list[Mask]) -> int:
    return sum(int(mask.sum()) for mask in masks)


def _ranges(masks: list[Mask]) -> str:
    import numpy as np

    return ranges(np.flatnonzero(np.concatenate(masks)).tolist() if masks else [])


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as text: `0-3,7,9-10`; nothing for none."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1] = parts[-1][0], number
        else:
            parts.append((number, number))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
