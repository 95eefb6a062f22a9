"""The command `memscrub fix`: parses, fixes, shows the report; a part of the command line.

Heavy modules are imported inside it, so that `memscrub --help` does not load torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from memscrub.cli.options import (
    AsJson,
    Checkpoint,
    Device,
    HtmlFile,
    LogFile,
    NoAdapter,
    PolicyFile,
    Quiet,
    ReportFile,
    Reveal,
    Seed,
    passphrase,
)
from memscrub.cli.output import check_report_file, deliver, progress_shown, remarks, say_written
from memscrub.cli.page_output import page_of
from memscrub.journals.interrupts import finished, going_on
from memscrub.journals.run_log import RunLog

Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it must not exist yet.")]
Sign = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--sign", help="Private key (PEM) to sign with, or `sigstore` to sign with an identity."),
]
TrustConfig = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--trust-config", help="With --sign sigstore: another instance's services (JSON)."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output directory.")]
KeepPartial = Annotated[
    bool, typer.Option("--keep-partial", help="Write the directory even if the policy is not reached.")
]
PatchFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--patch", help="Write the edit as a patch file too; it undoes the edit, so keep it apart."),
]
StatsFile = Annotated[Optional[Path], typer.Option("--stats", help="Keep the retain statistics in this file.")]  # noqa: UP045
Utility = Annotated[
    Optional[str], typer.Option("--utility", help="lm-eval:TASK[,TASK] to run before and after.")  # noqa: UP045
]


def fix(
    checkpoint: Checkpoint,
    policy: PolicyFile,
    out: Out,
    sign: Sign = None,
    trust_config: TrustConfig = None,
    overwrite: Overwrite = False,
    keep_partial: KeepPartial = False,
    patch: PatchFile = None,
    stats: StatsFile = None,
    utility: Utility = None,
    adapter: NoAdapter = None,
    report: ReportFile = None,
    html: HtmlFile = None,
    reveal: Reveal = False,
    log: LogFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Edit the texts out, re-measure the written bytes, sign. Exit 0: within the policy, 4: out of reach."""
    check_report_file(report)
    page = page_of(html, policy, reveal=reveal, device=device, outside=[checkpoint, out])
    from memscrub.jobs.scrub import Signing
    from memscrub.jobs.scrub import fix as run
    from memscrub.journals.run_journal import journal_file
    from memscrub.locality.utility import tasks_of

    signing = None if sign is None else Signing(sign, passphrase(sign), trust_config)
    with RunLog(log, "fix", outside=[checkpoint, out]) as lines:
        with going_on(journal_file(out)), progress_shown(quiet, lines) as progress:
            fixed = run(
                checkpoint,
                policy,
                out,
                sign=signing,
                overwrite=overwrite,
                keep_partial=keep_partial,
                patch=patch,
                statistics=stats,
                utility=None if utility is None else tasks_of(utility),
                device=device,
                seed=seed,
                progress=progress,
                remark=remarks(quiet, lines),
            )
        with finished(None if fixed.directory is None else f"{fixed.directory} was written."):
            lines.report(fixed.report)
            deliver(fixed.report, report, as_json=json, quiet=quiet, page=page)
            if not quiet:
                say_written(fixed, f"nothing was written to {out}; --keep-partial writes it all the same.")
        raise typer.Exit(fixed.report.verdict.exit_code)
