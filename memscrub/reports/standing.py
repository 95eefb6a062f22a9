"""Where a report stands: what the verdict looks at, of its texts and of ordinary text against limits.

Works on a report's records, plain values; measures nothing and decides nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from memscrub.policy.sections import Locality as LocalityLimits
from memscrub.reports.judgement import Judgement
from memscrub.reports.locality_limits import broken_benign, broken_distance, broken_neighbours
from memscrub.reports.report import BenignRecord, LocalityRecord, NeighbourRecord, TextRecord


def judged(records: Sequence[TextRecord]) -> list[tuple[str, str, Judgement]]:
    """What the verdict looks at: the latest judgement of each text."""
    return [(r.id, r.class_name, r.judgement) for r in records]


def let_through(records: Sequence[TextRecord]) -> int:
    """How many of the violated texts are not held against the run because the rate of their class holds."""
    return sum(any(each.by == "rate" for each in record.excused) for record in records)


@dataclass(frozen=True)
class Ordinary:
    """What a report says of ordinary text: retain text, neighbours and benign prompts; None where not measured."""

    locality: LocalityRecord | None
    neighbours: NeighbourRecord | None
    benign: BenignRecord | None

    def under(self, limits: LocalityLimits) -> Ordinary:
        """The same figures held against another policy's limits."""
        return Ordinary(
            self.locality
            and replace(
                self.locality,
                max_kl=limits.max_kl,
                max_worst_kl=limits.max_worst_kl,
                max_perplexity_ratio=limits.max_perplexity_ratio,
                min_agreement=limits.min_agreement,
            ),
            self.neighbours and replace(self.neighbours, min_kept=limits.min_neighbours_kept),
            self.benign and replace(self.benign, max_degenerate=limits.max_degenerate),
        )


def broken_locality(ordinary: Ordinary) -> list[str]:
    """One sentence for each locality limit that does not hold, of all that was measured on ordinary text."""
    broken: list[str] = []
    if (locality := ordinary.locality) is not None:
        broken += broken_distance(locality, locality)
    if (neighbours := ordinary.neighbours) is not None:
        broken += broken_neighbours(neighbours.known_before, neighbours.still_known, neighbours.min_kept)
    if (benign := ordinary.benign) is not None:
        broken += _broken_benign(benign)
    return broken


def _broken_benign(record: BenignRecord) -> list[str]:
    r, limit = record, record.max_degenerate
    return [
        *broken_benign(r.prompts, r.degenerate_before, r.degenerate_after, r.newly_degenerate, limit, "degenerate"),
        *broken_benign(r.prompts, r.ended_before, r.ended_after, r.newly_ended, limit, "end early"),
    ]


def timestamp() -> str:
    """Now in UTC, or SOURCE_DATE_EPOCH where reproducible output is asked for."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    # Twelve digits reach beyond the year 9999, the last that a date can have.
    stated = epoch.isdecimal() and len(epoch) < 12
    moment = datetime.fromtimestamp(int(epoch), timezone.utc) if stated else datetime.now(timezone.utc)
    return moment.replace(microsecond=0).isoformat()
