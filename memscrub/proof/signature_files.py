"""Signature files: who makes and opens them, and reading them so that they can be read in one way only.

Knows neither keys nor statements. A file that could be spelled otherwise and mean the same is refused, so that not
even a blank in it changes unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from memscrub.errors import SignatureInvalidError
from memscrub.storage.files import strict_json

MAX_SIZE = 64 << 20
"""Bytes of a signature file that are read at most: nothing vouches for its size before it was read."""

MAX_REPORT = 4 << 30
"""The same for a report, whose digest was checked before: a list may be long."""


class Verifier(Protocol):
    """Whose signature is asked for: a public key, or an identity that Sigstore vouches for."""

    @property
    def key_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    def open_bundle(self, bundle: Mapping[str, Any], file: str, payload_type: str) -> bytes: ...
    def open_statement(self, envelope: Mapping[str, Any], file: str, payload_type: str) -> bytes: ...


class Signer(Protocol):
    """Who signs: a private key, or an identity that Sigstore vouches for."""

    @property
    def public(self) -> Verifier: ...
    def bundle(self, payload: bytes, payload_type: str) -> dict[str, Any]: ...
    def statement(self, payload: bytes, payload_type: str) -> dict[str, Any]: ...


def read_object(root: Path, name: str, *, canonical: bool = False, limit: int = MAX_SIZE) -> dict[str, Any]:
    """A JSON object; with `canonical`, one without a byte that could be another and mean the same."""
    path = root / name
    try:
        if path.stat().st_size > limit:
            raise SignatureInvalidError(f"{name} is too large to be genuine.")
        data = path.read_bytes()
        value = strict_json(data)
    except OSError as problem:
        raise SignatureInvalidError(f"{name} cannot be read: {problem.strerror}.") from None
    except ValueError as problem:
        raise SignatureInvalidError(f"{name} cannot be used: {problem}.") from None
    if not isinstance(value, dict):
        raise SignatureInvalidError(f"{name} is not a JSON object.")
    if canonical and data != json.dumps(value, separators=(",", ":")).encode():
        raise SignatureInvalidError(
            f"{name} is not in the one form that signatures are written in; it was changed after it was signed."
        )
    return value


def parsed(payload: bytes, file: str) -> dict[str, Any]:
    """The statement in a payload whose signature was checked."""
    try:
        statement = strict_json(payload)
    except ValueError as problem:
        raise SignatureInvalidError(f"The statement in {file} cannot be used: {problem}.") from None
    if not isinstance(statement, dict):
        raise SignatureInvalidError(f"The statement in {file} is not a JSON object.")
    return statement
