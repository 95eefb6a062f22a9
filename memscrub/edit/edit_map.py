"""How strongly an edit changed the output vectors of a tensor, in a few bins; read from two checkpoints on disk.

Knows tensors and a report's records, nothing of how the edit was made. The solver may touch every vector of a matrix,
most of them hardly, so which ones changed says little; how much they did says where an edit went.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from memscrub.models.architecture import Orientation
from memscrub.reports.report import Report, TensorRecord
from memscrub.storage.checkpoint import Checkpoint, read_tensor

BINS = 64
# Elements that are looked at together, in float64.
_BLOCK = 1 << 22


def with_edit_map(report: Report, before: Checkpoint, after: Checkpoint) -> Report:
    """The same report, each of its edited tensors with the number of its output vectors and their change in bins."""
    if report.edit is None:
        return report
    tensors = tuple(_mapped(record, before, after) for record in report.edit.tensors)
    return replace(report, edit=replace(report.edit, tensors=tensors))


def _mapped(record: TensorRecord, before: Checkpoint, after: Checkpoint) -> TensorRecord:
    if record.orientation is None:
        return record
    old, new = read_tensor(before, record.name), read_tensor(after, record.name)
    if not old.is_floating_point() or old.element_size() < 2 or old.dim() < 2:
        return record  # packed or scaled values: their distance says nothing
    vectors, change = relative_change(old, new, Orientation(record.orientation))
    return replace(record, vectors=vectors, change=change)


def relative_change(
    before: Tensor, after: Tensor, orientation: Orientation, bins: int = BINS
) -> tuple[int, tuple[float, ...]]:
    """How many output vectors there are, and for each bin of neighbouring ones the norm of the difference over the
    norm of the original, to three digits.

    `before` and `after` are `[..., rows, columns]`; vectors are numbered through over leading axes. There are `bins`
    bins, or as many as vectors; a bin that was all zero counts as changed by 1 where it changed at all.
    """
    moved, size = [], []
    for old, new in zip(before.reshape(-1, *before.shape[-2:]), after.reshape(-1, *before.shape[-2:]), strict=True):
        found = [_squares(*block, orientation) for block in _blocks(old, new)]
        whole = torch.cat if orientation is Orientation.ROWS else _sum  # columns run through all blocks, rows do not
        moved.append(whole([each for each, _ in found]))
        size.append(whole([each for _, each in found]))
    change, norm = torch.cat(moved), torch.cat(size)
    count = min(bins, len(change))
    place = torch.arange(len(change)) * count // len(change)
    sums = [torch.zeros(count, dtype=torch.float64).index_add_(0, place, each).tolist() for each in (change, norm)]
    return len(change), tuple(map(_ratio, *sums))


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def _blocks(old: Tensor, new: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two matrices a few rows at a time: float64 copies of all of a large one would not fit."""
    rows = max(1, _BLOCK // max(1, old.shape[1]))
    for begin in range(0, len(old), rows):
        yield old[begin : begin + rows], new[begin : begin + rows]


def _squares(old: Tensor, new: Tensor, orientation: Orientation) -> tuple[Tensor, Tensor]:
    """Per output vector, the squared norm of the difference and of the original."""
    axis = 0 if orientation is Orientation.COLUMNS else 1
    return (new.double() - old.double()).square().sum(axis), old.double().square().sum(axis)


def _ratio(moved: float, size: float) -> float:
    if not size:
        return float(moved > 0)
    return float(f"{(moved / size) ** 0.5:.3g}")
