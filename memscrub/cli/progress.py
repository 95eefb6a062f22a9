"""Showing how far a run has got: bars on a terminal, one line per stage when piped, nothing when quiet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from memscrub.measures.measure import Progress as Report


@contextmanager
def shown(console: Console, *, quiet: bool = False) -> Iterator[Report]:
    """A progress callback that draws on `console` (standard error) while the context is open."""
    if quiet:
        yield _nothing
    elif console.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        ) as bars:
            yield _Bars(bars)
    else:
        yield _Lines(console)


def _nothing(stage: str, done: int, total: int) -> None:
    # Not `measure.silent`: that module loads torch, which a gate on signed measures does without.
    pass


class _Bars:
    """One bar per stage; a stage is known by its words before any bracket, which may change as it goes."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        name = stage.split(" (")[0]
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(stage, total=total)
        self.bars.update(self.tasks[name], description=stage, completed=done, total=total)


class _Lines:
    """One plain line when a stage begins and one when it is done; a log should not be full of half-way marks."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.began: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        name = stage.split(" (")[0]
        now = time.monotonic()
        if name not in self.began:
            self.began[name] = now
            self.console.print(f"{name}: {total} to do", highlight=False, soft_wrap=True)
        if done >= total:
            self.console.print(f"{name}: done in {now - self.began.pop(name):.1f} s", highlight=False, soft_wrap=True)
