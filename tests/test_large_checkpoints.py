"""Large checkpoints: weights that stay as stored give the same results, the same edits, and take their size once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import (
    changed,
    in_words,
    ordinary_rows,
    random_text,
    snapshot,
    tiny_checkpoint,
    token_text,
    write_list,
)
from torch import nn
from transformers import AutoModelForCausalLM

import memscrub
import memscrub.models.lean_weights
from benchmarks.large_checkpoint import Shape, make
from benchmarks.watched import memory
from memscrub.edit.block_statistics import measure_by_block
from memscrub.edit.breakpoints import Demand
from memscrub.edit.calibration import price_factors
from memscrub.edit.disturbance import Metric, measure_disturbance
from memscrub.edit.editable import EditableModel
from memscrub.edit.joint import EditSettings, JointEdit
from memscrub.edit.low_rank import SLACK, LowRank
from memscrub.edit.ordinary import Ordinary
from memscrub.edit.portions import Reading, every_input
from memscrub.errors import NumericalError
from memscrub.locality.distance import compare
from memscrub.models.architecture import FAMILIES
from memscrub.models.lean_weights import lean_dtype
from memscrub.models.model import LoadedModel, load_model
from memscrub.models.originals import OriginalsOnDisk
from memscrub.models.site_finding import sites_of
from memscrub.models.trace import weights_swapped
from memscrub.storage.checkpoint import Checkpoint, digest_files, open_checkpoint, read_tensor
from tests.families import config_of

TEXTS = tuple(random_text(seed, 24) for seed in range(2))
RETAIN = ordinary_rows(1, rows=12, width=24)


@pytest.fixture(autouse=True)
def every_parameter_counts_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices of tiny models are below the size from which matrices stay as stored."""
    monkeypatch.setattr(memscrub.models.lean_weights, "LEAST", 1)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("brain")
    return open_checkpoint(tiny_checkpoint(path, "llama", 1, TEXTS, 80, dtype=torch.bfloat16))


def lean(ckpt: Checkpoint) -> LoadedModel:
    loaded = load_model(ckpt, device="cpu", lean=True)
    assert loaded.lean is not None
    return loaded


def wide(ckpt: Checkpoint) -> LoadedModel:
    loaded = load_model(ckpt, device="cpu", lean=False)
    assert loaded.lean is None
    return loaded


# One of each kind of block: fused queries, Conv1D, constants of the model's own, tied heads, experts.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float16),
        *(
            (name, torch.bfloat16)
            for name in ("llama", "gpt2", "gpt_neox", "gemma2", "apertus", "opt", "bloom", "mixtral", "gpt_oss")
        ),
    ],
)
def test_logits_and_statistics_are_those_of_float32_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    assert name in {family.model_type for family in FAMILIES.values()}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(name)).to(dtype).save_pretrained(tmp_path / "model")
    tiny_checkpoint(tmp_path / "words", "llama", 0)
    for file in (tmp_path / "words").glob("tokenizer*"):
        file.rename(tmp_path / "model" / file.name)
    source = open_checkpoint(tmp_path / "model")
    usual, spare = wide(source), lean(source)
    assert any(parameter.dtype is dtype for parameter in spare.model.parameters())
    ids = torch.randint(60, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(usual.logits(ids), spare.logits(ids))
    assert torch.equal(usual.logits(ids), spare.logits(ids))  # with gradients allowed: other memory is used
    sites = sites_of(usual, kinds=("mlp", "attention", "query"))
    rows = [ids, ids[:1, :5]]
    expected = measure_disturbance(usual, sites, rows, seed=3, batch_tokens=24)
    readings = [Reading(1000, every_input(2)), Reading(24, every_input(2)), Reading(24, (range(2),))]
    others = [
        *(
            measure_by_block(spare, sites, rows, tmp_path / str(n), seed=3, batch_tokens=24, reading=reading)
            for n, reading in enumerate(readings)
        ),
        measure_disturbance(spare, sites, rows, seed=3, batch_tokens=24),
    ]
    for found in others:
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.inputs, other.inputs) and torch.equal(one.outputs, other.outputs)


