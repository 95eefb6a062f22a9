"""Holds what a report says of an edit against the two checkpoints; knows no signature, no model and no policy.

    check_edit("scrubbed", "model")      # raises where the difference is not exactly what the report states

The report of a fix is a ledger: which base, which tensors, which of their rows and columns, how many elements, digests
before and after. Whoever has the base can check it to the last byte. Files are read in small pieces.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from memscrub.errors import CheckpointError, SignatureInvalidError, UsageError
from memscrub.proof.statements import SIGNATURE, UNSIGNED_FILES
from memscrub.reports.report import REPORT_NAME, EditRecord, Report, TensorRecord, load_report
from memscrub.storage.checkpoint import Checkpoint, TensorInfo, digest_files, open_checkpoint
from memscrub.storage.files import cache_link_roots, digest_names, list_files, read_range, tree_digest
from memscrub.storage.vector_changes import Changes, changes
from memscrub.storage.writing import reader, tensor_digest

Digests = Mapping[str, str]


@dataclass(frozen=True)
class CheckedEdit:
    """An edit that is exactly what its report says: the base's digest over all files, and how much differs."""

    base_sha256: str
    tensors: int
    vectors: int
    elements: int


def check_edit(directory: str | Path, base: str | Path, *, files: Digests | None = None) -> CheckedEdit:
    """Check that `directory` is `base` with the edit that its report states, and nothing else.

    `files` are the SHA-256 of the directory's files where they are known already. This checks no signature.

    Raises:
        SignatureInvalidError: a file, tensor, row, column or count is not as stated; the message names it.
        UsageError: one of the two is no checkpoint, or the directory has no report of a fix.
        IncompleteError: a file cannot be read to its end.
    """
    root = Path(os.path.realpath(directory))
    report = _report(root)
    edit = report.edit
    if report.kind != "fix" or edit is None or report.output is None:
        raise UsageError(f"{REPORT_NAME} in {directory} is not that of a fix; only `memscrub fix` states an edit.")
    before, after = open_checkpoint(base), _opened(root)
    base_files = digest_files(before)
    _check_base(base, report, base_files)
    found = dict(_all_files(root) if files is None else files)
    _check_output(report.output.files, found)
    _check_files(before, after, edit, base_files, report.output.files)
    _check_tensor_sets(before, after)
    shards = {name for name in after.shards if base_files[name] != found[name]}
    for shard in sorted(shards):
        _check_header(before, after, shard)
    records = _records(edit)
    for name in sorted(records.keys() - after.tensors.keys()):
        raise SignatureInvalidError(f"The report states an edit of tensor {name!r}, which the directory does not hold.")
    checked = [
        _check_tensor(before, after, info, records.get(name), info.shard in shards)
        for name, info in sorted(after.tensors.items())
    ]
    elements = sum(each.elements for each in checked if each is not None)
    vectors = sum(record.vectors_changed for record in records.values())
    return CheckedEdit(tree_digest(base_files), len(records), vectors, elements)


def _report(root: Path) -> Report:
    if not (root / REPORT_NAME).is_file():
        raise UsageError(f"{root} holds no {REPORT_NAME}; without one there is no stated edit to check.")
    return load_report(root / REPORT_NAME)


def _all_files(root: Path) -> Digests:
    """SHA-256 of every file of the directory, also of those that are no part of a checkpoint: `.git`, `.cache`."""
    links = (root, *cache_link_roots(root))
    return digest_names(root, list_files(root, error=SignatureInvalidError, link_roots=links))


def _opened(root: Path) -> Checkpoint:
    try:
        return open_checkpoint(root)
    except CheckpointError as problem:
        raise SignatureInvalidError(f"The directory is no copy of its base: {problem}") from None


def _check_base(base: str | Path, report: Report, found: Digests) -> None:
    """The base must be the checkpoint that the report says was edited."""
    stated = report.input.files
    if tree_digest(stated) != report.input.sha256:
        raise SignatureInvalidError("The report contradicts itself: the base's digest is not that of its files.")
    for name in sorted(stated.keys() | found.keys(), key=lambda name: (not name.endswith(".safetensors"), name)):
        if stated.get(name) != found.get(name):  # weights first: they say more than a file beside them
            how = "is missing" if name not in found else "was not there" if name not in stated else "has another digest"
            raise SignatureInvalidError(f"{base} is not the checkpoint that was edited: {name} {how}.")


