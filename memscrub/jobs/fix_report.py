"""The report on a directory that a fix wrote: measured as it lies on disk, against the input's tensors from disk.

Knows the written directory as a loaded model, not how the edit was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from memscrub.jobs.editing import EditMade
from memscrub.jobs.fix_journal import MadeAndWritten
from memscrub.jobs.ordinary_text import known_tokens
from memscrub.jobs.records import benign_record, locality_record, text_records
from memscrub.jobs.scanning import Inputs
from memscrub.journals.run_journal import AFTER, CONTROLS, TEXTS, RunJournal
from memscrub.locality.benign import compare_benign
from memscrub.locality.distance import RetainHalves, compare
from memscrub.measures.ceilings import with_ceilings
from memscrub.measures.measure import Progress, measure
from memscrub.models.architecture import Orientation
from memscrub.models.model import LoadedModel
from memscrub.models.originals import OriginalsOnDisk
from memscrub.models.tokens import TokenText
from memscrub.policy.document import Policy
from memscrub.reports.report import EditRecord, NeighbourRecord, Report, TensorRecord, TextRecord
from memscrub.reports.standing import Ordinary, broken_locality, judged
from memscrub.reports.summary import summarised
from memscrub.reports.verdict import decide
from memscrub.reports.waivers import waiver_records, with_excuses
from memscrub.storage.checkpoint import read_tensor
from memscrub.storage.writing import TensorChange, WrittenLedger


@dataclass(frozen=True)
class Untouched:
    """What the edit should leave alone: retain text, neighbours, and which tokens of those the original knows."""

    halves: RetainHalves
    neighbours: list[TokenText]
    known: list[list[bool]]


def report_on_written(
    inputs: Inputs,
    before: Report,
    found: MadeAndWritten,
    untouched: Untouched,
    reloaded: LoadedModel,
    journal: RunJournal,
    progress: Progress,
) -> Report:
    """The report on the written directory: measured from disk, against the input's tensors from disk."""
    policy = with_ceilings(reloaded, inputs.policy, inputs.controls)
    known = journal.stage(TEXTS + AFTER)
    after = measure(reloaded, policy, inputs.texts, progress=progress, keep_continuations=False, remembered=known)
    records = text_records(policy, inputs.texts, [record.before for record in before.texts], after.measures)
    originals = _originals(inputs, found, lean=reloaded.lean is not None)
    ordinary = _ordinary(inputs, originals, untouched, reloaded, progress)
    report = replace(
        before,
        texts=with_excuses(records, inputs.allowances),
        locality=ordinary.locality,
        neighbours=ordinary.neighbours,
        benign=ordinary.benign,
        edit=_edit_record(inputs, found.made, found.ledger, untouched.halves),
        verdict=decide(
            judged(records),
            broken_locality(ordinary),
            fixing=True,
            no_room=found.made.no_room,
            allowances=inputs.allowances,
        ),
        waivers=waiver_records(inputs.allowances, judged(records)),
        controls=_controls_after(inputs, policy, before, reloaded, journal),
    )
    return summarised(report)


def _ordinary(
    inputs: Inputs,
    originals: Mapping[str, Tensor],
    untouched: Untouched,
    reloaded: LoadedModel,
    progress: Progress,
) -> Ordinary:
    """What the edit did to ordinary text, with the policy's limits."""
    limits, judge = inputs.policy.locality, untouched.halves.judge
    benign = compare_benign(
        reloaded,
        originals,
        judge,
        batch_tokens=inputs.policy.probe.batch_tokens,
        progress=lambda done, total: progress("benign prompts", done, total),
    )
    return Ordinary(
        locality_record(compare(reloaded, originals, judge), limits),
        _still_known(reloaded, untouched, limits.min_neighbours_kept),
        benign_record(benign, limits),
    )


def _controls_after(
    inputs: Inputs, policy: Policy, before: Report, reloaded: LoadedModel, journal: RunJournal
) -> tuple[TextRecord, ...]:
    if not inputs.controls:
        return ()
    known = journal.stage(CONTROLS + AFTER)
    after = measure(reloaded, policy, inputs.controls, keep_continuations=False, remembered=known)
    return text_records(policy, inputs.controls, [r.before for r in before.controls], after.measures)


def _originals(inputs: Inputs, found: MadeAndWritten, *, lean: bool) -> Mapping[str, Tensor]:
    """The input's values of every site whose tensor was written, from disk; with `lean` only when looked at."""
    written = {change.name for change in found.ledger.changes}
    places = {site.tensor: found.made.places[site.tensor] for site in found.made.sites}
    places = {name: place for name, place in places.items() if place.tensor in written}
    if lean:
        return OriginalsOnDisk(inputs.ckpt, places)
    stored = {name: read_tensor(inputs.ckpt, name) for name in written}
    return {name: place.of(stored[place.tensor]) for name, place in places.items()}


def _edit_record(inputs: Inputs, edit: EditMade, ledger: WrittenLedger, halves: RetainHalves) -> EditRecord:
    rows = {edit.places[site.tensor].tensor: site.orientation for site in edit.sites}
    return EditRecord(
        mode=inputs.policy.fix.mode,
        solver=inputs.policy.fix.solver,
        sites=inputs.policy.fix.sites,
        stages=edit.stages,
        break_points=edit.outcome.break_points,
        active_constraints=edit.outcome.active,
        rounds=edit.rounds,
        predicted_kl=edit.outcome.cost,
        statistics_tokens=halves.solver.numel() + halves.statistics.numel(),
        retain_blocks_dropped=halves.dropped,
        tensors=tuple(
            TensorRecord(
                name=change.name,
                shard=change.shard,
                vectors_changed=_vectors(change, rows[change.name]),
                elements_changed=change.elements_changed,
                sha256_before=change.sha256_before,
                sha256_after=change.sha256_after,
                orientation=rows[change.name].value,
                rows=change.rows,
                columns=change.columns,
            )
            for change in ledger.changes
        ),
        left_out=ledger.left_out,
        experts=edit.experts,
    )


def _vectors(change: TensorChange, orientation: Orientation) -> int:
    """How many output vectors of a tensor differ."""
    return change.columns_changed if orientation is Orientation.COLUMNS else change.rows_changed


def _still_known(reloaded: LoadedModel, untouched: Untouched, limit: float | None) -> NeighbourRecord | None:
    if not untouched.neighbours:
        return None
    now = known_tokens(reloaded, untouched.neighbours)
    pairs = [(a, b) for was, here in zip(untouched.known, now, strict=True) for a, b in zip(was, here, strict=True)]
    return NeighbourRecord(len(now), sum(a for a, _ in pairs), sum(a and b for a, b in pairs), limit)
