"""The command `memscrub report`: one stored report in the formats that people and other tools read; a part of the
command line. Measures nothing and decides nothing: the verdict is the one that the report states.

Heavy modules are imported inside it, so that `memscrub --help` stays fast.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memscrub.cli.options import Device, PublicKey, Quiet
from memscrub.cli.output import check_files, check_report_file, progress_shown, say
from memscrub.cli.page_output import page_of, write_page
from memscrub.errors import MemscrubError, UsageError
from memscrub.storage.output_file import write_output

if TYPE_CHECKING:
    from memscrub.reports.report import Report

_SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"

Source = Annotated[
    Path, typer.Argument(metavar="FILE_OR_DIR", help="A JSON report, or a written directory that holds one.")
]
Html = Annotated[Path | None, typer.Option("--html", help="Write one self-contained page for people.")]
JUnit = Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML, for CI systems.")]
Sarif = Annotated[Path | None, typer.Option("--sarif", help="Write SARIF 2.1.0, for code scanning.")]
Markdown = Annotated[Path | None, typer.Option("--markdown", help="Write Markdown.")]
ModelCard = Annotated[
    Path | None, typer.Option("--model-card", help="Put a section into this README.md, in place of an earlier one.")
]
StepSummary = Annotated[
    bool, typer.Option("--step-summary", help="Append Markdown to the summary of this GitHub Actions step.")
]
GitHub = Annotated[bool, typer.Option("--github", help="--step-summary, and annotations on the lines of the list.")]
PolicyNow = Annotated[
    Path | None, typer.Option("--policy", "-p", help="Where the policy lies now: lists are looked for from its folder.")
]
Reveal = Annotated[bool, typer.Option("--reveal", help="With --html and --policy: show the protected texts.")]
Strips = Annotated[bool, typer.Option("--strips", help="With --html and --policy: mark every token, masked.")]
ByVerdict = Annotated[bool, typer.Option("--exit-code", help="End with the exit code of the report's verdict.")]


def report(
    source: Source,
    html: Html = None,
    junit: JUnit = None,
    sarif: Sarif = None,
    markdown: Markdown = None,
    model_card: ModelCard = None,
    step_summary: StepSummary = False,
    github: GitHub = False,
    policy: PolicyNow = None,
    strips: Strips = False,
    reveal: Reveal = False,
    device: Device = "auto",
    key: PublicKey = None,
    exit_code: ByVerdict = False,
    quiet: Quiet = False,
) -> None:
    """Show a stored report again, and write it in other formats. Exit 0: done; what it states with --exit-code."""
    files = {"--html": html, "--junit": junit, "--sarif": sarif, "--markdown": markdown, "--model-card": model_card}
    path = _report_file(source)
    _check_files(files, path, policy)
    _check_options(strips=strips, reveal=reveal, html=html, policy=policy)
    outside = [source] if source.is_dir() else []
    page = page_of(html, policy if strips or reveal else None, reveal=reveal, device=device, outside=outside)
    summary = _summary_file() if step_summary or github else None
    with _told(junit, sarif):
        found = _stated(source, path, key, quiet=quiet)
    code = _exit_code(found) if exit_code else 0
    _write_faces(found, junit, sarif, markdown, model_card, policy)
    if page is not None:
        with progress_shown(quiet) as progress:
            write_page(_where_it_is(found, source), page, progress)
    if summary is not None:
        _append_summary(found, summary)
    if not quiet:
        with _no_commands() if github else _plainly():
            _show(found)
    if github:
        from memscrub.faces.step_summary import commands

        for line in commands(found, policy=policy):
            typer.echo(line)
    raise typer.Exit(code)


def _where_it_is(found: Report, source: Path) -> Report:
    """The report with its written checkpoint where the user named it: a directory may have been moved since."""
    if found.output is None or not source.is_dir():
        return found
    return replace(found, output=replace(found.output, path=str(source)))


def _report_file(source: Path) -> Path:
    from memscrub.reports.report import REPORT_NAME

    return source / REPORT_NAME if source.is_dir() else source


def _check_files(files: Mapping[str, Path | None], report: Path, policy: Path | None) -> None:
    from memscrub.faces.model_card import refuse_signed

    for file in files.values():
        check_report_file(file)
        if file is not None:
            refuse_signed(file)
    check_files(files, policy, {"the report itself": report})


def _check_options(*, strips: bool, reveal: bool, html: Path | None, policy: Path | None) -> None:
    if strips and (html is None or policy is None):
        raise UsageError("--strips marks the tokens of texts, which no report holds; give --html and --policy too.")
    if reveal and html is None:
        raise UsageError("--reveal is about the page of --html alone; every other format never shows texts.")
    if reveal and policy is None:
        raise UsageError("--reveal needs the texts, which no report holds; name their policy with --policy.")


def _summary_file() -> Path:
    named = os.environ.get(_SUMMARY_VARIABLE)
    if not named:
        raise UsageError(f"{_SUMMARY_VARIABLE} is not set: this is no step of GitHub Actions; use --markdown FILE.")
    return Path(named)


@contextmanager
def _told(junit: Path | None, sarif: Path | None) -> Iterator[None]:
    """Where there is no report to show, the files that CI reads say why: a missing file may pass for a good one."""
    try:
        yield
    except MemscrubError as error:
        from memscrub.faces import junit as junit_face
        from memscrub.faces import sarif as sarif_face
        from memscrub.faces.escaping import printable

        message = printable(str(error))
        for file, render in ((junit, junit_face.render_error), (sarif, sarif_face.render_error)):
            if file is not None:
                write_output(file, render(message))
        raise


def _stated(source: Path, path: Path, key: Path | None, *, quiet: bool) -> Report:
    """The report as stored, made printable; with a key its signature was good."""
    from memscrub.errors import SignatureInvalidError
    from memscrub.faces.escaping import printable
    from memscrub.reports.report import REPORT_NAME, load_report

    if key is not None:
        from memscrub.proof.signing import verify_directory

        if not source.is_dir():
            raise UsageError(f"{source}: --key checks a signed directory, not a file; name the directory.")
        verified = verify_directory(source, key)
        if REPORT_NAME not in verified.files:
            raise SignatureInvalidError(f"{path}: the signature does not cover the report.")
    elif source.is_dir() and not quiet:
        say("signature not checked: the report is shown as it is stated; --key FILE checks it.")
    return printable(load_report(path))


def _exit_code(found: Report) -> int:
    """The code of the stated outcome, by the table that every verdict's code comes from."""
    from memscrub.reports.verdict import EXIT_CODES

    code = int(EXIT_CODES[found.verdict.outcome])
    if code != found.verdict.exit_code:
        outcome, stated = found.verdict.outcome.value, found.verdict.exit_code
        raise UsageError(f"the report contradicts itself: outcome {outcome} and exit code {stated}; make it again.")
    return code


