"""A bench's methods that treat all texts in one checkpoint: apply, measure, put back; knows no table and no file.

Every method gets the unedited model, bit for bit, and leaves it so, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from memscrub.bench.clock import now
from memscrub.bench.finetune import Recipe, restored, rounded, tune
from memscrub.bench.ruler import Ruler, disk_dtypes
from memscrub.bench.table import Row
from memscrub.edit.demands import demand_of
from memscrub.edit.editable import EditableModel
from memscrub.edit.modes import Mode
from memscrub.edit.per_text import PerTextSettings, edit_texts
from memscrub.errors import NumericalError, UsageError
from memscrub.jobs.editing import make_edit, stored_dtypes
from memscrub.jobs.joint_editing import usual_layers
from memscrub.jobs.scanning import Inputs
from memscrub.measures.measure import Progress, silent
from memscrub.models.site_finding import sites_of
from memscrub.policy.document import Policy

MODES = ("next-best", "eos", "redact", "suppress", "ensemble")
SITES = ("mlp", "mlp+attention", "mlp+attention+queries")
# The joint solver on the terms of the fine-tuning recipes: those that keep the starts of texts, those that give
# them up. A window of the run limit's length may be sampled so seldom; without starts that is cheaper.
SELDOM, SELDOM_CHANCE = "joint eos, seldom sampled", 1e-3
NO_STARTS, NO_STARTS_CHANCE = "joint eos, seldom sampled (no starts)", 1e-5
# The per-text solver goes over the texts that interfere with one another this often.
PASSES = 6


@dataclass(frozen=True)
class Method:
    """One row in the making: its name and what does it."""

    name: str
    make: Callable[[Ruler, Progress], Row]


def methods(inputs: Inputs) -> tuple[Method, ...]:
    """The unedited model, the joint solver's modes and sites, and the per-text solver on all texts at once."""
    own = inputs.policy.fix.sites
    found = [Method("unedited", unedited)]
    found += [_joint(f"joint {mode}", {"mode": mode, "solver": "joint"}) for mode in MODES]
    for sites in SITES:
        if sites != own:
            found.append(_joint(f"joint next-best, {sites}", {"mode": "next-best", "solver": "joint", "sites": sites}))
    if inputs.controls and {text.class_name for text in inputs.texts} <= {c.class_name for c in inputs.controls}:
        found.append(Method("joint like controls", like_controls))
    found += [Method(SELDOM, seldom), Method(NO_STARTS, without_starts)]
    return (*found, Method("per-text next-best, at once", at_once))


def unedited(rule: Ruler, progress: Progress = silent) -> Row:
    """The model as it is."""
    with restored(rule.inputs.loaded) as originals:
        return Row("unedited", "reference", rule.figures(originals), 0.0)


def controls(rule: Ruler) -> Row | None:
    """The control texts on the unedited model; None without any."""
    figures = rule.control_figures()
    return None if figures is None else Row("controls, unedited", "control", figures)


def edited(rule: Ruler, name: str, edit: Callable[[], str | None]) -> Row:
    """Edit the model, measure it, put it back; a method that cannot work here says why in its row.

    `edit` returns what is to be remarked on it, if anything.
    """
    loaded = rule.inputs.loaded
    with restored(loaded) as originals:
        begin = now(loaded.device)
        try:
            remark = edit()
            seconds = now(loaded.device) - begin
            return Row(name, "edit", rule.figures(originals), seconds, remark=remark)
        except NumericalError as error:
            return Row(name, "edit", None, now(loaded.device) - begin, f"diverged: {error}")
        except UsageError as error:
            return Row(name, "edit", None, None, f"not possible: {error}")


def at_once(rule: Ruler, progress: Progress = silent) -> Row:
    """The per-text solver on all texts in one model, one after the other, in as many passes as it takes."""
    inputs = rule.inputs
    fix = inputs.policy.fix

    def edit() -> str | None:
        sites = sites_of(inputs.loaded, kinds=("mlp",), layers=fix.named_layers)
        editable = EditableModel(inputs.loaded, sites, stored_dtypes(inputs, sites))
        demands = [
            demand_of(text, inputs.policy.classes[text.class_name], inputs.policy.probe) for text in inputs.texts
        ]
        settings = PerTextSettings(fix.neurons, fix.rank, passes=PASSES, marker=fix.marker)
        modes = [Mode.NEXT_BEST] * len(demands)
        done = edit_texts(editable, demands, modes, settings, lambda done, unmet: progress("passes", done, PASSES))
        return _remark(len(done.unmet))

    return edited(rule, "per-text next-best, at once", edit)


