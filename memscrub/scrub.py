"""The fix: scan, edit, write, re-measure the written bytes, sign, and only then give the directory its name.

What a report says of the output was measured on the directory as it lies on disk, reloaded. A fix that does not
reach the policy leaves nothing behind unless asked to.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from memscrub.architecture import Orientation
from memscrub.checkpoint import Checkpoint, open_checkpoint, read_tensor
from memscrub.editing import Edit, make_edit
from memscrub.errors import PolicyError
from memscrub.extraction import Sampling, score
from memscrub.keys import load_private_key
from memscrub.locality import RetainHalves, compare, split_retain
from memscrub.measure import Progress, measure, silent
from memscrub.model import LoadedModel, Site, load_model
from memscrub.policy import Policy
from memscrub.protected import load_texts
from memscrub.records import (
    broken_locality,
    checkpoint_record,
    judged,
    locality_record,
    text_records,
)
from memscrub.report import REPORT_NAME, EditRecord, NeighbourRecord, Report, TensorRecord, TextRecord
from memscrub.scanning import Inputs, open_inputs, scan_inputs
from memscrub.signing import sign_directory, sign_report
from memscrub.tokens import TokenText
from memscrub.verdict import Outcome, decide
from memscrub.writing import PartialDirectory, TensorChange, WrittenLedger, write_checkpoint

# The passphrase of an encrypted private key: never an argument, which other users of the machine could read.
PASSWORD_VARIABLE = "MEMSCRUB_KEY_PASSWORD"


@dataclass(frozen=True)
class Fixed:
    """A finished fix: its report, and the written directory (None when it was withheld)."""

    report: Report
    directory: Path | None
    signed: bool


@dataclass(frozen=True)
class Signing:
    """The private key that signs, and its passphrase where it has one."""

    key: Path
    password: str | None = None


def fix(
    checkpoint: str | Path,
    policy: str | Path | Policy,
    out: str | Path,
    *,
    sign: Signing | None = None,
    overwrite: bool = False,
    keep_partial: bool = False,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> Fixed:
    """Write a copy of `checkpoint` to `out` that keeps the policy's texts, or report why that is out of reach.

    `checkpoint` is only read. With `keep_partial` a directory that misses the policy is written all the same; its
    report says so and its signature, if any, states a failed test. Raises UsageError (and its kinds) before
    anything is written, IncompleteError when the run cannot end; neither leaves anything at `out`.
    """
    inputs = open_inputs(checkpoint, policy, device=device, dtype="float32", seed=seed)
    sign = _signing(inputs.policy, sign)
    halves = _halves(inputs)
    neighbours = _neighbours(inputs)
    with PartialDirectory(out, overwrite=overwrite, inputs=[inputs.ckpt.path]) as partial:
        before = scan_inputs(inputs, progress=progress, kind="fix")
        known = _known(inputs.loaded, neighbours)
        edit = make_edit(inputs, halves, progress=progress)
        ledger = write_checkpoint(inputs.ckpt, partial.path, edit.tensors())
        written, reloaded = _reload(partial.path, edit, device=device)
        report = _report(inputs, before, edit, ledger, halves, written, reloaded, out, progress)
        if neighbours:
            report = replace(report, neighbours=_still_known(reloaded, neighbours, known))
        if report.verdict.outcome is not Outcome.PASS and not keep_partial:
            return Fixed(report, None, signed=False)
        (partial.path / REPORT_NAME).write_text(report.to_json(), encoding="utf-8")
        if sign is not None:
            _sign(partial.path, report, inputs.policy, sign)
        return Fixed(report, partial.commit(), signed=sign is not None)


def _signing(policy: Policy, sign: Signing | None) -> Signing | None:
    """The key to sign with, the caller's before the policy's; opened once now, so that a bad key fails early."""
    if sign is None and policy.sign.key is not None:
        sign = Signing(policy.resolve(policy.sign.key), os.environ.get(PASSWORD_VARIABLE))
    if sign is not None:
        load_private_key(sign.key, sign.password)
    return sign


def _halves(inputs: Inputs) -> RetainHalves:
    policy = inputs.policy
    halves = split_retain(
        inputs.loaded,
        load_texts(policy.retain_paths),
        load_texts(map(policy.resolve, policy.locality.statistics)),
        inputs.texts,
        max_tokens=policy.locality.max_tokens,
    )
    if not len(halves.solver) or not len(halves.judge):
        raise PolicyError(
            f"{policy.path}: the retain text is too short to be split into a half to solve with and a half to"
            " judge by; add ordinary text to the files that [locality] retain names."
        )
    return halves


def _neighbours(inputs: Inputs) -> list[TokenText]:
    documents = load_texts(map(inputs.policy.resolve, inputs.policy.locality.neighbours))
    prompt, room = inputs.loaded.prompt, inputs.loaded.max_positions
    rows = [prompt + tuple(inputs.loaded.tokenizer(d.text, add_special_tokens=False)["input_ids"]) for d in documents]
    return [TokenText(f"neighbour-{index}", "neighbour", row[:room], len(prompt)) for index, row in enumerate(rows)]


def _known(loaded: LoadedModel, neighbours: Sequence[TokenText]) -> list[list[bool]]:
    """Which tokens of each neighbour greedy decoding emits."""
    return [(scores.gap > 0).tolist() for scores in score(loaded, neighbours, lambda _: Sampling())]


def _still_known(loaded: LoadedModel, neighbours: Sequence[TokenText], known: list[list[bool]]) -> NeighbourRecord:
    now = _known(loaded, neighbours)
    pairs = [(a, b) for was, here in zip(known, now, strict=True) for a, b in zip(was, here, strict=True)]
    return NeighbourRecord(len(neighbours), sum(a for a, _ in pairs), sum(a and b for a, b in pairs))


def _reload(path: Path, edit: Edit, *, device: str) -> tuple[Checkpoint, LoadedModel]:
    """Free the edited model and load what lies on disk: from here on only written bytes are measured."""
    edit.editable.loaded.model.to("meta")
    ckpt = open_checkpoint(path)
    return ckpt, load_model(ckpt, device=device, dtype="float32")


def _report(
    inputs: Inputs,
    before: Report,
    edit: Edit,
    ledger: WrittenLedger,
    halves: RetainHalves,
    written: Checkpoint,
    reloaded: LoadedModel,
    out: str | Path,
    progress: Progress,
) -> Report:
    """The report on the written directory: measured from disk, against the input's tensors from disk."""
    after = measure(reloaded, inputs.policy, inputs.texts, progress=progress)
    records = text_records(inputs.policy, inputs.texts, [record.before for record in before.texts], after.measures)
    originals = {site.tensor: read_tensor(inputs.ckpt, edit.names[site.tensor]) for site in _touched(edit, ledger)}
    locality = locality_record(compare(reloaded, originals, halves.judge), inputs.policy.locality)
    output = checkpoint_record(str(out), written)
    return replace(
        before,
        output=output,
        texts=records,
        locality=locality,
        edit=_edit_record(inputs, edit, ledger, halves),
        verdict=decide(judged(records), broken_locality(locality), fixing=True),
        controls=_controls_after(inputs, before, reloaded),
    )


