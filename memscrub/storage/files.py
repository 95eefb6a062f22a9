"""List, hash and parse the plain files of a directory; does not know what a checkpoint or a signature is.

Nothing here follows a path out of the directory it was given, loads a pickle, or imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any

from memscrub.errors import IncompleteError, MemscrubError, OutputError

CHUNK = 8 << 20
"""Bytes read at a time: large enough for disk speed, small enough that eight threads stay under 64 MiB."""

MAX_JSON = 1 << 25
"""Bytes of config.json, of an index or of an adapter's configuration; the largest indices published so far have half of
that."""

# Bytes that the system is asked to copy at a time, and what it answers where it cannot copy between these files.
_COPIED = 1 << 30
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)

_SHARED_STORE_MARKER = ".huggingface-shared-blobs"
# Seconds: by far more than from the making of a file to its lock.
_ABANDONED_AFTER = 60.0


def strict_json(data: bytes) -> Any:
    """Parse UTF-8 JSON that can be read in one way only.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, a key twice in one object, NaN/Infinity, or a number that
            would become infinite.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at line {error.lineno})") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers may disagree on which of two equal keys counts; a verifier cannot allow that.
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):  # 1e999: infinity to some readers, a mistake to others
        raise ValueError("a number is too large")
    return value


def is_safe_name(name: str) -> bool:
    """True for a relative POSIX path that stays below its directory however it is joined."""
    path = PurePosixPath(name)
    plain = bool(name) and not path.is_absolute() and str(path) == name and name != "."
    return plain and ".." not in path.parts and not any(c in name for c in "\\\0:")


def cache_link_roots(root: Path) -> tuple[Path, ...]:
    """Where the links of a Hugging Face cache snapshot may point; empty for any other directory.

    `root` is `CACHE/models--OWNER--NAME/snapshots/REVISION`; its links lead to
    `CACHE/models--OWNER--NAME/blobs`, and from there possibly to `CACHE/blobs`, the store that
    huggingface_hub shares between repositories since 2.4 and marks as its own.
    """
    repository = root.parent.parent
    if root.parent.name != "snapshots" or "--" not in repository.name:
        return ()
    shared = repository.parent / "blobs"
    roots = [repository / "blobs"]
    if (shared / _SHARED_STORE_MARKER).is_file():
        roots.append(shared)
    return tuple(roots)


def list_files(
    root: Path,
    *,
    error: type[MemscrubError],
    link_roots: Sequence[Path] = (),
    skip: frozenset[str] = frozenset(),
) -> tuple[str, ...]:
    """Sorted POSIX names of all regular files below `root`, whose links may lead into `link_roots` only.

    `root` and `link_roots` are resolved paths; directories named in `skip` are left out at any depth.

    Raises:
        error: a link leads elsewhere, is broken or cyclic, or names a directory; a name is not UTF-8; an
            entry is neither file nor directory; a directory cannot be read.
    """
    names: list[str] = []
    pending = [root]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(directory) as entries:
                found = list(entries)
        except OSError as problem:
            raise error(f"{directory} cannot be listed: {problem.strerror}.") from problem
        for entry in found:
            name = Path(entry.path).relative_to(root).as_posix()
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in skip:
                    pending.append(Path(entry.path))
                continue
            _check_entry(entry, name, error, link_roots)
            names.append(name)
    return tuple(sorted(names))


