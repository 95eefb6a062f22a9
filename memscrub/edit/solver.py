"""The closed form: the least disturbing edit that meets linear constraints, through a small kernel system.

Minimise 1/2 sum_l tr(F_l D_l C_l D_l^T) subject to sum_l g_jl^T D_l a_jl <= b_j for every constraint j. The
minimiser is D_l = - sum_j lambda_j (F_l^-1 g_jl)(C_l^-1 a_jl)^T, one rank-one term per constraint, where
lambda >= 0 solves the linear complementarity problem K lambda + b >= 0, lambda^T (K lambda + b) = 0 with
K_jk = sum_l (g_jl F_l^-1 g_kl)(a_jl C_l^-1 a_kl). Constraints that hold by themselves get lambda = 0. A constraint
may give way: by y_j K_jj lambda_j, so that one which costs too much to hold is not held.

Pure linear algebra: knows neither texts nor models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memscrub.edit.disturbance import Metric
from memscrub.errors import NumericalError

# Added to the unit diagonal of the scaled kernel: equal constraints must not make it singular.
JITTER = 1e-4
# Two are usual; kernels with many near-copies of a constraint took up to 429 (n = 46).
_PIVOTS = 2000
# Multipliers and slacks that are negative by no more than this share of the largest bound are zero but for rounding: a
# constraint that just touches would change sides for ever.
_ROUNDING = 1e-9
# So many constraints join the system at a time, or a share of all; where this share of those in it press, all that are
# left: they will press too.
_AT_ONCE, _SHARE, _MOST = 256, 1 / 8, 0.8
# One that is missed by no more than this share of the largest bound holds, but for the kernel's single precision.
_TOUCHING = 1e-6


@dataclass(frozen=True)
class Linearised:
    """Constraints at one site: activations `[n, f]` and gradients `[n, d]` of each constraint's functional."""

    activations: Tensor = field(repr=False)
    gradients: Tensor = field(repr=False)


@dataclass(frozen=True)
class Solution:
    """The edit in low-rank form: at site l, D_l = left[l]^T right[l] with `left` `[n, d]`, `right` `[n, f]`.

    `cost` is the predicted disturbance 1/2 sum_l tr(F D C D^T); `active` the number of constraints that press;
    `condition` estimates the condition number of their scaled system from its Cholesky factor (a lower bound).
    """

    left: list[Tensor] = field(repr=False)
    right: list[Tensor] = field(repr=False)
    cost: float
    active: int
    condition: float = 1.0


def least_disturbing_edit(
    sites: Sequence[Linearised], metrics: Sequence[Metric], bounds: Tensor, yields: Tensor | float = 0.0
) -> Solution:
    """Solve for the edit; `bounds` `[n]` is b, so the edit changes functional j by at most b_j. `yields` `[n]` is y,
    what each gives way by.

    Constraints join the system the most violated first, until those left out hold by themselves: where few of many
    press, little of the kernel is computed. With m of them in the system, time m n (f + d) per site and m^3, memory n^2
    at most for the kernel. Raises NumericalError when the constraints are not finite.
    """
    bounds, yields = bounds.double(), torch.as_tensor(yields, device=bounds.device).double().expand(len(bounds))
    system = _System(sites, metrics, bounds)
    multipliers, condition = bounds.new_zeros(0), 1.0
    while True:
        missed = system.change(multipliers) - bounds
        joining = system.joining(missed, multipliers)
        if not len(joining):
            break
        passive = torch.cat([multipliers > 0, missed[joining] > 0])
        system.add(joining)
        chosen = system.chosen
        multipliers, condition = _multipliers(system.kernel, bounds[chosen], yields[chosen], JITTER, passive)
    pressing = multipliers > 0
    weights = -multipliers[pressing].float()
    return Solution(
        left=[weights[:, None] * writes[pressing] for writes in system.left],
        right=[reads[pressing] for reads in system.right],
        cost=float(-0.5 * multipliers @ system.change(multipliers)[system.chosen]),
        active=int(pressing.sum()),
        condition=condition,
    )


