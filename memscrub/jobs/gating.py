"""The gate: may this directory be released under this policy? Checks the signature, then the measures.

The measures are those of the signed report where they answer this policy (`proof.trusting`), else the bytes are
measured again. Locality cannot be measured without the original checkpoint: it is taken from the directory's report,
and only believed when the report's signature was verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from memscrub.errors import UntrustedMeasuresError, UsageError, printable
from memscrub.policy.document import Policy, load_policy
from memscrub.policy.sections import Locality
from memscrub.proof.signing import Verification, verify_directory
from memscrub.proof.trusting import signed_report, trusted_measures
from memscrub.reports.baseline import TOLERANCE, Baseline, baseline_record, baseline_remarks, load_baseline
from memscrub.reports.report import REPORT_NAME, Report
from memscrub.reports.standing import Ordinary, broken_locality, judged
from memscrub.reports.verdict import decide
from memscrub.reports.waivers import allowances_of, waiver_records, with_excuses

if TYPE_CHECKING:
    from memscrub.measures.measure import Progress


@dataclass(frozen=True)
class Gated:
    """What the gate found: its report, the verified signature (None when no key was given), and remarks."""

    report: Report
    verification: Verification | None
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """How a measurement is run, where there is one."""

    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0


def gate(
    directory: str | Path,
    policy: str | Path | Policy,
    *,
    key: str | Path | None = None,
    remeasure: bool = False,
    trust: bool = False,
    baseline: str | Path | None = None,
    tolerance: float = TOLERANCE,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Gated:
    """The verdict on `directory` under `policy`; with `key`, its signature is verified first.

    With `key`, the measures of the signed report are trusted where they answer this policy; else, without `key` or
    with `remeasure` the directory is measured. `trust` refuses to measure. With `baseline`, an earlier report, only
    regressions fail: limits that a text did not break then, or breaks by more than `tolerance` of what was measured.
    Raises SignatureInvalidError when a signature does not hold, UntrustedMeasuresError with `trust`, UsageError and
    IncompleteError as `scan` does.
    """
    if trust and (remeasure or key is None):
        what = "measuring again is the opposite of it" if remeasure else "give --key to verify the signature with"
        raise UsageError(f"--trust takes the measures of a signed report; {what}.")
    rules = policy if isinstance(policy, Policy) else load_policy(policy)
    earlier = None if baseline is None else load_baseline(Path(baseline), tolerance)
    verification = None if key is None else verify_directory(directory, key, key_id=rules.sign.key_id)
    stated = None if verification is None else signed_report(Path(directory), verification)
    report, remarks = None, []
    if verification is not None and not remeasure:
        try:
            report = trusted_measures(Path(directory), stated, rules, verification, dtype=dtype)
            remarks += _of_trust(report, rules)
        except UntrustedMeasuresError as reason:
            if trust:
                raise UntrustedMeasuresError(f"{directory}: the signed measures cannot be trusted; {reason}") from None
            remarks.append(f"measured again instead of trusting the signed measures; {reason}")
    if report is None:
        report = _measured(directory, rules, Run(device, dtype, seed), progress)
    ordinary, more = _signed_ordinary(Path(directory), stated, verification, rules.locality)
    report = _decided(report, rules, ordinary, earlier)
    if report.baseline is not None and earlier is not None:
        remarks += baseline_remarks(report.baseline, rules.digest, alike=earlier.measured_alike(report.basis))
    return Gated(report, verification, (*remarks, *more, *_of_waivers(report)))


def _measured(directory: str | Path, policy: Policy, run: Run, progress: Progress | None) -> Report:
    # Imported here: a gate that trusts signed measures loads no torch.
    from memscrub.jobs.scanning import open_inputs, scan_inputs
    from memscrub.measures.measure import silent

    inputs = open_inputs(directory, policy, device=run.device, dtype=run.dtype, seed=run.seed)
    return scan_inputs(inputs, progress=progress or silent, kind="gate")


def _decided(report: Report, policy: Policy, ordinary: Ordinary, baseline: Baseline | None) -> Report:
    """The report with its verdict, by the policy's limits, rates and waivers, and by what was known before."""
    allowances = allowances_of(policy, known={} if baseline is None else baseline.known(report.basis))
    texts = judged(report.texts)
    report = replace(
        report,
        texts=with_excuses(report.texts, allowances),
        locality=ordinary.locality,
        neighbours=ordinary.neighbours,
        benign=ordinary.benign,
        verdict=decide(texts, broken_locality(ordinary), allowances=allowances),
        waivers=waiver_records(allowances, texts),
    )
    return report if baseline is None else replace(report, baseline=baseline_record(baseline, report))


def _of_trust(report: Report, policy: Policy) -> list[str]:
    trusted = report.trusted
    assert trusted is not None
    other = "" if trusted.policy_sha256 == policy.digest else ", made under another version of the policy"
    said = [
        f"measures taken from the signed report of {printable(trusted.created)}"
        f" (memscrub {printable(trusted.memscrub)}){other};"
        " --remeasure measures again."
    ]
    if missing := [name for name in policy.probe.also if name not in (report.depths.measures if report.depths else ())]:
        said.append(f"the signed report has no {', '.join(missing)}, which [probe] also asks for; --remeasure has.")
    return said


def _of_waivers(report: Report) -> list[str]:
    unused = [waiver for waiver in report.waivers if waiver.state == "unused"]
    return [f"the waiver of '{each.id}' was not needed." for each in unused]


def _is_about(stated: Report, verification: Verification) -> bool:
    """Whether the checkpoint whose distance a report states is the one that is signed beside it.

    A model card may differ: it can be written between the report and the signature.
    """
    about, signed = (
        {name: digest for name, digest in files.items() if name != REPORT_NAME and not name.endswith(".md")}
        for files in ((stated.output or stated.input).files, verification.files)
    )
    return about == signed


def _signed_ordinary(
    directory: Path, stated: Report | None, verification: Verification | None, limits: Locality
) -> tuple[Ordinary, Sequence[str]]:
    """What the directory's own report states of ordinary text, held against this policy's limits."""
    nothing = Ordinary(None, None, None)
    if not (directory / REPORT_NAME).is_file():
        return nothing, ["no memscrub report in the directory: locality was not judged."]
    if verification is None or stated is None:
        return nothing, ["no key given: signature not checked, and the report's locality not believed."]
    if not _is_about(stated, verification):
        return nothing, ["the report is about other files than those that are signed: its locality was not judged."]
    ordinary = Ordinary(stated.locality, stated.neighbours, stated.benign).under(limits)
    remarks = []
    if ordinary.locality is None:
        remarks.append("the report states no locality: it was not judged.")
    if ordinary.neighbours is None and limits.min_neighbours_kept is not None:
        remarks.append("the report states nothing on neighbours: min_neighbours_kept was not judged.")
    if ordinary.benign is None and ordinary.locality is not None:
        remarks.append("the report states nothing on benign prompts: max_degenerate was not judged.")
    return ordinary, remarks
