"""The errors memscrub raises on purpose, each with the exit code it ends a run with; knows nothing else.

Every message is one sentence (two at most) that names the file or value and tells the user what to do.
Messages never contain protected text, nor anything that a terminal would take for a command: they quote names from
files that strangers wrote, so what is not printable is shown as its code.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; users and CI script against these numbers, so they never change meaning."""

    PASS = 0
    VIOLATED = 1
    USAGE = 2
    INCOMPLETE = 3
    UNREACHABLE = 4
    SIGNATURE = 5


LONGEST_MESSAGE = 2000
"""Characters of a message; of a longer one, which quotes a name without end, the middle is left out."""


def printable(text: str) -> str:
    """The text with escape sequences, line breaks and other unprintable characters as codes such as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class MemscrubError(Exception):
    """Base of all errors with a message meant for the user; `exit_code` is what the CLI ends with."""

    exit_code: ExitCode = ExitCode.INCOMPLETE

    def __init__(self, message: str) -> None:
        half = LONGEST_MESSAGE // 2
        short = message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"
        super().__init__(printable(short))


class UsageError(MemscrubError):
    """The command line or an API argument is not usable (exit 2)."""

    exit_code = ExitCode.USAGE


class PolicyError(UsageError):
    """The policy file is not usable: unknown key, wrong type, missing section (exit 2)."""


class ProtectedTextError(UsageError):
    """A list of protected, control or retain texts is not usable (exit 2)."""


class CheckpointError(UsageError):
    """The checkpoint cannot be used as it is: missing, malformed, unsafe or of an unknown kind (exit 2)."""


class ArchitectureError(CheckpointError):
    """The checkpoint's family is not in the architecture table, or a module it should have is missing (exit 2)."""


class OutputError(UsageError):
    """The output directory or file cannot be used: exists already, or holds something else (exit 2)."""


class UntrustedMeasuresError(UsageError):
    """The measures in a signed report do not answer this policy (exit 2); measuring again does."""


class IncompleteError(MemscrubError):
    """The run could not finish: out of memory, disk full, interrupted, a tool failed (exit 3)."""


class InterruptedRunError(IncompleteError):
    """A person or the system stopped the run (exit 3); the message is what is left of it."""

    def __str__(self) -> str:
        return f"interrupted; {super().__str__()}"


class NumericalError(IncompleteError):
    """The mathematics broke down: NaN or infinite values in weights, statistics or solution (exit 3)."""


class SignatureInvalidError(MemscrubError):
    """A signature, digest or the set of files does not match what was signed (exit 5)."""

    exit_code = ExitCode.SIGNATURE


OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""What libraries say in a RuntimeError that is about a lack of memory, of whatever device."""


def would_repeat(error: BaseException) -> bool:
    """Would the same run end in the same error again? Then there is nothing to go on from."""
    return isinstance(error, UsageError | NumericalError | SignatureInvalidError)
