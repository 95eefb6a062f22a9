"""Lists of protected texts in somebody else's format, as protected texts: lm-extraction-benchmark, MemPi, Hugging Face
datasets on disk. Knows files and, through a callable, a tokenizer; no policy, no model and no measures.

Files of others are data from strangers: arrays are read without pickle, and of a `.pt` file only the raw numbers.
Errors name file and row and never repeat what stands there.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memscrub.errors import ProtectedTextError, UsageError, printable
from memscrub.policy.mistakes import did_you_mean
from memscrub.texts.normal_form import nfc
from memscrub.texts.protected import ProtectedText
from memscrub.texts.raw_arrays import read_array, read_tensor
from memscrub.texts.text_files import BOMB, most_unpacked, read_rows, refusal

FORMATS: Mapping[str, str] = {
    "lm-extraction": "lm-extraction-benchmark: SPLIT_prefix.npy and SPLIT_suffix.npy with token ids, in one folder",
    "mempi": "MemPi: a .pt or .npy file of 80 token ids a row, or a .jsonl file with the key 'ref' or 'all'",
    "hf": "a Hugging Face dataset on disk: a folder of save_to_disk, a folder of .parquet files, or one such file",
}
# MemPi's Pile list has 32 tokens of prompt and 48 that were memorized (find.sh in terarachang/MemPi).
MEMPI_TOKENS, MEMPI_PROMPT = 80, 32
# The key of a whole text in MemPi's two kinds of .jsonl: what find_memorized_data.py writes, the list for GPT2-XL.
MEMPI_KEYS = ("ref", "all")
# train-00000-of-00002.parquet, with the digest that older files carry; 0000.parquet has no split in its name.
_SHARD = re.compile(r"(?P<split>.*?)-?\d{4,5}(-of-\d{5})?(-[0-9a-f]{16})?")

# Bytes of the JSON that save_to_disk writes beside the data; of a longer file the beginning is no JSON.
_SMALL = 1 << 24

Decode = Callable[[Sequence[int]], str]
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class ForeignList:
    """A list in somebody else's format as protected texts, in its own order, and sentences on what to know about it.

    Texts that occur twice are still in it twice; ids are unique.
    """

    texts: tuple[ProtectedText, ...] = field(repr=False)
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Request:
    """What `read_format` was asked for."""

    path: Path
    decode: Decode
    encode: Encode | None
    vocabulary: int | None
    columns: tuple[str, str | None, str | None]  # of the text, of its prefix, of its suffix
    split: str | None
    class_name: str


@dataclass(frozen=True, slots=True)
class _Item:
    """A row as the file has it, not yet checked."""

    id: str
    text: object = field(repr=False)
    path: Path
    row: int
    prefix: object = field(default=None, repr=False)
    source: object = field(default=None, repr=False)


def read_format(
    name: str,
    path: str | Path,
    *,
    decode: Decode,
    class_name: str,
    encode: Encode | None = None,
    vocabulary: int | None = None,
    text_column: str = "text",
    prefix_column: str | None = None,
    suffix_column: str | None = None,
    split: str | None = None,
) -> ForeignList:
    """The protected texts of a list in the format `name` (a key of `FORMATS`), all of class `class_name`.

    `decode` turns token ids into text and `encode` text into ids, both with the checkpoint's tokenizer and without
    special tokens added. Ids at or above `vocabulary` are refused: they are another tokenizer's. In an "hf" list, the
    text is `text_column` with `suffix_column` appended, and `prefix_column` is what is given freely before it.
    `split` chooses where there are several. Raises UsageError for an unknown name, ProtectedTextError for a file.
    """
    if name not in FORMATS:
        hint = did_you_mean(name, tuple(FORMATS), f"known are {', '.join(FORMATS)}.")
        raise UsageError(f"the format '{name}' is not known; {hint}")
    columns = (text_column, prefix_column, suffix_column)
    request = _Request(Path(path), decode, encode, vocabulary, columns, split, class_name)
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise ProtectedTextError(f"{path}: there is no such file or folder; check the path.")
    found = {"lm-extraction": _lm_extraction, "mempi": _mempi, "hf": _hf}[name](request)
    if not found.texts:
        raise ProtectedTextError(f"{path}: the list holds no text; name another file.")
    return found


def _lm_extraction(request: _Request) -> ForeignList:
    """github.com/google-research/lm-extraction-benchmark: what `load_dataset.py` writes, uint16 `[n, 50]` each."""
    prefix, suffix = _prefix_and_suffix(request)
    before, after = read_array(prefix, request.vocabulary), read_array(suffix, request.vocabulary)
    if len(before) != len(after):
        raise ProtectedTextError(f"{suffix}: not as many rows as in {prefix.name}; take both from one split.")
    rows = np.concatenate([before, after], axis=1).tolist()
    return _decoded(request, prefix, f"lm-extraction-{prefix.name.removesuffix('_prefix.npy')}", rows, before.shape[1])


def _prefix_and_suffix(request: _Request) -> tuple[Path, Path]:
    folder, wanted = request.path, request.split
    if folder.is_file():
        if not folder.name.endswith("_prefix.npy"):
            raise ProtectedTextError(f"{folder}: name the folder, or the file that ends in _prefix.npy.")
        folder, wanted = folder.parent, folder.name.removesuffix("_prefix.npy")
    names = [file.name.removesuffix("_prefix.npy") for file in sorted(folder.glob("*_prefix.npy"))]
    # A split of prefixes alone, like the contest's test split, does not say what is protected.
    splits = [split for split in names if split == wanted or (folder / f"{split}_suffix.npy").is_file()]
    split = _one_split(folder, splits, wanted)
    prefix, suffix = (folder / f"{split}_{part}.npy" for part in ("prefix", "suffix"))
    if not suffix.is_file():
        raise ProtectedTextError(f"{suffix}: there is no such file; the prefixes alone do not say what is protected.")
    return prefix, suffix


def _one_split(path: Path, splits: Sequence[str], wanted: str | None) -> str:
    if not splits:
        raise ProtectedTextError(f"{path}: nothing of this format is in this folder; name another folder or a file.")
    shown = ", ".join(split or "(without a name)" for split in splits)
    if wanted is not None and wanted not in splits:
        raise ProtectedTextError(f"{path}: there is no split '{wanted}'; there are {shown}.")
    if wanted is None and len(splits) > 1:
        raise ProtectedTextError(f"{path}: there are several splits ({shown}); choose one with --split.")
    return splits[0] if wanted is None else wanted


def _mempi(request: _Request) -> ForeignList:
    """github.com/terarachang/MemPi (Chang et al. 2311.09060): Pile sequences of 32 + 48 tokens, or texts."""
    path = request.path
    if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        return _listed(request, _mempi_texts(request))
    if path.suffix.lower() not in (".pt", ".npy"):
        raise ProtectedTextError(f"{path}: not a file of MemPi's; use its .pt, .npy or .jsonl files.")
    if path.suffix.lower() == ".npy":
        ids = read_array(path, request.vocabulary)
    else:
        ids = read_tensor(path, request.vocabulary, tokens=MEMPI_TOKENS)
    return _decoded(request, path, "mempi", ids.tolist(), min(MEMPI_PROMPT, ids.shape[1] - 1))


def _mempi_texts(request: _Request) -> Iterator[_Item]:
    for row in read_rows(request.path):
        value = next((row.values[key] for key in MEMPI_KEYS if key in row.values), None)
        if value is None:
            raise refusal(request.path, row.line, "neither 'ref' nor 'all' is there; this is no list of MemPi's.")
        yield _Item(f"mempi-{row.line}", value, request.path, row.line, source=row.values.get("pile_idx"))


def _decoded(request: _Request, path: Path, name: str, rows: Sequence[list[int]], before: int) -> ForeignList:
    """Texts of token ids; a row's id counts from 0, as the benchmarks' own example ids do."""
    items = [_Item(f"{name}-{i}", request.decode(ids), path, i + 1) for i, ids in enumerate(rows)]
    found = _listed(request, items)
    after = len(rows[0]) - before
    sentences = [
        f"{len(rows)} texts of {before} + {after} tokens; [probe] prefix_tokens = {before} and suffix_tokens = {after}"
        " ask for what this list was made for."
    ]
    encode = request.encode
    if encode is not None and (changed := sum(list(encode(text.text)) != rows[text.line - 1] for text in found.texts)):
        sentences.append(
            f"{changed} of {len(rows)} texts do not come back as the same token ids when they are encoded again;"
            " they are measured on the tokens that the tokenizer makes of them."
        )
    return ForeignList(found.texts, (*sentences, *found.remarks))


def _listed(request: _Request, items: Iterable[_Item]) -> ForeignList:
    """The entries in NFC, as texts of memscrub's own lists are; those of white space are left out and counted."""
    texts, empty = [], 0
    for item in items:
        if item.text is None or (isinstance(item.text, str) and not item.text.strip()):
            empty += 1
            continue
        text, prefix = (_checked(value, item.path, item.row) for value in (item.text, item.prefix))
        assert text is not None
        source, where = item.source if isinstance(item.source, str) else None, str(item.path)
        texts.append(ProtectedText(printable(item.id), text, request.class_name, (), source, prefix, where, item.row))
    total = len(texts) + empty
    return ForeignList(tuple(texts), (f"{empty} of {total} rows hold no text and were left out.",) if empty else ())