def _check_output(stated: Digests, found: Digests) -> None:
    """The directory must hold what the report measured, and beside it only what memscrub adds."""
    for name in sorted(stated.keys() | found.keys()):
        if stated.get(name) == found.get(name) or (name not in stated and _own(name)):
            continue
        how = "is missing" if name not in found else "was added" if name not in stated else "was changed"
        raise SignatureInvalidError(f"{name} {how} after the report was written.")


def _own(name: str) -> bool:
    return name in (REPORT_NAME, SIGNATURE, *UNSIGNED_FILES)


def _check_files(before: Checkpoint, after: Checkpoint, edit: EditRecord, old: Digests, new: Digests) -> None:
    """All but the weights is the base's, or stated as left out."""
    for name in sorted(new):
        if name in after.shards and name in before.shards:
            continue
        if name not in old:
            raise SignatureInvalidError(f"{name} is not in the base, and an edit adds no file.")
        if old[name] != new[name]:
            raise SignatureInvalidError(f"{name} differs from the base's, and an edit changes weights only.")
    for name in sorted(old.keys() - new.keys() - set(edit.left_out)):
        raise SignatureInvalidError(f"{name} of the base is missing, and the report does not say that it was left out.")
    for name in sorted(set(edit.left_out) & new.keys()):
        raise SignatureInvalidError(f"{name} is there, although the report says that it was left out.")


def _check_tensor_sets(before: Checkpoint, after: Checkpoint) -> None:
    for name in sorted(before.tensors.keys() ^ after.tensors.keys()):
        where = "base" if name in before.tensors else "directory"
        raise SignatureInvalidError(f"Tensor {name!r} is only in the {where}.")
    for name, new in sorted(after.tensors.items()):
        old = before.tensors[name]
        if (old.shard, old.dtype, old.shape, old.begin) != (new.shard, new.dtype, new.shape, new.begin):
            raise SignatureInvalidError(f"Tensor {name!r} has another dtype, shape or place than in the base.")


def _check_header(before: Checkpoint, after: Checkpoint, shard: str) -> None:
    start = min(info.begin for info in after.tensors.values() if info.shard == shard)
    if read_range(before.path / shard, 0, start) != read_range(after.path / shard, 0, start):
        raise SignatureInvalidError(f"The header of {shard} differs from the base's.")


def _records(edit: EditRecord) -> dict[str, TensorRecord]:
    records = {record.name: record for record in edit.tensors}
    if len(records) != len(edit.tensors):
        raise SignatureInvalidError("The report states two edits of one tensor.")
    return records


def _check_tensor(
    before: Checkpoint, after: Checkpoint, info: TensorInfo, record: TensorRecord | None, differs: bool
) -> Changes | None:
    """One tensor: untouched where the report names no edit of it, else changed exactly as stated."""
    was = before.tensors[info.name]
    digests = (tensor_digest(before, was), tensor_digest(after, info)) if differs else ("", "")
    if record is None:
        if digests[0] != digests[1]:
            raise SignatureInvalidError(f"Tensor {info.name!r} differs from the base's, and the report states no edit.")
        return None
    if digests[0] == digests[1]:
        raise SignatureInvalidError(f"Tensor {info.name!r} is the base's, although the report states an edit of it.")
    if (record.shard, record.sha256_before, record.sha256_after) != (info.shard, *digests):
        raise SignatureInvalidError(f"Tensor {info.name!r} has another digest than the report states.")
    size = info.end - info.begin
    found = changes(reader(before, was), reader(after, info), info.shape, info.element_bytes, size)
    if (fault := _fault(record, found)) is not None:
        raise SignatureInvalidError(f"Tensor {info.name!r} differs from the base's in other {fault} than stated.")
    return found


def _fault(record: TensorRecord, found: Changes) -> str | None:
    """What of the stated extent of an edit is not so."""
    if record.elements_changed != found.elements:
        return "elements"
    for axis, stated, actual in (("rows", record.rows, found.rows), ("columns", record.columns, found.columns)):
        if stated is not None and stated != actual:
            return axis
    counts = {"rows": found.rows_changed, "columns": found.columns_changed}
    # Reports of before the orientation was stated count one of the two.
    possible = counts.values() if record.orientation is None else [counts.get(record.orientation)]
    return None if record.vectors_changed in possible else "output vectors"
