"""`python -m tests.fuzz`: feeds all parsers a million inputs, or as many as asked, and prints one table.

Exit 0: nothing escaped. Exit 1: something did; the inputs lie in `tests/fuzz/regressions/PARSER/`, where the tests
replay them from then on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.engine import REGRESSIONS, fuzz
from tests.fuzz.targets import TARGETS


@dataclass(frozen=True)
class Line:
    """One line of the table; `edges` are branches reached, None where nothing watched them."""

    parser: str
    inputs: int
    seconds: float
    outcomes: int
    edges: int | None
    escapes: tuple[str, ...]

    def __str__(self) -> str:
        rate, edges = self.inputs / max(self.seconds, 1e-9), "-" if self.edges is None else f"{self.edges:,}"
        counts = f"{self.inputs:>9,}  {self.seconds:>7.1f}  {rate:>8,.0f}  {edges:>6}  {self.outcomes:>8}"
        return f"{self.parser:<17}  {counts}  {len(self.escapes):>7}"


HEAD = f"{'parser':<17}  {'inputs':>9}  {'seconds':>7}  {'inputs/s':>8}  {'edges':>6}  {'outcomes':>8}  {'escapes':>7}"


def shares(inputs: int, names: Sequence[str]) -> Mapping[str, int]:
    """How many inputs each parser gets: at least `inputs` in all."""
    whole = sum(TARGETS[name].share for name in names)
    return {name: -int(-inputs * TARGETS[name].share // whole) for name in names}


def guided(name: str, inputs: int, seed: int) -> Line:
    """One parser under Atheris, in a process that may die without taking this one along."""
    with tempfile.TemporaryDirectory(prefix="memscrub-guided-") as scratch:
        folder = Path(scratch)
        command = [sys.executable, "-m", "tests.fuzz.guided", name, str(inputs), str(seed), scratch]
        with (folder / "log").open("wb") as log:
            status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        said = (folder / "log").read_text(errors="replace")
        tally = json.loads((folder / "tally.json").read_text()) if (folder / "tally.json").exists() else {}
        escapes = [f"{each['what']} at {each['where']}: {each['file']}" for each in tally.get("escapes", ())]
        found = [folder / each["file"] for each in tally.get("escapes", ())] + sorted(folder.glob("died-*"))
        for file in found:
            _keep(name, file)
        if status:
            escapes.append(f"the process ended with {status}: {said[-2000:]}")
        covered = re.findall(r"cov: (\d+) ", said)
    counts = tally.get("inputs", 0), tally.get("seconds", 0.0), tally.get("outcomes", 0)
    return Line(name, *counts, int(covered[-1]) if covered else None, tuple(escapes))


def plain(name: str, inputs: int, seed: int) -> Line:
    """One parser in this process, guided by outcomes alone."""
    tally = fuzz(name, inputs, seed)
    for escape in tally.escapes.values():
        (REGRESSIONS / name).mkdir(parents=True, exist_ok=True)
        (REGRESSIONS / name / escape.name).write_bytes(escape.data)
    escapes = tuple(f"{e.what} at {e.where}: {e.name}" for e in tally.escapes.values())
    return Line(name, tally.inputs, tally.seconds, len(tally.outcomes), None, escapes)


def _keep(name: str, file: Path) -> None:
    (REGRESSIONS / name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, REGRESSIONS / name / file.name.removeprefix("died-"))


def main() -> int:
    """Parse the options, fuzz, print."""
    options = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    options.add_argument("--inputs", type=int, default=1_000_000, help="over all parsers together")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--engine", choices=("guided", "plain"), default="guided", help="guided needs Atheris")
    options.add_argument("parsers", nargs="*", metavar="PARSER", help=f"of {', '.join(TARGETS)}; all by default")
    given = options.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = given.parsers or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        options.error(f"there is no parser {unknown[0]}")
    print(HEAD, flush=True)
    lines = []
    for name, inputs in shares(given.inputs, names).items():
        line = (guided if given.engine == "guided" else plain)(name, inputs, given.seed)
        lines.append(line)
        print(line, *line.escapes, sep="\n    ", flush=True)
    sums = sum(line.inputs for line in lines), sum(line.seconds for line in lines), sum(line.outcomes for line in lines)
    everything = Line("all", *sums, None, tuple(escape for line in lines for escape in line.escapes))
    print(everything)
    return 1 if everything.escapes else 0


if __name__ == "__main__":
    sys.exit(main())
