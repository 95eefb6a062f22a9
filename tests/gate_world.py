"""A tiny checkpoint that gives texts away, its policy with a report key, and a signed fix of it, for gate tests."""

from __future__ import annotations

from pathlib import Path

from models import in_words, ordinary_rows, random_text, tiny_checkpoint, write_list

from memscrub.jobs.scrub import Fixed, Signing, fix
from memscrub.proof.keys import generate_keypair

LENGTH = 40
TEXTS = tuple(random_text(seed, LENGTH) for seed in (1, 2, 3))
CONTROLS = tuple(random_text(seed, LENGTH) for seed in (11, 12))
POLICY = """\
schema = 1
name = "gate"

[protected]
files = ["protected.jsonl"]
controls = ["control.jsonl"]

[class.c]
max_verbatim_tokens = 6
max_near_verbatim = 0.7

[probe]
near_verbatim_prefix = 8
near_verbatim_tokens = 16

[locality]
retain = ["retain.txt"]
max_kl = 5
max_perplexity_ratio = 50
min_agreement = 0.01
max_degenerate = 1

[report]
key = "report.key"
"""


def lay_out(folder: Path, policy: str = POLICY) -> Path:
    """The checkpoint (`base`), lists, keys and policy in `folder`."""
    tiny_checkpoint(folder / "base", "llama", seed=4, texts=TEXTS, steps=80)
    write_list(folder / "protected.jsonl", TEXTS, "t")
    write_list(folder / "control.jsonl", CONTROLS, "k")
    (folder / "retain.txt").write_text("\n\n".join(in_words(ordinary_rows(7, 24, 60))) + "\n")
    (folder / "report.key").write_text("a key of sixteen bytes or more\n")
    (folder / "policy.toml").write_text(policy)
    generate_keypair(folder / "key.pem", folder / "key.pub")
    return folder


def signed_fix(folder: Path, out: str = "fixed", policy: str = "policy.toml") -> Fixed:
    """The fix of `base`, signed, within the policy."""
    done = fix(
        folder / "base",
        folder / policy,
        folder / out,
        sign=Signing(folder / "key.pem"),
        keep_partial=True,
        device="cpu",
    )
    assert done.directory is not None
    return done
