"""The bench: every method on one checkpoint under one policy, in one run, into one table; knows no method itself.

What is done so far is on disk after every row, so that an interrupt loses the row in the making and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from memscrub.bench import text_rows as one_text
from memscrub.bench.finetune import Recipe, grid
from memscrub.bench.plot import check_plot, draw
from memscrub.bench.rows import controls, described, methods, tuned
from memscrub.bench.ruler import Ruler, machine, ruler
from memscrub.bench.table import RULE, SCHEMA, Bench, Row, Setting, TextRow, best_of, families, markdown
from memscrub.errors import OutputError, UsageError
from memscrub.jobs.scanning import Inputs, open_inputs
from memscrub.measures.measure import Progress, silent
from memscrub.models.spreading import refuse_spread
from memscrub.policy.document import Policy
from memscrub.reports.standing import timestamp
from memscrub.storage.checkpoint import digest_files
from memscrub.storage.files import tree_digest
from memscrub.storage.output_file import write_output


@dataclass(frozen=True)
class Files:
    """Where results go; None: nowhere."""

    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None

    def check(self) -> None:
        """Raise UsageError now for what could not be written after hours of work."""
        for file in (self.json, self.markdown, self.plot):
            if file is not None and (file.is_dir() or not file.parent.is_dir()):
                raise OutputError(f"{file}: nothing can be written there; name a file in a folder that exists.")
        if self.plot is not None:
            check_plot(self.plot)


def bench(
    checkpoint: str | Path,
    policy: str | Path | Policy,
    *,
    recipes: Sequence[Recipe] | None = None,
    only: Sequence[str] = (),
    sample: int = 30,
    files: Files | None = None,
    command: str = "memscrub bench",
    device: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> Bench:
    """Run every method (or those whose name contains one of `only`) and measure them all alike.

    `recipes` are the fine-tuning runs, `finetune.grid()` by default, none for an empty list. `sample`: texts for
    the part that edits one text at a time. `command` is what the result says it was made with. The unedited model
    is always measured. Raises UsageError (and its kinds) for unusable input before anything is measured.
    """
    files = Files() if files is None else files
    files.check()
    if sample < 1:
        raise UsageError("the sample must have at least 1 text.")
    refuse_spread(device)
    inputs = open_inputs(checkpoint, policy, device=device, dtype="float32", seed=seed, lean=False)
    recipes = grid() if recipes is None else recipes
    wanted = _Wanted(tuple(only))
    wanted.check(_names(inputs, recipes))
    rule = ruler(inputs)
    chosen = [recipe for recipe in recipes if wanted(recipe.name)]
    run = _Run(_empty(rule, chosen, command, sample), files, progress)
    jobs = _jobs(run, rule, chosen, wanted, sample)
    run.bench = replace(run.bench, rows=run.table())
    for number, (name, job) in enumerate(jobs):
        progress(f"bench ({name})", number, len(jobs))
        job()
    progress("bench (done)", len(jobs), len(jobs))
    run.save(complete=True)
    return run.bench


@dataclass(frozen=True)
class _Wanted:
    """Which names were asked for: all, or those that contain one of these words."""

    words: tuple[str, ...]

    def __call__(self, name: str) -> bool:
        return not self.words or any(word.lower() in name.lower() for word in self.words)

    def check(self, names: Sequence[str]) -> None:
        for word in self.words:
            if not any(word.lower() in name.lower() for name in names):
                raise UsageError(f"--only {word}: no row has that in its name; there are {'; '.join(names)}.")


@dataclass
class _Run:
    """A bench in the making; saved after every change."""

    bench: Bench
    files: Files
    progress: Progress
    done: list[Row] = field(default_factory=list)
    control: Row | None = None

    def table(self) -> tuple[Row, ...]:
        """The main table: methods, the best of each fine-tuning method, the controls."""
        best = [best_of(rows) for rows in families(self.bench.runs).values()]
        return (*self.done, *best, *(() if self.control is None else (self.control,)))

    def row(self, row: Row) -> None:
        """A method is done."""
        self.done.append(row)
        self.save()

    def checkpoint(self, row: Row) -> None:
        """A checkpoint of a fine-tuning run is measured."""
        self.bench = replace(self.bench, runs=(*self.bench.runs, row))
        self.save()

    def text_row(self, *rows: TextRow) -> None:
        """Methods of the per-text part are done."""
        self.bench = replace(self.bench, text_rows=(*self.bench.text_rows, *rows))
        self.save()

    def save(self, complete: bool = False) -> None:
        """Write what there is; a reader sees the state before or after, never half a file."""
        self.bench = replace(self.bench, rows=self.table(), complete=complete)
        if self.files.json is not None:
            write_output(self.files.json, self.bench.to_json().encode("utf-8"))
        if self.files.markdown is not None:
            write_output(self.files.markdown, markdown(self.bench).encode("utf-8"))
        if self.files.plot is not None and complete:
            draw(self.bench, self.files.plot)


Jobs = list[tuple[str, Callable[[], None]]]


def _jobs(run: _Run, rule: Ruler, recipes: Sequence[Recipe], wanted: _Wanted, sample: int) -> Jobs:
    """What is to be done, in order, each with its name."""

    def method(make: Callable[[Ruler, Progress], Row]) -> None:
        run.row(make(rule, run.progress))

    def control() -> None:
        run.control = controls(rule)
        run.save()

    found = [(each.name, partial(method, each.make)) for each in methods(rule.inputs) if _runs(each.name, wanted)]
    jobs: Jobs = [*found[:1], ("controls", control), *found[1:]]
    jobs += [(recipe.name, partial(tuned, rule, recipe, run.checkpoint, run.progress)) for recipe in recipes]
    names = [name for name in one_text.names() if wanted(f"per-text {name}")]
    if names:
        jobs.append(("one text at a time", partial(_text_part, run, rule, names, sample)))
    return jobs


def _runs(name: str, wanted: _Wanted) -> bool:
    return name == "unedited" or wanted(name)


def _text_part(run: _Run, rule: Ruler, names: Sequence[str], sample: int) -> None:
    """The methods that edit one text at a time; attention needs to know what the ensemble missed."""
    here = one_text.bed(rule, sample)
    if here is None:
        run.text_row(*(TextRow(name, 0, failed="no text comes out verbatim") for name in names))
        return
    run.bench = replace(run.bench, setting=replace(run.bench.setting, sample=len(here.texts)))
    fallback = one_text.ABLATION in names or one_text.CLOSED_FORM in names
    for name in one_text.names():
        if name == one_text.ENSEMBLE and (name in names or fallback):
            row, broken = one_text.ensemble(here, run.progress)
            run.text_row(row)
        elif name in names and name not in (one_text.ABLATION, one_text.CLOSED_FORM):
            run.text_row(one_text.simple(here, name, run.progress)[0])
    if fallback:
        rows, copying = one_text.attention(here, broken, run.progress)
        run.bench = replace(run.bench, copying=copying)
        run.text_row(*rows)


def _names(inputs: Inputs, recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """Every name that `only` can choose from."""
    texts = [f"per-text {name}" for name in one_text.names()]
    return (*(each.name for each in methods(inputs)), *(recipe.name for recipe in recipes), *texts)


def _empty(rule: Ruler, recipes: Sequence[Recipe], command: str, sample: int) -> Bench:
    inputs, policy = rule.inputs, rule.policy
    setting = Setting(
        command=command,
        machine=machine(inputs.loaded.device),
        torch=version("torch"),
        transformers=version("transformers"),
        memscrub=version("memscrub"),
        threads=torch.get_num_threads(),
        device=str(inputs.loaded.device),
        seed=inputs.seed,
        checkpoint=inputs.source,
        checkpoint_sha256=tree_digest(digest_files(inputs.ckpt)),
        policy=policy.name,
        policy_sha256=policy.digest,
        texts=len(inputs.texts),
        controls=len(inputs.controls),
        judge_tokens=rule.halves.judge.numel(),
        sites=policy.fix.sites,
        limits={name: each.max_verbatim_tokens or 0 for name, each in policy.classes.items()},
        sample=sample,
    )
    return Bench(SCHEMA, "bench", timestamp(), False, setting, RULE, described(recipes), ())
