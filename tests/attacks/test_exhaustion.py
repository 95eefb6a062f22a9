"""Small files that would take much memory or time: refused in a moment, or read at a cost in step with their size."""

from __future__ import annotations

import gzip
import json
import re
import sys
import time
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscrub.cli.options import passphrase
from memscrub.errors import CheckpointError, MemscrubError, PolicyError, ProtectedTextError, UsageError
from memscrub.policy.document import load_policy, parse_policy
from memscrub.proof.keys import PASSWORD_VARIABLE, load_private_key
from memscrub.proof.signing import generate_keypair, verify_directory
from memscrub.reports.baseline import load_baseline
from memscrub.reports.basis import report_key
from memscrub.reports.report import load_report
from memscrub.storage.adapters import open_adapter
from memscrub.storage.checkpoint import open_checkpoint
from memscrub.storage.hub import _indexed
from memscrub.texts.corpora import find_files, read_file
from memscrub.texts.normal_form import nfc
from memscrub.texts.protected import load_protected, load_texts

HEAD = 'schema = 1\nname = "x"\n[protected]\nfiles = ["texts.jsonl"]\n[class.a]\n'
ACCENTS = "\u0301\u0316"  # in an order that normalisation has to change


def cost(action: Callable[[], object]) -> tuple[float, int]:
    """Seconds of processor time and bytes at the peak; our own errors are an end like another."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        action()
    except MemscrubError:
        pass
    finally:
        seconds = time.process_time() - begin
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return seconds, peak


def packed_line(path: Path, size: int) -> Path:
    """A packed list whose one line has so many bytes."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(size >> 20):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n')
    return path


def test_a_packed_list_of_one_endless_line_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = packed_line(tmp_path / "a.jsonl.gz", 256 << 20)
    assert path.stat().st_size < 2 << 20
    with pytest.raises(ProtectedTextError, match=r"a\.jsonl\.gz:1: a line of more than 16 MiB"):
        load_texts([path])
    assert cost(lambda: load_texts([path]))[1] < 80 << 20


def test_a_packed_list_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(100):
            file.write(b"x" * (1 << 20) + b"\n\n")
    with pytest.raises(ProtectedTextError, match="unpacks to more than 200 times its size"):
        list(map(len, (text.text for text in load_texts([path]))))


def test_a_parquet_list_of_one_long_text_in_every_row_is_refused(tmp_path: Path) -> None:
    column = arrow.DictionaryArray.from_arrays(arrow.array([0] * 2_000, arrow.int32()), arrow.array(["y" * 100_000]))
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20  # and 200 MB of texts
    with pytest.raises(ProtectedTextError, match="unpacks to more than 200 times its size"):
        load_texts([tmp_path / "a.parquet"])


def test_honest_lists_that_repeat_themselves_are_read(tmp_path: Path) -> None:
    """What a template with few changing words packs to is far from what is refused."""
    lines = [
        json.dumps({"text": f"Invoice {n} of 3 May: one garden chair, paid in full, thank you."}) for n in range(20000)
    ]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert len(load_texts([tmp_path / "a.jsonl.gz"])) == 20000


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_of_a_checkpoint_that_is_a_terabyte_of_nothing_is_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with (tmp_path / name).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: no bytes on disk
    with pytest.raises(CheckpointError, match=re.escape(name) + " is larger than 32 MiB"):
        open_checkpoint(tmp_path)


def test_the_configuration_of_an_adapter_is_bounded_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with (tmp_path / "adapter_config.json").open("wb") as file:
        file.truncate(1 << 40)
    for opened in (open_adapter, open_checkpoint):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json is larger than 32 MiB"):
            opened(tmp_path)


def test_an_index_from_the_hub_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(1 << 40)
    assert _indexed(tmp_path / "model.safetensors.index.json") == ()


