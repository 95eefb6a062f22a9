"""A report for GitHub Actions: the step's summary and annotations on the lines of the protected list.

Knows what GitHub takes (1 MiB of summary a step, 10 annotations of a kind a step), opens no file. Strings must be
printable (`escaping.printable`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memscrub.faces.escaping import clipped, command_data, command_property
from memscrub.faces.findings import Entry, Level, entries
from memscrub.faces.markdown import ENTRY_HEADER, entry_row, foot, head
from memscrub.faces.places import place_of
from memscrub.reports.report import Report

MAX_BYTES = 1 << 20
MAX_ANNOTATIONS = 10
_COMMANDS = {Level.ERROR: "error", Level.WARNING: "warning", Level.NOTE: "notice"}


def summary(report: Report, *, room: int = MAX_BYTES) -> str:
    """The report as Markdown of at most `room` bytes; the least severe rows go first. Empty where nothing fits."""
    found = entries(report)
    before, after = _joined(head(report)), _joined(foot(report))
    spare = room - sum(map(_size, (before, after, _joined(ENTRY_HEADER), _left_out(len(found)))))
    if spare < 0:
        return ""
    rows: list[str] = []
    for row in map(entry_row, found):
        spare -= _size(row) + 1
        if spare < 0:
            break
        rows.append(row)
    table = _joined([*ENTRY_HEADER, *rows]) + "\n" if rows else ""
    return before + table + (_left_out(len(found) - len(rows)) if len(rows) < len(found) else "") + after


def commands(report: Report, *, policy: Path | None = None) -> list[str]:
    """Annotations as workflow commands, one a line: the worst entries of each level, as many as GitHub shows.

    `policy`: where the policy lies now, for the paths of lists; None: where the report says.
    """
    found = entries(report)
    lines = []
    for level in Level:
        mine = [entry for entry in found if entry.level is level]
        if len(mine) > MAX_ANNOTATIONS:
            rest = len(mine) - MAX_ANNOTATIONS + 1
            last = f"{rest} more of this kind; the step's summary and the report list them."
            lines += _commands(mine[: MAX_ANNOTATIONS - 1], report, policy)
            lines.append(f"::{_COMMANDS[level]} title=memscrub::{command_data(last)}")
        else:
            lines += _commands(mine, report, policy)
    return lines


def _commands(found: Sequence[Entry], report: Report, policy: Path | None) -> list[str]:
    lines = []
    for entry in found:
        place = place_of(entry, report, policy)
        where = f"file={command_property(place.path)},line={place.line}"
        message = command_data(clipped(entry.sentence))
        lines.append(f"::{_COMMANDS[entry.level]} {where},title={command_property(entry.rule.title)}::{message}")
    return lines


def _left_out(count: int) -> str:
    return f"{count} more rows are left out: GitHub takes 1 MiB of summary a step. The report has them all.\n\n"


def _joined(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _size(text: str) -> int:
    return len(text.encode("utf-8"))
