"""A report's texts as the compact rows that the page's script shows; knows records, no markup.

Ten thousand texts go into one page, so a row is a list, and what texts share (classes, limits) is named once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memscrub.faces.html_tokens import MARGINS, PROBABILITIES, TokenView, probability
from memscrub.reports.judgement import Judgement, Measures, Status
from memscrub.reports.report import Report, TextRecord
from memscrub.reports.summary import log_probability

_MOST = 1.0e308
# In the order in which they are sorted: what needs a reader first.
STANDINGS = ("violated", "excused", "inconclusive", "within")
# The entries of a row, by the names that the script uses.
FIELDS = (
    "id", "kind", "was", "now", "used", "tokens", "run", "runBefore", "near", "nearBefore", "sampled", "sampledBefore",
    "secrets", "secretsBefore", "marked", "findings", "place", "remarks",
)  # fmt: skip


def row_data(report: Report) -> dict[str, Any]:
    """Everything the table of texts needs: names, and one list of values per text in the order of `FIELDS`."""
    classes = _numbered(text.class_name for text in report.texts)
    limits = _numbered(each.limit for text in report.texts for each in text.judgement.findings)
    return {
        "fields": FIELDS,
        "classes": list(classes),
        "limits": list(limits),
        "standings": STANDINGS,
        "fixed": any(text.after is not None for text in report.texts),
        "rows": [_row(text, classes, limits) for text in report.texts],
    }


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """Each name once, with its place."""
    return {name: place for place, name in enumerate(dict.fromkeys(names))}


def _row(text: TextRecord, classes: Mapping[str, int], limits: Mapping[str, int]) -> list[Any]:
    now, before = text.latest, text.before if text.after is not None else None
    was = None if text.after is None else STANDINGS.index(text.before_judgement.status.value)
    return [
        text.id,
        classes[text.class_name],
        was,
        STANDINGS.index(standing(text)),
        used(text.judgement),
        now.tokens,
        *_pair(now, before, lambda measures: measures.match_run),
        *_pair(now, before, lambda measures: _rounded(measures.near_verbatim)),
        *_pair(now, before, _probability),
        *_pair(now, before, lambda measures: sum(secret.emitted for secret in measures.secrets)),
        len(now.secrets),
        _findings(text, limits),
        "" if text.file is None else f"{text.file}:{text.line}" if text.line is not None else text.file,
        _remarks(text),
    ]


def _pair(now: Measures, before: Measures | None, of: Any) -> tuple[Any, Any]:
    return of(now), None if before is None else of(before)


def standing(text: TextRecord) -> str:
    """Where a text stands, as the verdict counts it: excused is one whose broken limits are all waived or known before.

    One that a rate lets through stays violated.
    """
    if text.judgement.status is not Status.VIOLATED:
        return str(text.judgement.status.value)
    excused = {each.limit for each in text.excused if each.by != "rate"}
    broken = {each.limit for each in text.judgement.findings if not each.holds}
    return "excused" if broken and broken <= excused else "violated"


def used(judgement: Judgement) -> float | None:
    """The largest share of a limit that is used up: 1 is just within; None where nothing was held against a limit.

    -1 stands for infinitely much: something where nothing is allowed.
    """
    shares = [share(each.measured, each.allowed) for each in judgement.findings]
    if not shares:
        return None
    return -1.0 if math.inf in shares else max(0.0, _rounded(max(shares)) or 0.0)


def share(measured: float, allowed: float) -> float:
    """How much of an upper limit a measure uses up."""
    if allowed > 0:
        return measured / allowed
    return math.inf if measured > 0 else 0.0


def _findings(text: TextRecord, limits: Mapping[str, int]) -> list[list[Any]]:
    """Per limit: which, allowed, measured now, does it hold; and before the edit, where there was one."""
    before = {each.limit: each for each in text.before_judgement.findings} if text.after_judgement is not None else {}
    rows = []
    for each in text.judgement.findings:
        row = [limits[each.limit], _rounded(each.allowed), _rounded(each.measured), int(each.holds)]
        if (was := before.get(each.limit)) is not None:
            row += [_rounded(was.measured), int(was.holds)]
        rows.append(row)
    return rows


def _remarks(text: TextRecord) -> list[str]:
    """What a reader of this row should know beside its numbers."""
    now, found = text.latest, []
    if now.match_run:
        begin = now.run_begin
        margin = "" if math.isinf(now.run_margin) else f"; least margin {now.run_margin:.3g} logits"
        decoded = ", confirmed by real decoding" if now.confirmed else ""
        found.append(f"Longest run: tokens {begin} to {begin + now.match_run - 1}{margin}{decoded}.")
    if now.extractable is not None:
        found.append(f"Classic prefix test: {'extractable' if now.extractable else 'not extractable'}.")
    if now.screened:
        found.append("The similarity is in part an estimate; not every opening was decoded.")
    if text.samples_needed is not None:
        found.append(f"For an even chance that sampling gives it away: {_samples(text.samples_needed)}.")
    for limit in text.unattributed:
        found.append(f"{limit}: a control text does as much, so this is no sign of memorization.")
    for each in text.excused:
        found.append(f"{each.limit} is not held against this run ({each.by}).")
    return found


def _samples(needed: Sequence[float]) -> str:
    middle = needed[len(needed) // 2]
    if math.isinf(middle) or middle >= 1e15:
        return "no number of samples that anyone could draw"
    return "1 sample" if middle <= 1 else f"{middle:,.0f} samples"


def _probability(measures: Measures) -> float | None:
    log_p = log_probability(measures)
    return None if log_p is None else _rounded(probability(log_p))


def _rounded(value: float | None) -> float | None:
    """Four digits; infinity, which JSON has not, as the largest number there is."""
    return None if value is None else max(-_MOST, min(_MOST, float(f"{value:.4g}")))


def strip_data(texts: Mapping[str, TokenView], report: Report) -> dict[str, Any]:
    """The token strips, by id, and what their steps mean; runs are those of the report."""
    runs = {text.id: text for text in report.texts if text.id in texts}
    return {
        "probabilities": PROBABILITIES,
        "margins": MARGINS,
        "fixed": any(text.after is not None for text in runs.values()),
        "texts": {id: _strip(view, runs[id]) for id, view in texts.items() if id in runs},
    }


def _strip(view: TokenView, text: TextRecord) -> dict[str, Any]:
    def run(measures: Measures) -> list[int]:
        return [measures.run_begin, measures.run_begin + measures.match_run]

    found: dict[str, Any] = {
        "first": view.first,
        "judged": view.judged,
        "secrets": view.secrets,
        "before": view.before,
        "runBefore": run(text.before),
    }
    if view.after is not None:
        found |= {"after": view.after, "run": run(text.latest)}
    if view.tokens is not None:
        found["tokens"] = view.tokens
    return found
