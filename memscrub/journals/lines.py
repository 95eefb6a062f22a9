"""A file of JSON lines from which an interrupted run goes on: locked, for its owner only, cut back to its last whole
line; does not know what the lines say.

The first line names the kind of run and everything that determines its result. A line that a crash cut short is
dropped with what it said. Digests of protected lists are kept under a salt and a slow function, so that a journal
which somebody finds is a poor means to try guesses with.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from memscrub.errors import OutputError
from memscrub.storage.partial import disk_errors

# Seconds of work that a power failure may cost. After a crash of the program alone nothing is missing.
_SYNC_EVERY = 5.0
# Bytes of a first line, by far more than one has: a file in the way may be of any size.
_LONGEST_HEADER = 1 << 20
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError)

Take = Callable[[bytes], None]


class JournalFile:
    """The journal at `path`, open and locked while the context lasts.

    `key` is all that determines what a run finds, by what a user calls it; the values of `hidden` too, which are
    written down only as slow, salted digests. `take` is given every line of an interrupted run with the same key, and
    raises ValueError and its like for one that it cannot read. A journal with another key, or a damaged one, is
    refused with OutputError; with `replace` it is begun anew instead, and `dropped` says why. `option` is what a user
    changes to write elsewhere.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        form: int,
        key: Mapping[str, Any],
        take: Take,
        *,
        hidden: Mapping[str, str] | None = None,
        replace: bool = False,
        option: str = "--out",
    ) -> None:
        self.path = path
        self.dropped: str | None = None
        self.removed = False
        self._title, self._form = f"memscrub {kind}", form
        self._key, self._hidden = json.loads(json.dumps(key)), dict(hidden or {})
        self._take, self._replace, self._option = take, replace, option
        self._file: IO[bytes] | None = None
        self._synced = 0.0

    def __enter__(self) -> JournalFile:
        with disk_errors(self.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.fdopen(os.open(self.path, flags, 0o600), "r+b")
            try:
                self._lock(self._file)
                self._read(self._file)
            except BaseException:  # an interrupt too: the open file holds the lock
                self._file.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def add(self, value: Mapping[str, Any], *, sync: bool = False) -> None:
        """Write a line. It is there after a crash of the program; with `sync` also after one of the machine."""
        assert self._file is not None
        with disk_errors(self.path):
            self._file.write(json.dumps(value).encode() + b"\n")
            self._file.flush()
            if sync or time.monotonic() - self._synced > _SYNC_EVERY:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def remove(self) -> None:
        """Nothing is left to go on from."""
        with disk_errors(self.path):
            self.path.unlink(missing_ok=True)
        self.removed = True

    def _lock(self, file: IO[bytes]) -> None:
        held = True
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held it may have ended, and its journal with it, between our opening and our lock.
            held = not os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except (BlockingIOError, FileNotFoundError):
            pass
        if held:
            raise OutputError(f"{self.path}: another run is writing it; wait for it or choose another {self._option}.")
        # What it says becomes part of a signed result: it must not be somebody else's word.
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            raise OutputError(f"{self.path} belongs to another user; choose another {self._option}.")

    def _read(self, file: IO[bytes]) -> None:
        """Take over what an earlier run wrote, up to the last whole line."""
        first = file.readline(_LONGEST_HEADER)
        start = json.dumps({self._title: self._form})[:-2].encode()
        if not first.endswith(b"\n"):
            if first and not start.startswith(first[: len(start)]):
                raise self._foreign()
            self._begin(file)
            return
        if (other := self._other(first)) is not None:
            self._drop(file, other)
            return
        good = file.tell()
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                self._take(line)
            except _UNREADABLE:
                self._drop(file, None)
                return
            good += len(line)
        file.seek(good)
        file.truncate()

    def _begin(self, file: IO[bytes]) -> None:
        file.seek(0)
        file.truncate()
        header: dict[str, Any] = {self._title: self._form, "key": self._key}
        if self._hidden:
            salt = secrets.token_bytes(16)
            hidden = {name: _slow_digest(value, salt) for name, value in self._hidden.items()}
            header |= {"salt": salt.hex(), "hidden": hidden}
        file.write(json.dumps(header).encode() + b"\n")
        file.flush()

    def _other(self, first: bytes) -> list[str] | None:
        """What the file was made with another of; empty for another version of memscrub, None for nothing."""
        try:
            header = json.loads(first)
            form, key = header[self._title], header["key"]
            if form != self._form or not isinstance(key, dict):
                return []
            differs = [name for name in self._key if key.get(name) != self._key[name]]
            salt, hidden = bytes.fromhex(header.get("salt", "")), header.get("hidden", {})
            differs += [name for name, value in self._hidden.items() if hidden.get(name) != _slow_digest(value, salt)]
        except _UNREADABLE:
            raise self._foreign() from None
        return differs or None

    def _drop(self, file: IO[bytes], other: list[str] | None) -> None:
        """Begin anew, or refuse, a journal of other inputs, or (None) a damaged one."""
        made = f"was left by a run with another {' and '.join(other or ['version of memscrub'])}"
        if not self._replace:
            if other is None:
                raise OutputError(f"{self.path}: the journal is damaged; delete it to begin anew.")
            raise OutputError(
                f"{self.path} {made}; repeat that run's command to end it, or delete the file to begin anew."
            )
        self.dropped = f"{self.path} {'is damaged' if other is None else made}; it is not used."
        self._begin(file)

    def _foreign(self) -> OutputError:
        return OutputError(f"{self.path} is in the way and is no journal of memscrub; choose another {self._option}.")


def _slow_digest(value: str, salt: bytes) -> str:
    return hashlib.scrypt(value.encode(), salt=salt, n=2**14, r=8, p=1).hex()
