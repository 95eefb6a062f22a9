"""The page of a run or a stored report, written to its file; a part of the command line, decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memscrub.errors import OutputError, UsageError
from memscrub.storage.output_file import check_place, lies_in, write_output

if TYPE_CHECKING:
    from memscrub.jobs.foreign_lists import ForeignSource
    from memscrub.measures.measure import Progress
    from memscrub.reports.report import Report


@dataclass(frozen=True)
class Page:
    """What is to be written: where, and with strips of tokens where there is a policy to read their texts by."""

    file: Path
    policy: Path | None = None
    reveal: bool = False
    device: str = "auto"
    foreign: ForeignSource | None = None


def page_of(
    file: Path | None,
    policy: Path | None,
    *,
    reveal: bool,
    device: str = "auto",
    foreign: ForeignSource | None = None,
    outside: Sequence[str | Path] = (),
) -> Page | None:
    """The page that these options ask for, None for none; refused now rather than after an hour of work.

    `outside` are directories of checkpoints: what is released with the weights must not tell of single tokens.
    """
    if file is None:
        if reveal:
            raise UsageError("--reveal shows protected texts in a page and nowhere else; name the page with --html.")
        return None
    check_place(file, "the page")
    for directory in outside:
        if lies_in(file, directory):
            raise OutputError(f"{file} lies in {directory}, and a page tells more than may go with the weights.")
    return Page(file, policy, reveal, device, foreign)


def write_page(report: Report, page: Page, progress: Progress) -> None:
    """Render the report and put it in its place, whole; a page that shows texts can be read by its owner only."""
    from memscrub.faces.html_report import render

    views = None
    # A gate that trusts signed measures loads no model for a page either.
    if page.policy is not None and (report.trusted is None or page.reveal):
        from memscrub.cli.token_views import token_views

        views = token_views(
            report, page.policy, reveal=page.reveal, foreign=page.foreign, device=page.device, progress=progress
        )
    write_output(page.file, render(report, texts=views).encode("utf-8"), private=page.reveal)