def test_weights_stay_as_stored_and_are_no_copy_of_the_file(ckpt: Checkpoint) -> None:
    loaded = lean(ckpt)
    loaded.logits(RETAIN)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert all(
        isinstance(value, nn.Parameter)
        for m in loaded.model.modules()
        for value in m._parameters.values()
        if value is not None
    )
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(loaded.model.get_parameter(name), read_tensor(ckpt, name))


def test_an_error_in_a_module_leaves_its_stored_weight_in_place(ckpt: Checkpoint) -> None:
    loaded = lean(ckpt)
    before = snapshot(loaded)
    with pytest.raises(RuntimeError):
        loaded.model.get_submodule("model.layers.0.mlp.down_proj")(torch.zeros(2, 3))
    assert changed(loaded, before) == set()
    assert torch.equal(loaded.logits(RETAIN), lean(ckpt).logits(RETAIN))


def test_small_checkpoints_and_mixtures_of_dtypes_are_loaded_as_before(ckpt: Checkpoint, tmp_path: Path) -> None:
    assert lean_dtype(ckpt) is None
    assert lean_dtype(ckpt, wanted=True) is torch.bfloat16
    assert load_model(ckpt, device="cpu").lean is None
    mixed = {**ckpt.tensors}
    name, info = next(iter(mixed.items()))
    mixed[name] = type(info)(**{**vars(info), "dtype": "F32"})
    other = Checkpoint(**{**vars(ckpt), "tensors": mixed})
    assert lean_dtype(other, wanted=True) is None


def test_a_checkpoint_is_large_from_one_gibibyte_on(ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(info.end - info.begin for info in ckpt.tensors.values())
    monkeypatch.setattr(memscrub.models.lean_weights, "LARGE", size)
    assert lean_dtype(ckpt) is torch.bfloat16
    monkeypatch.setattr(memscrub.models.lean_weights, "LARGE", size + 1)
    assert lean_dtype(ckpt) is None


def test_a_head_in_slices_gives_the_same_logits_and_gradients(
    ckpt: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memscrub.models.lean_weights, "SLICED", 1)
    monkeypatch.setattr(memscrub.models.lean_weights, "SLICE", 5 * 32)
    sliced, usual = lean(ckpt), wide(ckpt)
    torch.testing.assert_close(sliced.logits(RETAIN), usual.logits(RETAIN))
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for loaded in (sliced, usual):
        leaf = hidden.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loaded.unembed(leaf).square().sum(), leaf)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


def test_originals_come_from_disk_one_module_at_a_time(ckpt: Checkpoint) -> None:
    loaded = lean(ckpt)
    sites = sites_of(loaded)
    originals = OriginalsOnDisk(ckpt).with_sites(loaded, sites)
    with torch.inference_mode():
        expected = loaded.logits(RETAIN)
        for site in sites:
            loaded.parameter(site).mul_(1.5)
        before, edited = snapshot(loaded), loaded.logits(RETAIN)
        assert not torch.equal(edited, expected)
        with weights_swapped(loaded, originals):
            assert torch.equal(loaded.logits(RETAIN), expected)
            assert changed(loaded, before) == set()  # read for the pass, never put into the model
        assert torch.equal(loaded.logits(RETAIN), edited)
        alone = sites[0].tensor
        with weights_swapped(loaded, originals.without([alone])):
            one = loaded.logits(RETAIN)
        loaded.model.get_parameter(alone).copy_(originals[alone])
    assert not torch.equal(one, expected)
    assert compare(loaded, originals.without(list(originals)), RETAIN).kl == 0


def joint(loaded: LoadedModel, ckpt: Checkpoint, metrics: list[Metric]) -> JointEdit:
    sites = sites_of(loaded, kinds=("mlp", "attention", "query"))
    disk = None if loaded.lean is None else OriginalsOnDisk(ckpt)
    editable = EditableModel(loaded, sites, {site.name: torch.bfloat16 for site in sites}, disk=disk)
    edit = JointEdit(editable, metrics, EditSettings(margin=0.3, rounds=12, batch_tokens=64))
    texts = [token_text(loaded, text) for text in TEXTS]
    edit.demand([Demand(text.tokens, text.first_judged(1), 6) for text in texts])
    return edit


