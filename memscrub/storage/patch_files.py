"""Make a patch from two checkpoint directories, apply it, revert it; knows bytes and digests, no model and no policy.

    write_patch(open_checkpoint("model"), open_checkpoint("scrubbed"), Path("memscrub-patch.safetensors"))
    apply_patch(open_checkpoint("model"), open_patch("memscrub-patch.safetensors"), "scrubbed-again")
    revert_patch(open_checkpoint("scrubbed"), open_patch("memscrub-patch.safetensors"), "model-again")

Both inputs are only read. An output exists when every file in it was read back and found to have its digest.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from memscrub.errors import CheckpointError, IncompleteError, OutputError, SignatureInvalidError, UsageError
from memscrub.storage.checkpoint import Checkpoint, TensorInfo, digest_files, tree_digest
from memscrub.storage.files import read_range
from memscrub.storage.output_file import lies_in
from memscrub.storage.partial import PartialDirectory, disk_errors, refuse_overlap
from memscrub.storage.patch import Manifest, PatchedTensor, PatchFile, Rewritten, header_bytes, save_patch
from memscrub.storage.patch_delta import Axis, difference
from memscrub.storage.writing import is_kept, write_checkpoint

Side = Literal["before", "after"]


@dataclass(frozen=True)
class PatchSummary:
    """What a patch holds; `path` is None where none was written.

    `size` is the patch in bytes, `shard_bytes` the shards it leads between. `added` are files that only the edited
    checkpoint has (its report, signatures, model card), which the patch does not carry.
    """

    path: Path | None
    size: int
    shard_bytes: int
    manifest: Manifest
    added: tuple[str, ...]


@dataclass(frozen=True)
class Restored:
    """A directory that a patch led to: its digest over all files, and what it lacks.

    `not_carried` are files of the input that were not copied. `missing` are files of the original that a revert
    cannot give back, because the edited checkpoint lacks them; with none, `sha256` is the original's.
    """

    directory: Path
    sha256: str
    tensors: int
    not_carried: tuple[str, ...]
    missing: tuple[str, ...]


def write_patch(
    base: Checkpoint,
    scrubbed: Checkpoint,
    path: Path | None,
    *,
    base_files: Mapping[str, str] | None = None,
    scrubbed_files: Mapping[str, str] | None = None,
    orientations: Mapping[str, Axis] | None = None,
    policy_sha256: str | None = None,
    overwrite: bool = False,
) -> PatchSummary:
    """Write the patch that leads from `base` to `scrubbed` and back; with `path` None only say what it would hold.

    `base_files` and `scrubbed_files` are the SHA-256 of all their files, where they are known already: then only
    shards that differ are read, one tensor at a time. `orientations` says of each stored tensor whether its output
    vectors are rows or columns. The same two checkpoints give the same bytes.

    Raises:
        CheckpointError: the two differ in what a patch does not carry: names, dtypes, shapes, layout, other files.
        OutputError: `path` exists, or lies in one of the directories, or is not writable.
        IncompleteError: the disk is full, or a file changed meanwhile.
    """
    if path is not None:
        check_patch_place(path, outside=[base.path, scrubbed.path], overwrite=overwrite)
    before = digest_files(base) if base_files is None else dict(base_files)
    after = digest_files(scrubbed) if scrubbed_files is None else dict(scrubbed_files)
    _check_same_tensors(base, scrubbed)
    shards = {n: Rewritten(before=before[n], after=after[n]) for n in base.shards if before[n] != after[n]}
    same, left_out, added = _compare_other_files(base, scrubbed, before, after)
    for shard in shards:
        _check_same_header(base, scrubbed, shard)

    def write(payload: BinaryIO | None) -> tuple[Manifest, bytes, int]:
        tensors, sizes = _write_payload(base, scrubbed, shards, orientations or {}, payload)
        manifest = Manifest(
            base_sha256=tree_digest(before),
            scrubbed_sha256=tree_digest({**same, **{name: shard.after for name, shard in shards.items()}}),
            policy_sha256=policy_sha256,
            files=same,
            shards=shards,
            left_out=left_out,
            tensors=tensors,
        )
        return manifest, header_bytes(manifest.model_dump_json(), sizes), sum(sizes.values())

    if path is None:
        manifest, header, size = write(None)
    else:
        # The payload waits in a nameless file: the header before it states all sizes.
        with disk_errors(path), tempfile.TemporaryFile(dir=path.parent) as payload:
            manifest, header, size = write(payload)
            payload.seek(0)
            save_patch(path, header, payload)
    shard_bytes = sum((base.path / name).stat().st_size for name in shards)
    return PatchSummary(path, len(header) + size, shard_bytes, manifest, added)


def apply_patch(base: Checkpoint, patch: PatchFile, out: str | Path, *, overwrite: bool = False) -> Restored:
    """Write the scrubbed checkpoint that `patch` leads to from `base`, to the new directory `out`.

    Raises:
        UsageError: `base` is not the checkpoint that the patch was made from, or the patch is inconsistent.
        SignatureInvalidError: what comes out has not the digest that the patch states.
        OutputError, IncompleteError: as `writing.write_checkpoint`. Nothing is left at `out` in any of these cases.
    """
    if (problem := mismatch(base, patch, "before")) is not None:
        raise UsageError(
            f"{patch.path} was made from another checkpoint than {base.path}: {problem}; give --policy POLICY to"
            " locate, solve and measure anew on this one."
        )
    return _change_all(base, patch, out, "before", overwrite)


def revert_patch(scrubbed: Checkpoint, patch: PatchFile, out: str | Path, *, overwrite: bool = False) -> Restored:
    """Write the original checkpoint that `patch` was made from, given what it led to, to the new directory `out`.

    Raises: as `apply_patch`.
    """
    if (problem := mismatch(scrubbed, patch, "after")) is not None:
        raise UsageError(
            f"{patch.path} does not lead to {scrubbed.path}: {problem}; name the directory it was made for."
        )
    return _change_all(scrubbed, patch, out, "after", overwrite)


def mismatch(ckpt: Checkpoint, patch: PatchFile, side: Side) -> str | None:
    """Why `ckpt` is not the checkpoint on that side of the patch, naming the first file that differs; None if it is."""
    wanted = patch.manifest.digests(side)
    if missing := sorted(wanted.keys() - set(ckpt.files)):
        return f"{missing[0]!r} is missing"
    found = digest_files(ckpt)
    if other := [name for name in sorted(wanted) if found[name] != wanted[name]]:
        # Weights first: they say more than a file beside them.
        return f"{min(other, key=lambda name: name not in ckpt.shards)} has another digest"
    if side == "before":
        known = {*wanted, *patch.manifest.left_out}
        if extra := [name for name in ckpt.files if is_kept(name, ckpt) and name not in known]:
            return f"{extra[0]} was not there"
    return None


def check_tensors(ckpt: Checkpoint, patch: PatchFile) -> None:
    """Raise UsageError unless `ckpt` has every tensor that the patch names, in its shape: a model of the same form."""
    for tensor in patch.manifest.tensors:
        info = ckpt.tensors.get(tensor.name)
        if info is None or info.shape != tensor.shape:
            how = "has no" if info is None else "has another shape of"
            raise UsageError(f"{patch.path} is for another model: {ckpt.path} {how} tensor {tensor.name!r}.")


def check_patch_place(path: Path, *, outside: list[Path], overwrite: bool = False) -> None:
    """Refuse a place where a patch could not be written, or must not lie; nothing is written.

    A patch gives back what the edit took out: in the directory that is released it would undo the release.

    Raises:
        OutputError: `path` exists (without `overwrite`), is in one of these directories, or has no folder.
    """
    for directory in outside:
        if lies_in(path, directory):
            raise OutputError(
                f"{path} lies in {directory}, and a patch gives the unedited weights back; keep it apart."
            )
        refuse_overlap(path, directory)
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path} cannot be a patch; name a file in a folder that exists.")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists already; choose another name, or replace it with --overwrite.")


def _check_same_tensors(base: Checkpoint, scrubbed: Checkpoint) -> None:
    for name in sorted(base.tensors.keys() ^ scrubbed.tensors.keys()):
        holder = base if name in base.tensors else scrubbed
        raise CheckpointError(f"Tensor {name!r} is only in {holder.path}; a patch leads between equal sets of tensors.")
    pairs = [(name, one, scrubbed.tensors[name]) for name, one in base.tensors.items()]
    for name, one, other in pairs:
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            raise CheckpointError(f"Tensor {name!r} differs in dtype or shape; a patch carries changed values only.")
    for name, one, other in pairs:
        if (one.shard, one.begin) != (other.shard, other.begin):
            raise CheckpointError(
                f"Tensor {name!r} is not at the same place of the same file in both; a patch leads between files of"
                " one layout, as `memscrub fix` writes them."
            )


def _check_same_header(base: Checkpoint, scrubbed: Checkpoint, shard: str) -> None:
    # Equal places of all tensors do not make the metadata equal, which a patch does not carry either.
    start = min((info.begin for info in base.tensors.values() if info.shard == shard), default=0)
    if read_range(base.path / shard, 0, start) != read_range(scrubbed.path / shard, 0, start):
        raise CheckpointError(
            f"{shard} has other metadata in the two directories; a patch carries changed values only."
        )


def _compare_other_files(
    base: Checkpoint, scrubbed: Checkpoint, before: Mapping[str, str], after: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """The files that are the same in both, those of the base that are not, and those that were added.

    Reports, signatures and Markdown (the model card) may differ; anything else may change what the model says.
    """
    same: dict[str, str] = {}
    left_out: list[str] = []
    added: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        if name in base.shards and before[name] != after[name]:
            continue
        if before.get(name) == after.get(name) and is_kept(name, base):
            same[name] = before[name]
            continue
        holders = [ckpt for ckpt, files in ((base, before), (scrubbed, after)) if name in files]
        if is_kept(name, holders[0]) and not name.lower().endswith(".md"):
            how = "differs between the two directories" if len(holders) == 2 else f"is only in {holders[0].path}"
            raise CheckpointError(f"{name} {how}, and a patch carries tensors only; make the two agree on it.")
        if base in holders:
            left_out.append(name)
        if scrubbed in holders:
            added.append(name)
    return same, tuple(left_out), tuple(added)


def _write_payload(
    base: Checkpoint,
    scrubbed: Checkpoint,
    shards: Mapping[str, Rewritten],
    orientations: Mapping[str, Axis],
    payload: BinaryIO | None,
) -> tuple[tuple[PatchedTensor, ...], dict[str, int]]:
    """Write the parts of every tensor that differs, one tensor at a time, and say what and how large they are."""
    tensors: list[PatchedTensor] = []
    sizes: dict[str, int] = {}
    for name, info in sorted(base.tensors.items()):
        if info.shard not in shards:
            continue
        old, new = _read(base, info), _read(scrubbed, info)
        if old == new:
            continue
        digests = hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest()
        delta = difference(old, new, info)
        tensor = PatchedTensor(
            name=name,
            shard=info.shard,
            dtype=info.dtype,
            shape=info.shape,
            orientation=orientations.get(name) if len(info.shape) > 1 else None,
            layout=delta.layout,
            axis=delta.axis,
            elements_changed=delta.elements_changed,
            rows_changed=delta.rows_changed,
            columns_changed=delta.columns_changed,
            sha256_before=digests[0],
            sha256_after=digests[1],
        )
        for key, part in zip(tensor.keys, delta.parts, strict=True):
            if payload is not None:
                payload.write(part.numpy().data)
            sizes[key] = len(part)
        tensors.append(tensor)
    if {tensor.shard for tensor in tensors} != shards.keys():
        raise IncompleteError("A shard changed while it was compared; run again.")
    return tuple(tensors), sizes


def _change_all(ckpt: Checkpoint, patch: PatchFile, out: str | Path, side: Side, overwrite: bool) -> Restored:
    """Copy `ckpt`, which is on that side of the patch, and turn every tensor in the copy into the other side's."""
    manifest = patch.manifest
    wanted = manifest.digests("after" if side == "before" else "before")
    with PartialDirectory(out, overwrite=overwrite, inputs=[ckpt.path, patch.path]) as partial:
        ledger = write_checkpoint(ckpt, partial.path, {})
        # What the edited checkpoint has beyond the original is no part of the original.
        unwanted = [name for name in ledger.copied if side == "after" and name not in wanted]
        with disk_errors(partial.path):
            for name in unwanted:
                (partial.path / name).unlink()
            for tensor in manifest.tensors:
                _change(ckpt, patch, tensor, partial.path, side)
        found = digest_files(partial.path)
        for name, digest in wanted.items():
            if found.get(name) != digest:
                raise _contradiction(patch, f"{name} as written has another digest than the patch states")
        directory = partial.commit()
    left = tuple(sorted({*ledger.left_out, *unwanted}))
    missing = tuple(name for name in manifest.left_out if name not in found) if side == "after" else ()
    return Restored(directory, tree_digest(found), len(manifest.tensors), left, missing)


