"""Making the edit in memory with the policy's solver; writes nothing.

What the solvers share is here: statistics of ordinary text, dtypes on disk, and the edit as it is handed on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from memscrub.edit.block_statistics import measure_by_block
from memscrub.edit.disturbance import RIDGE, Features, Metric, measure_disturbance
from memscrub.edit.editable import EditableModel
from memscrub.edit.joint import EditOutcome
from memscrub.edit.statistics_file import check_key, metrics_from, statistics_key
from memscrub.errors import UsageError
from memscrub.jobs.joint_editing import JointStages, first_sites
from memscrub.jobs.one_by_one import edit_one_by_one, mlp_sites
from memscrub.jobs.scanning import Inputs
from memscrub.locality.distance import START, RetainHalves
from memscrub.measures.measure import Progress, silent
from memscrub.models.disk_places import DiskPlace, place_on_disk
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site
from memscrub.models.tokens import prompted
from memscrub.reports.records import ExpertsRecord
from memscrub.storage.checkpoint import digest_files

DISK_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class EditMade:
    """What a report says of an edit. `places`: where each `Site.tensor` is on disk.

    `no_room`: the locality limits, on the solver's half, that kept texts from being edited. `experts`: what became of
    each layer's routed experts.
    """

    sites: tuple[Site, ...] = field(repr=False)
    outcome: EditOutcome
    stages: tuple[str, ...]
    rounds: int
    places: Mapping[str, DiskPlace] = field(repr=False)
    no_room: tuple[str, ...] = ()
    experts: tuple[ExpertsRecord, ...] = ()


@dataclass(frozen=True)
class Edit:
    """An edit in memory: the model that carries it, and what a report says of it."""

    editable: EditableModel
    made: EditMade

    def tensors(self) -> dict[str, Callable[[], Tensor]]:
        """What makes the edited tensors, as they will be stored, by their name on disk; untouched ones are left out."""
        found: dict[str, Callable[[], Tensor]] = {}
        for site in self.editable.sites:
            live, place = self.editable.loaded.parameter(site), self.made.places[site.tensor]
            if not torch.equal(live, self.editable.originals[site.tensor].to(live.device)):
                if place.expert is not None:  # the stored tensor holds all experts of the block
                    live = self.editable.loaded.tensor(site.tensor.partition("[")[0])
                found[place.tensor] = partial(_as_stored, live, self.editable.stored[site.name])
        return found


def check_sites(inputs: Inputs) -> None:
    """Refuse sites that cannot be edited, before anything is measured.

    Raises UsageError for layers that the model does not have, and for dtypes as `stored_dtypes` does.
    """
    stored_dtypes(inputs, mlp_sites(inputs) if inputs.policy.fix.solver == "per-text" else first_sites(inputs))


def check_statistics(inputs: Inputs, halves: RetainHalves, path: Path) -> None:
    """Refuse a statistics file of other inputs, before anything is measured. Raises UsageError."""
    check_key(path, _key(inputs, statistics_rows(inputs.loaded, torch.cat([halves.solver, halves.statistics]))))


def make_edit(
    inputs: Inputs,
    halves: RetainHalves,
    *,
    progress: Progress = silent,
    statistics: Path | None = None,
    scratch: Path | None = None,
    starts: bool = True,
) -> Edit:
    """Edit the loaded model until the policy holds on all texts, or nothing more can be tried.

    `statistics` names a file that keeps the retain statistics for the next run on the same inputs. `scratch` is an
    existing folder for what a large model leaves no memory for; it is empty again afterwards. Without `starts` the
    beginnings of texts are given up: for a bench, beside baselines that give them up too.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="memscrub-") as folder:
        return _make_edit(inputs, halves, progress, statistics, Path(folder), starts)


def _as_stored(live: Tensor, dtype: torch.dtype) -> Tensor:
    return live.to(dtype).cpu()


def _make_edit(
    inputs: Inputs, halves: RetainHalves, progress: Progress, statistics: Path | None, scratch: Path, starts: bool
) -> Edit:
    closed: set[str] = set()
    both = statistics_rows(inputs.loaded, torch.cat([halves.solver, halves.statistics]))
    rows = both if starts else both[:1]

    def metrics(sites: Sequence[Site], features: Features | None = None) -> list[Metric]:
        found = _metrics(inputs, sites, rows, progress, statistics, scratch, features)
        closed.update(site.name for site, metric in zip(sites, found, strict=True) if metric.closed)
        return found

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
    places = {site.tensor: place_on_disk(inputs.loaded, inputs.ckpt, site) for site in editable.sites}
    made = EditMade(editable.sites, outcome, stages, rounds, places, no_room, _experts(editable, closed))
    return Edit(editable, made)


def _experts(editable: EditableModel, closed: Collection[str]) -> tuple[ExpertsRecord, ...]:
    """What became of the routed experts of each layer; `closed` are the names of sites no retain text came to."""
    counts: dict[int, int] = {}
    edited: dict[int, list[int]] = {}
    left: dict[int, list[int]] = {}
    for site in editable.sites:
        if site.expert is None:
            continue
        counts[site.layer] = counts.get(site.layer, 0) + 1
        live = editable.loaded.parameter(site)
        if not torch.equal(live, editable.originals[site.tensor].to(live.device)):
            edited.setdefault(site.layer, []).append(site.expert)
        if site.name in closed:
            left.setdefault(site.layer, []).append(site.expert)
    return tuple(
        ExpertsRecord(layer, count, tuple(edited.get(layer, ())), tuple(left.get(layer, ())))
        for layer, count in counts.items()
    )


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
        info = inputs.ckpt.tensors[place_on_disk(inputs.loaded, inputs.ckpt, site).tensor]
        if info.dtype not in DISK_DTYPES:
            raise UsageError(
                f"{info.shard}: the tensor '{info.name}' is stored as {info.dtype}; memscrub edits"
                f" {', '.join(DISK_DTYPES)} only."
            )
        found[site.name] = DISK_DTYPES[info.dtype]
    return found


def _metrics(
    inputs: Inputs,
    sites: Sequence[Site],
    rows: Sequence[Tensor],
    progress: Progress,
    file: Path | None,
    scratch: Path,
    features: Features | None,
) -> list[Metric]:
    total = sum(map(len, rows))

    def told(done: int) -> None:
        progress("retain statistics", done, total)

    def compute() -> list[Metric]:
        if inputs.loaded.lean is None:
            return measure_disturbance(inputs.loaded, sites, rows, seed=inputs.seed, features=features, progress=told)
        earlier = list(scratch.iterdir())
        taken = sum(file.stat().st_size for folder in earlier for file in folder.iterdir())
        folder = scratch / str(len(earlier))
        return measure_by_block(inputs.loaded, sites, rows, folder, seed=inputs.seed, beside=taken, progress=told)

    if file is None:
        return compute()
    return metrics_from(file, _key(inputs, rows), compute, sites, device=inputs.loaded.device)


def _key(inputs: Inputs, rows: Sequence[Tensor]) -> dict[str, str]:
    """All that determines the statistics of these rows."""
    files = digest_files(inputs.ckpt) if inputs.files is None else inputs.files
    return statistics_key(inputs.loaded, files, rows, seed=inputs.seed, ridge=RIDGE)
