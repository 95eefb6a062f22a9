"""`memscrub doctor`: is this machine able to do the work? Looks, and changes nothing."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NEEDED = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "rapidfuzz",
    "pydantic",
    "typer",
    "rich",
    "securesystemslib",
    "in-toto-attestation",
    "cryptography",
)
OPTIONAL = {
    "pyarrow": "protected texts in .parquet files",
    "model-signing": "checking memscrub's signatures with the OpenSSF tool",
    "sigstore": "signing with an identity instead of a key",
}


@dataclass(frozen=True)
class Check:
    """One thing looked at: whether it is as needed, and what to do where it is not."""

    name: str
    good: bool
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """Everything a run depends on."""
    checks = [_python(), *map(_package, NEEDED), *(_optional(name, use) for name, use in OPTIONAL.items())]
    checks += [_torch(), _embedded(), _disk()]
    return checks


def _python() -> Check:
    good = sys.version_info[:2] >= (3, 10)
    return Check("python", good, platform.python_version(), "install Python 3.10 or newer")


def _package(name: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        return Check(name, False, "missing", f"pip install {name}")


def _optional(name: str, use: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        return Check(name, True, f"not installed (only needed for {use})")


def _torch() -> Check:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return Check("torch works", False, type(error).__name__, "reinstall torch for this machine")
    device = "cuda: " + torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    total = float((torch.ones(8, 8) @ torch.ones(8, 8)).sum())
    return Check("torch works", total == 512.0, f"{device}, {torch.get_num_threads()} threads", "reinstall torch")


def _embedded() -> Check:
    folder = Path(__file__).resolve().parent.parent / "embedded"
    good = (folder / "checkpoint" / "model.safetensors").is_file() and (folder / "protected.jsonl").is_file()
    return Check("embedded checkpoint", good, "present" if good else "missing", "reinstall memscrub")


def _disk() -> Check:
    free = shutil.disk_usage(os.getcwd()).free
    return Check("free disk here", free > 2**30, f"{free / 2**30:.1f} GiB", "an output needs as much as its input")
