"""Triangular matrices in files instead of memory, one read at a time, and metrics made of them; knows not how they are
measured.

A metric is two lower triangles of f^2 / 2 and d^2 / 2 floats. Those of all sites of a large model take as much as its
weights do.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memscrub.edit.disturbance import Metric
from memscrub.storage.partial import disk_errors


@dataclass(frozen=True)
class StoredTriangle:
    """The lower triangle of a matrix `[size, size]` in a file: row after row up to the diagonal, in float32.

    It is read to `device`. Reading raises IncompleteError when the file is gone or has been cut short.
    """

    path: Path
    size: int
    device: torch.device

    def read(self) -> Tensor:
        """The matrix, zero above the diagonal; bit for bit what was stored."""
        # numpy's zeros take no memory before they are written to, and half of these never are.
        values = np.zeros((self.size, self.size), dtype=np.float32)
        self._into(values)
        return torch.from_numpy(values).to(self.device)

    def fill(self, zeros: Tensor) -> None:
        """Put it into a matrix of zeros `[size, size]` that is there already."""
        if zeros.device.type == "cpu":
            self._into(zeros.numpy())
        else:
            zeros.copy_(self.read())

    def _into(self, values: np.ndarray) -> None:
        with disk_errors(self.path), self.path.open("rb") as file:
            for row in range(self.size):
                part = values[row, : row + 1].data.cast("B")
                if file.readinto(part) != len(part):
                    raise OSError(errno.EIO, "it ends too early", str(self.path))


def store_triangle(matrix: Tensor, path: Path) -> StoredTriangle:
    """Write the lower triangle of a matrix `[n, n]` in place of what the file held, which was as large.

    Raises IncompleteError when the disk is full.
    """
    values = matrix.detach().cpu().numpy()
    with disk_errors(path), path.open("r+b" if path.exists() else "xb") as file:
        for row in range(len(values)):
            file.write(np.ascontiguousarray(values[row, : row + 1]).data)
    return StoredTriangle(path, len(values), matrix.device)


class StoredMetric(Metric):
    """A metric whose two factors are read from files whenever they are asked for."""

    def __init__(self, factors: tuple[StoredTriangle, StoredTriangle], closed: bool, weight: float = 1.0):
        # as its base it does not change afterwards
        self.__dict__.update({"factors": factors, "closed": closed, "weight": weight})

    factors: tuple[StoredTriangle, StoredTriangle]

    @property
    def inputs(self) -> Tensor:
        return self.factors[0].read()

    @property
    def outputs(self) -> Tensor:
        return self.factors[1].read()

    def scaled(self, factor: float) -> Metric:
        """The same metric at `factor` times the price."""
        return StoredMetric(self.factors, self.closed, self.weight * factor)


def store(metric: Metric, inputs: Path, outputs: Path | StoredTriangle) -> StoredMetric:
    """Write a metric's factors to these files and return the metric that is read from there.

    `outputs` may be a factor that is stored already, for sites that share it. Raises IncompleteError when the disk is
    full.
    """
    second = store_triangle(metric.outputs, outputs) if isinstance(outputs, Path) else outputs
    return StoredMetric((store_triangle(metric.inputs, inputs), second), metric.closed, metric.weight)
