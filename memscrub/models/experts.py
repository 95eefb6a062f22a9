"""What the routed experts of one block do with the tokens of a pass; knows no texts, no edits and no hooks.

An expert's matrix `down_proj` is a site like any other. Its *activation* at a token is what multiplies its output
vectors on their way into the residual stream: the gated activation times the router's weight, and zero where the
router sends the token elsewhere. The experts of a block all write to the same place, so they share the gradient
there. The model's own forward pass is left as it is; activations are computed from what enters the experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memscrub.errors import ArchitectureError
from memscrub.models.architecture import Experts, Orientation


@dataclass(frozen=True)
class Seen:
    """What entered one site in a pass: `values` `[m, f]`, one row for each token that came there.

    `tokens` `[m]` are their places in the flattened batch; None says that all came, in order.
    """

    values: Tensor = field(repr=False)
    tokens: Tensor | None = field(default=None, repr=False)

    def at(self, places: Tensor) -> Tensor:
        """The activations `[n, f]` at these places of the flattened batch; zero where a token did not come."""
        if self.tokens is None:
            return self.values[places]
        found = self.values.new_zeros(len(places), self.values.shape[1])
        row, column = (places[:, None] == self.tokens[None, :]).nonzero(as_tuple=True)
        found[row] = self.values[column]
        return found

    def dense(self, count: int) -> Tensor:
        """All `count` tokens' activations `[count, f]`."""
        if self.tokens is None:
            return self.values
        return self.values.new_zeros(count, self.values.shape[1]).index_copy_(0, self.tokens, self.values)


def seen_by(
    module: nn.Module, row: Experts, wanted: Sequence[int], inputs: Sequence[Any], named: Mapping[str, Any]
) -> list[Seen]:
    """What these experts of a module saw, from the arguments that the module was called with.

    Raises ArchitectureError when they are not the ones that such a module takes.
    """
    arguments = [*inputs, *named.values()]
    with torch.no_grad():
        if row.weighs_inputs:
            (hidden,) = arguments
            grouped = hidden.view(len(module.down_proj), -1, hidden.shape[-1])  # type: ignore[arg-type]
            return [_weighed_before(module, row, number, grouped[number]) for number in wanted]
        if len(arguments) != 3 or arguments[1].shape != arguments[2].shape:
            raise ArchitectureError("the experts of this model are not called with tokens, choices and weights.")
        hidden, choices, weights = arguments
        return [_weighed_after(module, row, number, hidden, choices, weights) for number in wanted]


def _weighed_before(module: nn.Module, row: Experts, expert: int, hidden: Tensor) -> Seen:
    # A token that is routed elsewhere comes here multiplied with zero.
    tokens = hidden.any(-1).nonzero()[:, 0]
    return Seen(_activation(module, row, expert, hidden[tokens]), tokens)


def _weighed_after(
    module: nn.Module, row: Experts, expert: int, hidden: Tensor, choices: Tensor, weights: Tensor
) -> Seen:
    tokens, rank = (choices == expert).nonzero(as_tuple=True)
    return Seen(_activation(module, row, expert, hidden[tokens]) * weights[tokens, rank, None], tokens)


def _activation(module: nn.Module, row: Experts, expert: int, hidden: Tensor) -> Tensor:
    """The gated activation `[m, f]` of one expert."""
    matrix = module.gate_up_proj[expert].to(hidden.dtype)  # type: ignore[index]
    both = hidden @ (matrix if row.orientation is Orientation.ROWS else matrix.T)
    bias = getattr(module, "gate_up_proj_bias", None)
    if bias is not None:
        both = both + bias[expert].to(hidden.dtype)
    gate = getattr(module, "_apply_gate", None)
    if gate is not None:
        gated: Tensor = gate(both)
        return gated
    first, second = both.chunk(2, dim=-1)
    activated: Tensor = second * module.act_fn(first)  # type: ignore[operator]
    return activated
