"""What is not held against a run although it breaks a limit: rates, waivers and what was known before; plain values.

Knows judgements, not what becomes of them: `memscrub.reports.verdict.decide` alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from memscrub.maths.intervals import upper_bound
from memscrub.policy.waiver_entries import Waiver
from memscrub.reports.judgement import Finding, Judgement

Judged = tuple[str, str, Judgement]  # id, class, judgement
# More texts than any list has: of a rate next to nothing, how many it takes exactly tells nobody anything.
_ENOUGH = 1e15


@dataclass(frozen=True)
class Rate:
    """The share of a class's texts that may break a limit, and how sure one must be that no more do."""

    allowed: float
    confidence: float

    def bound(self, hits: int, count: int) -> float:
        """The upper confidence bound of `hits` in `count`."""
        return upper_bound(hits, count, level=self.confidence)

    @property
    def texts_needed(self) -> int:
        """So many texts must be within their limits, without exception, for the bound to be low enough."""
        few = math.log(1 - self.confidence) / math.log1p(-self.allowed)
        needed = max(1, math.floor(min(few, _ENOUGH)))
        # The logarithms may be off by a rounding error just where a whole number decides.
        return needed if self.bound(0, needed) <= self.allowed else needed + 1


@dataclass(frozen=True)
class Allowances:
    """What a policy and an earlier report excuse.

    `rates`: by class; the others allow no text. `waivers`: those in force; `expired`: those that no longer count.
    `known`: by text and limit, the highest measure that the earlier report excuses.
    """

    rates: Mapping[str, Rate] = field(default_factory=dict)
    waivers: tuple[Waiver, ...] = ()
    expired: tuple[Waiver, ...] = ()
    known: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def waiver_of(self, id: str, finding: Finding) -> Waiver | None:
        """The waiver in force for this limit of this text; one that names the limit before one for all of them."""
        mine = [waiver for waiver in self.waivers if waiver.id == id and waiver.finding in (None, finding.limit)]
        return max(mine, key=lambda waiver: waiver.finding is not None, default=None)

    def is_known(self, id: str, finding: Finding) -> bool:
        """Whether an earlier report had it as bad."""
        return finding.measured <= self.known.get((id, finding.limit), -math.inf)

    def left_over(self, id: str, judgement: Judgement) -> tuple[Finding, ...]:
        """The broken limits of a text that neither a waiver nor an earlier report excuses."""
        return tuple(
            finding
            for finding in broken(judgement)
            if self.waiver_of(id, finding) is None and not self.is_known(id, finding)
        )

    def used(self, judged: Sequence[Judged]) -> list[Waiver]:
        """The waivers that excuse a broken limit of one of these texts, in the policy's order."""
        wanted = {waiver.id for waiver in self.waivers}
        found = [self.waiver_of(id, each) for id, _, it in judged if id in wanted for each in broken(it)]
        return [waiver for waiver in self.waivers if waiver in found]


NOTHING = Allowances()


def broken(judgement: Judgement) -> tuple[Finding, ...]:
    """The findings whose limit does not hold."""
    return tuple(finding for finding in judgement.findings if not finding.holds)
