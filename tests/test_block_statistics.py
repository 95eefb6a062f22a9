"""What lies on disk while statistics are measured block by block: no more than is still needed."""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from models import ordinary_rows, tiny_checkpoint
from transformers import AutoModelForCausalLM

import memscrub.models.lean_weights
from benchmarks.extra_disk import peak
from memscrub.edit.block_inputs import BlockInputs
from memscrub.edit.block_statistics import measure_by_block
from memscrub.edit.disturbance import Metric, graded, measure_disturbance
from memscrub.edit.portions import LEAST_AGAIN, Reading, every_input, few_inputs, reading_of, statistics_size
from memscrub.errors import IncompleteError
from memscrub.models.model import LoadedModel, load_model
from memscrub.models.site_finding import sites_of
from memscrub.models.sites import Site
from memscrub.storage.checkpoint import open_checkpoint
from tests.families import config_of

WIDTH, ROWS, LAYERS, DEEP = 32, 12, 5, 15
RETAIN = [ordinary_rows(1, rows=ROWS - 4, width=24), ordinary_rows(2, rows=4, width=10)]
TOKENS = sum(part.numel() for part in RETAIN)
BLOCK = 4 * WIDTH * TOKENS  # the inputs of one block, or the gradients at its output, for all the text


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tiny_checkpoint(tmp_path_factory.mktemp("brain"), "llama", 1, layers=LAYERS)
    return load_model(open_checkpoint(path), device="cpu", lean=False)


def equal(one: list[Metric], other: list[Metric]) -> bool:
    return all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.outputs, b.outputs) and a.closed == b.closed
        for a, b in zip(one, other, strict=True)
    )


