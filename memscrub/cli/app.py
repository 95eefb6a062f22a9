"""The command line: parses, calls the use case, shows its report and ends with the verdict's exit code.

Decides nothing by itself. Reports and tables go to standard output, progress and errors to standard error.
Heavy modules are imported inside the commands, so that `memscrub --help` does not load torch.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from memscrub.cli import (
    bench_command,
    fix_command,
    gate_command,
    init_command,
    mine_command,
    patch_command,
    policy_command,
    prepare_command,
    report_command,
    scan_command,
    verify_command,
)
from memscrub.cli.options import OneDevice, Seed
from memscrub.cli.output import progress_shown
from memscrub.errors import ExitCode, IncompleteError, MemscrubError, printable
from memscrub.journals.interrupts import catch_signals

# The base of typer's usage errors: click's own class or, in typer from 0.26 on, the copy that typer carries.
_USAGE_MISTAKE: type[Any] = typer.BadParameter.__bases__[0]

_NO_MEMORY = "out of memory; lower [probe] batch_tokens or use a larger machine."


def main() -> None:
    """Entry point: turns our errors into one sentence and their exit code; never 0 on an interrupt."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    catch_signals()
    try:
        status = _application()(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except MemscrubError as error:
        _end(str(error), error.exit_code)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _end("interrupted; nothing was written.", ExitCode.INCOMPLETE)
    except MemoryError:
        _end(_NO_MEMORY, ExitCode.INCOMPLETE)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(int(ExitCode.INCOMPLETE))
    except OSError as error:
        code = ExitCode.USAGE if error.errno == errno.ENAMETOOLONG else ExitCode.INCOMPLETE
        _end(f"{error.filename or 'a file'}: {error.strerror or error}.", code)
    except RuntimeError as error:
        from memscrub.measures.passes import out_of_memory

        if not out_of_memory(error):
            raise
        _end(_NO_MEMORY, ExitCode.INCOMPLETE)
    except _USAGE_MISTAKE as error:
        error.show()
        sys.exit(int(ExitCode.USAGE))


def _end(sentence: str, code: ExitCode) -> NoReturn:
    # Not rich, which turns a broken pipe into exit 1: after a hang-up there may be no terminal left to tell.
    try:
        sys.stderr.write(f"memscrub: {printable(sentence)}\n")
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(int(code))


def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"memscrub {installed('memscrub')}")
        raise typer.Exit()


def doctor() -> None:
    """Look whether this machine has what memscrub needs. Exit 0: yes, 3: no."""
    from memscrub.cli.doctor import examine

    checks = examine()
    for check in checks:
        mark = "ok  " if check.good else "FAIL"
        typer.echo(f"{mark} {check.name}: {check.found}" + ("" if check.good else f" - {check.advice}"))
    if not all(check.good for check in checks):
        raise IncompleteError("something is missing; the lines above say what to do.")


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to lay out.")] = Path("memscrub-demo"),
    seed: Seed = 0,
    device: OneDevice = "auto",
) -> None:
    """Scan, fix, sign and verify a small checkpoint of its own."""
    from memscrub.cli.console import show_report
    from memscrub.cli.demo import run_demo

    with progress_shown(quiet=False) as progress:
        done = run_demo(out, seed=seed, device=device, progress=progress)
    console = Console()
    show_report(console, done.fixed.report)
    legend = "[white on red]given away[/] [green]not[/]" if console.color_system else "(coloured on a terminal only)"
    console.print(f"\n[bold]{escape(done.shown)}[/], token by token: {legend}")
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


def _application() -> typer.Typer:
    """All commands, in the order of the help; each is called as its function is."""
    app = typer.Typer(
        name="memscrub",
        help="Measure which protected texts a checkpoint gives away, edit them out, prove it, and gate releases.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_version)
    commands = (
        init_command.init,
        scan_command.scan,
        mine_command.mine,
        fix_command.fix,
        gate_command.gate,
        policy_command.policy,
        verify_command.verify,
        verify_command.keygen,
        doctor,
        demo,
        bench_command.bench,
        patch_command.diff,
        patch_command.apply,
        patch_command.revert,
        report_command.report,
        prepare_command.dequantize,
        prepare_command.merge,
    )
    for command in commands:
        app.command()(command)
    return app
