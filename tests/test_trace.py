"""Hooks and swapped weights are put back whatever happens, and what they read is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import FAMILIES, changed, hooks, ids_of, opened, random_text, snapshot, tiny_checkpoint
from torch import Tensor, nn

from memscrub.models.model import LoadedModel
from memscrub.models.own_path import OwnPath
from memscrub.models.site_finding import sites_of
from memscrub.models.sites import Site
from memscrub.models.trace import traced, weights_swapped


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=2))


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([ids_of(random_text(seed, 7)) for seed in range(2)])


class Interrupted(Exception):
    pass


def test_hooks_are_removed_also_when_the_pass_fails(loaded: LoadedModel, ids: Tensor) -> None:
    sites, before = sites_of(loaded), hooks(loaded)
    with traced(loaded, sites):
        loaded.logits(ids)
        assert hooks(loaded) == before + len(sites)
    assert hooks(loaded) == before
    with pytest.raises(Interrupted), traced(loaded, sites):
        raise Interrupted
    assert hooks(loaded) == before
    missing = Site("no.such.module", "mlp", 0, sites[0].orientation)
    with pytest.raises(AttributeError), traced(loaded, [*sites, missing]):
        pass
    assert hooks(loaded) == before


def test_tracing_neither_changes_the_output_nor_leaves_gradients_on(loaded: LoadedModel, ids: Tensor) -> None:
    with torch.no_grad():
        plain = loaded.logits(ids)
        with traced(loaded, sites_of(loaded)):
            seen = loaded.logits(ids)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(seen.detach(), plain, atol=1e-5, rtol=0)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in loaded.model.parameters())


def test_a_write_is_the_output_vectors_times_the_activations(loaded: LoadedModel, ids: Tensor) -> None:
    sites = sites_of(loaded)
    with traced(loaded, sites) as trace:
        loaded.logits(ids)
    for site, activations, write in zip(sites, trace.activations, trace.writes, strict=True):
        bias = loaded.model.get_submodule(site.name).bias
        expected = activations @ loaded.weight(site).T + (0 if bias is None else bias)
        torch.testing.assert_close(write.detach(), expected.detach(), atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_write_equals_finite_differences(loaded: LoadedModel, ids: Tensor) -> None:
    sites = sites_of(loaded)
    generator = torch.Generator().manual_seed(0)
    target = (1, 4, 9)  # row, position, token
    with traced(loaded, sites) as trace:
        gradients = torch.autograd.grad(loaded.logits(ids)[target], trace.writes)
    for site, gradient in zip(sites, gradients, strict=True):
        direction = torch.randn(gradient.shape, generator=generator)
        ends = [pushed(loaded, site, ids, step * direction)[target] for step in (1e-2, -1e-2)]
        measured = float(ends[0] - ends[1]) / 2e-2
        assert measured == pytest.approx(float((gradient * direction).sum()), rel=0.02, abs=0.02)


def pushed(loaded: LoadedModel, site: Site, ids: Tensor, push: Tensor) -> Tensor:
    """Logits when the site writes `push` on top."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + push

    handle = loaded.model.get_submodule(site.name).register_forward_hook(hook)
    try:
        with torch.no_grad():
            return loaded.logits(ids)
    finally:
        handle.remove()


def test_on_its_own_path_a_position_has_the_same_gradient_whatever_is_summed_with_it(
    loaded: LoadedModel, ids: Tensor
) -> None:
    sites = sites_of(loaded)

    def gradient(positions: list[int], own: bool) -> list[Tensor]:
        with traced(loaded, sites) as trace:
            if own:
                with OwnPath():
                    logits = loaded.logits(ids)
            else:
                logits = loaded.logits(ids)
            return list(torch.autograd.grad(logits[:, positions, 5].sum(), trace.writes))

    whole = gradient(list(range(7)), own=True)
    for position in range(7):
        for together, alone in zip(whole, gradient([position], own=True), strict=True):
            torch.testing.assert_close(together[:, position], alone[:, position], atol=1e-5, rtol=1e-4)
            rest = [other for other in range(7) if other != position]
            assert not alone[:, rest].any()
    # Without it, later positions are mixed in: the test above would notice.
    mixed = gradient(list(range(7)), own=False)[0]
    assert float((mixed - whole[0]).abs().max()) > 1e-2


def test_own_path_changes_no_output(loaded: LoadedModel, ids: Tensor) -> None:
    with torch.no_grad():
        plain = loaded.logits(ids)
        with OwnPath():
            assert torch.equal(loaded.logits(ids), plain)


def test_own_path_is_exact_behind_the_last_attention(loaded: LoadedModel, ids: Tensor) -> None:
    last = sites_of(loaded, kinds=("mlp",))[-1:]
    gradients = []
    for position in range(7):
        with traced(loaded, last) as trace:
            gradients.append(torch.autograd.grad(loaded.logits(ids)[:, position, 5].sum(), trace.writes)[0])
    with traced(loaded, last) as trace, OwnPath():
        (whole,) = torch.autograd.grad(loaded.logits(ids)[:, :, 5].sum(), trace.writes)
    torch.testing.assert_close(whole, torch.stack(gradients).sum(0), atol=1e-6, rtol=1e-5)


def test_swapped_weights_come_back_bit_for_bit_also_after_an_exception(loaded: LoadedModel, ids: Tensor) -> None:
    before = snapshot(loaded)
    site = sites_of(loaded)[0]
    other = {site.tensor: torch.zeros_like(loaded.parameter(site))}
    with torch.no_grad():
        plain = loaded.logits(ids)
        with weights_swapped(loaded, other):
            assert changed(loaded, before) == {site.tensor}
            assert not torch.equal(loaded.logits(ids), plain)
        assert torch.equal(loaded.logits(ids), plain)
    with pytest.raises(Interrupted), weights_swapped(loaded, other):
        raise Interrupted
    with pytest.raises(AttributeError), weights_swapped(loaded, {**other, "no.such.weight": torch.zeros(1)}):
        pass
    assert changed(loaded, before) == set()


def test_a_swap_is_rounded_to_the_precision_the_model_runs_in(tmp_path: Path, ids: Tensor) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=1, dtype=torch.bfloat16), dtype="bfloat16")
    site = sites_of(loaded)[0]
    with weights_swapped(loaded, {site.tensor: loaded.parameter(site).float() + 1e-3}):
        assert loaded.parameter(site).dtype == torch.bfloat16
        loaded.logits(ids)
