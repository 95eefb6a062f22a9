"""Tensors in a file without a name, which is gone when it is closed or the process ends; knows not what they are."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from memscrub.storage.partial import disk_errors


@dataclass(frozen=True)
class Place:
    """Where in its file a tensor is, and what it was."""

    begin: int
    shape: torch.Size
    device: torch.device


class Spool:
    """A file in a folder; tensors are kept there as float32. Raises IncompleteError when the disk is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with disk_errors(folder):
            self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed when it was used up)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the room on disk back."""
        with disk_errors(self.folder):  # what could not be written is tried once more
            self.file.close()

    def put(self, value: Tensor, begin: int | None = None) -> Place:
        """Write a tensor behind all others, or over what was as large."""
        with disk_errors(self.folder):
            begin = self.file.seek(0, 2) if begin is None else self.file.seek(begin)
            self.file.write(value.detach().float().contiguous().cpu().numpy().data)
            self.file.flush()
        return Place(begin, value.shape, value.device)

    def get(self, place: Place) -> Tensor:
        """Read a tensor."""
        values = torch.empty(place.shape)
        with disk_errors(self.folder):
            self.file.seek(place.begin)
            self.file.readinto(values.numpy().data.cast("B"))  # type: ignore[attr-defined]
        return values.to(place.device)
