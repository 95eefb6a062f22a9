"""Making the edit in memory: stage by stage, cheapest first, measured after each; writes nothing.

A stage edits more sites than the one before. A stage is done when the texts, measured as a scan measures them,
are within the policy; near-verbatim texts get further demands in the context of the model's own continuation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memscrub.attention import top_heads
from memscrub.continuation import Continuation
from memscrub.demands import continuation_demand, demand_of
from memscrub.disturbance import Metric, measure_disturbance
from memscrub.edit import EditableModel, EditOutcome, EditSettings, JointEdit
from memscrub.errors import UsageError
from memscrub.locality import START, RetainHalves
from memscrub.measure import Measured, Progress, measure, silent
from memscrub.model import LoadedModel, Site, name_on_disk, sites_of
from memscrub.scanning import Inputs
from memscrub.solver import Linearised
from memscrub.tokens import prompted
from memscrub.trace import weights_swapped

# Near-verbatim texts are gone over again at most this often: each time in the continuation the model then makes.
REFINEMENTS = 4
DISK_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Edit:
    """An edit in memory, with what a report says of it. `names` maps each edited parameter to its name on disk."""

    editable: EditableModel
    outcome: EditOutcome
    stages: tuple[str, ...]
    rounds: int
    names: Mapping[str, str] = field(repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """The edited tensors by their name on disk, as they will be stored; untouched ones are left out."""
        found = {}
        for site in self.editable.sites:
            live = self.editable.loaded.parameter(site)
            if not torch.equal(live, self.editable.originals[site.tensor]):
                found[self.names[site.tensor]] = live.to(self.editable.stored[site.name]).cpu()
        return found


def make_edit(inputs: Inputs, halves: RetainHalves, *, progress: Progress = silent) -> Edit:
    """Edit the loaded model until the policy holds on all texts, or nothing more can be tried."""
    fix, loaded = inputs.policy.fix, inputs.loaded
    layers = None if fix.layers == "all" else fix.layers
    kinds = ("mlp",) if fix.sites == "mlp" else ("mlp", "attention")
    sites = sites_of(loaded, kinds=kinds, layers=layers)
    settings = EditSettings(fix.margin, fix.rounds)
    edit = JointEdit(
        EditableModel(loaded, sites, stored_dtypes(inputs, sites)),
        _metrics(inputs, sites, halves, progress),
        settings,
    )
    rounds = 0
    edit.demand([demand_of(text, inputs.policy.classes[text.class_name], inputs.policy.probe) for text in inputs.texts])
    stages: list[str] = [fix.sites]
    outcome, rounds = _run_stage(inputs, edit, progress)
    if outcome.unmet and fix.fallback == "attention" and fix.sites == "mlp":
        heads, metrics = _heads(inputs, edit, outcome, halves, progress)
        edit.add_sites(heads, metrics, stored_dtypes(inputs, heads))
        stages.append("attention heads")
        outcome, more = _run_stage(inputs, edit, progress)
        rounds += more
    names = {site.tensor: name_on_disk(loaded, inputs.ckpt, site.tensor) for site in edit.editable.sites}
    return Edit(edit.editable, outcome, tuple(stages), rounds, names)


def statistics_rows(loaded: LoadedModel, solver: Tensor) -> tuple[Tensor, Tensor]:
    """The solver's text as a running stream, and the first tokens of each row at the beginning of a text.

    With the stream alone, an edit can hide in what sets the beginning of a text apart: it looks cheap on the
    statistics and damages the start of every prompt (docs/lab-notes.md).
    """
    return solver, prompted(loaded, solver[:, :START])


def stored_dtypes(inputs: Inputs, sites: Sequence[Site]) -> dict[str, torch.dtype]:
    """Each site's dtype on disk, by Site.name. Raises UsageError for one that cannot be edited in float32."""
    found = {}
    for site in sites:
        info = inputs.ckpt.tensors[name_on_disk(inputs.loaded, inputs.ckpt, site.tensor)]
        if info.dtype not in DISK_DTYPES:
            raise UsageError(
                f"{info.shard}: the tensor '{info.name}' is stored as {info.dtype}; memscrub edits"
                f" {', '.join(DISK_DTYPES)} only."
            )
        found[site.name] = DISK_DTYPES[info.dtype]
    return found


def _metrics(inputs: Inputs, sites: Sequence[Site], halves: RetainHalves, progress: Progress) -> list[Metric]:
    rows = statistics_rows(inputs.loaded, halves.solver)
    total = sum(map(len, rows))
    return measure_disturbance(
        inputs.loaded,
        sites,
        rows,
        seed=inputs.seed,
        progress=lambda done: progress("retain statistics", done, total),
    )


def _run_stage(inputs: Inputs, edit: JointEdit, progress: Progress) -> tuple[EditOutcome, int]:
    """Edit until the texts hold, refining near-verbatim ones; the outcome and the rounds it took."""
    rounds = 0
    limit = edit.settings.rounds

    def told(done: int, unmet: int) -> None:
        progress(f"edit rounds ({unmet} demands unmet)", done, limit)

    outcome = edit.run(told)
    rounds += outcome.rounds
    for _ in range(REFINEMENTS):
        near = _too_close(inputs, measure(inputs.loaded, inputs.policy, inputs.texts))
        if not near:
            break
        edit.demand([continuation_demand(said) for said in near])
        outcome = edit.run(told)
        rounds += outcome.rounds
    return outcome, rounds


def _too_close(inputs: Inputs, measured: Measured) -> list[Continuation]:
    """The continuations that are nearer to their text than its class allows."""
    found = []
    for said in measured.continuations:
        limits = inputs.policy.classes[inputs.texts[said.opening.text].class_name]
        if limits.max_near_verbatim is not None and said.similarity > limits.max_near_verbatim:
            found.append(said)
    return found


def _heads(
    inputs: Inputs, edit: JointEdit, outcome: EditOutcome, halves: RetainHalves, progress: Progress
) -> tuple[tuple[Site, ...], list[Metric]]:
    """The heads that carry the unmet demands, as sites, with their metrics on the unedited model."""
    layers = None if inputs.policy.fix.layers == "all" else inputs.policy.fix.layers
    everything = sites_of(inputs.loaded, kinds=("attention",), layers=layers)
    constraints, owners = edit.linearised(everything)
    unmet = torch.tensor([index for index, owner in enumerate(owners) if owner in set(outcome.unmet)])
    chosen = top_heads(
        inputs.loaded,
        everything,
        [Linearised(c.activations[unmet], c.gradients[unmet]) for c in constraints],
    )
    with weights_swapped(inputs.loaded, edit.editable.originals):
        whole = _metrics(inputs, chosen, halves, progress)
    return chosen, [
        metric if site.columns is None else metric.restricted(site.columns)
        for site, metric in zip(chosen, whole, strict=True)
    ]
