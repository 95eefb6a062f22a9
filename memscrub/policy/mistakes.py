"""Sentences about what is wrong with a policy file; knows pydantic's errors, not what any setting means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from memscrub.errors import PolicyError
from memscrub.policy.toml_lines import line_of

Keys = tuple[str | int, ...]

# Far above any real policy: naming a checkpoint by mistake must not read gigabytes.
MAX_BYTES = 1 << 16
# Problems whose line is looked for: each costs a few parses of the file.
MAX_PLACED = 20

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text in quotes",
    "tuple_type": "a list",
    "model_type": "a section",
    "dict_type": "a section",
    "mapping_type": "a section",
    "date_type": "a date (no time, no quotes)",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def at_line(path: Path, line: int, message: str) -> str:
    """A message with the place it is about, in the form that editors and CI make clickable."""
    return f"{path}:{line}: {message}"


def did_you_mean(word: str, choices: Iterable[str], otherwise: str) -> str:
    """The end of a sentence about a misspelt word: the nearest choice, or `otherwise` where none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else otherwise


def read_source(path: Path) -> bytes:
    """The bytes of a policy file, or a PolicyError that says why there are none."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise PolicyError(f"{path}: there is no such policy file; `memscrub init` writes one to start from.") from None
    except IsADirectoryError:
        raise PolicyError(
            f"{path}: this is a directory; name the policy file in it, for example policy.toml."
        ) from None
    except PermissionError:
        raise PolicyError(f"{path}: the policy cannot be read; check its permissions.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a usable file name"
        raise PolicyError(f"{path}: the policy cannot be read ({reason}); check the path.") from None
    if len(data) > MAX_BYTES:
        raise PolicyError(f"{path}: larger than 64 KiB, so not a policy; name the TOML file with --policy.")
    return data


def decode(data: bytes, path: Path) -> str:
    """UTF-8 with or without a byte order mark, or a PolicyError with the line of the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PolicyError(at_line(path, line, "not valid UTF-8; save the policy as UTF-8 text.")) from None


def syntax_problem(error: Exception, text: str, path: Path) -> str:
    """What the TOML parser objects to; it tells the line within its message."""
    found = re.search(r"^(.*?) \(at line (\d+), column (\d+)\)$", str(error), re.DOTALL)
    if found:
        what, line, column = found.group(1)[:100], int(found.group(2)), int(found.group(3))
        hint = "check quotes, brackets and = signs (a text needs quotes)."
        if what.startswith("Cannot "):  # overwrite, redefine, declare twice
            hint = "it is in the file already; keep one of the two."
        return at_line(path, line, f"not valid TOML at column {column} ({what}); {hint}")
    if "end of document" in str(error):
        return at_line(path, text.count("\n") + 1, "the file ends within a value; close its quote or bracket.")
    return at_line(path, 1, "not valid TOML (a number is too long or lists are too deep); simplify it.")


def first_problem(problems: Sequence[Mapping[str, Any]], model: type[BaseModel], text: str, path: Path) -> str:
    """One sentence about the problem that comes first in the file, and how many more there are."""
    unknown = [tuple(p["loc"]) for p in problems if p["type"] == "extra_forbidden"]
    # A misspelt required key is one mistake, not an unknown key and a missing one.
    kept = [p for p in problems if p["type"] != "missing" or not _misspelt(tuple(p["loc"]), unknown)]
    placed = sorted(((line_of(text, p["loc"]), n) for n, p in enumerate(kept[:MAX_PLACED])), key=lambda item: item[0])
    line, index = placed[0]
    more = len(kept) - 1
    count = f" ({more} more problem{'s' if more > 1 else ''} in this file.)" if more else ""
    return at_line(path, line, _sentence(kept[index], model)) + count


def _misspelt(missing: Keys, unknown: Sequence[Keys]) -> bool:
    here = [str(loc[-1]) for loc in unknown if loc[:-1] == missing[:-1]]
    return bool(difflib.get_close_matches(str(missing[-1]), here, n=1))