def _checked(value: object, path: Path, row: int) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise refusal(path, row, "there is something else where a text should be; name a column of texts.")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise refusal(path, row, "the text holds a NUL character or half a character; take the row out.")
    return nfc(value)


def _hf(request: _Request) -> ForeignList:
    return _listed(request, _hf_rows(request))


def _hf_rows(request: _Request) -> Iterator[_Item]:
    wanted = [column for column in request.columns if column is not None]
    text_column, prefix_column, suffix_column = request.columns
    number = 0
    for file in _tables(request):
        for row, values in enumerate(_table_rows(file, wanted), 1):
            number += 1
            found: dict[str | None, Any] = dict(zip(wanted, values, strict=True))
            text, suffix = found[text_column], found.get(suffix_column)
            if isinstance(text, str) and isinstance(suffix, str):
                text += suffix
            yield _Item(f"{request.path.stem}-{number}", text, file, row, found.get(prefix_column))


def _tables(request: _Request) -> list[Path]:
    """The files of the dataset, or of its split, in order."""
    path = request.path
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        path = path / _one_split(path, _names(path / "dataset_dict.json", "splits"), request.split)
    if (path / "state.json").is_file():
        return [path / name for name in _names(path / "state.json", "_data_files")]
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet")) or sorted(path.glob("*.arrow"))
    groups: dict[str, list[Path]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.stem)
        groups.setdefault(match["split"] if match else file.stem, []).append(file)
    return groups[_one_split(path, list(groups), request.split)]


