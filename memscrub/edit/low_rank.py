"""An edit of one matrix as the product of two thin ones, so that edits of many large matrices fit in memory.

Every step of the solver adds one rank-one term per constraint that presses. The sum of all steps is kept as its
factors; terms that have become linearly dependent are merged. Knows no model and no site.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from memscrub.edit.disturbance import Metric

# Directions this much smaller than the largest are rounding noise of float32 sums.
NOISE = 1e-7
# Factors are merged when they hold this many terms more than after the last time.
SLACK = 64


@dataclass(frozen=True)
class LowRank:
    """The matrix left^T right `[d, f]`, with `left` `[r, d]` and `right` `[r, f]`; `merged` terms are independent."""

    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    merged: int = 0

    @staticmethod
    def zero(rows: int, columns: int, device: torch.device) -> LowRank:
        """No edit."""
        return LowRank(torch.zeros(0, rows, device=device), torch.zeros(0, columns, device=device))

    def zeroed(self) -> LowRank:
        """No edit, of the same matrix."""
        return LowRank(self.left[:0], self.right[:0])

    def dense(self) -> Tensor:
        """The matrix itself `[d, f]`."""
        return self.left.T @ self.right

    def stepped(self, left: Tensor, right: Tensor, *, kept: float, share: float) -> LowRank:
        """A `share` of the way from this edit to `kept` of it plus left^T right."""
        remains = 1 - share + share * kept
        before = [(self.left * remains, self.right)] if remains else []
        pairs = [*before, (left * share, right)]
        whole = LowRank(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]), self.merged)
        return whole.shortened() if len(whole.left) > self.merged + SLACK else whole

    def shortened(self) -> LowRank:
        """The same matrix with as few terms as it needs."""
        if not len(self.left):
            return self
        (q, a), (p, b) = (torch.linalg.qr(factor.T.double()) for factor in (self.left, self.right))
        u, sizes, v = torch.linalg.svd(a @ b.T)
        count = int((sizes > NOISE * sizes[:1].clamp(min=torch.finfo(torch.float32).tiny)).sum())
        root = sizes[:count].sqrt()
        left, right = (q @ (u[:, :count] * root)).T, (p @ (v[:count].T * root)).T
        return LowRank(left.float().contiguous(), right.float().contiguous(), count)

    def price(self, metric: Metric) -> float:
        """The predicted disturbance 1/2 tr(F D C D^T), as `Metric.price` of the matrix."""
        reads = self.right @ metric.inputs
        writes = self.left @ metric.outputs
        return 0.5 * metric.weight * float(((writes @ writes.T) * (reads @ reads.T)).sum())