def _sentence(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    loc: Keys = tuple(problem["loc"])
    kind, context = problem["type"], problem.get("ctx", {})
    names = tuple(key for key in loc if isinstance(key, str) and key != "[key]")
    field = _field_at(model, names)
    if kind == "extra_forbidden":
        return _unknown(model, names)
    if names == ("class",) and kind in ("missing", "too_short"):
        return "there is no [class.NAME] section; add one, for example [class.pii] with secret = true."
    if kind == "missing":
        return f"{_title(names)} is missing; add {_example(names, field)}."
    where = _title(names)
    if loc[-1] == "[key]":
        hint = "use letters, digits, '.', '_' and '-', for example [class.pii]."
        return f"{where} is not a usable class name; {hint}"
    if kind == "value_error":
        return f"{where} {context['error']}."
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        wrong = f"{where} must be {words} {context[bound]:g}, not {problem['input']}"
        return f"{wrong}; write {_example(names, field)}."
    if kind == "literal_error":
        expected = str(context["expected"]).replace("'", '"')
        given = problem["input"] if isinstance(problem["input"], str) else ""
        hint = did_you_mean(given, re.findall(r'"(.*?)"', expected), f"write {_example(names, field)}.")
        return f"{where} must be {expected}; {hint}"
    if len(loc) == 2 and kind == "model_type" and loc[0] == "class":
        return f"'{loc[1]}' stands in [class] itself; put it below a class, for example [class.pii]."
    if kind in _EXPECTED:
        item = " of " + {"int_type": "whole numbers", "string_type": "texts"}.get(kind, "values")
        expected = "a list" + item if isinstance(loc[-1], int) else _EXPECTED[kind]
        return f"{where} must be {expected}, not {_kind(problem['input'])}; write {_example(names, field)}."
    return f"{where} is empty or has an unusable value; write {_example(names, field)}."


def _unknown(model: type[BaseModel], names: tuple[str, ...]) -> str:
    key, parent = names[-1], names[:-1]
    here = [_alias(name, field) for name, field in _model_at(model, parent).model_fields.items()]
    shown = key if re.fullmatch(r"[\w.-]{1,40}", key) else "..."
    where = f"unknown key '{shown}' in {_section(parent)}"
    start = where if parent else f"unknown key or section '{shown}'"
    near = did_you_mean(key, here, "")
    if near:
        return f"{start}; {near}"
    for home in _homes(model, key):
        return f"{start}; it belongs {home}."
    return f"{start}; known here: {', '.join(here)}."


def _homes(model: type[BaseModel], key: str) -> Iterable[str]:
    """Where a key that stands in the wrong section is known."""
    for name, field in model.model_fields.items():
        if _alias(name, field) == key:
            yield (
                "at the top of the file, before the first [section]"
                if not section_model(field)
                else "in a section of its own"
            )
        inner = section_model(field)
        if inner is not None and key in inner.model_fields:
            home = _alias(name, field)
            yield "in a [class.NAME] section" if home == "class" else f"in {_section((home,))}"


def _alias(name: str, field: FieldInfo) -> str:
    return field.alias or name


def section_model(field: FieldInfo) -> type[BaseModel] | None:
    """The model behind a section, also where the section is a table of models."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _field_at(model: type[BaseModel], names: tuple[str, ...]) -> FieldInfo | None:
    if not names:
        return None
    fields = _model_at(model, names[:-1]).model_fields
    return next((field for name, field in fields.items() if _alias(name, field) == names[-1]), None)


def _model_at(model: type[BaseModel], names: tuple[str, ...]) -> type[BaseModel]:
    for key in names:
        field = next((f for name, f in model.model_fields.items() if _alias(name, f) == key), None)
        inner = section_model(field) if field is not None else None
        model = inner or model  # the name of a class is no field: stay at the model of its section
    return model


def _title(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return f"'{names[0]}'" if names[0] in ("schema", "name") else _section(names)
    if names[0] == "class" and len(names) == 2:
        return _section(names)
    return f"{names[-1]} in {_section(names[:-1])}"


def _section(names: tuple[str, ...]) -> str:
    """A section as TOML writes its header."""
    return "[[waiver]]" if names == ("waiver",) else f"[{'.'.join(names)}]"


def _example(names: tuple[str, ...], field: FieldInfo | None) -> str:
    if field is None or section_model(field) is not None:
        return f"a section {_section(names)}"
    value = field.examples[0] if field.examples else field.get_default()
    return f"{names[-1]} = {to_toml(1 if names[-1] == 'schema' else value)}"


def to_toml(value: Any) -> str:
    """A value as a policy file writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kind(value: Any) -> str:
    """The kind of a TOML value; texts are not repeated, as a user may have pasted one in the wrong place."""
    if isinstance(value, bool | int | float):
        return to_toml(value)
    kinds: dict[type, str] = {str: "a text", list: "a list", dict: "a section"}
    return kinds.get(type(value), "a date or time")
