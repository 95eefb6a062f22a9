"""Arguments and options that several commands share, as typer wants them; knows no command."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from memscrub.errors import UsageError

Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="Local directory, HF cache snapshot or hub id.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A written checkpoint directory.")]
PolicyFile = Annotated[Path, typer.Option("--policy", "-p", help="The policy (TOML).")]
ReportFile = Annotated[Optional[Path], typer.Option("--report", help="Write the JSON report to this file.")]  # noqa: UP045
HtmlFile = Annotated[Optional[Path], typer.Option("--html", help="Write a page for people to this file.")]  # noqa: UP045
Reveal = Annotated[bool, typer.Option("--reveal", help="Show the protected texts in the page of --html.")]
LogFile = Annotated[Optional[Path], typer.Option("--log", help="Log to this file, as JSON lines.")]  # noqa: UP045
AsJson = Annotated[bool, typer.Option("--json", help="Print the JSON report instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampled statistics.", min=0, max=2**63 - 1)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps ..., or spread: all GPUs.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Arithmetic: auto (float32), float32, bfloat16, float16.")]
PublicKey = Annotated[Optional[Path], typer.Option("--key", help="Public key (PEM) to verify with.")]  # noqa: UP045


def _merge_first(adapter: str | None) -> None:
    if adapter is not None:
        raise UsageError(
            "what is fixed is the weights of one directory; write one with `memscrub merge BASE --adapter"
            f" {shlex.quote(adapter)} --out NEW` and fix NEW."
        )


# Not shown in the help: it is there for the advice, since `scan` has such an option.
NoAdapter = Annotated[Optional[str], typer.Option("--adapter", hidden=True, callback=_merge_first)]  # noqa: UP045


def passphrase(key: Path | None) -> str | None:
    """The passphrase of a private key: from MEMSCRUB_KEY_PASSWORD, else asked for where there is a terminal."""
    from memscrub.proof.keys import PASSWORD_VARIABLE, is_encrypted

    known = os.environ.get(PASSWORD_VARIABLE)
    if known is not None or key is None or not sys.stdin.isatty():
        return known
    try:
        encrypted = is_encrypted(key.read_bytes())
    except OSError:
        return None  # whoever opens the key says what is wrong with it
    return str(typer.prompt(f"Passphrase of {key}", hide_input=True, err=True)) if encrypted else None
