"""The price of an edit: Kronecker-factored second-order KL on retain text, as two metrics per site.

For an edit D of a site's output vectors, ordinary text is disturbed by about 1/2 tr(F D C D^T), where
C = E[a a^T] over the activations a into the site and F = E[g g^T] over the gradients g, at its write, of
log-probabilities of labels sampled from the model itself (Martens & Grosse 2015, arXiv 1503.05671). Knows no
protected text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from memscrub.errors import NumericalError
from memscrub.models.experts import Seen
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site
from memscrub.models.tokens import batches
from memscrub.models.trace import traced

RIDGE = 1e-2
# Tokens with gradients for each dimension of F: with four times as many the edit is 3% better, in twice the time
# (docs/lab-notes.md).
ENOUGH = 50
MOST_APART = 4
# Sums of products are symmetric: each of so many strips of their rows is computed up to its end only.
_STRIPS = 8

Features: TypeAlias = Callable[[Tensor], Tensor]


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
        return _solved(activations, self.inputs)

    def solve_outputs(self, gradients: Tensor) -> Tensor:
        """F^-1 g for each row of `[n, d]`."""
        return _solved(gradients, self.outputs) / self.weight

    def square_inputs(self, activations: Tensor) -> Tensor:
        """a^T C^-1 a for each row of `[n, f]`, in half the time of solving; zero for a closed site."""
        if self.closed:
            return activations.new_zeros(len(activations))
        return _half_solved(activations, self.inputs).square().sum(-1)

    def square_outputs(self, gradients: Tensor) -> Tensor:
        """g^T F^-1 g for each row of `[n, d]`."""
        return _half_solved(gradients, self.outputs).square().sum(-1) / self.weight

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
    features: Features | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Metric]:
    """Both metrics of every site, from one streaming pass over retain rows (each tensor `[rows, width]`).

    `features` makes this pass instead of `loaded`, where it should leave something for others.

    C counts every token. F, of fewer dimensions, is taken from a share of the batches that is enough for it
    (`graded`): gradients take most of the time. Memory is d^2 + f^2 floats per site, whatever the amount of
    text; the experts of one block share F. An expert that none of the text came to is closed. Raises NumericalError
    when they are not positive definite, which only NaN or infinite activations can cause.
    """
    sums: list[Moments] = []
    # Sampled on the CPU: the same seed must give the same labels on every device.
    generator = torch.Generator().manual_seed(seed)
    done = 0
    _ = loaded.projects  # `features` asks for it, found out by passes that are not to be traced
    pass_of = features or (lambda ids: loaded.features(ids)[0])
    for ids, wanted in graded(loaded, sites, retain, batch_tokens):
        ids = ids.to(loaded.device)
        gradients: list[Tensor] | None = None
        with traced(loaded, sites) as trace:
            if wanted:
                logits = loaded.unembed(pass_of(ids))
                gradients = trace.gradients_of(logits, sampled_gradient(logits.detach(), generator))[0]
            else:
                with torch.no_grad():
                    pass_of(ids)
        if not sums:
            assert gradients is not None
            sums = empty_moments(sites, trace.seen, gradients)
        for index, (site, moments) in enumerate(zip(sites, sums, strict=True)):
            moments.add_inputs(site.inputs(trace.seen[index].values))
            if gradients is not None:
                moments.add_outputs(site.outputs(gradients[index]).flatten(0, 1))
        done += len(ids)
        progress(done)
    count = max(1, sum(part.numel() for part in retain))
    return [moments.metric(site, count, ridge) for site, moments in zip(sites, sums, strict=True)]


def graded(
    loaded: LoadedModel, sites: Sequence[Site], retain: Sequence[Tensor], batch_tokens: int
) -> Iterator[tuple[Tensor, bool]]:
    """Batches of the retain rows, and whether gradients are taken of each: of every `step`-th of each part of the
    text, the first always, so that there are `ENOUGH` tokens with gradients for each dimension of F, or all."""
    count = sum(part.numel() for part in retain)
    width = max((_width(loaded, site) for site in sites), default=1)
    step = min(MOST_APART, max(1, count // (ENOUGH * width)))
    budget = loaded.batch_tokens(batch_tokens, gradients=True)
    for part in retain:
        for number, rows in enumerate(batches([part.shape[1]] * len(part), budget)):
            yield part[rows], number % step == 0


def _width(loaded: LoadedModel, site: Site) -> int:
    return loaded.weight(site).shape[0] if site.rows is None else len(site.rows)


@dataclass
class _Outer:
    """A running sum of g g^T over `[n, d]`, its lower triangle; how many they were, and in the end its factor."""

    total: Tensor
    count: int = 0
    factor: Tensor | None = None


@dataclass
class Moments:
    """Running sums of a a^T and g g^T of one site, their lower triangles; what is above is left undefined.

    `first`: the site that adds to, and factors, a shared `outputs`.
    """

    inputs: Tensor
    outputs: _Outer
    first: bool

    def add_inputs(self, activations: Tensor) -> None:
        """Count these activations `[m, f]`."""
        _add_products(self.inputs, activations.float())

    def add_outputs(self, gradients: Tensor) -> None:
        """Count these gradients `[n, d]`."""
        if self.first:
            _add_products(self.outputs.total, gradients.float())
            self.outputs.count += len(gradients)

    def metric(self, site: Site, count: int, ridge: float) -> Metric:
        """The metric of the site, over `count` tokens; uses the sums up. Raises NumericalError as
        `measure_disturbance` does."""
        if self.outputs.factor is None:
            self.outputs.factor = _factor(self.outputs.total.div_(max(1, self.outputs.count)), ridge, site)
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


def sampled_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of log p(label) by the logits `[batch, length, vocabulary]`, for a label sampled from p at every
    position: one at the label, less p. Labels are drawn by the inverse of the CDF."""
    p = logits.softmax(-1)
    uniform = torch.rand(*p.shape[:-1], 1, generator=generator).to(p.device)
    cumulative = p.cumsum(-1)
    labels = torch.searchsorted(cumulative, uniform * cumulative[..., -1:]).clamp(max=p.shape[-1] - 1)
    return p.neg_().scatter_add_(-1, labels, torch.ones_like(uniform))


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of rows^T rows to `total` `[d, d]`, in strips: at eight, nine sixteenths of the whole."""
    begin = 0
    for part in rows.tensor_split(_STRIPS, dim=1):
        end = begin + part.shape[1]
        total[begin:end, :end].addmm_(part.T, rows[:, :end])
        begin = end


def _solved(rows: Tensor, factor: Tensor) -> Tensor:
    """(L L^T)^-1 r for each row of `[n, k]`."""
    transposed = _transposed(factor)
    half = torch.linalg.solve_triangular(transposed, rows, upper=True, left=False)
    whole: Tensor = torch.linalg.solve_triangular(transposed.T, half, upper=False, left=False)
    return whole


def _half_solved(rows: Tensor, factor: Tensor) -> Tensor:
    """L^-1 r for each row of `[n, k]`. Rows solved from the right, as they lie in memory, take two thirds of the time
    that columns do."""
    half: Tensor = torch.linalg.solve_triangular(_transposed(factor), rows, upper=True, left=False)
    return half


def _transposed(factor: Tensor) -> Tensor:
    """L^T, its rows one after the other, as a decomposition leaves it; one from a file lies the other way, and should
    give the same bits."""
    return factor.T.contiguous()


def _factor(moment: Tensor, ridge: float, site: Site) -> Tensor:
    """The Cholesky factor of a moment, read below its diagonal, with its ridge, which is added in place: large ones
    fill the memory."""
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
