"""The command `memscrub gate`: parses, gates, shows the report; a part of the command line.

Heavy modules are imported inside it, so that `memscrub --help` does not load torch; a gate that trusts signed
measures never does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memscrub.cli.options import (
    AsJson,
    Device,
    Directory,
    Dtype,
    HtmlFile,
    LogFile,
    PolicyFile,
    PublicKey,
    Quiet,
    ReportFile,
    Reveal,
    Seed,
)
from memscrub.cli.output import check_files, check_report_file, deliver, progress_shown, remarks, say
from memscrub.cli.page_output import page_of
from memscrub.errors import UsageError
from memscrub.journals.run_log import RunLog

Trust = Annotated[bool, typer.Option("--trust", help="Take the signed measures or end with exit 2; never measure.")]
Remeasure = Annotated[bool, typer.Option("--remeasure", help="Measure again, whatever the signed report says.")]
BaselineFile = Annotated[
    Path | None, typer.Option("--baseline", help="An earlier JSON report: fail only on what got worse since.")
]
Tolerance = Annotated[
    float | None, typer.Option("--tolerance", help="With --baseline: share by which a measure may be above (0.05).")
]


def gate(
    directory: Directory,
    policy: PolicyFile,
    key: PublicKey = None,
    remeasure: Remeasure = False,
    trust: Trust = False,
    baseline: BaselineFile = None,
    tolerance: Tolerance = None,
    report: ReportFile = None,
    html: HtmlFile = None,
    reveal: Reveal = False,
    log: LogFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """CI verdict on a directory: signature, then measures. Exit 0: pass, 1: violated, 5: signature invalid."""
    check_report_file(report, directory)
    if tolerance is not None and baseline is None:
        raise UsageError("--tolerance is about a baseline; name one with --baseline.")
    page = page_of(html, policy, reveal=reveal, device=device, outside=[directory])
    read = {"the key": key, "the baseline": baseline}
    check_files({"--report": report, "--html": html, "--log": log}, policy, read)
    from memscrub.jobs.gating import gate as run
    from memscrub.reports.baseline import TOLERANCE

    with RunLog(log, "gate", outside=[directory]) as lines:
        with progress_shown(quiet, lines) as progress:
            gated = run(
                directory,
                policy,
                key=key,
                remeasure=remeasure,
                trust=trust,
                baseline=baseline,
                tolerance=TOLERANCE if tolerance is None else tolerance,
                device=device,
                dtype=dtype,
                seed=seed,
                progress=progress,
            )
        lines.report(gated.report)
        deliver(gated.report, report, as_json=json, quiet=quiet, page=page)
        if gated.verification is not None and not quiet:
            say(f"signature good: key sha256:{gated.verification.key_id}")
        remark = remarks(quiet, lines)
        for sentence in gated.remarks:
            remark(sentence)
        raise typer.Exit(gated.report.verdict.exit_code)
