"""A policy's waivers and rates as what a verdict allows, and as a report's records; decides nothing.

Days are those of the machine's clock in UTC: no variable of the environment keeps a waiver alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, timezone

from memscrub.errors import PolicyError
from memscrub.policy.document import Policy
from memscrub.policy.mistakes import at_line, decode, did_you_mean, read_source
from memscrub.policy.toml_lines import line_of
from memscrub.policy.waiver_entries import Waiver
from memscrub.reports.allowances import Allowances, Judged, Rate
from memscrub.reports.records import ExcuseRecord, WaiverRecord
from memscrub.reports.report import TextRecord
from memscrub.reports.standing import judged
from memscrub.reports.verdict import excuses
from memscrub.texts.protected import ProtectedList


def today() -> date:
    """The day in UTC."""
    return datetime.now(timezone.utc).date()


def allowances_of(
    policy: Policy, *, day: date | None = None, known: Mapping[tuple[str, str], float] | None = None
) -> Allowances:
    """What the policy excuses on that day (today), and what is known from an earlier report."""
    now = today() if day is None else day
    return Allowances(
        rates={
            name: Rate(limits.max_violation_rate, limits.confidence)
            for name, limits in policy.classes.items()
            if limits.max_violation_rate is not None
        },
        waivers=tuple(each for each in policy.waivers if now <= each.expires),
        expired=tuple(each for each in policy.waivers if now > each.expires),
        known=known or {},
    )


def with_excuses(records: Sequence[TextRecord], allowances: Allowances) -> tuple[TextRecord, ...]:
    """The same records, each with its broken limits that are not held against the run."""
    found = excuses(judged(records), allowances)
    return tuple(
        replace(record, excused=tuple(ExcuseRecord(limit, by) for limit, by in found.get(record.id, ())))
        for record in records
    )


def waiver_records(allowances: Allowances, texts: Sequence[Judged]) -> tuple[WaiverRecord, ...]:
    """Every waiver of the policy and whether it was used."""
    used = allowances.used(texts)
    return tuple(
        [_record(each, "used" if each in used else "unused") for each in allowances.waivers]
        + [_record(each, "expired") for each in allowances.expired]
    )


def _record(waiver: Waiver, state: str) -> WaiverRecord:
    return WaiverRecord(waiver.id, waiver.limit, waiver.expires.isoformat(), waiver.reason, state)


def check_waivers(policy: Policy, protected: ProtectedList) -> None:
    """Raise PolicyError, with the line, where a waiver names a text that the policy's lists do not have."""
    known = {*(text.id for text in protected), *protected.duplicates}
    for index, waiver in enumerate(policy.waivers):
        if waiver.id in known:
            continue
        hint = did_you_mean(waiver.id, known, "correct the id or remove the waiver.")
        text = decode(read_source(policy.path), policy.path) if policy.path.is_file() else ""
        line = line_of(text, ("waiver", index, "id"))
        raise PolicyError(at_line(policy.path, line, f"a waiver names '{waiver.id}', which no list has; {hint}"))
