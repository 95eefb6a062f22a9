"""A report's class figures and extra measures as sentences for people; knows no terminal and decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from statistics import median
from typing import TypeVar

from memscrub.reports.records import ClassRecord, DepthsRecord, RateRecord
from memscrub.reports.report import Report

Record = TypeVar("Record")
Key = TypeVar("Key", bound=Hashable)


def class_sentences(report: Report) -> Iterator[str]:
    """Per class: rates with their intervals and what samples leak; then the limits that controls break too."""
    for record in report.classes:
        yield _rates(record)
    for record in report.classes:
        yield from _controls(record)


def depth_sentences(report: Report) -> Iterator[str]:
    """One sentence per class for each measure that was asked for beyond the limits."""
    if report.depths is None:
        return
    for name in report.depths.measures:
        if name in _DEPTHS:  # a later version may know more
            yield from _DEPTHS[name](report.depths)


def share(record: RateRecord) -> str:
    """A count with the 95% interval of its rate."""
    return f"{record.hits}/{record.count} ({record.low:.0%} to {record.high:.0%})"


def _rates(record: ClassRecord) -> str:
    parts = [f"{share(record.violated)} break a limit"]
    if record.extractable is not None:
        parts.append(f"{share(record.extractable)} extractable")
    if record.leaks:
        leaks = ", ".join(
            f"{_times(each.samples)}: {_few(each.expected)} ({_few(each.low)} to {_few(each.high)})"
            for each in record.leaks
        )
        parts.append(f"expected to come out when each text is sampled {leaks}")
    if record.confirmed:
        parts.append(f"{record.confirmed} decided by real decoding")
    return f"{record.name}: {'; '.join(parts)}"


def _times(samples: int) -> str:
    return "once" if samples == 1 else f"{samples:,} times"


def _few(texts: float) -> str:
    """An expected number of texts; next to none is not given in powers of ten."""
    return "<0.001" if 0 < texts < 0.001 else f"{texts:.3g}"


def _controls(record: ClassRecord) -> Iterator[str]:
    for each in record.controls:
        if each.flagged:
            yield (
                f"{record.name}: {each.rate.hits} of {each.rate.count} control texts break {each.limit}"
                f" (allowed {each.allowed:g}) too: breaking it says little about memorization"
            )
        if each.unattributed:
            yield (
                f"{record.name}: {each.unattributed} texts break {each.limit} by no more than a control text does:"
                " not attributable to memorization"
            )


def _membership(depths: DepthsRecord) -> Iterator[str]:
    for name, mine in _groups(depths.separations, lambda each: each.class_name):
        figures = ", ".join(f"{e.signal.replace('_', ' ')} {e.auc:.2f} ({e.low:.2f} to {e.high:.2f})" for e in mine)
        yield f"membership, {name}: AUC against controls: {figures}"
    if not depths.separations:
        yield "membership: no control texts of these classes, so signals cannot be compared"


def _prefixes(depths: DepthsRecord) -> Iterator[str]:
    for (name, variant), rates in _groups(depths.prefixes, lambda each: (each.class_name, each.variant)):
        what = "text's end by the tokens before it" if variant == "before_suffix" else "text by its first tokens"
        yield f"prefix sweep, {name}, {what}: " + ", ".join(f"{e.prefix}: {e.rate.hits}/{e.rate.count}" for e in rates)
    if not depths.prefixes:
        yield "prefix sweep: every text is shorter than a prefix and a suffix together"


def _exposure(depths: DepthsRecord) -> Iterator[str]:
    for name, group in _groups(depths.texts, lambda text: text.class_name):
        found = [each for text in group for each in text.exposures]
        if found:
            first = sum(each.rank == 1 for each in found)
            reach = sorted(each.top_k_reach for each in found)
            yield (
                f"exposure, {name}: median {median(e.bits for e in found):.1f} bits; {first} of {len(found)} secrets"
                f" rank first among values of their shape; half are reached by top-{math.ceil(median(reach))} sampling"
            )


def _near_mass(depths: DepthsRecord) -> Iterator[str]:
    for name, group in _groups(depths.texts, lambda text: text.class_name):
        lower = [math.exp(min(0.0, text.near_mass[0])) for text in group if text.near_mass is not None]
        if lower:
            yield (
                f"near mass, {name}: one sample is near-verbatim with probability {max(lower):.2g} or more for the"
                f" worst text, {median(lower):.2g} or more for the median one"
            )


def _alignment(depths: DepthsRecord) -> Iterator[str]:
    for name, group in _groups(depths.texts, lambda text: text.class_name):
        found = [text.alignment for text in group if text.alignment is not None]
        if found:
            yield (
                f"alignment, {name}: longest piece in common {max(e.common_tokens for e in found)} tokens,"
                f" {max(e.common_characters for e in found)} characters; blocks said in order cover up to"
                f" {max(e.covered for e in found):.0%} of a text, {median(e.covered for e in found):.0%} of the median"
            )


def _groups(records: Iterable[Record], key: Callable[[Record], Key]) -> Iterator[tuple[Key, list[Record]]]:
    """The records that have each key, in the order in which keys first appear."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    yield from groups.items()


_DEPTHS: dict[str, Callable[[DepthsRecord], Iterator[str]]] = {
    "membership": _membership,
    "prefix-sweep": _prefixes,
    "exposure": _exposure,
    "near-mass": _near_mass,
    "alignment": _alignment,
}
