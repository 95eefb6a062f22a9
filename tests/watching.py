"""Runs the command line in a process of its own and writes down what Python did there: code run, files opened, pickles
read, connections made, processes started. Audit hooks see what every library does, not only memscrub.

    python tests/watching.py EVENTS COMMAND...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NETWORK = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn")
CODE = ("compile", "exec", "import")
_WATCHED = frozenset((*NETWORK, *PROCESSES, *CODE, "open", "pickle.find_class", "marshal.loads"))


@dataclass(frozen=True)
class Seen:
    """How a command ended, what it said, and what was done: (event, its arguments as texts), in order."""

    status: int
    output: str
    events: tuple[tuple[str, tuple[str, ...]], ...]

    def of(self, *kinds: str) -> list[tuple[str, ...]]:
        """The arguments of the events of these kinds."""
        return [arguments for kind, arguments in self.events if kind in kinds]


def watched(*command: str | Path, folder: Path, **environment: str) -> Seen:
    """Run `memscrub COMMAND` in `folder`, which is also its home, and see what happens."""
    log = folder / "events.jsonl"
    home = {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "TMPDIR": str(folder), **environment}
    run = subprocess.run(
        [sys.executable, __file__, str(log), *map(str, command)],
        cwd=folder,
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return Seen(run.returncode, run.stdout + run.stderr, tuple((kind, tuple(given)) for kind, given in events))


def _watch(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    within = False

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal within
        if event not in _WATCHED or within:
            return
        within = True  # what the hook itself does is no event
        try:
            shown = [getattr(each, "co_filename", None) or str(each)[:500] for each in arguments]
            os.write(handle, json.dumps([event, shown]).encode() + b"\n")
        finally:
            within = False

    sys.addaudithook(note)


if __name__ == "__main__":
    from memscrub.cli.app import main

    _watch(Path(sys.argv[1]))
    sys.argv = ["memscrub", *sys.argv[2:]]
    main()