def _controls_after(inputs: Inputs, before: Report, reloaded: LoadedModel) -> tuple[TextRecord, ...]:
    if not inputs.controls:
        return ()
    after = measure(reloaded, inputs.policy, inputs.controls)
    return text_records(inputs.policy, inputs.controls, [r.before for r in before.controls], after.measures)


def _touched(edit: Edit, ledger: WrittenLedger) -> list[Site]:
    changed = {change.name for change in ledger.changes}
    return [site for site in edit.editable.sites if edit.names[site.tensor] in changed]


def _edit_record(inputs: Inputs, edit: Edit, ledger: WrittenLedger, halves: RetainHalves) -> EditRecord:
    rows = {edit.names[site.tensor]: site.orientation for site in edit.editable.sites}
    return EditRecord(
        mode=inputs.policy.fix.mode,
        solver=inputs.policy.fix.solver,
        sites=inputs.policy.fix.sites,
        stages=edit.stages,
        break_points=edit.outcome.break_points,
        active_constraints=edit.outcome.active,
        rounds=edit.rounds,
        predicted_kl=edit.outcome.cost,
        statistics_tokens=halves.solver.numel(),
        retain_blocks_dropped=halves.dropped,
        tensors=tuple(
            TensorRecord(
                name=change.name,
                shard=change.shard,
                vectors_changed=_vectors(change, rows[change.name]),
                elements_changed=change.elements_changed,
                sha256_before=change.sha256_before,
                sha256_after=change.sha256_after,
            )
            for change in ledger.changes
        ),
        left_out=ledger.left_out,
    )


def _vectors(change: TensorChange, orientation: Orientation) -> int:
    """How many output vectors of a tensor differ."""
    return change.columns_changed if orientation is Orientation.COLUMNS else change.rows_changed


def _sign(path: Path, report: Report, policy: Policy, sign: Signing) -> None:
    sign_directory(path, sign.key, password=sign.password)
    failed = [r.id for r in report.texts if r.after_judgement and r.after_judgement.status.value == "violated"]
    passed = report.verdict.outcome is Outcome.PASS
    sign_report(
        path / REPORT_NAME,
        sign.key,
        passed=passed,
        policy_digests={policy.path.name: policy.digest},
        failed_tests=() if passed else failed,
        time_created=report.created,
        password=sign.password,
    )
