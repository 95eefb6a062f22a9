"""What was measured on ordinary text against its limits: one sentence for each limit that does not hold, and by how
much; knows neither how anything was measured nor what becomes of it.

The edit while it works, the report on the written bytes and the gate all judge by this one function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

# Whatever a policy allows: a model this far from the original is broken, not edited.
CATASTROPHIC_PERPLEXITY_RATIO = 1.10
CATASTROPHIC_AGREEMENT = 0.90
_BROKEN = " is broken "
_WORKING_RATIO = "the perplexity ratio of a model that still works"
_WORKING_AGREEMENT = "the agreement of a model that still works"
# A rise in benign prompts that chance brings about this often is not held against an edit.
CHANCE = 0.05
# Above so many changes the normal distribution (with continuity correction) stands in for the exact sum.
_MANY = 1000


@dataclass(frozen=True)
class StreamDistance:
    """Distance of an edited model from the original on retain text read as a running stream, as in training, per
    predicted token.

    `kl`: mean KL(original || edited) in nats, `worst_kl`: the same for the worst block of text;
    `agreement`: share of positions with the same likeliest token; `perplexity_ratio`: edited over original.
    """

    tokens: int
    kl: float
    worst_kl: float
    agreement: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Locality:
    """The same, in the order of the report's fields, and `start_kl`: the mean KL over the first tokens
    (`distance.START`) when each row stands at the beginning of a text instead, where memorized texts begin too."""

    tokens: int
    kl: float
    worst_kl: float
    start_kl: float
    agreement: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Benign:
    """How many of the prompts each model ends early on, or degenerates on.

    `newly_ended` and `newly_degenerate` count those where the original does not. `repeated_rise`: mean share of
    repeated 4-grams beyond the original's. `agreement`: mean similarity of the two continuations, 1 where they are
    the same.
    """

    prompts: int
    degenerate_before: int
    degenerate_after: int
    newly_degenerate: int
    ended_before: int
    ended_after: int
    newly_ended: int
    empty_after: int
    repeated_rise: float
    agreement: float


class DistanceLimits(Protocol):
    """What of the distance is allowed; None: any amount."""

    @property
    def max_kl(self) -> float: ...
    @property
    def max_worst_kl(self) -> float | None: ...
    @property
    def max_perplexity_ratio(self) -> float: ...
    @property
    def min_agreement(self) -> float: ...


def broken_distance(measured: StreamDistance | Locality, limits: DistanceLimits) -> list[str]:
    """One sentence for each limit on retain text that is broken; the policy's, or the catastrophic one behind it."""
    ratio, agreement = measured.perplexity_ratio, measured.agreement
    return [
        *over("max_kl", measured.kl, limits.max_kl),
        *over("max_worst_kl", measured.worst_kl, limits.max_worst_kl),
        *(
            over("max_perplexity_ratio", ratio, limits.max_perplexity_ratio)
            or over(_WORKING_RATIO, ratio, CATASTROPHIC_PERPLEXITY_RATIO)
        ),
        *(
            under("min_agreement", agreement, limits.min_agreement)
            or under(_WORKING_AGREEMENT, agreement, CATASTROPHIC_AGREEMENT)
        ),
    ]


def broken_benign(prompts: int, before: int, after: int, newly: int, limit: float, what: str) -> list[str]:
    """A sentence when a fault shows in more benign prompts than before, by more than the limit and than chance.

    Any edit makes some continuations take another way, and some of those end or loop as some of the original's do:
    as many prompts are expected to gain the fault as to lose it. Held against that by a sign test.
    """
    lost = before + newly - after
    if not prompts or _chance(newly, lost) >= CHANCE:
        return []
    return over("max_degenerate", (newly - lost) / prompts, limit, f"rise in the share of benign prompts that {what}")


def _chance(gained: int, lost: int) -> float:
    """Probability of at least so many gains when each change is as likely a gain as a loss."""
    changes = gained + lost
    if min(gained, lost) < 0:  # counts that contradict each other, in a report from elsewhere
        return 1.0 if gained < 0 else 0.0
    if changes > _MANY:
        return math.erfc((2 * gained - 1 - changes) / math.sqrt(2 * changes)) / 2
    return float(sum(math.comb(changes, count) for count in range(gained, changes + 1))) / 2.0**changes


def broken_neighbours(known_before: int, still_known: int, limit: float | None) -> list[str]:
    """A sentence when too few of the neighbours' known tokens are kept; where none was known, none can be lost."""
    return under("min_neighbours_kept", still_known / known_before, limit) if known_before else []


def limit_of(sentence: str) -> str:
    """The policy's limit that a sentence of this module is about."""
    name = sentence.removeprefix("locality: ").partition(_BROKEN)[0]
    return {_WORKING_RATIO: "max_perplexity_ratio", _WORKING_AGREEMENT: "min_agreement"}.get(name, name)


def over(name: str, measured: float, allowed: float | None, what: str = "") -> list[str]:
    """The sentence when a measure is above its limit."""
    # Not `measured > allowed`: a NaN holds no limit.
    return [] if allowed is None or measured <= allowed else [_sentence(name, measured, allowed, what)]


def under(name: str, measured: float, allowed: float | None) -> list[str]:
    """The sentence when a measure is below its limit."""
    return [] if allowed is None or measured >= allowed else [_sentence(name, measured, allowed)]


def _sentence(name: str, measured: float, allowed: float, what: str = "") -> str:
    about = f"{what}: " if what else ""
    return (
        f"locality: {name}{_BROKEN}({about}allowed {allowed:g}, measured {measured:.4g},"
        f" missed by {abs(measured - allowed):.2g})."
    )
