"""What a per-text edit is compared with: zeros and random output vectors at the same sites; seeded.

Is it the edit that breaks a text, or would any damage at these neurons do? Knows what `per_text` locates and how
far its edit goes, nothing of policies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memscrub.edit.editable import EditableModel
from memscrub.edit.locate import Locator
from memscrub.edit.modes import Baseline, Mode
from memscrub.edit.output_vectors import Changes, kept_on_error, live_vectors, write_vectors
from memscrub.edit.per_text import (
    Break,
    PerTextOutcome,
    PerTextSettings,
    find_breaks,
    measured,
    outbidding,
    suffix_begin,
    suffix_points,
)
from memscrub.models.tokens import TokenText


def ablate(
    editable: EditableModel,
    text: TokenText,
    baseline: Baseline,
    settings: PerTextSettings,
    *,
    seed: int,
    locator: Locator | None = None,
) -> PerTextOutcome:
    """Do to the model what the baseline says instead of a next-best edit of this text; one pass only.

    The outcome names the located neurons, whatever was changed instead of them. The same seed gives the same
    weights on every device. Raises as `per_text.edit_text` does; the model is then as it was.
    """
    begin = suffix_begin(text, settings)
    locator = locator or Locator(editable.loaded, editable.sites, settings.rank)
    generator = torch.Generator().manual_seed(seed)
    with kept_on_error(editable, locator):
        seen = locator.observe(text.tokens)
        points = suffix_points(editable.loaded, seen, text, begin, settings)
        breaks = find_breaks(locator, seen, text.tokens, points, settings.neurons)
        if breaks and baseline is Baseline.RANDOM_DIRECTIONS:
            edit = outbidding(editable, locator, seen, text.tokens, breaks, Mode.NEXT_BEST, settings)
            write_vectors(editable, _turned(editable, edit, generator), locator)
        elif breaks:
            columns = _located(breaks)
            if baseline is Baseline.RANDOM_NEURONS:
                columns = _others(editable, columns, generator)
            write_vectors(editable, _zeros(editable, columns), locator)
        return measured(editable.loaded, text, begin, breaks)


def _located(breaks: Sequence[Break]) -> dict[int, list[int]]:
    """The located columns of each site, in order, each once."""
    found: dict[int, set[int]] = {}
    for place in breaks:
        for neuron in place.neurons:
            found.setdefault(neuron.site, set()).add(neuron.column)
    return {site: sorted(found[site]) for site in sorted(found)}


def _others(editable: EditableModel, columns: dict[int, list[int]], generator: torch.Generator) -> dict[int, list[int]]:
    """As many other columns of each site, drawn at random; fewer where the site has no more."""
    drawn = {}
    for index, own in columns.items():
        site = editable.sites[index]
        allowed = range(editable.loaded.weight(site).shape[1]) if site.columns is None else site.columns
        free = [column for column in allowed if column not in set(own)]
        order = torch.randperm(len(free), generator=generator).tolist()
        drawn[index] = sorted(free[place] for place in order[: len(own)])
    return drawn


def _zeros(editable: EditableModel, columns: dict[int, list[int]]) -> Changes:
    return {
        (site, column): torch.zeros_like(editable.loaded.weight(editable.sites[site])[:, column], dtype=torch.float32)
        for site, some in columns.items()
        for column in some
    }


def _turned(editable: EditableModel, edit: Changes, generator: torch.Generator) -> Changes:
    """Every output vector moved as far as the edit moves it, in a random direction."""
    turned = {}
    for (site, column), new in edit.items():
        (old,) = live_vectors(editable, site, [column]).unbind(1)
        # Drawn on the CPU: the same seed must give the same directions on every device.
        direction: Tensor = torch.randn(len(old), generator=generator).to(old.device)
        turned[site, column] = old + direction * ((new - old).norm() / direction.norm())
    return turned
