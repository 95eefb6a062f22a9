"""Write an edited checkpoint, changing the edited tensors' bytes and no others; knows nothing of models.

    with PartialDirectory(out, inputs=[ckpt.path]) as partial:
        ledger = write_checkpoint(ckpt, partial.path, {"model.layers.3.mlp.down_proj.weight": tensor})
        ...                       # measure partial.path, write the report into it, sign it
        partial.commit()          # only now does `out` exist, complete

Every byte outside the ranges of the edited tensors is copied from the original, so that headers, metadata, tensor
order and every other tensor are the original's, whatever wrote them. Files are written side by side.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memscrub.errors import CheckpointError, IncompleteError, NumericalError, OutputError, UsageError
from memscrub.storage.checkpoint import Checkpoint, TensorInfo
from memscrub.storage.files import CHUNK, copy_range, read_range, write_all
from memscrub.storage.partial import PartialDirectory, disk_errors, refuse_overlap
from memscrub.storage.vector_changes import Read, changes

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch

    Values: TypeAlias = Callable[[], torch.Tensor] | torch.Tensor

__all__ = [
    "PartialDirectory", "TensorChange", "WrittenLedger", "changed_tensors", "disk_errors", "write_checkpoint",
]  # fmt: skip

_OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".gguf", ".ggml", ".h5",
    ".msgpack", ".ot", ".onnx", ".onnx_data", ".onnx.data", ".tflite", ".mlmodel", ".nemo", ".npy", ".distcp",
    ".pdparams", ".keras", ".llamafile", ".th", ".pte", ".mar", ".zip", ".7z", ".tar", ".tgz", ".tar.gz", ".tar.bz2",
    ".tar.xz", ".tar.zst",
)  # fmt: skip
# Parts and copies of such files: `model.onnx_data_1`, `variables.data-00000-of-00001`, `model.safetensors.bak`.
_PART = re.compile(r".+(\.onnx_data_\d+|\.data-\d+-of-\d+|\.(gguf|safetensors|bin)\.[^/]+)", re.IGNORECASE)

# Files written side by side: what keeps a disk and the hashing busy.
_THREADS = 4


@dataclass(frozen=True)
class TensorChange:
    """What differs between two versions of one tensor.

    `rows_changed` counts the vectors along the last axis that differ anywhere, `columns_changed` those along
    the last but one, per leading index (such as an expert); a one-dimensional tensor counts as one row. `rows` and
    `columns` say which these are, as `vector_changes.ranges` writes them.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    elements_changed: int
    rows_changed: int
    columns_changed: int
    sha256_before: str
    sha256_after: str
    rows: str = ""
    columns: str = ""


@dataclass(frozen=True)
class WrittenLedger:
    """What `write_checkpoint` did with every file and every edited tensor.

    `left_out` names files that were not copied: git's own, earlier reports and signatures, and weights in
    other formats, which would otherwise ship the unedited values next to the edited ones.
    """

    changes: tuple[TensorChange, ...]
    rewritten: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    bytes_written: int


def write_checkpoint(ckpt: Checkpoint, out: Path, edited: Mapping[str, Values]) -> WrittenLedger:
    """Write `ckpt` with the `edited` tensors to the new or existing directory `out`.

    Values may have any float dtype and are stored in the tensor's original one. A callable is called twice,
    once to check it before anything is written and once to write it, so that one tensor for each of a few threads
    is in memory.

    Raises:
        UsageError: an unknown tensor, a tensor that is not of floats, or a wrong shape; nothing was written.
        NumericalError: NaN or infinity, also after rounding to the original dtype; nothing was written.
        OutputError: `out` overlaps the checkpoint, holds one of its files already, or is read-only.
        IncompleteError: the disk is full, or a callable gave other values the second time.
    """
    refuse_overlap(out, ckpt.path)
    kept = tuple(name for name in ckpt.files if is_kept(name, ckpt))
    for name in kept:
        if os.path.lexists(out / name):
            raise OutputError(f"{out / name} exists already; choose a new directory.")
    sums = {name: _sum(_checked_bytes(ckpt, name, edited[name])) for name in edited}
    _check_space(ckpt, kept, out)
    with disk_errors(out):
        for name in kept:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
        found = _in_threads(lambda name: _write_file(ckpt, out, name, edited, sums), kept)
        size = sum((out / name).stat().st_size for name in kept)
    by_name = {change.name: change for each in found for change in each}
    changes = tuple(by_name[name] for name in ckpt.tensors if name in edited)
    rewritten = tuple(sorted({change.shard for change in changes}))
    copied = tuple(name for name in kept if name not in rewritten)
    left_out = tuple(name for name in ckpt.files if name not in kept)
    return WrittenLedger(changes, rewritten, copied, left_out, size)


def changed_tensors(base: Checkpoint, other: Checkpoint) -> list[TensorChange]:
    """The tensors whose bytes differ, by name; `shard` is the one of `other`.

    Raises:
        CheckpointError: the two do not store the same tensors with the same dtypes and shapes.
    """
    for name in sorted(base.tensors.keys() ^ other.tensors.keys()):
        holder = base if name in base.tensors else other
        raise CheckpointError(f"Tensor {name!r} is only in {holder.path}; the two checkpoints are not comparable.")
    found: list[TensorChange] = []
    for name, new in sorted(other.tensors.items()):
        old = base.tensors[name]
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            raise CheckpointError(f"Tensor {name!r} differs in dtype or shape; the two checkpoints are not comparable.")
        before, after = tensor_digest(base, old), tensor_digest(other, new)
        if before != after:
            found.append(_change(reader(base, old), reader(other, new), new, before, after))
    return found


