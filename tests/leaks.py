"""Looks for protected text in what a program wrote: any four words running, sixteen characters, or four token ids."""

from __future__ import annotations

import html
import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

WORDS = 4
CHARACTERS = 16
IDS = 4


def leaks(written: str, texts: Iterable[str], ids: Iterable[Sequence[int]] = ()) -> list[str]:
    """What of these texts and token ids stands in `written`, whatever escapes, wraps or separates it."""
    plain = list(_variants(written))
    closed = ["".join(each.split()) for each in plain]
    pieces = re.findall(r"[0-9]+|[^0-9,\s\[\]()]+", plain[0])
    numbers = f" {' '.join(pieces)} "
    found = []
    for text in texts:
        words = text.split()
        runs = (" ".join(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1))
        found += [run for run in runs if any(run in each for each in plain)]
        if len(words) < WORDS:
            joined = "".join(words)
            slices = (joined[at : at + CHARACTERS] for at in range(max(1, len(joined) - CHARACTERS + 1)))
            found += [piece for piece in slices if any(piece in each for each in closed)]
    for row in ids:
        runs = (" ".join(map(str, row[at : at + IDS])) for at in range(len(row) - IDS + 1))
        found += [run for run in runs if f" {run} " in numbers]
    return found


def _variants(written: str) -> Iterator[str]:
    """As it stands, without the escapes of JSON and HTML, without those of Markdown, and a list of tokens as words;
    white space is one blank."""
    unescaped = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), html.unescape(written))
    bare = unescaped.replace("\\", "")
    for form in (written, unescaped, bare, re.sub(r"[\"',\[\](){}Ġ▁]+", " ", bare)):
        yield " ".join(form.split())


def readable(path: Path) -> str:
    """A file as text; of a safetensors file its header alone, for the rest is numbers."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        (size,) = struct.unpack("<Q", data[:8])
        header = data[8 : 8 + size]
        assert isinstance(json.loads(header), dict)
        return header.decode("utf-8")
    return data.decode("utf-8", errors="replace")
