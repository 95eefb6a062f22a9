"""How two versions of one tensor differ, as the fewest bytes that lead from either to the other; knows no file.

The exclusive or of the stored bytes, where it is not zero, in one of three layouts:

    places    the bytes that differ, and where they are
    vectors   all bytes of the rows or columns that differ anywhere, and which those are
    mask      as `vectors`, with one bit per byte saying whether it differs, and only the bytes that do

Where is a list of ascending positions: for each the step from the one before (the first: from 0) as one byte, 255
meaning 255 and on. The same change undoes itself, exactly, whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memscrub.storage.safetensors_header import TensorInfo

Axis = Literal["rows", "columns"]
Layout = Literal["places", "vectors", "mask"]

PARTS: Mapping[Layout, tuple[str, ...]] = {
    "places": ("places", "bytes"),
    "vectors": ("vectors", "bytes"),
    "mask": ("vectors", "mask", "bytes"),
}
"""The parts of each layout, in the order in which they are stored."""

_STEP = 255  # the byte that says "so far, and on"
_BLOCK = 1 << 22  # bytes at a time, where an index of eight bytes each is needed; a multiple of eight


@dataclass(frozen=True)
class Delta:
    """How two versions of one tensor differ, in the smallest of the layouts."""

    layout: Layout
    axis: Axis
    parts: tuple[Tensor, ...]
    elements_changed: int
    rows_changed: int
    columns_changed: int


def difference(before: bytearray, after: bytearray, info: TensorInfo) -> Delta:
    """How two versions of the tensor `info` differ, which they must; `before` is overwritten.

    Of the layouts the smallest is taken, of equally small ones the first: the same bytes give the same patch.
    """
    grid = matrices, rows, columns, width = _grid(info, len(before))
    delta = torch.frombuffer(before, dtype=torch.uint8)
    delta ^= torch.frombuffer(after, dtype=torch.uint8)
    changed = (delta.view(-1, width) != 0).any(1).view(matrices, rows, columns)
    vectors: dict[Axis, Tensor] = {
        "rows": changed.any(2).flatten().nonzero().squeeze(1),
        "columns": changed.any(1).flatten().nonzero().squeeze(1),
    }
    count = int(torch.count_nonzero(delta))
    sizes: list[tuple[int, Layout, Axis]] = []
    for axis, found in vectors.items():
        listed, inside = len(_steps(found)), len(found) * _vector_bytes(axis, grid)
        sizes += [(listed + inside, "vectors", axis), (listed + (inside + 7) // 8 + count, "mask", axis)]
    size, layout, axis = min(sizes, key=lambda option: option[0])
    counts = int(torch.count_nonzero(changed)), len(vectors["rows"]), len(vectors["columns"])
    if 2 * count < size:
        places = delta.nonzero().squeeze(1)
        if len(steps := _steps(places)) + count < size:
            return Delta("places", "rows", (steps, delta[places]), *counts)
    listed_vectors, inside_vectors = _steps(vectors[axis]), _gather(delta, axis, vectors[axis], grid)
    if layout == "vectors":
        return Delta(layout, axis, (listed_vectors, inside_vectors), *counts)
    return Delta(layout, axis, (listed_vectors, *_sift(inside_vectors)), *counts)


def change(data: bytearray, info: TensorInfo, layout: Layout, axis: Axis, parts: Sequence[bytearray]) -> None:
    """Turn the bytes of the tensor `info` from one version into the other, in place.

    Raises ValueError for a change that cannot be one of this tensor; `data` is not worth keeping then.
    """
    if not all(parts):
        raise ValueError("has an empty part")
    grid = matrices, rows, columns, width = _grid(info, len(data))
    target = torch.frombuffer(data, dtype=torch.uint8)
    listed, *masks, values = (torch.frombuffer(part, dtype=torch.uint8) for part in parts)
    if layout == "places":
        places = _positions(listed, len(data))
        _same_size(len(values), len(places))
        target[places] = target[places] ^ values
        return
    vectors = _positions(listed, matrices * (rows if axis == "rows" else columns))
    size = len(vectors) * _vector_bytes(axis, grid)
    if layout == "mask":
        values = _spread(masks[0], values, size)
    _same_size(len(values), size)
    if axis == "rows":
        view = target.view(matrices * rows, columns * width)
        view[vectors] = view[vectors] ^ values.view(-1, columns * width)
    else:
        view, place = target.view(grid), (vectors // columns, slice(None), vectors % columns)
        view[place] = view[place] ^ values.view(-1, rows, width)


def _grid(info: TensorInfo, size: int) -> tuple[int, int, int, int]:
    """A tensor's bytes as matrices, rows, columns and bytes per element; packed dtypes are one row of bytes."""
    width = info.element_bytes
    shape = info.shape if size == width * torch.Size(info.shape).numel() else (size // width,)
    rows, columns = (shape[-2] if len(shape) > 1 else 1), (shape[-1] if shape else 1)
    return size // (rows * columns * width), rows, columns, width


def _vector_bytes(axis: Axis, grid: tuple[int, int, int, int]) -> int:
    _, rows, columns, width = grid
    return (columns if axis == "rows" else rows) * width


def _gather(data: Tensor, axis: Axis, vectors: Tensor, grid: tuple[int, int, int, int]) -> Tensor:
    """The bytes of these rows or columns, one vector after the other, flat."""
    matrices, rows, columns, width = grid
    if axis == "rows":
        return data.view(matrices * rows, columns * width)[vectors].flatten()
    return data.view(grid)[vectors // columns, :, vectors % columns].flatten()


def _same_size(given: int, wanted: int) -> None:
    if given != wanted:
        raise ValueError("has parts whose sizes do not fit each other")


def _steps(positions: Tensor) -> Tensor:
    """Ascending positions as bytes: the step from one to the next, 255 meaning 255 and on."""
    streams, last = [], 0
    for block in torch.split(positions, _BLOCK // 8):
        steps = torch.diff(block, prepend=block.new_tensor([last]))
        ends = torch.cumsum(steps // _STEP + 1, 0) - 1
        stream = torch.full((int(ends[-1]) + 1,), _STEP, dtype=torch.uint8)
        stream[ends] = (steps % _STEP).to(torch.uint8)
        streams.append(stream)
        last = int(block[-1])
    return torch.cat(streams)


def _positions(stream: Tensor, limit: int) -> Tensor:
    """The inverse of `_steps`, checked: ascending and below `limit`."""
    if len(stream) > limit + limit // _STEP + 1 or int(stream[-1]) == _STEP:
        raise ValueError("lists places that do not fit the tensor")
    ends = (stream != _STEP).nonzero().squeeze(1)
    positions = torch.cumsum(stream, 0, dtype=torch.int64)[ends]
    if int(positions[-1]) >= limit or bool((torch.diff(positions) <= 0).any()):
        raise ValueError("lists places that are not in the tensor, or not in order")
    return positions


def _sift(values: Tensor) -> tuple[Tensor, Tensor]:
    """One bit per byte that says whether it is other than zero, and those that are."""
    packed, kept = [], []
    for block in torch.split(values, _BLOCK):
        flags = block != 0
        packed.append(_pack(flags))
        kept.append(block[flags])
    return torch.cat(packed), torch.cat(kept)


def _spread(packed: Tensor, values: Tensor, size: int) -> Tensor:
    """The inverse of `_sift`, checked: `size` bytes."""
    _same_size(len(packed), (size + 7) // 8)
    spread = torch.zeros(size, dtype=torch.uint8)
    used = 0
    for target, bits in zip(torch.split(spread, _BLOCK), torch.split(packed, _BLOCK // 8), strict=True):
        flags = _unpack(bits, len(target))
        begin, used = used, used + int(torch.count_nonzero(flags))
        _same_size(len(values[:used]), used)
        target[flags] = values[begin:used]
    _same_size(len(values), used)
    return spread


def _pack(flags: Tensor) -> Tensor:
    """Eight flags a byte, the first in the lowest bit; the last byte is filled up with zeros."""
    padded = torch.nn.functional.pad(flags, (0, -len(flags) % 8)).view(-1, 8)
    packed = torch.zeros(len(padded), dtype=torch.uint8)
    for bit in range(8):
        packed |= padded[:, bit].to(torch.uint8) << bit
    return packed


def _unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` flags that `_pack` packed; those behind them must be zeros."""
    flags = torch.empty((len(packed), 8), dtype=torch.bool)
    for bit in range(8):
        flags[:, bit] = (packed >> bit) & 1 != 0
    flags = flags.view(-1)
    if bool(flags[count:].any()):
        raise ValueError("has a mask that is longer than the vectors it lists")
    return flags[:count]
