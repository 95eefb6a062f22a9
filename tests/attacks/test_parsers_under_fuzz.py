"""No input makes a parser do anything but return or raise our own error, soon and in little memory.

A short run of `make fuzz` with a fixed seed, and every input that once escaped. The harness is tested first: a parser
with a mistake in it must be found out.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memscrub.errors import UsageError
from tests.fuzz import engine
from tests.fuzz.__main__ import shares
from tests.fuzz.engine import REGRESSIONS, Escape, fuzz, replay
from tests.fuzz.mutators import mutate_bytes
from tests.fuzz.targets import CANARY, TARGETS, Target

INPUTS = shares(20_000, list(TARGETS))


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Libraries warn of odd inputs, which here is no mistake of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _key_error(data: bytes) -> object:
    return {}["missing"]


def _never(data: bytes) -> object:
    while True:
        pass


def _greedy(data: bytes) -> object:
    return bytearray(1 << 32)


def _loud(data: bytes) -> object:
    raise UsageError(f"the text {CANARY} is wrong.")


def _endless(data: bytes) -> object:
    error = UsageError("")
    error.args = ("x" * 5000,)
    raise error


def _raw(data: bytes) -> object:
    error = UsageError("")
    error.args = ("\x1b[2J",)
    raise error


@pytest.mark.parametrize(
    ("parse", "what"),
    [
        (_key_error, "KeyError"),
        (_never, "TooLong"),
        (_greedy, "MemoryError"),
        (_loud, "a message that repeats a text"),
        (_endless, "a message without end"),
        (_raw, "a message that is not fit for a terminal"),
    ],
)
def test_a_parser_with_a_mistake_is_found_out(
    parse: Callable[[bytes], object], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
        return [b"seed"], lambda data: None if data == b"seed" else parse(data)

    monkeypatch.setattr(engine, "TARGETS", {"bad": Target("bad", prepare, mutate_bytes, 1)})
    monkeypatch.setattr(engine, "SECONDS", 0.2)
    (escape,) = fuzz("bad", 3, seed=0).escapes.values()
    assert escape.what == what


def test_the_same_seed_gives_the_same_inputs(tmp_path: Path) -> None:
    for name, target in TARGETS.items():
        (tmp_path / name).mkdir()
        seeds, _ = target.prepare(tmp_path / name)
        both = [[target.mutate(random.Random(number), min(seeds, key=len)) for number in range(8)] for _ in range(2)]
        assert both[0] == both[1], name
        assert len(set(both[0])) > 4, name


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_escapes(name: str) -> None:
    tally = fuzz(name, INPUTS[name], seed=1)
    assert tally.inputs == INPUTS[name]
    assert tally.outcomes
    assert not tally.escapes, [(escape.what, escape.where, escape.data[:300]) for escape in tally.escapes.values()]


@pytest.mark.parametrize("name", sorted(folder.name for folder in REGRESSIONS.iterdir()))
def test_what_once_escaped_does_so_no_more(name: str) -> None:
    outcomes = replay(name)
    assert outcomes
    assert not [(file, outcome) for file, outcome in outcomes.items() if isinstance(outcome, Escape)]
