"""The log of a run: JSON lines, appended and handed to the system one at a time, so that it survives a kill.

Knows stages, figures and ids, never texts: what goes in are the counts that progress shows, the verdict's own words
and our errors' messages, which hold none; of any other error only its kind. docs/reliability.md has every field.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from memscrub.errors import ExitCode, MemscrubError, OutputError
from memscrub.storage.output_file import check_place, lies_in
from memscrub.storage.partial import disk_errors, refuse_overlap

if TYPE_CHECKING:
    from memscrub.reports.report import Report

SCHEMA = 1
# Seconds between two lines of one stage.
EVERY = 10.0
_INCOMPLETE = (KeyboardInterrupt, MemoryError, OSError)


class RunLog:
    """The log at `path` while the context lasts; without a path nothing is written. Lines of several runs may mix.

    Raises OutputError where the file cannot be written or lies in one of the directories `outside`, IncompleteError
    when the disk is full: a run that was to be logged does not go on unlogged. An error or an exit code that is under
    way when the context ends stays what it is, also where its line cannot be written.
    """

    def __init__(self, path: Path | None, command: str, *, outside: Sequence[str | Path] = ()) -> None:
        self.path, self.command = path, command
        self._run = secrets.token_hex(4)
        self._began = time.monotonic()
        self._stages: dict[str, tuple[float, float]] = {}  # when a stage began, and when it was last written of
        self._file: int | None = None
        if path is not None:
            check_place(path, "the log")
            for folder in outside:
                if lies_in(path, folder):
                    raise OutputError(f"{path} lies in {folder}; keep the log in another folder.")
                refuse_overlap(path, Path(folder))  # the files of a cache snapshot lie outside of it

    def __enter__(self) -> RunLog:
        if self.path is not None:
            with disk_errors(self.path):
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._write("start", schema=SCHEMA, version=version("memscrub"), pid=os.getpid())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None or self.path is None:
            return
        code = getattr(error, "exit_code", None)  # ours, and typer's
        try:
            self._end(error, code)
        except MemscrubError:
            if error is None or code == 0:
                raise
        finally:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # the lines were handed over before
                os.close(file)

    def _end(self, error: BaseException | None, code: int | None) -> None:
        if error is not None and code is None:
            code = int(ExitCode.INCOMPLETE) if isinstance(error, _INCOMPLETE) else 1
            self._write("error", kind=type(error).__name__)
        elif isinstance(error, MemscrubError):
            self._write("error", kind=type(error).__name__, message=str(error))
        self._write("end", exit_code=0 if code is None else int(code), **self._since(self._began))

    def stage(self, words: str, done: int, total: int) -> None:
        """A progress callback: a line when a stage begins, one when it is done, and one every so often."""
        if self._file is None:
            return
        name, _, note = words.partition(" (")
        now = time.monotonic()
        began, last = self._stages.get(name, (now, -EVERY))
        if done < total and now - last < EVERY:
            return
        self._stages[name] = (began, now)
        more = {"note": note.rstrip(")")} if note else {}
        self._write("stage", stage=name, done=done, total=total, **self._since(began), **more)
        if done >= total:
            del self._stages[name]

    def remark(self, sentence: str) -> None:
        """A remark that a person would be shown."""
        self._write("remark", message=sentence)

    def report(self, report: Report) -> None:
        """The figures that a run ended with."""
        verdict, locality = report.verdict, report.locality
        figures: dict[str, Any] = {
            "texts": len(report.texts),
            "within": verdict.within,
            "violated": verdict.violated,
            "inconclusive": verdict.inconclusive,
        }
        if locality is not None:
            figures |= {
                "kl": locality.kl,
                "agreement": locality.agreement,
                "perplexity_ratio": locality.perplexity_ratio,
            }
        self._write("verdict", outcome=verdict.outcome.value, figures=figures, reasons=list(verdict.reasons))

    def figures(self, event: str, **figures: int | float | str | None) -> None:
        """Figures of another kind of result."""
        self._write(event, figures=figures)

    @staticmethod
    def _since(began: float) -> dict[str, float]:
        return {"seconds": round(time.monotonic() - began, 3)}

    def _write(self, event: str, **values: Any) -> None:
        if self._file is None or self.path is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now, "run": self._run, "command": self.command, "event": event, **values}
        with disk_errors(self.path):
            # One call: lines of two runs with one log never cut into each other.
            os.write(self._file, json.dumps(line).encode() + b"\n")
