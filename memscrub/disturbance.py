"""The price of an edit: Kronecker-factored second-order KL on retain text, as two metrics per site.

For an edit D of a site's output vectors, ordinary text is disturbed by about 1/2 tr(F D C D^T), where
C = E[a a^T] over the activations a into the site and F = E[g g^T] over the gradients g, at its write, of
log-probabilities of labels sampled from the model itself (Martens & Grosse 2015, arXiv 1503.05671). Knows no
protected text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memscrub.errors import NumericalError
from memscrub.model import LoadedModel
from memscrub.sites import Site
from memscrub.tokens import batches
from memscrub.trace import traced

RIDGE = 1e-2


@dataclass(frozen=True)
class Metric:
    """Cholesky factors of the two metrics of one site: of C `[f, f]` and of F `[d, d]`, ridge included;
    f and d count editable columns and rows only."""

    inputs: Tensor = field(repr=False)
    outputs: Tensor = field(repr=False)

    def solve_inputs(self, activations: Tensor) -> Tensor:
        """C^-1 a for each row of `[n, f]`."""
        return torch.cholesky_solve(activations.T, self.inputs).T

    def solve_outputs(self, gradients: Tensor) -> Tensor:
        """F^-1 g for each row of `[n, d]`."""
        return torch.cholesky_solve(gradients.T, self.outputs).T

    def scaled(self, factor: float) -> Metric:
        """The same metric at `factor` times the price."""
        return Metric(self.inputs, self.outputs * math.sqrt(factor))

    def price(self, part: Tensor) -> float:
        """The predicted disturbance 1/2 tr(F D C D^T) of an edit `[d, f]` of the site's editable part."""
        return 0.5 * float((self.outputs.T @ part @ self.inputs).square().sum())


def measure_disturbance(
    loaded: LoadedModel,
    sites: Sequence[Site],
    retain: Sequence[Tensor],
    *,
    seed: int,
    ridge: float = RIDGE,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Metric]:
    """Both metrics of every site, from one streaming pass over retain rows (each tensor `[rows, width]`).

    Memory is d^2 + f^2 floats per site, whatever the amount of text. Raises NumericalError when they are not
    positive definite, which only NaN or infinite activations can cause.
    """
    sums: list[tuple[Tensor, Tensor]] = []
    # Sampled on the CPU: the same seed must give the same labels on every device.
    generator = torch.Generator().manual_seed(seed)
    done = 0
    budget = loaded.batch_tokens(batch_tokens, gradients=True)
    for ids in (part[rows] for part in retain for rows in batches([part.shape[1]] * len(part), budget)):
        ids = ids.to(loaded.device)
        with traced(loaded, sites) as trace:
            log_p = loaded.logits(ids).log_softmax(-1)
            labels = _sample(log_p.detach(), generator)
            gradients = torch.autograd.grad(log_p.gather(-1, labels).sum(), trace.writes)
        inputs = [site.inputs(a) for site, a in zip(sites, trace.activations, strict=True)]
        outputs = [site.outputs(g) for site, g in zip(sites, gradients, strict=True)]
        if not sums:
            sums = [
                (a.new_zeros(a.shape[-1], a.shape[-1], dtype=torch.float32),
                 g.new_zeros(g.shape[-1], g.shape[-1], dtype=torch.float32))
                for a, g in zip(inputs, outputs, strict=True)
            ]  # fmt: skip
        for (c, f), a, g in zip(sums, inputs, outputs, strict=True):
            a, g = a.flatten(0, 1).float(), g.flatten(0, 1).float()
            c.addmm_(a.T, a)
            f.addmm_(g.T, g)
        done += len(ids)
        progress(done)
    count = max(1, sum(part.numel() for part in retain))
    return [
        Metric(_factor(c / count, ridge, site), _factor(f / count, ridge, site))
        for site, (c, f) in zip(sites, sums, strict=True)
    ]


def _sample(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """One token per position from `[batch, length, vocabulary]`, by the Gumbel-free inverse of the CDF."""
    uniform = torch.rand(*log_p.shape[:-1], 1, generator=generator).to(log_p.device)
    cumulative: Tensor = log_p.exp().cumsum(-1)
    drawn: Tensor = torch.searchsorted(cumulative, uniform * cumulative[..., -1:])
    last = torch.tensor(log_p.shape[-1] - 1, device=log_p.device)
    return torch.minimum(drawn, last)


def _factor(moment: Tensor, ridge: float, site: Site) -> Tensor:
    scale = float(moment.diagonal().mean())
    # A site that is never active costs nothing; one keeps the factor well-defined and the edit away from it.
    damped = moment + (ridge * scale if scale > 0 else 1.0) * torch.eye(len(moment), device=moment.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise NumericalError(
            f"the retain statistics of '{site.name}' are not positive definite; the checkpoint's activations are"
            " not finite on the retain text."
        )
    chosen: Tensor = factor
    return chosen
