"""The command line: parses, calls the use case, shows its report and ends with the verdict's exit code.

Decides nothing by itself. Reports and tables go to standard output, progress and errors to standard error.
Heavy modules are imported inside the commands, so that `memscrub --help` does not load torch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape

from memscrub import bench_command
from memscrub.cli_options import (
    AsJson,
    Checkpoint,
    Device,
    Directory,
    Dtype,
    PolicyFile,
    PublicKey,
    Quiet,
    ReportFile,
    Seed,
)
from memscrub.errors import ExitCode, IncompleteError, MemscrubError, UsageError

if TYPE_CHECKING:
    from memscrub.measure import Progress
    from memscrub.report import Report

app = typer.Typer(
    name="memscrub",
    help="Measure which protected texts a checkpoint gives away, edit them out, prove it, and gate releases.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The base of typer's usage errors: click's own class or, in typer from 0.26 on, the copy that typer carries.
_USAGE_MISTAKE: type[Any] = typer.BadParameter.__bases__[0]

PASSWORD = "MEMSCRUB_KEY_PASSWORD"


def main() -> None:
    """Entry point: turns our errors into one sentence and their exit code; never 0 on an interrupt."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, _terminate)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except MemscrubError as error:
        errors.print(f"memscrub: {error}", markup=False)
        sys.exit(int(error.exit_code))
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("memscrub: interrupted; nothing was written.", markup=False)
        sys.exit(int(ExitCode.INCOMPLETE))
    except MemoryError:
        errors.print("memscrub: out of memory; lower [probe] batch_tokens or use a larger machine.", markup=False)
        sys.exit(int(ExitCode.INCOMPLETE))
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(int(ExitCode.INCOMPLETE))
    except _USAGE_MISTAKE as error:
        error.show()
        sys.exit(int(ExitCode.USAGE))


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    # Not KeyboardInterrupt: typer would turn that into its own exit code.
    raise IncompleteError("interrupted; nothing was written.")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"memscrub {installed('memscrub')}")
        raise typer.Exit()


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where to put the files.")] = Path("."),
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="release-gate, pii-strict or copyright.")
    ] = "release-gate",
) -> None:
    """Write a policy, an example list of protected texts and a retain sample to start from."""
    from memscrub.init_files import write_starter

    for path in write_starter(directory, policy):
        typer.echo(f"wrote {path}")


