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
# The kernel is computed in so many blocks of rows, each from its diagonal on.
_BLOCKS = 8


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

    Time n^2 (f + d) + n^3 per site and n^2 memory for the kernel. Raises NumericalError when the constraints
    are not finite.
    """
    right = [metric.solve_inputs(site.activations) for site, metric in zip(sites, metrics, strict=True)]
    left = [metric.solve_outputs(site.gradients) for site, metric in zip(sites, metrics, strict=True)]
    kernel = _kernel(sites, left, right, bounds)
    if not bool(torch.isfinite(kernel).all()) or not bool(torch.isfinite(bounds).all()):
        raise NumericalError("the edit's equations are not finite; the edit was rolled back.")
    multipliers, condition = _multipliers(kernel, bounds, yields, JITTER)
    pressing = multipliers > 0
    weights = -multipliers[pressing].float()
    return Solution(
        left=[weights[:, None] * writes[pressing] for writes in left],
        right=[reads[pressing] for reads in right],
        cost=float(0.5 * multipliers @ (kernel.double() @ multipliers)),
        active=int(pressing.sum()),
        condition=condition,
    )


def _kernel(sites: Sequence[Linearised], left: Sequence[Tensor], right: Sequence[Tensor], bounds: Tensor) -> Tensor:
    """K `[n, n]`, symmetric to the bit: what lies below its diagonal blocks is not computed but mirrored."""
    count = len(bounds)
    kernel = torch.zeros(count, count, dtype=torch.float32, device=bounds.device)
    size = max(1, -(-count // _BLOCKS))
    for site, writes, reads in zip(sites, left, right, strict=True):
        for begin in range(0, count, size):
            rows = slice(begin, begin + size)
            products = site.activations[rows] @ reads[begin:].T
            kernel[rows, begin:] += products.mul_(site.gradients[rows] @ writes[begin:].T)
    return kernel.triu() + kernel.triu(1).T


def complementary(kernel: Tensor, bounds: Tensor, *, yields: Tensor | float = 0.0, jitter: float = JITTER) -> Tensor:
    """lambda >= 0 with K lambda + y diag(K) lambda + b >= 0 and complementary slackness, in float64; K must be
    symmetric, `yields` is y.

    Block principal pivoting (Judice & Pires 1994; Kim & Park 2011): whole sets of variables change sides at
    once, single ones when that stops helping, so it ends after few Cholesky factorisations. The kernel is scaled to a
    unit diagonal first: its entries span many orders of magnitude.
    """
    return _multipliers(kernel, bounds, yields, jitter)[0]


def _multipliers(kernel: Tensor, bounds: Tensor, yields: Tensor | float, jitter: float) -> tuple[Tensor, float]:
    """`complementary`, and the condition of the last system that was solved."""
    scale = kernel.diagonal().double().clamp(min=1e-30).rsqrt()
    matrix = kernel.double() * scale[:, None] * scale[None, :]
    matrix.diagonal().add_(yields).add_(jitter)
    right = -bounds.double() * scale
    zero = -_ROUNDING * float(right.abs().amax()) if len(right) else 0.0
    passive = right > 0
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
    factor = _factor(matrix[index][:, index])
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
