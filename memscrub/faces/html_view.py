"""What the page says of a report, in words and figures ready to show; knows neither markup nor files.

Every figure is the report's own, or counted from its texts; the verdict and whether a limit holds are never decided
here a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from memscrub.faces.html_rows import share, standing
from memscrub.faces.html_tokens import probability
from memscrub.reports.judgement import Finding, Judgement, Measures, Status
from memscrub.reports.locality_limits import broken_distance, limit_of
from memscrub.reports.report import Report, TextRecord
from memscrub.reports.standing import Ordinary, broken_locality, let_through
from memscrub.reports.summary import by_class, log_probability
from memscrub.reports.verdict import Outcome

TITLES = {"scan": "Scan", "fix": "Fix", "gate": "Gate"}
HEADLINES = {
    Outcome.PASS: "Within the policy",
    Outcome.VIOLATED: "Policy violated",
    Outcome.UNREACHABLE: "Policy not reached",
    Outcome.INCONCLUSIVE: "Nothing judged",
}
MEANINGS = {
    "max_verbatim_tokens": "longest run given away word for word, in tokens",
    "max_near_verbatim": "similarity of the model's own continuation",
    "secrets_emitted": "marked secrets that come out",
    "max_sampling_probability": "probability of being sampled",
    "max_kl": "distance from the original, mean KL divergence in nats",
    "max_worst_kl": "the same on the worst row",
    "max_perplexity_ratio": "perplexity after over before",
    "min_agreement": "same likeliest token as the original",
    "min_neighbours_kept": "tokens still known of related, unprotected texts",
    "max_degenerate": "rise in the share of ordinary prompts that end early or degenerate, where above chance",
}


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class LimitRow:
    """One limit and the worst that was measured against it; `scope` is a class, or ordinary text.

    `used` is the share of the limit that is used up, None where that is no share (a lower limit, or none allowed).
    """

    scope: str
    name: str
    meaning: str
    allowed: str
    before: str | None
    now: str
    holds: bool
    used: float | None
    who: str | None = None


@dataclass(frozen=True)
class ClassRow:
    """One class before and after: how many texts break a limit, and the worst of each measure.

    `bad` counts the violated texts as the verdict does, the `let_through` of them by a rate too; `excused` those that
    are waived or known before instead.
    """

    name: str
    texts: int
    bad: int
    bad_before: int | None
    let_through: int
    excused: int
    interval: str
    measures: tuple[tuple[str, str | None, str], ...]  # what, before, now


@dataclass(frozen=True)
class Lead:
    """The top of the page: the headline and the sentences under it, each decided by the report's verdict."""

    headline: str
    good: bool
    sentences: tuple[str, ...]
    reasons: tuple[str, ...]
    closest: LimitRow | None


def number(value: float) -> str:
    """A figure for people: two to four digits, very small ones as a power of ten, infinities in words."""
    if math.isinf(value):
        return "unbounded"
    if not value or abs(value) >= 1e4:
        return f"{value:,.0f}"
    if abs(value) >= 1e-4:
        return f"{value:,.4g}" if abs(value) >= 0.01 else f"{value:.2g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits} \N{MULTIPLICATION SIGN} 10{str(int(exponent)).translate(_RAISED)}"


def moment(created: str) -> str:
    """A timestamp as a date and a time; what is none is shown as it is."""
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{when.day} {when:%B %Y, %H:%M} {when.tzname() or ''}".strip()


def lead(report: Report, limits: Sequence[LimitRow]) -> Lead:
    """The verdict in words, and the limit that decided it or came closest to deciding it."""
    verdict = report.verdict
    good = verdict.outcome is Outcome.PASS
    total = len(report.texts)
    sentences = [f"{_texts(verdict.within, total)} are within the limits."]
    if verdict.violated:
        through = f", {count:,} of them let through by a rate" if (count := let_through(report.texts)) else ""
        sentences = [f"{_texts(verdict.violated, total)} break a limit of the policy{through}."]
    elif verdict.outcome is Outcome.INCONCLUSIVE:
        sentences = [f"{_texts(verdict.inconclusive, total)} could not be judged."]
    if report.edit is not None:
        before = sum(text.before_judgement.status is Status.WITHIN for text in report.texts)
        sentences = [f"{sentences[0]} Before the edit, {before:,} {'was' if before == 1 else 'were'} within them."]
    if report.locality is not None:
        broken = broken_locality(Ordinary(report.locality, report.neighbours, report.benign))
        how = "keeps its limits" if not broken else "does not keep its limits"
        sentences.append(
            f"On ordinary text the model {how}: its predictions moved by a KL divergence of"
            f" {number(report.locality.kl)}, where {number(report.locality.max_kl)} is allowed."
        )
    elif report.kind == "gate":
        sentences.append("How far ordinary text moved was not judged.")
    candidates = [row for row in limits if row.holds and row.used is not None]
    closest = max(candidates, key=lambda row: row.used or 0.0, default=None) if good else None
    return Lead(HEADLINES[verdict.outcome], good, tuple(sentences), verdict.reasons, closest)


def _texts(count: int, total: int) -> str:
    return f"{count:,} of {total:,} protected texts"


