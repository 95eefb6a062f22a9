"""Which MLP neurons write a token: those whose write lies along the residual stream and that rank the token high.

In the manner of arXiv 2606.18767, reconstructed from public summaries: contribution by L1 proximity (Ferrando &
Voita 2024, arXiv 2403.00824), then a filter by the token's rank in what the neuron's output vector says to the
vocabulary. Gradient-free: one forward pass per text. Knows no policy and changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memscrub.errors import UsageError
from memscrub.measures.extraction import largest
from memscrub.models.experts import seen_by
from memscrub.models.model import LoadedModel
from memscrub.models.readout import entry_gain, readout
from memscrub.models.sites import Site

# A neuron that takes the stream further from where it ends up contributes this much and no less.
EPSILON = 1e-6
# No temporary is larger than this many floats (16 MiB), whatever the model.
TEMPORARY = 2**22
# Neurons are looked up in the vocabulary this many at a time, best contribution first, until enough were found.
SLAB = 256


@dataclass(frozen=True)
class Neuron:
    """One located neuron: `site` indexes the sites it was located in, `column` the site's output vectors.

    `activation` is the coefficient with which the output vector enters the residual stream.
    """

    site: int
    column: int
    activation: float
    contribution: float


@dataclass(frozen=True)
class Observation:
    """One forward pass over one text of T tokens.

    `activations[i]` `[T, f]` and `residuals[i]` `[T, d]` (behind the block) belong to the i-th observed site;
    `logits` is `[T, vocabulary]`. All float32.
    """

    activations: tuple[Tensor, ...] = field(repr=False)
    residuals: tuple[Tensor, ...] = field(repr=False)
    logits: Tensor = field(repr=False)


def contributions(residual: Tensor, activations: Tensor, vectors: Tensor, gain: Tensor | None = None) -> Tensor:
    """max(|y|_1 - |y - a_i v_i|_1, EPSILON) per position and neuron, `[n, f]`.

    `residual` y is `[n, d]`, `activations` `[n, f]`, `vectors` `[d, f]`; `gain` `[d]` is what the vectors are
    multiplied with on their way into the stream. Works through the neurons in pieces: nothing of size n f d.
    """
    whole = residual.abs().sum(-1, keepdim=True)
    size = max(1, TEMPORARY // residual.numel())
    parts = []
    for begin in range(0, vectors.shape[1], size):
        piece = _entering(vectors[:, begin : begin + size], gain)
        without = torch.addcmul(residual[:, None], activations[:, begin : begin + size, None], piece.T, value=-1)
        parts.append(whole - without.abs_().sum(-1))
    return torch.cat(parts, dim=1).clamp(min=EPSILON)


def rank_bounds(projections: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-th largest and the rank-th smallest entry of each column of `[vocabulary, n]`, each `[n]`.

    A token is among the top `rank` of a column exactly when its entry is not below the first, whatever the token;
    so one look at the vocabulary serves all tokens.
    """
    columns = projections.T.contiguous()
    rank = min(rank, columns.shape[1])
    return largest(columns, rank)[0][:, -1], -largest(-columns, rank)[0][:, -1]


def ranked(activations: Tensor, own: Tensor, top: Tensor, bottom: Tensor) -> Tensor:
    """Which neurons rank a token in the top (activation > 0) or the bottom (activation < 0), `[n]` of bool.

    `own` is what each output vector says to the token, `top` and `bottom` are its `rank_bounds`. Ties count as
    inside, also those that only rounding breaks.
    """
    slack = 1e-5 * (top - bottom).abs()
    return ((activations > 0) & (own >= top - slack)) | ((activations < 0) & (own <= bottom + slack))


