"""A bench's methods that treat one text at a time, each on the unedited model: means over a seeded sample.

Sampled are texts of which everything behind the given prefix comes out verbatim. Knows no table and no file.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from memscrub.bench.baselines import ablate
from memscrub.bench.clock import now
from memscrub.bench.heads import HeadEdit, by_ablation, by_closed_form
from memscrub.bench.ruler import Ruler
from memscrub.bench.table import CopyRow, TextRow
from memscrub.edit.disturbance import Metric, measure_disturbance
from memscrub.edit.editable import EditableModel
from memscrub.edit.ensemble import choose_mode, predicted_disturbance, with_shorter_prefix
from memscrub.edit.locate import Locator
from memscrub.edit.modes import Baseline, Mode
from memscrub.edit.output_vectors import put_back
from memscrub.edit.per_text import PerTextOutcome, PerTextSettings, edit_text, emitted_whole, measured, suffix_begin
from memscrub.errors import NumericalError, UsageError
from memscrub.jobs.editing import stored_dtypes
from memscrub.locality.distance import compare
from memscrub.measures.extraction import Sampling, score
from memscrub.measures.measure import Progress, silent
from memscrub.models.site_finding import sites_of
from memscrub.models.tokens import TokenText

# What one text's edit costs is measured on so many rows of the judge's text.
JUDGE_ROWS = 8
# The ensemble's held-out context: the suffix behind this share of the prefix.
SHORTER = 0.75
ENSEMBLE = "ensemble"
ABLATION, CLOSED_FORM = "attention heads, ablated", "attention heads, closed form"
BINS = (0.0, 0.25, 0.5, 0.75, 1.0)

Edit = Callable[[TokenText, int], PerTextOutcome]


@dataclass(frozen=True)
class Bed:
    """What all per-text methods share: sampled texts, the editable MLPs, a locator and a few rows to judge by."""

    rule: Ruler = field(repr=False)
    texts: tuple[TokenText, ...] = field(repr=False)
    editable: EditableModel = field(repr=False)
    locator: Locator = field(repr=False)
    settings: PerTextSettings
    judge: Tensor = field(repr=False)


def names() -> tuple[str, ...]:
    """The methods in their order."""
    modes = tuple(mode.value for mode in Mode)
    return (*modes, ENSEMBLE, *(baseline.value for baseline in Baseline), ABLATION, CLOSED_FORM)


def bed(rule: Ruler, sample: int) -> Bed | None:
    """Draw the texts; None when none of them comes out verbatim."""
    inputs, fix = rule.inputs, rule.inputs.policy.fix
    settings = PerTextSettings(fix.neurons, fix.rank, prefix_tokens=rule.policy.probe.prefix_tokens, marker=fix.marker)
    texts = _verbatim(rule, settings)
    if not texts:
        return None
    drawn = sorted(random.Random(inputs.seed).sample(range(len(texts)), min(sample, len(texts))))
    sites = sites_of(inputs.loaded, kinds=("mlp",), layers=fix.named_layers)
    editable = EditableModel(inputs.loaded, sites, stored_dtypes(inputs, sites))
    locator = Locator(inputs.loaded, sites, fix.rank)
    chosen = tuple(texts[index] for index in drawn)
    return Bed(rule, chosen, editable, locator, settings, rule.halves.judge[:JUDGE_ROWS])


def simple(here: Bed, name: str, progress: Progress = silent) -> tuple[TextRow, list[bool]]:
    """One mode, or one baseline, on every sampled text; the row, and which texts it broke."""

    def edit(text: TokenText, number: int) -> PerTextOutcome:
        if name in {baseline.value for baseline in Baseline}:
            seed = here.rule.inputs.seed + number
            return ablate(here.editable, text, Baseline(name), here.settings, seed=seed, locator=here.locator)
        return edit_text(here.editable, text, Mode(name), here.settings, here.locator)

    return _one_by_one(here, name, here.editable, edit, progress)


def ensemble(here: Bed, progress: Progress = silent) -> tuple[TextRow, list[bool]]:
    """For each text the least disturbing mode that also holds behind a shorter prefix; a text with none is missed.

    The metric that tells disturbance is measured once; its time is not in the seconds per text.
    """
    loaded = here.rule.inputs.loaded
    prefix = here.settings.prefix_tokens
    try:
        price = predicted_disturbance(metrics(here.rule, here.editable, progress))
    except NumericalError as error:
        return TextRow(ENSEMBLE, len(here.texts), failed=f"diverged: {error}"), [False] * len(here.texts)

    def edit(text: TokenText, number: int) -> PerTextOutcome:
        shorter = with_shorter_prefix(loaded, text, here.settings, max(1, round(SHORTER * prefix)))
        mode = choose_mode(
            here.editable, text, here.settings, held_out=[shorter], disturbance=price, locator=here.locator
        )
        if mode is None:
            return measured(loaded, text, suffix_begin(text, here.settings), ())
        return edit_text(here.editable, text, mode, here.settings, here.locator)

    return _one_by_one(here, ENSEMBLE, here.editable, edit, progress)


def attention(
    here: Bed, broken: Sequence[bool], progress: Progress = silent
) -> tuple[tuple[TextRow, ...], tuple[CopyRow, ...]]:
    """What attention alone does to the texts that the MLP ensemble missed; rows, and recovery by copy fraction.

    Each text is on the unedited model. Where nothing was missed the rows are over no text.
    """
    missed = [text for text, gone in zip(here.texts, broken, strict=True) if not gone]
    inputs, fix = here.rule.inputs, here.rule.inputs.policy.fix
    if not missed:
        rows = tuple(TextRow(name, 0) for name in (ABLATION, CLOSED_FORM))
        return rows, _by_copying(here, broken, {}, {})
    sites = sites_of(inputs.loaded, kinds=("attention",), layers=fix.named_layers)
    editable = EditableModel(inputs.loaded, sites, stored_dtypes(inputs, sites))
    heads = HeadEdit(editable, metrics(here.rule, editable, progress), fix.margin)
    found, rows = [], ()
    for name, method in ((ABLATION, by_ablation), (CLOSED_FORM, by_closed_form)):

        def edit(text: TokenText, number: int, method: Callable[..., None] = method) -> PerTextOutcome:
            begin = suffix_begin(text, here.settings)
            method(heads, text, begin)
            return measured(inputs.loaded, text, begin, ())

        row, recovered = _one_by_one(here, name, editable, edit, progress, missed)
        rows = (*rows, row)
        found.append({text.id: gone for text, gone in zip(missed, recovered, strict=True)})
    return rows, _by_copying(here, broken, *found)


def metrics(rule: Ruler, editable: EditableModel, progress: Progress = silent) -> list[Metric]:
    """The metrics of the editable sites on the solver's half, at the unedited weights."""
    rows = rule.ordinary
    total = sum(map(len, rows))
    return measure_disturbance(
        rule.inputs.loaded,
        editable.sites,
        rows,
        seed=rule.inputs.seed,
        progress=lambda done: progress("retain statistics", done, total),
    )


