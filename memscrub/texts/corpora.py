"""Documents of a training corpus, streamed in pieces of bounded size from .txt, .jsonl and .parquet files, packed or
not; knows file formats and places, nothing of models or tokens.

A corpus is not a list somebody wrote by hand: damage is expected. A line that cannot be read is counted and skipped,
bytes that are no UTF-8 are replaced and counted, a file that cannot be read on ends there, and what came before counts.
No message repeats what stands in a file.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from memscrub.errors import UsageError
from memscrub.texts.normal_form import nfc

FORMATS = ".txt or .jsonl (each also .gz or .zst), or .parquet"
PIECE = 2**16
"""New characters of a piece, about: 16,000 tokens of English, so that a piece is worth a few batches."""
LONGEST_LINE = 2**24
"""Characters of a JSON line, which has to be held whole, and may take 20 times as much when it is parsed; a longer one
is counted as unreadable."""
# A file is given up when it begins with so many lines without a text.
HOPELESS = 10_000
_CHUNK = 2**20
# What Unicode text must not contain, and no protected list may: half characters (JSON can spell them) and NUL.
_BROKEN = re.compile("[\ud800-\udfff\0]")
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file to read: its format (suffix without packing) and packing ("", ".gz", ".zst"), size and time of change."""

    path: Path
    format: str
    packing: str
    size: int
    changed: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one document, which is its file's `document`-th and begins in line (or row) `line`.

    `offset` is where `text` begins, in characters (NFC) of the document. The first `repeated` characters were the end
    of the piece before; `last`: the document ends with this one. `by_lines`: `line` is that of `text`, and line breaks
    in `text` count on. `read`: bytes of the file read so far.
    """

    document: int
    line: int
    offset: int
    repeated: int
    text: str = field(repr=False)
    last: bool
    by_lines: bool
    read: int

    def line_of(self, character: int) -> int:
        """The line or row in the file of a character of `text`."""
        return self.line + (self.text.count("\n", 0, character) if self.by_lines else 0)


@dataclass(frozen=True, slots=True)
class FileEnd:
    """What a file held: documents with text, empty ones, characters replaced, and unreadable lines or rows.

    `first_bad` are the numbers of the first of these lines. `error` says why the file could not be read to its end.
    """

    documents: int
    empty: int
    replaced: int
    bad: int
    first_bad: tuple[int, ...]
    error: str | None


class _DamagedError(Exception):
    """The file cannot be read on; the message is for the user."""


class _Tally:
    def __init__(self) -> None:
        self.documents = self.empty = self.replaced = self.bad = self.read = 0
        self.first_bad: list[int] = []

    def skip(self, line: int) -> None:
        self.bad += 1
        if len(self.first_bad) < 3:
            self.first_bad.append(line)

    def clean(self, text: str) -> str:
        """NFC, without what no text may contain."""
        text, broken = _BROKEN.subn(_REPLACEMENT, text)
        self.replaced += broken
        return nfc(text)


def find_files(paths: Sequence[Path]) -> tuple[CorpusFile, ...]:
    """The files of a corpus: those named, and in directories all of a known kind, in order of their names.

    A file that is met twice is read once. Raises UsageError where nothing is to be read or a reader is missing.
    """
    found: dict[Path, CorpusFile] = {}
    for path in paths:
        if path.is_dir():
            inside = [each for each in _walk(path) if _kind(each) is not None]
            if not inside:
                raise UsageError(f"{path}: there is no corpus file in this directory; it takes {FORMATS}.")
        elif path.is_file():
            inside = [path]
        else:
            raise UsageError(f"{path}: there is no such file or directory; check the path.")
        for each in inside:
            kind = _kind(each)
            if kind is None:
                raise UsageError(f"{each}: this kind of file is not known; use {FORMATS}.")
            state = each.stat()
            found.setdefault(each.resolve(), CorpusFile(each, *kind, state.st_size, state.st_mtime_ns))
    _check_readers(found.values())
    return tuple(found.values())


def _walk(root: Path) -> Iterator[Path]:
    def refuse(problem: OSError) -> None:
        raise UsageError(f"{problem.filename}: the directory cannot be listed ({problem.strerror}).") from None

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders.sort()
        yield from (path for name in sorted(names) if (path := Path(folder, name)).is_file())


def _kind(path: Path) -> tuple[str, str] | None:
    packing = path.suffix.lower() if path.suffix.lower() in (".gz", ".zst") else ""
    suffix = (Path(path.stem).suffix if packing else path.suffix).lower()
    known = suffix in (".txt", ".jsonl") or (suffix == ".parquet" and not packing)
    return (suffix, packing) if known else None


def _check_readers(files: Iterable[CorpusFile]) -> None:
    for file in files:
        needs = [("pyarrow.parquet", "'memscrub[parquet]'")] if file.format == ".parquet" else []
        needs += [("zstandard", "zstandard")] if file.packing == ".zst" else []
        for module, package in needs:
            try:
                importlib.import_module(module)
            except ImportError:
                raise UsageError(f"{file.path}: reading this needs a package; run pip install {package}.") from None


def read_file(file: CorpusFile, *, column: str = "text", overlap: int = 2048) -> Iterator[Piece | FileEnd]:
    """The documents of a file in pieces of about `PIECE` characters, in order; last, what the file held.

    Every piece after a document's first repeats `overlap` characters. A .txt file is one document; in .jsonl and
    .parquet a document is what line or row hold under `column`. Memory: a few pieces, or the longest line of JSON.
    """
    tally, error = _Tally(), None
    reader = {".txt": _plain, ".jsonl": _json_lines, ".parquet": _parquet}[file.format]
    try:
        for number, line, parts in reader(file, column, tally):
            blank = True
            for piece in _in_pieces(parts, number, line, file.format == ".txt", overlap, tally):
                blank = False
                yield piece
            tally.documents += not blank
            tally.empty += blank
    except _DamagedError as damage:
        error = str(damage)
    except OSError as problem:
        error = f"it cannot be read ({problem.strerror or 'the data is damaged'})"
    if error is None and tally.bad and not tally.documents:
        error = f"no line of it holds a text under '{column}'"
    yield FileEnd(tally.documents, tally.empty, tally.replaced, tally.bad, tuple(tally.first_bad), error)


def _in_pieces(
    parts: Iterable[str], document: int, line: int, by_lines: bool, overlap: int, tally: _Tally
) -> Iterator[Piece]:
    """One document, whose text comes in `parts`, in pieces; blank pieces are left out."""
    size = max(PIECE, 4 * overlap)
    buffer, offset, repeated = "", 0, 0

    def piece(text: str, last: bool = False) -> Iterator[Piece]:
        if text.strip():
            yield Piece(document, line, offset, repeated, text, last, by_lines, tally.read)

    for part in parts:
        buffer += part
        start = 0
        while len(buffer) - start > size + overlap:
            end = start + _cut(buffer[start : start + size])
            yield from piece(buffer[start:end])
            line += buffer.count("\n", start, end - overlap) if by_lines else 0
            offset, repeated, start = offset + end - overlap - start, overlap, end - overlap
        buffer = buffer[start:]
    yield from piece(buffer, last=True)


def _cut(text: str) -> int:
    """Where to end a piece: behind a line or a word if there is one in its last eighth."""
    least = len(text) - len(text) // 8
    for mark in ("\n", " "):
        if (found := text.rfind(mark, least)) >= 0:
            return found + 1
    return len(text)


def _bytes(file: CorpusFile, tally: _Tally) -> Iterator[bytes]:
    """The unpacked bytes, in chunks."""
    with open(file.path, "rb") as raw:
        chunks = _unzstd(raw) if file.packing == ".zst" else _read(raw, file.packing)
        try:
            for chunk in chunks:
                tally.read = raw.tell()
                yield chunk
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise _DamagedError("the compressed data is damaged") from None


def _read(raw: IO[bytes], packing: str) -> Iterator[bytes]:
    # read1: `read` would throw away what it has when it comes upon damage.
    source: Any = gzip.GzipFile(fileobj=raw) if packing == ".gz" else raw
    while chunk := source.read1(_CHUNK):
        yield chunk


def _unzstd(raw: IO[bytes]) -> Iterator[bytes]:
    # Not its stream_reader, which takes a file that was cut short for a whole one. 4 KiB hold 128 MB at most.
    zstandard = importlib.import_module("zstandard")
    frame = None
    try:
        while packed := raw.read(4096):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError:
        raise EOFError from None
    if frame is not None:
        raise EOFError


def _characters(file: CorpusFile, tally: _Tally) -> Iterator[str]:
    """Decoded text in chunks: UTF-8, or UTF-16 where a byte order mark says so; what is neither is replaced."""
    decoder, genuine, tail = None, 0, b""
    for chunk in _bytes(file, tally):
        if decoder is None:
            encoding = "utf-16" if chunk[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
            decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        text = decoder.decode(chunk)
        genuine = (tail + chunk).count(b"\xef\xbf\xbd")  # written so in the file: nothing that we replaced
        tail = (tail + chunk)[-2:]
        tally.replaced += max(0, text.count(_REPLACEMENT) - genuine)
        yield text
    if decoder is not None and (rest := decoder.decode(b"", final=True)):
        tally.replaced += rest.count(_REPLACEMENT)
        yield rest


def _plain(file: CorpusFile, column: str, tally: _Tally) -> Iterator[tuple[int, int, Iterable[str]]]:
    def parts() -> Iterator[str]:
        held = ""  # the two halves of a line end may come in two chunks
        for text in _characters(file, tally):
            text = held + text
            held = "\r" if text.endswith("\r") else ""
            yield tally.clean((text[:-1] if held else text).replace("\r\n", "\n"))
        yield held

    yield 1, 1, parts()


def _json_lines(file: CorpusFile, column: str, tally: _Tally) -> Iterator[tuple[int, int, Iterable[str]]]:
    for number, line in enumerate(_lines(_characters(file, tally)), 1):
        if line is not None and not line.strip():
            continue
        text = None if line is None else _field(line, column)
        if text is None:
            tally.skip(number)
            if tally.bad == HOPELESS and not tally.documents and not tally.empty:
                raise _DamagedError(f"none of its first {number:,} lines holds a text under '{column}'")
        else:
            yield number, number, (tally.clean(text),)


def _lines(chunks: Iterable[str]) -> Iterator[str | None]:
    """Lines without their ends; None for one that is too long to be held."""
    parts: list[str] = []
    length = 0
    for chunk in chunks:
        *ended, rest = chunk.split("\n")
        for end in ended:
            yield "".join((*parts, end)) if length + len(end) <= LONGEST_LINE else None
            parts, length = [], 0
        length += len(rest)
        parts = [*parts, rest] if length <= LONGEST_LINE else []
    if length:
        yield "".join(parts) if length <= LONGEST_LINE else None


def _field(line: str, column: str) -> str | None:
    """The text of a JSON line, "" where it is null; None where the line is no object with a text."""
    if not line.lstrip().startswith("{"):
        return None  # spares json.loads, which would make an error with its place for every such line
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or column not in values:
        return None
    text = values[column]
    return "" if text is None else text if isinstance(text, str) else None


def _parquet(file: CorpusFile, column: str, tally: _Tally) -> Iterator[tuple[int, int, Iterable[str]]]:
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(os.fspath(file.path)) as source:
            rows = max(1, source.metadata.num_rows)
            if column not in source.schema_arrow.names:
                raise _DamagedError(f"there is no column '{column}' in it; name another with --text-column")
            for batch in source.iter_batches(batch_size=64, columns=[column]):
                # As bytes: a row that is no UTF-8 must not cost the others.
                for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                    number += 1
                    tally.read = file.size * number // rows
                    text = (value or b"").decode("utf-8", errors="replace")
                    tally.replaced += text.count(_REPLACEMENT) - (value or b"").count(b"\xef\xbf\xbd")
                    yield number, number, (tally.clean(text),)
    except (arrow.ArrowNotImplementedError, arrow.ArrowTypeError):
        raise _DamagedError(f"the column '{column}' does not hold texts; name another with --text-column") from None
    except (arrow.ArrowException, UnicodeDecodeError):  # the names of columns are decoded by Python
        raise _DamagedError(f"it is not valid Parquet (from row {number + 1} on)") from None
