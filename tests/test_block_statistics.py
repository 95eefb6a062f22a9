"""What lies on disk while statistics are measured block by block: no more than is still needed."""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import ordinary_rows, tiny_checkpoint
from transformers import AutoModelForCausalLM

from memscrub.edit.block_statistics import measure_by_block
from memscrub.edit.disturbance import Metric, measure_disturbance
from memscrub.edit.portions import statistics_size
from memscrub.errors import IncompleteError
from memscrub.models.model import LoadedModel, load_model
from memscrub.models.site_finding import sites_of
from memscrub.models.sites import Site
from memscrub.storage.checkpoint import open_checkpoint
from tests.families import config_of

WIDTH, ROWS, LAYERS = 32, 12, 5
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


def watched(loaded: LoadedModel, sites: list[Site], folder: Path, at_once: int) -> list[tuple[int, int]]:
    """What lies in files with and without a name whenever a block is done; checks the statistics, too."""
    seen: list[tuple[int, int]] = []
    found = measure_by_block(
        loaded,
        sites,
        RETAIN,
        folder,
        seed=3,
        batch_tokens=24,
        at_once=at_once,
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
            measure_by_block(loaded, sites, retain, folder, seed=3, at_once=tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert nameless(folder) == 0
    assert (folder / "4.inputs").exists() == (room > 3072)
    assert error.value.__cause__ is not None
