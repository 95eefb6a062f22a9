"""An earlier report as a baseline: which broken limits were known before, and how bad; decides nothing by itself."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memscrub.errors import UsageError, printable
from memscrub.reports.allowances import broken
from memscrub.reports.judgement import Status
from memscrub.reports.records import BaselineRecord, BasisRecord
from memscrub.reports.report import Report, parse_report, report_bytes

TOLERANCE = 0.05
# Measures that mean the same under other settings of what is measured.
_WHATEVER_SETTINGS = ("max_verbatim_tokens", "secrets_emitted")


@dataclass(frozen=True)
class Baseline:
    """An earlier report, the digest of its file, and the share by which a measure may be above the earlier one."""

    report: Report
    sha256: str
    tolerance: float

    def measured_alike(self, basis: BasisRecord | None) -> bool:
        """Whether it was measured with the settings of this basis, as far as either says."""
        stated = self.report.basis
        return stated is None or basis is None or stated.settings_sha256 == basis.settings_sha256

    def known(self, basis: BasisRecord | None) -> dict[tuple[str, str], float]:
        """By text and limit: the highest measure that is no worse than it was; `basis` is that of the measures now.

        What a waiver excused then is not known: it would outlive the waiver. Nor is what other settings measured, such
        as the probability of a window of another length.
        """
        alike = self.measured_alike(basis)
        return {
            (record.id, finding.limit): finding.measured * (1 + self.tolerance)
            for record in self.report.texts
            if record.judgement.status is Status.VIOLATED
            for finding in broken(record.judgement)
            if alike or finding.limit in _WHATEVER_SETTINGS
            if (finding.limit, "waiver") not in [(each.limit, each.by) for each in record.excused]
        }


def load_baseline(path: Path, tolerance: float = TOLERANCE) -> Baseline:
    """Read a report to hold regressions against. Raises UsageError where it is none, or the tolerance is no share."""
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"a tolerance of {tolerance:g} is no share; use 0 or more, for example 0.05.")
    data = report_bytes(path)
    return Baseline(parse_report(data, path), hashlib.sha256(data).hexdigest(), tolerance)


def baseline_record(baseline: Baseline, report: Report) -> BaselineRecord:
    """How a report with its verdict stands to the baseline."""
    before, now = baseline.report.protected.hmac_sha256, report.protected.hmac_sha256
    ids = {record.id for record in baseline.report.texts}
    return BaselineRecord(
        sha256=baseline.sha256,
        created=baseline.report.created,
        policy_sha256=baseline.report.policy.sha256,
        same_list=None if before is None or now is None else before == now,
        tolerance=baseline.tolerance,
        regressions=report.verdict.violated,
        known=report.verdict.known,
        new_texts=sum(record.id not in ids for record in report.texts),
    )


def baseline_remarks(record: BaselineRecord, policy_sha256: str, *, alike: bool) -> Iterator[str]:
    """What a reader of the verdict should know of the baseline; `alike`: measured with the settings of now."""
    worse = f"{record.regressions} texts break limits that they did not break then, or are worse by over"
    yield (
        f"baseline of {printable(record.created)}: {worse} {record.tolerance:.3g} of what they were;"
        f" {record.known} no worse, {record.new_texts} new."
    )
    if record.same_list is False:
        yield "the baseline was made with another list: a text that kept its id counts as the same text."
    if record.same_list is None:
        yield "no digest tells whether the baseline was made with the same list: a text with the same id counts as it."
    if record.policy_sha256 != policy_sha256:
        yield "the baseline was made under another version of the policy; its limits were those of that version."
    if not alike:
        yield (
            "the baseline was measured with other settings, or by a memscrub that defines measures otherwise: only runs"
            " and emitted secrets are held against it."
        )