def reader(ckpt: Checkpoint, info: TensorInfo) -> Read:
    """The bytes of a stored tensor, counted from its first, read when asked for."""
    return lambda begin, end: read_range(ckpt.path / info.shard, info.begin + begin, info.begin + end)


def is_kept(name: str, ckpt: Checkpoint) -> bool:
    if name in ckpt.shards:
        return True
    own = name == "model.sig" or name.startswith("memscrub-")
    # The model_signing command line never covers these, so an output that held one would not verify with it.
    git = name in (".gitattributes", ".gitignore") or name.startswith(".github/")
    weights = name.lower().endswith(_OTHER_WEIGHTS) or (_PART.fullmatch(name) and not name.lower().endswith(".json"))
    return not own and not git and not weights and not name.lower().endswith(".dsse.json")


def _check_space(ckpt: Checkpoint, names: tuple[str, ...], out: Path) -> None:
    """Refuse before the first byte rather than after an hour; the disk may still fill up later."""
    place = out
    while not place.is_dir():
        place = place.parent
    with disk_errors(out):
        needed = sum((ckpt.path / name).stat().st_size for name in names)
        free = shutil.disk_usage(place).free
    if needed > free:
        raise IncompleteError(f"{out} needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; free some space.")


def _write_file(
    ckpt: Checkpoint, out: Path, name: str, edited: Mapping[str, Values], sums: Mapping[str, int]
) -> list[TensorChange]:
    """Write one file: new bytes where tensors were edited, the original's everywhere else."""
    inside = [info for info in ckpt.tensors.values() if info.shard == name and info.name in edited]
    changes = []
    # The path follows links: the copy is always a regular file.
    with (ckpt.path / name).open("rb", buffering=0) as source, (out / name).open("xb", buffering=0) as target:
        at = 0
        for info in sorted(inside, key=lambda info: info.begin):
            copy_range(source, target, at, info.begin)
            new = _checked_bytes(ckpt, info.name, edited[info.name])
            if _sum(new) != sums[info.name]:
                raise IncompleteError(f"The new values of {info.name} changed while they were written; run again.")
            write_all(target, new)
            changes.append(_compared(_bytes(ckpt, info), new, info))
            at = info.end
        copy_range(source, target, at, os.fstat(source.fileno()).st_size)
    return changes


def _in_threads(work: Callable[[str], list[TensorChange]], names: Sequence[str]) -> list[list[TensorChange]]:
    """Do the work for every name, large files side by side; after a failure nothing more is begun."""
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(work, name) for name in names]
        try:
            return [future.result() for future in futures]
        except BaseException:  # an interrupt too must not wait for all the files that are left
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compared(old: bytearray, new: memoryview, info: TensorInfo) -> TensorChange:
    digests = (hashlib.sha256(data).hexdigest() for data in (old, new))
    one, other = (lambda begin, end, view=view: view[begin:end] for view in (memoryview(old), new))
    return _change(one, other, info, *digests)


def _sum(data: memoryview) -> int:
    """A number that tells whether a callable gave other values: it guards against mistakes, not against anybody."""
    import numpy as np

    words = len(data) // 8 * 8
    return int(np.frombuffer(data[:words], dtype=np.uint64).sum()) + sum(data[words:])


def _change(old: Read, new: Read, info: TensorInfo, before: str, after: str) -> TensorChange:
    found = changes(old, new, info.shape, info.element_bytes, info.end - info.begin)
    return TensorChange(
        name=info.name,
        shard=info.shard,
        dtype=info.dtype,
        shape=info.shape,
        elements_changed=found.elements,
        rows_changed=found.rows_changed,
        columns_changed=found.columns_changed,
        sha256_before=before,
        sha256_after=after,
        rows=found.rows,
        columns=found.columns,
    )


def _checked_bytes(ckpt: Checkpoint, name: str, value: Values) -> memoryview:
    """The little-endian bytes of an edited tensor in its original dtype."""
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if name not in ckpt.tensors:
        raise UsageError(f"{ckpt.path} stores no tensor {name!r}; edit the stored name of tied weights.")
    info = ckpt.tensors[name]
    if info.dtype not in dtypes:
        raise UsageError(f"Tensor {name} is stored as {info.dtype}; only F64, F32, F16 and BF16 can be edited.")
    tensor = value if isinstance(value, torch.Tensor) else value()
    if not tensor.is_floating_point():
        raise UsageError(f"The new values of {name} are {tensor.dtype}, not floats.")
    if tuple(tensor.shape) != info.shape:
        raise UsageError(f"The new values of {name} have shape {tuple(tensor.shape)}, stored is {info.shape}.")
    stored = tensor.detach().to(device="cpu", dtype=dtypes[info.dtype]).contiguous()
    if not bool(torch.isfinite(stored).all()):
        finite = bool(torch.isfinite(tensor).all())
        why = f"are too large for {info.dtype}" if finite else "contain NaN or infinity"
        raise NumericalError(f"The new values of {name} {why}; nothing was written.")
    return stored.reshape(-1).view(torch.uint8).numpy().data


def _bytes(ckpt: Checkpoint, info: TensorInfo) -> bytearray:
    return read_range(ckpt.path / info.shard, info.begin, info.end)


def tensor_digest(ckpt: Checkpoint, info: TensorInfo) -> str:
    """SHA-256 of a stored tensor's bytes, in small pieces. Raises IncompleteError where they cannot be read."""
    digest, left = hashlib.sha256(), info.end - info.begin
    try:
        with (ckpt.path / info.shard).open("rb") as file:
            file.seek(info.begin)
            while block := file.read(min(CHUNK, left)):
                digest.update(block)
                left -= len(block)
    except OSError as problem:
        raise IncompleteError(f"{info.shard} cannot be read: {problem.strerror}.") from problem
    return digest.hexdigest()
