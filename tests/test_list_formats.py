"""Lists in somebody else's format: read as protected texts, or refused by file and row without repeating a text."""

from __future__ import annotations

import json
import tracemalloc
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memscrub.errors import ProtectedTextError, UsageError
from memscrub.texts.list_formats import FORMATS, ForeignList, read_format
from tests.models import opened, tiny_checkpoint

SECRET = "Ada-Lovelace-1815"


def decode(ids: Sequence[int]) -> str:
    return " ".join(f"t{token}" for token in ids)


def encode(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def read(name: str, path: Path, **options: Any) -> ForeignList:
    return read_format(name, path, **{"decode": decode, "encode": encode, "class_name": "c", **options})


def extraction_lists(folder: Path, split: str = "train", rows: int = 3, dtype: Any = np.uint16) -> np.ndarray[Any, Any]:
    ids = np.arange(rows * 10, dtype=dtype).reshape(rows, 10)
    np.save(folder / f"{split}_prefix.npy", ids[:, :4])
    np.save(folder / f"{split}_suffix.npy", ids[:, 4:])
    np.save(folder / f"{split}_preprefix.npy", ids[:, :2])
    return ids


def saved_dataset(folder: Path, *tables: pa.Table, stream: bool = True) -> Path:
    """What `datasets.save_to_disk` writes: Arrow streams, state.json, dataset_info.json."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        writer = (pa.ipc.new_stream if stream else pa.ipc.new_file)(folder / name, table.schema)
        with writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


# -- lm-extraction-benchmark


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_prefix_and_suffix_become_one_text_with_the_benchmarks_own_row_numbers(tmp_path: Path, dtype: Any) -> None:
    ids = extraction_lists(tmp_path, dtype=dtype)
    found = read("lm-extraction", tmp_path)
    assert [encode(text.text) for text in found.texts] == ids.tolist()
    assert [text.id for text in found.texts] == [f"lm-extraction-train-{row}" for row in range(3)]
    assert [(text.file, text.line) for text in found.texts][1] == (str(tmp_path / "train_prefix.npy"), 2)
    assert {(text.class_name, text.secrets, text.prefix) for text in found.texts} == {("c", (), None)}
    assert found.remarks == (
        "3 texts of 4 + 6 tokens; [probe] prefix_tokens = 4 and suffix_tokens = 6 ask for what this list was made for.",
    )


def test_the_texts_of_a_real_tokenizer_round_trip_and_those_that_do_not_are_counted(tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path / "model", "llama", seed=0))
    ids = np.arange(30, dtype=np.uint16).reshape(3, 10)
    ids[1, 5] = 61  # the unknown word: its decoded text encodes to the same id only by chance of the vocabulary
    ids[2, 5] = loaded.vocabulary - 1
    np.save(tmp_path / "val_prefix.npy", ids[:, :4])
    np.save(tmp_path / "val_suffix.npy", ids[:, 4:])

    def real_decode(row: Sequence[int]) -> str:
        return str(loaded.tokenizer.decode(row))

    def real_encode(text: str) -> list[int]:
        return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])

    changed = sum(real_encode(real_decode(row)) != row for row in ids.tolist())
    found = read("lm-extraction", tmp_path, decode=real_decode, encode=real_encode, vocabulary=loaded.vocabulary)
    said = [remark for remark in found.remarks if "do not come back" in remark]
    assert len(said) == (changed > 0)
    halved = read("lm-extraction", tmp_path, encode=lambda text: encode(text)[::2])
    assert any(remark.startswith("3 of 3 texts do not come back as the same token ids") for remark in halved.remarks)
    assert len(read("lm-extraction", tmp_path, encode=None).remarks) == 1


def test_several_splits_must_be_chosen_from_and_one_without_suffixes_is_none(tmp_path: Path) -> None:
    extraction_lists(tmp_path, "train", rows=2)
    extraction_lists(tmp_path, "val", rows=1)
    np.save(tmp_path / "test_prefix.npy", np.ones((4, 4), dtype=np.uint16))
    with pytest.raises(ProtectedTextError, match=r"several splits \(train, val\); choose one with --split"):
        read("lm-extraction", tmp_path)
    assert len(read("lm-extraction", tmp_path, split="train").texts) == 2
    assert len(read("lm-extraction", tmp_path / "val_prefix.npy").texts) == 1
    with pytest.raises(ProtectedTextError, match=r"test_suffix\.npy: there is no such file"):
        read("lm-extraction", tmp_path, split="test")
    with pytest.raises(ProtectedTextError, match="no split 'dev'"):
        read("lm-extraction", tmp_path, split="dev")


def save(folder: Path, prefix: Any, suffix: Any) -> Path:
    np.save(folder / "a_prefix.npy", prefix)
    np.save(folder / "a_suffix.npy", suffix)
    return folder


GOOD = np.ones((2, 3), dtype=np.int32)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (np.ones((3, 3), dtype=np.int32), "not as many rows as in a_prefix.npy"),
        (np.array([[1, 2], [3, -1]]), r"a_suffix\.npy:2: a negative token id"),
        (np.array([[1, 2], [900, 1]]), r"a_suffix\.npy:2: a token id beyond this checkpoint's 100"),
        (np.ones((2, 3)), r"shape \[2, 3\] and type float64"),
        (np.ones(2, dtype=np.int32), r"shape \[2\] and type int32"),
        (np.ones((2, 0), dtype=np.int32), "save whole numbers"),
    ],
)
def test_arrays_that_are_no_token_ids_are_refused(tmp_path: Path, suffix: Any, message: str) -> None:
    with pytest.raises(ProtectedTextError, match=message):
        read("lm-extraction", save(tmp_path, GOOD, suffix), vocabulary=100)


class Bomb:
    """What a pickle would run."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def test_an_array_of_pickled_objects_is_refused_and_nothing_in_it_is_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    np.save(tmp_path / "a_prefix.npy", np.array([[Bomb(str(ran))]], dtype=object), allow_pickle=True)
    np.save(tmp_path / "a_suffix.npy", GOOD)
    with pytest.raises(ProtectedTextError, match=r"a_prefix\.npy: not an \.npy file of numbers"):
        read("lm-extraction", tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04nothing", b"hello"])
def test_a_damaged_array_is_refused(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, GOOD, GOOD)
    (tmp_path / "a_suffix.npy").write_bytes(content)
    with pytest.raises(ProtectedTextError, match=r"a_suffix\.npy: not an \.npy file of numbers"):
        read("lm-extraction", tmp_path)


def raw_header(header: str) -> bytes:
    """An .npy file of this header and no numbers."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2,",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 99999999999999999999999), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 4611686018427387904), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-2, -4), }",
        "{'descr': 'zz', 'fortran_order': False, 'shape': (2, 4), }",
        "{[]: 1}",
        "(" * 9000,
        "-" * 9000 + "1",
    ],
    ids=["unterminated", "no integer", "no memory", "negative", "type", "unhashable", "nested", "minus"],
)
def test_a_header_that_is_no_description_of_numbers_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "list.npy").write_bytes(raw_header(header))
    with pytest.raises(ProtectedTextError, match=r"^[^\n]*list\.npy: [^\n]*$"):
        read("mempi", tmp_path / "list.npy")


# -- MemPi


def test_mempis_tensor_file_is_read_without_its_pickle(tmp_path: Path) -> None:
    ids = torch.randint(0, 50_000, (7, 80), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "pile_bs0-100-dedup.pt")
    np.save(tmp_path / "list.npy", ids.numpy())
    found = read("mempi", tmp_path / "pile_bs0-100-dedup.pt", vocabulary=50_000)
    assert [encode(text.text) for text in found.texts] == ids.tolist()
    assert found.texts[0].id == "mempi-0"
    assert "prefix_tokens = 32 and suffix_tokens = 48" in found.remarks[0]
    assert [text.text for text in read("mempi", tmp_path / "list.npy").texts] == [text.text for text in found.texts]


def test_a_tensor_file_whose_pickle_would_run_something_is_only_read_as_numbers(tmp_path: Path) -> None:
    torch.save(torch.ones(2, 80, dtype=torch.int64), tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "list.pt") as source, zipfile.ZipFile(tmp_path / "evil.pt", "w") as out:
        for name in source.namelist():
            evil = b"cos\nsystem\n(S'touch ran'\ntR."
            out.writestr(name, evil if name.endswith("data.pkl") else source.read(name))
    assert len(read("mempi", tmp_path / "evil.pt").texts) == 2


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3, 50, dtype=torch.int64), "not rows of 80 token ids"),
        ({"a": torch.ones(1, 80, dtype=torch.int64), "b": torch.ones(1, 80, dtype=torch.int64)}, "not rows of 80"),
        (torch.full((2, 80), 7.5, dtype=torch.float64), "a token id beyond this checkpoint's 1000"),
    ],
)
def test_another_tensor_file_is_refused_with_how_to_convert_it(tmp_path: Path, tensor: Any, message: str) -> None:
    torch.save(tensor, tmp_path / "list.pt")
    with pytest.raises(ProtectedTextError, match=message):
        read("mempi", tmp_path / "list.pt", vocabulary=1000)


def test_mempis_two_kinds_of_jsonl_are_read(tmp_path: Path) -> None:
    found_by_script = {"ex_i": 0, "prompt": "one two", "ref": "one two three", "gen": "one two x", "pile_idx": "bs0_1"}
    by_hand = {"prompt": "one", "all": "one two", "prompt_len": 1, "category": ["address"]}
    (tmp_path / "list.jsonl").write_text(json.dumps(found_by_script) + "\n" + json.dumps(by_hand) + "\n")
    texts = read("mempi", tmp_path / "list.jsonl").texts
    assert [(text.text, text.source, text.line) for text in texts] == [
        ("one two three", "bs0_1", 1),
        ("one two", None, 2),
    ]
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": SECRET}) + "\n")
    with pytest.raises(ProtectedTextError, match=r"other\.jsonl:1: neither 'ref' nor 'all'") as error:
        read("mempi", tmp_path / "other.jsonl")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("name", ["list.txt", "folder"])
def test_what_mempi_does_not_have_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "list.txt").write_text("x")
    with pytest.raises(ProtectedTextError, match=r"use its \.pt, \.npy or \.jsonl files"):
        read("mempi", tmp_path / name)


def test_a_file_that_only_claims_to_be_a_tensor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.pt").write_bytes(b"\x80\x02not a zip")
    with pytest.raises(ProtectedTextError, match=r"not a file of torch\.save"):
        read("mempi", tmp_path / "list.pt")


def tensor_file(path: Path, order: bytes = b"little", method: int = zipfile.ZIP_STORED) -> bytearray:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/byteorder", order, compress_type=method)
        archive.writestr("archive/data/0", bytes(640))
    return bytearray(path.read_bytes())


def set_field(data: bytearray, local: int, value: int) -> None:
    """Set a byte of every entry, at this offset in its local header and two further in the directory."""
    for magic, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", local + 2)):
        place = -1
        while (place := data.find(magic, place + 1)) >= 0:
            data[place + offset] = value


def encrypted(data: bytearray) -> None:
    set_field(data, 6, 1)


def strongly_encrypted(data: bytearray) -> None:
    set_field(data, 6, 65)


def unknown_method(data: bytearray) -> None:
    set_field(data, 8, 99)


def damaged_deflate(data: bytearray) -> None:
    place = data.find(b"archive/byteorder") + len(b"archive/byteorder")
    data[place : place + 4] = b"\xff" * 4


@pytest.mark.parametrize("spoil", [encrypted, strongly_encrypted, unknown_method, damaged_deflate])
def test_an_archive_that_cannot_be_unpacked_is_refused(tmp_path: Path, spoil: Callable[[bytearray], None]) -> None:
    file = tmp_path / "list.pt"
    data = tensor_file(file, method=zipfile.ZIP_DEFLATED)
    assert read("mempi", file).texts[0].text == " ".join(["t0"] * 80)
    spoil(data)
    file.write_bytes(data)
    with pytest.raises(ProtectedTextError, match=r"list\.pt: not a file of torch\.save, or a damaged one"):
        read("mempi", file)


def test_a_byte_order_of_any_size_is_not_unpacked(tmp_path: Path) -> None:
    tensor_file(tmp_path / "list.pt", bytes(64 << 20), zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    with pytest.raises(ProtectedTextError, match="not rows of 80 token ids"):
        read("mempi", tmp_path / "list.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


# -- Hugging Face datasets


@pytest.mark.parametrize("stream", [True, False])
def test_a_saved_dataset_is_read_file_by_file_in_the_order_of_its_state(tmp_path: Path, stream: bool) -> None:
    tables = [pa.table({"text": [f"{part} {row}" for row in range(3)]}) for part in ("one", "two")]
    folder = saved_dataset(tmp_path / "notes", *tables, stream=stream)
    texts = read("hf", folder).texts
    assert [text.text for text in texts] == ["one 0", "one 1", "one 2", "two 0", "two 1", "two 2"]
    assert [text.id for text in texts] == [f"notes-{number}" for number in range(1, 7)]
    assert (texts[4].file, texts[4].line) == (str(folder / "data-00001-of-00002.arrow"), 2)
    assert [text.text for text in read("hf", folder / "data-00000-of-00002.arrow").texts] == ["one 0", "one 1", "one 2"]


def test_columns_are_named_and_a_suffix_goes_on_where_the_text_ends(tmp_path: Path) -> None:
    table = pa.table({"before": ["Dear", None], "start": ["Ada ", "Max"], "end": ["Example", None], "label": [1, 2]})
    folder = saved_dataset(tmp_path / "notes", table)
    found = read("hf", folder, text_column="start", suffix_column="end", prefix_column="before")
    assert [(text.prefix, text.text) for text in found.texts] == [("Dear", "Ada Example"), (None, "Max")]
    with pytest.raises(ProtectedTextError, match="no column 'text'; its columns are before, start, end, label"):
        read("hf", folder)
    with pytest.raises(ProtectedTextError, match=r"arrow:1: there is something else where a text should be"):
        read("hf", folder, text_column="label")


@pytest.mark.parametrize("kind", ["stream", "file", "parquet"])
def test_a_column_that_is_there_twice_is_refused_where_it_is_wanted(tmp_path: Path, kind: str) -> None:
    table = pa.table([pa.array(["a b"]), pa.array([SECRET]), pa.array(["c d"])], names=["text", "text", "other"])
    file = tmp_path / f"list.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ProtectedTextError, match=r"list\.\w+: several columns are called 'text'") as error:
        read("hf", file)
    assert SECRET not in str(error.value)
    assert [text.text for text in read("hf", file, text_column="other").texts] == ["c d"]


def test_a_date_that_python_cannot_hold_is_no_text(tmp_path: Path) -> None:
    days = pa.array([10**8], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"text": days}), tmp_path / "list.parquet")
    with pytest.raises(ProtectedTextError, match=r"list\.parquet:1: there is something else where a text should be"):
        read("hf", tmp_path / "list.parquet")


@pytest.mark.parametrize("below", ["", "data"])
def test_a_folder_of_parquet_files_as_on_the_hub_is_read_split_by_split(tmp_path: Path, below: str) -> None:
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    names = ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001-0123456789abcdef")
    for name in names:
        strings = pa.array([name]).dictionary_encode() if name.startswith("test") else pa.array([name])
        pq.write_table(pa.table({"text": strings}), folder / f"{name}.parquet")
    with pytest.raises(ProtectedTextError, match=r"several splits \(test, train\)"):
        read("hf", tmp_path)
    assert [text.text for text in read("hf", tmp_path, split="train").texts] == list(names[:2])
    assert [text.text for text in read("hf", tmp_path, split="test").texts] == [names[2]]
    assert [text.text for text in read("hf", folder / f"{names[1]}.parquet").texts] == [names[1]]


def test_files_that_are_only_numbered_are_one_split(tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(pa.table({"text": [f"text {number}"]}), tmp_path / f"{number:04d}.parquet")
    assert [text.text for text in read("hf", tmp_path).texts] == ["text 0", "text 1"]


def test_a_dictionary_of_datasets_wants_a_split_where_it_has_several(tmp_path: Path) -> None:
    for split in ("train", "test"):
        saved_dataset(tmp_path / "all" / split, pa.table({"text": [f"of {split}"]}))
    (tmp_path / "all" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(ProtectedTextError, match="choose one with --split"):
        read("hf", tmp_path / "all")
    assert [text.text for text in read("hf", tmp_path / "all", split="test").texts] == ["of test"]


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = saved_dataset(tmp_path / "notes", pa.table({"text": ["one", "", None, " \n", "two"]}))
    found = read("hf", folder)
    assert [(text.text, text.line) for text in found.texts] == [("one", 1), ("two", 5)]
    assert found.remarks == ("3 of 5 rows hold no text and were left out.",)
    with pytest.raises(ProtectedTextError, match="the list holds no text"):
        read("hf", saved_dataset(tmp_path / "empty", pa.table({"text": ["", None]})))


@pytest.mark.parametrize("listed", ["../../secret.arrow", "/etc/passwd", "..", "", "é" * 128, "\ud800"])
def test_a_dataset_cannot_name_files_outside_its_folder(tmp_path: Path, listed: str) -> None:
    folder = saved_dataset(tmp_path / "notes", pa.table({"text": ["one"]}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": listed}]}))
    with pytest.raises(ProtectedTextError, match=r"state\.json: not what save_to_disk writes"):
        read("hf", folder)


@pytest.mark.parametrize("state", ["", "[]", '{"_data_files": 3}', '{"_data_files": [{}]}', "{}"])
def test_a_damaged_state_is_refused(tmp_path: Path, state: str) -> None:
    folder = saved_dataset(tmp_path / "notes", pa.table({"text": ["one"]}))
    (folder / "state.json").write_text(state)
    with pytest.raises(ProtectedTextError, match=r"state\.json: not what save_to_disk writes"):
        read("hf", folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


@pytest.mark.parametrize("damage", [cut, scramble])
@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_damaged_table_is_refused_without_its_text(tmp_path: Path, kind: str, damage: Callable[[Path], None]) -> None:
    table = pa.table({"text": [SECRET] * 500})
    file = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    damage(file)
    with pytest.raises(ProtectedTextError, match=rf"list\.{kind}:1: the data is damaged") as error:
        read("hf", file)
    assert SECRET not in str(error.value)


def test_text_that_is_no_utf_8_is_refused_by_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff\xfe" + SECRET.encode()], type=pa.binary())
    wrong = pa.StringArray.from_buffers(2, *raw.buffers()[1:])
    with pa.ipc.new_stream(tmp_path / "list.arrow", pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.record_batch([wrong], names=["text"]))
    with pytest.raises(ProtectedTextError, match=r"list\.arrow:2: not valid UTF-8") as error:
        read("hf", tmp_path / "list.arrow")
    assert SECRET not in str(error.value)


def test_a_nul_character_is_refused_by_its_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", SECRET + "\0"]}), tmp_path / "list.parquet")
    with pytest.raises(ProtectedTextError, match=r"list\.parquet:2: the text holds a NUL character") as error:
        read("hf", tmp_path / "list.parquet")
    assert SECRET not in str(error.value)


def test_a_file_that_a_dataset_lists_and_lacks_is_named(tmp_path: Path) -> None:
    folder = saved_dataset(tmp_path / "notes", pa.table({"text": ["one"]}))
    (folder / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ProtectedTextError, match=r"data-00000-of-00001\.arrow: the file cannot be read"):
        read("hf", folder)


def test_a_folder_without_a_dataset_is_refused(tmp_path: Path) -> None:
    for name in ("hf", "lm-extraction"):
        with pytest.raises(ProtectedTextError, match="nothing of this format is in this folder"):
            read(name, tmp_path)


# -- all of them


def test_an_unknown_format_or_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'mempy' is not known; did you mean 'mempi'\?"):
        read("mempy", tmp_path)
    for name in FORMATS:
        with pytest.raises(ProtectedTextError, match="no such file or folder"):
            read(name, tmp_path / "nothing")


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProtectedTextError, match="no such file or folder"):
        read(name, tmp_path / ("x" * 300))


def test_a_split_with_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["x" * 300]}))
    with pytest.raises(ProtectedTextError, match=r"dataset_dict\.json: not what save_to_disk writes"):
        read("hf", tmp_path)


def test_no_repr_shows_a_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [SECRET]}), tmp_path / "list.parquet")
    found = read("hf", tmp_path / "list.parquet")
    assert SECRET not in repr(found) + repr(found.texts[0])


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=6))
def test_every_text_of_a_dataset_arrives_in_nfc_in_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = saved_dataset(tmp_path_factory.mktemp("list") / "notes", pa.table({"text": pa.array(texts, pa.string())}))
    expected = [unicodedata.normalize("NFC", text) for text in texts if text.strip()]
    if expected:
        assert [text.text for text in read("hf", folder).texts] == expected
    else:
        with pytest.raises(ProtectedTextError, match="holds no text"):
            read("hf", folder)
