"""`kill -9` at random moments of `memscrub fix`, and disks that are full: what is left, and does the next run end?

    python benchmarks/kills.py --kills 200 --calls 40 --pairs 5 --full 10 --json kills.json

Builds a small checkpoint that has memorized six texts, and runs the whole command `memscrub fix ... --sign` again and
again, each time in a process of its own, forked from one that has imported everything. A process is killed (SIGKILL)
after a time drawn uniformly from the duration of an undisturbed run (`--kills`), or by itself at a file-system call
drawn uniformly from all that such a run makes (`--calls`), which finds the short moments of writing and renaming. Every
third kill is followed by another one of the run that goes on; every fourth time an older directory is being replaced.
After each kill, and after the run that follows it, everything on disk is held against a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kill_ground import LEFT, MOMENTS, Ground, Trigger, at, digests, nth, small_disk


@dataclass(frozen=True)
class Reference:
    """What a run that nobody disturbs writes, how long it takes, and how many file-system calls it makes."""

    files: dict[str, str]
    seconds: float
    calls: int


def undisturbed(ground: Ground, *, once: bool = False) -> Reference:
    """Two runs, which must write the same, the second one counting its calls; or `once` only that one."""
    found, seconds = [], []
    counter = os.open(ground.folder, os.O_RDWR | os.O_TMPFILE)

    def count(event: str, path: str) -> bool:
        os.write(counter, b".")
        return False

    for trigger in (count,) if once else (None, count):
        ground.clear()
        began = time.monotonic()
        code = ground.run(trigger=trigger)
        if code != 0:
            raise SystemExit(f"an undisturbed run ends with exit {code}:\n{ground.said.read_text()}")
        seconds.append(time.monotonic() - began)
        found.append(digests(ground.out))
    if found[0] != found[-1]:
        raise SystemExit("two undisturbed runs differ: there is nothing to compare with")
    return Reference(found[0], seconds[0], os.fstat(counter).st_size)


@dataclass
class Findings:
    """Of all kills: in which phase they came, how the run after them ended; and sentences about what is wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    went_on: Counter[str] = field(default_factory=Counter)
    anew: Counter[str] = field(default_factory=Counter)
    complete: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Trial:
    """One output that a fix is to write, killed once or more, checked, and brought to its end."""

    def __init__(self, ground: Ground, reference: Reference, findings: Findings, *, overwrite: bool = False) -> None:
        self.ground, self.reference, self.findings, self.overwrite = ground, reference, findings, overwrite
        self.before: dict[str, str] | None = None
        ground.clear()
        if overwrite:
            shutil.copytree(ground.folder / "old", ground.out)
            self.before = digests(ground.out)

    def kill_after(self, seconds: float) -> str | None:
        """Kill a run so long after its start; the phase in which that was, None where the run had ended before."""
        self.ground.log.unlink(missing_ok=True)
        child = self.ground.start(overwrite=self.overwrite)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        return self._ended(os.waitpid(child, 0)[1])

    def kill_at(self, trigger: Trigger) -> str | None:
        """The same for a run that kills itself."""
        self.ground.log.unlink(missing_ok=True)
        return self._ended(os.waitpid(self.ground.start(overwrite=self.overwrite, trigger=trigger), 0)[1])

    def _ended(self, status: int) -> str | None:
        if not os.WIFSIGNALED(status):
            return None
        phase = self._phase()
        self.findings.kills[phase] += 1
        self.check(f"after a kill in the phase '{phase}'")
        return phase

    def _phase(self) -> str:
        """Where the run was, from what it left and from the last line of its log."""
        out = self.ground.out
        journal, partial = out.with_name("out.journal"), out.with_name("out.partial")
        if self.is_new():
            return "6 has its name"
        if (partial / "memscrub-report.json").exists():
            return "5 report, signature, renaming"
        if journal.exists() and b'"written"' in journal.read_bytes():
            return "4 measuring what was written"
        said = self.ground.log.read_text() if self.ground.log.exists() else ""
        if "retain statistics" in said:
            return "3 statistics, edit, writing"
        return "2 scan" if '"stage"' in said else "1 start, loading"

    def is_new(self) -> bool:
        return self.ground.out.is_dir() and digests(self.ground.out) == self.reference.files

    def check(self, when: str) -> None:
        """Everything that must hold at every instant."""
        ground, wrong = self.ground, self.findings.wrong
        if not ground.unchanged():
            wrong.append(f"{when}: an input changed")
        wrong += [f"{when}: {name} was left" for name in ground.strays()]
        replaced = ground.out.with_name("out.replaced")
        if ground.out.exists():
            if not self.is_new() and digests(ground.out) != self.before:
                wrong.append(f"{when}: DIR is neither absent nor complete")
            if self.is_new() and not self._verifies(ground.out):
                wrong.append(f"{when}: DIR does not verify")
        elif self.before is not None and not replaced.is_dir():
            wrong.append(f"{when}: the older directory is gone")
        partial = ground.out.with_name("out.partial")
        if partial.is_dir() and self._verifies(partial):
            found = {name.replace("out.partial/", "out/", 1): each for name, each in digests(partial).items()}
            if found != self.reference.files:
                wrong.append(f"{when}: a partial directory verifies and is wrong")

    def _verifies(self, folder: Path) -> bool:
        from memscrub.errors import MemscrubError
        from memscrub.proof.signing import verify_directory

        try:
            verify_directory(folder, self.ground.folder / "key.pub.pem")
        except MemscrubError:
            return False
        return True

    def finish(self, phase: str) -> None:
        """Run to the end and check what came of it; the phase is that of the last kill."""
        ground = self.ground
        complete = self.is_new() and not any(ground.out.with_name(name).exists() for name in LEFT)
        code = 0 if complete else ground.run(overwrite=self.overwrite)
        said = ground.said.read_text()
        when = f"in the run after a kill in the phase '{phase}'"
        if code != 0:
            self.findings.wrong.append(f"{when}: exit {code}: {said.strip()[-300:]}")
        elif not self.is_new():
            self.findings.wrong.append(f"{when}: the result is another")
        self.check(when)
        left = [name for name in LEFT if ground.out.with_name(name).exists()]
        self.findings.wrong.extend(f"{when}: {name} was left" for name in left)
        way = (
            self.findings.complete if complete else self.findings.went_on if "going on" in said else self.findings.anew
        )
        way[phase] += 1


