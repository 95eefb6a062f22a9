"""`memscrub demo`: the main job on the checkpoint that ships with memscrub, in a folder of its own to look at.

The embedded texts are invented or free to print, so this is the one place where texts are shown by default.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from memscrub.cli.console import token_strip
from memscrub.errors import OutputError
from memscrub.jobs.scrub import Fixed, Signing, fix
from memscrub.measures.extraction import Sampling, score
from memscrub.measures.measure import Progress, silent
from memscrub.models.model import load_model
from memscrub.models.tokens import decoded, tokenize
from memscrub.policy.document import load_policy
from memscrub.policy.init_files import policies_folder
from memscrub.proof.keys import generate_keypair
from memscrub.proof.signing import verify_directory
from memscrub.storage.checkpoint import open_checkpoint
from memscrub.storage.partial import disk_errors
from memscrub.texts.protected import load_protected

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
FILES = ("protected.jsonl", "control.jsonl", "neighbours.jsonl", "retain.txt")
MARKER = ".memscrub-demo"


@dataclass(frozen=True)
class Demo:
    """What the demo left behind, and one protected text as coloured tokens before and after."""

    folder: Path
    fixed: Fixed
    shown: str
    before: Text
    after: Text


def run_demo(folder: Path, *, seed: int = 0, device: str = "auto", progress: Progress = silent) -> Demo:
    """Lay out the folder, fix and sign the embedded checkpoint in it, verify the result.

    An earlier demo's folder is replaced; any other folder is refused with OutputError.
    """
    lay_out(folder)
    policy = load_policy(folder / "policy.toml")
    generate_keypair(folder / "key.pem", folder / "key.pub.pem")
    fixed = fix(
        folder / "checkpoint",
        policy,
        folder / "scrubbed",
        sign=Signing(folder / "key.pem"),
        device=device,
        seed=seed,
        progress=progress,
    )
    if fixed.directory is not None:
        verify_directory(fixed.directory, folder / "key.pub.pem")
    shown = _worst(fixed)
    strip = _strips(folder, shown, device)
    after = strip(fixed.directory) if fixed.directory is not None else Text("(withheld)")
    return Demo(folder, fixed, shown, strip(folder / "checkpoint"), after)


def lay_out(folder: Path) -> None:
    """Copy the embedded checkpoint, its texts and the demo policy into a folder."""
    with disk_errors(folder):
        if folder.exists():
            if not (folder / MARKER).is_file() and any(folder.iterdir()):
                raise OutputError(f"{folder}: the folder exists and is not a demo's; choose another with --out.")
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / MARKER).write_text("memscrub demo may replace this folder\n", encoding="utf-8")
        for name in FILES:
            shutil.copyfile(EMBEDDED / name, folder / name)
        shutil.copytree(EMBEDDED / "checkpoint", folder / "checkpoint", copy_function=shutil.copyfile)
        shutil.copyfile(policies_folder() / "demo.toml", folder / "policy.toml")


def _worst(fixed: Fixed) -> str:
    """The text with the most secrets given away: the most telling one to show."""
    records = fixed.report.texts
    return max(records, key=lambda record: (sum(s.emitted for s in record.before.secrets), record.id)).id


def _strips(folder: Path, shown: str, device: str) -> Callable[[Path], Text]:
    policy = load_policy(folder / "policy.toml")
    (text,) = [text for text in load_protected(policy) if text.id == shown]

    def strip(checkpoint: Path) -> Text:
        loaded = load_model(open_checkpoint(checkpoint), device=device)
        (tokens,) = tokenize(loaded, [text])
        (scores,) = score(loaded, [tokens], lambda _: Sampling())
        words = [decoded(loaded, [token]) for token in tokens.tokens]
        return token_strip(words, (scores.gap > 0).tolist(), tokens.start)

    return strip
