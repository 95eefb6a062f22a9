"""The verdict: one function turns what was judged into an outcome; printed text, JSON and exit code all use it.

Knows judgements and whether locality held, nothing of how either was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from memscrub.errors import ExitCode
from memscrub.judgement import Judgement, Status


class Outcome(str, Enum):
    """How a run ended."""

    PASS = "pass"
    VIOLATED = "violated"
    UNREACHABLE = "unreachable"


EXIT_CODES = {
    Outcome.PASS: ExitCode.PASS,
    Outcome.VIOLATED: ExitCode.VIOLATED,
    Outcome.UNREACHABLE: ExitCode.UNREACHABLE,
}


@dataclass(frozen=True)
class Verdict:
    """The outcome, its exit code, and one sentence for each thing that decided it."""

    outcome: Outcome
    exit_code: int
    reasons: tuple[str, ...]
    within: int
    violated: int
    inconclusive: int


def decide(
    judged: Sequence[tuple[str, str, Judgement]],
    broken_locality: Sequence[str] = (),
    *,
    fixing: bool = False,
    no_room: Sequence[str] = (),
) -> Verdict:
    """The verdict on texts given as (id, class, judgement) and on sentences about broken locality limits.

    A fix that leaves a text violated or breaks locality is *unreachable* (exit 4); a scan or gate is *violated*
    (exit 1). `no_room` says which limits stopped the edit while texts were still violated; it decides nothing by
    itself. Texts too short to judge do not decide, but are counted and named.
    """
    violated = [(id, name, judgement) for id, name, judgement in judged if judgement.status is Status.VIOLATED]
    inconclusive = [id for id, _, judgement in judged if judgement.status is Status.INCONCLUSIVE]
    full = [*broken_locality, *(no_room if violated else ())]
    reasons = [f"no room: {sentence}" if fixing else sentence for sentence in dict.fromkeys(full)]
    reasons += _limit_reasons(violated)
    if not violated and not broken_locality:
        outcome = Outcome.PASS
    else:
        outcome = Outcome.UNREACHABLE if fixing else Outcome.VIOLATED
    if inconclusive:
        reasons.append(f"{len(inconclusive)} texts are too short to judge, the first is '{inconclusive[0]}'.")
    return Verdict(
        outcome=outcome,
        exit_code=int(EXIT_CODES[outcome]),
        reasons=tuple(reasons),
        within=len(judged) - len(violated) - len(inconclusive),
        violated=len(violated),
        inconclusive=len(inconclusive),
    )


def _limit_reasons(violated: Sequence[tuple[str, str, Judgement]]) -> list[str]:
    """One sentence per class and limit: how many texts break it, and the worst of them."""
    worst: dict[tuple[str, str], tuple[int, float, str, float]] = {}
    for id, class_name, judgement in violated:
        for finding in judgement.findings:
            if finding.holds:
                continue
            key = (class_name, finding.limit)
            count, value, who, _ = worst.get(key, (0, float("-inf"), id, 0.0))
            if finding.measured > value:
                value, who = finding.measured, id
            worst[key] = (count + 1, value, who, finding.allowed)
    return [
        f"class {class_name}: {count} {'text breaks' if count == 1 else 'texts break'} {limit}"
        f" (allowed {allowed:g}, worst {value:.3g} in '{who}')."
        for (class_name, limit), (count, value, who, allowed) in worst.items()
    ]
