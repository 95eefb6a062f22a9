"""Rules of the module map that neither ruff nor import-linter can state."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "memscrub"
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES_OF_A_MODULE = 350
MOST_LINES_OF_A_FUNCTION = 60
UNSAFE = {"pickle", "dill", "joblib", "shelve", "marshal"}


def tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_opens_with_a_sentence_about_itself(module: Path) -> None:
    docstring = ast.get_docstring(tree(module))
    assert docstring, f"{module.name} has no docstring"
    opening = docstring.split("\n\n")[0].rstrip()
    assert opening.endswith("."), f"the docstring of {module.name} does not open with a whole sentence"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_and_functions_stay_short(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_A_MODULE
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, f"{module.name}: {node.name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_pickle_is_loaded_and_no_remote_code_is_trusted(module: Path) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            assert not UNSAFE & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNSAFE
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), f"{module.name}:{node.lineno}"
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, module.name


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_is_done_at_import_but_definitions(module: Path) -> None:
    """No I/O, no settings of torch, no registration by a bare call at the top of a module."""
    for statement in tree(module).body:
        if isinstance(statement, ast.Expr):
            assert isinstance(statement.value, ast.Constant), f"{module.name}:{statement.lineno}"
        assert not isinstance(statement, ast.For | ast.While | ast.With), f"{module.name}:{statement.lineno}"