def _change(ckpt: Checkpoint, patch: PatchFile, tensor: PatchedTensor, out: Path, side: Side) -> None:
    """Overwrite one tensor's bytes in the copied shard; both versions must have the digests that the patch states."""
    info = ckpt.tensors.get(tensor.name)
    if info is None or (info.shard, info.dtype, info.shape) != (tensor.shard, tensor.dtype, tensor.shape):
        raise _contradiction(patch, f"tensor {tensor.name!r} is not what the patch says")
    stated = (tensor.sha256_before, tensor.sha256_after)
    data = _read(ckpt, info)
    one = hashlib.sha256(data).hexdigest()
    patch.change(tensor, data, info)
    digests = (one, hashlib.sha256(data).hexdigest())
    if digests != (stated if side == "before" else stated[::-1]):
        raise _contradiction(patch, f"{tensor.name!r} does not become what the patch says")
    with (out / info.shard).open("r+b") as file:
        file.seek(info.begin)
        file.write(data)


def _read(ckpt: Checkpoint, info: TensorInfo) -> bytearray:
    return read_range(ckpt.path / info.shard, info.begin, info.end)


def _contradiction(patch: PatchFile, why: str) -> SignatureInvalidError:
    return SignatureInvalidError(f"{patch.path} does not keep its word: {why}; fetch or make the patch again.")
