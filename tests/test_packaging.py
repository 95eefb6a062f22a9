"""The wheel: it holds what it needs and nothing else, works outside the repository, and starts quickly."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
HELP_SECONDS = 1.0


def run(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and fail with what it printed."""
    done = subprocess.run(
        arguments, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(out), str(REPOSITORY)], cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed; its dependencies come from the environment that runs the tests."""
    target = tmp_path_factory.mktemp("installed")
    offline = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(wheel)], cwd=target)
    return target


def outside(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the installed wheel; PYTHONPATH comes before the path of an editable install."""
    return run([sys.executable, *arguments], cwd=installed, PYTHONPATH=str(installed))


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"memscrub-{version('memscrub')}.dist-info/"
    package = REPOSITORY / "memscrub"
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for pattern in ("**/*.py", "embedded/**/*", "faces/html_*", "py.typed")
        for path in package.glob(pattern)
        if path.is_file()
    } | {f"memscrub/policies/{path.name}" for path in (REPOSITORY / "policies").iterdir()}
    assert {name for name in names if not name.startswith(info)} == expected
    assert {"memscrub/embedded/checkpoint/model.safetensors", "memscrub/policies/release-gate.toml"} <= names
    assert {f"{info}licenses/LICENSE", f"{info}licenses/NOTICE", f"{info}entry_points.txt"} <= names


def test_the_embedded_checkpoint_stays_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = [entry.file_size for entry in archive.infolist() if "/embedded/checkpoint/" in entry.filename]
    assert 0 < sum(sizes) <= 8_000_000


def test_the_installed_wheel_is_what_runs_outside_the_repository(installed: Path) -> None:
    shown = outside(installed, "-c", "import memscrub; print(memscrub.__file__); print(memscrub.__version__)")
    assert shown.stdout.splitlines() == [str(installed / "memscrub" / "__init__.py"), version("memscrub")]
    assert version("memscrub") in outside(installed, "-m", "memscrub", "--version").stdout


def test_init_finds_the_shipped_policies_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    outside(installed, "-m", "memscrub", "init", str(tmp_path / "new"))
    assert (tmp_path / "new" / "release-gate.toml").read_bytes() == (
        REPOSITORY / "policies" / "release-gate.toml"
    ).read_bytes()


def test_every_module_of_the_wheel_imports_without_the_repository(installed: Path) -> None:
    code = (
        "import importlib, pkgutil, memscrub\n"
        "for module in pkgutil.iter_modules(memscrub.__path__):\n"
        "    importlib.import_module(f'memscrub.{module.name}')\n"
    )
    outside(installed, "-c", code)


def test_help_starts_quickly_and_loads_neither_torch_nor_transformers(installed: Path) -> None:
    code = (
        "import sys\n"
        "from memscrub.cli.app import main\n"
        "sys.argv = ['memscrub', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers', 'sigstore', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
    )
    assert outside(installed, "-c", code).stderr.strip() == "[]"
    # The best of three: other work on the machine slows a single start.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        shown = outside(installed, "-m", "memscrub", "--help")
        seconds.append(time.perf_counter() - start)
    assert "scan" in shown.stdout
    assert min(seconds) < HELP_SECONDS, seconds
