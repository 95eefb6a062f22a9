"""Lists of texts: formats, rules, messages that repeat no text, and secrets that survive normalisation."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memscrub.errors import ExitCode, ProtectedTextError, UsageError
from memscrub.policy.document import Policy, parse_policy
from memscrub.texts.protected import (
    ProtectedText,
    iter_texts,
    keyed_id,
    list_digest,
    load_controls,
    load_protected,
    load_texts,
)

ONE_CLASS = "[class.copyright]\nmax_verbatim_tokens = 8\n"
TWO_CLASSES = ONE_CLASS + "[class.pii]\nsecret = true\n"


def policy_for(path: Path, classes: str = ONE_CLASS) -> Policy:
    files = f'files = ["{path.name}"]\ncontrols = ["{path.name}"]\n'
    return parse_policy(f'schema = 1\nname = "n"\n[protected]\n{files}{classes}'.encode(), path.parent / "p.toml")


def texts_of(path: Path, data: str | bytes, classes: str = ONE_CLASS) -> tuple[ProtectedText, ...]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return load_protected(policy_for(path, classes)).texts


def line(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


def test_a_jsonl_line_is_read_with_all_its_fields(tmp_path: Path) -> None:
    data = "\n" + line(id="a", text=" key 1234", **{"class": "pii"}, secret=[[5, 9]], source="s", prefix=" key")
    (text,) = texts_of(tmp_path / "p.jsonl", data, TWO_CLASSES)
    assert text.id == "a"
    assert text.text == " key 1234"
    assert text.class_name == "pii"
    assert text.secrets == ((5, 9),)
    assert (text.source, text.prefix) == ("s", " key")
    assert (text.file, text.line) == (str(tmp_path / "p.jsonl"), 2)


def test_a_txt_file_has_one_text_per_block(tmp_path: Path) -> None:
    data = "\ufeff\r\n first\r\nsecond line\r\n \t\r\n\r\nthird"
    texts = texts_of(tmp_path / "p.txt", data)
    assert [(t.id, t.text, t.line) for t in texts] == [("p-1", " first\nsecond line", 2), ("p-2", "third", 6)]


def test_a_csv_file_has_columns_and_texts_over_several_lines(tmp_path: Path) -> None:
    with open(tmp_path / "p.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text", "class", "secret"], ["a", "two\nlines, 77", "pii", "[[11, 13]]"]])
        writer.writerow(["", "other", "copyright", ""])
    texts = texts_of(tmp_path / "p.csv", (tmp_path / "p.csv").read_bytes(), TWO_CLASSES)
    assert [(t.id, t.text, t.secrets, t.line) for t in texts] == [
        ("a", "two\nlines, 77", ((11, 13),), 2),
        ("p-2", "other", (), 4),
    ]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    texts = texts_of(tmp_path / "p.jsonl.gz", gzip.compress(line(text="hello").encode()))
    assert [(t.id, t.text) for t in texts] == [("p-1", "hello")]


def test_parquet_is_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "key 12", "secret": [[4, 6]], "id": "a"}, {"text": "other", "secret": None, "id": None}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    texts = load_protected(policy_for(tmp_path / "p.parquet")).texts
    assert [(t.id, t.text, t.secrets, t.line) for t in texts] == [
        ("a", "key 12", ((4, 6),), 1),
        ("p-2", "other", (), 2),
    ]
    (tmp_path / "p.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(ProtectedTextError, match="not valid Parquet"):
        load_protected(policy_for(tmp_path / "p.parquet"))


def test_parquet_without_its_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ProtectedTextError, match=r"run pip install 'memscrub\[parquet\]', or use \.jsonl"):
        load_texts([tmp_path / "p.parquet"])


def test_a_very_long_line_is_read(tmp_path: Path) -> None:
    (text,) = texts_of(tmp_path / "p.jsonl", line(text="x y " * 1_000_000))
    assert len(text.text) == 4_000_000


SECRET = "s3cr3t-words"
# What follows is decoded from JSON or bytes; each has the protected words in it, which no message may repeat.
BAD: dict[str, tuple[str, str | bytes, str]] = {
    "unknown key": (
        "p.jsonl",
        line(text="x", **{"class": "copyright"}) + line(text=SECRET, secert=[[0, 2]]),
        ":2: unknown key 'secert'; did you mean 'secret'?",
    ),
    "a text as key": (
        "p.jsonl",
        line(**{SECRET: 1, "text": "x"}),
        ":1: unknown key; known here: id, text, class, prefix, secret, source.",
    ),
    "missing text": (
        "p.jsonl",
        line(id="a", source=SECRET),
        ':1: there is no text; add "text": "..." to this line.',
    ),
    "wrong type of text": (
        "p.jsonl",
        line(text=[SECRET]),
        ":1: text must be a string, not a list; put it in double quotes.",
    ),
    "wrong type of id": (
        "p.jsonl",
        line(id=7, text=SECRET, **{"class": "copyright"}),
        ":1: id must be a string, not a number; put it in double quotes.",
    ),
    "empty text": (
        "p.jsonl",
        line(text=" \n", source=SECRET),
        ":1: text is empty; fill it in or drop the line.",
    ),
    "class missing": (
        "p.jsonl",
        line(text=SECRET),
        ':1: the class is missing; add "class": "copyright" or another of the policy\'s classes (pii).',
    ),
    "class misspelt": (
        "p.jsonl",
        line(text=SECRET, **{"class": "pi"}),
        ":1: class 'pi' is not in POLICY; did you mean 'pii'?",
    ),
    "a text as class": (
        "p.jsonl",
        line(text="x", **{"class": SECRET}),
        ":1: class is not in POLICY; known there: copyright, pii.",
    ),
    "secret not marked": (
        "p.jsonl",
        line(text=SECRET, **{"class": "pii"}),
        ":1: class 'pii' has secret = true and this text marks none;"
        ' add "secret": [[start, end]] with character offsets into the text.',
    ),
    "secret outside": (
        "p.jsonl",
        line(text=SECRET, **{"class": "pii"}, secret=[[3, 13]]),
        ":1: secret [3, 13] is outside its text or empty;"
        " the text has 12 characters, offsets count from 0 and the end is excluded.",
    ),
    "secret backwards": (
        "p.jsonl",
        line(text=SECRET, **{"class": "pii"}, secret=[[3, 3]]),
        ":1: secret [3, 3] is outside its text or empty;"
        " the text has 12 characters, offsets count from 0 and the end is excluded.",
    ),
    "secrets overlap": (
        "p.jsonl",
        line(text=SECRET, **{"class": "pii"}, secret=[[4, 8], [0, 5]]),
        ":1: two secrets overlap; mark each character once, or join the two.",
    ),
    "secret of another shape": (
        "p.jsonl",
        line(text=SECRET, **{"class": "pii"}, secret=[0, 5]),
        ":1: secret must be a list of [start, end] character offsets; write for example [[12, 20]].",
    ),
    "secret as switches": (
        "p.jsonl",
        line(text=SECRET, **{"class": "pii"}, secret=[[False, True]]),
        ":1: secret must be a list of [start, end] character offsets; write for example [[12, 20]].",
    ),
    "duplicate ids": (
        "p.jsonl",
        line(id="a", text="x", **{"class": "copyright"}) + line(id="a", text=SECRET, **{"class": "copyright"}),
        ":2: id 'a' is taken by FILE:1; give every text an id of its own.",
    ),
    "unprintable id": (
        "p.jsonl",
        line(id=SECRET + "\n", text="x", **{"class": "copyright"}),
        ":1: the id is longer than 200 characters or has unprintable ones; shorten it and use plain letters.",
    ),
    "long id": (
        "p.jsonl",
        line(id=SECRET * 20, text="x", **{"class": "copyright"}),
        ":1: the id is longer than 200 characters or has unprintable ones; shorten it and use plain letters.",
    ),
    "bad UTF-8": (
        "p.jsonl",
        b"\n" + line(text=SECRET).encode().replace(b"words", b"\xff"),
        ":2: not valid UTF-8; save the file as UTF-8 text.",
    ),
    "UTF-16": ("p.txt", SECRET.encode("utf-16"), ":1: not valid UTF-8; save the file as UTF-8 text."),
    "invalid JSON": (
        "p.jsonl",
        '{"text": "' + SECRET,
        ':1: not valid JSON at column 10; write one object per line, for example {"id": "a", "text": "..."}.',
    ),
    "not an object": (
        "p.jsonl",
        json.dumps([SECRET]),
        ":1: this line is not a JSON object;"
        ' write one object per line, for example {"id": "a", "text": "..."}, and no list around them.',
    ),
    "key twice": (
        "p.jsonl",
        '{"text": "s3cr3t-words", "text": "x"}',
        ":1: a key appears twice in this line; keep one of the two.",
    ),
    "not a number in JSON": (
        "p.jsonl",
        '{"text": "s3cr3t-words", "source": NaN}',
        ":1: a number or a list in this JSON is out of range; simplify it.",
    ),
    "half a character": (
        "p.jsonl",
        '{"text": "s3cr3t-words \\ud800"}',
        ":1: text contains half a character (a lone surrogate such as \\ud800); write the character itself.",
    ),
    "NUL": (
        "p.jsonl",
        '{"text": "s3cr3t-words \\u0000"}',
        ":1: text contains a NUL character; save the file as plain UTF-8 text.",
    ),
    "empty file": (
        "p.jsonl",
        "\n\n",
        ":1: the file holds no text; add some, or take the file out of the policy.",
    ),
    "csv without a header": (
        "p.csv",
        f"{SECRET},1\n",
        ":1: the first line must name the columns; call the one with the texts 'text'.",
    ),
    "csv with a text cut by a comma": (
        "p.csv",
        f"id,text\na,{SECRET}, and more\n",
        ":2: 3 cells under 2 columns; put a text with commas in quotes.",
    ),
    "csv with a bad secret": (
        "p.csv",
        f"text,class,secret\n{SECRET},pii,0-3\n",
        ":2: secret must be JSON in a cell; write for example [[12, 20]] with character offsets.",
    ),
    "csv with a bad quote": (
        "p.csv",
        f'text\n"{SECRET}"x\n',
        ":2: not valid CSV; check its quotes; a cell takes 131072 characters at most, a .jsonl line any.",
    ),
    "damaged gzip": (
        "p.jsonl.gz",
        gzip.compress(line(text=SECRET, **{"class": "copyright"}).encode())[:-9],
        ":2: the compressed data is damaged; compress the file again.",
    ),
    "no gzip": (
        "p.jsonl.gz",
        line(text=SECRET),
        ":1: the compressed data is damaged; compress the file again.",
    ),
    "unknown format": (
        "p.json",
        line(text=SECRET),
        ": this kind of file is not known; use .txt, .jsonl, .csv (each also .gz) or .parquet.",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_list_is_refused_with_line_and_suggestion_and_without_its_text(kind: str, tmp_path: Path) -> None:
    name, data, sentence = BAD[kind]
    path = tmp_path / name
    with pytest.raises(ProtectedTextError) as caught:
        texts_of(path, data, TWO_CLASSES)
    error = caught.value
    expected = sentence.replace("FILE", str(path)).replace("POLICY", str(tmp_path / "p.toml"))
    assert str(error) == f"{path}{expected}"
    assert error.exit_code is ExitCode.USAGE
    assert SECRET not in str(error) and SECRET not in repr(error)
    assert error.__suppress_context__ or error.__context__ is None, "a cause would carry the text into a traceback"


def test_the_messages_in_the_documentation_are_the_real_ones(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "protected-texts.md").read_text(encoding="utf-8")
    for kind in ("secret not marked", "unknown key", "bad UTF-8"):
        assert BAD[kind][2].split(":", 2)[2] in page
    example = next(part for part in page.split("```") if part.startswith("json\n"))
    (text,) = texts_of(tmp_path / "p.jsonl", example.removeprefix("json\n"), TWO_CLASSES)
    assert [text.text[start:end] for start, end in text.secrets] == ["+1 202-555-0143"]


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProtectedTextError, match="there is no such file"):
        load_texts([tmp_path / "none.txt"])
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(ProtectedTextError, match="this is a directory"):
        load_texts([tmp_path / "d.txt"])


def test_the_only_class_is_the_default(tmp_path: Path) -> None:
    assert texts_of(tmp_path / "p.jsonl", line(text="a"))[0].class_name == "copyright"


def test_a_text_judged_identically_is_dropped_and_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    data = line(id="a", text="caf\u00e9") + line(id="b", text="cafe\u0301") + line(id="c", text="cafe")
    path.write_text(data, encoding="utf-8")
    loaded = load_protected(policy_for(path))
    assert [text.id for text in loaded] == ["a", "c"]
    assert loaded.duplicates == ("b",)


def test_the_same_text_with_another_secret_is_kept(tmp_path: Path) -> None:
    pii = {"class": "pii", "text": "12 34"}
    data = line(id="a", secret=[[0, 2]], **pii) + line(id="b", secret=[[3, 5]], **pii)
    assert len(texts_of(tmp_path / "p.jsonl", data, TWO_CLASSES)) == 2


def test_controls_follow_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line(text="a 1", secret=[[2, 3]], **{"class": "pii"}))
    assert load_controls(policy_for(path, TWO_CLASSES)).texts[0].secrets == ((2, 3),)


def test_ordinary_texts_ignore_other_fields_and_are_normalised(tmp_path: Path) -> None:
    (tmp_path / "c4.jsonl").write_text(line(text="e\u0301", url="u", timestamp=1))
    (tmp_path / "r.txt").write_text("one\n\ntwo\n")
    texts = load_texts([tmp_path / "c4.jsonl", tmp_path / "r.txt"])
    assert [(t.text, t.line) for t in texts] == [("\u00e9", 1), ("one", 1), ("two", 3)]


def test_a_reader_that_stops_early_reads_no_further(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(line(text="fine").encode() + b"\xff\n")
    assert next(iter_texts([tmp_path / "r.jsonl"])).text == "fine"


def test_repr_shows_no_text(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line(id="a", text=SECRET, prefix=SECRET, source=SECRET))
    loaded = load_protected(policy_for(path))
    for shown in (loaded, loaded.texts[0], load_texts([path]), [loaded.texts[0]]):
        assert SECRET not in repr(shown) and SECRET not in str(shown)
    assert "id='a'" in repr(loaded.texts[0])


def test_keyed_ids_depend_on_text_and_key_and_not_on_its_unicode_form() -> None:
    assert keyed_id("caf\u00e9", b"k") == keyed_id("cafe\u0301", b"k")
    assert keyed_id("a", b"k") != keyed_id("b", b"k")
    assert keyed_id("a", b"k") != keyed_id("a", b"l")
    assert len(keyed_id("a", b"k")) == 64
    with pytest.raises(UsageError, match="pass 16 random bytes"):
        keyed_id("a", b"")


def test_list_digests_ignore_order_and_notice_changes(tmp_path: Path) -> None:
    first, second = line(id="a", text="x"), line(id="b", text="y")
    lists = [
        texts_of(tmp_path / "p.jsonl", data)
        for data in (first + second, second + first, first, first + line(id="b", text="z"))
    ]
    digests = [list_digest(texts, b"k") for texts in lists]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert list_digest(lists[0], b"l") != digests[0]


def secret_of(tmp_path: Path, text: str, *spans: tuple[int, int]) -> list[str]:
    data = line(text=text, **{"class": "pii"}, secret=[list(span) for span in spans])
    (loaded,) = texts_of(tmp_path / "p.jsonl", data, TWO_CLASSES)
    assert loaded.text == unicodedata.normalize("NFC", text)
    return [loaded.text[start:end] for start, end in loaded.secrets]


def test_secrets_after_decomposed_accents_keep_their_characters(tmp_path: Path) -> None:
    text = "Re\u0301ne\u0301 Cafe\u0301: code 4711!"
    start = text.index("4711")
    assert secret_of(tmp_path, text, (start, start + 4)) == ["4711"]
    assert secret_of(tmp_path, text, (start, start + 4), (0, 6)) == ["R\u00e9n\u00e9", "4711"]


def test_a_secret_that_cuts_a_composed_character_grows_to_hold_it(tmp_path: Path) -> None:
    assert secret_of(tmp_path, "xe\u0301y", (0, 2)) == ["x\u00e9"]
    assert secret_of(tmp_path, "xe\u0301y", (2, 4)) == ["\u00e9y"]
    assert secret_of(tmp_path, "\u1112\u1161\u11ab!", (1, 2)) == ["\ud55c"]


def test_two_secrets_in_one_composed_character_overlap(tmp_path: Path) -> None:
    with pytest.raises(ProtectedTextError, match="two secrets overlap"):
        secret_of(tmp_path, "xe\u0301y", (0, 2), (2, 4))


ALPHABET = st.sampled_from(
    "ab 1\u00e9e\u0301\u0323\u0327\u1112\u1161\u11ab\u09c7\u09be\u212b\ufb01\U0001d15e\U0001f600"
)
PLAIN = st.text("abc123", min_size=1, max_size=5)
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@quick
@given(
    before=st.text(ALPHABET, max_size=8),
    secret=st.text(ALPHABET, max_size=6),
    after=st.text(ALPHABET, max_size=8),
)
def test_a_secret_bounded_by_plain_characters_is_exactly_kept(
    tmp_path: Path, before: str, secret: str, after: str
) -> None:
    marked = "[" + secret
    text = before + marked + "]" + after
    span = (len(before), len(before) + len(marked))
    assert secret_of(tmp_path, text, span) == [unicodedata.normalize("NFC", marked)]


@quick
@given(text=st.text(ALPHABET, min_size=1, max_size=12), data=st.data())
def test_no_character_of_a_secret_is_lost_by_normalisation(tmp_path: Path, text: str, data: st.DataObject) -> None:
    text = "x" + text
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    (kept,) = secret_of(tmp_path, text, (start, end))
    rest = list(unicodedata.normalize("NFD", kept))
    for character in unicodedata.normalize("NFD", text[start:end]):
        rest.remove(character)


@quick
@given(data=st.binary(max_size=120), suffix=st.sampled_from([".txt", ".jsonl", ".csv", ".jsonl.gz"]))
def test_any_bytes_are_a_list_or_our_error(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    try:
        texts_of(path, data)
    except ProtectedTextError as error:
        assert str(error).startswith(f"{path}:")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@quick
@given(fields=st.dictionaries(st.sampled_from(["id", "text", "class", "secret", "prefix", "source", "x"]), JSON))
def test_any_json_object_is_a_text_or_our_error(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "p.jsonl"
    try:
        texts_of(path, line(**{"text": "fallback", **fields}))
    except ProtectedTextError as error:
        assert str(error).startswith(f"{path}:1: ")
