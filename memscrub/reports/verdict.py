"""The verdict: one function turns what was judged into an outcome; printed text, JSON and exit code all use it.

Knows judgements, whether locality held and what is allowed for all that; nothing of how any of it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from memscrub.errors import ExitCode
from memscrub.policy.waiver_entries import Waiver
from memscrub.reports.allowances import NOTHING, Allowances, Judged, Rate, broken
from memscrub.reports.judgement import Finding, Judgement, Status


class Outcome(str, Enum):
    """How a run ended."""

    PASS = "pass"
    VIOLATED = "violated"
    UNREACHABLE = "unreachable"
    INCONCLUSIVE = "inconclusive"


EXIT_CODES = {
    Outcome.PASS: ExitCode.PASS,
    Outcome.VIOLATED: ExitCode.VIOLATED,
    Outcome.UNREACHABLE: ExitCode.UNREACHABLE,
    Outcome.INCONCLUSIVE: ExitCode.INCOMPLETE,
}


@dataclass(frozen=True)
class Verdict:
    """The outcome, its exit code, and one sentence for each thing that decided it.

    Every text is one of the five: within, violated, inconclusive, waived, known (as bad in an earlier report).
    """

    outcome: Outcome
    exit_code: int
    reasons: tuple[str, ...]
    within: int
    violated: int
    inconclusive: int
    waived: int = 0
    known: int = 0


def decide(
    judged: Sequence[Judged],
    broken_locality: Sequence[str] = (),
    *,
    fixing: bool = False,
    no_room: Sequence[str] = (),
    allowances: Allowances = NOTHING,
) -> Verdict:
    """The verdict on texts given as (id, class, judgement) and on sentences about broken locality limits.

    A fix that leaves a text violated or breaks locality is *unreachable* (exit 4); a scan or gate is *violated*
    (exit 1). `no_room` says which limits stopped the edit while texts were still violated; it decides nothing by
    itself. Texts too short to judge do not decide, but are counted and named; where all are and nothing else fails, the
    outcome is *inconclusive* (exit 3). Of a class with a rate, the confidence bound decides and no single text; texts
    that are inconclusive, waived or known are no part of that rate.
    """
    groups = _grouped(judged, allowances)
    rates = _rates(judged, groups, allowances.rates)
    violated = [each for each in groups.violated if each[1] not in rates.holding]
    inconclusive = [id for id, _, judgement in judged if judgement.status is Status.INCONCLUSIVE]
    full = [*broken_locality, *(no_room if violated or rates.broken else ())]
    reasons = [f"no room: {sentence}" if fixing else sentence for sentence in dict.fromkeys(full)]
    reasons += [*rates.broken, *_limit_reasons(violated), *rates.used, *_excused(judged, groups, allowances)]
    nothing_judged = bool(judged) and len(inconclusive) == len(judged)
    if violated or broken_locality or rates.broken:
        outcome = Outcome.UNREACHABLE if fixing else Outcome.VIOLATED
    else:
        outcome = Outcome.INCONCLUSIVE if nothing_judged else Outcome.PASS
    if nothing_judged:
        reasons.append(_nothing_judged(inconclusive))
    elif inconclusive:
        reasons.append(f"{len(inconclusive)} texts are too short to judge, the first is '{inconclusive[0]}'.")
    return Verdict(
        outcome=outcome,
        exit_code=int(EXIT_CODES[outcome]),
        reasons=tuple(reasons),
        within=len(judged) - len(groups.violated) - len(groups.waived) - len(groups.known) - len(inconclusive),
        violated=len(groups.violated),
        inconclusive=len(inconclusive),
        waived=len(groups.waived),
        known=len(groups.known),
    )


def _nothing_judged(ids: Sequence[str]) -> str:
    """What to do where no text could be judged; `judgement.judge` says when one cannot be."""
    which = f"all {len(ids)} are too short to judge, the first is '{ids[0]}'"
    if len(ids) == 1:
        which = f"'{ids[0]}' is too short to judge"
    return (
        f"no text could be judged: {which}; list longer texts (with a marked secret where their class sets `secret`),"
        " or make max_verbatim_tokens or [probe] min_prefix_tokens smaller."
    )


def excuses(judged: Sequence[Judged], allowances: Allowances = NOTHING) -> dict[str, tuple[tuple[str, str], ...]]:
    """Of each text that breaks a limit without consequence: the limit, and what excuses it.

    "waiver", "baseline" (known from an earlier report) or "rate" (the class's rate holds); `decide` says the same.
    """
    holding = _rates(judged, _grouped(judged, allowances), allowances.rates).holding
    found = {}
    for id, name, judgement in judged:
        why = [(each.limit, _excuse(id, name, each, allowances, holding)) for each in broken(judgement)]
        if excused := tuple((limit, by) for limit, by in why if by is not None):
            found[id] = excused
    return found


def _excuse(id: str, name: str, finding: Finding, allowances: Allowances, holding: set[str]) -> str | None:
    if allowances.waiver_of(id, finding) is not None:
        return "waiver"
    if allowances.is_known(id, finding):
        return "baseline"
    return "rate" if name in holding else None


@dataclass(frozen=True)
class _Groups:
    """Texts that break limits: not excused (with the limits that are not), waived, or known before."""

    violated: list[Judged] = field(default_factory=list)
    waived: list[Judged] = field(default_factory=list)
    known: list[Judged] = field(default_factory=list)


def _grouped(judged: Sequence[Judged], allowances: Allowances) -> _Groups:
    groups = _Groups()
    for id, name, judgement in judged:
        if judgement.status is not Status.VIOLATED:
            continue
        left = allowances.left_over(id, judgement)
        if left or not broken(judgement):
            groups.violated.append((id, name, Judgement(judgement.status, left)))
        elif any(allowances.waiver_of(id, finding) is None for finding in broken(judgement)):
            groups.known.append((id, name, judgement))
        else:
            groups.waived.append((id, name, judgement))
    return groups


@dataclass(frozen=True)
class _Rates:
    """Sentences about rates that do not hold, about those that hold although a text breaks a limit, and the classes
    whose texts do not decide one by one."""

    broken: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    holding: set[str] = field(default_factory=set)


def _rates(judged: Sequence[Judged], groups: _Groups, rates: Mapping[str, Rate]) -> _Rates:
    excused = {id for id, _, _ in (*groups.waived, *groups.known)}
    found = _Rates()
    for name, rate in rates.items():
        mine = [(id, judgement.status) for id, other, judgement in judged if other == name and id not in excused]
        if not mine:
            continue
        count = sum(status is not Status.INCONCLUSIVE for _, status in mine)
        hits = sum(other == name for _, other, _ in groups.violated)
        bound = rate.bound(hits, count)
        said = f"{hits} of {count} break a limit: at most {bound:.2%} with {rate.confidence:g} confidence"
        verdict = f"class {name}: max_violation_rate {'holds' if bound <= rate.allowed else 'is broken'}"
        few = f", which takes {rate.texts_needed} texts or more" if count < rate.texts_needed else ""
        sentence = f"{verdict} ({said}, allowed {rate.allowed:.4g}{few})."
        if bound > rate.allowed:
            found.broken.append(sentence)
        else:
            found.holding.add(name)
            found.used.extend([sentence] if hits else [])
    return found


def _excused(judged: Sequence[Judged], groups: _Groups, allowances: Allowances) -> list[str]:
    """One sentence for each waiver that was used, for each that expired, and one for what was known before."""
    said = [
        f"waived until {each.expires}: {_waived(each)} ({each.reason.rstrip('.')})." for each in allowances.used(judged)
    ]
    said += [
        f"the waiver of {_waived(each)} expired on {each.expires} and does not count; renew or remove it."
        for each in allowances.expired
    ]
    if groups.known:
        many = f"{len(groups.known)} texts break" if len(groups.known) > 1 else "1 text breaks"
        said.append(f"{many} limits no worse than in the baseline: not held against this run.")
    return said


def _waived(waiver: Waiver) -> str:
    return f"'{waiver.id}'" if waiver.limit is None else f"'{waiver.id}', {waiver.limit}"


def _limit_reasons(violated: Sequence[Judged]) -> list[str]:
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
