"""What a model is fed of a corpus: windows over a piece of a document, and its answers as stretches of the text.

Knows tokens and characters, not the model. A text comes out where the model's input is like that of its training, so
a piece is read twice: in long windows, each with the tokens before it as context, and from every place where a text
may begin, with nothing before it. A memorized text that was put into a longer document often shows only there.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from memscrub.errors import UsageError
from memscrub.mining.stretches import Stretch, is_trivial
from memscrub.storage.untrusted_config import Encoding
from memscrub.texts.corpora import Piece

OPENINGS = {
    "none": None,
    "paragraphs": re.compile(r"(?:\A|\n)(?:[ \t\r]*\n)+"),
    "lines": re.compile(r"(?:[ \t\r]*\n)+"),
}
# A block with fewer characters ("}", "---") opens no window, and one that is opened has so many tokens at least: a
# text may begin with a line of its own.
_SHORT_BLOCK = 8
_OPENING_TOKENS = 64
# Runs in one window that are this close, in tokens, make one stretch.
_JOINED = 16
# More characters than any tokenizer puts into a token on average.
_CHARACTERS = 12


@dataclass(frozen=True)
class Windows:
    """How windows are laid: tokens each, tokens of context that overlap, run that counts, lead of an entry."""

    size: int
    overlap: int
    run: int
    lead: int
    openings: str

    def __post_init__(self) -> None:
        if self.openings not in OPENINGS:
            raise UsageError(f"--openings {self.openings} is not known; use one of {', '.join(OPENINGS)}.")
        if self.size < 2 * (self.overlap + self.run + 1):
            raise UsageError(
                f"windows of {self.size} tokens are too short for a run over {self.run} behind {self.overlap} tokens"
                " of overlap; raise --window (if the model reads that much), or lower --run or --overlap."
            )

    @property
    def stride(self) -> int:
        """Tokens from window to window: a run just over the limit lies whole, behind its context, in one of them."""
        return self.size - self.overlap - self.run - 1

    @property
    def repeated(self) -> int:
        """Characters that pieces of one document must share, so that nothing is lost where they meet."""
        return max(2048, 2 * _CHARACTERS * (self.overlap + self.run))


@dataclass(frozen=True, slots=True)
class Row:
    """One window: what the model is fed, and where that stands in the piece.

    `tokens` starts with the prompt; tokens from index `judged` on count. `encoding` is of the piece's text from
    character `base` on, and its token `start` is the first behind the prompt.
    """

    piece: Piece
    tokens: list[int] = field(repr=False)
    judged: int
    prompt: int
    encoding: Any = field(repr=False)
    base: int
    start: int

    @property
    def stop(self) -> int:
        """The token of `encoding` behind the last one."""
        return self.start + len(self.tokens) - self.prompt

    def begin_of(self, token: int) -> int:
        """Character of the piece where a token of the encoding begins, with the white space that is its own."""
        # Some tokenizers count the space before a word as nobody's: the end of the token before is where it begins.
        return self.base + (self.encoding.token_to_chars(token - 1)[1] if token else 0)

    def end_of(self, token: int) -> int:
        """Character of the piece behind a token of the encoding."""
        return self.base + int(self.encoding.token_to_chars(token)[1])


class Encoder:
    """The checkpoint's tokenizer, for several threads: its calls must not overlap."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> list[Any]:
        """An encoding (ids and places) of each text, without special tokens. Raises as `Encoding` does."""
        with self._lock, Encoding():
            encodings = self._tokenizer(list(texts), add_special_tokens=False, verbose=False).encodings
        assert encodings is not None, "memscrub loads fast tokenizers only"
        return list(encodings)


