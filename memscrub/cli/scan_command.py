"""The command `memscrub scan`: parses, scans, shows the report; a part of the command line.

Heavy modules are imported inside it, so that `memscrub --help` does not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from memscrub.cli.options import (
    AdapterName,
    AsJson,
    Checkpoint,
    Device,
    Dtype,
    HtmlFile,
    LogFile,
    PolicyFile,
    Quiet,
    ReportFile,
    Reveal,
    Seed,
)
from memscrub.cli.output import check_files, check_report_file, deliver, progress_shown, remarks, write_report
from memscrub.cli.page_output import page_of
from memscrub.errors import OutputError, UsageError
from memscrub.journals.interrupts import finished, going_on
from memscrub.journals.run_log import RunLog
from memscrub.storage.output_file import check_place, lies_in

if TYPE_CHECKING:
    from memscrub.jobs.foreign_lists import ForeignSource

AlsoNames = Annotated[
    list[str] | None,
    typer.Option("--also", help="Also membership, prefix-sweep, exposure, near-mass or alignment; may be repeated."),
]
Format = Annotated[str | None, typer.Option("--format", help="Format of --list: lm-extraction, mempi or hf.")]
ListFile = Annotated[
    Path | None, typer.Option("--list", help="A list in another format, in place of the policy's files.")
]
ListClass = Annotated[str | None, typer.Option("--list-class", help="The class whose limits apply to --list.")]
Split = Annotated[str | None, typer.Option("--split", help="With --list: the split to read.")]
TextColumn = Annotated[str, typer.Option("--text-column", help="With --format hf: column of the texts.")]
PrefixColumn = Annotated[
    str | None, typer.Option("--prefix-column", help="With --format hf: column of what is given before them.")
]
SuffixColumn = Annotated[
    str | None, typer.Option("--suffix-column", help="With --format hf: column that is appended to them.")
]
JournalFile = Annotated[
    Path | None,
    typer.Option("--journal", help="Keep what is measured here, to go on from; by default beside --report."),
]


def scan(
    checkpoint: Checkpoint,
    policy: PolicyFile,
    report: ReportFile = None,
    html: HtmlFile = None,
    reveal: Reveal = False,
    journal: JournalFile = None,
    log: LogFile = None,
    also: AlsoNames = None,
    format: Format = None,
    list_file: ListFile = None,
    list_class: ListClass = None,
    split: Split = None,
    text_column: TextColumn = "text",
    prefix_column: PrefixColumn = None,
    suffix_column: SuffixColumn = None,
    adapter: AdapterName = None,
    json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure what a checkpoint gives away of the policy's texts. Exit 0: within the policy, 1: not."""
    read = [checkpoint] if adapter is None else [checkpoint, adapter]
    check_report_file(report, *read)
    measures = _measures(also or [])
    from memscrub.jobs.scanning import scan as run

    foreign = _foreign(format, list_file, list_class, split, text_column, prefix_column, suffix_column)
    page = page_of(html, policy, reveal=reveal, device=device, foreign=foreign, outside=read)
    kept = _journal(journal, report, read)
    written = {"--report": report, "--html": html, "--journal": kept, "--log": log}
    check_files(written, policy, {"the list of --list": list_file})
    with RunLog(log, "scan", outside=read) as lines:
        with going_on(kept), progress_shown(quiet, lines) as progress:
            found = run(
                checkpoint,
                policy,
                device=device,
                dtype=dtype,
                seed=seed,
                also=measures,
                foreign=foreign,
                adapter=adapter,
                journal=kept,
                deliver=lambda found: None if report is None else write_report(found, report),
                progress=progress,
                remark=remarks(quiet, lines),
            )
        with finished(None if report is None else f"{report} was written."):
            lines.report(found)
            deliver(found, None, as_json=json, quiet=quiet, page=page)
        raise typer.Exit(found.verdict.exit_code)


def _journal(journal: Path | None, report: Path | None, outside: Sequence[str]) -> Path | None:
    """Where the scan keeps how far it has got: as told, else beside its report, else nowhere.

    Raises OutputError where that is in one of the directories `outside`.
    """
    from memscrub.journals.run_journal import journal_file

    if journal is not None:
        check_place(journal, "the journal")
        for directory in outside:
            if lies_in(journal, directory):
                raise OutputError(f"{journal} lies in {directory}, which is never written; keep the journal elsewhere.")
        return journal
    if report is None or (report.exists() and not report.is_file()):
        return None
    return journal_file(report)


def _measures(names: list[str]) -> tuple[Any, ...]:
    from memscrub.policy.sections import Also

    known = get_args(Also)
    if wrong := [name for name in names if name not in known]:
        raise UsageError(f"the measure '{wrong[0]}' is not known; use {', '.join(known)}.")
    return tuple(names)


def _foreign(
    format: str | None,
    path: Path | None,
    class_name: str | None,
    split: str | None,
    text_column: str,
    prefix_column: str | None,
    suffix_column: str | None,
) -> ForeignSource | None:
    from memscrub.jobs.foreign_lists import ForeignSource

    if format is None and path is None:
        if class_name or split or prefix_column or suffix_column:
            raise UsageError("these options are about a list in another format; name it with --format and --list.")
        return None
    if format is None or path is None:
        raise UsageError("--format and --list belong together: the format of a list, and where it lies.")
    return ForeignSource(format, path, class_name, split, text_column, prefix_column, suffix_column)
