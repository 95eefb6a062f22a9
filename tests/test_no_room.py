"""A model with no room left is refused: exit 4 with the limit that stopped it, nothing written, the input untouched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import in_words, ordinary_rows, random_text, tiny_checkpoint, write_list

from memscrub.jobs.scrub import fix
from memscrub.reports.report import load_report
from memscrub.reports.verdict import Outcome
from memscrub.storage.checkpoint import digest_files, open_checkpoint

POLICY = """\
schema = 1
name = "no room"

[protected]
files = ["protected.jsonl"]

[class.c]
max_verbatim_tokens = 3

[locality]
retain = ["retain.txt"]
neighbours = ["neighbours.txt"]
min_neighbours_kept = 0.99
max_worst_kl = 0.5

[fix]
rounds = 3
"""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model so small that its texts are all that it holds, and the policy that protects them."""
    folder = tmp_path_factory.mktemp("no-room")
    texts = [random_text(seed, 40) for seed in range(12)]
    tiny_checkpoint(folder / "checkpoint", "llama", seed=5, texts=texts, steps=200)
    write_list(folder / "protected.jsonl", texts)
    rows = in_words(ordinary_rows(7, 24, 90))
    (folder / "retain.txt").write_text("\n\n".join(rows) + "\n")
    (folder / "neighbours.txt").write_text("\n\n".join(rows[:3]) + "\n")
    (folder / "policy.toml").write_text(POLICY)
    return folder


def test_the_command_ends_with_4_and_leaves_no_trace(full: Path, tmp_path: Path) -> None:
    before, names = digest_files(open_checkpoint(full / "checkpoint")), sorted(os.listdir(full))
    done = subprocess.run(
        [
            sys.executable, "-m", "memscrub", "fix", "checkpoint", "--policy", "policy.toml", "--out", "out",
            "--report", str(tmp_path / "report.json"),
        ],
        cwd=full, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 4, done.stdout + done.stderr
    assert "nothing was written to out" in done.stderr
    assert digest_files(open_checkpoint(full / "checkpoint")) == before
    assert sorted(os.listdir(full)) == names
    report = load_report(tmp_path / "report.json")
    assert report.verdict.outcome is Outcome.UNREACHABLE
    reason = report.verdict.reasons[0]
    assert reason.startswith("no room: locality: ") and "allowed" in reason and "missed by" in reason
    assert reason in done.stdout.replace("\n", " ") or "no room: locality: " in done.stdout
    assert report.benign is not None and report.neighbours is not None and report.neighbours.min_kept == 0.99


def test_what_is_kept_all_the_same_says_that_it_failed(full: Path, tmp_path: Path) -> None:
    fixed = fix(full / "checkpoint", full / "policy.toml", tmp_path / "out", keep_partial=True, device="cpu")
    assert fixed.directory == tmp_path / "out"
    assert load_report(tmp_path / "out" / "memscrub-report.json") == fixed.report
    assert fixed.report.verdict.exit_code == 4


def test_a_second_run_reads_the_statistics_of_the_first_and_writes_the_same(full: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    digests = []
    for name in ("one", "two"):
        fix(
            full / "checkpoint", full / "policy.toml", tmp_path / name,
            keep_partial=True, device="cpu", statistics=stats,
        )  # fmt: skip
        digests.append((tmp_path / name / "model.safetensors").read_bytes())
        kept = stats.read_bytes()
    assert digests[0] == digests[1] and stats.read_bytes() == kept
