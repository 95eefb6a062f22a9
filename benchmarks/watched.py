"""Run the command line and watch what it takes of memory and disk; knows not what it is run for.

Peak memory is what the operating system counted for the child process (VmHWM), and of that what no file backs
(RssAnon). Disk is the blocks of all files that it makes for its output, and of those without a name that it holds open.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ran:
    """One run of the command line: bytes at the peak, also of memory that no file backs; and the most bytes that it
    had on disk, in all and before any shard of its output was there."""

    code: int
    seconds: float
    peak: int
    anonymous: int
    disk: int
    scratch: int


def watched(*arguments: str, out: Path | None = None, program: Sequence[str] = ("-m", "memscrub")) -> Ran:
    """Run memscrub, or other Python; until it ends, look at its memory and at what it has on disk for `out`."""
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, *program, *arguments])
    peak = anonymous = disk = scratch = 0
    begun = False  # the output
    while child.poll() is None:
        found = memory(child.pid)
        peak, anonymous = max(peak, found.get("VmHWM", 0)), max(anonymous, found.get("RssAnon", 0))
        if out is not None:
            taken = disk_of(out, child.pid)
            begun = begun or any(out.with_name(f"{out.name}.partial").glob("*.safetensors"))
            disk, scratch = max(disk, taken), scratch if begun else max(scratch, taken)
        time.sleep(0.02)
    return Ran(child.returncode, time.monotonic() - began, peak, anonymous, disk, scratch)


def disk_of(out: Path, process: int) -> int:
    """Bytes on disk beside `out` under names that begin with its own, and in the process's files without a name."""
    places = [str(place) for place in out.parent.glob(f"{out.name}*")]
    named = [place for place in places if os.path.isfile(place)]
    named += [os.path.join(folder, name) for top in places for folder, _, names in os.walk(top) for name in names]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        held = [f"/proc/{process}/fd/{number}" for number in os.listdir(f"/proc/{process}/fd")]
        disk = os.stat(out.parent).st_dev
        return _size(disk, named) + _size(disk, held, nameless=True)
    return 0  # it ended meanwhile


def _size(disk: int, files: list[str], *, nameless: bool = False) -> int:
    """Bytes on that disk of those that are files, each once; with `nameless` only of those that have no name."""
    found = {}
    for file in files:
        with contextlib.suppress(OSError):  # gone meanwhile
            seen = os.stat(file)
            if stat.S_ISREG(seen.st_mode) and seen.st_dev == disk and not (nameless and seen.st_nlink):
                found[seen.st_ino] = 512 * seen.st_blocks
    return sum(found.values())


def memory(process: int) -> dict[str, int]:
    """VmHWM and RssAnon of a process in bytes; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return {}
    pairs = (line.partition(":")[::2] for line in lines)
    return {key: 1024 * int(rest.split()[0]) for key, rest in pairs if key in ("VmHWM", "RssAnon")}
