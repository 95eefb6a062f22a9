"""Sites: the matrices an edit may change, and which part of each; knows no model and no family.

A site is one linear module of a decoder block with its input, the *activation* `[f]`, and its output, the *write*
`[d]`. An edit adds to its matrix `[d, f]`. A restriction leaves some columns (for attention: the coordinates of
chosen heads) or some rows (of a fused projection: the queries) out of every edit. Of a module that holds the
matrices of many experts, each expert's is a site.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memscrub.models.architecture import Orientation


@dataclass(frozen=True)
class Site:
    """One editable matrix: where it is, and the columns and rows of `[d, f]` an edit may touch (None: all)."""

    name: str  # module path in memory, e.g. "model.layers.3.mlp.down_proj"; with an expert's number behind it
    kind: str  # "mlp", "attention" or "query"
    layer: int
    orientation: Orientation
    columns: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    expert: int | None = None  # which matrix of a module that holds those of many experts

    @property
    def module(self) -> str:
        """Path of the module in memory; the experts of one block share theirs."""
        return self.name if self.expert is None else self.name.rpartition(".")[0]

    @property
    def tensor(self) -> str:
        """Name of the weight in memory: a parameter's, or one expert's part of it as `PARAMETER[EXPERT]`."""
        return f"{self.name}.weight" if self.expert is None else f"{self.module}.down_proj[{self.expert}]"

    def inputs(self, activations: Tensor) -> Tensor:
        """The coordinates of the activation that editable columns see, from `[..., f]`."""
        return activations if self.columns is None else activations[..., list(self.columns)]

    def outputs(self, writes: Tensor) -> Tensor:
        """The coordinates of the write, or of a gradient at it, that editable rows make, from `[..., d]`."""
        return writes if self.rows is None else writes[..., list(self.rows)]

    def part(self, matrix: Tensor) -> Tensor:
        """The editable part of a matrix `[d, f]`."""
        return self.inputs(self.outputs(matrix.T).T)

    def whole(self, part: Tensor, like: Tensor) -> Tensor:
        """The matrix of the shape of `like` `[d, f]` that holds `part` and is zero elsewhere."""
        if self.columns is None and self.rows is None:
            return part
        matrix = torch.zeros_like(like)
        rows = torch.arange(like.shape[0]) if self.rows is None else torch.tensor(self.rows)
        columns = torch.arange(like.shape[1]) if self.columns is None else torch.tensor(self.columns)
        matrix[rows.to(like.device)[:, None], columns.to(like.device)[None, :]] = part
        return matrix


def as_columns(weight: Tensor, orientation: Orientation) -> Tensor:
    """A view of a stored weight with one output vector per column, `[d, f]`."""
    return weight if orientation is Orientation.COLUMNS else weight.T
