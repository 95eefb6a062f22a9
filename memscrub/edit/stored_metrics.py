"""The metrics of sites in files instead of memory, one read at a time; knows not how they are measured.

A metric takes f^2 + d^2 floats. Those of all sites of a large model take more than its weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memscrub.edit.disturbance import Metric
from memscrub.storage.partial import disk_errors


class StoredMetric(Metric):
    """A metric whose two factors are read from a file whenever they are asked for."""

    def __init__(self, path: Path, sizes: tuple[int, int], device: torch.device, closed: bool, weight: float = 1.0):
        values = {"path": path, "sizes": sizes, "device": device, "closed": closed, "weight": weight}
        self.__dict__.update(values)  # as its base it does not change afterwards

    path: Path
    sizes: tuple[int, int]
    device: torch.device

    @property
    def inputs(self) -> Tensor:
        return self._read(0)

    @property
    def outputs(self) -> Tensor:
        return self._read(1)

    def scaled(self, factor: float) -> Metric:
        """The same metric at `factor` times the price."""
        return StoredMetric(self.path, self.sizes, self.device, self.closed, self.weight * factor)

    def _read(self, which: int) -> Tensor:
        f, size = self.sizes[0], self.sizes[which]
        with disk_errors(self.path):
            values = np.fromfile(self.path, dtype=np.float32, count=size * size, offset=4 * f * f * which)
        return torch.from_numpy(values).view(size, size).to(self.device)


def store(metric: Metric, path: Path) -> StoredMetric:
    """Write a metric to a new file and return the one that is read from there.

    Raises IncompleteError when the disk is full.
    """
    parts = metric.inputs, metric.outputs
    with disk_errors(path), path.open("xb") as file:
        for part in parts:
            file.write(part.contiguous().cpu().numpy().data)
    return StoredMetric(path, (len(parts[0]), len(parts[1])), parts[0].device, metric.closed, metric.weight)
