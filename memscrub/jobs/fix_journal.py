"""What a fix goes on from: the directory that it wrote, or one that has its name already; measures and edits nothing.

A written directory counts only when every file is, to the byte, what the journal says; what a report says of its edit
is kept with it. A patch that lies at its place counts as this run's when it leads to that directory.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from memscrub.edit.statistics_file import rows_digest
from memscrub.errors import IncompleteError, UsageError
from memscrub.jobs.editing import EditMade
from memscrub.jobs.scanning import Inputs, run_key
from memscrub.journals.run_journal import RunJournal, Written, journal_file
from memscrub.locality.distance import RetainHalves
from memscrub.models.tokens import TokenText
from memscrub.reports.report import REPORT_NAME, Report, load_report
from memscrub.storage.checkpoint import digest_files
from memscrub.storage.files import digest_names, sha256_file, tree_digest
from memscrub.storage.partial import PartialDirectory, disk_errors
from memscrub.storage.patch import open_patch
from memscrub.storage.writing import WrittenLedger


@dataclass(frozen=True)
class MadeAndWritten:
    """An edit that lies on disk, as a report needs it."""

    made: EditMade
    ledger: WrittenLedger


_VALUES = TypeAdapter(MadeAndWritten)


def open_fix_journal(out: Path, inputs: Inputs, halves: RetainHalves, neighbours: Sequence[TokenText]) -> RunJournal:
    """The journal of a fix that is to write `out`, not yet entered. Raises as `RunJournal` does."""
    files = digest_files(inputs.ckpt) if inputs.files is None else inputs.files
    key, hidden = run_key(inputs, files)
    key["retain text"] = rows_digest([halves.solver, halves.judge, halves.statistics])
    key["neighbours"] = rows_digest([torch.tensor(text.tokens) for text in neighbours])
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    return RunJournal(journal_file(out), "fix", key, hidden, inputs=files)


def note_written(journal: RunJournal, partial: PartialDirectory, found: MadeAndWritten) -> None:
    """Write down that the directory lies on disk; from here on it stays when the run is interrupted."""
    partial.sync()
    files = digest_names(partial.path, [*found.ledger.copied, *found.ledger.rewritten])
    journal.wrote(Written(files, _VALUES.dump_python(found, mode="json")))
    partial.keep = True


def kept_files(journal: RunJournal, path: Path) -> Collection[str]:
    """Names of the files of an interrupted run's directory, if all are as they were written; else none."""
    if journal.written is not None and (_read(journal.written) is None or not _intact(path, journal.written.files)):
        journal.forget_written()
    return () if journal.written is None else tuple(journal.written.files)


def found_written(journal: RunJournal) -> MadeAndWritten | None:
    """What an interrupted run made and wrote, after `kept_files` found it intact."""
    return None if journal.written is None else _read(journal.written)


def announce(journal: RunJournal, path: Path, asked: Mapping[str, Any], patch: Path | None) -> None:
    """Write down that the directory is about to get its name, and what else lies in it now."""
    assert journal.written is not None
    files = {name: digest for name, digest in digest_files(path).items() if name not in journal.written.files}
    journal.announce({"asked": asked, "files": files, "patch": None if patch is None else sha256_file(patch)})


def ended_before(journal: RunJournal, out: Path, asked: Mapping[str, Any], patch: Path | None) -> Report | None:
    """The report of an interrupted run that had given `out` its name, when it was asked for the same; else None."""
    if journal.commits is None or journal.written is None or journal.commits.get("asked") != asked:
        return None
    files = {**journal.written.files, **journal.commits["files"]}
    if not out.is_dir() or not _intact(out, files) or set(digest_files(out)) != set(files):
        return None
    if patch is not None and not (patch.is_file() and sha256_file(patch) == journal.commits["patch"]):
        return None
    return load_report(out / REPORT_NAME)


def is_own_patch(journal: RunJournal, patch: Path) -> bool:
    """Is the file at `patch` what the interrupted run wrote there: the patch from its input to what it wrote?"""
    if journal.written is None or patch.is_symlink() or not patch.is_file():
        return False
    try:
        manifest = open_patch(patch).manifest
    except (UsageError, IncompleteError):
        return False
    ends = tree_digest(journal.inputs), tree_digest(journal.written.files)
    return (manifest.base_sha256, manifest.scrubbed_sha256) == ends


def _read(written: Written) -> MadeAndWritten | None:
    try:
        return _VALUES.validate_python(written.made)
    except ValidationError:
        return None


def _intact(path: Path, files: Mapping[str, str]) -> bool:
    real = os.path.realpath(path)
    plain = all((path / name).is_file() and os.path.realpath(path / name) == f"{real}/{name}" for name in files)
    return plain and digest_names(path, files) == dict(files)
