"""`memscrub fix` killed at chosen moments, on a disk that takes no large file, and twice on one output, as processes.

benchmarks/kills.py checks everything on disk after each kill and after the run that follows it; here it does so at the
moments that matter most. docs/reliability.md has its figures for 200 kills at random moments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOMENTS = ("journal", "writing", "report", "rename", "ended")


def test_kills_full_disks_and_second_runs_leave_nothing_wrong_and_the_next_run_ends(tmp_path: Path) -> None:
    found = tmp_path / "kills.json"
    asked = ["--at", ",".join(MOMENTS), "--limits", "1", "--pairs", "1", "--json", str(found)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kills.py"), *asked],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads(found.read_text())
    assert values["wrong"] == []
    phases = [next(iter(values[moment]["kills"])) for moment in MOMENTS]
    assert [phase[0] for phase in phases] == ["1", "3", "4", "5", "6"]
    # With nothing in the journal the run begins anew; later it goes on, at last from a directory that is complete.
    assert [sum(values[moment]["went_on"].values()) for moment in MOMENTS] == [0, 1, 1, 1, 1]
    assert "limited files: 1 of 1 ended with exit 3" in done.stdout
    assert "two runs on one output: 1 times; 0 wrong" in done.stdout
    assert not list(tmp_path.glob("memscrub-kills-*"))
