"""docs/security.md claims nothing without a test, and leaves out no file of attacks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from memscrub import errors
from memscrub.policy import mistakes as policy_errors
from memscrub.policy import toml_lines
from memscrub.reports import report
from memscrub.storage import files, safetensors_header
from memscrub.texts import corpora, text_files

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def functions_in(file: str) -> set[str]:
    """The names of the functions at the top of a file, without importing it."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_the_page_names_exists(file: str, name: str) -> None:
    assert name.startswith("test_")
    assert name in functions_in(file)


def test_every_row_of_a_table_of_claims_names_a_test() -> None:
    tables = re.findall(r"\| claim \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 30
    assert not [row for row in rows if not re.search(r"`tests/[\w/]+\.py::test_\w+` \|$", row)]
    assert len(rows) <= len(NAMED)


def test_every_file_of_attacks_is_on_the_page() -> None:
    files = {f"tests/attacks/{file.name}" for file in (ROOT / "tests" / "attacks").glob("test_*.py")}
    assert files - set(re.findall(r"tests/attacks/\w+\.py", PAGE)) == set()


def test_the_limits_on_the_page_are_those_of_the_code() -> None:
    stated = {
        "64 KiB": policy_errors.MAX_BYTES,
        "32 dotted": toml_lines.MAX_PARTS,
        "32 MiB": files.MAX_JSON,
        "16 MiB": safetensors_header.MAX_HEADER,
        "256 MiB": report.MAX_BYTES,
        "2000 characters": errors.LONGEST_MESSAGE,
        "line of JSON or CSV in a list | 16 MiB": text_files.LONGEST_LINE,
        "128 MiB": text_files.LONGEST_TEXT,
        "16 million": corpora.LONGEST_LINE,
    }
    scale = {"KiB": 1 << 10, "MiB": 1 << 20, "million": 1 << 20}
    for words, value in stated.items():
        assert words in PAGE
        number, unit = re.search(r"(\d+) (\w+)", words).groups()  # type: ignore[union-attr]
        assert value == int(number) * scale.get(unit, 1), words


def test_whoever_finds_a_weakness_is_told_where_to_report_it_privately() -> None:
    said = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "Report a vulnerability" in said
    assert not re.search(r"\S+@\S+\.\w+", said)  # an address that nobody reads is worse than none
    assert "SECURITY.md" in PAGE
