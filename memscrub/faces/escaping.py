"""Strings of a report made harmless for where they are shown: terminals, Markdown, SARIF, workflow commands.

Ids, classes and paths are the user's or, in a report from elsewhere, anybody's. Knows formats, nothing of reports.
"""

from __future__ import annotations

import dataclasses
import re
from enum import Enum
from typing import TypeVar

T = TypeVar("T")

# An underscore between letters is no markup.
_MARKDOWN = re.compile(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))")
# What begins a list or a heading.
_BEGINNING = re.compile(r"^(\d*)([#+=.)-])")
_TITLES = 1024


def printable(value: T) -> T:
    """The same value with every unprintable character in its strings written out, as in `\\x1b` or `\\u202e`.

    Dataclasses, tuples and dicts are walked; what needs no change is returned as it is. Control characters, invisible
    format characters (those that turn the direction of text among them) and halves of surrogate pairs are unprintable.
    """
    if isinstance(value, Enum):
        return value
    if isinstance(value, str):
        return value if value.isprintable() else _written_out(value)  # type: ignore[return-value]
    if isinstance(value, tuple):
        items = tuple(map(printable, value))
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value  # type: ignore[return-value]
    if isinstance(value, dict):
        pairs = {printable(key): printable(item) for key, item in value.items()}
        same = all(pairs.get(key) is item for key, item in value.items())
        return value if same and len(pairs) == len(value) else pairs  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        was = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        now = {name: printable(item) for name, item in was.items()}
        changed = {name: item for name, item in now.items() if item is not was[name]}
        return dataclasses.replace(value, **changed) if changed else value
    return value


def _written_out(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def markdown(text: str) -> str:
    """Printable text as Markdown that shows exactly these characters: no markup, HTML, link, table cell or mention.

    Anywhere in a line: nothing begins a list, a heading or a block of code.
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _MARKDOWN.sub(r"\\\1", text)
    # Bare addresses become links in GitHub's dialect.
    text = re.sub(r"(?i)\b(https?|ftp|mailto|xmpp):", r"\1\\:", text)
    text = re.sub(r"(?i)\b(www)\.", r"\1\\.", text)
    # GitHub looks for people and addresses in what is shown, after escapes are gone: a comment parts them.
    text = text.replace("@", "@<!-- -->")
    begun = text.lstrip(" ")
    return "&#32;" * (len(text) - len(begun)) + _BEGINNING.sub(r"\1\\\2", begun)


def sarif(text: str) -> str:
    """Printable text as a SARIF message: neither placeholder (3.11.5) nor link (3.11.6), within what is shown."""
    return re.sub(r"([\[\]\\])", r"\\\1", clipped(text)).replace("{", "{{").replace("}", "}}")


def clipped(text: str, length: int = _TITLES) -> str:
    """At most so many characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def command_data(text: str) -> str:
    """Text as the message of a workflow command of GitHub Actions."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def command_property(text: str) -> str:
    """Text as a property of a workflow command of GitHub Actions."""
    return command_data(text).replace(":", "%3A").replace(",", "%2C")
