"""The steps of action.yml, executed as GitHub's runner does: inputs arrive in the environment, scripts run in bash."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
# Where the console script of this environment is, before whatever else is called memscrub.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
EXTRA: dict[str, str] = {}
"""Further variables of the environment, for a test to set."""


@dataclass(frozen=True)
class Ran:
    """A job that has run: was it green, its outputs, all it printed, and its step summary."""

    green: bool
    outputs: Mapping[str, str]
    printed: str
    summary: str


def github(workspace: Path, temp: Path, inputs: Mapping[str, str], steps: tuple[str, ...] = ()) -> Ran:
    """The run-steps of the action, in order, as the runner executes them (all of them, or those named)."""
    temp.mkdir(exist_ok=True)
    given = {name: str(each.get("default", "")) for name, each in ACTION["inputs"].items()} | dict(inputs)
    outputs: dict[str, dict[str, str]] = {}
    green, printed = True, ""
    for number, step in enumerate(ACTION["runs"]["steps"]):
        if "run" not in step or (steps and step["name"] not in steps):
            continue
        if not green and not str(step.get("if", "")).startswith("always()"):
            continue
        files = {name: temp / f"{name}-{number}" for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.touch()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PIP_")},
            **{name: _filled(str(value), given, outputs) for name, value in step.get("env", {}).items()},
            **{name: str(file) for name, file in files.items()},
            "RUNNER_TEMP": str(temp),
            "GITHUB_WORKSPACE": str(workspace),
            "PATH": PATH,
            "HF_HUB_OFFLINE": "1",
            **EXTRA,
        }
        script = temp / f"step-{number}.sh"
        script.write_text(step["run"], encoding="utf-8")
        done = run_shell(["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)], workspace, environment)
        printed += done.stdout
        green = green and done.returncode == 0
        lines = files["GITHUB_OUTPUT"].read_text().splitlines()
        outputs[step.get("id", str(number))] = dict(line.split("=", 1) for line in lines)
    summary = "".join(path.read_text() for path in sorted(temp.glob("GITHUB_STEP_SUMMARY-*")))
    return Ran(green, outputs.get("gate", {}), printed, summary)


def run_shell(command: list[str], folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )


def _filled(value: str, inputs: Mapping[str, str], outputs: Mapping[str, Mapping[str, str]]) -> str:
    """An expression as the runner fills it in."""

    def one(found: re.Match[str]) -> str:
        kind, _, rest = found[1].partition(".")
        if kind == "inputs":
            return inputs[rest]
        if kind == "steps":
            step, _, name = rest.partition(".outputs.")
            return outputs.get(step, {}).get(name, "")
        assert found[1] == "github.action_path"
        return str(ROOT)

    return re.sub(r"\$\{\{ *([\w.-]+) *\}\}", one, value)
