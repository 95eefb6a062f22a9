"""The commands `memscrub diff`, `apply` and `revert`: parse, call, say what was done; a part of the command line.

Heavy modules are imported inside them, so that `memscrub --help` does not load torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memscrub.cli.options import Directory, OneDevice, OutDirectory, Quiet, ReportFile, Seed, passphrase
from memscrub.cli.output import check_files, check_report_file, deliver, progress_shown, say, say_written
from memscrub.errors import ArchitectureError, UsageError

if TYPE_CHECKING:
    from memscrub.jobs.scrub import Fixed
    from memscrub.policy.document import Policy
    from memscrub.storage import checkpoint
    from memscrub.storage.patch import PatchFile
    from memscrub.storage.patch_delta import Axis
    from memscrub.storage.patch_files import PatchSummary, Restored

Base = Annotated[str, typer.Argument(metavar="BASE", help="The checkpoint before the edit: directory or hub id.")]
Scrubbed = Annotated[Path, typer.Argument(metavar="SCRUBBED", help="The directory that `memscrub fix` wrote.")]
Patch = Annotated[Path, typer.Argument(metavar="PATCH", help="The patch that `memscrub diff` or `fix` wrote.")]
PatchOut = Annotated[Path | None, typer.Option("--out", "-o", help="Write the patch to this file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of sentences.")]
Anew = Annotated[
    Path | None,
    typer.Option("--policy", "-p", help="On another base: solve anew by this policy (TOML), as `memscrub fix`."),
]
Sign = Annotated[Path | None, typer.Option("--sign", help="With --policy: private key (PEM) to sign with.")]


def diff(
    base: Base,
    scrubbed: Scrubbed,
    out: PatchOut = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say where two checkpoints differ, and by how much. With --out, as a patch that leads there and back."""
    from memscrub.storage.checkpoint import open_checkpoint
    from memscrub.storage.patch_files import write_patch

    before, after = open_checkpoint(base), open_checkpoint(scrubbed)
    summary = write_patch(
        before,
        after,
        out,
        orientations=_orientations(before),
        policy_sha256=_policy_digest(after),
        overwrite=overwrite,
    )
    if json:
        sys.stdout.write(_summary_json(summary))
    elif not quiet:
        _show_summary(summary)


def apply(
    base: Base,
    patch: Patch,
    out: OutDirectory,
    policy: Anew = None,
    sign: Sign = None,
    overwrite: Overwrite = False,
    report: ReportFile = None,
    json: Json = False,
    quiet: Quiet = False,
    seed: Seed = 0,
    device: OneDevice = "auto",
) -> None:
    """Make an edit again from its patch. Anew with --policy where the base is another. Exit 0; 4: out of reach."""
    from memscrub.policy.document import load_policy
    from memscrub.storage.checkpoint import open_checkpoint
    from memscrub.storage.patch import open_patch
    from memscrub.storage.patch_files import apply_patch, mismatch

    if policy is None and (sign is not None or report is not None):
        raise UsageError("--sign and --report need --policy: without it nothing is measured, so nothing is attested.")
    check_report_file(report, base, out)
    check_files({"--report": report}, policy, {"the patch": patch, "the key": sign})
    opened, found = open_patch(patch), open_checkpoint(base)
    loaded = None if policy is None else load_policy(policy)
    problem = None if loaded is None else mismatch(found, opened, "before")
    if loaded is None or problem is None:
        if sign is not None or report is not None:
            raise UsageError(
                f"{base} is the patch's own base, where nothing is measured, so there is nothing to sign or report;"
                " leave out --sign and --report, and run `memscrub gate` or `memscrub fix`."
            )
        if loaded is not None and not quiet:
            say("the base is the one that the patch was made from: its bytes were changed, nothing measured or signed.")
        _show_restored(apply_patch(found, opened, out, overwrite=overwrite), json, quiet)
        return
    rules, where = _narrowed(loaded, opened, found)
    if not quiet:
        say(f"another base than the patch was made from ({problem}): solving anew {where}.")
    fixed = _fix(base, rules, out, sign=sign, overwrite=overwrite, quiet=quiet, seed=seed, device=device)
    deliver(fixed.report, report, as_json=json, quiet=quiet)
    if not quiet:
        say_written(fixed, f"nothing was written to {out}; `memscrub fix` may edit wherever the policy allows.")
    raise typer.Exit(fixed.report.verdict.exit_code)