def _names(path: Path, key: str) -> list[str]:
    """The names that a file of save_to_disk lists; none may lead out of its folder."""
    try:
        with path.open("rb") as file:
            listed = json.loads(file.read(_SMALL))[key]
        names = [each["filename"] if isinstance(each, dict) else each for each in listed]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        names = [None]
    if not all(isinstance(name, str) and _is_name(name) for name in names):
        raise ProtectedTextError(f"{path}: not what save_to_disk writes; save the dataset again.")
    return names


def _is_name(name: str) -> bool:
    """Whether a file in a folder can be called that: 255 bytes are the most that file systems take."""
    plain = re.fullmatch(r"[^/\\\0\ud800-\udfff]{1,255}", name) and name.strip(".")
    return bool(plain) and len(name.encode()) <= 255


def _table_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[object, ...]]:
    """The values of these columns, row by row, from a Parquet file or an Arrow stream or file."""
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ProtectedTextError(f"{path}: reading this needs an extra; run pip install 'memscrub[parquet]'.") from None
    row = unpacked = 0
    try:
        most = most_unpacked(path)
        # Not mapped into memory: a length that lies would then end the process with SIGBUS.
        with arrow.OSFile(str(path)) as source:
            for batch in _batches(arrow, parquet, source, path, columns):
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    row += 1
                    cells = tuple(value.as_py() for value in values)
                    unpacked += sum(len(cell) for cell in cells if isinstance(cell, str))
                    if unpacked > most:
                        raise refusal(path, row, BOMB)
                    yield cells
    except UnicodeDecodeError:
        raise refusal(path, row, "not valid UTF-8; save the dataset again with UTF-8 texts.") from None
    except (arrow.ArrowException, OSError) as error:
        # pyarrow also says OSError, without a reason of the system's, where the data is wrong.
        if reason := getattr(error, "strerror", None):
            raise ProtectedTextError(f"{path}: the file cannot be read ({reason}); check the folder.") from None
        if found := re.search(r"Invalid UTF8 sequence at string index (\d+)", str(error)):  # from `_validated`
            row += int(found[1]) + 1
            raise refusal(path, row, "not valid UTF-8; save the dataset again with UTF-8 texts.") from None
        raise refusal(path, row + 1, "the data is damaged from here on; save the dataset again.") from None
    except (ValueError, OverflowError):  # a date that Python cannot hold, say
        raise refusal(path, row, "there is something else where a text should be; name a column of texts.") from None


def _batches(arrow: Any, parquet: Any, source: Any, path: Path, columns: Sequence[str]) -> Iterator[Any]:
    begin = source.read(6)
    source.seek(0)
    if path.suffix.lower() == ".parquet":
        file = parquet.ParquetFile(source)
        _check_columns(path, columns, file.schema_arrow.names)
        # Few rows at a time: one long text that stands in every row is stored once.
        yield from file.iter_batches(batch_size=64, columns=list(dict.fromkeys(columns)))
    elif begin == b"ARROW1":
        file = arrow.ipc.open_file(source)
        _check_columns(path, columns, file.schema.names)
        yield from map(_validated, map(file.get_batch, range(file.num_record_batches)))
    else:  # a stream, which is what save_to_disk writes
        stream = arrow.ipc.open_stream(source)
        _check_columns(path, columns, stream.schema.names)
        yield from map(_validated, stream)


def _validated(batch: Any) -> Any:
    """The batch, none of whose offsets leads out of its buffers; pyarrow itself believes what an Arrow file says."""
    batch.validate(full=True)
    return batch


def _check_columns(path: Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    for column in wanted:
        if column not in there:
            # Names of columns are not texts, but a table without a header has a text in their place.
            shown = ", ".join(name for name in there if re.fullmatch(r"[\w.-]{1,40}", name)) or "none with a plain name"
            raise ProtectedTextError(f"{path}: there is no column '{column}'; its columns are {shown}.")
        if list(there).count(column) > 1:
            raise ProtectedTextError(f"{path}: several columns are called '{column}'; rename or drop all but one.")
