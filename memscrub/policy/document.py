"""The policy: what must not come out of a checkpoint and what an edit may cost, read from TOML; knows nothing
of models, tokens or the protected texts themselves.

A policy file is strict: an unknown key, a wrong type or a missing file ends the run with one sentence that
names the file, the line and a way out.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, StringConstraints, ValidationError

from memscrub.errors import PolicyError
from memscrub.policy.mistakes import (
    at_line,
    decode,
    did_you_mean,
    first_problem,
    read_source,
    syntax_problem,
)
from memscrub.policy.sections import (
    ClassLimits,
    Fix,
    Locality,
    Name,
    Probe,
    ProtectedFiles,
    ReportSettings,
    Section,
    Sign,
)
from memscrub.policy.toml_lines import line_of, line_of_endless_key
from memscrub.policy.waiver_entries import Waivers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# No control characters, and none that reorder what stands around them.
_PLAIN = r"^[^\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]{1,200}$"
# What TOML promises to hold. Python's parser takes longer ones, which then cannot even be printed.
_LARGEST = 1 << 63


class Policy(Section):
    """A whole policy file; made by `load_policy` or `parse_policy`, never changed."""

    schema_version: Literal[1] = Field(alias="schema", description="Version of this format; only 1 is known.")
    name: Annotated[str, StringConstraints(pattern=_PLAIN)] = Field(
        examples=["release-gate"], description="Name of the policy, as reports show it."
    )
    protected: ProtectedFiles = Field(description="Where the protected texts are.")
    classes: Mapping[Name, ClassLimits] = Field(
        alias="class", min_length=1, description="Limits for each class of protected texts."
    )
    probe: Probe = Probe()
    locality: Locality = Locality()
    fix: Fix = Fix()
    report: ReportSettings = ReportSettings()
    sign: Sign = Sign()
    waivers: Waivers = Field(default=(), alias="waiver", description="Texts that may break their limits for a while.")

    _path: Path = PrivateAttr()
    _digest: str = PrivateAttr()

    @property
    def path(self) -> Path:
        """The policy file, as it was named."""
        return self._path

    @property
    def base(self) -> Path:
        """The folder that relative file names in the policy start from."""
        return self._path.parent

    @property
    def digest(self) -> str:
        """SHA-256 of the policy file's bytes, in hex."""
        return self._digest

    def resolve(self, name: str) -> Path:
        """A file named in the policy, seen from where the program runs."""
        return self.base / name

    @property
    def retain_paths(self) -> tuple[Path, ...]:
        """The retain files; a PolicyError where there are none, for the commands that cannot do without."""
        if not self.locality.retain:
            raise PolicyError(
                f"{self._path}: [locality] names no retain text, without which an edit cannot be measured;"
                ' add retain = ["retain.txt"] with ordinary text of your own.'
            )
        return tuple(map(self.resolve, self.locality.retain))


def parse_policy(data: bytes, path: Path = Path("policy.toml")) -> Policy:
    """The policy in these bytes; `path` is what messages and relative names refer to. Looks for no file."""
    text = decode(data, path)
    if (line := line_of_endless_key(text)) is not None:
        raise PolicyError(at_line(path, line, "not a key of a policy: it has dozens of dotted parts; take it out."))
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for integers too long to convert
        raise PolicyError(syntax_problem(error, text, path)) from None
    if _beyond(raw):
        raise PolicyError(f"{path}: a whole number in it is beyond 64 bits; write a smaller one.")
    if not raw:
        raise PolicyError(at_line(path, 1, "the policy is empty; `memscrub init` writes one to start from."))
    schema = raw.get("schema", 1)
    if type(schema) is not int or schema != 1:
        message = "this version of memscrub knows only schema 1; write schema = 1 or install a newer memscrub."
        raise PolicyError(at_line(path, line_of(text, ("schema",)), message))
    try:
        policy = Policy.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise PolicyError(first_problem(problems, Policy, text, path)) from None
    policy._path = path
    policy._digest = hashlib.sha256(data).hexdigest()
    return policy


def _beyond(raw: object) -> bool:
    """Whether any whole number in these values does not fit 64 bits."""
    pending = [raw]
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
            return True
    return False


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Read a policy file and check that every text file it names is there.

    The signing key is not looked for: only the machine that signs has it; the same policy gates elsewhere.
    """
    file = Path(path)
    data = read_source(file)
    policy = parse_policy(data, file)
    sections = (("protected", policy.protected, ("files", "controls")),
                ("locality", policy.locality, ("retain", "statistics", "neighbours")))  # fmt: skip
    for section, values, keys in sections:
        for key in keys:
            for name in getattr(values, key):
                _check_file(policy, (section, key), name, data)
    return policy


def _check_file(policy: Policy, keys: tuple[str, str], name: str, data: bytes) -> None:
    target = policy.resolve(name)
    if os.path.isfile(target) and os.access(target, os.R_OK):
        return
    if os.path.isdir(target):
        inside = name.rstrip("/") + "/texts.jsonl"
        problem = f'is a directory; name the files in it, for example {keys[1]} = ["{inside}"].'
    elif os.path.exists(target):
        problem = "cannot be read; check its permissions."
    else:
        siblings = _names_in(target.parent)
        problem = "does not exist; " + did_you_mean(target.name, siblings, otherwise=f"looked in {target.parent}.")
    line = line_of(decode(data, policy.path), keys)
    raise PolicyError(at_line(policy.path, line, f"{keys[1]} in [{keys[0]}] names {name!r}, which {problem}"))


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (OSError, ValueError):
        return []  # only a hint is lost