def _write_faces(
    found: Report,
    junit: Path | None,
    sarif: Path | None,
    markdown: Path | None,
    model_card: Path | None,
    policy: Path | None,
) -> None:
    if junit is not None:
        from memscrub.faces import junit as junit_face

        write_output(junit, junit_face.render(found, policy=policy))
    if sarif is not None:
        from memscrub.faces import sarif as sarif_face

        write_output(sarif, sarif_face.render(found, policy=policy))
    if markdown is not None:
        from memscrub.faces import markdown as markdown_face

        write_output(markdown, markdown_face.render(found).encode("utf-8"))
    if model_card is not None:
        from memscrub.faces.model_card import updated

        write_output(model_card, updated(_card(model_card), found, model_card).encode("utf-8"))


def _card(path: Path) -> str:
    if path.is_symlink():
        raise UsageError(f"{path} is a link, maybe into a cache that others use; name the file itself.")
    if not path.exists():
        return ""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not valid UTF-8; save the card as UTF-8 text.") from None
    except OSError as error:
        raise UsageError(f"{path}: the card cannot be read ({error.strerror}).") from None


def _append_summary(found: Report, path: Path) -> None:
    from memscrub.faces.step_summary import MAX_BYTES, summary
    from memscrub.storage.partial import disk_errors

    with disk_errors(path):
        taken = path.stat().st_size if path.exists() else 0
        text = summary(found, room=MAX_BYTES - taken)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    if not text:
        say(f"the step's summary is full ({taken} bytes of {MAX_BYTES}): the report was not added to it.")


@contextmanager
def _plainly() -> Iterator[None]:
    yield


@contextmanager
def _no_commands() -> Iterator[None]:
    """GitHub looks for commands in all that is printed; nothing in a report may be one."""
    token = secrets.token_hex(16)
    typer.echo(f"::stop-commands::{token}")
    try:
        yield
    finally:
        typer.echo(f"::{token}::")


def _show(found: Report) -> None:
    from rich.console import Console

    from memscrub.cli.console import show_report

    show_report(Console(), found)