def copy_fraction(tokens: Sequence[int], start: int, begin: int) -> float:
    """Share of the suffix tokens, those from `begin` on, that occur among the prefix tokens from `start`."""
    prefix, suffix = set(tokens[start:begin]), tokens[begin:]
    return sum(token in prefix for token in suffix) / len(suffix)


def _one_by_one(
    here: Bed,
    name: str,
    editable: EditableModel,
    edit: Edit,
    progress: Progress,
    texts: Sequence[TokenText] | None = None,
) -> tuple[TextRow, list[bool]]:
    """Edit each text on the unedited model, measure what it came to and cost, put the model back."""
    texts = here.texts if texts is None else texts
    loaded = here.rule.inputs.loaded
    broken, contained, kls, agreements, seconds = [], [], [], [], 0.0
    for number, text in enumerate(texts):
        try:
            begin = now(loaded.device)
            outcome = edit(text, number)
            seconds += now(loaded.device) - begin
            cost = compare(loaded, editable.originals, here.judge)
        except NumericalError as error:
            return TextRow(name, len(texts), failed=f"diverged: {error}"), [False] * len(texts)
        except UsageError as error:
            return TextRow(name, len(texts), failed=f"not possible: {error}"), [False] * len(texts)
        finally:
            _back(here, editable)
        broken.append(outcome.broken)
        contained.append(outcome.longest_run <= here.rule.limit(text))
        kls.append(cost.kl)
        agreements.append(cost.agreement)
        progress(f"texts ({name})", number + 1, len(texts))
    count = len(texts)
    shares = (sum(broken) / count, sum(contained) / count)
    return TextRow(name, count, *shares, sum(kls) / count, sum(agreements) / count, seconds / count), broken


def _back(here: Bed, editable: EditableModel) -> None:
    """The original weights, bit for bit; the locator forgets what it saw of the edit."""
    if editable is here.editable:
        put_back(editable, [torch.zeros_like(delta) for delta in editable.deltas], here.locator)
    else:
        editable.restore()


def _verbatim(rule: Ruler, settings: PerTextSettings) -> list[TokenText]:
    loaded = rule.inputs.loaded
    long = [text for text in rule.inputs.texts if text.first_judged(settings.prefix_tokens) < len(text.tokens)]
    scores = score(loaded, long, lambda _: Sampling(), batch_tokens=rule.policy.probe.batch_tokens)
    return [
        text
        for text, one in zip(long, scores, strict=True)
        if emitted_whole(loaded, one.gap, suffix_begin(text, settings))
    ]


def _by_copying(
    here: Bed, broken: Sequence[bool], ablated: dict[str, bool], solved: dict[str, bool]
) -> tuple[CopyRow, ...]:
    """A row for each range of copy fractions that has texts, and one for all (its bounds equal)."""
    fractions = [copy_fraction(t.tokens, t.start, suffix_begin(t, here.settings)) for t in here.texts]
    rows = []
    for low, high in (*pairwise(BINS), (1.0, 1.0)):
        whole = low == high
        inside = [
            (text, gone)
            for text, gone, value in zip(here.texts, broken, fractions, strict=True)
            if whole or low <= value < high or value == high == BINS[-1]
        ]
        missed = [text.id for text, gone in inside if not gone]
        if inside:
            recovered = [sum(found.get(each, False) for each in missed) for found in (ablated, solved)]
            rows.append(CopyRow(low, high, len(inside), len(missed), *recovered))
    return tuple(rows)