def kills(ground: Ground, reference: Reference, count: int, *, calls: bool, rng: random.Random) -> Findings:
    """So many kills at random moments, of time or of file-system calls."""
    findings, number = Findings(), 0
    while sum(findings.kills.values()) < count:
        trial = Trial(ground, reference, findings, overwrite=number % 4 == 3)
        number += 1
        phase = None
        for _ in range(2 if number % 3 == 0 else 1):
            if calls:
                hit = trial.kill_at(nth(rng.randint(1, reference.calls)))
            else:
                hit = trial.kill_after(rng.uniform(0, reference.seconds))
            phase = hit or phase
            if hit is None:
                break
        if phase is not None:
            trial.finish(phase)
        print(
            f"\r{sum(findings.kills.values())} of {count} kills, {len(findings.wrong)} wrong", end="", file=sys.stderr
        )
    print(file=sys.stderr)
    return findings


def full(
    ground: Ground, reference: Reference, count: int, rng: random.Random, room: Callable[[int], None]
) -> list[str]:
    """Runs on a disk with `room` for so many bytes, at random: what is wrong with what they leave."""
    findings, ends = Findings(), Counter[int]()
    size = sum(each.stat().st_size for each in (ground.folder / "checkpoint").iterdir())
    for number in range(count):
        trial = Trial(ground, reference, findings)
        limit = rng.randint(4096, 8 * size)  # statistics of the run lie there for a while too
        room(limit)
        code = ground.run()
        ends[code] += 1
        when = f"on a disk with room for {limit} bytes"
        if code not in (0, 3):
            findings.wrong.append(f"{when}: exit {code}: {ground.said.read_text().strip()[-300:]}")
        if code == 3 and ground.out.exists():
            findings.wrong.append(f"{when}: DIR is there")
        trial.check(when)
        room(64 * size)
        if code != 0:
            trial.finish(when)
        print(f"\r{number + 1} of {count} full disks, {len(findings.wrong)} wrong", end="", file=sys.stderr)
    print(f"\nfull disks: {ends[3]} ended with exit 3, {ends[0]} had room enough; {len(findings.wrong)} wrong")
    return findings.wrong


def limited(ground: Ground, reference: Reference, count: int, rng: random.Random) -> list[str]:
    """Runs that may write files of so many bytes at most, at random: what is wrong with what they leave."""
    findings, ends = Findings(), Counter[int]()
    largest = max(each.stat().st_size for each in (ground.folder / "checkpoint").iterdir())
    for _ in range(count):
        trial = Trial(ground, reference, findings)
        limit = rng.randint(1024, largest)
        code = ground.run(limit=limit)
        ends[code] += 1
        when = f"with files of {limit} bytes at most"
        if code != 3 or ground.out.exists():
            findings.wrong.append(f"{when}: exit {code}: {ground.said.read_text().strip()[-300:]}")
        trial.check(when)
        trial.finish(when)
    print(f"limited files: {ends[3]} of {count} ended with exit 3; {len(findings.wrong)} wrong")
    return findings.wrong