def test_an_edit_of_lean_weights_is_that_of_float32_and_is_restored_from_disk(ckpt: Checkpoint, tmp_path: Path) -> None:
    usual, spare = wide(ckpt), lean(ckpt)
    before = snapshot(spare)
    sites = sites_of(usual, kinds=("mlp", "attention", "query"))
    edits = [
        joint(usual, ckpt, measure_disturbance(usual, sites, [RETAIN], seed=0)),
        joint(spare, ckpt, measure_by_block(spare, sites, [RETAIN], tmp_path / "s", seed=0)),
    ]
    outcomes, factors = [], []
    for edit in edits:
        edit.rehearse(2)
        factors.append(price_factors(Ordinary(edit.editable), edit.metrics, RETAIN[:4]))
        edit.metrics = [m.scaled(f) for m, f in zip(edit.metrics, factors[-1], strict=True)]
        outcomes.append(edit.run())
    torch.testing.assert_close(torch.tensor(factors[0]), torch.tensor(factors[1]), rtol=0.05, atol=1e-3)
    one, other = outcomes
    assert one.unmet == other.unmet == ()
    assert (one.break_points, one.rounds) == (other.break_points, other.rounds)
    assert other.cost == pytest.approx(one.cost, rel=0.02)
    assert edits[1].editable.deltas == []
    for site in sites:
        difference = (usual.weight(site) - spare.weight(site).float()).abs()
        # Sums of float32 in another order round to the neighbouring bfloat16 now and then.
        assert float((difference > 0).float().mean()) < 0.02
        assert float(difference.max()) <= float(usual.weight(site).abs().max()) / 128
    edits[1].editable.restore()
    assert changed(spare, before) == set()


def test_an_edit_that_is_not_finite_leaves_the_edit_before_it(ckpt: Checkpoint) -> None:
    loaded = lean(ckpt)
    sites = sites_of(loaded)
    editable = EditableModel(loaded, sites, {site.name: torch.bfloat16 for site in sites}, disk=OriginalsOnDisk(ckpt))
    rows, columns = loaded.weight(sites[0]).shape
    good = [
        editable.stepped(n, torch.ones(1, rows), torch.ones(1, len(editable.factors[n].right.T)), kept=0.0, share=0.5)
        for n in range(len(sites))
    ]
    editable.apply(good)
    before = snapshot(loaded)
    bad = [*editable.snapshot()[:-1], LowRank(torch.full((1, rows), torch.inf), torch.ones(1, len(good[-1].right.T)))]
    bad[0] = LowRank(torch.zeros(1, rows), torch.zeros(1, columns))
    with pytest.raises(NumericalError, match="rolled back"):
        editable.apply(bad)
    assert changed(loaded, before) == set()
    assert editable.snapshot() == good


