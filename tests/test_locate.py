"""Locating neurons: each formula against the loop it stands for, and what is read against what the model does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import FAMILIES, hooks, ids_of, opened, random_text, tiny_checkpoint
from torch import Tensor

import memscrub.edit.locate
from memscrub.edit.locate import EPSILON, Locator, Neuron, contributions, observe, rank_bounds, ranked
from memscrub.errors import ArchitectureError, UsageError
from memscrub.models.architecture import Gain
from memscrub.models.model import LoadedModel
from memscrub.models.readout import readout
from memscrub.models.site_finding import sites_of
from memscrub.models.sites import Site

TOKENS = tuple(ids_of(random_text(5, 12)))


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=2))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama", seed=2))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the formulas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temporary", [1, 1000, 2**22])
@pytest.mark.parametrize("gained", [False, True])
def test_contributions_are_those_of_the_loop_whatever_the_piece(
    monkeypatch: pytest.MonkeyPatch, temporary: int, gained: bool
) -> None:
    monkeypatch.setattr(memscrub.edit.locate, "TEMPORARY", temporary)
    residual, activations, vectors = random(3, 16), random(3, 40, seed=1), random(16, 40, seed=2)
    gain = random(16, seed=3) if gained else None
    found = contributions(residual, activations, vectors, gain)
    for row in range(3):
        for column in range(40):
            write = activations[row, column] * vectors[:, column] * (1.0 if gain is None else gain)
            closer = residual[row].abs().sum() - (residual[row] - write).abs().sum()
            assert float(found[row, column]) == pytest.approx(max(float(closer), EPSILON), rel=1e-4, abs=1e-4)
    assert float(found.min()) == pytest.approx(EPSILON)


@pytest.mark.parametrize("rank", [1, 7, 200])
def test_the_rank_filter_is_that_of_sorting_the_vocabulary(rank: int) -> None:
    projections, activations = random(90, 300), random(300, seed=1)
    activations[:10] = 0.0
    top, bottom = rank_bounds(projections, rank)
    for token in (0, 41, 89):
        own = projections[token]
        above, below = (projections > own).sum(0), (projections < own).sum(0)
        expected = ((activations > 0) & (above < rank)) | ((activations < 0) & (below < rank))
        assert torch.equal(ranked(activations, own, top, bottom), expected)


def test_ties_are_inside_the_rank() -> None:
    projections = torch.tensor([[3.0], [2.0], [2.0], [1.0]])
    top, bottom = rank_bounds(projections, 2)
    positive, negative = torch.tensor([1.0]), torch.tensor([-1.0])
    inside = [bool(ranked(positive, own, top, bottom)) for own in projections]
    assert inside == [True, True, True, False]
    assert [bool(ranked(negative, own, top, bottom)) for own in projections] == [False, True, True, True]


# -- against the model ----------------------------------------------------------------------------------------


def brute_force(
    loaded: LoadedModel, sites: tuple[Site, ...], position: int, token: int, rank: int, count: int
) -> list[tuple[int, int]]:
    """Site and column of the best neurons, straight from the definition."""
    mlp = [site for site in sites if site.kind == "mlp"]
    seen, seeing = observe(loaded, mlp, TOKENS), readout(loaded)
    rows = seeing.rows * seeing.gain
    if seeing.centred:
        rows = rows - rows.mean(1, keepdim=True)
    scored = []
    for site, inputs, residuals in zip(mlp, seen.activations, seen.residuals, strict=True):
        for column in range(inputs.shape[1]) if site.columns is None else site.columns:
            a, v, y = inputs[position, column], loaded.weight(site)[:, column], residuals[position]
            said = rows @ v
            place = int((said > said[token]).sum() if a > 0 else (said < said[token]).sum())
            if place < rank:
                score = max(float(y.abs().sum() - (y - a * v).abs().sum()), EPSILON)
                scored.append((-score, sites.index(site), column))
    return [(site, column) for _, site, column in sorted(scored)[:count]]


@pytest.mark.parametrize("slab", [3, 256])
def test_located_neurons_are_those_of_the_definition(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, slab: int
) -> None:
    monkeypatch.setattr(memscrub.edit.locate, "SLAB", slab)
    sites = sites_of(loaded, kinds=("attention", "mlp"))  # the MLP's sites are not the first ones
    locator = Locator(loaded, sites, rank=9)
    positions, tokens = [2, 7, 7], [TOKENS[3], TOKENS[8], 50]
    found = locator.locate(locator.observe(TOKENS), positions, tokens, 6)
    for position, token, neurons in zip(positions, tokens, found, strict=True):
        expected = brute_force(loaded, sites, position, token, 9, 6)
        assert [(neuron.site, neuron.column) for neuron in neurons] == expected
        assert len(expected) == 6
        assert sorted((n.contribution for n in neurons), reverse=True) == [n.contribution for n in neurons]
    assert all(isinstance(neuron, Neuron) for neuron in found[0])


def test_only_the_columns_a_site_allows_are_located(loaded: LoadedModel) -> None:
    first, second = sites_of(loaded, kinds=("mlp",))
    sites = (replace(first, columns=(3, 5, 8)), replace(second, columns=()))
    locator = Locator(loaded, sites, rank=100)
    ((neurons),) = locator.locate(locator.observe(TOKENS), [4], [TOKENS[5]], 10)
    assert {(neuron.site, neuron.column) for neuron in neurons} <= {(0, 3), (0, 5), (0, 8)}
    assert neurons


def test_what_is_remembered_of_the_vocabulary_is_not_computed_again(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = sites_of(llama, kinds=("mlp",))
    locator = Locator(llama, sites, rank=5)
    seen, calls = locator.observe(TOKENS), []
    real = memscrub.edit.locate.rank_bounds

    def counted(projections: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        calls.append(projections.shape[1])
        return real(projections, rank)

    monkeypatch.setattr(memscrub.edit.locate, "rank_bounds", counted)
    everything = 2 * llama.weight(sites[0]).shape[1]
    locator.locate(seen, list(range(11)), TOKENS[1:], everything)
    assert sum(calls) == everything
    locator.forget(1, [4, 6])
    locator.locate(seen, [3], [TOKENS[4]], everything)
    assert sum(calls) == everything + 2


def test_a_changed_output_vector_is_seen_once_the_locator_forgets_it(llama: LoadedModel) -> None:
    sites = sites_of(llama, kinds=("mlp",))
    locator = Locator(llama, sites, rank=3)
    seen = locator.observe(TOKENS)
    everything = 2 * llama.weight(sites[0]).shape[1]
    ((before),) = locator.locate(seen, [4], [TOKENS[5]], everything)
    kept = llama.weight(sites[0]).clone()
    outside = next(c for c in range(48) if (0, c) not in {(n.site, n.column) for n in before})
    try:
        sign = seen.activations[0][4, outside].sign()
        llama.weight(sites[0])[:, outside] = sign * locator.direction(0, TOKENS[5])
        locator.forget(0, [outside])
        ((after),) = locator.locate(seen, [4], [TOKENS[5]], everything)
    finally:
        llama.weight(sites[0]).copy_(kept)
    assert (0, outside) in {(neuron.site, neuron.column) for neuron in after}


def test_the_residual_stream_is_what_the_final_norm_reads(loaded: LoadedModel) -> None:
    sites = sites_of(loaded, kinds=("mlp",))
    seen = observe(loaded, sites, TOKENS)
    assert loaded.family.norm is not None
    norm = loaded.model.get_submodule(loaded.family.norm.path)
    with torch.no_grad():
        logits = loaded.model.get_output_embeddings()(norm(seen.residuals[-1]))  # type: ignore[operator]
    torch.testing.assert_close(logits, seen.logits, atol=1e-4, rtol=1e-4)
    assert seen.activations[0].shape == (len(TOKENS), loaded.weight(sites[0]).shape[1])


def test_what_a_write_says_moves_the_logits_that_way(loaded: LoadedModel) -> None:
    seeing = readout(loaded)
    assert loaded.family.norm is not None
    norm = loaded.model.get_submodule(loaded.family.norm.path)
    stream = 10 * random(len(seeing.gain), 4)
    with torch.no_grad():
        there, back = (loaded.model.get_output_embeddings()(norm(x.T)) for x in (stream, -stream))  # type: ignore[operator]
    size = (stream - stream.mean(0) if seeing.centred else stream).square().mean(0).sqrt()
    torch.testing.assert_close((there - back).T * size / 2, seeing.projections(stream), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(seeing.direction(7) @ stream, seeing.projections(stream)[7], atol=1e-4, rtol=1e-4)


# -- what cannot be located -----------------------------------------------------------------------------------


def test_hooks_are_removed_also_when_the_pass_fails(loaded: LoadedModel) -> None:
    sites, before = sites_of(loaded, kinds=("mlp",)), hooks(loaded)
    observe(loaded, sites, TOKENS)
    assert hooks(loaded) == before
    with pytest.raises(IndexError):
        observe(loaded, sites, [10**6])
    assert hooks(loaded) == before
    with pytest.raises(AttributeError):
        observe(loaded, [*sites, Site("no.such.module", "mlp", 0, sites[0].orientation)], TOKENS)
    assert hooks(loaded) == before


def test_a_family_whose_final_norm_is_not_known_is_refused(llama: LoadedModel) -> None:
    sites = sites_of(llama, kinds=("mlp",))
    assert llama.family.norm is not None
    without = replace(llama, family=replace(llama.family, norm=None))
    with pytest.raises(ArchitectureError, match=r"which norm the family 'llama' has"):
        Locator(without, sites, rank=5)
    elsewhere = replace(llama, family=replace(llama.family, norm=replace(llama.family.norm, path="model.nowhere")))
    with pytest.raises(ArchitectureError, match=r"no module 'model\.nowhere'"):
        Locator(elsewhere, sites, rank=5)
    plain = replace(llama, family=replace(llama.family, norm=replace(llama.family.norm, gain=Gain.NONE)))
    with pytest.raises(ArchitectureError, match="not of the kind"):
        Locator(plain, sites, rank=5)
    scaled = replace(llama, family=replace(llama.family, multiplier="no_such_entry"))
    with pytest.raises(ArchitectureError, match="no_such_entry"):
        Locator(scaled, sites, rank=5)


def test_attention_alone_is_refused(llama: LoadedModel) -> None:
    with pytest.raises(UsageError, match="MLP"):
        Locator(llama, sites_of(llama, kinds=("attention",)), rank=5)


def test_an_unembedding_of_other_width_is_refused(llama: LoadedModel) -> None:
    assert llama.family.norm is not None
    blocks = llama.family.blocks
    narrow = replace(llama.family.norm, path=f"{blocks}.0.mlp.up_proj")  # any weight with another first dimension
    with pytest.raises(ArchitectureError, match="projection that memscrub does not know"):
        readout(replace(llama, family=replace(llama.family, norm=narrow)))


def test_the_unembedding_is_read_in_pieces_in_other_precisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=2), dtype="bfloat16")
    seeing, writes = readout(loaded), random(32, 6)
    expected = (seeing.rows.float() * seeing.gain) @ writes
    monkeypatch.setattr("memscrub.models.readout.ROWS", 10)
    torch.testing.assert_close(seeing.projections(writes), expected, atol=1e-5, rtol=1e-5)
    sites = sites_of(loaded, kinds=("mlp",))
    assert all(values.dtype == torch.float32 for values in observe(loaded, sites, TOKENS).residuals)
