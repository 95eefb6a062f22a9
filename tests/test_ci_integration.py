"""The CI files as their runners execute them: the steps of the action, the GitLab job and the pre-commit hook."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ci_runner
import pytest
import yaml
from ci_runner import ACTION, PATH, ROOT, github, run_shell
from gate_world import POLICY, lay_out, signed_fix

GITLAB: dict[str, Any] = yaml.safe_load((ROOT / "ci/gitlab/memscrub.gitlab-ci.yml").read_text(encoding="utf-8"))
HOOKS: list[dict[str, Any]] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a small checkpoint that gives its three texts away (`base`) and the signed fix of it."""
    folder = lay_out(tmp_path_factory.mktemp("workspace"))
    signed_fix(folder)
    return folder


RELEASE = {"policy": "policy.toml", "key": "key.pub"}


def test_the_action_fails_on_the_original_and_passes_on_the_signed_fix(workspace: Path, tmp_path: Path) -> None:
    steps = ("Gate", "Reports for people and tools", "Verdict")
    before = github(workspace, tmp_path / "before", {"checkpoint": "base", "policy": "policy.toml"}, steps)
    after = github(workspace, tmp_path / "after", {"checkpoint": "fixed", "args": "--trust", **RELEASE}, steps)
    assert not before.green and before.outputs["exit-code"] == "1", before.printed
    assert after.green and after.outputs["exit-code"] == "0", after.printed
    for ran, failures in ((before, 3), (after, 0)):
        reports = Path(ran.outputs["reports"])
        suite = ElementTree.parse(reports / "junit.xml").getroot()
        assert len(suite.findall(".//testcase")) >= 2 and len(suite.findall(".//failure")) == failures
        assert json.loads((reports / "memscrub.sarif").read_text())["version"] == "2.1.0"
        assert "<html" in (reports / "memscrub-report.html").read_text(encoding="utf-8")
        assert ran.summary
    assert json.loads((Path(after.outputs["reports"]) / "memscrub-report.json").read_text())["trusted"] is not None


@pytest.mark.parametrize("name", ["checkpoint", "policy", "key", "baseline", "args", "version", "torch-index"])
def test_no_input_is_ever_a_command(workspace: Path, tmp_path: Path, name: str) -> None:
    hostile = "; touch PWNED; $(touch PWNED) `touch PWNED` \" && touch PWNED && \" ' ; touch PWNED ; '\ntouch PWNED\n"
    given = {"checkpoint": "nowhere", "policy": "policy.toml", "version": "no version", name: hostile}
    steps = ("Install memscrub",) if name in ("version", "torch-index") else ("Gate", "Verdict")
    assert not github(workspace, tmp_path / "temp", given, steps).green
    assert not list(workspace.rglob("*PWNED*")) and not list(tmp_path.rglob("*PWNED*"))


def test_no_script_of_the_action_holds_an_expression_and_what_it_uses_is_pinned() -> None:
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", "")
        assert "run" in step or re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])
        assert "continue-on-error" not in step


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        ({"checkpoint": "base", "policy": "nowhere.toml"}, "2"),
        ({"checkpoint": "--help", "policy": "policy.toml"}, "2"),
        ({"checkpoint": "nowhere", "policy": "--help"}, "2"),
        ({"checkpoint": "nowhere", "policy": "policy.toml", "args": "--help"}, "3"),
        ({"checkpoint": "fixed", **RELEASE, "args": "--report=elsewhere.json"}, "3"),
        ({"checkpoint": "base", **RELEASE}, "5"),
        ({"checkpoint": "fixed", "policy": ""}, None),
    ],
)
def test_a_tool_that_could_not_judge_is_never_green(
    workspace: Path, tmp_path: Path, inputs: dict[str, str], code: str | None
) -> None:
    ran = github(workspace, tmp_path / "temp", inputs, ("Gate", "Reports for people and tools", "Verdict"))
    assert not ran.green and ran.outputs.get("exit-code") == code, ran.printed
    (workspace / "elsewhere.json").unlink(missing_ok=True)


