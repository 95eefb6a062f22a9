"""What rows of ordinary text come to in both models, and how seldom the unedited one is asked."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from editing_world import laid_out
from editing_world import opened as opened_inputs
from models import changed, opened, ordinary_rows, snapshot, tiny_checkpoint
from test_guards import pushed
from torch import Tensor

from memscrub.edit import ordinary
from memscrub.edit.disturbance import Metric, measure_disturbance
from memscrub.edit.editable import EditableModel
from memscrub.edit.ordinary import Ordinary
from memscrub.jobs import joint_editing
from memscrub.jobs.editing import make_edit
from memscrub.jobs.ordinary_text import retain_halves
from memscrub.locality.distance import both
from memscrub.models.below import texts_of
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import sites_of

ROWS = ordinary_rows(5, rows=8, width=24)
FAMILIES = ("llama", "gpt2", "gpt_neox", "opt")


def passes(loaded: LoadedModel, layer: int = -1) -> list[int]:
    """One entry for each pass through that block's MLP from now on."""
    made: list[int] = []
    block = list(loaded.model.get_submodule(loaded.family.blocks).children())[layer]
    block.get_submodule("mlp").register_forward_hook(lambda *_: made.append(1))
    return made


def logits(loaded: LoadedModel, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return loaded.logits(rows)


def upper(loaded: LoadedModel) -> EditableModel:
    """Editable in the last block alone."""
    sites = sites_of(loaded, kinds=("mlp",), layers=[1])
    return EditableModel(loaded, sites, {site.name: torch.float32 for site in sites})


@pytest.fixture
def llama(tmp_path: Path) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path / "checkpoint", "llama", seed=4))


@pytest.mark.parametrize("family", FAMILIES)
def test_before_is_the_unedited_model_and_after_the_live_one(family: str, tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path / "checkpoint", family, seed=4))
    unedited = logits(loaded, ROWS)
    made, deltas = pushed(loaded, 0.05)
    live = snapshot(loaded)
    rows = Ordinary(made)
    for again in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(rows.before(ROWS), unedited, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(rows.after(ROWS), logits(loaded, ROWS), atol=1e-4, rtol=1e-4)
        assert changed(loaded, live) == set()
        assert float((logits(loaded, ROWS) - unedited).abs().max()) > 0.1
        if not again:
            made.apply([2 * delta for delta in deltas])
            live = snapshot(loaded)


def test_the_unedited_model_is_asked_once_for_a_row(llama: LoadedModel) -> None:
    made, _ = pushed(llama, 0.05)
    rows = Ordinary(made)
    _ = llama.projects, made.below.sound
    counted = passes(llama)
    for _ in range(3):
        rows.before(ROWS)
        rows.before(ROWS[[5, 2]])  # in another batch, too
    assert len(counted) == 1
    rows.after(ROWS)
    assert len(counted) == 2
    rows.before(ordinary_rows(6, 2, 24))
    assert len(counted) == 3


def test_rows_beyond_the_room_pass_again(llama: LoadedModel) -> None:
    made, _ = pushed(llama, 0.05)
    unedited = Ordinary(made).before(ROWS)
    size = 4 * ROWS.shape[1] * llama.model.config.hidden_size
    rows = Ordinary(made, room=2 * size + size // 2)
    torch.testing.assert_close(rows.before(ROWS), unedited)
    assert rows.room == size // 2
    counted = passes(llama)
    torch.testing.assert_close(rows.before(ROWS[:2]), unedited[:2], atol=1e-5, rtol=1e-5)
    assert counted == []
    torch.testing.assert_close(rows.before(ROWS[:3]), unedited[:3], atol=1e-5, rtol=1e-5)
    assert len(counted) == 1


def test_where_the_head_is_not_known_nothing_is_kept(llama: LoadedModel) -> None:
    made, _ = pushed(llama, 0.05)
    unedited = Ordinary(made).before(ROWS)
    vars(llama)["projects"] = False  # features are the logits then
    rows = Ordinary(made)
    for _ in range(2):
        torch.testing.assert_close(rows.before(ROWS), unedited, atol=1e-5, rtol=1e-5)
    counted = passes(llama)
    rows.before(ROWS)
    assert len(counted) == 1


def test_both_models_are_compared_as_by_whole_passes(llama: LoadedModel) -> None:
    made, _ = pushed(llama, 0.05)
    expected = list(both(llama, made.originals, ROWS, batch_tokens=72))
    found = list(Ordinary(made).compared(ROWS, batch_tokens=72))
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0])
        for log_p, same in zip(one[1:], other[1:], strict=True):
            torch.testing.assert_close(log_p, same, atol=1e-5, rtol=1e-5)
    assert float((found[0][1] - found[0][2]).abs().max()) > 0.1


def test_a_pass_for_the_statistics_leaves_the_rows_that_are_wanted(llama: LoadedModel) -> None:
    made = upper(llama)
    rows = Ordinary(made)
    _ = llama.projects, made.below.sound
    wanted = texts_of(ROWS[::2])
    learn = partial(rows.learn, again=wanted)

    def measured(**more: object) -> list[Metric]:
        return measure_disturbance(llama, made.sites, [ROWS], seed=0, batch_tokens=72, **more)  # type: ignore[arg-type]

    expected = measured()
    for one, other in zip(measured(features=learn), expected, strict=True):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.outputs, other.outputs)
    assert made.below.knows(wanted) and not any(made.below.knows([text]) for text in texts_of(ROWS[1::2]))
    made.apply([torch.full_like(llama.weight(site), 0.05) for site in made.sites])
    lower, above = passes(llama, 0), passes(llama)
    rows.before(ROWS[::2])
    assert (lower, above) == ([], [])
    rows.after(ROWS[::2])
    assert (lower, above) == ([], [1])
    rows.before(ROWS[1::2])
    assert (lower, above) == ([1], [1, 1])


def test_an_edit_asks_the_unedited_model_by_its_statistics_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = opened_inputs(laid_out(tmp_path), "rounds = 12")
    halves = retain_halves(inputs)
    looked_at: list[str] = []
    for name in ("price_factors", "find_guards", "without_room"):
        real = getattr(joint_editing, name)
        monkeypatch.setattr(
            joint_editing, name, lambda *a, _n=name, _r=real, **k: (looked_at.append(_n), _r(*a, **k))[1]
        )
    swapped: list[int] = []
    real_swap = ordinary.weights_swapped
    monkeypatch.setattr(ordinary, "weights_swapped", lambda *those: (swapped.append(1), real_swap(*those))[1])
    stored = tmp_path / "statistics"
    edits = []
    for number in range(2):
        edit = make_edit(inputs, halves, statistics=stored)
        assert {"price_factors", "find_guards", "without_room"} <= set(looked_at)
        assert bool(swapped) == bool(number)  # the second time the statistics are read, and no pass left anything
        edits.append([delta.clone() for delta in edit.editable.deltas])
        edit.editable.restore()
    for one, other in zip(*edits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
