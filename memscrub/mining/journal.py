"""The journal of a mining run, from which an interrupted one goes on; knows the disk, not what is mined for.

JSON lines: first what the run was started with, then one line for every lot of windows that was read, at last one
with the digests of the files that are about to be written. A line that was cut short by a crash is dropped with what
it said, and that lot is read again. The file holds texts that the model gives away, so only its owner may read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, get_type_hints

from memscrub.journals.lines import JournalFile
from memscrub.mining.stretches import Stretch
from memscrub.storage.files import sha256_file
from memscrub.storage.partial import disk_errors
from memscrub.texts.corpora import FileEnd

FORMAT = 1
COUNTS = ("tokens", "windows", "fed", "candidates", "merged")
_WRITES = b'{"writes": '

T = TypeVar("T")


@dataclass(frozen=True)
class LotFound:
    """What one lot of windows gave: where reading stands behind it, counts, files that ended, stretches found."""

    controls: bool
    file: int
    pieces: int
    counts: Mapping[str, int]
    ends: Mapping[int, FileEnd]
    found: tuple[Stretch, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For one line of JSON."""
        return {
            "controls": self.controls,
            "file": self.file,
            "pieces": self.pieces,
            "counts": dict(self.counts),
            "ends": {str(file): asdict(end) for file, end in self.ends.items()},
            "found": [asdict(stretch) for stretch in self.found],
        }

    @classmethod
    def from_json(cls, line: bytes) -> LotFound:
        """From its line. Raises ValueError, TypeError or KeyError where that is not one."""
        values: dict[str, Any] = _parsed(line)
        ends = {i: {**end, "first_bad": tuple(end["first_bad"])} for i, end in values["ends"].items()}
        return cls(
            _of(bool, values["controls"]),
            _of(int, values["file"]),
            _of(int, values["pieces"]),
            {name: _of(int, values["counts"][name]) for name in COUNTS},
            {int(i): _built(FileEnd, end) for i, end in ends.items()},
            tuple(_built(Stretch, each) for each in values["found"]),
        )


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _of(kind: type[T], value: Any) -> T:
    """The value, which must be of just this type: what is taken over here is reckoned with for hours."""
    if type(value) is not kind:
        raise TypeError(f"not {kind.__name__}")
    return value


def _built(kind: type[T], values: Mapping[str, Any]) -> T:
    """A `FileEnd` or `Stretch` whose fields have the types that it states."""
    made = kind(**values)
    for name, hint in get_type_hints(kind).items():
        value = getattr(made, name)
        if hint == tuple[int, ...]:
            _of(tuple, value)
            [_of(int, each) for each in value]
        elif not (hint == (str | None) and value is None):
            _of(str if hint == (str | None) else hint, value)
    return made


class Journal:
    """The journal at `path`, open and locked while the context lasts; `lots` are those of an interrupted run.

    `key` is all that determines what a run finds. Raises OutputError where the file is another run's, or not a
    journal at all.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.lots: list[LotFound] = []
        self._writes: set[str] = set()
        self._file = JournalFile(path, "mine", FORMAT, key, self._take)

    def __enter__(self) -> Journal:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.lots and not self._file.removed:  # nothing to go on from
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._file.__exit__(kind, error, trace)

    def add(self, lot: LotFound) -> None:
        """Write down a lot. What was added is there after a crash of the program, not yet after one of the machine."""
        self.lots.append(lot)  # first: what is in the file must not be taken for nothing when a signal comes here
        self._file.add(lot.to_dict())

    def announce(self, contents: Iterable[bytes]) -> None:
        """Write down, before it is done, that the run writes files with these contents."""
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        self._writes.update(digests)
        self._file.add({"writes": digests}, sync=True)

    def wrote(self, path: Path) -> bool:
        """Whether the file at `path` is, to the byte, one that this run, before it was interrupted, was to write."""
        if not self._writes or path.is_symlink() or not path.is_file():
            return False
        with disk_errors(path):
            return sha256_file(path) in self._writes

    def remove(self) -> None:
        """The run has ended: nothing is left to go on from."""
        self._file.remove()

    def _take(self, line: bytes) -> None:
        if line.startswith(_WRITES):
            self._writes.update(map(str, json.loads(line)["writes"]))
        else:
            self.lots.append(LotFound.from_json(line))