def named(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def nameless(folder: Path) -> int:
    """Bytes in files without a name that this process holds open on the folder's disk."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        file = f"/proc/self/fd/{number}"
        with contextlib.suppress(FileNotFoundError):  # the handle that listed them
            if os.readlink(file).startswith(str(folder)):
                total += os.stat(file).st_size
    return total


def watched(loaded: LoadedModel, sites: list[Site], folder: Path, tokens: int) -> list[tuple[int, int]]:
    """What lies in files with and without a name whenever a block is done; checks the statistics, too."""
    seen: list[tuple[int, int]] = []
    blocks = loaded.model.config.num_hidden_layers - min(site.layer for site in sites)
    found = measure_by_block(
        loaded,
        sites,
        RETAIN,
        folder,
        seed=3,
        batch_tokens=24,
        reading=Reading(tokens, every_input(blocks)),
        progress=lambda done: seen.append((named(folder), nameless(folder))),
    )
    assert equal(found, measure_disturbance(loaded, sites, RETAIN, seed=3, batch_tokens=24))
    assert (named(folder), nameless(folder)) == (statistics_size(loaded, sites), 0)
    return seen


def test_inputs_are_gone_when_their_block_is_done_and_none_lie_below_the_edited_ones(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    sites = list(sites_of(loaded, kinds=("mlp", "query"), layers=[2, 4]))
    top = statistics_size(loaded, [site for site in sites if site.layer == 4])
    seen = watched(loaded, sites, tmp_path / "s", TOKENS)
    # After block 4: inputs of 3 and 2, and a gradient. Block 3 has no sites. After block 2 nothing more is needed.
    assert seen == [(top, 3 * BLOCK), (top, 2 * BLOCK), (2 * top, 0)]


def test_a_portion_of_the_text_leaves_no_more_than_its_own_inputs_beside_the_sums(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    sites = list(sites_of(loaded, kinds=("mlp", "attention"), layers=[3, 4]))
    size = statistics_size(loaded, sites)
    seen = watched(loaded, sites, tmp_path / "s", 48)
    assert len(seen) == 2 * 5  # five portions: four of two batches of 24 tokens, and what is left
    assert [names for names, _ in seen[1:]] == [size] * 9
    assert max(without for _, without in seen) <= 2 * 4 * WIDTH * 48  # the inputs of block 3 and the gradients


@pytest.mark.parametrize("tokens", [TOKENS, 48, 24])
def test_batches_without_gradients_count_as_in_one_pass(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr("memscrub.edit.disturbance.ENOUGH", 1)
    sites = list(sites_of(loaded, kinds=("mlp", "attention", "query"), layers=[0, 2, 4]))
    assert [wanted for _, wanted in graded(loaded, sites, RETAIN, 24)].count(False) > 6
    expected = measure_disturbance(loaded, sites, RETAIN, seed=3, batch_tokens=24)
    for n, segments in enumerate((every_input(LAYERS), few_inputs(LAYERS))):
        reading, folder = Reading(tokens, segments), tmp_path / str(n)
        found = measure_by_block(loaded, sites, RETAIN, folder, seed=3, batch_tokens=24, reading=reading)
        assert equal(found, expected)
        assert nameless(folder) == 0


def test_heads_of_one_module_and_experts_of_one_block_share_what_is_stored(loaded: LoadedModel, tmp_path: Path) -> None:
    (whole,) = sites_of(loaded, kinds=("attention",), layers=[4])
    heads = [replace(whole, columns=tuple(range(begin, begin + 8))) for begin in (0, 8, 16)]
    watched(loaded, heads, tmp_path / "heads", 48)
    assert len(list((tmp_path / "heads").iterdir())) == 3 + 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of("mixtral")).save_pretrained(tmp_path / "model")
    tiny_checkpoint(tmp_path / "words", "llama", 0)
    for file in (tmp_path / "words").glob("tokenizer*"):
        file.rename(tmp_path / "model" / file.name)
    mixture = load_model(open_checkpoint(tmp_path / "model"), device="cpu", lean=False)
    experts = list(sites_of(mixture, kinds=("mlp",), layers=[1]))
    watched(mixture, experts, tmp_path / "experts", 48)
    assert len(list((tmp_path / "experts").iterdir())) == len(experts) + 1


@pytest.fixture
def deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """Many blocks that stay as stored, so that the statistics of all sites take nearly what the weights do."""
    monkeypatch.setattr(memscrub.models.lean_weights, "LEAST", 1)
    path = tiny_checkpoint(tmp_path / "deep", "llama", 2, layers=DEEP, dtype=torch.bfloat16)
    return load_model(open_checkpoint(path), device="cpu", lean=True)


class Peak:
    """The most bytes in files with and without a name at any call of a block: the inputs that a segment needs lie
    there when its last block is called to be differentiated. `calls` are the blocks called."""

    def __init__(self, loaded: LoadedModel, folder: Path) -> None:
        self.folder, self.most, self.calls = folder, (0, 0, 0), list[int]()
        blocks = loaded.model.get_submodule(loaded.family.blocks)
        hooks = [partial(self._seen, number) for number in range(len(blocks))]
        self.handles = [block.register_forward_pre_hook(hook) for block, hook in zip(blocks, hooks, strict=True)]

    def _seen(self, number: int, *_: object) -> None:
        self.calls.append(number)
        sizes = named(self.folder), nameless(self.folder)
        self.most = max(self.most, (sum(sizes), *sizes))

    def __enter__(self) -> Peak:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def test_few_inputs_give_the_same_bytes_and_stay_within_what_is_promised(deep: LoadedModel, tmp_path: Path) -> None:
    sites = sites_of(deep, kinds=("mlp", "attention", "query"))
    blocks = deep.model.get_submodule(deep.family.blocks)
    weights, size = sum(parameter.nbytes for parameter in blocks.parameters()), statistics_size(deep, sites)
    assert 7 / 8 * weights < size < weights
    retain = [ordinary_rows(3, rows=20, width=6)]
    reading = reading_of(deep, sites, retain[0].numel())
    assert reading.segments == few_inputs(DEEP)
    assert 6 <= reading.tokens < 12  # one row is a portion
    found, peaks = [], []
    for way in (reading, Reading(6, every_input(DEEP))):
        folder = tmp_path / f"s{len(found)}"
        with Peak(deep, folder) as watch:
            found.append(measure_by_block(deep, sites, retain, folder, seed=3, batch_tokens=6, reading=way))
        peaks.append(watch)
        inputs = 4 * WIDTH * 6 * (way.kept + 1)
        assert watch.most == (size + inputs, size, inputs)
    few, every = peaks
    assert few.most[0] == peak(deep, sites, retain, batch_tokens=6)
    assert few.most[0] <= max(weights, size + weights // LEAST_AGAIN) < every.most[0]
    again = 20 * (DEEP - len(reading.segments))  # every block but the last of each segment, for every portion
    assert len(few.calls) == len(every.calls) + again == 20 * 2 * DEEP + again
    files = sorted(path.name for path in (tmp_path / "s0").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "s1").iterdir())
    assert all((tmp_path / "s0" / name).read_bytes() == (tmp_path / "s1" / name).read_bytes() for name in files)
    assert equal(found[0], measure_disturbance(deep, sites, retain, seed=3, batch_tokens=6))


def test_batches_without_gradients_of_weights_that_stay_as_stored(
    deep: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memscrub.edit.disturbance.ENOUGH", 1)
    sites = sites_of(deep, layers=[9, 14])
    with torch.inference_mode():  # as in the scan before
        deep.logits(RETAIN[0])
    found = measure_by_block(
        deep, sites, RETAIN, tmp_path / "s", seed=3, batch_tokens=24, reading=Reading(48, few_inputs(DEEP - 9))
    )
    assert equal(found, measure_disturbance(deep, sites, RETAIN, seed=3, batch_tokens=24))


def test_inputs_computed_again_are_those_of_the_forward_pass(deep: LoadedModel, tmp_path: Path) -> None:
    blocks = list(deep.model.get_submodule(deep.family.blocks))
    ids = ordinary_rows(4, rows=3, width=9)
    every, few = (BlockInputs(deep, blocks, segments, tmp_path) for segments in (every_input(DEEP), few_inputs(DEEP)))
    with every, few:
        for inputs in (every, few):
            inputs.forward(ids, torch.Generator().manual_seed(0))
        for number in reversed(range(DEEP)):
            (_, one, _), (_, other, _) = *every.reached(number), *few.reached(number)
            assert torch.equal(one, other)


def test_a_disk_that_is_full_when_inputs_are_computed_again_ends_it(deep: LoadedModel, tmp_path: Path) -> None:
    before, folder = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "s"
    blocks = deep.model.get_submodule(deep.family.blocks)

    def fills(watch: Peak) -> None:
        # The forward pass, the last block, and the first of the segment below it.
        if len(watch.calls) == DEEP + 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))

    try:
        with Peak(deep, folder) as watch:
            watch.handles += [block.register_forward_pre_hook(lambda *_: fills(watch)) for block in blocks]
            with pytest.raises(IncompleteError, match="could not be read or written"):
                reading = Reading(16, few_inputs(DEEP))
                measure_by_block(
                    deep, sites_of(deep, layers=[0]), RETAIN, folder, seed=3, batch_tokens=16, reading=reading
                )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert watch.calls[DEEP:] == [DEEP - 1, DEEP - 3]
    assert nameless(folder) == 0


@pytest.mark.parametrize(("tokens", "room"), [(24, 3000), (24, 4000)])
def test_a_disk_that_takes_no_more_ends_it_and_leaves_nothing_open(
    loaded: LoadedModel, tmp_path: Path, tokens: int, room: int
) -> None:
    """Inputs of 24 tokens take 3,072 bytes, the triangle of 48 takes 4,704."""
    sites, before = sites_of(loaded), resource.getrlimit(resource.RLIMIT_FSIZE)
    retain, folder = [RETAIN[0].view(1, -1)[:, :tokens]], tmp_path / "s"
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # of any one file
    try:
        with pytest.raises(IncompleteError, match="could not be read or written") as error:
            measure_by_block(loaded, sites, retain, folder, seed=3, reading=Reading(tokens, every_input(LAYERS)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert nameless(folder) == 0
    assert (folder / "4.inputs").exists() == (room > 3072)
    assert error.value.__cause__ is not None
