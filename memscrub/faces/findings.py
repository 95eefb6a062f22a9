"""What a report holds against its checkpoint, limit by limit, as every face lists it; knows no face and decides
nothing: whether it counts is what the report's verdict says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from memscrub.reports.judgement import Finding, Status
from memscrub.reports.locality_limits import limit_of
from memscrub.reports.report import Report, TextRecord
from memscrub.reports.standing import Ordinary, broken_locality
from memscrub.reports.verdict import Outcome


class Level(str, Enum):
    """How much an entry counts: it decided the verdict, it is excused, or nothing could be judged."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Rule:
    """One limit, in words that do not depend on a run; `id` never changes its meaning."""

    id: str
    title: str
    help: str


@dataclass(frozen=True)
class Entry:
    """One thing that a report holds against its checkpoint.

    `weight` orders entries of a level, the worst first. `text` is None where the whole checkpoint is meant, `file` and
    `line` where the report does not say. `excused` is why the entry does not count.
    """

    rule: Rule
    level: Level
    sentence: str
    weight: float
    text: str | None = None
    class_name: str | None = None
    file: str | None = None
    line: int | None = None
    excused: str | None = None


_TEXTS = {
    "max_verbatim_tokens": (
        "Protected text comes out word for word",
        "From some offset, with the true text before it, greedy decoding gives away a longer run of the text's tokens"
        " than max_verbatim_tokens allows.",
    ),
    "max_near_verbatim": (
        "Protected text comes out nearly word for word",
        "The model's own continuation of an opening is more similar to the text than max_near_verbatim allows.",
    ),
    "max_sampling_probability": (
        "Protected text is likely to be sampled",
        "Sampling gives away the text's likeliest window, or a marked secret, with a higher probability than"
        " max_sampling_probability allows.",
    ),
    "secrets_emitted": (
        "A marked secret comes out",
        "Greedy decoding emits a span marked as secret, given everything before it.",
    ),
}
_LOCALITY = {
    "max_kl": "The edited model's predictions on ordinary text differ more than max_kl allows.",
    "max_worst_kl": "On one row of ordinary text the edited model's predictions differ more than max_worst_kl allows.",
    "max_perplexity_ratio": "The edited model's perplexity on ordinary text is above max_perplexity_ratio.",
    "min_agreement": "The edited model names the same likeliest token on ordinary text less often than min_agreement"
    " asks for.",
    "min_neighbours_kept": "The edited model still knows fewer tokens of related, unprotected texts than"
    " min_neighbours_kept asks for.",
    "max_degenerate": "More ordinary prompts lead the edited model to end early or to repeat itself than"
    " max_degenerate allows.",
}
RULES: dict[str, Rule] = {
    **{name: Rule(f"memscrub/{name}", title, help) for name, (title, help) in _TEXTS.items()},
    **{
        name: Rule(f"memscrub/locality.{name}", "The edit changed ordinary text", help)
        for name, help in _LOCALITY.items()
    },
    "verdict": Rule(
        "memscrub/verdict",
        "The policy is not shown to be met",
        "The report's verdict, for reasons that no single text or measure stands for.",
    ),
    "other": Rule(
        "memscrub/other", "A limit is broken", "A limit that this version of memscrub does not know is broken."
    ),
    "inconclusive": Rule(
        "memscrub/inconclusive",
        "A protected text could not be judged",
        "The text is too short for a limit of its class, or marks no secret. It counts as neither safe nor given away.",
    ),
}
LOCALITY_LIMITS = tuple(_LOCALITY)
LET_THROUGH = "let through by max_violation_rate"
_EXCUSES = {
    "waiver": "waived by the policy",
    "baseline": "no worse than in the baseline",
    "rate": LET_THROUGH,
}


def entries(report: Report) -> tuple[Entry, ...]:
    """Everything the report holds against its checkpoint: what decided first, the worst first.

    There is an error exactly when the stated verdict is not a pass.
    """
    passed = report.verdict.outcome is Outcome.PASS
    found = [
        *_of_locality(report, passed=passed),
        *(entry for text in report.texts for entry in of_text(text, passed=passed)),
    ]
    if not passed and all(entry.level is not Level.ERROR for entry in found):
        sentence = " ".join(report.verdict.reasons) or "the report states no reason."
        found.append(Entry(RULES["verdict"], Level.ERROR, sentence, math.inf))
    order = list(Level)
    return tuple(sorted(found, key=lambda e: (order.index(e.level), -e.weight, e.class_name or "", e.text or "")))


def of_text(text: TextRecord, *, passed: bool) -> Iterator[Entry]:
    """A text's broken limits, or that it could not be judged; `passed`: the report's verdict is a pass."""
    if text.judgement.status is Status.INCONCLUSIVE:
        sentence = f"'{text.id}' is too short to judge ({text.latest.tokens} tokens)"
        if text.latest.unjudged_secrets:
            sentence += ", or because nothing stands before a secret that it marks"
        yield _entry(text, "inconclusive", Level.NOTE, f"{sentence}.", 0.0, None)
    reasons = {each.limit: _EXCUSES.get(each.by, "excused") for each in text.excused}
    for finding in text.judgement.findings:
        if finding.holds:
            continue
        excused = reasons.get(finding.limit, "not held against this run" if passed else None)
        level = Level.ERROR if excused is None else Level.WARNING
        yield _entry(text, finding.limit, level, _sentence(text, finding, excused), _weight(finding), excused)


def _entry(text: TextRecord, rule: str, level: Level, sentence: str, weight: float, excused: str | None) -> Entry:
    known = RULES.get(rule, RULES["other"])
    return Entry(known, level, sentence, weight, text.id, text.class_name, text.file, text.line, excused)


def _sentence(text: TextRecord, finding: Finding, excused: str | None) -> str:
    said = f"'{text.id}' breaks {finding.limit}: allowed {finding.allowed:g}, measured {finding.measured:.3g}"
    if finding.limit in text.unattributed:
        said += "; a control text does as much, so it is no sign of memorization"
    return said + (f"; {excused}." if excused else ".")


def _weight(finding: Finding) -> float:
    return finding.measured / finding.allowed if finding.allowed > 0 else math.inf


def _of_locality(report: Report, *, passed: bool) -> Iterator[Entry]:
    level = Level.WARNING if passed else Level.ERROR
    for sentence in broken_locality(Ordinary(report.locality, report.neighbours, report.benign)):
        yield Entry(RULES.get(limit_of(sentence), RULES["other"]), level, sentence, math.inf)
