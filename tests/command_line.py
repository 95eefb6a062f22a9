"""The command line inside this process, as a user types it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from memscrub.cli.app import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of `memscrub ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["memscrub", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)
