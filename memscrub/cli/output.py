"""What every command does with its output: progress on a terminal, the report to its file and the screen, remarks.

Part of the command line; decides nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from memscrub.cli.page_output import Page, write_page
from memscrub.errors import UsageError
from memscrub.storage.output_file import check_apart, check_place, write_output
from memscrub.storage.partial import refuse_overlap

if TYPE_CHECKING:
    from memscrub.jobs.scrub import Fixed
    from memscrub.journals.run_log import RunLog
    from memscrub.measures.measure import Progress
    from memscrub.reports.report import Report


@contextmanager
def progress_shown(quiet: bool, log: RunLog | None = None) -> Iterator[Progress]:
    """How far a run has got, on standard error and in its log."""
    from memscrub.cli.progress import shown

    with shown(Console(stderr=True), quiet=quiet) as progress:

        def both(stage: str, done: int, total: int) -> None:
            progress(stage, done, total)
            if log is not None:
                log.stage(stage, done, total)

        yield both


def remarks(quiet: bool, log: RunLog) -> Callable[[str], None]:
    """What is done with a use case's remarks: logged, and shown unless quiet."""

    def remark(sentence: str) -> None:
        log.remark(sentence)
        if not quiet:
            say(sentence)

    return remark


def deliver(report: Report, file: Path | None, *, as_json: bool, quiet: bool, page: Page | None = None) -> None:
    """Write the report, and its page if asked for, before anything is printed: a broken pipe must not cost them."""
    if file is not None:
        write_report(report, file)
    if page is not None:
        with progress_shown(quiet) as progress:
            write_page(report, page, progress)
    if as_json:
        sys.stdout.write(report.to_json())
    elif not quiet:
        from memscrub.cli.console import show_report

        show_report(Console(), report)


def write_report(report: Report, file: Path) -> None:
    """Write the JSON report; another run's at the same place is replaced whole, never mixed with it."""
    write_output(file, report.to_json().encode("utf-8"))


def check_report_file(file: Path | None, *outside: str | Path | None) -> None:
    """A report that cannot be written, or not without changing these directories, is known before an hour of work."""
    if file is not None:
        check_place(file, "the report")
        for directory in outside:
            if directory is not None:
                refuse_overlap(file, Path(directory))


def check_files(written: Mapping[str, Path | None], policy: Path | None, read: Mapping[str, Path | None]) -> None:
    """Refuse files that would replace each other, the policy, what the policy names, or what else is read."""
    named = {} if policy is None else _named_by(policy)
    check_apart(written, {**read, **named, "the policy": policy})


def _named_by(policy: Path) -> dict[str, Path]:
    """The files that a policy names; none where it cannot be read, which the command itself says."""
    from memscrub.policy.document import load_policy

    try:
        rules = load_policy(policy)
    except UsageError:
        return {}
    texts, ordinary = rules.protected, rules.locality
    names = (*texts.files, *texts.controls, *ordinary.retain, *ordinary.statistics, *ordinary.neighbours)
    keys = tuple(name for name in (rules.report.key, rules.sign.key) if name is not None)
    return {f"{name!r} of the policy": rules.resolve(name) for name in (*names, *keys)}


def say(sentence: str) -> None:
    """A remark for people: on standard error, so that `--json` output stays JSON."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(sentence, markup=False)


def say_written(fixed: Fixed, unwritten: str) -> None:
    """Where the result of a fix lies and whether it is signed; `unwritten` where there is none to be had."""
    if fixed.report.edit is None:
        unwritten = "nothing was edited, and nothing was written."
    how = "signed" if fixed.signed else "not signed: give --sign KEY to sign it"
    say(unwritten if fixed.directory is None else f"written to {fixed.directory} ({how})")
