"""How long a gate takes that trusts signed measures: beside the hashing of the same files, and the bare command line.

    python benchmarks/gate_speed.py [--megabytes 2048] [--runs 7] [--texts 192]

Lays out a signed directory: the embedded checkpoint, a file of random bytes to make it as large as a real one, and a
report under limits that it keeps. Then it times whole processes, files in the page cache: `memscrub --help`,
`sha256sum` of every file, and `memscrub gate --trust`, alone and with `--report`. On a busy machine only the processor
time says much.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memscrub.jobs.scanning import scan
from memscrub.proof.keys import generate_keypair
from memscrub.proof.signing import sign_directory, sign_report
from memscrub.reports.report import REPORT_NAME

EMBEDDED = Path(__file__).parents[1] / "memscrub" / "embedded"
POLICY = """\
schema = 1
name = "gate-speed"
[protected]
files = ["protected.jsonl"]
controls = ["control.jsonl"]
[class.copyright]
max_near_verbatim = 1.0
[class.pii]
max_near_verbatim = 1.0
[report]
key = "report.key"
"""


def lay_out(folder: Path, megabytes: int, texts: int) -> None:
    """The signed directory `model`, its policy and its keys in `folder`."""
    shutil.copytree(EMBEDDED / "checkpoint", folder / "model")
    with (folder / "model" / "padding.bin").open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1 << 20))
    entries = [json.loads(line) for line in (EMBEDDED / "protected.jsonl").read_text(encoding="utf-8").splitlines()]
    with (folder / "protected.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(texts):
            entry = dict(entries[number % len(entries)])
            if number >= len(entries):  # more texts than there are: the same ones, each with a number of its own
                entry.update(id=f"{entry['id']}-{number}", text=f"{entry['text']} {number}")
            lines.write(json.dumps(entry) + "\n")
    shutil.copy(EMBEDDED / "control.jsonl", folder)
    (folder / "report.key").write_bytes(os.urandom(32).hex().encode("ascii"))
    (folder / "policy.toml").write_text(POLICY, encoding="utf-8")
    generate_keypair(folder / "key.pem", folder / "key.pub")
    report = scan(folder / "model", folder / "policy.toml")
    path = folder / "model" / REPORT_NAME
    path.write_text(report.to_json(), encoding="utf-8")
    sign_directory(folder / "model", folder / "key.pem")
    passed = report.verdict.exit_code == 0
    sign_report(path, folder / "key.pem", passed=passed, policy_digests={"policy.toml": report.policy.sha256})


def seconds(command: list[str], runs: int) -> list[tuple[float, float]]:
    """Wall and processor time of the whole process, each run; the first, which fills caches, is not counted."""
    found = []
    for _ in range(runs + 1):
        began, used = time.perf_counter(), os.times()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        now = os.times()
        worked = now.children_user + now.children_system - used.children_user - used.children_system
        found.append((time.perf_counter() - began, worked))
        if done.returncode != 0:
            sys.exit(f"{command[0]} ended with {done.returncode}: {done.stderr.decode()}")
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--texts", type=int, default=192)
    given = parser.parse_args()
    memscrub = str(Path(sys.executable).with_name("memscrub"))
    with tempfile.TemporaryDirectory(prefix="memscrub-gate-") as name:
        folder = Path(name)
        lay_out(folder, given.megabytes, given.texts)
        files = sorted(path for path in (folder / "model").rglob("*") if path.is_file())
        options = ["--policy", folder / "policy.toml", "--key", folder / "key.pub", "--trust", "--quiet"]
        gate = [memscrub, "gate", *map(str, (folder / "model", *options))]
        commands = {
            "memscrub --help": [memscrub, "--help"],
            "sha256sum of every file": ["sha256sum", *map(str, files)],
            "memscrub gate --trust": gate,
            "memscrub gate --trust --report": [*gate, "--report", str(folder / "gate.json")],
        }
        size = sum(path.stat().st_size for path in files) / 2**20
        print(f"{len(files)} files, {size:.0f} MiB, {given.texts} texts; {given.runs} runs, whole processes\n")
        print("| command | median s | least s | processor, median s |\n|---|---|---|---|")
        for what, command in commands.items():
            wall, worked = zip(*seconds(command, given.runs), strict=True)
            print(
                f"| `{what}` | {statistics.median(wall):.2f} | {min(wall):.2f} | {statistics.median(worked):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