class _System:
    """The constraints that are solved for: their indices `chosen` `[m]`, what an edit for each writes, `left` `[m, d]`,
    and reads, `right` `[m, f]`, at every site, and their rows of K. Raises NumericalError for what is not finite."""

    def __init__(self, sites: Sequence[Linearised], metrics: Sequence[Metric], bounds: Tensor) -> None:
        _check_finite(bounds)
        self.sites, self.metrics, self.bounds = sites, metrics, bounds
        self.chosen = torch.empty(0, dtype=torch.long, device=bounds.device)
        self.left = [site.gradients[:0] for site in sites]
        self.right = [site.activations[:0] for site in sites]
        self._rows = torch.empty(len(bounds), len(bounds), device=bounds.device)  # those of the chosen come first

    @property
    def kernel(self) -> Tensor:
        """K of the chosen, `[m, m]`, symmetric to the bit."""
        return self._rows[: len(self.chosen), self.chosen]

    def change(self, multipliers: Tensor) -> Tensor:
        """What the edit of these multipliers `[m]` changes every functional by, `[n]`."""
        return -(multipliers.float() @ self._rows[: len(self.chosen)]).double()

    def joining(self, missed: Tensor, multipliers: Tensor) -> Tensor:
        """Those to solve for besides, the most violated first, by what each is `missed` by `[n]`; none, where all hold.

        All of them where most of those chosen press.
        """
        others = self._others()
        order = others[missed[others].argsort(descending=True, stable=True)]
        violated = int((missed[order] > _TOUCHING * self.bounds.abs().amax()).sum()) if len(order) else 0
        pressing = int((multipliers > 0).sum())
        if violated and len(multipliers) and pressing > _MOST * len(multipliers):
            return order
        return order[: min(violated, max(_AT_ONCE, int(_SHARE * len(missed))))]

    def add(self, more: Tensor) -> None:
        """Let these join."""
        for number, (site, metric) in enumerate(zip(self.sites, self.metrics, strict=True)):
            self.right[number] = torch.cat([self.right[number], metric.solve_inputs(site.activations[more])])
            self.left[number] = torch.cat([self.left[number], metric.solve_outputs(site.gradients[more])])
        for begin in range(0, len(more), _AT_ONCE):
            self._add_rows(more[begin : begin + _AT_ONCE])

    def _add_rows(self, strip: Tensor) -> None:
        # Of K only what no row has yet is computed, the rest mirrored.
        known, others = len(self.chosen), self._others()
        rows = self._rows[known : known + len(strip)]
        found = rows.new_zeros(len(strip), len(others))
        for site, left, right in zip(self.sites, self.left, self.right, strict=True):
            writes, reads = left[known : known + len(strip)], right[known : known + len(strip)]
            found += (reads @ site.activations[others].T).mul_(writes @ site.gradients[others].T)
        _check_finite(found)
        rows[:, others] = found
        rows[:, self.chosen] = self._rows[:known, strip].T
        own = rows[:, strip]
        rows[:, strip] = own.triu() + own.triu(1).T
        self.chosen = torch.cat([self.chosen, strip])

    def _others(self) -> Tensor:
        """The constraints that are not chosen."""
        apart = torch.ones(len(self.bounds), dtype=torch.bool, device=self.bounds.device)
        apart[self.chosen] = False
        return apart.nonzero()[:, 0]


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NumericalError("the edit's equations are not finite; the edit was rolled back.")


def complementary(kernel: Tensor, bounds: Tensor, *, yields: Tensor | float = 0.0, jitter: float = JITTER) -> Tensor:
    """lambda >= 0 with K lambda + y diag(K) lambda + b >= 0 and complementary slackness, in float64; K must be
    symmetric, `yields` is y.

    Block principal pivoting (Judice & Pires 1994; Kim & Park 2011): whole sets of variables change sides at
    once, single ones when that stops helping, so it ends after few Cholesky factorisations. The kernel is scaled to a
    unit diagonal first: its entries span many orders of magnitude.
    """
    return _multipliers(kernel, bounds, yields, jitter, bounds < 0)[0]


def _multipliers(
    kernel: Tensor, bounds: Tensor, yields: Tensor | float, jitter: float, passive: Tensor
) -> tuple[Tensor, float]:
    """`complementary`, and the condition of the last system that was solved. `passive` `[n]`: which are thought to
    press."""
    scale = kernel.diagonal().double().clamp(min=1e-30).rsqrt()
    matrix = kernel.double().mul_(scale[:, None]).mul_(scale)
    matrix.diagonal().add_(yields).add_(jitter)
    right = -bounds.double() * scale
    zero = -_ROUNDING * float(right.abs().amax()) if len(right) else 0.0
    fewest, patience = len(right) + 1, 3
    multipliers, condition = torch.zeros_like(right), 1.0
    for _ in range(_PIVOTS):
        multipliers, condition = _solve_on(matrix, right, passive)
        slack = matrix @ multipliers - right
        wrong = (passive & (multipliers < zero)) | (~passive & (slack < zero))
        count = int(wrong.sum())
        if count == 0:
            break
        if count < fewest:
            fewest, patience = count, 3
        elif patience > 0:
            patience -= 1
        else:
            # Murty's rule: exchanging only the last wrong one cannot cycle.
            last = int(wrong.nonzero()[-1])
            wrong = torch.zeros_like(wrong)
            wrong[last] = True
        passive = passive ^ wrong
    return multipliers.clamp(min=0) * scale, condition


def _solve_on(matrix: Tensor, right: Tensor, passive: Tensor) -> tuple[Tensor, float]:
    """The solution that is zero but on `passive`, and an estimate of the condition number there."""
    solution = torch.zeros_like(right)
    index = passive.nonzero()[:, 0]
    if not len(index):
        return solution, 1.0
    factor = _factor(matrix[index[:, None], index])
    solution[index] = torch.cholesky_solve(right[index, None], factor)[:, 0]
    diagonal = factor.diagonal()
    return solution, float((diagonal.max() / diagonal.min()) ** 2)


def _factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a matrix with unit diagonal, to which ever more is added, in place, while it fails."""
    for attempt in range(4):
        if attempt:
            matrix.diagonal().add_(JITTER * 10**attempt)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            chosen: Tensor = factor
            return chosen
    raise NumericalError("the edit's kernel is not positive definite; the edit was rolled back.")
