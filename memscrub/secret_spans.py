"""The marked secrets of a text as character spans that survive normalisation; knows one row at a time."""

from __future__ import annotations

import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

from memscrub.text_files import Row, refusal

Spans = tuple[tuple[int, int], ...]


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
    mapped = tuple((_normal_offset(written, start, -1), _normal_offset(written, end, 1)) for start, end in spans)
    # Checked after normalisation too: two spans may share one composed character.
    for both in (spans, mapped):
        for (_, end), (start, _) in pairwise(both):
            if start < end:
                raise refusal(path, row.line, "two secrets overlap; mark each character once, or join the two.")
    return mapped


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(offset) is int for offset in value)


def _normal_offset(written: str, offset: int, step: int) -> int:
    """Where `offset` falls in the NFC text; moved by `step` out of a sequence that composes to one character.

    A text may be cut at an offset exactly when both sides, normalised apart, join to the normalised whole.
    """
    whole = unicodedata.normalize("NFC", written)
    if whole == written:
        return offset
    while 0 < offset < len(written):
        before, after = (unicodedata.normalize("NFC", side) for side in (written[:offset], written[offset:]))
        if before + after == whole:
            break
        offset += step
    return len(unicodedata.normalize("NFC", written[:offset]))
