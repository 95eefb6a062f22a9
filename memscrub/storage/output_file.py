"""A file that a user asked for: whether it may lie there, and writing it whole; does not know what is in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from memscrub.errors import UsageError
from memscrub.storage.files import replacing
from memscrub.storage.partial import disk_errors


def check_place(file: Path, what: str) -> None:
    """Raise UsageError where `what` (as in "the report") cannot be written there: known before an hour of work."""
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f"{file}: {what} cannot be written there; name a file in a folder that exists.")


def check_apart(written: Mapping[str, Path | None], read: Mapping[str, Path | None]) -> None:
    """Raise UsageError where a file would be written twice, or in place of one that is read, by whatever links.

    `written` are files by their options, `read` by what they are; None counts as not given. Pipes and devices take
    several outputs.
    """
    taken = {os.path.realpath(file): what for what, file in read.items() if file is not None}
    for option, file in written.items():
        if file is None or (os.path.exists(file) and not os.path.isfile(file)):
            continue
        place = os.path.realpath(file)
        if place in taken:
            raise UsageError(f"{option} names {file}, which is {taken[place]}; name another file.")
        taken[place] = f"the file of {option}"


def lies_in(file: Path, directory: str | Path) -> bool:
    """Whether a file lies below a directory, by whatever links."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(directory))


def write_output(file: Path, data: bytes, *, private: bool = False) -> None:
    """Write the bytes; another run's file at the same place is replaced whole, never mixed with them.

    A link stays, and what it leads to is replaced; a pipe or device is written to. With `private`, only its owner may
    read the file.

    Raises:
        OutputError: the place is not ours to write.
        IncompleteError: the disk is full or failed.
    """
    with disk_errors(file):
        if file.exists() and not file.is_file():
            file.write_bytes(data)
            return
        with replacing(Path(os.path.realpath(file)), private=private) as temporary, temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
