"""The journal of a scan or a fix: what was measured of each text and, of a fix, what was written; knows no model.

Of texts it holds measures by their number in the list, of a written directory the digests of its files. A stage whose
name ends in `AFTER` is about the directory that was written last.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from memscrub.errors import would_repeat
from memscrub.journals.lines import JournalFile
from memscrub.reports.remembered import Remembered

# To be raised when a line's meaning changes.
FORMAT = 1
TEXTS, CONTROLS, AFTER = "texts", "controls", " after"


def journal_file(out: Path) -> Path:
    """Where a run that is to write `out` keeps how far it has got."""
    return out.with_name(out.name + ".journal")


@dataclass(frozen=True)
class Written:
    """A directory that lies complete on disk: its files' digests, and what a report says of its making, for JSON."""

    files: Mapping[str, str]
    made: Mapping[str, Any]


class RunJournal:
    """The journal at `path`, open and locked while the context lasts; filled from an interrupted run's.

    `key` and `hidden` are all that determines the result, `inputs` the digests of the checkpoint's files. A journal
    of other inputs is not used, and `said` tells so. It is deleted with a run that ended, or would only fail in the
    same way again, and kept with one that was interrupted. Raises OutputError where another run holds it, or the file
    is no journal.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        key: Mapping[str, Any],
        hidden: Mapping[str, str],
        *,
        inputs: Mapping[str, str],
        option: str = "--out",
    ) -> None:
        self.path, self.inputs = path, inputs
        self.written: Written | None = None
        self.commits: Mapping[str, Any] | None = None
        self._stages: dict[str, Remembered] = {}
        self._lines = 0
        self._file = JournalFile(path, kind, FORMAT, key, self._take, hidden=hidden, replace=True, option=option)

    def __enter__(self) -> RunJournal:
        self._file.__enter__()
        if self._file.dropped:
            self._stages, self.written, self.commits, self._lines = {}, None, None, 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.removed and (error is None or would_repeat(error) or not self._lines):
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._file.__exit__(kind, error, trace)

    @property
    def said(self) -> str | None:
        """What a person should know of the journal that was found; None where there was none."""
        if self._file.dropped or not self._lines:
            return self._file.dropped
        texts = len(self.stage(TEXTS).texts)
        done = "the edit is made and written" if self.written else f"{texts} texts measured"
        return f"going on from {self.path} ({done}); delete it to begin anew."

    def stage(self, name: str) -> Remembered:
        """What is known of one list of texts at one stage; what is new of it is written down."""
        if name not in self._stages:
            self._stages[name] = Remembered(lambda values: self._add({"stage": name, **values}))
        return self._stages[name]

    def wrote(self, written: Written) -> None:
        """A directory was written and is on the disk, where it stays until the run goes on from there."""
        self._take_written(written)
        self._add({"written": {"files": dict(written.files), "made": dict(written.made)}}, sync=True)

    def forget_written(self) -> None:
        """The directory is not as it was written."""
        self.written = None
        self._stages = {name: known for name, known in self._stages.items() if not name.endswith(AFTER)}

    def announce(self, commits: Mapping[str, Any]) -> None:
        """The directory is about to get its name; `commits` tells it from any other."""
        self.commits = dict(commits)
        self._add({"commits": self.commits}, sync=True)

    def _add(self, values: Mapping[str, Any], *, sync: bool = False) -> None:
        self._lines += 1
        self._file.add(values, sync=sync)

    def _take(self, line: bytes) -> None:
        values: dict[str, Any] = json.loads(line)
        if "written" in values:
            found = values["written"]
            files = {str(name): str(digest) for name, digest in found["files"].items()}
            self._take_written(Written(files, dict(found["made"])))
        elif "commits" in values:
            self.commits = dict(values["commits"])
        else:
            self.stage(str(values["stage"])).take(values)
        self._lines += 1

    def _take_written(self, written: Written) -> None:
        self.forget_written()
        self.written, self.commits = written, None
