"""The fix: scan, edit, write, re-measure the written bytes, sign, and only then give the directory its name.

What a report says of the output was measured on the directory as it lies on disk, reloaded. A fix that does not
reach the policy leaves nothing behind unless asked to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memscrub.edit.edit_map import with_edit_map
from memscrub.edit.statistics_file import check_place
from memscrub.jobs.editing import EditMade, check_sites, check_statistics, make_edit
from memscrub.jobs.fix_journal import (
    MadeAndWritten,
    announce,
    ended_before,
    found_written,
    is_own_patch,
    kept_files,
    note_written,
    open_fix_journal,
)
from memscrub.jobs.fix_report import Untouched, report_on_written
from memscrub.jobs.ordinary_text import known_tokens, neighbour_texts, retain_halves
from memscrub.jobs.records import check_room, checkpoint_record, utility_record
from memscrub.jobs.scanning import Inputs, Remark, open_inputs, scan_inputs, unsaid
from memscrub.journals.run_journal import RunJournal
from memscrub.locality.distance import RetainHalves
from memscrub.locality.utility import Score, check_tasks, run_tasks, tool_version
from memscrub.measures.measure import Progress, silent
from memscrub.models.model import LoadedModel, load_model
from memscrub.models.spreading import refuse_spread
from memscrub.models.tokens import TokenText
from memscrub.policy.document import Policy, load_policy
from memscrub.proof.attest import Signing as Signing
from memscrub.proof.attest import sign_fix, signer_for
from memscrub.proof.signing import Signer
from memscrub.reports.report import REPORT_NAME, Report
from memscrub.reports.verdict import Outcome
from memscrub.storage.checkpoint import digest_files, open_checkpoint
from memscrub.storage.files import sha256_file
from memscrub.storage.patch_files import check_patch_place, write_patch
from memscrub.storage.writing import PartialDirectory, write_checkpoint


@dataclass(frozen=True)
class Fixed:
    """A finished fix: its report, and the written directory (None when it was withheld)."""

    report: Report
    directory: Path | None
    signed: bool


def fix(
    checkpoint: str | Path,
    policy: str | Path | Policy,
    out: str | Path,
    *,
    sign: Signing | None = None,
    overwrite: bool = False,
    keep_partial: bool = False,
    patch: Path | None = None,
    statistics: Path | None = None,
    utility: Sequence[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
    remark: Remark = unsaid,
) -> Fixed:
    """Write a copy of `checkpoint` to `out` that keeps the policy's texts, or report why that is out of reach.

    `checkpoint` is only read. With `keep_partial` a directory that misses the policy is written all the same; its
    report says so and its signature, if any, states a failed test. Where no text of the list can be judged, nothing
    is edited or written, whatever is asked for, and the report is the scan's. `patch` is a file for the edit by itself,
    written with the directory or not at all; it undoes the edit, so it may not lie in either directory.
    `statistics` is a file that keeps the retain statistics for the next run. `utility` names tasks of lm-eval to
    run before and after, instead of the policy's.

    `OUT.journal` keeps how far a run has got: an interrupted one is gone on from, as `remark` is told.
    Raises UsageError (and its kinds) before anything is written, IncompleteError when the run cannot end; neither
    leaves anything at `out`.
    """
    refuse_spread(device)
    rules = policy if isinstance(policy, Policy) else load_policy(policy)
    tasks = _tasks(rules, utility)
    _check_places(statistics, patch, [Path(checkpoint), Path(out)], overwrite)
    signer = signer_for(rules, sign)
    inputs, halves = _opened(checkpoint, rules, statistics, device, seed)
    neighbours = neighbour_texts(inputs)
    source = inputs.ckpt.path
    partial = PartialDirectory(out, overwrite=overwrite, inputs=[source], resume=lambda at: kept_files(journal, at))
    asked = {"signer": repr(signer), "patch": str(patch), "utility": tasks}
    with open_fix_journal(partial.target, inputs, halves, neighbours) as journal:
        if journal.said is not None:
            remark(journal.said)
        overwrite = _may_replace(patch, journal, [source, partial.target], overwrite)
        if (ended := ended_before(journal, partial.target, asked, patch)) is not None:
            with PartialDirectory(out, overwrite=True):  # clears away what the interrupted run had no time to
                return Fixed(ended, partial.target, signed=signer is not None)
        with partial:
            run = _Run(inputs, halves, journal, partial, device, progress)
            before = scan_inputs(run.inputs, progress=progress, kind="fix", journal=journal)
            if before.verdict.outcome is Outcome.INCONCLUSIVE:  # nothing to edit, nor to see afterwards if it worked
                return Fixed(before, None, signed=False)
            scores = run.scores(source, tasks)
            found, report = run.edit_and_measure(before, str(out), list(neighbours), statistics)
            if report.verdict.outcome is not Outcome.PASS and not keep_partial:
                return Fixed(report, None, signed=False)
            if tasks:
                after = run.scores(partial.path, tasks)
                report = replace(report, utility=utility_record(tool_version(), scores, after))
            report = _finish(run, found.made, report, signer, asked, patch, overwrite)
            return Fixed(report, partial.target, signed=signer is not None)


def _opened(
    checkpoint: str | Path, policy: Policy, statistics: Path | None, device: str, seed: int
) -> tuple[Inputs, RetainHalves]:
    """The inputs with their digests, and the retain text; what the edit would refuse is refused here."""
    lean = False if policy.fix.solver == "per-text" else None  # that solver looks at single vectors in float32
    inputs = open_inputs(checkpoint, policy, device=device, dtype="float32", seed=seed, lean=lean)
    check_sites(inputs)
    check_room(policy, inputs.texts, inputs.controls, edited=True)
    halves = retain_halves(inputs)
    inputs = replace(inputs, files=digest_files(inputs.ckpt))
    if statistics is not None:
        check_statistics(inputs, halves, statistics)
    return inputs, halves


def _finish(
    run: _Run,
    made: EditMade,
    report: Report,
    signer: Signer | None,
    asked: Mapping[str, Any],
    patch: Path | None,
    overwrite: bool,
) -> Report:
    """Patch, report, signature and name of a written directory; a patch without its directory is taken back."""
    with contextlib.ExitStack() as undo:
        if patch is not None:  # before the report, which names its digest, and the signature over that
            report = _write_patch(run.inputs, made, report, run.partial.path, patch, overwrite=overwrite)
            undo.callback(patch.unlink, missing_ok=True)
        run.commit(report, signer, asked, patch)
        undo.pop_all()
    return report


def _check_places(statistics: Path | None, patch: Path | None, outside: list[Path], overwrite: bool) -> None:
    """Refuse files that could not be written, before a model is loaded."""
    if statistics is not None:
        check_place(statistics, outside=outside)
    if patch is not None:
        # One that an interrupted run left there is told from any other when its journal was read.
        left = os.path.lexists(f"{outside[-1]}.journal")
        check_patch_place(patch, outside=outside, overwrite=overwrite or left)


def _may_replace(patch: Path | None, journal: RunJournal, outside: list[Path], overwrite: bool) -> bool:
    """Whether files may be replaced: when told, and the patch that this run wrote before it was interrupted."""
    if patch is not None:
        overwrite = overwrite or is_own_patch(journal, patch)
        check_patch_place(patch, outside=outside, overwrite=overwrite)
    return overwrite


@dataclass(frozen=True)
class _Run:
    """What every step of a fix needs."""

    inputs: Inputs
    halves: RetainHalves
    journal: RunJournal
    partial: PartialDirectory
    device: str
    progress: Progress

    def edit_and_measure(
        self, before: Report, out: str, neighbours: list[TokenText], statistics: Path | None
    ) -> tuple[MadeAndWritten, Report]:
        """Edit and write, or take what an interrupted run wrote; then measure the written directory."""
        inputs, path = self.inputs, self.partial.path
        untouched = Untouched(self.halves, neighbours, known_tokens(inputs.loaded, neighbours))
        found = found_written(self.journal)
        self.partial.keep = found is not None
        if found is None:
            edit = make_edit(inputs, self.halves, progress=self.progress, statistics=statistics, scratch=path)
            found = MadeAndWritten(edit.made, write_checkpoint(inputs.ckpt, path, edit.tensors()))
            note_written(self.journal, self.partial, found)
            del edit  # and the originals that it holds
        reloaded = _reload(path, inputs, device=self.device)
        report = report_on_written(inputs, before, found, untouched, reloaded, self.journal, self.progress)
        files = None if self.journal.written is None else self.journal.written.files
        report = replace(report, output=checkpoint_record(out, open_checkpoint(path), files))
        return found, with_edit_map(report, inputs.ckpt, open_checkpoint(path))

    def commit(self, report: Report, signer: Signer | None, asked: Mapping[str, Any], patch: Path | None) -> None:
        """Put the report into the directory, sign it and give it its name; `asked` is what else was asked for."""
        path = self.partial.path
        (path / REPORT_NAME).write_text(report.to_json(), encoding="utf-8")
        if signer is not None:
            sign_fix(path, report, self.inputs.policy, signer)
        announce(self.journal, path, asked, patch)
        self.partial.commit()

    def scores(self, path: Path, tasks: Sequence[str]) -> tuple[Score, ...]:
        """Every figure of the utility tasks on a directory."""
        if not tasks:
            return ()
        self.progress("utility tasks", 0, 1)
        found = run_tasks(path, tasks, device=str(self.inputs.loaded.device), seed=self.inputs.seed)
        self.progress("utility tasks", 1, 1)
        return found


def _write_patch(
    inputs: Inputs, edit: EditMade, report: Report, scrubbed: Path, path: Path, *, overwrite: bool
) -> Report:
    """Write the edit by itself, as a patch between the input and what was written; the report that names it."""
    write_patch(
        inputs.ckpt,
        open_checkpoint(scrubbed),
        path,
        base_files=report.input.files,
        scrubbed_files=None if report.output is None else report.output.files,
        orientations={edit.places[site.tensor].tensor: site.orientation.value for site in edit.sites},
        policy_sha256=inputs.policy.digest,
        overwrite=overwrite,
    )
    assert report.edit is not None
    return replace(report, edit=replace(report.edit, patch_sha256=sha256_file(path)))


def _tasks(policy: Policy, utility: Sequence[str] | None) -> list[str]:
    """The utility tasks of this run, the caller's before the policy's; those that cannot run are refused now."""
    stated = [str(policy.resolve(task)) if task.endswith(".yaml") else task for task in policy.locality.utility]
    tasks = stated if utility is None else list(utility)
    if tasks:
        check_tasks(tasks)
    return tasks


def _reload(path: Path, inputs: Inputs, *, device: str) -> LoadedModel:
    """Free the edited model and load what lies on disk: from here on only written bytes are measured."""
    inputs.loaded.model.to("meta")
    return load_model(open_checkpoint(path), device=device, dtype="float32")
