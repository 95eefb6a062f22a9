"""Scan, fix, gate and verify one checkpoint through the command line, and print a table row of what it cost.

    python benchmarks/fix_checkpoint.py CKPT --protected F.jsonl --retain R.txt [--controls C.jsonl]
        [--statistics S.jsonl.gz] [--run 8] [--secret-probability P]

Figures come from the written report and from the operating system's accounting of the child processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

POLICY = """schema = 1
name = "benchmark"
[protected]
files = [{protected}]
controls = [{controls}]
[class.copyright]
max_verbatim_tokens = {run}
[class.pii]
secret = true
max_verbatim_tokens = {run}
{secret}
[locality]
retain = [{retain}]
statistics = [{statistics}]
max_kl = 0.005
max_perplexity_ratio = 1.005
min_agreement = 0.945
[fix]
sites = "{sites}"
"""


def main() -> None:
    """Run the commands and print what they measured."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder, "policy.toml")
        policy.write_text(_policy(options), encoding="utf-8")
        out, report, key = Path(folder, "out"), Path(folder, "report.json"), Path(folder, "key.pem")
        _run("keygen", str(key), str(key) + ".pub")
        scanned, scan_seconds, _ = _run("scan", options.checkpoint, "--policy", str(policy), "--quiet")
        fix = ("fix", options.checkpoint, "--policy", str(policy), "--out", str(out), "--sign", str(key))
        fixed, seconds, peak = _run(*fix, "--report", str(report), "--quiet")
        gated, _, _ = (
            _run("gate", str(out), "--policy", str(policy), "--key", str(key) + ".pub", "--quiet")
            if out.is_dir()
            else (None, 0.0, 0)
        )
        _print(json.loads(report.read_text(encoding="utf-8")), scanned, fixed, gated, scan_seconds, seconds, peak)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--protected", required=True)
    parser.add_argument("--retain", required=True)
    parser.add_argument("--controls")
    parser.add_argument("--statistics")
    parser.add_argument("--run", type=int, default=8)
    parser.add_argument("--secret-probability", type=float)
    parser.add_argument("--sites", default="mlp+attention")
    return parser.parse_args()


def _policy(options: argparse.Namespace) -> str:
    def path(value: str | None) -> str:
        return "" if value is None else json.dumps(str(Path(value).resolve()))

    limit = options.secret_probability
    return POLICY.format(
        protected=path(options.protected),
        controls=path(options.controls),
        retain=path(options.retain),
        statistics=path(options.statistics),
        run=options.run,
        secret="" if limit is None else f"max_sampling_probability = {limit}",
        sites=options.sites,
    )


def _run(*arguments: str) -> tuple[int, float, int]:
    """Exit code, seconds and peak memory (MiB) of one memscrub command."""
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "memscrub", *arguments])
    _, status, usage = os.wait4(child.pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began, usage.ru_maxrss // 1024


def _print(
    report: dict[str, Any], scanned: int, fixed: int, gated: int | None, scan_seconds: float, seconds: float, peak: int
) -> None:
    after = [text["after"] for text in report["texts"]]
    before = [text["before"] for text in report["texts"]]
    locality, edit = report["locality"], report["edit"]
    secrets = [secret for text in after for secret in text["secrets"]]
    print(f"machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}")
    print(f"exit codes: scan {scanned}, fix {fixed}, gate on the written directory {gated}")
    print(f"verdict: {report['verdict']['outcome']} {report['verdict']['reasons']}")
    print(f"longest run: {max(m['match_run'] for m in before)} before, {max(m['match_run'] for m in after)} after")
    print(f"secrets emitted: {sum(s['emitted'] for s in secrets)} of {len(secrets)}")
    print(f"KL {locality['kl']:.5f}  worst block {locality['worst_kl']:.4f}  start {locality['start_kl']:.4f}")
    print(f"agreement {locality['agreement']:.4f}  perplexity ratio {locality['perplexity_ratio']:.4f}")
    print(f"break points {edit['break_points']}  rounds {edit['rounds']}  stages {edit['stages']}")
    print(f"scan {scan_seconds:.1f} s  fix {seconds:.1f} s  peak memory of fix {peak} MiB")


if __name__ == "__main__":
    main()
