"""Stretches of corpus text that a model gives away: which say nothing, and which of overlapping ones to keep; plain
values, knows no models and no files.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

LEAST_DISTINCT = 16
"""A stretch of fewer different tokens is a row of dashes, a table, a count: nobody's text."""
_PERIODIC = 0.8
_COMPRESSED = 0.3
_ZLIB_HEADER = 8


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch `[begin, end)` of one document, in characters, and the context it was given away in.

    `context` is where the model's input began, `lead` where an entry for the stretch would begin, so that
    context <= lead <= begin < end. `run`: longest piece emitted in it, in tokens. `text` is the document from
    `context` to `end`. `file` numbers the corpus files from 0, `document` and `line` are as in `corpora.Piece`.
    """

    file: int
    document: int
    line: int
    context: int
    lead: int
    begin: int
    end: int
    run: int
    trivial: bool
    text: str = field(repr=False)

    @property
    def given_away(self) -> str:
        """The text that comes out, without what led up to it."""
        return self.text[self.begin - self.context :]


def is_trivial(tokens: Sequence[int], text: str) -> bool:
    """Would any model emit this: few different tokens, one pattern over and over, or next to no information?"""
    distinct, count = len(set(tokens)), len(tokens)
    if distinct < LEAST_DISTINCT:
        return True
    # A period p with its share of exceptions has at most p + (1 - _PERIODIC)(count - p) different tokens.
    shortest = max(LEAST_DISTINCT, int((distinct - (1 - _PERIODIC) * count) / _PERIODIC))
    if any(_repeats(tokens, period) for period in range(shortest, count // 2 + 1)):
        return True
    data = text.encode("utf-8")
    return len(zlib.compress(data, 9)) - _ZLIB_HEADER < _COMPRESSED * len(data)


def _repeats(tokens: Sequence[int], period: int) -> bool:
    same = sum(a == b for a, b in zip(tokens, tokens[period:], strict=False))
    return same >= _PERIODIC * (len(tokens) - period)


def strongest(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Of stretches of one document the longest runs, without those of which others already cover half or more.

    A stretch stays whole, with the context it was given away in: another context may not call it up. One that says
    something goes before a trivial one. In order of place.
    """
    kept: list[tuple[int, int, Stretch]] = []  # by begin; the number keeps equal begins from being compared further
    ordered = sorted(stretches, key=lambda s: (s.trivial, -s.run, s.begin, s.context))
    widest = max((stretch.end - stretch.begin for stretch in ordered), default=0)
    for number, stretch in enumerate(ordered):
        covered = []
        for begin, _, other in kept[bisect_left(kept, (stretch.begin - widest,)) :]:
            if begin >= stretch.end:
                break
            covered.append((max(begin, stretch.begin), min(other.end, stretch.end)))
        if 2 * _length(covered) < stretch.end - stretch.begin:
            insort(kept, (stretch.begin, number, stretch))
    return [stretch for _, _, stretch in kept]


def _length(ranges: Sequence[tuple[int, int]]) -> int:
    """How much ranges in order of their begin cover together."""
    total, reached = 0, 0
    for begin, end in ranges:
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total
