"""Token ids from other people's files of numbers: .npy arrays and tensors of `torch.save`; knows no list, no tokenizer.

Such files are data from strangers: no pickle in them is loaded, and whatever else is in them becomes one refusal.
"""

from __future__ import annotations

import lzma
import re
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from memscrub.errors import ProtectedTextError
from memscrub.texts.text_files import refusal

Ids = np.ndarray[Any, Any]

# What numpy lets through from a header that is Python source: syntax, nesting, names, sizes that fit no integer.
_BAD_HEADER = (
    ArithmeticError, EOFError, LookupError, MemoryError, OSError, RecursionError, SyntaxError, TypeError, ValueError,
    tokenize.TokenError,
)  # fmt: skip
# What zipfile lets through: encryption (RuntimeError), unknown methods (NotImplementedError), damaged data.
_BAD_ARCHIVE = (
    EOFError, LookupError, MemoryError, OSError, OverflowError, RuntimeError, ValueError, lzma.LZMAError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_array(path: Path, vocabulary: int | None) -> Ids:
    """Token ids, int64 `[rows, tokens]`, of an .npy file; it is mapped into memory, not loaded, to be checked.

    Ids at or above `vocabulary` are refused. Raises ProtectedTextError for anything but rows of token ids.
    """
    try:
        with np.errstate(over="raise"):  # a product of sizes beyond 64 bits is no size
            found = np.lib.format.open_memmap(path, mode="r")  # never unpickles, unlike numpy.load
    except _BAD_HEADER:
        raise ProtectedTextError(f"{path}: not an .npy file of numbers; write it again with numpy.save.") from None
    return _checked_ids(path, found, vocabulary)


def read_tensor(path: Path, vocabulary: int | None, *, tokens: int) -> Ids:
    """Token ids, int64 `[rows, tokens]`, of a file of `torch.save`: its one storage, byte by byte, without its pickle.

    The shape stands in the pickle only, so `tokens` must be known. Raises as `read_array`.
    """
    advice = "convert it in Python with numpy.save('list.npy', torch.load(FILE, weights_only=True).numpy())."
    try:
        with zipfile.ZipFile(path) as archive:
            info = _storage(archive)
            if info is None or info.file_size % (8 * tokens):
                raise ProtectedTextError(f"{path}: not rows of {tokens} token ids like MemPi's; {advice}")
            ids = np.frombuffer(archive.read(info), dtype="<i8").reshape(-1, tokens)
    except _BAD_ARCHIVE:
        raise ProtectedTextError(f"{path}: not a file of torch.save, or a damaged one; get it again.") from None
    return _checked_ids(path, ids, vocabulary)


def _storage(archive: zipfile.ZipFile) -> zipfile.ZipInfo | None:
    """The one tensor of an archive, if it has just one, as it is in memory of a little-endian machine."""
    entries = archive.infolist()
    parts = [entry for entry in entries if re.fullmatch(r"[^/]+/data/[^/]+", entry.filename)]
    orders = [entry for entry in entries if re.fullmatch(r"[^/]+/byteorder", entry.filename)]
    # Sizes first: an entry of "byteorder" may unpack to any size.
    if len(parts) != 1 or any(
        order.file_size != len(b"little") or archive.read(order) != b"little" for order in orders
    ):
        return None
    stored = parts[0].compress_type == zipfile.ZIP_STORED and parts[0].file_size > 0
    return parts[0] if stored else None


def _checked_ids(path: Path, found: Ids, vocabulary: int | None) -> Ids:
    if found.ndim != 2 or found.dtype.kind not in "iu" or not found.size:
        raise ProtectedTextError(
            f"{path}: an array of shape {list(found.shape)} and type {found.dtype} where rows of token ids should be;"
            " save whole numbers with one text a row."
        )
    low, high = int(found.argmin()), int(found.argmax())
    if found.flat[low] < 0:
        raise refusal(path, low // found.shape[1] + 1, "a negative token id; leave out padding.")
    if vocabulary is not None and found.flat[high] >= vocabulary:
        message = f"a token id beyond this checkpoint's {vocabulary}; the list was made with another tokenizer."
        raise refusal(path, high // found.shape[1] + 1, message)
    return found.astype(np.int64)
