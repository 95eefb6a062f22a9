"""Utility tasks: asked for without lm-eval they are refused at once; its results become plain figures."""

from __future__ import annotations

import importlib
import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memscrub.errors import IncompleteError, UsageError
from memscrub.jobs.records import utility_record
from memscrub.locality.utility import Score, check_tasks, run_tasks, scores_in, tasks_of
from memscrub.reports.report import ScoreRecord

# What lm-eval 0.4.13 returned for a task of four questions on the embedded checkpoint, less what is not looked at.
RESULTS: dict[str, Any] = {
    "results": {
        "tiny_words": {
            "name": "tiny_words",
            "alias": "tiny_words",
            "sample_len": 4,
            "acc,none": 1.0,
            "acc_stderr,none": "N/A",
            "acc_norm,none": 0.75,
            "acc_norm_stderr,none": 0.25,
        }
    },
    "group_subtasks": {},
    "versions": {"tiny_words": 1.0},
    "n-samples": {"tiny_words": {"original": 4, "effective": 4}},
    "higher_is_better": {"tiny_words": {"acc": True, "acc_norm": True}},
}


@pytest.fixture
def no_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for lm-eval that keeps what it was called with."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        calls.append(given)
        sys.stdout.write("a line that must not reach standard output")
        return RESULTS

    harness = SimpleNamespace(
        simple_evaluate=simple_evaluate,
        TaskManager=lambda: SimpleNamespace(all_tasks=["piqa"]),
        calls=calls,
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(importlib, "import_module", lambda name: harness)
    return harness


def test_tasks_are_read_from_the_option() -> None:
    assert tasks_of("lm-eval:piqa") == ("piqa",)
    assert tasks_of("lm-eval:piqa, my/task.yaml,") == ("piqa", "my/task.yaml")


@pytest.mark.parametrize("option", ["", "piqa", "lm-eval", "lm-eval:", "lm-eval: ,", "helm:piqa"])
def test_any_other_option_is_a_usage_error(option: str) -> None:
    with pytest.raises(UsageError, match="lm-eval:hellaswag"):
        tasks_of(option)


@pytest.mark.usefixtures("no_lm_eval")
def test_without_lm_eval_the_extra_is_named() -> None:
    with pytest.raises(UsageError, match=r"pip install 'memscrub\[lm-eval\]'"):
        check_tasks(["piqa"])


@pytest.mark.usefixtures("no_lm_eval")
def test_a_fix_refuses_tasks_before_it_opens_anything(tmp_path: Path) -> None:
    from memscrub.jobs.scrub import fix
    from memscrub.policy.document import parse_policy

    text = 'schema = 1\nname = "p"\n[protected]\nfiles = ["x"]\n[class.c]\nmax_verbatim_tokens = 4\n'
    for tasks, asked in (("", ["piqa"]), ('[locality]\nutility = ["piqa"]\n', None)):
        with pytest.raises(UsageError, match="lm-eval"):
            fix(tmp_path / "none", parse_policy((text + tasks).encode()), tmp_path / "out", utility=asked)
    assert list(tmp_path.iterdir()) == []


def test_unknown_tasks_and_missing_files_are_refused(fake: SimpleNamespace, tmp_path: Path) -> None:
    check_tasks(["piqa"])
    with pytest.raises(UsageError, match="no task 'pica'"):
        check_tasks(["piqa", "pica"])
    with pytest.raises(UsageError, match="no such task file"):
        check_tasks([str(tmp_path / "missing.yaml")])
    assert fake.calls == []


def test_figures_are_kept_and_everything_else_is_not() -> None:
    assert scores_in(RESULTS) == (Score("tiny_words", "acc,none", 1.0), Score("tiny_words", "acc_norm,none", 0.75))
    odd = {"results": {"t": {"acc,none": math.nan, "ok,none": 2, "alias": "t", "flag,none": True}}}
    assert scores_in(odd) == (Score("t", "ok,none", 2.0),)
    with pytest.raises(IncompleteError, match="no figure"):
        scores_in({"results": {"t": {"alias": "t"}}})


def test_a_run_trusts_no_remote_code_and_keeps_standard_output_clean(
    fake: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tasks(tmp_path, ["piqa", "my.yaml"], device="cpu", seed=3) == scores_in(RESULTS)
    (call,) = fake.calls
    assert call["model_args"] == {"pretrained": str(tmp_path), "trust_remote_code": False, "dtype": "float32"}
    assert call["tasks"] == ["piqa", str(Path("my.yaml").absolute())]
    assert call["device"] == "cpu" and call["random_seed"] == call["fewshot_random_seed"] == 3
    assert capsys.readouterr().out == ""


def test_what_goes_wrong_inside_is_one_sentence(fake: SimpleNamespace, tmp_path: Path) -> None:
    def fails(**_: Any) -> None:
        raise RuntimeError("no data\nand a long trace")

    fake.simple_evaluate = fails
    with pytest.raises(IncompleteError, match=r"\(no data\)\.$"):
        run_tasks(tmp_path, ["piqa"])


def test_before_and_after_are_paired_by_task_and_metric() -> None:
    record = utility_record("lm-eval 0", [Score("b", "acc", 0.5), Score("a", "acc", 0.1)], [Score("b", "acc", 0.4)])
    assert record.scores == (ScoreRecord("a", "acc", 0.1, None), ScoreRecord("b", "acc", 0.5, 0.4))


def test_memscrub_does_not_import_lm_eval_by_itself() -> None:
    code = "import sys, memscrub.jobs.scrub; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