def test_a_low_rank_edit_steps_as_the_matrix_does() -> None:
    generator = torch.Generator().manual_seed(0)
    metric = Metric(torch.randn(9, 9, generator=generator).tril(), torch.randn(7, 7, generator=generator).tril(), 2.5)
    dense, thin = torch.zeros(7, 9), LowRank.zero(7, 9, torch.device("cpu"))
    for kept, share in ((0.0, 0.5), (0.3, 1.0), (0.9, 1.0), *((1.0, 1.0),) * 40):
        left, right = torch.randn(4, 7, generator=generator), torch.randn(4, 9, generator=generator)
        dense = dense.lerp(kept * dense + left.T @ right, share)
        thin = thin.stepped(left, right, kept=kept, share=share)
        assert len(thin.left) <= 7 + SLACK  # never more terms than independent directions, and some slack
    torch.testing.assert_close(thin.dense(), dense, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(thin.shortened().dense(), dense, atol=1e-4, rtol=1e-4)
    assert len(thin.shortened().left) == 7
    assert thin.price(metric) == pytest.approx(metric.price(dense), rel=1e-4)
    assert thin.zeroed().price(metric) == 0


POLICY = """schema = 1
name = "large"
[protected]
files = ["protected.jsonl"]
[class.c]
max_verbatim_tokens = 6
[locality]
retain = ["retain.txt"]
max_kl = 100.0
max_perplexity_ratio = 100.0
min_agreement = 0.001
"""


@pytest.mark.parametrize("solver", ["joint", "per-text"])
def test_a_fix_of_a_large_checkpoint_ends_as_one_of_a_small_one(
    ckpt: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    monkeypatch.setattr("memscrub.reports.locality_limits.CATASTROPHIC_AGREEMENT", 0.0)
    monkeypatch.setattr("memscrub.reports.locality_limits.CATASTROPHIC_PERPLEXITY_RATIO", 1e9)
    write_list(tmp_path / "protected.jsonl", TEXTS)
    (tmp_path / "retain.txt").write_text("\n\n".join(in_words(RETAIN)) + "\n")
    policy = tmp_path / "policy.toml"
    policy.write_text(f'{POLICY}[fix]\nsolver = "{solver}"\nmode = "next-best"\n')
    before, reports = digest_files(ckpt), []
    for name, large in (("usual", 1 << 60), ("lean", 0)):
        monkeypatch.setattr(memscrub.models.lean_weights, "LARGE", large)
        fixed = memscrub.fix(ckpt.path, policy, tmp_path / name, device="cpu")
        reports.append(fixed.report)
        assert sorted(open_checkpoint(tmp_path / name).files) == sorted([*ckpt.files, "memscrub-report.json"])
    usual, lean = reports
    assert digest_files(ckpt) == before
    assert lean.verdict == usual.verdict
    assert lean.verdict.outcome.value == "pass"
    assert [record.before for record in lean.texts] == [record.before for record in usual.texts]
    assert {change.name for change in lean.edit.tensors} == {change.name for change in usual.edit.tensors}
    assert lean.locality.kl == pytest.approx(usual.locality.kl, rel=0.1)
    if solver == "per-text":  # loaded as float32 whatever the size
        assert lean.edit.tensors == usual.edit.tensors


# A child that does as the command line does, with every checkpoint taken for a large one or for none.
CHILD = """
import json, sys
import memscrub.models.lean_weights as lean
lean.LARGE = 0 if sys.argv[1] == "lean" else 1 << 60
lean.SLICED = 2**22
from memscrub.cli.app import main
sys.argv = ["memscrub", *sys.argv[2:]]
try:
    main()
except SystemExit as end:
    print(json.dumps({"code": end.code}))
"""


def run(mode: str, *arguments: str) -> dict[str, int]:
    """Its exit code, and the most memory that it had and that no file backs, looked at every 5 ms."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, mode, *arguments, "--device", "cpu"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    own = 0
    while child.poll() is None:
        own = max(own, memory(child.pid).get("RssAnon", 0))
        time.sleep(0.005)
    said, _ = child.communicate()
    assert child.returncode == 0
    return {"own": own, **json.loads(said.splitlines()[-1])}


def test_a_scan_of_lean_weights_takes_the_weights_once(tmp_path: Path) -> None:
    make(tmp_path / "checkpoint", Shape.of(80e6), rows=1, shards=2)
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint").glob("*.safetensors"))
    policy, reports = tmp_path / "checkpoint-policy" / "policy.toml", []
    runs = {}
    for mode in ("lean", "wide"):
        report = tmp_path / f"{mode}.json"
        options = ("scan", str(tmp_path / "checkpoint"), "--policy", str(policy), "--report", str(report))
        runs[mode] = run(mode, *options)
        reports.append(json.loads(report.read_text())["texts"])
    assert {ran["code"] for ran in runs.values()} == {1}
    assert reports[0] == reports[1]
    # As float32 they take twice the size; as stored they are pages of the file.
    assert runs["wide"]["own"] - runs["lean"]["own"] > 1.2 * size
