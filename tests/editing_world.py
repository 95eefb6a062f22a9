"""A folder with a tiny checkpoint that knows three texts, controls, ordinary text and a policy; read as `fix` does."""

from __future__ import annotations

from pathlib import Path

from memscrub.jobs.scanning import Inputs, open_inputs
from tests.models import in_words, ordinary_rows, random_text, tiny_checkpoint, write_list

ALLOWED = 5
POLICY = """\
schema = 1
name = "editing"
[protected]
files = ["protected.jsonl"]
controls = ["control.jsonl"]
[class.c]
max_verbatim_tokens = {allowed}
{limits}
[probe]
near_verbatim_prefix = 8
near_verbatim_tokens = 16
offsets = [0, 4]
[locality]
retain = ["retain.txt"]
neighbours = ["retain.txt"]
max_kl = 100.0
max_perplexity_ratio = 100.0
min_agreement = 0.001
[fix]
{fix}
"""


def laid_out(path: Path, *, layers: int = 2) -> Path:
    """The checkpoint and the lists, in `path`."""
    texts = [random_text(seed, 36) for seed in range(3)]
    tiny_checkpoint(path / "checkpoint", "llama", seed=6, texts=texts, steps=90, layers=layers)
    for name, group in (("protected", texts), ("control", [random_text(seed, 36) for seed in (7, 8, 9)])):
        write_list(path / f"{name}.jsonl", group, f"{name}-")
    (path / "retain.txt").write_text("\n\n".join(in_words(ordinary_rows(7, 30, 90))) + "\n")
    return path


def opened(folder: Path, fix: str = "", limits: str = "") -> Inputs:
    """The folder under a policy with these lines in `[fix]` and in its class."""
    (folder / "policy.toml").write_text(POLICY.format(allowed=ALLOWED, limits=limits, fix=fix))
    return open_inputs(folder / "checkpoint", folder / "policy.toml", device="cpu", dtype="float32")
