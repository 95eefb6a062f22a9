"""The scan: what does a checkpoint give away of the policy's texts? Reads, measures, reports; changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from memscrub.jobs.foreign_lists import ForeignSource, class_for, read_foreign
from memscrub.jobs.records import (
    adapter_record,
    check_room,
    checkpoint_record,
    environment,
    policy_record,
    protected_record,
    text_records,
)
from memscrub.jobs.run_key import key_of, lists_key
from memscrub.journals.run_journal import CONTROLS, TEXTS, RunJournal
from memscrub.measures.ceilings import with_ceilings
from memscrub.measures.depths import measure_depths
from memscrub.measures.measure import Progress, measure, silent
from memscrub.models.merging import load_merged
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, tokenize
from memscrub.policy.document import Policy, load_policy
from memscrub.policy.sections import Also
from memscrub.reports.allowances import NOTHING, Allowances
from memscrub.reports.basis import basis_of
from memscrub.reports.records import BasisRecord, DepthsRecord
from memscrub.reports.report import SCHEMA, Report, TextRecord
from memscrub.reports.standing import judged, timestamp
from memscrub.reports.summary import summarised
from memscrub.reports.verdict import decide
from memscrub.reports.waivers import allowances_of, check_waivers, waiver_records, with_excuses
from memscrub.storage.adapters import Adapter, open_adapter
from memscrub.storage.checkpoint import Checkpoint, digest_files, open_checkpoint
from memscrub.texts.protected import ProtectedList, as_list, load_controls, load_protected

Remark = Callable[[str], None]


def unsaid(sentence: str) -> None:
    """The remarks of a caller who wants none."""


@dataclass(frozen=True)
class Inputs:
    """Everything a run starts from: the checkpoint, opened and loaded, and the policy with its texts."""

    source: str
    ckpt: Checkpoint
    policy: Policy
    protected: ProtectedList
    loaded: LoadedModel = field(repr=False)
    texts: tuple[TokenText, ...]
    controls: tuple[TokenText, ...]
    seed: int
    foreign: ForeignSource | None = None
    basis: BasisRecord | None = None
    allowances: Allowances = NOTHING
    files: Mapping[str, str] | None = None
    adapter: Adapter | None = None


def open_inputs(
    checkpoint: str | Path,
    policy: str | Path | Policy,
    *,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    foreign: ForeignSource | None = None,
    adapter: str | Path | None = None,
    remark: Remark = unsaid,
    lean: bool | None = None,
) -> Inputs:
    """Open and check everything a run needs before anything is measured. Raises UsageError and its kinds.

    `foreign` is a list in another format that takes the place of the policy's; `remark` is told how it was read.
    `adapter` is a LoRA adapter to add to the loaded model, which then is what `memscrub merge` would write. `lean`:
    as in `load_model`.
    """
    torch.manual_seed(seed)
    rules = policy if isinstance(policy, Policy) else load_policy(policy)
    if foreign is not None:
        class_for(rules, foreign.class_name)  # known before a model is loaded
    protected = load_protected(rules) if foreign is None else as_list(())
    controls = load_controls(rules)
    allowances = allowances_of(rules)
    if foreign is None:
        check_waivers(rules, protected)
    else:  # the policy's waivers are about texts of its own lists
        allowances = replace(allowances, waivers=(), expired=())
    added = None if adapter is None else open_adapter(adapter)
    ckpt = open_checkpoint(checkpoint)
    loaded = load_merged(ckpt, added, device=device, dtype=dtype, lean=lean, remark=remark)
    if foreign is not None:
        protected, remarks = read_foreign(loaded, rules, foreign)
        for sentence in remarks:
            remark(sentence)
    return Inputs(
        source=str(checkpoint),
        ckpt=ckpt,
        policy=rules,
        protected=protected,
        loaded=loaded,
        texts=tokenize(loaded, protected.texts),
        controls=tokenize(loaded, controls.texts),
        seed=seed,
        foreign=foreign,
        basis=basis_of(rules, protected, controls),
        allowances=allowances,
        adapter=added,
    )


def scan(
    checkpoint: str | Path,
    policy: str | Path | Policy,
    *,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    also: Sequence[Also] = (),
    foreign: ForeignSource | None = None,
    adapter: str | Path | None = None,
    journal: Path | None = None,
    deliver: Callable[[Report], None] = lambda report: None,
    progress: Progress = silent,
    remark: Remark = unsaid,
) -> Report:
    """Measure what `checkpoint` gives away of the texts that `policy` protects.

    `also` names measures beyond those the policy asks for; `foreign` is a list in another format, measured in place
    of the policy's own, and `remark` is told how it was read. `adapter` is a LoRA adapter of the checkpoint, added to
    it in memory. `journal` is a file that keeps what was measured; the same call goes on from there if it is
    interrupted. It is deleted when `deliver` has taken the report.

    `checkpoint` is a local directory, a Hugging Face cache snapshot or a hub id. The report's verdict carries
    the exit code. Raises UsageError (and its kinds) for unusable input, IncompleteError when the run cannot end.
    """
    inputs = open_inputs(
        checkpoint, policy, device=device, dtype=dtype, seed=seed, foreign=foreign, adapter=adapter, remark=remark
    )
    with _journal(inputs, journal) as known:
        if known is not None and known.said is not None:
            remark(known.said)
        inputs = inputs if known is None else replace(inputs, files=known.inputs)
        report = scan_inputs(inputs, progress=progress, also=also, journal=known)
        deliver(report)
    return report


def _journal(inputs: Inputs, path: Path | None) -> AbstractContextManager[RunJournal | None]:
    if path is None:
        return nullcontext()
    files = digest_files(inputs.ckpt)
    key, hidden = run_key(inputs, files)
    return RunJournal(path, "scan", key, hidden, inputs=files, option="--journal or --report")


def run_key(inputs: Inputs, files: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """All that determines what a run on these inputs measures: what may be known, and digests of the lists.

    `files` are the digests of the checkpoint's.
    """
    key = key_of(inputs.loaded, inputs.policy, files, inputs.seed)
    key["adapter"] = "" if inputs.adapter is None else adapter_record(inputs.adapter).sha256
    return key, lists_key(inputs.texts, inputs.controls)


def scan_inputs(
    inputs: Inputs,
    *,
    progress: Progress = silent,
    kind: str = "scan",
    also: Sequence[Also] = (),
    journal: RunJournal | None = None,
) -> Report:
    """`scan` on inputs that are open already. Raises UsageError for more texts than a report has room for."""
    check_room(inputs.policy, inputs.texts, inputs.controls, edited=kind == "fix")
    policy = with_ceilings(inputs.loaded, inputs.policy, inputs.controls)
    # An estimate may speed up a look around; what is released is decoded.
    screen = kind == "scan" and policy.probe.screen
    measured = measure(
        inputs.loaded,
        policy,
        inputs.texts,
        progress=progress,
        screen=screen,
        keep_continuations=False,
        remembered=None if journal is None else journal.stage(TEXTS),
    )
    records = text_records(policy, inputs.texts, measured.measures)
    report = Report(
        schema=SCHEMA,
        kind=kind,
        created=timestamp(),
        policy=policy_record(inputs.policy),
        protected=replace(protected_record(inputs.policy, inputs.protected), foreign=_named(inputs.foreign)),
        input=checkpoint_record(inputs.source, inputs.ckpt, inputs.files),
        output=None,
        environment=environment(inputs.loaded, inputs.seed),
        texts=with_excuses(records, inputs.allowances),
        controls=control_records(inputs, policy, journal),
        locality=None,
        neighbours=None,
        edit=None,
        verdict=decide(judged(records), allowances=inputs.allowances),
        basis=inputs.basis,
        waivers=waiver_records(inputs.allowances, judged(records)),
        adapter=None if inputs.adapter is None else adapter_record(inputs.adapter),
        depths=None if kind == "fix" else _depths(inputs, (*policy.probe.also, *also), progress),
    )
    return summarised(report)


def _named(foreign: ForeignSource | None) -> str | None:
    return None if foreign is None else f"{foreign.format}: {foreign.path}"


def _depths(inputs: Inputs, also: Sequence[Also], progress: Progress) -> DepthsRecord | None:
    """The measures named in `also`; what a fix finds before its edit is not what they are asked of."""
    return measure_depths(
        inputs.loaded,
        inputs.policy,
        inputs.protected.texts,
        inputs.texts,
        inputs.controls,
        also=also,
        seed=inputs.seed,
        progress=progress,
    )


def control_records(inputs: Inputs, policy: Policy, journal: RunJournal | None = None) -> tuple[TextRecord, ...]:
    """The control texts, measured and judged like protected ones; they tell guessing from memory."""
    if not inputs.controls:
        return ()
    known = None if journal is None else journal.stage(CONTROLS)
    measured = measure(inputs.loaded, policy, inputs.controls, keep_continuations=False, remembered=known)
    return text_records(policy, inputs.controls, measured.measures)
