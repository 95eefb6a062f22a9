"""The command `memscrub mine`: parses, mines, shows the funnel; a part of the command line.

Heavy modules are imported inside it, so that `memscrub --help` does not load torch.
"""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscrub.cli.options import AdapterName, Checkpoint, Device, Dtype, LogFile, Quiet
from memscrub.cli.output import progress_shown, remarks
from memscrub.errors import ExitCode
from memscrub.journals.interrupts import going_on
from memscrub.journals.run_log import RunLog
from memscrub.storage.output_file import check_apart

if TYPE_CHECKING:
    from memscrub.mining.mine import Mined

Corpus = Annotated[
    list[Path],
    typer.Option("--corpus", help="File or directory: .txt, .jsonl (.gz, .zst), .parquet; may be repeated."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The protected list to write (.jsonl).")]
Controls = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option("--controls", help="Texts never trained on: what comes out of them too is dropped."),
]
Run = Annotated[int, typer.Option("--run", help="Report runs of more tokens than this.", min=1)]
Window = Annotated[int, typer.Option("--window", help="Tokens of a window, at most what the model reads.", min=8)]
Overlap = Annotated[int, typer.Option("--overlap", help="Tokens of context that a window repeats.", min=1)]
Context = Annotated[int, typer.Option("--context", help="Tokens of true text before a run in its entry.", min=1)]
Openings = Annotated[str, typer.Option("--openings", help="Where texts may begin: paragraphs, lines, none.")]
Similar = Annotated[float, typer.Option("--similar", help="Similarity from which texts count as copies.", min=0, max=1)]
ClassName = Annotated[str, typer.Option("--class", help="The policy's class that entries get.")]
TextColumn = Annotated[str, typer.Option("--text-column", help="Key or column that holds the texts.")]
BatchTokens = Annotated[int, typer.Option("--batch-tokens", help="Tokens per forward pass.", min=1)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the list if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]


def mine(
    checkpoint: Checkpoint,
    corpus: Corpus,
    out: Out,
    controls: Controls = None,
    run: Run = 16,
    window: Window = 512,
    overlap: Overlap = 64,
    context: Context = 32,
    openings: Openings = "paragraphs",
    similar: Similar = 0.9,
    class_name: ClassName = "copyright",
    text_column: TextColumn = "text",
    batch_tokens: BatchTokens = 8192,
    adapter: AdapterName = None,
    overwrite: Overwrite = False,
    log: LogFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Find the texts of a corpus that a checkpoint gives away. Writes a protected list. Exit 0: done, 3: incomplete."""
    from memscrub.mining.entries import sources_file
    from memscrub.mining.mine import Settings, journal_file
    from memscrub.mining.mine import mine as run_mine

    settings = Settings(
        run, window, overlap, context, openings, similar, class_name, text_column, batch_tokens
    )  # fmt: skip
    taken = {"the list": out, "the list's sources": sources_file(out), "the list's journal": journal_file(out)}
    taken |= {f"{path} of the corpus or the controls": path for path in (*corpus, *(controls or ()))}
    check_apart({"--log": log}, taken)
    with RunLog(log, "mine", outside=[each for each in (checkpoint, adapter) if each]) as lines:
        quiet_here = quiet or not sys.stderr.isatty()
        with going_on(journal_file(out), "found"), progress_shown(quiet_here, lines) as progress:
            mined = run_mine(
                checkpoint,
                corpus,
                out,
                settings=settings,
                controls=controls or (),
                adapter=adapter,
                overwrite=overwrite,
                device=device,
                dtype=dtype,
                progress=progress,
                remark=remarks(quiet, lines),
            )
        lines.figures("mined", **vars(mined.funnel))
        for sentence in (*mined.problems, *mined.remarks):
            lines.remark(sentence)
        _show(mined, json=json, quiet=quiet, limit=settings.run)
        raise typer.Exit(int(ExitCode.INCOMPLETE if mined.problems else ExitCode.PASS))


def _show(mined: Mined, *, json: bool, quiet: bool, limit: int) -> None:
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for sentence in (*mined.problems, *(() if quiet else mined.remarks)):
        errors.print(f"memscrub: {sentence}", markup=False)
    if json:
        sys.stdout.write(json_module.dumps(mined.to_dict(), indent=2) + "\n")
    elif not quiet:
        show_mined(Console(), mined, limit)


def show_mined(console: Console, mined: Mined, limit: int) -> None:
    """The funnel and where the list is, readable at 80 columns."""
    funnel = mined.funnel
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step")
    table.add_column("left", justify="right")
    rows = [
        ("documents", funnel.documents),
        ("tokens", funnel.tokens),
        ("windows read", funnel.windows),
        ("tokens read, overlaps and openings included", funnel.fed),
        (f"candidates: runs of more than {limit} tokens", funnel.candidates),
        ("merged where windows overlap", funnel.merged),
        ("without trivial ones", funnel.telling),
    ]
    if mined.guessed is not None:
        rows.append(("without what controls give away too", funnel.unguessed))
    rows.append(("kept: near-copies counted as one", funnel.kept))
    for name, count in rows:
        table.add_row(name, f"{count:,}")
    console.print(table)
    if mined.guessed:
        console.print(f"{mined.guessed} stretches come out of the control texts: a higher --run tells more apart.")
    doubtful = sum(not entry.confirmed for entry in mined.entries)
    if doubtful:
        console.print(f"{doubtful} of the texts come out of the corpus only, not as entries (confirmed: false).")
    if mined.out is None:
        console.print("the checkpoint gives nothing away of this corpus; no list was written.")
    else:
        sources = mined.to_dict()["sources"]
        console.print(Text(f"written to {mined.out}, with sources and counts in {sources}", overflow="fold"))
