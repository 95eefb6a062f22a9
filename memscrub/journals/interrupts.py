"""What a signal does to a run: the first ends it with one sentence and exit 3, a second ends it at once.

Knows the signals, not what runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from memscrub.errors import ExitCode, IncompleteError, InterruptedRunError, would_repeat


def catch_signals() -> None:
    """From here on SIGINT, SIGTERM and SIGHUP raise InterruptedRunError where the program stands.

    SIGHUP stays ignored where it was, as under `nohup`: that run is meant to outlive its terminal.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _end)
    # Not KeyboardInterrupt: typer would turn that into its own exit code.
    raise InterruptedRunError("nothing was written.")


def _end(number: int, frame: FrameType | None) -> None:
    # Whoever asks twice does not want to wait for the tidying up; the next run does it.
    os._exit(int(ExitCode.INCOMPLETE))


@contextlib.contextmanager
def going_on(journal: Path | None, what: str = "done") -> Iterator[None]:
    """Inside, an error that leaves the run's journal behind says that the same command goes on from there."""
    try:
        yield
    except (IncompleteError, KeyboardInterrupt) as error:
        if journal is None or not journal.is_file() or would_repeat(error):
            raise
        kept = f"what was {what} so far is in {journal}, and the same command goes on from there."
        if isinstance(error, InterruptedRunError | KeyboardInterrupt):
            raise InterruptedRunError(kept) from None
        raise IncompleteError(f"{error} W{kept[1:]}") from error


@contextlib.contextmanager
def finished(sentence: str | None) -> Iterator[None]:
    """Inside, an interrupt says that the work was done; with None it says what it always does."""
    try:
        yield
    except InterruptedRunError:
        if sentence is None:
            raise
        raise InterruptedRunError(sentence) from None
