"""The joint solver on a policy's texts: stage by stage, cheapest first, taken back where there is no room for it.

After the last stage the model is measured on the solver's half of the retain text. An edit that breaks a locality
limit is taken back, and the texts that cost least are edited instead, as many as there is room for. Writes nothing;
the judge's half is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from memscrub.edit.attention import top_heads
from memscrub.edit.breakpoints import Demand, planned_cost
from memscrub.edit.calibration import price_factors
from memscrub.edit.demands import demand_of
from memscrub.edit.disturbance import Features, Metric
from memscrub.edit.editable import EditableModel
from memscrub.edit.guards import Guard, find_guards
from memscrub.edit.joint import EditOutcome, EditSettings, JointEdit
from memscrub.edit.linearise import prices, states_of
from memscrub.edit.modes import Mode, available_modes, fixed_distractor
from memscrub.edit.ordinary import Ordinary
from memscrub.edit.solver import Linearised
from memscrub.jobs.refine import Further, near_verbatim, other_contexts
from memscrub.jobs.scanning import Inputs
from memscrub.locality.room import without_room
from memscrub.measures.ceilings import with_ceilings
from memscrub.measures.extraction import NOISE
from memscrub.measures.measure import Progress
from memscrub.models.below import texts_of
from memscrub.models.model import LoadedModel
from memscrub.models.originals import OriginalsOnDisk
from memscrub.models.site_finding import layer_count, sites_of
from memscrub.models.sites import Site
from memscrub.models.trace import weights_swapped
from memscrub.policy.sections import ClassLimits

# After a run the texts are gone over again at most this often, where they still come out elsewhere.
REFINEMENTS = 8
# Where further demands join, the rounds go on from this one of the schedule.
RESUME = 4
# After so many rounds, and so many more, the metrics are held against measured prices and guards are looked for. What
# the rounds after these keep of the edit made until then is little in the end.
REHEARSALS = (2, 2)
CALIBRATION_ROWS = 8
# Guards favour the rows that they come from: these are half of the solver's at most, and whether there is room for an
# edit is asked of others, as many: a mean over more of them would say the same.
GUARDED_ROWS = ROOM_ROWS = 32
# From so many layers on the upper half is edited alone: what is below is computed once, and the edit is hardly larger
# (docs/lab-notes.md).
DEEP = 6
# Where not all texts fit: shares of them that are tried, those first that cost least and that no waiver excuses.
SHARES = (0.75, 0.5, 0.25, 0.1)

Metrics = Callable[[Sequence[Site], Features | None], list[Metric]]
Stored = Callable[[Sequence[Site]], dict[str, torch.dtype]]


def first_sites(inputs: Inputs) -> tuple[Site, ...]:
    """The sites that the first stage edits. Raises UsageError for a layer that the model does not have."""
    fix = inputs.policy.fix
    kinds = {"mlp": ("mlp",), "mlp+attention": ("mlp", "attention")}.get(fix.sites, ("mlp", "attention", "query"))
    return sites_of(inputs.loaded, kinds=kinds, layers=_layers(inputs))


def _layers(inputs: Inputs) -> Sequence[int]:
    """The layers that the policy lets be edited."""
    fix = inputs.policy.fix
    if fix.named_layers is not None:
        return fix.named_layers
    if fix.layers == "all" or any(map(_beyond_greedy, inputs.policy.classes.values())):
        return range(layer_count(inputs.loaded))
    return usual_layers(inputs.loaded)


def _beyond_greedy(limits: ClassLimits) -> bool:
    # Such limits ask for edits many times deeper, or in text that the model makes up: every layer left out is missed.
    return bool(limits.max_near_verbatim or limits.max_sampling_probability or limits.like_controls)


def usual_layers(loaded: LoadedModel) -> range:
    """The upper half of a deep model's layers, all of a shallow one's: where greedy decoding alone is limited."""
    count = layer_count(loaded)
    return range(count // 2 if count >= DEEP else 0, count)


@dataclass
class JointStages:
    """The stages of one joint edit. `metrics` measures the unedited model; `ordinary` is the solver's text.

    After `run`: `outcome` of the edit that is live, the `stages` tried, the `rounds` they took, and a sentence in
    `no_room` for each locality limit that kept texts from being edited.
    """

    inputs: Inputs
    metrics: Metrics = field(repr=False)
    stored: Stored = field(repr=False)
    ordinary: Tensor = field(repr=False)
    progress: Progress = field(repr=False)
    stages: list[str] = field(default_factory=list)
    rounds: int = 0
    no_room: tuple[str, ...] = ()
    reading: Ordinary = field(init=False, repr=False)

    def run(self) -> tuple[EditableModel, EditOutcome]:
        """Edit until the policy holds on all texts or nothing more can be tried."""
        edit = self._begin()
        outcome = self._calibrated(edit)
        outcome = self._other_modes(edit, outcome)
        outcome = self._attention(edit, outcome)
        self.no_room = self._broken(range(len(self.inputs.texts)))
        if self.no_room:
            outcome = self._what_fits(edit)
        return edit.editable, outcome

    def _begin(self) -> JointEdit:
        fix, sites = self.inputs.policy.fix, first_sites(self.inputs)
        disk = None if self.inputs.loaded.lean is None else OriginalsOnDisk(self.inputs.ckpt)
        editable = EditableModel(self.inputs.loaded, sites, self.stored(sites), disk=disk)
        self.reading = Ordinary(editable)
        edit = JointEdit(editable, self.metrics(sites, self._learning()), EditSettings(fix.margin, fix.rounds))
        self.stages.append(fix.sites)
        edit.demand(self._demands(edit))
        return edit

    def _learning(self) -> Features:
        """Passes of the unedited model that leave what the rows that are looked at again come to."""
        again = {*texts_of(self._priced), *texts_of(self.ordinary[self._guarded]), *texts_of(self._asked)}
        _ = self.reading.editable.below.sound  # found out by passes that are not to be traced
        return partial(self.reading.learn, again=again)

    def _demands(self, edit: JointEdit) -> list[Demand]:
        mode = self.inputs.policy.fix.mode
        if mode != "ensemble":
            return self._in_mode(Mode(mode))
        return [ranked[0] for ranked in self._by_cost(edit)]

    def _in_mode(self, mode: Mode) -> list[Demand]:
        policy = with_ceilings(self.inputs.loaded, self.inputs.policy, self.inputs.controls)
        rival = fixed_distractor(self.inputs.loaded.tokenizer, mode, policy.fix.marker)
        return [
            demand_of(text, policy.classes[text.class_name], policy.probe, mode, rival) for text in self.inputs.texts
        ]

    def _by_cost(self, edit: JointEdit) -> list[list[Demand]]:
        """Each text's demand in every mode, the one of least predicted disturbance first."""
        ranked: list[list[tuple[float, Demand]]] = [[] for _ in self.inputs.texts]
        for mode in available_modes(self.inputs.loaded.tokenizer, self.inputs.policy.fix.marker):
            demands = self._in_mode(mode)
            for options, demand, cost in zip(ranked, demands, self._costs(edit, demands), strict=True):
                options.append((cost, demand))
        return [[demand for _, demand in sorted(options, key=lambda pair: pair[0])] for options in ranked]

    def _costs(self, edit: JointEdit, demands: Sequence[Demand]) -> list[float]:
        settings, noise = edit.settings, NOISE[self.inputs.loaded.dtype]
        margin, tokens = settings.margin, settings.batch_tokens
        priced = prices(edit.editable, edit.metrics, demands, margin=margin, batch_tokens=tokens)
        states = states_of(self.inputs.loaded, demands, batch_tokens=tokens)
        triples = zip(demands, states, priced, strict=True)
        return [planned_cost(demand, state, price, margin, noise) for demand, state, price in triples]

    def _calibrated(self, edit: JointEdit) -> EditOutcome:
        """A few rounds to see what sites truly cost and what they break, then the run with prices that are true to it
        and with guards."""
        for rounds in REHEARSALS:
            edit.rehearse(rounds)
            if not any(edit.held):
                break
            factors = price_factors(self.reading, edit.metrics, self._priced)
            edit.metrics = [metric.scaled(factor) for metric, factor in zip(edit.metrics, factors, strict=True)]
            edit.guards += self._guards(edit)
        return self._refined(edit)

    def _guards(self, edit: JointEdit) -> list[Guard]:
        rows = self.ordinary[self._guarded]

        def told(done: int) -> None:
            self.progress("ordinary text to guard", done, len(rows))

        return find_guards(self.reading, rows, known=edit.guards, progress=told)

    @cached_property
    def _priced(self) -> Tensor:
        """Rows of ordinary text that prices are held against."""
        return _spread(self.ordinary, CALIBRATION_ROWS)

    @cached_property
    def _asked(self) -> Tensor:
        """Rows that say whether there is room for an edit: no guard comes from them."""
        return _spread(self.ordinary[~self._guarded], ROOM_ROWS)

    @cached_property
    def _guarded(self) -> Tensor:
        """Which rows of ordinary text guards come from, true or false for each, from all over it."""
        count = min(GUARDED_ROWS, len(self.ordinary) // 2)
        chosen = torch.zeros(len(self.ordinary), dtype=torch.bool)
        if count:
            chosen[:: len(chosen) // count] = True
        return chosen & (chosen.cumsum(0) <= count)

    def _refined(self, edit: JointEdit) -> EditOutcome:
        """Run, and go over again what still comes out in the model's own continuations or in other contexts."""
        outcome = self._run(edit)
        for _ in range(REFINEMENTS):
            further = self._further(edit)
            if not further.demands:
                break
            edit.demand(further.demands, further.held)
            edit.steps = min(edit.steps, RESUME)
            outcome = self._run(edit)
        return outcome

    def _further(self, edit: JointEdit) -> Further:
        return near_verbatim(self.inputs, edit) + other_contexts(self.inputs, edit, self.ordinary)

    def _run(self, edit: JointEdit) -> EditOutcome:
        limit, last = edit.settings.rounds, 0

        def told(done: int, unmet: int) -> None:
            nonlocal last
            last = done
            self.progress(f"edit rounds ({unmet} demands unmet)", done, limit)

        outcome = edit.run(told)
        if last < limit:  # it needed no more rounds: that was all of them
            self.progress(f"edit rounds ({len(outcome.unmet)} demands unmet)", last, last)
        self.rounds += outcome.rounds
        return outcome

    def _other_modes(self, edit: JointEdit, outcome: EditOutcome) -> EditOutcome:
        """In an ensemble, give the texts that do not hold the mode that is next in cost."""
        if self.inputs.policy.fix.mode != "ensemble" or not outcome.unmet:
            return outcome
        ranked = self._by_cost(edit)
        for index in outcome.unmet:
            if index < len(ranked) and len(ranked[index]) > 1:
                now = edit.demands[index].mode
                edit.replace(index, next(demand for demand in ranked[index] if demand.mode is not now))
        self.stages.append("other modes")
        edit.steps = min(edit.steps, RESUME)
        return self._refined(edit)

    def _attention(self, edit: JointEdit, outcome: EditOutcome) -> EditOutcome:
        """Where MLP sites alone do not reach, the heads that write what still comes out join in."""
        fix = self.inputs.policy.fix
        if not outcome.unmet or fix.fallback != "attention" or fix.sites != "mlp":
            return outcome
        heads = self._heads(edit, outcome)
        with weights_swapped(self.inputs.loaded, edit.editable.originals):
            metrics = self.metrics(heads, None)
        edit.add_sites(heads, metrics, self.stored(heads))
        self.stages.append("attention heads")
        edit.steps = min(edit.steps, RESUME)
        return self._refined(edit)

    def _heads(self, edit: JointEdit, outcome: EditOutcome) -> tuple[Site, ...]:
        everything = sites_of(self.inputs.loaded, kinds=("attention",), layers=_layers(self.inputs))
        constraints, owners = edit.linearised(everything)
        unmet = torch.tensor([index for index, owner in enumerate(owners) if owner in set(outcome.unmet)])
        chosen = [Linearised(c.activations[unmet], c.gradients[unmet]) for c in constraints]
        return top_heads(self.inputs.loaded, everything, chosen)

    def _broken(self, texts: Collection[int]) -> tuple[str, ...]:
        """The locality limits that the live edit of these texts breaks.

        While some of them are waived and cost nothing to give up, the slightest break counts.
        """
        surely = self._waived.isdisjoint(texts)
        return without_room(self.reading.compared, self._asked, self.inputs.policy.locality, surely=surely)

    @cached_property
    def _waived(self) -> set[int]:
        """Which texts a waiver excuses from all their limits."""
        ids = {waiver.id for waiver in self.inputs.allowances.waivers if waiver.limit is None}
        return {index for index, text in enumerate(self.inputs.texts) if text.id in ids}

    def _what_fits(self, edit: JointEdit) -> EditOutcome:
        """Take the edit back and make it for as many texts as keep within locality: all but those that are waived, or
        the cheapest share."""
        count = len(self.inputs.texts)
        demands = edit.demands[:count]
        edit.editable.restore()
        costs = self._costs(edit, demands)
        order = sorted(range(count), key=lambda index: (index in self._waived, costs[index]))
        sizes = {count - len(self._waived), *(int(share * count) for share in SHARES)} - {0, count}
        for size in sorted(sizes, reverse=True):
            chosen = sorted(order[:size])
            self.stages.append(f"{len(chosen)} of {count} texts, for want of room")
            smaller = JointEdit(edit.editable, edit.metrics, edit.settings, guards=edit.guards)
            smaller.demand([demands[index] for index in chosen])
            outcome = self._run(smaller)
            if not self._broken(chosen):
                left = {chosen[index] for index in outcome.unmet} | (set(range(count)) - set(chosen))
                return replace(outcome, unmet=tuple(sorted(left)))
            edit.editable.restore()
        return EditOutcome(tuple(range(count)), 0, 0, 0.0, 0)


def _spread(rows: Tensor, count: int) -> Tensor:
    """So many of these rows, from all over them."""
    return rows[:: max(1, len(rows) // count)][:count]
