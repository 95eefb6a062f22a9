"""The price of an edit: Kronecker-factored second-order KL on retain text, as two metrics per site.

For an edit D of a site's output vectors, ordinary text is disturbed by about 1/2 tr(F D C D^T), where
C = E[a a^T] over the activations a into the site and F = E[g g^T] over the gradients g, at its write, of
log-probabilities of labels sampled from the model itself (Martens & Grosse 2015, arXiv 1503.05671). Knows no
protected text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from memscrub.errors import NumericalError
from memscrub.models.experts import Seen
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site
from memscrub.models.tokens import batches
from memscrub.models.trace import traced

RIDGE = 1e-2


@dataclass(frozen=True)
class Metric:
    """Cholesky factors of the two metrics of one site: of C `[f, f]` and of F `[d, d]`, ridge included;
    f and d count editable columns and rows only. `weight` multiplies the price.

    With `inputs` all zero the site is closed: nothing is known of what an edit there costs, so none is made.
    """

    inputs: Tensor = field(repr=False)
    outputs: Tensor = field(repr=False)
    weight: float = 1.0

    @cached_property
    def closed(self) -> bool:
        """Whether the site must stay as it is."""
        return not bool(self.inputs.any())

    def solve_inputs(self, activations: Tensor) -> Tensor:
        """C^-1 a for each row of `[n, f]`; zero for a closed site."""
        if self.closed:
            return torch.zeros_like(activations)
        return torch.cholesky_solve(activations.T, self.inputs).T

    def solve_outputs(self, gradients: Tensor) -> Tensor:
        """F^-1 g for each row of `[n, d]`."""
        return torch.cholesky_solve(gradients.T, self.outputs).T / self.weight

    def scaled(self, factor: float) -> Metric:
        """The same metric at `factor` times the price."""
        return replace(self, weight=self.weight * factor)

    def price(self, part: Tensor) -> float:
        """The predicted disturbance 1/2 tr(F D C D^T) of an edit `[d, f]` of the site's editable part."""
        return 0.5 * self.weight * float((self.outputs.T @ part @ self.inputs).square().sum())


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

    Memory is d^2 + f^2 floats per site, whatever the amount of text; the experts of one block share F. An expert
    that none of the text came to is closed. Raises NumericalError when they are not
    positive definite, which only NaN or infinite activations can cause.
    """
    sums: list[Moments] = []
    # Sampled on the CPU: the same seed must give the same labels on every device.
    generator = torch.Generator().manual_seed(seed)
    done = 0
    budget = loaded.batch_tokens(batch_tokens, gradients=True)
    for ids in (part[rows] for part in retain for rows in batches([part.shape[1]] * len(part), budget)):
        ids = ids.to(loaded.device)
        with traced(loaded, sites) as trace:
            log_p = loaded.logits(ids).log_softmax(-1)
            labels = sample_labels(log_p.detach(), generator)
            gradients = trace.gradients(log_p.gather(-1, labels).sum())
        if not sums:
            sums = empty_moments(sites, trace.seen, gradients)
        for site, moments, seen, gradient in zip(sites, sums, trace.seen, gradients, strict=True):
            moments.add(site.inputs(seen.values), site.outputs(gradient).flatten(0, 1))
        done += len(ids)
        progress(done)
    count = max(1, sum(part.numel() for part in retain))
    return [moments.metric(site, count, ridge) for site, moments in zip(sites, sums, strict=True)]


@dataclass
class _Outer:
    """A running sum of g g^T over `[n, d]`, and in the end its factor."""

    total: Tensor
    factor: Tensor | None = None


@dataclass
class Moments:
    """Running sums of a a^T and g g^T of one site. `first`: the site that adds to, and factors, a shared `outputs`."""

    inputs: Tensor
    outputs: _Outer
    first: bool

    def add(self, activations: Tensor, gradients: Tensor) -> None:
        """Count these activations `[m, f]` and gradients `[n, d]`."""
        a = activations.float()
        self.inputs.addmm_(a.T, a)
        if self.first:
            g = gradients.float()
            self.outputs.total.addmm_(g.T, g)

    def metric(self, site: Site, count: int, ridge: float) -> Metric:
        """The metric of the site, over `count` tokens; uses the sums up. Raises NumericalError as
        `measure_disturbance` does."""
        if self.outputs.factor is None:
            self.outputs.factor = _factor(self.outputs.total.div_(count), ridge, site)
        unseen = site.expert is not None and not bool(self.inputs.any())
        inputs = self.inputs if unseen else _factor(self.inputs.div_(count), ridge, site)
        return Metric(inputs, self.outputs.factor)


def empty_moments(sites: Sequence[Site], seen: Sequence[Seen], gradients: Sequence[Tensor]) -> list[Moments]:
    """Sums of nothing yet, as large as what the sites saw and the gradients at them ask for."""
    shared: dict[tuple[str, tuple[int, ...] | None], _Outer] = {}
    found = []
    for site, each, gradient in zip(sites, seen, gradients, strict=True):
        key = (site.module, site.rows)
        first = key not in shared
        f, d = site.inputs(each.values).shape[-1], site.outputs(gradient).shape[-1]
        if first:
            shared[key] = _Outer(gradient.new_zeros(d, d, dtype=torch.float32))
        found.append(Moments(each.values.new_zeros(f, f, dtype=torch.float32), shared[key], first))
    return found


def sample_labels(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """One token per position from `[batch, length, vocabulary]`, by the Gumbel-free inverse of the CDF."""
    uniform = torch.rand(*log_p.shape[:-1], 1, generator=generator).to(log_p.device)
    cumulative: Tensor = log_p.exp().cumsum(-1)
    drawn: Tensor = torch.searchsorted(cumulative, uniform * cumulative[..., -1:])
    last = torch.tensor(log_p.shape[-1] - 1, device=log_p.device)
    return torch.minimum(drawn, last)


def _factor(moment: Tensor, ridge: float, site: Site) -> Tensor:
    """The Cholesky factor of a moment with its ridge, which is added in place: large ones fill the memory."""
    scale = float(moment.diagonal().mean())
    # A site that is never active costs nothing; one keeps the factor well-defined and the edit away from it.
    moment.diagonal().add_(ridge * scale if scale > 0 else 1.0)
    factor, failed = torch.linalg.cholesky_ex(moment)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise NumericalError(
            f"the retain statistics of '{site.name}' are not positive definite; the checkpoint's activations are"
            " not finite on the retain text."
        )
    chosen: Tensor = factor
    return chosen
