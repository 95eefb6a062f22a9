"""Arguments and options that several commands share, as typer wants them; knows no command."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from memscrub.errors import UsageError

Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="Local directory, HF cache snapshot or hub id.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A written checkpoint directory.")]
OutDirectory = Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it must not exist yet.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output directory.")]
PolicyFile = Annotated[Path, typer.Option("--policy", "-p", help="The policy (TOML).")]
ReportFile = Annotated[Path | None, typer.Option("--report", help="Write the JSON report to this file.")]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="Write a page for people to this file.")]
Reveal = Annotated[bool, typer.Option("--reveal", help="Show the protected texts in the page of --html.")]
LogFile = Annotated[Path | None, typer.Option("--log", help="Log to this file, as JSON lines.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the JSON report instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampled statistics.", min=0, max=2**63 - 1)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps ..., or spread: all GPUs.")]
# An edit needs the whole model on one device.
OneDevice = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="Arithmetic: auto (float32), float32, bfloat16, float16.")]
AdapterName = Annotated[
    str | None, typer.Option("--adapter", help="A LoRA adapter (directory or hub id) to add to CKPT in memory first.")
]
PublicKey = Annotated[Path | None, typer.Option("--key", help="Public key (PEM) to verify with.")]


def _merge_first(adapter: str | None) -> None:
    if adapter is not None:
        raise UsageError(
            "what is fixed is the weights of one directory; write one with `memscrub merge BASE --adapter"
            f" {shlex.quote(adapter)} --out NEW` and fix NEW."
        )


# Not shown in the help: it is there for the advice, since `scan` has such an option.
NoAdapter = Annotated[str | None, typer.Option("--adapter", hidden=True, callback=_merge_first)]


def passphrase(key: Path | None) -> str | None:
    """The passphrase of a private key: from MEMSCRUB_KEY_PASSWORD, else asked for where there is a terminal."""
    from memscrub.proof.keys import PASSWORD_VARIABLE, is_encrypted, read_key

    known = os.environ.get(PASSWORD_VARIABLE)
    if known is not None or key is None or not sys.stdin.isatty():
        return known
    try:
        encrypted = is_encrypted(read_key(key))
    except UsageError:
        return None  # whoever opens the key says what is wrong with it
    return str(typer.prompt(f"Passphrase of {key}", hide_input=True, err=True)) if encrypted else None