class Locator:
    """Locates neurons at the MLP sites of a model; remembers what their output vectors say to the vocabulary.

    Indices of sites are those of `sites`, of which only the MLP's are looked at. Whoever changes output vectors
    tells it (`forget`). Raises ArchitectureError as `readout` does, UsageError when there is no MLP site.
    """

    def __init__(self, loaded: LoadedModel, sites: Sequence[Site], rank: int) -> None:
        self.loaded, self.rank = loaded, rank
        self.readout = readout(loaded)
        self.indices = tuple(index for index, site in enumerate(sites) if site.kind == "mlp")
        if not self.indices:
            raise UsageError("the per-text solver edits output vectors of MLPs, and none was given to it.")
        self.sites = tuple(sites[index] for index in self.indices)
        self.gains = tuple(entry_gain(loaded, site) for site in self.sites)
        sizes = [loaded.weight(site).shape[1] for site in self.sites]
        self._starts = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
        # What is not known yet is NaN. Neurons of all sites stand one after the other.
        self._top, self._bottom = (torch.full((self._starts[-1],), torch.nan, device=loaded.device) for _ in "tb")
        self._allowed = torch.cat([_allowed(site, size) for site, size in zip(self.sites, sizes, strict=True)])
        self._allowed = self._allowed.to(loaded.device)

    def direction(self, site: int, token: int) -> Tensor:
        """The vector u `[d]` for which u·v is what an output vector v of this site says to the token."""
        gain, seen = self.gains[self.indices.index(site)], self.readout.direction(token)
        return seen if gain is None else seen * gain

    def observe(self, tokens: Sequence[int]) -> Observation:
        """One forward pass over one text."""
        return observe(self.loaded, self.sites, tokens)

    def forget(self, site: int, columns: Sequence[int]) -> None:
        """These output vectors have changed."""
        places = (
            torch.tensor(columns, dtype=torch.long, device=self._top.device) + self._starts[self.indices.index(site)]
        )
        self._top[places] = torch.nan

    def locate(
        self, seen: Observation, positions: Sequence[int], tokens: Sequence[int], count: int
    ) -> list[tuple[Neuron, ...]]:
        """The (at most) `count` neurons that contribute most at each position, of those that rank its token high.

        `positions` index the observed text, `tokens` are what should come next there. Best contribution first;
        of equals, the earlier site and column.
        """
        rows = list(positions)
        scored = [
            contributions(residuals[rows], activations[rows], self.loaded.weight(site), gain)
            for site, residuals, activations, gain in zip(
                self.sites, seen.residuals, seen.activations, self.gains, strict=True
            )
        ]
        scores = torch.cat(scored, dim=1)
        activations = torch.cat([values[rows] for values in seen.activations], dim=1)
        return [self._best(scores[row], activations[row], token, count) for row, token in enumerate(tokens)]

    def _best(self, scores: Tensor, activations: Tensor, token: int, count: int) -> tuple[Neuron, ...]:
        candidates = (self._allowed & (activations != 0)).nonzero()[:, 0]
        order = candidates[scores[candidates].sort(descending=True, stable=True).indices]
        direction = self.readout.direction(token)
        found: list[Neuron] = []
        for slab in torch.split(order, SLAB):
            writes = self._writes(slab)
            self._look_up(slab, writes)
            kept = ranked(activations[slab], direction @ writes, self._top[slab], self._bottom[slab])
            for place in slab[kept][: count - len(found)].tolist():
                number = sum(place >= start for start in self._starts[1:])
                column, site = place - self._starts[number], self.indices[number]
                found.append(Neuron(site, column, float(activations[place]), float(scores[place])))
            if len(found) == count:
                break
        return tuple(found)

    def _look_up(self, places: Tensor, writes: Tensor) -> None:
        """Fill in the bounds of these neurons where they are not known."""
        unknown = self._top[places].isnan().nonzero()[:, 0]
        for some in torch.split(unknown, max(1, TEMPORARY // len(self.readout.rows))):
            if len(some):
                bounds = rank_bounds(self.readout.projections(writes[:, some]), self.rank)
                self._top[places[some]], self._bottom[places[some]] = bounds

    def _writes(self, places: Tensor) -> Tensor:
        """The output vectors of these neurons as they enter the residual stream, `[d, n]` float32."""
        writes = torch.empty(len(self.readout.gain), len(places), device=places.device)
        for number, (site, gain) in enumerate(zip(self.sites, self.gains, strict=True)):
            inside = (places >= self._starts[number]) & (places < self._starts[number + 1])
            columns = places[inside] - self._starts[number]
            writes[:, inside] = _entering(self.loaded.weight(site)[:, columns], gain)
        return writes


@torch.no_grad()
def observe(loaded: LoadedModel, sites: Sequence[Site], tokens: Sequence[int]) -> Observation:
    """One forward pass over one text: what goes into these MLP sites and what their blocks leave behind.

    Where a norm stands between site and stream, its division by the size of the write is counted towards the
    activations, and so is a gate behind a shared expert: activation times (gained) output vector is what enters
    the stream.
    """
    ids = torch.tensor([list(tokens)], device=loaded.device)
    with _recorded(loaded, sites, len(tokens)) as record:
        (logits,) = loaded.logits(ids)
    activations = []
    for site, inputs, write in zip(sites, record.inputs, record.writes, strict=True):
        if site.layer in record.gates and site.expert is None:
            inputs = inputs * record.gates[site.layer]
        if loaded.family.after_mlp is not None:
            inputs = inputs * write.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        activations.append(inputs)
    return Observation(tuple(activations), tuple(record.residuals), logits)


@dataclass
class _Record:
    """What one forward pass left at each site, `[T, f]`, `[T, d]` and `[T, d]`, float32."""

    inputs: list[Tensor]
    writes: list[Tensor]
    residuals: list[Tensor]
    length: int
    gates: dict[int, Tensor] = field(
        default_factory=dict
    )  # by layer: what its shared expert's write is multiplied with


@contextlib.contextmanager
def _recorded(loaded: LoadedModel, sites: Sequence[Site], length: int) -> Iterator[_Record]:
    """Record the sites and their blocks in a forward pass of one text of that length; hooks are always removed."""
    inputs, writes, residuals = ([torch.empty(0)] * len(sites) for _ in range(3))
    record = _Record(inputs, writes, residuals, length)
    handles = []
    try:
        for index, site in enumerate(sites):
            block = f"{loaded.family.blocks}.{site.layer}"
            module = loaded.model.get_submodule(site.module)
            handles.append(module.register_forward_hook(_site_hook(loaded, site, record, index), with_kwargs=True))
            handles.append(loaded.model.get_submodule(block).register_forward_hook(_block_hook(record, index)))
            experts = loaded.family.experts
            if experts is not None and experts.shared_gate is not None and site.name == f"{block}.{experts.shared}":
                gate = loaded.model.get_submodule(f"{block}.{experts.shared_gate}")
                handles.append(gate.register_forward_hook(_gate_hook(record, site.layer)))
        yield record
    finally:
        for handle in handles:
            handle.remove()


Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor | tuple[Tensor, ...]], None]
NamedHook = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any], Tensor], None]


