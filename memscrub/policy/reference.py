"""The settings of a policy as Markdown tables for docs/policy.md; knows the models, not the prose there.

`python -m memscrub.policy.reference` prints the tables, and with a file's name puts them between its markers.
"""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from memscrub.policy.document import Policy
from memscrub.policy.mistakes import section_model, to_toml

BEGIN = "<!-- settings: begin (python -m memscrub.policy.reference docs/policy.md) -->"
END = "<!-- settings: end -->"


def tables() -> str:
    """All sections with their settings, in the order of the models."""
    top = {name: field for name, field in Policy.model_fields.items() if section_model(field) is None}
    parts = [_table("Top of the file", "Before the first section.", top)]
    for name, field in Policy.model_fields.items():
        section = section_model(field)
        if section is not None:
            title = {"class": "`[class.NAME]`", "waiver": "`[[waiver]]`"}.get(field.alias or name, f"`[{name}]`")
            parts.append(_table(title, _doc(section), section.model_fields))
    return "\n\n".join(parts)


def updated(document: str) -> str:
    """A document with the tables between its markers renewed."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _doc(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip()


def _table(title: str, intro: str, fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        cells = (f"`{field.alias or name}`", _kind(field), _default(field), field.description or "")
        rows.append("| " + " | ".join(cells) + " |")
    return f"### {title}\n\n{intro}\n\n" + "\n".join(rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    return "none" if value is None or value == () else f"`{to_toml(value)}`"


def _kind(field: FieldInfo) -> str:
    limits: list[Any] = list(field.metadata)
    annotation: Any = field.annotation
    choices = [kind for kind in get_args(annotation) if kind is not type(None)]
    if len(choices) == 1 and get_origin(choices[0]) is Literal:  # optional: one of these words
        annotation = choices[0]
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{to_toml(choice)}`" for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list of texts" if field.examples else "list of whole numbers"
    if choices and get_origin(choices[0]) is Literal:  # a word or a list of numbers
        return ", ".join(f"`{to_toml(word)}`" for word in get_args(choices[0])) + " or list of whole numbers"
    if choices:  # optional: the limits stand with the inner type
        inner = choices[0]
        annotation = getattr(inner, "__origin__", inner)
        for extra in getattr(inner, "__metadata__", ()):
            limits += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", date: "date"}[annotation]
    return " ".join([words, *_bounds(limits)])


def _bounds(limits: list[Any]) -> list[str]:
    found = {}
    for limit in limits:
        for attribute, sign in (("gt", "&gt; "), ("ge", "&ge; "), ("lt", "&lt; "), ("le", "&le; ")):
            if getattr(limit, attribute, None) is not None:
                found[sign] = f"{sign}{getattr(limit, attribute):g}"
    return [", ".join(found.values())] if found else []


if __name__ == "__main__":
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())
