"""The command `memscrub fix`: parses, fixes, shows the report; a part of the command line.

Heavy modules are imported inside it, so that `memscrub --help` does not load torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memscrub.cli.options import (
    AsJson,
    Checkpoint,
    HtmlFile,
    LogFile,
    NoAdapter,
    OneDevice,
    OutDirectory,
    Overwrite,
    PolicyFile,
    Quiet,
    ReportFile,
    Reveal,
    Seed,
    passphrase,
)
from memscrub.cli.output import check_files, check_report_file, deliver, progress_shown, remarks, say_written
from memscrub.cli.page_output import page_of
from memscrub.journals.interrupts import finished, going_on
from memscrub.journals.run_log import RunLog

Sign = Annotated[
    Path | None, typer.Option("--sign", help="Private key (PEM) to sign with, or `sigstore` to sign with an identity.")
]
TrustConfig = Annotated[
    Path | None, typer.Option("--trust-config", help="With --sign sigstore: another instance's services (JSON).")
]
KeepPartial = Annotated[
    bool, typer.Option("--keep-partial", help="Write the directory even if the policy is not reached.")
]
PatchFile = Annotated[
    Path | None,
    typer.Option("--patch", help="Write the edit as a patch file too; it undoes the edit, so keep it apart."),
]
StatsFile = Annotated[Path | None, typer.Option("--stats", help="Keep the retain statistics in this file.")]
Utility = Annotated[str | None, typer.Option("--utility", help="lm-eval:TASK[,TASK] to run before and after.")]


def fix(
    checkpoint: Checkpoint,
    policy: PolicyFile,
    out: OutDirectory,
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
    device: OneDevice = "auto",
) -> None:
    """Edit the texts out, re-measure the written bytes, sign. Exit 0: within the policy, 4: out of reach."""
    check_report_file(report, checkpoint, out)
    page = page_of(html, policy, reveal=reveal, device=device, outside=[checkpoint, out])
    from memscrub.jobs.scrub import Signing
    from memscrub.jobs.scrub import fix as run
    from memscrub.journals.run_journal import journal_file
    from memscrub.locality.utility import tasks_of

    written = {"--report": report, "--html": html, "--patch": patch, "--stats": stats, "--log": log}
    read = {"the key": sign, "the file of --trust-config": trust_config, "the journal of --out": journal_file(out)}
    check_files(written, policy, read)
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