def test_reports_policies_and_signatures_that_are_a_terabyte_of_nothing_are_refused_unread(tmp_path: Path) -> None:
    generate_keypair(tmp_path / "key.pem", tmp_path / "key.pub")
    (tmp_path / "model").mkdir()
    for name in ("report.json", "policy.toml", "model/model.sig"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(UsageError, match="larger than 256 MiB, so not a report"):
        load_report(tmp_path / "report.json")
    with pytest.raises(UsageError, match="larger than 256 MiB, so not a report"):
        load_baseline(tmp_path / "report.json")
    with pytest.raises(PolicyError, match="larger than 64 KiB"):
        load_policy(tmp_path / "policy.toml")
    with pytest.raises(MemscrubError, match="too large"):
        verify_directory(tmp_path / "model", tmp_path / "key.pub")


def test_keys_that_are_a_terabyte_of_nothing_are_not_read_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "endless.key").open("wb") as file:
        file.truncate(1 << 40)
    policy = tmp_path / "policy.toml"
    (tmp_path / "texts.jsonl").write_text("{}\n")
    policy.write_text(f"{HEAD}max_verbatim_tokens = 4\n[report]\nkey = 'endless.key'\n")
    with pytest.raises(UsageError, match="larger than 1 MiB, so not a report key"):
        report_key(load_policy(policy))
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert passphrase(tmp_path / "endless.key") is None
    with pytest.raises(UsageError, match="is not a PEM private key"):
        load_private_key(tmp_path / "endless.key", None)


def test_a_header_that_is_mostly_brackets_takes_no_gigabyte(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    size = 20 << 20
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(size.to_bytes(8, "little") + b"[" + b"[]," * ((size - 4) // 3) + b"[]]" + b" " * 3)
    with pytest.raises(CheckpointError, match="more than the 16777216 that memscrub reads"):
        open_checkpoint(tmp_path)


def test_accents_without_end_cost_time_that_grows_with_their_number(tmp_path: Path) -> None:
    """`unicodedata.normalize` takes minutes for this megabyte."""
    text = "x" + ACCENTS * 250_000
    (tmp_path / "c.txt").write_text(text)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "policy.toml").write_text(HEAD + "max_verbatim_tokens = 4\n")
    corpus, policy = find_files([tmp_path / "c.txt"])[0], load_policy(tmp_path / "policy.toml")
    for action in (lambda: list(read_file(corpus)), lambda: load_protected(policy)):
        begin = time.process_time()
        action()
        assert time.process_time() - begin < 10


def test_normalisation_gives_what_the_standard_library_gives() -> None:
    marks = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.combining(chr(i))]
    assert len(marks) > 900
    assert not any(re.match(r"\w", mark) for mark in marks)  # what the search for long runs rests on
    odd = "".join(marks) + "\u0344\u0f73\u0f75\u0f81" * 100  # the last four decompose into marks
    for text in (odd, odd[::-1], f"e{odd}e", f"{odd}-{odd}", "-" * 300 + "\u0301", "\u1100\u1161\u11a8" * 200):
        assert nfc(text) == unicodedata.normalize("NFC", text)


@given(st.text(st.sampled_from("e\u0301\u0316\u0344\u0f73a- \u00e9\u1100\u1161\u11a8"), max_size=40), st.integers(0, 9))
def test_normalisation_gives_it_for_any_run(text: str, times: int) -> None:
    for each in (text, text * 40, text[:times] * 300 + text):
        assert nfc(each) == unicodedata.normalize("NFC", each)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (".".join(["a"] * 20_000) + " = 1", "policy.toml:6: not a key of a policy"),
        ("[" + ".".join(['"a b"'] * 9_000) + "]", "policy.toml:6: not a key of a policy"),
        ("max_verbatim_tokens = 0x" + "f" * 40_000, "beyond 64 bits"),
        ("max_verbatim_tokens = " + "9" * 40_000, "not valid TOML"),
        ("x = " + "[" * 30_000, "not valid TOML"),
    ],
)
def test_a_policy_that_is_hard_to_parse_is_refused_soon(line: str, words: str) -> None:
    begin = time.process_time()
    with pytest.raises(PolicyError, match=words):
        parse_policy((HEAD + line + "\n").encode())
    assert time.process_time() - begin < 2


def test_dots_in_names_and_keys_of_the_usual_depth_are_no_reason_to_refuse() -> None:
    files = ", ".join(f'"v1.2.{n}.texts.jsonl"' for n in range(200))
    policy = parse_policy(f'schema = 1\nname = "a.b.c"\nprotected.files = [{files}]\nclass.a.secret = true\n'.encode())
    assert len(policy.protected.files) == 200