@app.command()
def scan(
    checkpoint: Checkpoint,
    policy: PolicyFile,
    report: ReportFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure what a checkpoint gives away of the policy's texts. Exit 0: within the policy, 1: not."""
    _check_report_file(report)
    from memscrub.scanning import scan as run

    with _progress(quiet) as progress:
        found = run(checkpoint, policy, device=device, dtype=dtype, seed=seed, progress=progress)
    _deliver(found, report, as_json=json, quiet=quiet)
    raise typer.Exit(found.verdict.exit_code)


@app.command()
def fix(
    checkpoint: Checkpoint,
    policy: PolicyFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it must not exist yet.")],
    sign: Annotated[Optional[Path], typer.Option("--sign", help="Private key (PEM) to sign with.")] = None,  # noqa: UP045
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output directory.")] = False,
    keep_partial: Annotated[
        bool, typer.Option("--keep-partial", help="Write the directory even if the policy is not reached.")
    ] = False,
    stats: Annotated[Optional[Path], typer.Option("--stats", help="Keep the retain statistics in this file.")] = None,  # noqa: UP045
    utility: Annotated[
        Optional[str], typer.Option("--utility", help="lm-eval:TASK[,TASK] to run before and after.")  # noqa: UP045
    ] = None,
    report: ReportFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Edit the texts out, re-measure the written bytes, sign. Exit 0: within the policy, 4: out of reach."""
    _check_report_file(report)
    from memscrub.scrub import Signing
    from memscrub.scrub import fix as run
    from memscrub.utility import tasks_of

    signing = None if sign is None else Signing(sign, os.environ.get(PASSWORD))
    with _progress(quiet) as progress:
        fixed = run(
            checkpoint,
            policy,
            out,
            sign=signing,
            overwrite=overwrite,
            keep_partial=keep_partial,
            statistics=stats,
            utility=None if utility is None else tasks_of(utility),
            device=device,
            seed=seed,
            progress=progress,
        )
    _deliver(fixed.report, report, as_json=json, quiet=quiet)
    if not quiet:
        if fixed.directory is None:
            _say(f"nothing was written to {out}; --keep-partial writes it all the same.")
        else:
            how = "signed" if fixed.signed else "not signed: give --sign KEY to sign it"
            _say(f"written to {fixed.directory} ({how})")
    raise typer.Exit(fixed.report.verdict.exit_code)


@app.command()
def gate(
    directory: Directory,
    policy: PolicyFile,
    key: PublicKey = None,
    report: ReportFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """CI verdict on a directory: signature, then measures. Exit 0: pass, 1: violated, 5: signature invalid."""
    _check_report_file(report)
    from memscrub.gating import gate as run

    with _progress(quiet) as progress:
        gated = run(directory, policy, key=key, device=device, dtype=dtype, seed=seed, progress=progress)
    _deliver(gated.report, report, as_json=json, quiet=quiet)
    if not quiet:
        if gated.verification is not None:
            _say(f"signature good: key {gated.verification.key_id}")
        for remark in gated.remarks:
            _say(remark)
    raise typer.Exit(gated.report.verdict.exit_code)


@app.command()
def verify(
    directory: Directory,
    key: Annotated[Path, typer.Option("--key", help="Public key (PEM) to verify with.")],
    quiet: Quiet = False,
) -> None:
    """Check signature, digests and file list of a signed directory, offline. Exit 0: good, 5: not."""
    from memscrub.signing import verify_directory

    found = verify_directory(directory, key)
    if not quiet:
        typer.echo(f"signature good: {len(found.files)} files, key {found.key_id}")
        typer.echo(f"checkpoint digest sha256:{found.root_digest}")
        typer.echo(f"signed result: {found.result or 'no report'}")


@app.command()
def keygen(
    private: Annotated[Path, typer.Argument(help="File for the private key.")] = Path("key.pem"),
    public: Annotated[Path, typer.Argument(help="File for the public key.")] = Path("key.pub.pem"),
    kind: Annotated[str, typer.Option("--kind", help="ec-p256 or ed25519.")] = "ec-p256",
) -> None:
    """Make a key pair for signing; MEMSCRUB_KEY_PASSWORD encrypts the private key."""
    from memscrub.keys import generate_keypair

    if kind not in ("ec-p256", "ed25519"):
        raise UsageError(f"the kind of key '{kind}' is not known; use ec-p256 or ed25519.")
    chosen = "ec-p256" if kind == "ec-p256" else "ed25519"
    generate_keypair(private, public, kind=chosen, password=os.environ.get(PASSWORD))  # type: ignore[arg-type]
    typer.echo(f"wrote {private} (keep it secret) and {public} (hand it to whoever verifies)")


@app.command()
def doctor() -> None:
    """Look whether this machine has what memscrub needs. Exit 0: yes, 3: no."""
    from memscrub.doctor import examine

    checks = examine()
    for check in checks:
        mark = "ok  " if check.good else "FAIL"
        typer.echo(f"{mark} {check.name}: {check.found}" + ("" if check.good else f" - {check.advice}"))
    if not all(check.good for check in checks):
        raise IncompleteError("something is missing; the lines above say what to do.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to lay out.")] = Path("memscrub-demo"),
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Scan, fix, sign and verify the small checkpoint that ships with memscrub."""
    from memscrub.console import show_report
    from memscrub.demo import run_demo

    with _progress(quiet=False) as progress:
        done = run_demo(out, seed=seed, device=device, progress=progress)
    console = Console()
    show_report(console, done.fixed.report)
    console.print(f"\n[bold]{escape(done.shown)}[/], token by token: [white on red]given away[/] [green]not[/]")
    console.print("before: ", done.before, sep="")
    console.print("after:  ", done.after, sep="")
    names = {
        "checkpoint": "as it was",
        "scrubbed": "edited, signed, with its report",
        "policy.toml": "the policy",
    }
    console.print()
    for name, what in names.items():
        console.print(f"{out / name}  {what}", highlight=False, soft_wrap=True)
    console.print("\ntry next:", highlight=False)
    for line in (
        f"memscrub gate {out}/checkpoint --policy {out}/policy.toml",
        f"memscrub gate {out}/scrubbed --policy {out}/policy.toml --key {out}/key.pub.pem",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    raise typer.Exit(done.fixed.report.verdict.exit_code)


bench = app.command("bench")(bench_command.bench)


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    from memscrub.progress import shown

    with shown(Console(stderr=True), quiet=quiet) as progress:
        yield progress


def _deliver(report: Report, file: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Write the report before anything is printed: a broken pipe must not cost it."""
    if file is not None:
        from memscrub.writing import disk_errors

        with disk_errors(file):
            file.write_text(report.to_json(), encoding="utf-8")
    if as_json:
        sys.stdout.write(report.to_json())
    elif not quiet:
        from memscrub.console import show_report

        show_report(Console(), report)


def _check_report_file(file: Path | None) -> None:
    """A report that cannot be written should be known before an hour of work."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise UsageError(f"{file}: the report cannot be written there; name a file in a folder that exists.")


def _say(sentence: str) -> None:
    """A remark for people: on standard error, so that `--json` output stays JSON."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(sentence, markup=False)