def limit_rows(report: Report) -> tuple[LimitRow, ...]:
    """Every limit that something was held against: of the classes, then on ordinary text."""
    rows = [row for name, texts in by_class(report.texts).items() for row in _class_limits(name, texts)]
    return (*rows, *_ordinary_limits(report))


def _class_limits(name: str, texts: Sequence[TextRecord]) -> Iterator[LimitRow]:
    now = _worst(texts, lambda text: text.judgement)
    before = _worst(texts, lambda text: text.before_judgement if text.after_judgement is not None else None)
    for limit, (finding, who) in now.items():
        part = share(finding.measured, finding.allowed)
        was = before.get(limit)
        yield LimitRow(
            scope=name,
            name=limit,
            meaning=MEANINGS.get(limit, ""),
            allowed=number(finding.allowed),
            before=None if was is None else number(was[0].measured),
            now=number(finding.measured),
            holds=finding.holds,
            used=part if finding.allowed > 0 and math.isfinite(part) else None,
            who=who,
        )


def _worst(texts: Sequence[TextRecord], of: Callable[[TextRecord], Judgement | None]) -> dict[str, tuple[Finding, str]]:
    worst: dict[str, tuple[Finding, str]] = {}
    for text in texts:
        judgement = of(text)
        for finding in () if judgement is None else judgement.findings:
            known = worst.get(finding.limit)
            if known is None or (not finding.holds, finding.measured) > (not known[0].holds, known[0].measured):
                worst[finding.limit] = finding, text.id
    return worst


def _ordinary_limits(report: Report) -> Iterator[LimitRow]:
    scope, record = "ordinary text", report.locality
    if record is not None:
        broken = {limit_of(sentence) for sentence in broken_distance(record, record)}
        figures = [
            ("max_kl", record.max_kl, record.kl),
            ("max_worst_kl", record.max_worst_kl, record.worst_kl),
            ("max_perplexity_ratio", record.max_perplexity_ratio, record.perplexity_ratio),
            ("min_agreement", record.min_agreement, record.agreement),
        ]
        for name, allowed, measured in figures:
            if allowed is not None:
                used = share(measured, allowed) if name in ("max_kl", "max_worst_kl") and allowed > 0 else None
                yield LimitRow(
                    scope, name, MEANINGS[name], number(allowed), None, number(measured), name not in broken, used
                )
    kept = report.neighbours
    if kept is not None and kept.known_before and kept.min_kept is not None:
        part = kept.still_known / kept.known_before
        name = "min_neighbours_kept"
        yield LimitRow(
            scope, name, MEANINGS[name], number(kept.min_kept), None, number(part), part >= kept.min_kept, None
        )
    said = report.benign
    if said is not None and said.prompts > 0:
        rise = max(said.degenerate_after - said.degenerate_before, said.ended_after - said.ended_before) / said.prompts
        name, holds = "max_degenerate", not broken_locality(Ordinary(None, None, said))
        yield LimitRow(scope, name, MEANINGS[name], number(said.max_degenerate), None, number(rise), holds, None)


def class_rows(report: Report) -> tuple[ClassRow, ...]:
    """The classes in the order in which they appear in the report."""
    intervals = {each.name: f"{each.violated.low:.0%} to {each.violated.high:.0%}" for each in report.classes}
    rows = []
    for name, texts in by_class(report.texts).items():
        fixed = any(text.after is not None for text in texts)
        standings = [standing(text) for text in texts]
        rows.append(
            ClassRow(
                name=name,
                texts=len(texts),
                bad=standings.count("violated"),
                bad_before=sum(t.before_judgement.status is Status.VIOLATED for t in texts) if fixed else None,
                let_through=let_through(texts),
                excused=standings.count("excused"),
                interval=intervals.get(name, ""),
                measures=tuple(_measures(texts, fixed)),
            )
        )
    return tuple(rows)


def _measures(texts: Sequence[TextRecord], fixed: bool) -> Iterator[tuple[str, str | None, str]]:
    now = [text.latest for text in texts]
    before = [text.before for text in texts] if fixed else None
    for what, of in _FIGURES:
        if (value := of(now)) is not None:
            yield what, None if before is None else of(before), value


def _longest(measures: Sequence[Measures]) -> str | None:
    return f"{max((each.match_run for each in measures), default=0):,} tokens"


def _secrets(measures: Sequence[Measures]) -> str | None:
    found = [secret.emitted for each in measures for secret in each.secrets]
    return f"{sum(found):,} of {len(found):,}" if found else None


def _nearest(measures: Sequence[Measures]) -> str | None:
    found = [each.near_verbatim for each in measures if each.near_verbatim is not None]
    return f"{max(found):.0%} alike" if found else None


def _likeliest(measures: Sequence[Measures]) -> str | None:
    found = [log_p for log_p in map(log_probability, measures) if log_p is not None]
    return number(probability(max(found))) if found else None


_FIGURES: tuple[tuple[str, Callable[[Sequence[Measures]], str | None]], ...] = (
    ("Longest run given away", _longest),
    ("Marked secrets that come out", _secrets),
    ("Nearest continuation", _nearest),
    ("Likeliest sample", _likeliest),
)
