"""Making the edit in memory with the policy's solver; writes nothing.

What the solvers share is here: statistics of ordinary text, dtypes on disk, and the edit as it is handed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from memscrub.checkpoint import digest_files
from memscrub.disturbance import RIDGE, Metric, measure_disturbance
from memscrub.edit import EditOutcome
from memscrub.editable import EditableModel
from memscrub.errors import UsageError
from memscrub.joint_editing import JointStages
from memscrub.locality import START, RetainHalves
from memscrub.measure import Progress, silent
from memscrub.model import LoadedModel, name_on_disk
from memscrub.one_by_one import edit_one_by_one, mlp_sites
from memscrub.scanning import Inputs
from memscrub.sites import Site
from memscrub.statistics_file import metrics_from, statistics_key
from memscrub.tokens import prompted

DISK_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Edit:
    """An edit in memory, with what a report says of it. `names` maps each edited parameter to its name on disk.

    `no_room`: the locality limits, on the solver's half, that kept texts from being edited.
    """

    editable: EditableModel
    outcome: EditOutcome
    stages: tuple[str, ...]
    rounds: int
    names: Mapping[str, str] = field(repr=False)
    no_room: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """The edited tensors by their name on disk, as they will be stored; untouched ones are left out."""
        found = {}
        for site in self.editable.sites:
            live = self.editable.loaded.parameter(site)
            if not torch.equal(live, self.editable.originals[site.tensor]):
                found[self.names[site.tensor]] = live.to(self.editable.stored[site.name]).cpu()
        return found


def make_edit(
    inputs: Inputs, halves: RetainHalves, *, progress: Progress = silent, statistics: Path | None = None
) -> Edit:
    """Edit the loaded model until the policy holds on all texts, or nothing more can be tried.

    `statistics` names a file that keeps the retain statistics for the next run on the same inputs.
    """

    def metrics(sites: Sequence[Site]) -> list[Metric]:
        return _metrics(inputs, sites, halves, progress, statistics)

    def stored(sites: Sequence[Site]) -> dict[str, torch.dtype]:
        return stored_dtypes(inputs, sites)

    if inputs.policy.fix.solver == "per-text":
        sites = mlp_sites(inputs)
        editable, outcome = edit_one_by_one(inputs, stored(sites), sites, metrics(sites), progress)
        stages: tuple[str, ...] = ("mlp",)
        rounds, no_room = outcome.rounds, tuple[str, ...]()
    else:
        joint = JointStages(inputs, metrics, stored, halves.solver, progress)
        editable, outcome = joint.run()
        stages, rounds, no_room = tuple(joint.stages), joint.rounds, joint.no_room
    names = {site.tensor: name_on_disk(inputs.loaded, inputs.ckpt, site.tensor) for site in editable.sites}
    return Edit(editable, outcome, stages, rounds, names, no_room)


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


def _metrics(
    inputs: Inputs, sites: Sequence[Site], halves: RetainHalves, progress: Progress, file: Path | None
) -> list[Metric]:
    rows = statistics_rows(inputs.loaded, torch.cat([halves.solver, halves.statistics]))
    total = sum(map(len, rows))

    def compute() -> list[Metric]:
        return measure_disturbance(
            inputs.loaded,
            sites,
            rows,
            seed=inputs.seed,
            progress=lambda done: progress("retain statistics", done, total),
        )

    if file is None:
        return compute()
    key = statistics_key(inputs.loaded, digest_files(inputs.ckpt), rows, seed=inputs.seed, ridge=RIDGE)
    return metrics_from(file, key, compute, sites, device=inputs.loaded.device)
