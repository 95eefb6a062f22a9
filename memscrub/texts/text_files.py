"""Rows of texts from .txt, .jsonl, .csv and .parquet files, one at a time, with the line each came from;
knows file formats, not what the texts are for.

Errors name file and line and never repeat what stands there: it is the very text that must not leak.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from memscrub.errors import ProtectedTextError

FORMATS = ".txt, .jsonl, .csv (each also .gz) or .parquet"
LONGEST_LINE = 1 << 24
"""Bytes of a line of JSON or CSV; parsed it may take 20 times as much memory."""
LONGEST_TEXT = 1 << 27
"""Bytes of a line or a block of plain text, a little more counted for every line."""
# A line costs that much beyond its characters.
_LINE_ITSELF = 64
# What a small packed file may unpack to: text that repeats itself packs 50 to 1, a file that is made to harm 1000 to 1.
_UNPACKED, _RATIO = 1 << 26, 200
BOMB = f"unpacks to more than {_RATIO} times its size; name a file that holds texts."


@dataclass(frozen=True, slots=True)
class Row:
    """The fields of one text as the file gives them, not yet checked, and the line they begin on."""

    values: dict[str, Any]
    line: int

    def __repr__(self) -> str:
        return f"Row({len(self.values)} fields, line {self.line})"


def refusal(path: Path, line: int, message: str) -> ProtectedTextError:
    """The error for a place in a list of texts; `message` must not repeat what stands there."""
    return ProtectedTextError(f"{path}:{line}: {message}")


def read_rows(path: Path) -> Iterator[Row]:
    """Every text of one file, in order; refuses a file without any."""
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    reader = _READERS.get(suffix.lower())
    if reader is None or (reader is _parquet_rows and path.suffix != suffix):
        raise ProtectedTextError(f"{path}: this kind of file is not known; use {FORMATS}.")
    empty = True
    for row in reader(path):
        empty = False
        yield row
    if empty:
        raise refusal(path, 1, "the file holds no text; add some, or take the file out of the policy.")


def _lines(path: Path, longest: int = LONGEST_LINE) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends, decoded one by one so that a bad byte has a line."""
    number = unpacked = 0
    try:
        with _open(path) as file:
            most = most_unpacked(path)
            for number, raw in enumerate(iter(lambda: file.readline(longest + 1), b""), 1):
                unpacked += len(raw)
                if len(raw) > longest:
                    raise refusal(path, number, f"a line of more than {longest >> 20} MiB; break it into texts.")
                if unpacked > most:
                    raise refusal(path, number, BOMB)
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise refusal(path, number, "not valid UTF-8; save the file as UTF-8 text.") from None
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise refusal(path, number + 1, "the compressed data is damaged; compress the file again.") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def most_unpacked(path: Path) -> int:
    """Bytes that the texts of this file may come to before it is refused as a `BOMB`."""
    return max(_UNPACKED, _RATIO * path.stat().st_size)


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    return open(path, "rb")


def _unreadable(path: Path, error: OSError) -> ProtectedTextError:
    if isinstance(error, FileNotFoundError):
        return ProtectedTextError(f"{path}: there is no such file; check the path.")
    if isinstance(error, IsADirectoryError):
        return ProtectedTextError(f"{path}: this is a directory; name the files in it.")
    return ProtectedTextError(f"{path}: the file cannot be read ({error.strerror}); check its permissions.")


def _txt_rows(path: Path) -> Iterator[Row]:
    """One text per block of lines; lines of nothing but white space separate blocks."""
    block: list[str] = []
    start = size = 0
    for number, line in _lines(path, LONGEST_TEXT):
        content = line.removesuffix("\n").removesuffix("\r")
        if content.strip():
            start = start if block else number
            block.append(content)
            size += len(content) + _LINE_ITSELF
            if size > LONGEST_TEXT:
                message = f"a text of more than {LONGEST_TEXT >> 20} MiB; part texts by an empty line."
                raise refusal(path, start, message)
        elif block:
            yield Row({"text": "\n".join(block)}, start)
            block, size = [], 0
    if block:
        yield Row({"text": "\n".join(block)}, start)


class _DuplicateKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _DuplicateKeyError
    return values


def _not_a_number(_: str) -> Any:
    raise ValueError


def _jsonl_rows(path: Path) -> Iterator[Row]:
    """One JSON object per line; blank lines are skipped."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_object, parse_constant=_not_a_number)
        except _DuplicateKeyError:
            raise refusal(path, number, "a key appears twice in this line; keep one of the two.") from None
        except json.JSONDecodeError as error:
            hint = 'write one object per line, for example {"id": "a", "text": "..."}.'
            raise refusal(path, number, f"not valid JSON at column {error.colno}; {hint}") from None
        except (ValueError, RecursionError):
            raise refusal(path, number, "a number or a list in this JSON is out of range; simplify it.") from None
        if not isinstance(values, dict):
            hint = 'write one object per line, for example {"id": "a", "text": "..."}, and no list around them.'
            raise refusal(path, number, f"this line is not a JSON object; {hint}")
        yield Row(values, number)


def _csv_rows(path: Path) -> Iterator[Row]:
    """Comma-separated with a header; an empty cell is an absent value, `secret` is written as JSON."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if cells and header is None:
                header = _header(path, line, cells)
            elif cells and header is not None:
                if len(cells) != len(header):
                    message = f"{len(cells)} cells under {len(header)} columns; put a text with commas in quotes."
                    raise refusal(path, line, message)
                values: dict[str, Any] = {k: v for k, v in zip(header, cells, strict=True) if v != ""}
                yield Row(_with_secret(path, line, values), line)
            line = reader.line_num + 1
    except csv.Error:
        hint = f"check its quotes; a cell takes {csv.field_size_limit()} characters at most, a .jsonl line any."
        raise refusal(path, line, f"not valid CSV; {hint}") from None


def _header(path: Path, line: int, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    if "text" not in header:
        raise refusal(path, line, "the first line must name the columns; call the one with the texts 'text'.")
    if len(set(header)) < len(header):
        raise refusal(path, line, "two columns have the same name; rename or drop one.")
    return header


def _with_secret(path: Path, line: int, values: dict[str, Any]) -> dict[str, Any]:
    if "secret" not in values:
        return values
    try:
        return {**values, "secret": json.loads(values["secret"])}
    except (ValueError, RecursionError):
        message = "secret must be JSON in a cell; write for example [[12, 20]] with character offsets."
        raise refusal(path, line, message) from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file; its 'line' is the row's number."""
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        message = "reading Parquet needs an extra; run pip install 'memscrub[parquet]', or use .jsonl."
        raise ProtectedTextError(f"{path}: {message}") from None
    number = unpacked = 0
    try:
        most = most_unpacked(path)
        with parquet.ParquetFile(os.fspath(path)) as file:
            if "text" not in file.schema_arrow.names:
                raise refusal(path, 1, "there is no column 'text'; call the one with the texts 'text'.")
            # Few rows at a time: one long text that stands in every row is stored once.
            for batch in file.iter_batches(batch_size=64):
                for values in batch.to_pylist():
                    number += 1
                    unpacked += sum(len(value) for value in values.values() if isinstance(value, str))
                    if unpacked > most:
                        raise refusal(path, number, BOMB)
                    yield Row(values, number)
    except arrow.ArrowException:
        raise refusal(path, number + 1, "not valid Parquet; write the file again.") from None
    except UnicodeDecodeError:
        raise refusal(path, number + 1, "not valid UTF-8; write the file again with UTF-8 texts.") from None
    except OSError as error:
        raise _unreadable(path, error) from None


_READERS = {".txt": _txt_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