def revert(
    directory: Directory,
    patch: Patch,
    out: OutDirectory,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give back the checkpoint as it was before the edit. With it comes back what was edited out."""
    from memscrub.storage.checkpoint import open_checkpoint
    from memscrub.storage.patch import open_patch
    from memscrub.storage.patch_files import revert_patch

    _show_restored(revert_patch(open_checkpoint(directory), open_patch(patch), out, overwrite=overwrite), json, quiet)


def _orientations(base: checkpoint.Checkpoint) -> dict[str, Axis]:
    """Which way the output vectors of the tensors lie; nothing for a family that is not in the table."""
    from memscrub.models.architecture import Orientation, family_of

    try:
        orientation = family_of(base.config).orientation
    except ArchitectureError:
        return {}
    return dict.fromkeys(base.tensors, "columns" if orientation is Orientation.COLUMNS else "rows")


def _policy_digest(scrubbed: checkpoint.Checkpoint) -> str | None:
    """The digest of the policy that the directory's report, if it has one, was made by."""
    from memscrub.reports.report import REPORT_NAME, load_report

    if REPORT_NAME not in scrubbed.files:
        return None
    return load_report(scrubbed.path / REPORT_NAME).policy.sha256


def _narrowed(rules: Policy, patch: PatchFile, base: checkpoint.Checkpoint) -> tuple[Policy, str]:
    """The policy to fix by, and how to say what it is restricted to."""
    from memscrub.jobs.reapply import narrowed
    from memscrub.storage.patch_files import check_tensors

    check_tensors(base, patch)
    found = narrowed(rules, [tensor.name for tensor in patch.manifest.tensors], base.config)
    if found is None:
        return rules, "wherever the policy allows (the tensors of the patch do not say where)"
    layers = ", ".join(map(str, found.fix.layers))
    return found, f"where the patch edited (sites {found.fix.sites}, layers {layers})"


def _fix(
    base: str, policy: Policy, out: Path, *, sign: Path | None, overwrite: bool, quiet: bool, seed: int, device: str
) -> Fixed:
    from memscrub.jobs.scrub import Signing, fix

    signing = None if sign is None else Signing(sign, passphrase(sign))
    with progress_shown(quiet) as progress:
        return fix(base, policy, out, sign=signing, overwrite=overwrite, device=device, seed=seed, progress=progress)


def _summary_json(summary: PatchSummary) -> str:
    import json

    value = {
        "patch": None if summary.path is None else str(summary.path),
        "bytes": summary.size,
        "shard_bytes": summary.shard_bytes,
        "added": list(summary.added),
        **summary.manifest.model_dump(mode="json"),
    }
    return json.dumps(value, indent=2) + "\n"


def _show_summary(summary: PatchSummary) -> None:
    tensors = summary.manifest.tensors
    for tensor in tensors:
        vectors = "" if tensor.vectors_changed is None else f"{tensor.vectors_changed} output vectors, "
        typer.echo(f"{tensor.name}  {list(tensor.shape)} {tensor.dtype}  {vectors}{tensor.elements_changed} elements")
    total = sum(tensor.vectors_changed or 0 for tensor in tensors)
    elements = sum(tensor.elements_changed for tensor in tensors)
    typer.echo(f"{len(tensors)} tensors, {total} output vectors, {elements} elements differ")
    if summary.manifest.left_out:
        typer.echo(f"only in the base, and not in the patch: {', '.join(summary.manifest.left_out)}")
    if summary.added:
        typer.echo(f"only in the scrubbed directory, and not in the patch: {', '.join(summary.added)}")
    share = 100 * summary.size / summary.shard_bytes if summary.shard_bytes else 0.0
    if summary.path is None:
        typer.echo(f"a patch would have {summary.size} bytes, {share:.1f}% of the shards it changes; --out writes it")
    else:
        typer.echo(f"wrote {summary.path}: {summary.size} bytes, {share:.1f}% of the shards it changes")
        typer.echo("it gives the unedited weights back to whoever has both: keep it as you keep those")


def _show_restored(done: Restored, as_json: bool, quiet: bool) -> None:
    if as_json:
        import json

        value = {
            "directory": str(done.directory),
            "sha256": done.sha256,
            "tensors": done.tensors,
            "not_carried": list(done.not_carried),
            "missing": list(done.missing),
        }
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    elif not quiet:
        typer.echo(f"written to {done.directory}: {done.tensors} tensors changed, every file read back and compared")
        typer.echo(f"checkpoint digest sha256:{done.sha256}")
        if done.not_carried:
            typer.echo(f"not copied: {', '.join(done.not_carried)}")
        if done.missing:
            typer.echo(f"cannot be given back, because the scrubbed directory lacks them: {', '.join(done.missing)}")
