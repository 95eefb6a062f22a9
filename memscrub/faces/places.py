"""Where the lines of a protected list lie, seen from where the program runs; knows paths, opens no file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from memscrub.faces.escaping import printable
from memscrub.reports.report import REPORT_NAME, Report


@dataclass(frozen=True)
class Place:
    """A line of a file; `path` has slashes and is relative to the current directory for files below it."""

    path: str
    line: int


class Located(Protocol):
    """A text of a list, or what is said of it: its file as the report has it, and its line."""

    @property
    def file(self) -> str | None: ...
    @property
    def line(self) -> int | None: ...


def place_of(entry: Located, report: Report, policy: Path | None = None) -> Place:
    """Where an entry is to be shown: at its text's line, else at the policy, else at the report.

    Files of a list are seen from the policy's folder: `policy` says where that lies now, the report where it was.
    """
    stated = None if report.policy.file is None else Path(report.policy.file)
    home = policy or stated
    if entry.file is not None and home is not None:
        return Place(_shown(home.parent / entry.file), max(1, entry.line or 1))
    return Place(REPORT_NAME if home is None else _shown(home), 1)


def _shown(path: Path) -> str:
    whole = os.path.abspath(path)
    here = os.path.abspath(os.curdir)
    inside = os.path.commonpath([whole, here]) == here
    return printable(Path(os.path.relpath(whole, here) if inside else whole).as_posix())
