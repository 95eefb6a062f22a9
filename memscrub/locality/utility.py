"""Utility by tasks of lm-eval, before and after: runs EleutherAI's lm-evaluation-harness on two directories and keeps
the figures; knows no policy and no texts.

lm-eval is an extra (`memscrub[lm-eval]`) and is imported only when tasks are asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memscrub.errors import IncompleteError, UsageError

TOOL = "lm-eval"
# lm-eval's own engine for transformers needs it and only lm-eval's extra `hf` brings it.
_NEEDED = ("lm_eval", "accelerate")
_SKIPPED = ("name", "alias", "sample_len", "sample_count")


@dataclass(frozen=True)
class Score:
    """One figure of one task; `metric` as lm-eval names it, with its filter: "acc,none"."""

    task: str
    metric: str
    value: float


def tasks_of(option: str) -> tuple[str, ...]:
    """The tasks in a `--utility` option, `lm-eval:TASK[,TASK]`. Raises UsageError for anything else."""
    tool, colon, rest = option.partition(":")
    tasks = tuple(task.strip() for task in rest.split(",") if task.strip())
    if tool != TOOL or not colon or not tasks:
        raise UsageError("--utility names no task of a tool that is known; write for example lm-eval:hellaswag,piqa.")
    return tasks


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse, before any work, tasks that cannot run here.

    Raises UsageError when lm-eval is not installed, when a task file is missing, or when lm-eval does not know a task.
    """
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        raise UsageError("utility tasks need lm-eval, which is not installed; run pip install 'memscrub[lm-eval]'.")
    for task in tasks:
        if _is_file(task) and not Path(task).is_file():
            raise UsageError(f"{task}: there is no such task file; name a YAML file that exists or a task of lm-eval.")
    named = [task for task in tasks if not _is_file(task)]
    if named:
        known = set(importlib.import_module("lm_eval.tasks").TaskManager().all_tasks)
        for task in named:
            if task not in known:
                raise UsageError(f"lm-eval knows no task '{task[:80]}'; `lm_eval ls tasks` lists those it knows.")


def tool_version() -> str:
    """The installed lm-eval, as reports name it."""
    return f"{TOOL} {version('lm_eval')}"


def run_tasks(directory: Path, tasks: Sequence[str], *, device: str = "cpu", seed: int = 0) -> tuple[Score, ...]:
    """The scores of a checkpoint directory on these tasks, in float32 and without remote code.

    What lm-eval prints goes to standard error. Raises IncompleteError when it cannot end.
    """
    lm_eval = importlib.import_module("lm_eval")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args=dict(pretrained=str(directory), trust_remote_code=False, dtype="float32"),
                tasks=[str(Path(task).absolute()) if _is_file(task) else task for task in tasks],
                device=device,
                batch_size=8,
                log_samples=False,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise IncompleteError(f"lm-eval could not run its tasks on {directory} ({reason}).") from error
    return scores_in(results)


def scores_in(results: Mapping[str, Any]) -> tuple[Score, ...]:
    """The figures in what `simple_evaluate` returns, in order of task and metric; standard errors are left out.

    Raises IncompleteError when there is none.
    """
    found = [
        Score(task, metric, float(value))
        for task, figures in sorted(results["results"].items())
        for metric, value in sorted(figures.items())
        if metric not in _SKIPPED
        and "_stderr" not in metric
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    ]
    if not found:
        raise IncompleteError("lm-eval gave no figure for these tasks; run lm_eval by itself to see why.")
    return tuple(found)


def _is_file(task: str) -> bool:
    return task.endswith(".yaml")
