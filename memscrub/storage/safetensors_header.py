"""Read and check the header of a safetensors file; knows byte ranges, not what is in them.

The library's own reader does not say where a tensor lies in its file. We need each tensor's exact byte range,
to replace it and nothing else, and one kind of error for every malformed file, so the header is read here:
`[u64 little-endian N][N bytes of JSON][tensors, contiguous, to the end of the file]`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memscrub.errors import CheckpointError
from memscrub.storage.files import strict_json

MAX_HEADER = 1 << 24
"""Bytes of a header: room for 150,000 tensors in one file. The format allows six times as much, which would take over a
gigabyte when it is parsed."""

_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes `begin` to `end` of the file `shard`, from the file's first byte."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def element_bytes(self) -> int:
        """Bytes per element; 1 for dtypes that pack several elements into a byte."""
        return max(1, _BITS[self.dtype] // 8)


def read_header(path: Path, shard: str) -> dict[str, TensorInfo]:
    """The tensors of the safetensors file at `path`, in file order; `shard` is its name in messages.

    Raises:
        CheckpointError: the header or the byte ranges are not those of a well-formed safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(file.read(8), size, shard)
            raw = file.read(length)
    except OSError as problem:
        raise CheckpointError(f"{shard} cannot be read: {problem.strerror}.") from problem
    return parse_header(raw, shard, file_size=size)


def parse_header(raw: bytes, shard: str, *, file_size: int) -> dict[str, TensorInfo]:
    """The tensors that the header `raw` describes, checked against the size of its file.

    Raises:
        CheckpointError: as `read_header`.
    """
    try:
        header = strict_json(raw)
    except ValueError as problem:
        raise _malformed(shard, str(problem)) from None
    if not isinstance(header, dict):
        raise _malformed(shard, "it is not a JSON object")
    _check_metadata(header.pop("__metadata__", None), shard)
    start = 8 + len(raw)
    tensors = [_tensor(name, entry, shard, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_contiguous(tensors, shard, start, file_size)
    return {tensor.name: tensor for tensor in tensors}


def _header_length(prefix: bytes, size: int, shard: str) -> int:
    if len(prefix) < 8:
        raise _malformed(shard, "the file is shorter than 8 bytes")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise _malformed(shard, f"it claims {length} bytes, more than the {MAX_HEADER} that memscrub reads")
    if length + 8 > size:
        raise _malformed(shard, f"it claims {length} bytes, but the file has {size}")
    return length


def _check_metadata(metadata: Any, shard: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed(shard, "its __metadata__ is not a map of strings")


def _tensor(name: str, entry: Any, shard: str, start: int) -> TensorInfo:
    """One entry of the header, with the size that dtype and shape promise."""
    if len(name) > 1000:
        raise _malformed(shard, "a tensor name is longer than 1000 characters")
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(shard, f"the entry of {name!r} does not consist of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _malformed(shard, f"{name!r} has an unknown dtype")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _malformed(shard, f"the shape or offsets of {name!r} are not lists of non-negative integers")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _malformed(shard, f"the offsets of {name!r} do not fit its dtype and shape")
    return TensorInfo(name, shard, dtype, tuple(shape), start + begin, start + end)


def _are_sizes(values: Any) -> bool:
    # `type(...) is int` because True is an int too. The bounds (torch's 64 dimensions, 63-bit sizes) keep the
    # product of a hostile shape from taking minutes.
    if not isinstance(values, list) or len(values) > 64:
        return False
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_contiguous(tensors: list[TensorInfo], shard: str, start: int, file_size: int) -> None:
    # Holes and overlaps are refused: bytes that belong to no tensor, or to two, can hide from a scan.
    position = start
    for tensor in tensors:
        if tensor.begin != position:
            raise _malformed(shard, f"{tensor.name!r} leaves a hole or overlaps another tensor")
        position = tensor.end
    if position != file_size:
        raise _malformed(shard, f"its tensors end at byte {position}, but the file has {file_size}")


def _malformed(shard: str, why: str) -> CheckpointError:
    return CheckpointError(f"The safetensors header of {shard} is malformed: {why}; download or save the file again.")