def pairs(ground: Ground, reference: Reference, count: int, rng: random.Random) -> list[str]:
    """Two processes that are to write one output: one does, the other says so, whoever comes first."""
    findings = Findings()
    for _ in range(count):
        trial = Trial(ground, reference, findings)
        first = ground.start()
        time.sleep(rng.uniform(0, reference.seconds / 2))
        codes = sorted([ground.run(), os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])])
        if codes != [0, 2]:
            findings.wrong.append(f"two runs on one output end with {codes}")
        trial.check("after two runs on one output")
        if not trial.is_new():
            findings.wrong.append("two runs on one output: the result is another")
    print(f"two runs on one output: {count} times; {len(findings.wrong)} wrong")
    return findings.wrong


def table(findings: Findings) -> str:
    """The phases, in Markdown."""
    lines = ["| phase | kills | then: went on | began anew | was complete |", "|---|---:|---:|---:|---:|"]
    for phase in sorted(findings.kills):
        cells = (findings.kills, findings.went_on, findings.anew, findings.complete)
        lines.append(f"| {phase[2:]} | " + " | ".join(str(each[phase]) for each in cells) + " |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="at moments drawn from the duration of a run")
    parser.add_argument("--calls", type=int, default=0, help="at file-system calls")
    parser.add_argument("--at", default="", help=f"at moments by name, with commas: {', '.join(MOMENTS)}")
    parser.add_argument("--full", type=int, default=0, help="runs on a disk that is full (mounts one: needs root)")
    parser.add_argument("--limits", type=int, default=0, help="runs that may only write small files")
    parser.add_argument("--pairs", type=int, default=0, help="two runs on one output at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    return parser.parse_args()


def laid_out() -> Ground:
    """The inputs in a new folder, and everything imported that a run imports."""
    folder = Path(tempfile.mkdtemp(prefix="memscrub-kills-"))
    builder = [sys.executable, str(Path(__file__).with_name("kill_ground.py")), str(folder)]
    subprocess.run(builder, check=True, stderr=subprocess.DEVNULL)
    os.environ.update(SOURCE_DATE_EPOCH="1700000000", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    import torch

    torch.set_num_threads(1)
    ground = Ground(folder)
    ground.import_all()
    return ground


def kill_at(ground: Ground, reference: Reference, moment: str) -> Findings:
    """One kill at a moment by name."""
    found = Findings()
    trial = Trial(ground, reference, found)
    phase = trial.kill_at(at(moment))
    if phase is None:
        found.wrong.append(f"no run came to the moment '{moment}'")
    else:
        trial.finish(phase)
    print(f"kill at '{moment}': {phase}; {len(found.wrong)} wrong")
    return found


def main() -> None:
    asked = options()
    rng, ground = random.Random(asked.seed), laid_out()
    reference = undisturbed(ground, once=not asked.kills)
    print(f"an undisturbed run takes {reference.seconds:.2f} s and makes {reference.calls} file-system calls")
    results: dict[str, Findings] = {}
    for name, count, calls in (("time", asked.kills, False), ("calls", asked.calls, True)):
        if count:
            results[name] = found = kills(ground, reference, count, calls=calls, rng=rng)
            print(f"\nkills by {name}:\n{table(found)}\n{len(found.wrong)} wrong")
    for moment in filter(None, asked.at.split(",")):
        results[moment] = kill_at(ground, reference, moment)
    wrong = [sentence for found in results.values() for sentence in found.wrong]
    wrong += limited(ground, reference, asked.limits, rng) if asked.limits else []
    wrong += pairs(ground, reference, asked.pairs, rng) if asked.pairs else []
    if asked.full:
        with small_disk(ground.folder / "disk") as room:
            cramped = Ground(ground.folder, ground.folder / "disk" / "out")
            wrong += full(cramped, undisturbed(cramped), asked.full, rng, room)
            cramped.clear()
    if asked.json is not None:
        values = {"seconds": reference.seconds, "wrong": wrong} | {name: vars(each) for name, each in results.items()}
        asked.json.write_text(json.dumps(values, indent=2) + "\n")
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    shutil.rmtree(ground.folder)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
