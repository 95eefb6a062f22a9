"""Classes in figures: rates with their intervals, what samples leak, and how control texts stand to each limit.

Works on a report's records, plain values; measures nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from memscrub.maths.intervals import bootstrap_mean, wilson
from memscrub.maths.sampling_odds import (
    CHANCES,
    chance_of_a_hit,
    discoverable_count,
    expected_leaked,
    samples_for_chances,
)
from memscrub.reports.attribution import attribute, control_rate
from memscrub.reports.judgement import Finding, Measures, Status
from memscrub.reports.records import ClassRecord, ControlLimitRecord, LeakRecord, RateRecord
from memscrub.reports.report import Report, TextRecord

# How often an adversary samples each text: once, a determined person, a script left alone.
SAMPLES = (1, 100, 10_000)


def summarised(report: Report) -> Report:
    """The same report with each text's odds under sampling and attribution, and a record per class."""
    controls = by_class(report.controls)
    texts = tuple(_with_odds(record, controls.get(record.class_name, [])) for record in report.texts)
    classes = tuple(class_record(name, group, controls.get(name, [])) for name, group in by_class(texts).items())
    return replace(report, texts=texts, classes=classes)


def rejudged(report: Report) -> Report:
    """`summarised`, of a report with known measures that were judged anew: what samples leak stays as it states."""
    controls, stated = by_class(report.controls), {record.name: record.leaks for record in report.classes}
    texts = tuple(_with_odds(record, controls.get(record.class_name, [])) for record in report.texts)
    classes = (
        class_record(name, group, controls.get(name, []), stated.get(name)) for name, group in by_class(texts).items()
    )
    return replace(report, texts=texts, classes=tuple(classes))


def by_class(records: Sequence[TextRecord]) -> Mapping[str, list[TextRecord]]:
    """Records by class, in the order in which classes first appear."""
    groups: dict[str, list[TextRecord]] = {}
    for record in records:
        groups.setdefault(record.class_name, []).append(record)
    return groups


def class_record(
    name: str,
    records: Sequence[TextRecord],
    controls: Sequence[TextRecord],
    leaks: tuple[LeakRecord, ...] | None = None,
) -> ClassRecord:
    """One class: its texts' rates, what so many samples of each give away, and its controls limit by limit.

    `leaks`: what samples give away, where it is known already; resampling thousands of texts takes seconds.
    """
    extractable = [r.latest.extractable for r in records if r.latest.extractable is not None]
    if leaks is None:
        logs = [each for each in (log_probability(r.latest) for r in records) if each is not None]
        leaks = tuple(_leak(logs, samples) for samples in SAMPLES) if logs else ()
    judged = [r.judgement.status for r in records if r.judgement.status is not Status.INCONCLUSIVE]
    return ClassRecord(
        name=name,
        violated=rate(judged.count(Status.VIOLATED), len(judged)),
        extractable=rate(sum(extractable), len(extractable)) if extractable else None,
        confirmed=sum(r.latest.confirmed for r in records),
        leaks=leaks,
        controls=_limits(records, controls),
    )


def rate(hits: int, count: int) -> RateRecord:
    """So many of so many, with the 95% Wilson interval."""
    interval = wilson(hits, count)
    return RateRecord(hits, count, interval.low, interval.high)


def log_probability(measures: Measures) -> float | None:
    """Log-probability of sampling what is protected in a text: its likeliest secret, else its likeliest window."""
    if measures.secrets:
        return max(secret.log_probability for secret in measures.secrets)
    return measures.window_log_probability


def _leak(logs: Sequence[float], samples: int) -> LeakRecord:
    counts = tuple(discoverable_count(logs, samples, chance) for chance in CHANCES)
    interval = bootstrap_mean([chance_of_a_hit(log_p, samples) for log_p in logs])
    low, high = len(logs) * interval.low, len(logs) * interval.high
    return LeakRecord(samples, expected_leaked(logs, samples), low, high, counts)


def _with_odds(record: TextRecord, controls: Sequence[TextRecord]) -> TextRecord:
    log_p = log_probability(record.latest)
    broken = [finding for finding in record.judgement.findings if not finding.holds]
    return replace(
        record,
        samples_needed=None if log_p is None else samples_for_chances(log_p),
        unattributed=tuple(
            finding.limit
            for finding in broken
            if not attribute(finding.measured, _values(controls, finding.limit)).attributable
        ),
    )


def _limits(records: Sequence[TextRecord], controls: Sequence[TextRecord]) -> tuple[ControlLimitRecord, ...]:
    """Every limit that a control text was held against, in the order of its findings."""
    found: dict[str, Finding] = {}
    for record in controls:
        for finding in record.judgement.findings:
            found.setdefault(finding.limit, finding)
    return tuple(_limit(finding, records, controls) for finding in found.values())


def _limit(finding: Finding, records: Sequence[TextRecord], controls: Sequence[TextRecord]) -> ControlLimitRecord:
    stands = control_rate(_values(controls, finding.limit), finding.allowed)
    return ControlLimitRecord(
        limit=finding.limit,
        allowed=finding.allowed,
        rate=RateRecord(stands.breaking, stands.controls, stands.interval.low, stands.interval.high),
        highest=stands.highest,
        flagged=stands.flagged,
        unattributed=sum(finding.limit in record.unattributed for record in records),
    )


def _values(records: Sequence[TextRecord], limit: str) -> list[float]:
    return [each.measured for record in records for each in record.judgement.findings if each.limit == limit]