def tuned(rule: Ruler, recipe: Recipe, emit: Callable[[Row], None], progress: Progress = silent) -> None:
    """A fine-tuning run: emits a row at each of the recipe's steps; where it diverges, one that says so."""
    inputs, loaded = rule.inputs, rule.inputs.loaded
    stored = disk_dtypes(inputs)
    with restored(loaded) as originals:

        def at_step(step: int, seconds: float) -> None:
            with torch.no_grad(), rounded(loaded, stored):
                emit(_row(recipe, step, rule, originals, seconds))

        try:
            tune(
                loaded,
                inputs.texts,
                rule.ordinary if recipe.keep_starts else rule.ordinary[:1],
                recipe,
                seed=inputs.seed,
                at_step=at_step,
                min_prefix_tokens=inputs.policy.probe.min_prefix_tokens,
                progress=lambda done: progress(f"steps ({recipe.name})", done, recipe.steps[-1]),
            )
        except NumericalError as error:
            emit(_failed(recipe, f"diverged: {error}"))
        except UsageError as error:
            emit(_failed(recipe, f"not possible: {error}"))


def described(recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """The grid in words, a line a recipe."""
    return tuple(
        f"{recipe.name}: steps {'/'.join(map(str, recipe.steps))}, batch {recipe.batch_texts}+{recipe.batch_rows},"
        f" warm-up {recipe.warm_up}"
        + (f", share {recipe.share:g}" if recipe.method.value == "masked-ascent" else "")
        + (f", beta {recipe.beta:g}" if recipe.method.value == "npo" else "")
        for recipe in recipes
    )


def like_controls(rule: Ruler, progress: Progress = silent) -> Row:
    """The joint solver until no continuation is nearer and no text likelier than those of the controls."""
    policy = rule.inputs.policy
    classes = {name: limits.model_copy(update={"like_controls": True}) for name, limits in policy.classes.items()}
    return _solved(rule, "joint like controls", policy.model_copy(update={"classes": classes}), progress)


def seldom(rule: Ruler, progress: Progress = silent) -> Row:
    """No window of a run limit's length has a chance above `SELDOM_CHANCE`; `secret` gives way to that."""
    return _solved(rule, SELDOM, _sampled(rule, SELDOM_CHANCE), progress)


def without_starts(rule: Ruler, progress: Progress = silent) -> Row:
    """The same with `NO_STARTS_CHANCE`, and nothing that keeps the starts of texts.

    Texts end where they begin, and so do others: no edit to release, but what fine-tuning does without the starts.
    """
    return _solved(rule, NO_STARTS, _sampled(rule, NO_STARTS_CHANCE), progress, starts=False)


def _sampled(rule: Ruler, chance: float) -> Policy:
    """The policy in mode `eos` with a limit on windows for every class, in the layers that are edited without one."""
    policy = rule.policy
    update = {"max_sampling_probability": chance, "max_near_verbatim": None, "secret": False}
    classes = {name: limits.model_copy(update=update) for name, limits in policy.classes.items()}
    layers = tuple(usual_layers(rule.inputs.loaded)) if policy.fix.layers == "auto" else policy.fix.layers
    fix = policy.fix.model_copy(update={"mode": "eos", "solver": "joint", "layers": layers})
    return policy.model_copy(update={"classes": classes, "fix": fix})


def _joint(name: str, update: dict[str, Any]) -> Method:
    def make(rule: Ruler, progress: Progress) -> Row:
        policy = rule.inputs.policy
        fix = policy.fix.model_copy(update=update)
        return _solved(rule, name, policy.model_copy(update={"fix": fix}), progress)

    return Method(name, make)


def _solved(rule: Ruler, name: str, policy: Policy, progress: Progress, *, starts: bool = True) -> Row:
    """A row of the joint solver under another policy than the bench's own."""

    def edit() -> str | None:
        done = make_edit(replace(rule.inputs, policy=policy), rule.halves, progress=progress, starts=starts)
        return _remark(len(done.made.outcome.unmet), done.made.no_room)

    return edited(rule, name, edit)


def _remark(unmet: int, no_room: Sequence[str] = ()) -> str | None:
    """What the solver itself says it did not reach, and which locality limits were in the way."""
    words = [f"{unmet} demands unmet"] if unmet else []
    return "; ".join([*words, *(f"no room: {reason}" for reason in no_room)]) or None


def _row(recipe: Recipe, step: int, rule: Ruler, originals: Any, seconds: float) -> Row:
    name = f"{recipe.name}, step {step}"
    try:
        figures = rule.figures(originals)
    except NumericalError as error:
        return Row(name, "fine-tuning", None, seconds, f"diverged: {error}", recipe.method.value)
    return Row(name, "fine-tuning", figures, seconds, family=recipe.method.value)


def _failed(recipe: Recipe, why: str) -> Row:
    return Row(recipe.name, "fine-tuning", None, None, why, recipe.method.value)
