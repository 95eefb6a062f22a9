"""The command `memscrub bench`: parses, runs the bench, shows its tables; a part of the command line.

Heavy modules are imported inside it, so that `memscrub --help` does not load torch.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from memscrub.cli.options import Checkpoint, OneDevice, PolicyFile, Quiet, Seed
from memscrub.cli.output import check_files
from memscrub.errors import IncompleteError, UsageError

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the results as JSON, row by row.")]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="Write the tables as Markdown.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Write the scatter plot (.svg or .png).")]
Names = Annotated[list[str] | None, typer.Option("--only", help="Only rows with this in their name; may be repeated.")]
Sample = Annotated[int, typer.Option("--sample", help="Texts that are edited one at a time.", min=1)]
Skip = Annotated[bool, typer.Option("--skip-finetuning", help="Leave the fine-tuning runs out.")]
Grid = Annotated[str, typer.Option("--grid", help="Settings of the fine-tuning runs: small or large.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads of torch.", min=1)]


def bench(
    checkpoint: Checkpoint,
    policy: PolicyFile,
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    plot: PlotFile = None,
    only: Names = None,
    sample: Sample = 30,
    skip_finetuning: Skip = False,
    grid: Grid = "small",
    threads: Threads = None,
    quiet: Quiet = False,
    seed: Seed = 0,
    device: OneDevice = "auto",
) -> None:
    """Compare all methods and baselines on one checkpoint. Prints a table, writes no checkpoint."""
    import torch

    from memscrub.bench import finetune
    from memscrub.bench.run import Files
    from memscrub.bench.run import bench as run
    from memscrub.cli.bench_console import show_bench
    from memscrub.cli.progress import shown

    check_files({"--json": json, "--markdown": markdown, "--plot": plot}, policy, {})
    if grid not in ("small", "large"):
        raise UsageError(f"the grid '{grid}' is not known; use small or large.")
    recipes = finetune.grid() if grid == "small" else finetune.large_grid()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with shown(Console(stderr=True), quiet=quiet or not sys.stderr.isatty()) as progress:
            done = run(
                checkpoint,
                policy,
                recipes=() if skip_finetuning else recipes,
                only=only or (),
                sample=sample,
                files=Files(json, markdown, plot),
                command=shlex.join(["memscrub", *sys.argv[1:]]),
                device=device,
                seed=seed,
                progress=progress,
            )
    except IncompleteError as error:
        if json is None or not json.is_file():
            raise
        where = f"what was finished by then is in {json}"
        raise IncompleteError(str(error).replace("nothing was written", where)) from None
    if not quiet:
        show_bench(Console(), done)
