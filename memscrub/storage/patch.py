"""The patch file: which bytes of which tensors an edit changed, in both directions; knows no directory.

A patch is one safetensors file whose tensors are all bytes (`U8`). For each edited tensor it holds the exclusive or
of the stored bytes before and after, where they differ: the same bytes turn the original into the edited tensor and
the edited tensor into the original, exactly, whatever the dtype. `docs/patch.md` describes the format.

Everything in a patch is data from a stranger: sizes are held against the file and the tensor before memory is asked
for, and no name in it becomes a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from memscrub.errors import CheckpointError, IncompleteError, SignatureInvalidError, UsageError
from memscrub.storage.files import CHUNK, is_safe_name, read_range, replacing, strict_json, tree_digest
from memscrub.storage.patch_delta import PARTS, Axis, Layout, change
from memscrub.storage.safetensors_header import TensorInfo, read_header

FORMAT = "memscrub-patch"
SCHEMA = "1"
MAX_NAME = 1000
"""Characters in a name, as `safetensors_header` reads it."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]

_CHECKSUM = '"checksum":"{}"'
_NO_CHECKSUM = "0" * 64


class _Value(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class PatchedTensor(_Value):
    """One edited tensor: what it is, how its change is stored, and how much changed.

    `orientation` says whether its output vectors are its rows or its columns (None: not known). `rows_changed` counts
    the vectors along the last axis that differ anywhere, `columns_changed` those along the last but one, per leading
    index (such as an expert); a one-dimensional tensor counts as one row. `axis` is the kind of vector that the
    layouts `vectors` and `mask` list.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[Count, ...]
    orientation: Axis | None
    layout: Layout
    axis: Axis
    elements_changed: Count
    rows_changed: Count
    columns_changed: Count
    sha256_before: Digest
    sha256_after: Digest

    @property
    def vectors_changed(self) -> int | None:
        """Output vectors that differ; None where it is not known which they are."""
        return {"rows": self.rows_changed, "columns": self.columns_changed, None: None}[self.orientation]

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of its parts in the file."""
        return tuple(f"{self.name}.{part}" for part in PARTS[self.layout])


class Rewritten(_Value):
    """SHA-256 of a shard before and after the edit."""

    before: Digest
    after: Digest


class Manifest(_Value):
    """What a patch says of the two checkpoints it leads between.

    `files` are those that both have, byte for byte; `shards` those that differ; `left_out` are files of the base that
    the edited checkpoint lacks, or has otherwise, and that the patch does not carry. `base_sha256` is over all files
    of the base, `scrubbed_sha256` over `files` and `shards` after the edit; both as `files.tree_digest` has it.
    """

    base_sha256: Digest
    scrubbed_sha256: Digest
    policy_sha256: Digest | None
    files: dict[str, Digest]
    shards: dict[str, Rewritten]
    left_out: tuple[str, ...]
    tensors: tuple[PatchedTensor, ...]

    def digests(self, side: Literal["before", "after"]) -> dict[str, str]:
        """SHA-256 of every file of the base (`before`), or of the edited checkpoint, that the patch speaks of."""
        return {**self.files, **{name: getattr(shard, side) for name, shard in self.shards.items()}}


@dataclass(frozen=True)
class PatchFile:
    """A patch that was checked to be whole and consistent; read-only."""

    path: Path
    size: int
    manifest: Manifest
    parts: Mapping[str, TensorInfo]

    def change(self, tensor: PatchedTensor, data: bytearray, info: TensorInfo) -> None:
        """Turn the bytes of `info`, the tensor as a checkpoint stores it, from one version into the other, in place.

        Raises:
            UsageError: what the patch says of the tensor is impossible; `data` is not worth keeping then.
            IncompleteError: the patch cannot be read any more.
        """
        sizes = [self.parts[key].end - self.parts[key].begin for key in tensor.keys]
        if sizes[-1] > len(data) or max(sizes) > 2 * len(data) + 1:  # before memory is asked for
            raise _unusable(self.path, f"its parts of {tensor.name!r} do not fit that tensor")
        parts = [read_range(self.path, self.parts[key].begin, self.parts[key].end) for key in tensor.keys]
        try:
            change(data, info, tensor.layout, tensor.axis, parts)
        except ValueError as problem:
            raise _unusable(self.path, f"its change of {tensor.name!r} {problem}") from None


def header_bytes(manifest: str, sizes: Mapping[str, int]) -> bytes:
    """The beginning of a patch file whose parts, of these sizes, follow one another; `save_patch` fills in the rest.

    `manifest` is a `Manifest` as JSON. Raises CheckpointError for a tensor whose name is too long to name its parts by.
    """
    header: dict[str, object] = {
        "__metadata__": {
            "checksum": _NO_CHECKSUM,
            "format": FORMAT,
            "schema": SCHEMA,
            "memscrub": version("memscrub"),
            "manifest": manifest,
        }
    }
    position = 0
    for name, size in sizes.items():
        if len(name) > MAX_NAME:
            raise CheckpointError(f"The tensor name {name[:40]!r}... is too long for a patch; rename the tensor.")
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def save_patch(path: Path, header: bytes, payload: BinaryIO) -> None:
    """Write a patch: this header, then all of `payload`, then the checksum over both in its place in the header.

    Under a temporary name of its own first, so that a failure leaves no half file and no other file is touched. Only
    its owner may read the patch: it gives back what the edit took out. OSError is the caller's to explain.
    """
    whole = hashlib.sha256(header)
    with replacing(path, private=True) as temporary, temporary.open("wb") as file:
        file.write(header)
        while block := payload.read(CHUNK):
            whole.update(block)
            file.write(block)
        file.seek(header.index(_CHECKSUM.format(_NO_CHECKSUM).encode()))
        file.write(_CHECKSUM.format(whole.hexdigest()).encode())
        file.flush()
        os.fsync(file.fileno())


def open_patch(path: str | Path) -> PatchFile:
    """Read a patch's header and check the whole file against its checksum.

    The checksum finds damage. It is no signature: whoever can write the file can make it anew.

    Raises:
        UsageError: no such file, not a patch, of a schema this version does not know, or inconsistent (exit 2).
        SignatureInvalidError: the checksum does not hold (exit 5).
        IncompleteError: the file cannot be read to its end.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is not a file; name the patch that `memscrub diff` wrote.")
    try:
        parts = read_header(path, path.name)
        length = int.from_bytes(read_range(path, 0, 8), "little")
        raw = bytes(read_range(path, 8, 8 + length))
        metadata = strict_json(raw).get("__metadata__") or {}
    except CheckpointError as problem:
        raise _unusable(path, f"it is not a whole safetensors file ({str(problem).split('; ')[0]})") from None
    if metadata.get("format") != FORMAT or not {"schema", "checksum", "manifest"} <= metadata.keys():
        raise _unusable(path, "it is not a patch of memscrub")
    _check_sum(path, raw, metadata["checksum"])
    if metadata["schema"] != SCHEMA:
        raise UsageError(f"{path} is a patch of another schema than {SCHEMA}; install a newer memscrub.")
    manifest = _manifest(path, metadata["manifest"])
    _check_parts(path, manifest, parts)
    size = max((part.end for part in parts.values()), default=8 + length)
    return PatchFile(path, size, manifest, parts)


def _unusable(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} cannot be used: {why}; make the patch again with `memscrub diff`.")


def _check_sum(path: Path, raw: bytes, stated: str) -> None:
    """The checksum is over the whole file, with zeros in its own place."""
    damaged = SignatureInvalidError(f"{path} is damaged: its checksum does not hold; fetch or make the patch again.")
    if not re.fullmatch("[0-9a-f]{64}", stated):
        raise damaged
    own = _CHECKSUM.format(stated).encode()
    whole = hashlib.sha256(len(raw).to_bytes(8, "little"))
    whole.update(raw.replace(own, _CHECKSUM.format(_NO_CHECKSUM).encode()))
    try:
        with path.open("rb") as file:
            file.seek(8 + len(raw))
            while block := file.read(CHUNK):
                whole.update(block)
    except OSError as problem:
        raise IncompleteError(f"{path} cannot be read: {problem.strerror}.") from problem
    if raw.count(own) != 1 or whole.hexdigest() != stated:
        raise damaged


def _manifest(path: Path, text: str) -> Manifest:
    """The manifest, and that it does not contradict itself."""
    try:
        strict_json(text.encode())
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_url=False, include_input=False)[0]["loc"]))
        raise _unusable(path, f"its manifest lacks or misstates a field ({where:.100})") from None
    except ValueError as problem:
        raise _unusable(path, f"its manifest cannot be read: {problem}") from None
    if not all(map(is_safe_name, (*manifest.files, *manifest.shards, *manifest.left_out))):
        raise _unusable(path, "it names a file outside of a checkpoint's directory")
    names = [tensor.name for tensor in manifest.tensors]
    agree = names == sorted(set(names)) and {t.shard for t in manifest.tensors} == manifest.shards.keys()
    if not agree or manifest.files.keys() & manifest.shards.keys():
        raise _unusable(path, "its manifest contradicts itself on files or tensors")
    if tree_digest(manifest.digests("after")) != manifest.scrubbed_sha256:
        raise _unusable(path, "the digest of the scrubbed checkpoint is not that of its files")
    return manifest


def _check_parts(path: Path, manifest: Manifest, parts: Mapping[str, TensorInfo]) -> None:
    wanted = {key for tensor in manifest.tensors for key in tensor.keys}
    if wanted != parts.keys():
        raise _unusable(path, "its tensors are not those that its manifest names")
    if any(part.dtype != "U8" or len(part.shape) != 1 for part in parts.values()):
        raise _unusable(path, "its tensors are not all rows of bytes")