def _check_entry(entry: os.DirEntry[str], name: str, error: type[MemscrubError], link_roots: Sequence[Path]) -> None:
    """Raise `error` unless the entry is a regular file, or an allowed link to one."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise error(f"The file name {name!r} is not UTF-8; rename it.") from None
    path = Path(entry.path)
    try:
        if entry.is_symlink():
            path = path.resolve(strict=True)
            if not any(path.is_relative_to(allowed) for allowed in link_roots):
                raise error(f"{name} is a link that leads out of its directory; replace it with a copy of the file.")
        regular = stat.S_ISREG(path.lstat().st_mode)
    except (OSError, RuntimeError):  # RuntimeError: a cyclic link before Python 3.13
        raise error(f"{name} is a link that leads nowhere or in a circle; delete or replace it.") from None
    if not regular:
        raise error(f"{name} is neither a regular file nor a link to one; delete or replace it.")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as lower-case hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def digest_names(root: Path, names: Iterable[str], *, workers: int | None = None) -> dict[str, str]:
    """SHA-256 of each named file below `root`, in threads (hashing releases the interpreter lock).

    Raises:
        IncompleteError: a file cannot be read to its end.
    """
    ordered = list(names)

    def one(name: str) -> str:
        try:
            return sha256_file(root / name)
        except OSError as problem:
            raise IncompleteError(f"{name} cannot be read: {problem.strerror}.") from problem

    with ThreadPoolExecutor(max_workers=workers or min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(one, ordered), strict=True))


def tree_digest(digests: Mapping[str, str]) -> str:
    """One SHA-256 for a set of files: over `name NUL hex LF`, sorted by name, however they were listed."""
    whole = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        whole.update(f"{name}\0{digest}\n".encode())
    return whole.hexdigest()


@contextlib.contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """An empty file in `path`'s folder to be written; it takes `path`'s place at the end and vanishes on an error.

    With `private`, only its owner may read it. Errors of the disk are the caller's to explain.
    """
    _clear_abandoned(path)
    # A name that nobody has: one that can be foretold might be somebody's file, or a link to one.
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".partial", dir=path.parent)
    temporary = Path(name)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the system drops it when we die
        temporary.chmod(0o600 if private else 0o644)
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _clear_abandoned(path: Path) -> None:
    """Delete files that killed runs were writing to take `path`'s place: of our making, old, and locked by nobody."""
    for left in path.parent.glob(f".{glob.escape(path.name[:100])}.????????.partial"):
        with contextlib.suppress(OSError):  # another run may be faster; and what is not ours is none of our business
            file = os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                state = os.fstat(file)
                old = time.time() - state.st_mtime > _ABANDONED_AFTER
                if old and stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid():
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
            finally:
                os.close(file)


def read_range(path: Path, begin: int, end: int) -> bytearray:
    """The bytes from `begin` to `end` of a file. Raises IncompleteError where they are not there."""
    buffer = bytearray(end - begin)
    try:
        with path.open("rb") as file:
            file.seek(begin)
            got = file.readinto(buffer)
    except OSError as problem:
        raise IncompleteError(f"{path} cannot be read: {problem.strerror}.") from problem
    if got != len(buffer):
        raise IncompleteError(f"{path} became shorter while it was read; run again.")
    return buffer


def copy_range(source: IO[bytes], target: IO[bytes], begin: int, end: int) -> None:
    """Append the bytes from `begin` to `end` of an unbuffered file to another; the disk's own way where it has one.

    File systems that can share blocks between files do so here, and take room only for what changes later. Raises
    OSError, and IncompleteError where the bytes are not there.
    """
    at, to, direct = begin, target.tell(), hasattr(os, "copy_file_range")
    while at < end:
        count = 0
        if direct:
            try:
                count = os.copy_file_range(source.fileno(), target.fileno(), min(end - at, _COPIED), at, to)
            except OSError as problem:
                if problem.errno not in _NO_COPY:
                    raise
            direct = count > 0  # some file systems copy nothing this way, and say so by zero
        if not count:
            data = os.pread(source.fileno(), min(CHUNK, end - at), at)
            if not data:
                raise IncompleteError(f"{source.name} became shorter while it was read; run again.")
            target.seek(to)
            write_all(target, memoryview(data))
            count = len(data)
        at, to = at + count, to + count
    target.seek(to)


def write_all(target: IO[bytes], data: memoryview) -> None:
    """Write all of the data to an unbuffered file, which may take less of it at a time."""
    while len(data):
        data = data[target.write(data) :]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write compact JSON, under a temporary name first so that a failure leaves no half file.

    Raises:
        OutputError: the place is not ours to write.
        IncompleteError: the disk is full or failed.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(value, separators=(",", ":")), encoding="utf-8")
    except PermissionError as problem:
        raise OutputError(f"{path} cannot be written: {problem.strerror}.") from problem
    except OSError as problem:
        raise IncompleteError(
            f"{path} cannot be written: {problem.strerror}; free some space and run again."
        ) from problem
