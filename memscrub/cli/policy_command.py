"""The command `memscrub policy check`: parses, checks, says what is there; a part of the command line.

Needs neither model nor torch, so that it can run before every commit.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memscrub.cli.options import Quiet
from memscrub.cli.output import say
from memscrub.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from memscrub.jobs.policy_check import PolicyCheck


class Action(str, Enum):
    """What can be done with a policy."""

    CHECK = "check"


def policy(
    action: Annotated[Action, typer.Argument(help="check: the policy, its lists and its waivers.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Policies (TOML).")],
    quiet: Quiet = False,
) -> None:
    """Check policies, their lists and waivers, without a model. Exit 0: all are sound, 2: one is not."""
    from memscrub.jobs.policy_check import check_policy

    sound = True
    for file in files:
        try:
            found = check_policy(file)
        except UsageError as error:  # the other files are looked at all the same
            say(f"memscrub: {error}")
            sound = False
            continue
        if not quiet:
            typer.echo(f"{file}: {_summary(found)}")
            for remark in found.remarks:
                typer.echo(f"  {remark}.")
    if not sound:
        raise typer.Exit(int(ExitCode.USAGE))


def _summary(found: PolicyCheck) -> str:
    """Counts in one line."""
    texts = ", ".join(f"{name} {count}" for name, count in found.texts.items())
    count = sum(found.texts.values())
    parts = [
        f"{count} protected text{'s' * (count != 1)} ({texts})",
        f"{found.controls} control{'s' * (found.controls != 1)}",
    ]
    if found.waivers:
        next_end = min(waiver.expires for waiver in found.waivers)
        many = f"{len(found.waivers)} waivers, the next" if len(found.waivers) > 1 else "1 waiver, which"
        parts.append(f"{many} expires on {next_end}")
    return "ok, " + ", ".join(parts)
