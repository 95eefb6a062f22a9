"""The price of an edit: what the metrics predict is about what is then measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import FAMILIES, opened, ordinary_rows, tiny_checkpoint
from torch import Tensor

from memscrub.edit import disturbance
from memscrub.edit.disturbance import (
    ENOUGH,
    MOST_APART,
    RIDGE,
    Metric,
    graded,
    measure_disturbance,
    sampled_gradient,
)
from memscrub.errors import NumericalError
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import sites_of


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp(request.param)
    return opened(tiny_checkpoint(path, request.param, seed=3, texts=["w01 w02 w03 " * 8], steps=40))


RETAIN = ordinary_rows(1, rows=24, width=24)


def kl(before: Tensor, after: Tensor) -> float:
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_the_predicted_disturbance_is_about_the_measured_kl(loaded: LoadedModel, kind: str) -> None:
    site = sites_of(loaded, kinds=(kind,))[-1]
    # The ridge is a safety margin on top of the estimate, not part of it.
    (metric,) = measure_disturbance(loaded, [site], [RETAIN], seed=0, ridge=1e-6)
    weight = loaded.weight(site)
    original = weight.clone()
    generator = torch.Generator().manual_seed(0)
    ratios = []
    try:
        with torch.no_grad():
            before = loaded.logits(RETAIN).log_softmax(-1)
            for _ in range(6):
                direction = torch.randn(original.shape, generator=generator)
                # One tenth of a logit or so: small enough for second order, large enough for float32.
                unit = predicted(metric, direction)
                edit = direction * math.sqrt(2e-3 / unit)
                weight.copy_(original + edit)
                after = loaded.logits(RETAIN).log_softmax(-1)
                ratios.append(kl(before, after) / predicted(metric, edit))
    finally:
        weight.copy_(original)
    assert 0.3 < sum(ratios) / len(ratios) < 3


def predicted(metric: Metric, edit: Tensor) -> float:
    """1/2 tr(F D C D^T)."""
    half = metric.outputs.T @ edit @ metric.inputs
    return 0.5 * float((half**2).sum())


def test_the_same_seed_gives_the_same_metrics_bit_for_bit(loaded: LoadedModel) -> None:
    sites = sites_of(loaded)
    first, again = (measure_disturbance(loaded, sites, [RETAIN], seed=4) for _ in range(2))
    other = measure_disturbance(loaded, sites, [RETAIN], seed=5)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.outputs, b.outputs)
        assert not torch.equal(a.outputs, c.outputs)  # the labels are sampled


def test_the_input_metric_is_the_mean_square_of_the_activations(loaded: LoadedModel) -> None:
    site = sites_of(loaded)[0]
    seen: list[Tensor] = []
    module = loaded.model.get_submodule(site.name)
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    try:
        (metric,) = measure_disturbance(loaded, [site], [RETAIN[:10], RETAIN[10:]], seed=0, batch_tokens=100)
    finally:
        handle.remove()
    rows = torch.cat([each.flatten(0, 1) for each in seen])
    moment = rows.T @ rows / len(rows)
    expected = moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment))
    torch.testing.assert_close(metric.inputs @ metric.inputs.T, expected, atol=1e-4, rtol=1e-3)


def test_solving_undoes_the_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    root, rows = torch.randn(5, 9, generator=generator), torch.randn(3, 5, generator=generator)
    c, f = root @ root.T, 2 * root @ root.T
    metric = Metric(torch.linalg.cholesky(c), torch.linalg.cholesky(f))
    torch.testing.assert_close(metric.solve_inputs(rows) @ c, rows, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(metric.solve_outputs(rows) @ f, rows, atol=1e-4, rtol=1e-4)


def test_squares_are_the_products_with_what_solving_gives() -> None:
    generator = torch.Generator().manual_seed(1)
    root, rows = torch.randn(5, 9, generator=generator), torch.randn(3, 5, generator=generator)
    metric = Metric(torch.linalg.cholesky(root @ root.T), torch.linalg.cholesky(2 * root @ root.T)).scaled(3.0)
    torch.testing.assert_close(metric.square_inputs(rows), (rows * metric.solve_inputs(rows)).sum(-1))
    torch.testing.assert_close(metric.square_outputs(rows), (rows * metric.solve_outputs(rows)).sum(-1))
    closed = replace(metric, inputs=torch.zeros(5, 5))
    assert closed.square_inputs(rows).tolist() == [0.0] * 3


def test_the_gradient_for_sampled_labels_is_that_of_their_log_probability() -> None:
    logits = torch.randn(4, 50, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = sampled_gradient(logits.detach(), torch.Generator().manual_seed(3))
    labels = found.argmax(-1, keepdim=True)
    (expected,) = torch.autograd.grad(logits.log_softmax(-1).gather(-1, labels).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_labels_are_sampled_from_the_models_own_distribution() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    found = sampled_gradient(p.log().expand(1, 20_000, 4), torch.Generator().manual_seed(0))
    torch.testing.assert_close((found + p).mean((0, 1)), p, atol=0.01, rtol=0)


def test_gradients_are_taken_of_a_share_of_every_part_of_the_text(loaded: LoadedModel) -> None:
    site = sites_of(loaded)[0]
    width = len(loaded.weight(site))
    rows = torch.zeros(ENOUGH * width * 5 // 2 // 10, 10, dtype=torch.long)
    stream = list(graded(loaded, [site], [rows, rows[:12]], batch_tokens=50))
    assert [wanted for ids, wanted in stream[:6]] == [True, False] * 3
    assert [wanted for ids, wanted in stream[-3:]] == [True, False, True]  # the second part begins anew
    assert sum(len(ids) for ids, _ in stream) == len(rows) + 12
    few = [wanted for _, wanted in graded(loaded, [site], [rows[:20]], batch_tokens=50)]
    assert all(few)  # too little text to leave any out
    many = [wanted for _, wanted in graded(loaded, [site], [rows.repeat(20, 1)], batch_tokens=50)]
    assert sum(many) == -(-len(many) // MOST_APART)


def test_the_output_metric_is_the_mean_over_the_text_with_gradients(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = sites_of(loaded)[0]
    every = [pair for pair in graded(loaded, [site], [RETAIN], 100)]
    monkeypatch.setattr(
        disturbance, "graded", lambda *_: [(ids, number % 2 == 0) for number, (ids, _) in enumerate(every)]
    )
    (found,) = measure_disturbance(loaded, [site], [RETAIN], seed=0)
    first = torch.cat([ids for ids, _ in every[::2]])
    monkeypatch.setattr(disturbance, "graded", lambda *_: [(ids, True) for ids in first.split(len(every[0][0]))])
    (expected,) = measure_disturbance(loaded, [site], [first], seed=0)
    torch.testing.assert_close(found.outputs, expected.outputs, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found.inputs, expected.inputs)  # the others count there


def test_a_restricted_sites_metric_is_that_of_the_principal_submatrices(loaded: LoadedModel) -> None:
    whole = sites_of(loaded)[0]
    columns, rows = (6, 1, 2, 7), (3, 0, 9)
    part = replace(whole, columns=columns, rows=rows)
    (full,) = measure_disturbance(loaded, [whole], [RETAIN], seed=0, ridge=1e-6)
    (found,) = measure_disturbance(loaded, [part], [RETAIN], seed=0, ridge=1e-6)
    c, f = full.inputs @ full.inputs.T, full.outputs @ full.outputs.T
    torch.testing.assert_close(found.inputs @ found.inputs.T, c[list(columns)][:, list(columns)], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.outputs @ found.outputs.T, f[list(rows)][:, list(rows)], atol=1e-4, rtol=1e-3)


def test_the_price_of_an_edit_is_half_the_trace_and_scales(loaded: LoadedModel) -> None:
    (metric,) = measure_disturbance(loaded, sites_of(loaded)[:1], [RETAIN], seed=0)
    edit = torch.randn(len(metric.outputs), len(metric.inputs), generator=torch.Generator().manual_seed(1))
    c, f = metric.inputs @ metric.inputs.T, metric.outputs @ metric.outputs.T
    expected = 0.5 * float(torch.trace(f @ edit @ c @ edit.T))
    assert metric.price(edit) == pytest.approx(expected, rel=1e-4)
    assert metric.scaled(3.0).price(edit) == pytest.approx(3 * expected, rel=1e-4)


def test_how_far_the_pass_has_come_is_told_in_rows(loaded: LoadedModel) -> None:
    done: list[int] = []
    measure_disturbance(loaded, sites_of(loaded)[:1], [RETAIN], seed=0, batch_tokens=200, progress=done.append)
    assert done == [8, 16, 24]


def test_a_site_that_never_fires_costs_one_per_unit_and_breaks_nothing(tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=3))
    loaded.model.get_submodule("model.layers.0.mlp.up_proj").weight.data.zero_()
    (metric,) = measure_disturbance(loaded, sites_of(loaded)[:1], [RETAIN], seed=0)
    assert torch.equal(metric.inputs, torch.eye(len(metric.inputs)))


def test_activations_that_are_not_finite_are_an_error_that_names_the_site(tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=3))
    loaded.model.get_submodule("model.layers.0.mlp.up_proj").weight.data.fill_(3e38)
    with pytest.raises(NumericalError, match=r"model\.layers\.\d\.mlp\.down_proj"):
        measure_disturbance(loaded, sites_of(loaded, kinds=("mlp",)), [RETAIN], seed=0)