def test_a_job_whose_gate_left_no_code_is_red(workspace: Path, tmp_path: Path) -> None:
    assert not github(workspace, tmp_path / "temp", {}, ("Verdict",)).green


def test_the_action_installs_its_own_revision(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    # Dependencies are there already; pip's own variables keep it from the network.
    offline = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_TARGET": str(target)}
    for name, value in offline.items():
        monkeypatch.setitem(ci_runner.EXTRA, name, value)
    ran = github(workspace, tmp_path / "temp", {}, ("Install memscrub",))
    assert ran.green, ran.printed
    installed = run_shell([str(target / "bin" / "memscrub"), "--version"], tmp_path, {"PYTHONPATH": str(target)})
    assert installed.stdout.startswith("memscrub ") and (target / "memscrub" / "jobs" / "gating.py").is_file()


def gitlab(workspace: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script of the GitLab job in one shell, as its runner executes it."""
    job = GITLAB[".memscrub-gate"]
    assert "$[[" not in json.dumps(job)
    environment = {**os.environ, **job["variables"], "PATH": PATH, "HF_HUB_OFFLINE": "1", **variables}
    return run_shell(["bash", "-eo", "pipefail", "-c", "\n".join(job["script"])], workspace, environment)


def test_the_gitlab_job_ends_with_the_code_of_the_gate_and_leaves_its_reports(workspace: Path, tmp_path: Path) -> None:
    release = {"MEMSCRUB_POLICY": "policy.toml", "MEMSCRUB_KEY": "key.pub", "TMPDIR": str(tmp_path)}
    reports = workspace / "memscrub-reports"
    good = gitlab(workspace, MEMSCRUB_CHECKPOINT="fixed", **release)
    assert good.returncode == 0, good.stdout
    assert not ElementTree.parse(reports / "junit.xml").getroot().findall(".//failure")
    (workspace / "strict.toml").write_text(POLICY.replace("max_near_verbatim = 0.7", "max_near_verbatim = 0.01"))
    strict = {**release, "MEMSCRUB_POLICY": "strict.toml"}
    assert gitlab(workspace, MEMSCRUB_CHECKPOINT="fixed", **strict).returncode == 1
    assert len(ElementTree.parse(reports / "junit.xml").getroot().findall(".//failure")) == 3
    assert gitlab(workspace, MEMSCRUB_CHECKPOINT="base", **release).returncode == 5
    assert ElementTree.parse(reports / "junit.xml").getroot().findall(".//error")
    assert gitlab(workspace, MEMSCRUB_CHECKPOINT="fixed", MEMSCRUB_ARGS="--help", **release).returncode == 3
    assert gitlab(workspace, MEMSCRUB_CHECKPOINT="$(touch PWNED)", **release).returncode == 2
    assert gitlab(workspace, MEMSCRUB_CHECKPOINT="", **release).returncode == 2
    assert not list(workspace.rglob("*PWNED*"))


def test_the_hooks_take_policies_and_fail_on_a_bad_one(workspace: Path, tmp_path: Path) -> None:
    for hook in HOOKS:
        names = ("policies/a.toml", "x/policy.toml", "my-policy.toml", "pyproject.toml", "policy.md")
        matches = [name for name in names if re.search(hook["files"], name)]
        assert matches == ["policies/a.toml", "x/policy.toml", "my-policy.toml"]
        environment = {**os.environ, "PATH": PATH}
        assert run_shell([*shlex.split(hook["entry"]), "policy.toml"], workspace, environment).returncode == 0
        (tmp_path / "policy.toml").write_text(POLICY.replace("max_verbatim", "max_verbatin"))
        done = run_shell(
            [*shlex.split(hook["entry"]), str(workspace / "policy.toml"), "policy.toml"], tmp_path, environment
        )
        assert done.returncode == 2 and "did you mean 'max_verbatim_tokens'" in done.stdout
