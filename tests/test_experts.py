"""Mixture-of-experts edits: routed tokens alone count, the router stays, experts unseen by ordinary text stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memscrub.edit.disturbance import RIDGE, measure_disturbance
from memscrub.errors import ArchitectureError
from memscrub.jobs.scrub import fix
from memscrub.models.disk_places import place_on_disk
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import sites_of
from memscrub.models.sites import Site
from memscrub.models.trace import traced, weights_swapped
from memscrub.reports.report import load_report
from memscrub.reports.verdict import Outcome
from memscrub.storage.checkpoint import open_checkpoint
from tests.families import config_of
from tests.models import changed, memorizing_checkpoint, opened, snapshot
from tests.test_every_family import TEXTS, folder_of

MIXTURES = ("mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "deepseek_v3")
IDS = torch.tensor([[5, 17, 60, 3, 9, 2], [44, 8, 21, 30, 1, 7]])


@pytest.fixture(scope="module", params=MIXTURES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(request.param, vocab_size=64, initializer_range=0.1)
    return opened(memorizing_checkpoint(folder, config, TEXTS, steps=20))


def experts_of(loaded: LoadedModel, layer: int = 1) -> list[Site]:
    return [site for site in sites_of(loaded, kinds=("mlp",), layers=[layer]) if site.expert is not None]


def chosen_by_the_router(loaded: LoadedModel, layer: int) -> torch.Tensor:
    """Which experts each token of `IDS` is sent to, `[tokens, experts]` of bool, from the router itself."""
    family = loaded.family
    assert family.experts is not None
    block = family.experts.path.rpartition(".")[0]
    parent = loaded.model.get_submodule(f"{family.blocks}.{layer}.{block}")
    router = parent.router if hasattr(parent, "router") else parent.gate
    seen: list[torch.Tensor] = []
    handle = router.register_forward_hook(lambda module, inputs, output: seen.append(output))  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            loaded.logits(IDS)
    finally:
        handle.remove()
    scores, *_, choices = seen[0]
    if family.experts.weighs_inputs:
        chosen: torch.Tensor = scores > 0
        return chosen
    count = len(experts_of(loaded, layer))
    return torch.nn.functional.one_hot(choices, count).sum(1) > 0


def test_only_tokens_that_the_router_sends_to_an_expert_are_seen_by_it(loaded: LoadedModel) -> None:
    sites = experts_of(loaded)
    with traced(loaded, sites) as trace:
        loaded.logits(IDS)
    routed = chosen_by_the_router(loaded, 1)
    assert routed.any() and not routed.all()
    for site, seen, dense in zip(sites, trace.seen, trace.activations, strict=True):
        assert seen.tokens is not None
        assert seen.tokens.tolist() == routed[:, site.expert].nonzero()[:, 0].tolist()
        assert torch.equal(dense.flatten(0, 1).any(-1), routed[:, site.expert])
        places = torch.arange(IDS.numel()).flip(0)
        assert torch.equal(seen.at(places), dense.flatten(0, 1)[places])


def test_the_linear_form_of_an_expert_is_the_derivative_along_an_edit(loaded: LoadedModel) -> None:
    site = experts_of(loaded)[int(chosen_by_the_router(loaded, 1)[3].nonzero()[0])]
    direction = torch.randn(loaded.weight(site).shape, generator=torch.Generator().manual_seed(0))
    with traced(loaded, [site]) as trace:
        (gradient,) = trace.gradients(loaded.logits(IDS)[0, 3, 11])
    linear = float((gradient.flatten(0, 1) @ direction * trace.activations[0].flatten(0, 1)).sum())
    step = 1e-3 / float(direction.norm())
    moved = []
    for sign in (1, -1):
        loaded.weight(site).add_(direction, alpha=sign * step)
        with torch.no_grad():
            moved.append(float(loaded.logits(IDS)[0, 3, 11]))
        loaded.weight(site).add_(direction, alpha=-sign * step)
    assert abs(linear) > 1e-3
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(linear, rel=0.05, abs=0.02 * abs(linear) + 1e-2)


def test_the_experts_metric_counts_tokens_that_did_not_come_as_zero(loaded: LoadedModel) -> None:
    sites = experts_of(loaded)
    metrics = measure_disturbance(loaded, sites, [IDS], seed=0)
    with traced(loaded, sites) as trace:
        loaded.logits(IDS)
    for metric, dense in zip(metrics, trace.activations, strict=True):
        rows = dense.flatten(0, 1)
        if metric.closed:
            assert not rows.any()
            continue
        moment = rows.T @ rows / len(rows)
        expected = moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment))
        torch.testing.assert_close(metric.inputs @ metric.inputs.T, expected, atol=1e-5, rtol=1e-3)
    assert len({id(metric.outputs) for metric in metrics}) == 1  # they write to the same place


def test_a_swapped_expert_comes_back_bit_for_bit_and_leaves_the_others_alone(loaded: LoadedModel) -> None:
    before, site = snapshot(loaded), experts_of(loaded)[2]
    with weights_swapped(loaded, {site.tensor: torch.zeros_like(loaded.parameter(site))}):
        (name,) = changed(loaded, before)
        live = loaded.model.state_dict()[name]
        assert [bool(matrix.any()) for matrix in live] == [n != 2 for n in range(len(live))]
    assert not changed(loaded, before)


@pytest.mark.parametrize(
    ("case", "bias"),
    [("deepseek_v3", "mlp.gate.e_score_correction_bias"), ("gpt_oss", "mlp.router.bias")],
)
def test_experts_without_ordinary_text_stay_byte_for_byte_and_are_named(case: str, bias: str, tmp_path: Path) -> None:
    folder, closed = folder_of(case, tmp_path), 3
    checkpoint, out = folder / "checkpoint", folder / "scrubbed"
    stored = load_file(checkpoint / "model.safetensors")
    stored[f"model.layers.1.{bias}"][closed] = -1e4  # no token is sent to this expert of the last layer
    save_file(stored, checkpoint / "model.safetensors", metadata={"format": "pt"})
    fixed = fix(checkpoint, folder / "policy.toml", out)
    assert fixed.report.verdict.outcome is Outcome.PASS, fixed.report.verdict.reasons
    ledger = load_report(out / "memscrub-report.json").edit
    assert ledger is not None
    records = {record.layer: record for record in ledger.experts}
    assert closed in records[1].closed and all(record.experts == 4 for record in records.values())
    assert not any(set(record.edited) & set(record.closed) for record in records.values())
    assert any(record.edited for record in records.values())
    loaded, ckpt, written = opened(checkpoint), open_checkpoint(checkpoint), load_file(out / "model.safetensors")
    for site in sites_of(loaded, kinds=("mlp",)):
        if site.expert is not None:
            place = place_on_disk(loaded, ckpt, site)
            same = torch.equal(place.of(stored[place.tensor]), place.of(written[place.tensor]))
            assert same == (site.expert not in records[site.layer].edited)
    for name in stored:
        if "gate." in name or "router." in name:
            assert torch.equal(stored[name], written[name])


def test_a_checkpoint_that_stores_experts_twice_is_refused(tmp_path: Path) -> None:
    path = memorizing_checkpoint(tmp_path, config_of("mixtral", vocab_size=64), TEXTS, steps=1)
    loaded, ckpt = opened(path), open_checkpoint(path)
    site = experts_of(loaded)[1]
    place = place_on_disk(loaded, ckpt, site)
    assert place.tensor == "model.layers.1.block_sparse_moe.experts.1.w2.weight" and place.expert is None
    both = {**ckpt.tensors, "model.layers.1.mlp.experts.down_proj": ckpt.tensors[place.tensor]}
    with pytest.raises(ArchitectureError, match="2 names"):
        place_on_disk(loaded, type(ckpt)(ckpt.path, ckpt.files, ckpt.weight_map, ckpt.config, both), site)


def test_a_mixture_without_its_shared_expert_stops_the_run() -> None:
    from tests.test_families import _loaded

    loaded = _loaded("qwen2_moe")
    delattr(loaded.model.get_submodule("model.layers.1.mlp"), "shared_expert")
    with pytest.raises(ArchitectureError, match="nothing was edited"):
        sites_of(loaded, kinds=("mlp",))
