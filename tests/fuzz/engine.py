"""Feeds one parser many inputs and judges what becomes of them; knows no format.

An input escapes when the parser raises anything but a `MemscrubError`, when the message of one is not fit for a
terminal or repeats a protected text, when it takes more than `SECONDS` of processor time, or when it wants more than
`MEMORY` beyond what the process had. Inputs that lead to an outcome not seen before are kept to be changed further.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

from memscrub.errors import MemscrubError
from tests.fuzz.targets import CANARY, TARGETS, Target

SECONDS = 2.0
MEMORY = 512 << 20
LONGEST_MESSAGE = 4000
REGRESSIONS = Path(__file__).parent / "regressions"
_KEPT = 400
_LARGEST_KEPT = 1 << 12


class TooLong(BaseException):
    """The time for one input is over; no parser may catch it."""


@dataclass(frozen=True)
class Escape:
    """What went wrong, where, and the input that did it."""

    parser: str
    what: str
    where: str
    data: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """A file name for the input."""
        return hashlib.sha256(self.data).hexdigest()[:16]


@dataclass
class Tally:
    """What a run of one parser showed."""

    inputs: int = 0
    seconds: float = 0.0
    outcomes: set[str] = field(default_factory=set)
    escapes: dict[str, Escape] = field(default_factory=dict)

    def add(self, outcome: str | Escape) -> bool:
        """Count it, and say whether there was none like it before."""
        self.inputs += 1
        if isinstance(outcome, Escape):
            return self.escapes.setdefault(outcome.what + outcome.where, outcome) is outcome
        new = outcome not in self.outcomes
        self.outcomes.add(outcome)
        return new


class _Attempt:
    """The context in which one input is parsed: whatever ends it becomes `outcome`."""

    def __init__(self, parser: str, data: bytes, memory: tuple[int, int]) -> None:
        self.parser, self.data, self.memory = parser, data, memory
        self.outcome: str | Escape = "parsed"

    def __enter__(self) -> _Attempt:
        resource.setrlimit(resource.RLIMIT_AS, self.memory)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (self.memory[1], self.memory[1]))
        if isinstance(error, KeyboardInterrupt):
            return False
        if isinstance(error, MemscrubError):
            self.outcome = self._judged(error)
        elif error is not None:
            frames = [f for f in traceback.extract_tb(trace) if "memscrub" in f.filename and "fuzz" not in f.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
            self.outcome = Escape(self.parser, type(error).__name__, where, self.data)
        return True

    def _judged(self, error: MemscrubError) -> str | Escape:
        message = str(error)
        wrong = "a message that is not fit for a terminal" if not message.isprintable() else ""
        wrong = wrong or ("a message that repeats a text" if CANARY in message else "")
        wrong = wrong or ("a message without end" if len(message) > LONGEST_MESSAGE else "")
        shape = re.sub(r"'.*?'|\(.*?\)|/\S+|\d+", "", message)[:100]
        return Escape(self.parser, wrong, shape, self.data) if wrong else f"{type(error).__name__} {shape}"


class Parser:
    """One parser, made ready in a folder of its own, with bounds on the time and memory of every input."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self._folder = target, folder
        self.seeds, self._run = target.prepare(folder)
        for data in self.seeds:
            self._run(data)  # one that does not parse is a mistake of ours; and modules are loaded before memory counts
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        pages = Path("/proc/self/statm")
        used = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else None
        self._memory = (most if used is None else used + MEMORY, most)

    def attempt(self, data: bytes) -> str | Escape:
        """What becomes of one input: an outcome (kind of error and shape of its message) or an escape."""
        with _Attempt(self.target.name, data, self._memory) as tried:
            found = self._run(data)
            tried.outcome = "parsed " + (found if isinstance(found, str) else type(found).__name__)[:60]
        return tried.outcome

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def parser(name: str) -> Iterator[Parser]:
    """The parser of that name, whose files are on a file system in memory where there is one."""

    def over(_number: int, frame: FrameType | None) -> None:
        # Between an input's end and the timer's, the one who is interrupted is the judge and not the parser.
        if frame is None or frame.f_code is not _Attempt.__exit__.__code__:
            raise TooLong

    shared = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="memscrub-fuzz-", dir=shared if shared.is_dir() else None)
    handler = signal.signal(signal.SIGPROF, over)
    try:
        yield Parser(TARGETS[name], Path(folder))
    finally:
        signal.signal(signal.SIGPROF, handler)
        shutil.rmtree(folder, ignore_errors=True)


def fuzz(name: str, inputs: int, seed: int) -> Tally:
    """Feed the parser `name` so many inputs, all determined by `seed`."""
    tally, chance = Tally(), random.Random(f"{name} {seed}")
    with parser(name) as tried:
        corpus = list(tried.seeds)
        begin = time.process_time()
        while tally.inputs < inputs:
            data = tried.target.mutate(chance, chance.choice(corpus))
            if tally.add(tried.attempt(data)) and len(data) <= _LARGEST_KEPT:
                corpus.append(data)
                del corpus[len(tried.seeds) : len(corpus) - _KEPT]
        tally.seconds = time.process_time() - begin
    return tally


def replay(name: str) -> dict[str, str | Escape]:
    """What becomes today of the inputs that once escaped from the parser `name`, by file name."""
    with parser(name) as tried:
        return {file.name: tried.attempt(file.read_bytes()) for file in sorted((REGRESSIONS / name).glob("*"))}
