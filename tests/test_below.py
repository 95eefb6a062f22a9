"""A pass that begins above the blocks below all edits comes to what the whole pass does, and computes less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memscrub.edit.breakpoints import Demand
from memscrub.edit.disturbance import Metric
from memscrub.edit.editable import EditableModel
from memscrub.edit.linearise import Linearisation, linearise_at, prices
from memscrub.models.architecture import FAMILIES
from memscrub.models.below import Below
from memscrub.models.model import LoadedModel, load_model
from memscrub.models.site_finding import sites_of
from memscrub.models.tokens import pad
from memscrub.storage.checkpoint import open_checkpoint
from tests.families import VARIANTS
from tests.models import tiny_checkpoint
from tests.test_own_path import assert_alike, demands_and_points, loaded_of

CASES = sorted(FAMILIES) + sorted(VARIANTS)
TEXTS = [(5, 9, 3, 44, 17, 23, 8, 2), (1, 2, 3), (7, 7, 50, 12, 30)]


def passes_below(loaded: LoadedModel) -> list[int]:
    """One entry for each pass through the lowest block from now on."""
    made: list[int] = []
    block = loaded.model.get_submodule(f"{loaded.family.blocks}.0")
    inside = next(child for child in block.modules() if isinstance(child, torch.nn.Linear | torch.nn.LayerNorm)
                  or not list(child.children()))  # fmt: skip
    inside.register_forward_hook(lambda *_: made.append(1))
    return made


def whole(loaded: LoadedModel, texts: list[tuple[int, ...]]) -> torch.Tensor:
    _ = loaded.projects
    with torch.no_grad():
        return loaded.features(pad(texts).to(loaded.device))[0]


def begun(below: Below, texts: list[tuple[int, ...]]) -> torch.Tensor:
    with torch.no_grad():
        return below.features(pad(texts).to(below.loaded.device), texts)


def assert_same(found: torch.Tensor, expected: torch.Tensor, texts: list[tuple[int, ...]]) -> None:
    for one, other, text in zip(found, expected, texts, strict=True):
        torch.testing.assert_close(one[: len(text)], other[: len(text)], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_pass_that_begins_above_comes_to_what_the_whole_pass_does(case: str, tmp_path: Path) -> None:
    loaded = loaded_of(case, tmp_path)
    below = Below(loaded, 1)
    expected = whole(loaded, TEXTS)
    assert below.sound
    assert_same(begun(below, TEXTS), expected, TEXTS)
    assert below.knows(TEXTS)
    made = passes_below(loaded)
    others = [TEXTS[2], TEXTS[0]]  # in other company, so padded otherwise
    assert_same(begun(below, others), whole(loaded, others), others)
    assert len(made) == 1  # of `whole`


def test_what_is_edited_above_is_seen(tmp_path: Path) -> None:
    loaded = loaded_of("llama", tmp_path)
    below = Below(loaded, 1)
    before = begun(below, TEXTS)
    (site,) = sites_of(loaded, kinds=("mlp",), layers=[1])
    loaded.weight(site).mul_(1.5)
    after = begun(below, TEXTS)
    assert float((after - before).abs().max()) > 1e-2
    assert_same(after, whole(loaded, TEXTS), TEXTS)


def test_texts_beyond_the_room_pass_whole(tmp_path: Path) -> None:
    loaded = loaded_of("llama", tmp_path)
    width = loaded.model.config.hidden_size
    below = Below(loaded, 1, room=4 * width * len(TEXTS[0]))
    assert_same(begun(below, TEXTS), whole(loaded, TEXTS), TEXTS)
    assert below.knows(TEXTS[:1]) and not below.knows(TEXTS[1:2]) and below.room == 0
    made = passes_below(loaded)
    assert_same(begun(below, TEXTS), whole(loaded, TEXTS), TEXTS)
    assert len(made) == 2
    begun(below, TEXTS[:1])
    assert len(made) == 2


def test_nothing_is_kept_where_the_lowest_block_is_edited(tmp_path: Path) -> None:
    below = Below(loaded_of("llama", tmp_path), 0)
    begun(below, TEXTS)
    assert not below.knows(TEXTS)


def test_a_model_that_hands_on_more_passes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_of("llama", tmp_path)
    lowest, upper = loaded.model.get_submodule("model.layers").children()
    inner: list[Any] = [0.0]
    loaded.model.get_submodule("model.embed_tokens").register_forward_hook(lambda *_: inner.insert(0, 0.0))
    lowest.get_submodule("mlp").register_forward_hook(lambda _, inputs, output: inner.insert(0, output))
    # The upper block reads what is inside the lower one, which a pass that begins above does not compute.
    real = upper.forward
    monkeypatch.setattr(upper, "forward", lambda states, **named: real(states + 0.5 * inner[0], **named))
    below = Below(loaded, 1)
    assert not below.sound
    expected = whole(loaded, TEXTS)
    torch.testing.assert_close(begun(below, TEXTS), expected)
    assert not below.knows(TEXTS)


def test_blocks_below_are_themselves_again_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_of("llama", tmp_path)
    below = Below(loaded, 1)
    expected = begun(below, TEXTS)
    lowest = loaded.model.get_submodule("model.layers.0")

    def interrupted(self: Any, *given: Any, **named: Any) -> Any:
        assert "forward" in vars(lowest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begun(below, TEXTS)
    assert "forward" not in vars(lowest)
    assert_same(whole(loaded, TEXTS), expected, TEXTS)


def test_a_blocks_own_forward_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_of("llama", tmp_path)
    lowest = loaded.model.get_submodule("model.layers.0")
    real = lowest.forward
    monkeypatch.setattr(lowest, "forward", lambda states, **named: 2 * real(states, **named))
    own = lowest.forward
    below = Below(loaded, 1)
    expected = begun(below, TEXTS)
    assert_same(begun(below, TEXTS), expected, TEXTS)
    assert lowest.forward is own


def upper(loaded: LoadedModel) -> EditableModel:
    sites = sites_of(loaded, kinds=("mlp", "attention", "query"), layers=[1])
    return EditableModel(loaded, sites, {site.name: torch.float32 for site in sites})


@pytest.mark.parametrize("case", ["llama", "gpt_neox", "gpt2", "bloom", "falcon", "mixtral"])
def test_gradients_above_are_those_of_whole_passes(case: str, tmp_path: Path) -> None:
    loaded = loaded_of(case, tmp_path)
    demands, points = demands_and_points()

    def found(made: EditableModel) -> Linearisation:
        return linearise_at(made, made.sites, demands, points, batch_tokens=100)

    made, plain = upper(loaded), upper(loaded)
    plain.below = Below(loaded, 0)
    expected = found(plain)
    assert_alike(found(made), expected)  # learns
    assert made.below.knows([demand.tokens for demand in demands])
    below = passes_below(loaded)
    assert_alike(found(made), expected)
    assert not below


def test_gradients_above_are_the_same_with_lean_weights(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "llama", seed=3, dtype=torch.bfloat16)
    wide, lean = (load_model(open_checkpoint(tmp_path), device="cpu", lean=which) for which in (False, True))
    assert lean.lean is not None
    demands, points = demands_and_points()
    plain = upper(wide)
    plain.below = Below(wide, 0)
    expected = linearise_at(plain, plain.sites, demands, points, batch_tokens=100)
    made = upper(lean)
    for _ in range(2):  # the first learns, the second begins above
        assert_alike(linearise_at(made, made.sites, demands, points, batch_tokens=100), expected)
    below = passes_below(lean)
    linearise_at(made, made.sites, demands, points, batch_tokens=100)
    assert not below


def test_prices_leave_what_later_looks_begin_with(tmp_path: Path) -> None:
    made = upper(loaded_of("llama", tmp_path))
    demands = [Demand(text, 2) for text in TEXTS]
    metrics = []
    for site in made.sites:
        d, f = made.loaded.weight(site).shape
        metrics.append(Metric(torch.eye(f), torch.eye(d)))
    first = prices(made, metrics, demands, margin=0.3, batch_tokens=16)
    assert made.below.knows(TEXTS)
    again = prices(made, metrics, demands, margin=0.3, batch_tokens=16)
    for one, other in zip(first, again, strict=True):
        assert one.gap == pytest.approx(other.gap, abs=1e-4) and one.price == pytest.approx(other.price, rel=1e-3)


def test_further_sites_below_start_anew(tmp_path: Path) -> None:
    loaded = loaded_of("llama", tmp_path)
    made = upper(loaded)
    begun(made.below, TEXTS)
    lower = sites_of(loaded, kinds=("mlp",), layers=[0])
    made.add(lower, {site.name: torch.float32 for site in lower})
    assert made.below.first == 0 and not made.below.knows(TEXTS)


def test_sites_below_the_edit_are_seen_by_whole_passes(tmp_path: Path) -> None:
    loaded = loaded_of("llama", tmp_path)
    made = upper(loaded)
    demands, points = demands_and_points()
    everything = sites_of(loaded, kinds=("mlp",))
    plain = EditableModel(loaded, everything, {site.name: torch.float32 for site in everything})
    for _ in range(2):  # the second time the texts are known to be above
        begun(made.below, [demand.tokens for demand in demands])
        found = linearise_at(made, everything, demands, points, batch_tokens=100)
        assert_alike(found, linearise_at(plain, everything, demands, points, batch_tokens=100))
