"""Room for an edit: a limit counts as broken where the rows say so by more than their own standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import opened, ordinary_rows, random_text, tiny_checkpoint
from torch import Tensor

from memscrub.errors import NumericalError
from memscrub.locality.distance import Compared, both, compare_stream
from memscrub.locality.room import PARTS, at_its_kindest, without_room
from memscrub.models.model import LoadedModel
from memscrub.policy.sections import Locality as Limits
from memscrub.reports.locality_limits import StreamDistance

ROWS = ordinary_rows(7, 2 * PARTS, 40)
NAME = "model.layers.0.mlp.down_proj.weight"
ANYTHING = Limits(max_kl=100.0, max_perplexity_ratio=100.0, min_agreement=0.01)


def allowing(**limits: float) -> Limits:
    """Nearly anything but what is said."""
    return ANYTHING.model_copy(update=limits)


@dataclass
class Disturbed:
    """A model that still works, with one tensor changed."""

    loaded: LoadedModel
    originals: dict[str, Tensor]

    def compared(self, rows: Tensor) -> Compared:
        return both(self.loaded, self.originals, rows)

    def measured(self, rows: Tensor = ROWS) -> StreamDistance:
        return compare_stream(self.compared(rows))


@pytest.fixture
def disturbed(tmp_path: Path) -> Disturbed:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=1, texts=[random_text(1, 40)], steps=60))
    weight = loaded.tensor(NAME)
    original = weight.detach().clone()
    weight.data.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    return Disturbed(loaded, {NAME: original})


def spread(disturbed: Disturbed) -> tuple[StreamDistance, dict[str, float]]:
    """What all rows say, and the standard error of each mean from the rows' parts, by numpy."""
    parts = [disturbed.measured(ROWS[2 * n : 2 * n + 2]) for n in range(PARTS)]
    values = {
        "kl": [part.kl for part in parts],
        "agreement": [part.agreement for part in parts],
        "log ratio": [math.log(part.perplexity_ratio) for part in parts],
    }
    return disturbed.measured(), {name: np.std(each, ddof=1) / PARTS**0.5 for name, each in values.items()}


def test_a_limit_is_broken_only_by_more_than_a_standard_error(disturbed: Disturbed) -> None:
    measured, error = spread(disturbed)
    assert min(error.values()) > 0 and measured.agreement > 0.92  # no limit of models that no longer work is met
    for errors, broken in ((0.9, False), (1.1, True)):
        for name, limits in (
            ("max_kl", allowing(max_kl=measured.kl - errors * error["kl"])),
            ("min_agreement", allowing(min_agreement=measured.agreement + errors * error["agreement"])),
            (
                "max_perplexity_ratio",
                allowing(
                    max_perplexity_ratio=measured.perplexity_ratio * math.exp(-errors * error["log ratio"]),
                ),
            ),
        ):
            assert len(without_room(disturbed.compared, ROWS, limits, surely=False)) == 1
            found = without_room(disturbed.compared, ROWS, limits)
            assert [sentence.split()[1] for sentence in found] == ([name] if broken else []), (name, errors)


def test_what_is_said_is_what_was_measured(disturbed: Disturbed) -> None:
    measured, _ = spread(disturbed)
    (sentence,) = without_room(disturbed.compared, ROWS, allowing(max_kl=measured.kl / 10))
    assert f"measured {measured.kl:.4g}," in sentence
    assert without_room(disturbed.compared, ROWS, ANYTHING) == ()


def test_the_worst_row_is_no_mean_and_one_row_has_no_spread(disturbed: Disturbed) -> None:
    measured, _ = spread(disturbed)
    (sentence,) = without_room(disturbed.compared, ROWS, allowing(max_worst_kl=0.999 * measured.worst_kl))
    assert "max_worst_kl" in sentence
    alone = disturbed.measured(ROWS[:1])
    (sentence,) = without_room(disturbed.compared, ROWS[:1], allowing(max_kl=0.999 * alone.kl))
    assert "max_kl" in sentence


def test_the_kindest_reading_is_never_better_than_the_original() -> None:
    nothing = StreamDistance(10, 0.0, 0.0, 1.0, 1.0)
    parts = [nothing, replace(nothing, kl=1.0, agreement=0.5, perplexity_ratio=2.0)]
    kindest = at_its_kindest(replace(nothing, kl=0.1, agreement=0.9, perplexity_ratio=1.01), parts)
    assert (kindest.kl, kindest.agreement) == (0.0, 1.0)


def test_a_broken_model_has_no_room_and_no_number_is_an_error(disturbed: Disturbed) -> None:
    disturbed.loaded.tensor(NAME).data.mul_(-50.0)
    assert any("agreement" in sentence for sentence in without_room(disturbed.compared, ROWS, ANYTHING))
    disturbed.loaded.tensor(NAME).data.fill_(math.nan)
    with pytest.raises(NumericalError, match="not finite"):
        without_room(disturbed.compared, ROWS, ANYTHING)
