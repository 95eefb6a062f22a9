"""The report's JSON Schema, generated from its dataclasses and their docstrings; knows no report.

`python -m memscrub.reports.schema` prints it, and with a file's name renews that file (docs/report.schema.json).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from memscrub.reports.report import SCHEMA, Report
from memscrub.reports.verdict import EXIT_CODES

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SIMPLE = {str: "string", int: "integer", bool: "boolean"}
# What the annotations do not say.
_NARROWER: dict[tuple[str, str], dict[str, Any]] = {
    ("Report", "schema"): {"const": SCHEMA},
    ("Report", "kind"): {"enum": ["scan", "fix", "gate"]},
    ("Verdict", "exit_code"): {"enum": sorted(int(code) for code in EXIT_CODES.values())},
}


def schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of what `Report.to_json` writes; unknown fields are not valid."""
    definitions: dict[str, Any] = {}
    root = _record(Report, definitions)
    return {
        "$schema": DIALECT,
        "$id": f"urn:memscrub:report:{SCHEMA}",
        "title": f"memscrub report, schema {SCHEMA}",
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def as_json() -> str:
    """The schema as indented JSON with a final newline."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _record(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """A dataclass as an object; fields with a default may be absent, as in reports from before they were added."""
    hints = typing.get_type_hints(kind)
    properties, required = {}, []
    described = _described(kind)
    for field in dataclasses.fields(kind):
        shape = _shape(hints[field.name], definitions)
        shape |= _NARROWER.get((kind.__name__, field.name), {})
        if field.name in described:
            shape = {"description": described[field.name], **shape}
        properties[field.name] = shape
        if field.default is dataclasses.MISSING:
            required.append(field.name)
    return {
        "description": _said(inspect.getdoc(kind) or kind.__name__),
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _described(kind: type) -> dict[str, str]:
    """What the docstring says of single fields: "`name`: words" up to the next field or the end of the paragraph."""
    names = "|".join(field.name for field in dataclasses.fields(kind))
    found: dict[str, str] = {}
    for paragraph in (inspect.getdoc(kind) or "").split("\n\n"):
        text = " ".join(paragraph.split())
        for match in re.finditer(rf"(?:`({names})` and )?`({names})`: (.+?)(?=[;.] `(?:{names})`|$)", text):
            found |= dict.fromkeys(filter(None, match.group(1, 2)), _said(match[3].rstrip(".")))
    return found


def _said(text: str) -> str:
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


def _shape(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """One annotation as a schema. Raises TypeError for a kind of value that reports do not have."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [each for each in arguments if each is not type(None)]
        return _or_null(_shape(inner, definitions))
    if origin is tuple:
        return {"type": "array", "items": _shape(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _shape(arguments[1], definitions)}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # holds the place, should a record hold its own kind
            definitions[kind.__name__] = _record(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [each.value for each in kind]}
    if kind is float:
        return {"type": ["number", "null"]}  # null: infinite
    if kind in _SIMPLE:
        return {"type": _SIMPLE[kind]}
    raise TypeError(f"a report holds no {kind}; teach memscrub.reports.schema about it.")


def _or_null(shape: dict[str, Any]) -> dict[str, Any]:
    if "type" not in shape or isinstance(shape["type"], list):
        return shape if "type" in shape else {"anyOf": [shape, {"type": "null"}]}
    return {**shape, "type": [shape["type"], "null"]}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(as_json(), encoding="utf-8")
    else:
        sys.stdout.write(as_json())
