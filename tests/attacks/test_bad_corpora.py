"""Corpora as they come: damaged, mixed, enormous. What can be read is read, the rest is named, and no text is shown."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from memscrub.errors import UsageError
from memscrub.texts import corpora
from memscrub.texts.corpora import FileEnd, Piece, find_files, read_file


def read(path: Path, **options: object) -> tuple[list[Piece], FileEnd]:
    (file,) = find_files([path])
    *pieces, end = read_file(file, **options)  # type: ignore[arg-type]
    assert isinstance(end, FileEnd)
    assert all(isinstance(piece, Piece) for piece in pieces)
    return pieces, end  # type: ignore[return-value]


def texts(path: Path) -> list[str]:
    return [piece.text for piece in read(path)[0]]


def whole(pieces: list[Piece]) -> str:
    """The document that the pieces were cut from."""
    return "".join(piece.text[piece.repeated :] for piece in pieces)


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    documents = ["First document.\nTwo lines.", "Zweites Dokument: süß", "第三の文書"]
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in documents).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[:50]) + gzip.compress(lines[50:]))
    packed = zstandard.ZstdCompressor()
    (tmp_path / "c.jsonl.zst").write_bytes(packed.compress(lines[:50]) + packed.compress(lines[50:]))
    parquet.write_table(arrow.table({"id": [1, 2, 3], "text": documents}), tmp_path / "d.parquet", row_group_size=1)
    for file in find_files([tmp_path]):
        pieces = [part for part in read_file(file) if isinstance(part, Piece)]
        assert [piece.text for piece in pieces] == documents, file.path
        assert [(piece.document, piece.line_of(3), piece.offset) for piece in pieces] == [
            (1, 1, 0),
            (2, 2, 0),
            (3, 3, 0),
        ]


def test_directories_are_read_in_order_of_names_and_no_file_twice(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.jsonl", "c.txt.gz", "notes.md", "b/model.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "twin.txt").symlink_to(tmp_path / "b" / "1.txt")
    found = find_files([tmp_path / "b", tmp_path, tmp_path / "a.jsonl"])
    assert [file.path.relative_to(tmp_path).as_posix() for file in found] == [
        "b/1.txt",
        "b/2.txt",
        "a.jsonl",
        "c.txt.gz",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing.txt", "no such file"), ("there.csv", "not known"), ("empty", "no corpus file"), ("pipe.txt", "no such")],
)
def test_what_cannot_be_a_corpus_is_refused_at_once(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "there.csv").write_text("text\n")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would wait for ever
    with pytest.raises(UsageError, match=words):
        find_files([tmp_path / name])


@pytest.mark.parametrize(("name", "module"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow.parquet")])
def test_a_reader_that_is_missing_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match="pip install"):
        find_files([tmp_path / name])


def test_bytes_of_another_encoding_are_replaced_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "mixed.txt"
    # Latin-1, then UTF-8 with a replacement character that stands in the file itself, then a cut-off character.
    path.write_bytes("Fläche\n".encode("latin-1") + "Fläche \ufffd\n".encode() + b"\xe2\x82")
    pieces, end = read(path)
    assert whole(pieces) == "Fl\ufffdche\nFläche \ufffd\n\ufffd"
    assert end == FileEnd(documents=1, empty=0, replaced=2, bad=0, first_bad=(), error=None)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
def test_where_chunks_end_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    data = "é \ufffd 𝄞\r\n".encode() * 5 + b"\xff\xfe\xe2\x82 " + b"x\r\ny\rz\r"
    path = tmp_path / "c.txt"
    path.write_bytes(data)
    expected = read(path)
    monkeypatch.setattr(corpora, "_CHUNK", chunk)
    pieces, end = read(path)
    assert (whole(pieces), end) == (whole(expected[0]), expected[1])
    assert "\r\n" not in whole(pieces)
    assert end.replaced == 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
def test_a_byte_order_mark_is_understood_and_dropped(tmp_path: Path, encoding: str) -> None:
    mark = "" if encoding == "utf-8-sig" else "\ufeff"
    (tmp_path / "a.txt").write_bytes((mark + "Grüße\n").encode(encoding))
    (tmp_path / "b.jsonl").write_bytes((mark + '{"text": "Grüße"}\n').encode(encoding))
    assert texts(tmp_path / "a.txt") == ["Grüße\n"]
    assert texts(tmp_path / "b.jsonl") == ["Grüße"]


def test_what_no_list_may_hold_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "half \\ud800 and nul \\u0000 and e\\u0301"}\n')
    pieces, end = read(path)
    assert whole(pieces) == "half \ufffd and nul \ufffd and é"
    assert end.replaced == 2


def test_broken_lines_are_counted_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "one"}\n{"text": "a secret that\n\n[1]\n{"txt": "other"}\n{"text": 5}\n'
        + '{"text": null}\n{"text": "  "}\n'
        + "[" * 100000
        + '\n{"text": "'
        + "1" * 20
        + '"}\n'
    )
    pieces, end = read(path)
    assert [(piece.text, piece.line) for piece in pieces] == [("one", 1), ("1" * 20, 10)]
    assert (end.documents, end.empty, end.bad, end.first_bad, end.error) == (2, 2, 5, (2, 4, 5), None)


def test_a_file_without_any_text_under_the_column_is_an_error_that_names_the_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a secret"}\n')
    _, end = read(path)
    assert end.error is not None
    assert "'text'" in end.error
    assert "secret" not in end.error
    pieces, end = read(path, column="body")
    assert ([piece.text for piece in pieces], end.error) == (["a secret"], None)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"body": ["a secret"]}, "no column 'text'"),
        ({"text": [[1, 2]]}, "does not hold texts"),
        ({"text": [1.5]}, "does not hold texts"),
    ],
)
def test_a_parquet_without_texts_says_which_column_it_wants(
    tmp_path: Path, table: dict[str, list[object]], words: str
) -> None:
    parquet.write_table(arrow.table(table), tmp_path / "a.parquet")
    pieces, end = read(tmp_path / "a.parquet")
    assert pieces == []
    assert end.error is not None
    assert words in end.error
    assert "--text-column" in end.error
    assert "secret" not in end.error


def test_parquet_rows_that_are_no_utf8_or_empty_cost_nothing_else(tmp_path: Path) -> None:
    raw = arrow.array([b"one", b"tw\xff", None, b""], arrow.binary())
    column = arrow.Array.from_buffers(arrow.string(), 4, raw.buffers(), null_count=1)
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
    pieces, end = read(tmp_path / "a.parquet")
    assert [piece.text for piece in pieces] == ["one", "tw\ufffd"]
    assert (end.documents, end.empty, end.replaced) == (2, 2, 1)
    for kind in (arrow.large_string(), arrow.string_view(), arrow.dictionary(arrow.int32(), arrow.string())):
        parquet.write_table(arrow.table({"text": arrow.array(["same", "same"]).cast(kind)}), tmp_path / "b.parquet")
        assert texts(tmp_path / "b.parquet") == ["same", "same"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut short", "overwritten", "not at all that"])
def test_damage_ends_a_file_and_keeps_what_came_before(tmp_path: Path, name: str, damage: str) -> None:
    lines = "".join(json.dumps({"text": os.urandom(60).hex()}) + "\n" for _ in range(4000)).encode()
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(lines))
    else:
        parquet.write_table(arrow.table({"text": lines.decode().split("\n")}), path, row_group_size=500)
    data = path.read_bytes()
    half = len(data) // 2
    broken = {"cut short": data[:half], "overwritten": data[:half] + b"\xa5" * 4000 + data[half + 4000 :]}
    path.write_bytes(broken.get(damage, b"this is plain text, whatever its name says"))
    pieces, end = read(path)
    assert end.error is not None
    if damage == "cut short" and name != "a.parquet":  # a Parquet file has its table of contents at its end
        assert end.documents > 1000
        assert len(pieces) == end.documents


def test_empty_files_and_blank_documents_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b" \n\t\n" * 100_000)
    (tmp_path / "c.jsonl").write_bytes(b"\n\n")
    ends = [read(tmp_path / name)[1] for name in ("a.txt", "b.txt", "c.jsonl")]
    assert [(end.documents, end.empty, end.error) for end in ends] == [(0, 1, None), (0, 1, None), (0, 0, None)]


def test_a_single_line_of_100_mb_is_read_in_pieces_at_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    size = 100_000_000
    with path.open("wb") as file:
        for _ in range(size // 10**6):
            file.write(b"wordswithout " * 76923 + b"x")
    (file_,) = find_files([path])
    tracemalloc.start()
    length = pieces = 0
    for part in read_file(file_):
        if isinstance(part, Piece):
            assert part.offset + part.repeated == length
            length += len(part.text) - part.repeated
            pieces += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert length == size
    assert pieces > 1000
    assert peak < 16 * 2**20


def test_a_json_line_longer_than_can_be_held_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "LONGEST_LINE", 3_000_000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "' + "x" * 4_000_000 + '"}\n{"text": "three"}\n')
    tracemalloc.start()
    pieces, end = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [piece.text for piece in pieces] == ["one", "three"]
    assert (end.documents, end.bad, end.first_bad) == (2, 1, (2,))
    assert peak < 10 * 2**20


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=400), st.integers(5, 40))
@settings(deadline=None)
def test_pieces_put_together_are_the_document(text: str, overlap: int) -> None:
    text = corpora._Tally().clean(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE", 4 * overlap)
        pieces = list(corpora._in_pieces([text[:100], text[100:]], 1, 1, True, overlap, corpora._Tally()))
    if not text.strip():
        assert pieces == []
        return
    assert all(text[p.offset : p.offset + len(p.text)] == p.text for p in pieces)
    assert all(p.line_of(len(p.text) - 1) == 1 + text.count("\n", 0, p.offset + len(p.text) - 1) for p in pieces)
    assert all(b.offset + b.repeated == a.offset + len(a.text) for a, b in pairwise(pieces)) or any(
        not text[p.offset : p.offset + 4 * overlap].strip() for p in pieces
    )
    shown = set().union(*(range(p.offset, p.offset + len(p.text)) for p in pieces))
    assert all(i in shown or text[i].isspace() for i in range(len(text)))


def test_no_repr_shows_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a secret sentence")
    assert "secret" not in repr(read(tmp_path / "a.txt"))
