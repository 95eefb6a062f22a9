"""The commands `memscrub dequantize` and `merge`, which make a checkpoint ready: parse, call, say what was done.

Part of the command line. Heavy modules are imported inside them, so that `memscrub --help` does not load torch.
"""

from __future__ import annotations

from typing import Annotated

import typer

from memscrub.cli.options import Checkpoint, OutDirectory, Overwrite, Quiet

Base = Annotated[str, typer.Argument(metavar="BASE", help="The checkpoint that the adapter was trained on.")]
AdapterDirectory = Annotated[str, typer.Option("--adapter", help="The LoRA adapter: directory or hub id.")]


def dequantize(checkpoint: Checkpoint, out: OutDirectory, overwrite: Overwrite = False, quiet: Quiet = False) -> None:
    """Write a quantized checkpoint out in full. From fp8, mxfp4 or compressed-tensors, for all other commands."""
    from memscrub.storage.checkpoint import open_checkpoint
    from memscrub.storage.dequantize import dequantize as run

    done = run(open_checkpoint(checkpoint, quantized=True), out, overwrite=overwrite)
    if quiet:
        return
    typer.echo(
        f"written to {done.directory}: {done.tensors} tensors from {done.method} to {done.dtype}, {done.kept} as they"
        f" were; {done.bytes_written / 1e9:.3f} GB"
    )
    if done.dropped:
        typer.echo(f"dropped: {len(done.dropped)} scales of activations, which only the quantized model needs")
    _say_left_out(done.left_out)
    typer.echo("its weights are those of the quantized checkpoint, not those of the original it was made from")


def merge(
    base: Base, adapter: AdapterDirectory, out: OutDirectory, overwrite: Overwrite = False, quiet: Quiet = False
) -> None:
    """Write a checkpoint with a LoRA adapter added to its weights. `fix` and all other commands read it."""
    from memscrub.models.merging import merge as run
    from memscrub.storage.adapters import open_adapter
    from memscrub.storage.checkpoint import open_checkpoint

    opened = open_adapter(adapter)
    done = run(open_checkpoint(base), opened, out, overwrite=overwrite)
    if quiet:
        return
    typer.echo(f"written to {done.directory}: the adapter was added to {done.tensors} tensors of {base}")
    if opened.base and opened.base != base:
        typer.echo(f"the adapter says that it was trained on {opened.base}; its shapes fit {base} too")
    _say_left_out(done.left_out)


def _say_left_out(names: tuple[str, ...]) -> None:
    if names:
        typer.echo(f"not copied: {', '.join(names)}")