def rows_of(piece: Piece, windows: Windows, prompt: Sequence[int], encode: Encoder) -> tuple[list[Row], int]:
    """All windows over a piece, long ones first, and how many new tokens the piece has."""
    blocks = list(_blocks(piece, windows))
    least = max(_OPENING_TOKENS, 2 * windows.run)
    longest = _CHARACTERS * windows.size
    parts = [piece.text[b : b + min(longest, max(e - b, _CHARACTERS * least))] for b, e in blocks]
    whole, *opened = encode([piece.text, *parts])
    ids, rows = whole.ids, []
    start = 0
    while True:
        context = windows.overlap if start or piece.offset else 1
        rows.append(_row(piece, ids[start : start + windows.size], context, prompt, whole, 0, start))
        if start + windows.size >= len(ids):
            break
        start += windows.stride
    for (begin, end), encoding in zip(blocks, opened, strict=True):
        last = encoding.char_to_token(end - begin - 1)
        count = min(windows.size, max(least, windows.size if last is None else last + 1))
        rows.append(_row(piece, encoding.ids[:count], 1, prompt, encoding, begin, 0))
    repeated = whole.char_to_token(piece.repeated) if piece.repeated else 0
    return [row for row in rows if len(row.tokens) - row.judged > windows.run], len(ids) - (repeated or 0)


def _row(
    piece: Piece, ids: list[int], context: int, prompt: Sequence[int], encoding: Any, base: int, start: int
) -> Row:
    return Row(piece, [*prompt, *ids], len(prompt) + context, len(prompt), encoding, base, start)


def _blocks(piece: Piece, windows: Windows) -> Iterator[tuple[int, int]]:
    """Blocks of lines, in characters of the piece, that open a window; those near its ends are the neighbour's."""
    pattern = OPENINGS[windows.openings]
    if pattern is None:
        return
    half = windows.repeated // 2
    first = max(1, piece.repeated - half) if piece.offset else 1
    least = len(piece.text) if piece.last else len(piece.text) - half
    starts = [match.end() for match in pattern.finditer(piece.text)]
    for begin, following in pairwise([*starts, len(piece.text)]):
        end = begin + len(piece.text[begin:following].rstrip())
        if first <= begin < least and end - begin >= _SHORT_BLOCK:
            yield begin, end


def grown(row: Row, begin: int, windows: Windows, encode: Encoder) -> Row | None:
    """A window for a run that reaches this row's end, from token `begin` of the encoding on; None if the text ends.

    An opening is read on from where it opens, a long window from the run's own context.
    """
    if row.base:
        text = row.piece.text[row.base : row.base + _CHARACTERS * windows.size]
        (encoding,) = encode([text])
        longer = _row(row.piece, encoding.ids[: windows.size], 1, row.tokens[: row.prompt], encoding, row.base, 0)
        return longer if len(longer.tokens) > len(row.tokens) else None
    start = max(row.start, begin - windows.overlap)
    ids = row.encoding.ids[start : start + windows.size]
    if start + len(ids) <= row.stop:
        return None
    context = max(1, min(windows.overlap, begin - start))
    return _row(row.piece, ids, context, row.tokens[: row.prompt], row.encoding, 0, start)


def runs_of(row: Row, emitted: Sequence[bool], least: int) -> list[tuple[int, int]]:
    """Token ranges of the encoding that are emitted running, longer than `least`; `emitted` from `judged` on."""
    shift = row.start + row.judged - row.prompt
    found, begin = [], None
    for i, said in enumerate([*emitted, False]):
        if said and begin is None:
            begin = i
        elif not said and begin is not None:
            if i - begin > least:
                found.append((begin + shift, i + shift))
            begin = None
    return found


def stretches_of(row: Row, runs: Sequence[tuple[int, int]], file: int, lead: int) -> list[Stretch]:
    """The runs of a window as stretches of its document, those close together as one."""
    joined: list[list[tuple[int, int]]] = []
    for run in runs:
        if joined and run[0] - joined[-1][-1][1] <= _JOINED:
            joined[-1].append(run)
        else:
            joined.append([run])
    return [_stretch(row, group, file, lead) for group in joined]


def _stretch(row: Row, group: Sequence[tuple[int, int]], file: int, lead: int) -> Stretch:
    first, last = group[0][0], group[-1][1]
    ids = row.tokens[first - row.start + row.prompt : last - row.start + row.prompt]
    context, begin, end = row.begin_of(row.start), row.begin_of(first), row.end_of(last - 1)
    piece = row.piece
    return Stretch(
        file=file,
        document=piece.document,
        line=piece.line_of(begin),
        context=piece.offset + context,
        lead=piece.offset + row.begin_of(max(row.start, first - lead)),
        begin=piece.offset + begin,
        end=piece.offset + end,
        run=max(b - a for a, b in group),
        trivial=is_trivial(ids, piece.text[begin:end]),
        text=piece.text[context:end],
    )
