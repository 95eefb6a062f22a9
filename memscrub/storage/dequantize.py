"""Write a quantized checkpoint out in full, as a plain one that every other command reads; knows no format's formulas.

    done = dequantize(open_checkpoint("quantized/", quantized=True), Path("full/"))

Every shard keeps its name and the order of its tensors. What was not quantized keeps its bytes; what was is rounded
once to the dtype that config.json states. One tensor is in memory at a time. The numbers are those that the quantized
model computes with, so what is measured on the result is what the quantized weights hold.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from memscrub.errors import CheckpointError, IncompleteError, NumericalError
from memscrub.storage.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint, read_tensor
from memscrub.storage.dequantize_formats import Full, Plan, plan_of
from memscrub.storage.files import read_range
from memscrub.storage.quantized import SUPPORTED, method_of, quantization_of, refuse_quantized
from memscrub.storage.writing import PartialDirectory, disk_errors, is_kept

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Dequantized:
    """What `dequantize` wrote."""

    directory: Path
    method: str
    dtype: str
    tensors: int  # written out in full
    kept: int  # byte for byte as they were
    dropped: tuple[str, ...]  # scales of activations and of the cache
    left_out: tuple[str, ...]  # files
    bytes_written: int


def dequantize(ckpt: Checkpoint, out: Path, *, overwrite: bool = False) -> Dequantized:
    """Write `ckpt`, opened with `quantized=True`, in full to the new directory `out`.

    Raises:
        CheckpointError: not quantized, of a method or format that is not supported, or malformed.
        NumericalError: a weight is NaN or infinite, or too large for the dtype.
        OutputError: `out` cannot be written.
        IncompleteError: the disk is full.
    """
    quantization = quantization_of(ckpt.config)
    if quantization is None:
        raise CheckpointError(f"{ckpt.path} is not quantized; use it as it is.")
    if method_of(quantization) not in SUPPORTED:
        refuse_quantized(ckpt.config, str(ckpt.path))
    dtype = _dtype_of(ckpt)
    plan = plan_of(quantization, ckpt.tensors, lambda name: read_tensor(ckpt, name))
    contents = _contents(ckpt, plan)
    kept = tuple(name for name in ckpt.files if is_kept(name, ckpt))
    with PartialDirectory(out, overwrite=overwrite, inputs=[ckpt.path]) as partial:
        _check_space(ckpt, contents, dtype, partial.path)
        with disk_errors(partial.path):
            for name in kept:
                if name not in (*ckpt.shards, CONFIG, INDEX):
                    (partial.path / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(ckpt.path / name, partial.path / name)
            for shard, entries in contents.items():
                (partial.path / shard).parent.mkdir(parents=True, exist_ok=True)
                with (partial.path / shard).open("xb") as file:
                    _write_shard(file, ckpt, shard, entries, dtype)
            _write_config(ckpt, partial.path, dtype)
            if INDEX in ckpt.files:
                _write_index(partial.path, contents, dtype, ckpt)
            size = sum(path.stat().st_size for path in partial.path.rglob("*") if path.is_file())
        open_checkpoint(partial.path)  # whatever is committed can be opened
        directory = partial.commit()
    return Dequantized(
        directory=directory,
        method=method_of(quantization),
        dtype=str(dtype).removeprefix("torch."),
        tensors=len(plan.full),
        kept=sum(isinstance(entry, str) for entries in contents.values() for entry in entries),
        dropped=plan.dropped,
        left_out=tuple(name for name in ckpt.files if name not in kept),
        bytes_written=size,
    )


def _dtype_of(ckpt: Checkpoint) -> torch.dtype:
    """The dtype that config.json states for the weights; bfloat16 where it states none or one of few bits."""
    stated = ckpt.config.get("dtype") or ckpt.config.get("torch_dtype")
    return _DTYPES.get(stated, torch.bfloat16) if isinstance(stated, str) else torch.bfloat16


def _contents(ckpt: Checkpoint, plan: Plan) -> dict[str, list[Full | str]]:
    """What each shard will hold, in its order: tensors in full where their first part was, the others by name.

    A shard that held nothing but scales goes.
    """
    full = {each.sources[0]: each for each in plan.full}
    gone = {source for each in plan.full for source in each.sources} | set(plan.dropped)
    contents: dict[str, list[Full | str]] = {}
    for name, info in ckpt.tensors.items():
        if name in full:
            contents.setdefault(info.shard, []).append(full[name])
        elif name not in gone:
            contents.setdefault(info.shard, []).append(name)
    written = [_name(entry) for entries in contents.values() for entry in entries]
    if len(set(written)) != len(written):
        twice = next(name for name in written if written.count(name) > 1)
        raise CheckpointError(f"{ckpt.path} holds {twice!r} quantized and in full; save the checkpoint again.")
    return contents


def _name(entry: Full | str) -> str:
    return entry if isinstance(entry, str) else entry.name


def _size(entry: Full | str, dtype: torch.dtype, ckpt: Checkpoint) -> int:
    if isinstance(entry, str):
        return ckpt.tensors[entry].end - ckpt.tensors[entry].begin
    return int(torch.Size(entry.shape).numel()) * dtype.itemsize


def _check_space(ckpt: Checkpoint, contents: Mapping[str, list[Full | str]], dtype: torch.dtype, place: Path) -> None:
    """Refuse before the first byte: a checkpoint in full is two to four times what it is quantized."""
    needed = sum(_size(entry, dtype, ckpt) for entries in contents.values() for entry in entries)
    with disk_errors(place):
        free = shutil.disk_usage(place).free
    if needed > free:
        raise IncompleteError(
            f"The weights in full need {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; free some space."
        )


def _write_shard(file: BinaryIO, ckpt: Checkpoint, shard: str, entries: list[Full | str], dtype: torch.dtype) -> None:
    """One safetensors file: the header, then one tensor after the other."""
    header: dict[str, object] = {}
    try:
        with safe_open(ckpt.path / shard, framework="pt") as source:
            metadata = source.metadata()
    except SafetensorError as problem:  # the library is stricter than JSON: no half of a surrogate pair, no -0
        raise CheckpointError(f"{shard} cannot be read: {problem}; save the checkpoint again.") from None
    if metadata:
        header["__metadata__"] = metadata
    position = 0
    for entry in entries:
        end = position + _size(entry, dtype, ckpt)
        info = ckpt.tensors[entry] if isinstance(entry, str) else None
        kind, shape = (info.dtype, info.shape) if info else (_STORED[dtype], _shape(entry))
        header[_name(entry)] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # readers map the file: tensors begin at a multiple of eight bytes
    file.write(len(raw).to_bytes(8, "little") + raw)
    for entry in entries:
        for piece in _bytes(entry, ckpt, dtype):
            file.write(piece)


def _shape(entry: Full | str) -> tuple[int, ...]:
    assert isinstance(entry, Full)
    return entry.shape


def _bytes(entry: Full | str, ckpt: Checkpoint, dtype: torch.dtype) -> Iterator[bytes | bytearray | memoryview]:
    if isinstance(entry, str):
        info = ckpt.tensors[entry]
        yield read_range(ckpt.path / info.shard, info.begin, info.end)
        return
    tensor = entry.make(lambda name: read_tensor(ckpt, name))
    if tuple(tensor.shape) != entry.shape:
        raise CheckpointError(
            f"{entry.name} has shape {list(tensor.shape)} in full, not {list(entry.shape)} as stored beside it;"
            " download the checkpoint again."
        )
    tensor = tensor.to(dtype)
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(f"{entry.name} in full holds NaN or infinite values in {dtype}; nothing was written.")
    yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_config(ckpt: Checkpoint, out: Path, dtype: torch.dtype) -> None:
    config = {
        key: value for key, value in ckpt.config.items() if key not in ("quantization_config", "compression_config")
    }
    for key in ("dtype", "torch_dtype"):
        if isinstance(config.get(key), str):  # one of few bits would have readers narrow the weights again
            config[key] = str(dtype).removeprefix("torch.")
    # Not every string that JSON can spell is UTF-8: ASCII with escapes keeps them all.
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_index(out: Path, contents: Mapping[str, list[Full | str]], dtype: torch.dtype, ckpt: Checkpoint) -> None:
    weight_map = {_name(entry): shard for shard, entries in contents.items() for entry in entries}
    total = sum(_size(entry, dtype, ckpt) for entries in contents.values() for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