def _site_hook(loaded: LoadedModel, site: Site, record: _Record, index: int) -> NamedHook:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Tensor) -> None:
        # Some families flatten batch and length; there is one text only.
        record.writes[index] = output.detach().float().flatten(0, -2)
        if site.expert is None or loaded.family.experts is None:
            record.inputs[index] = inputs[0].detach().float().flatten(0, -2)
            return
        (seen,) = seen_by(module, loaded.family.experts, [site.expert], inputs, named)
        record.inputs[index] = seen.dense(record.length).float()

    return hook


def _gate_hook(record: _Record, layer: int) -> Hook:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        assert isinstance(output, Tensor)
        record.gates[layer] = output.detach().float().sigmoid().flatten(0, -2)

    return hook


def _block_hook(record: _Record, index: int) -> Hook:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        # Some families return the attention's weights, too.
        stream = output if isinstance(output, Tensor) else output[0]
        record.residuals[index] = stream.detach().float().flatten(0, -2)

    return hook


def _allowed(site: Site, size: int) -> Tensor:
    """Which of the site's output vectors may be edited, `[f]` of bool."""
    if site.columns is None:
        return torch.ones(size, dtype=torch.bool)
    allowed = torch.zeros(size, dtype=torch.bool)
    allowed[list(site.columns)] = True
    return allowed


def _entering(vectors: Tensor, gain: Tensor | None) -> Tensor:
    """Output vectors `[d, n]` as they enter the residual stream."""
    return vectors.float() if gain is None else vectors.float() * gain[:, None]
