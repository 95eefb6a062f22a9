"""Texts in Unicode's NFC, in time that grows with their length; knows characters, not what the texts are for.

`unicodedata.normalize` sorts every run of combining marks by insertion: 40,000 accents in a row, 160 KB of text, take
it seconds and a megabyte minutes. Whoever can put a line into a corpus could stop a run with it. Long runs are sorted
here first, by the standard's own rule, and the library has nothing left to move.
"""

from __future__ import annotations

import re
import unicodedata

# No combining mark is a word character. Shorter runs cost nothing; longer ones are mostly rows of dashes.
_RUN = re.compile(r"(?<!\W)\W{256,}")


def nfc(text: str) -> str:
    """The text in NFC: what `unicodedata.normalize("NFC", text)` gives."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", _RUN.sub(lambda run: _ordered(run[0]), text))


def _ordered(run: str) -> str:
    """The run decomposed, each stretch of combining marks in the order of their classes (canonical ordering)."""
    out: list[str] = []
    marks: list[str] = []
    for character in run:
        for part in unicodedata.normalize("NFD", character):
            if unicodedata.combining(part):
                marks.append(part)
            else:
                out += sorted(marks, key=unicodedata.combining)
                out.append(part)
                marks = []
    return "".join(out + sorted(marks, key=unicodedata.combining))
