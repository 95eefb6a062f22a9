"""The command `memscrub init`: a policy to start from, and protected texts proposed from a corpus; part of the command
line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memscrub.cli.output import say
from memscrub.errors import UsageError

Corpus = Annotated[
    list[Path] | None,
    typer.Option("--from-corpus", help="Propose personal data found in this file (memscrub[pii]); may be repeated."),
]
Kinds = Annotated[
    list[str] | None,
    typer.Option("--kind", help="With --from-corpus: only this kind, such as email or phone; may be repeated."),
]
# The class that proposals are of: the shipped policies for personal data have it.
CLASS = "pii"


def init(
    directory: Annotated[Path, typer.Argument(help="Where to put the files.")] = Path("."),
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="release-gate, pii-strict or copyright.")
    ] = "release-gate",
    from_corpus: Corpus = None,
    kind: Kinds = None,
    threshold: Annotated[
        float, typer.Option("--threshold", help="With --from-corpus: least score of a finding.", min=0, max=1)
    ] = 0.4,
) -> None:
    """Write a policy, example texts and ordinary text to start from."""
    from memscrub.policy.init_files import write_starter

    if not from_corpus:
        if kind:
            raise UsageError("--kind chooses what is looked for in a corpus; name one with --from-corpus FILE.")
        written = write_starter(directory, policy)
    else:
        written = write_starter(
            directory,
            policy,
            proposed=_proposed(from_corpus, directory, policy, kind or [], threshold),
            class_name=CLASS,
        )
    for path in written:
        typer.echo(f"wrote {path}")


def _proposed(corpus: list[Path], directory: Path, policy: str, kinds: list[str], threshold: float) -> str:
    """Lines of a protected list with what was found; counts per kind are said, never a text."""
    from memscrub.policy.init_files import check_starter
    from memscrub.texts.pii_discovery import open_finder, propose
    from memscrub.texts.protected import iter_texts

    check_starter(directory, policy, CLASS)
    finder = open_finder(kinds or None)
    found = propose(iter_texts(corpus), finder, threshold=threshold)
    if not found.entries:
        raise UsageError(
            f"no personal data was found in {found.documents} documents; lower --threshold or choose other kinds."
        )
    counts = ", ".join(f"{count} {name}" for name, count in sorted(found.counts.items()))
    say(f"found in {found.documents} documents: {counts}")
    if found.dropped:
        say(f"left out as repetitions: {found.dropped}")
    if finder.model is None:
        say("no spaCy model is installed: names and places were not looked for.")
    say("these are proposals: read the list, delete what is public, add what was not found.")
    return found.to_jsonl(CLASS)
