"""Which layers are edited where the policy leaves that to memscrub, and what that saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memscrub.edit import linearise as module
from memscrub.jobs.editing import make_edit
from memscrub.jobs.joint_editing import DEEP, first_sites
from memscrub.jobs.one_by_one import mlp_sites
from memscrub.jobs.ordinary_text import retain_halves
from memscrub.jobs.scanning import Inputs
from tests.editing_world import laid_out, opened
from tests.models import snapshot, tiny_checkpoint


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of seven layers that knows three texts."""
    return laid_out(tmp_path_factory.mktemp("deep"), layers=DEEP + 1)


def layers_of(inputs: Inputs) -> list[int]:
    return sorted({site.layer for site in first_sites(inputs)})


def test_a_deep_model_is_edited_in_its_upper_half(deep: Path) -> None:
    assert layers_of(opened(deep)) == [3, 4, 5, 6]
    assert layers_of(opened(deep, 'layers = "auto"')) == [3, 4, 5, 6]


@pytest.mark.parametrize(
    "limits", ["max_near_verbatim = 0.6", "max_sampling_probability = 1e-3", "like_controls = true"]
)
def test_all_layers_are_edited_where_more_than_greedy_runs_is_limited(deep: Path, limits: str) -> None:
    assert layers_of(opened(deep, limits=limits)) == list(range(7))
    assert layers_of(opened(deep, "layers = [4, 5]", limits)) == [4, 5]


def test_all_layers_are_edited_where_the_policy_says_so(deep: Path) -> None:
    assert layers_of(opened(deep, 'layers = "all"')) == list(range(7))
    assert layers_of(opened(deep, "layers = [1, 6]")) == [1, 6]


def test_a_shallow_model_is_edited_in_all_layers(deep: Path, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "checkpoint", "llama", seed=6, layers=DEEP - 1)
    for name in ("protected.jsonl", "control.jsonl", "retain.txt"):
        (tmp_path / name).write_bytes((deep / name).read_bytes())
    assert layers_of(opened(tmp_path)) == list(range(DEEP - 1))


def test_the_paper_s_solver_edits_all_layers(deep: Path) -> None:
    sites = mlp_sites(opened(deep, 'solver = "per-text"'))
    assert [site.layer for site in sites] == list(range(7))


@pytest.mark.usefixtures("room")
def test_an_edit_of_the_upper_half_leaves_the_lower_one_alone_and_holds(deep: Path) -> None:
    inputs = opened(deep)
    before = snapshot(inputs.loaded)
    made = make_edit(inputs, retain_halves(inputs))
    assert made.made.outcome.unmet == ()
    after = snapshot(inputs.loaded)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all(int(name.split(".")[2]) >= 3 for name in changed)


@pytest.mark.usefixtures("room")
def test_the_lower_half_computes_nothing_in_the_rounds(deep: Path) -> None:
    """The texts pass it once, when they are priced."""
    passes: dict[str, int] = {}
    for word in ("auto", "all"):
        inputs = opened(deep, f'layers = "{word}"')
        lowest = inputs.loaded.model.get_submodule("model.layers.0.mlp")
        widest = max(len(text.tokens) for text in inputs.texts)
        counted: list[int] = []
        lowest.register_forward_hook(lambda _, given, out, seen=counted: seen.append(given[0].shape[1]))
        edit = make_edit(inputs, retain_halves(inputs))
        passes[word] = counted.count(widest)
        assert edit.made.rounds > 0
    assert passes["auto"] == 1 < passes["all"] - 5


@pytest.mark.usefixtures("room")
def test_rounds_begin_with_the_gradient_of_the_sum_where_all_layers_are_edited(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    real = module.looks

    def watched(*given: Any, own_path: bool) -> Any:
        seen.append(own_path)
        return real(*given, own_path=own_path)

    monkeypatch.setattr(module, "looks", watched)
    for word in ("auto", "all"):
        seen.clear()
        inputs = opened(deep, f'layers = "{word}"')
        make_edit(inputs, retain_halves(inputs))
        first, last = seen[0], seen[-1]
        assert last and first == (word == "auto")
        assert seen == sorted(seen)  # once own paths are taken they are taken to the end
