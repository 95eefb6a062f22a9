"""Protected texts, their controls and ordinary texts, read from files into checked frozen values; knows the
policy's classes, nothing of models, tokens or measures.

Every text is NFC-normalised once, here, and marked secrets keep pointing at the same characters. No message
and no `repr` repeats a text: errors name file, line and id.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memscrub.errors import UsageError
from memscrub.policy.document import Policy
from memscrub.policy.mistakes import did_you_mean
from memscrub.texts.normal_form import nfc
from memscrub.texts.secret_spans import Spans, secret_spans
from memscrub.texts.text_files import Row, read_rows, refusal

KEYS = ("id", "text", "class", "prefix", "secret", "source")
MAX_ID = 200
_ADD_TEXT = 'add "text": "..." to this line.'


@dataclass(frozen=True, slots=True)
class ProtectedText:
    """One text that must not come out (or one control), with its secrets as character spans of `text`."""

    id: str
    text: str
    class_name: str
    secrets: Spans
    source: str | None
    prefix: str | None
    file: str
    line: int

    def __repr__(self) -> str:
        size = f"{len(self.text)} characters, {len(self.secrets)} secrets"
        return f"ProtectedText(id={self.id!r}, class_name={self.class_name!r}, {size}, {self.file}:{self.line})"


@dataclass(frozen=True, slots=True)
class ProtectedList:
    """All texts of a list; `duplicates` are the ids dropped because an earlier text is judged identically.

    `digest` is SHA-256 over ids, classes, texts and secrets in order of id: equal lists have equal digests.
    Whoever can guess every text can confirm the guess with it, so reports carry `list_digest` instead.
    """

    texts: tuple[ProtectedText, ...]
    duplicates: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[ProtectedText]:
        return iter(self.texts)


@dataclass(frozen=True, slots=True)
class Document:
    """One ordinary text: retain, statistics or neighbour."""

    text: str
    file: str
    line: int

    def __repr__(self) -> str:
        return f"Document({len(self.text)} characters, {self.file}:{self.line})"


def load_protected(policy: Policy) -> ProtectedList:
    """The protected texts that the policy names."""
    return _load(policy, policy.protected.files)


def load_controls(policy: Policy) -> ProtectedList:
    """The control texts that the policy names (maybe none); same format and rules as for protected texts."""
    return _load(policy, policy.protected.controls)


def iter_texts(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Document]:
    """Ordinary texts one by one, for readers that stop early; fields other than `text` are ignored."""
    for path in map(Path, paths):
        for row in read_rows(path):
            text = nfc(_text(path, row))
            yield Document(text, str(path), row.line)


def load_texts(paths: Iterable[str | os.PathLike[str]]) -> tuple[Document, ...]:
    """Ordinary texts of all these files, in order."""
    return tuple(iter_texts(paths))


def keyed_id(text: str, key: bytes) -> str:
    """HMAC-SHA256 of the NFC text, in hex: names a text in a report and gives a guesser nothing to check."""
    if not key:
        raise UsageError("The key that names texts in reports is empty; pass 16 random bytes or more.")
    normal = nfc(text)
    return hmac.new(key, normal.encode("utf-8"), hashlib.sha256).hexdigest()


def list_digest(texts: Iterable[ProtectedText], key: bytes) -> str:
    """HMAC-SHA256 over a whole list, whatever its order; equal for lists that are judged identically."""
    return keyed_id(_canonical(texts), key)


def _canonical(texts: Iterable[ProtectedText]) -> str:
    rows = sorted([t.id, t.class_name, t.text, list(map(list, t.secrets)), t.prefix or ""] for t in texts)
    return json.dumps(rows)


def as_list(texts: Iterable[ProtectedText]) -> ProtectedList:
    """These texts as a list: duplicates dropped, ids checked, digest taken.

    Raises ProtectedTextError when two texts have one id.
    """
    kept: dict[tuple[str, str, Spans, str | None], ProtectedText] = {}
    seen: dict[str, ProtectedText] = {}
    duplicates: list[str] = []
    for text in texts:
        if text.id in seen:
            first = seen[text.id]
            message = f"id {text.id!r} is taken by {first.file}:{first.line}; give every text an id of its own."
            raise refusal(Path(text.file), text.line, message)
        seen[text.id] = text
        # Only what is judged identically may go: the same text with another secret has more to lose.
        identity = (text.class_name, text.text, text.secrets, text.prefix)
        if identity in kept:
            duplicates.append(text.id)
        else:
            kept[identity] = text
    found = tuple(kept.values())
    digest = hashlib.sha256(_canonical(found).encode("ascii")).hexdigest()
    return ProtectedList(found, tuple(duplicates), digest)


def _load(policy: Policy, names: Iterable[str]) -> ProtectedList:
    return as_list(
        _protected_text(policy, path, row, number)
        for path in map(policy.resolve, names)
        for number, row in enumerate(read_rows(path), 1)
    )


def _protected_text(policy: Policy, path: Path, row: Row, number: int) -> ProtectedText:
    for key in row.values:
        if key not in KEYS:
            hint = did_you_mean(key, KEYS, f"known here: {', '.join(KEYS)}.")
            raise refusal(path, row.line, f"unknown key{_shown(key)}; {hint}")
    written = _text(path, row)
    class_name = _class(policy, path, row)
    secrets = secret_spans(path, row, written)
    if policy.classes[class_name].secret and not secrets:
        message = f"class '{class_name}' has secret = true and this text marks none"
        hint = 'add "secret": [[start, end]] with character offsets into the text.'
        raise refusal(path, row.line, f"{message}; {hint}")
    return ProtectedText(
        id=_id(path, row, number),
        text=nfc(written),
        class_name=class_name,
        secrets=secrets,
        source=_string(path, row, "source"),
        prefix=_string(path, row, "prefix"),
        file=str(path),
        line=row.line,
    )


def _shown(word: str) -> str:
    # A word of letters can be repeated in a message; anything else may be a text in the wrong column.
    return f" '{word}'" if re.fullmatch(r"[A-Za-z_-]{1,24}", word) else ""


def _string(path: Path, row: Row, key: str) -> str | None:
    """A string field in NFC, or None where it is absent or null."""
    value = row.values.get(key)
    if value is None:
        return None
    _check_string(path, row, key, value)
    return nfc(value)


def _check_string(path: Path, row: Row, key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise refusal(path, row.line, f"{key} must be a string, not {_kind(value)}; put it in double quotes.")
    if not value.strip():
        raise refusal(path, row.line, f"{key} is empty; fill it in or drop {'the line' if key == 'text' else 'it'}.")
    if "\0" in value:
        raise refusal(path, row.line, f"{key} contains a NUL character; save the file as plain UTF-8 text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        message = f"{key} contains half a character (a lone surrogate such as \\ud800); write the character itself."
        raise refusal(path, row.line, message) from None


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "another kind of value")


def _text(path: Path, row: Row) -> str:
    """The text as the file has it: secret offsets count these characters."""
    value = row.values.get("text")
    if value is None:
        keys = [key for key in row.values if key not in KEYS]
        near = next((hint for key in keys if (hint := did_you_mean(key, ["text"], ""))), _ADD_TEXT)
        raise refusal(path, row.line, f"there is no text; {near}")
    _check_string(path, row, "text", value)
    return str(value)


def _id(path: Path, row: Row, number: int) -> str:
    if row.values.get("id") is None:
        name = path.name.split(".")[0] or "text"
        stem = "".join(c if c.isprintable() else "_" for c in name)[: MAX_ID - 20]
        return f"{stem}-{number}"
    value = _string(path, row, "id")
    assert value is not None
    if len(value) > MAX_ID or not value.isprintable():
        wrong = f"the id is longer than {MAX_ID} characters or has unprintable ones"
        raise refusal(path, row.line, f"{wrong}; shorten it and use plain letters.")
    return value


def _class(policy: Policy, path: Path, row: Row) -> str:
    known = list(policy.classes)
    value = _string(path, row, "class")
    if value is None:
        if len(known) == 1:
            return known[0]
        raise refusal(path, row.line, f'the class is missing; add "class": "{known[0]}" or {_others(known)}.')
    if value not in policy.classes:
        hint = did_you_mean(value, known, f"known there: {', '.join(known)}.")
        raise refusal(path, row.line, f"class{_shown(value)} is not in {policy.path}; {hint}")
    return value


def _others(known: list[str]) -> str:
    return "another of the policy's classes (" + ", ".join(known[1:]) + ")"
