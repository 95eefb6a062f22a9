"""The marked secrets of a text as character spans that survive normalisation; knows one row at a time."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from memscrub.texts.normal_form import nfc
from memscrub.texts.text_files import Row, refusal

Spans = tuple[tuple[int, int], ...]

# Characters on each side of an offset that decide whether a text may be cut there: far more than compose to one.
_WINDOW = 64


def secret_spans(path: Path, row: Row, written: str) -> Spans:
    """The marked spans, sorted, as offsets into the normalised text."""
    value = row.values.get("secret")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(_is_span(span) for span in value):
        message = "secret must be a list of [start, end] character offsets; write for example [[12, 20]]."
        raise refusal(path, row.line, message)
    spans = sorted((start, end) for start, end in value)
    for start, end in spans:
        if not 0 <= start < end <= len(written):
            size = f"the text has {len(written)} characters"
            wrong = f"secret [{start}, {end}] is outside its text or empty"
            message = f"{wrong}; {size}, offsets count from 0 and the end is excluded."
            raise refusal(path, row.line, message)
    _check_apart(path, row, spans)
    try:
        mapped = _normal_spans(written, spans)
    except ValueError:
        message = f"a secret ends among more than {_WINDOW} accents on one letter; take the accents away."
        raise refusal(path, row.line, message) from None
    _check_apart(path, row, mapped)  # two spans may share one composed character
    return mapped


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(offset) is int for offset in value)


def _check_apart(path: Path, row: Row, spans: Sequence[tuple[int, int]]) -> None:
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise refusal(path, row.line, "two secrets overlap; mark each character once, or join the two.")


def _normal_spans(written: str, spans: Sequence[tuple[int, int]]) -> Spans:
    """Where the spans fall in the NFC text, widened to whole composed characters; one pass over the text."""
    if nfc(written) == written:
        return tuple(spans)
    cuts = [(_cut(written, start, -1), _cut(written, end, 1)) for start, end in spans]
    normal = {}
    before = length = 0
    for offset in sorted({offset for cut in cuts for offset in cut}):
        length += len(nfc(written[before:offset]))
        normal[offset] = length
        before = offset
    return tuple((normal[start], normal[end]) for start, end in cuts)


def _cut(written: str, offset: int, step: int) -> int:
    """`offset`, moved by `step` out of a sequence that composes to one character.

    A text may be cut at an offset exactly when both sides, normalised apart, join to the normalised whole. The nearest
    characters decide that, unless all of them are combining marks: then ValueError is raised.
    """
    while 0 < offset < len(written):
        left, right = written[max(0, offset - _WINDOW) : offset], written[offset : offset + _WINDOW]
        if len(left) == _WINDOW and all(map(unicodedata.combining, left)):
            raise ValueError("more combining marks than are looked at")
        if nfc(left) + nfc(right) == nfc(left + right):
            break
        offset += step
    return offset
