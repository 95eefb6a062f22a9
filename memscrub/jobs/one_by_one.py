"""The per-text solver on a policy's texts: each text's few neurons, one text after the other, in one model.

In the manner of arXiv 2606.18767, whose edits are made for one text at a time; many in one checkpoint disturb it far
more than the joint solver does (docs/benchmarks.md). Writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from memscrub.edit.demands import demand_of
from memscrub.edit.disturbance import Metric
from memscrub.edit.editable import EditableModel
from memscrub.edit.ensemble import choose_mode, predicted_disturbance, with_shorter_prefix
from memscrub.edit.joint import EditOutcome
from memscrub.edit.modes import Mode
from memscrub.edit.per_text import PerTextSettings, edit_texts
from memscrub.jobs.scanning import Inputs
from memscrub.measures.ceilings import with_ceilings
from memscrub.measures.measure import Progress
from memscrub.models.site_finding import sites_of
from memscrub.models.sites import Site

# A further pass looks at more neurons for the texts that still stand.
PASSES = 4
# Contexts that a mode is not chosen on: the suffix behind so many tokens of its prefix.
HELD_OUT = (8, 16)


def edit_one_by_one(
    inputs: Inputs, stored: dict[str, torch.dtype], sites: Sequence[Site], metrics: list[Metric], progress: Progress
) -> tuple[EditableModel, EditOutcome]:
    """Edit the policy's texts one after the other at these MLP sites; leaves the model edited."""
    policy = with_ceilings(inputs.loaded, inputs.policy, inputs.controls)
    editable = EditableModel(inputs.loaded, tuple(sites), stored)
    settings = PerTextSettings(
        neurons=policy.fix.neurons,
        rank=policy.fix.rank,
        margin=policy.fix.margin,
        positions="breaks",
        passes=PASSES,
        marker=policy.fix.marker,
        batch_tokens=policy.probe.batch_tokens,
    )
    modes = _modes(inputs, editable, settings, metrics)
    demands = [demand_of(text, policy.classes[text.class_name], policy.probe) for text in inputs.texts]
    last = 0

    def told(number: int, unmet: int) -> None:
        nonlocal last
        last = number
        progress(f"edit passes ({unmet} texts unmet)", number, PASSES)

    done = edit_texts(editable, demands, modes, settings, told)
    if last < PASSES:  # it needed no more passes: that was all of them
        progress(f"edit passes ({len(done.unmet)} texts unmet)", last, last)
    cost = predicted_disturbance(metrics)(editable)
    return editable, EditOutcome(done.unmet, done.breaks, 0, cost, done.passes)


def mlp_sites(inputs: Inputs) -> tuple[Site, ...]:
    """The MLP sites of the layers that the policy names, or of all."""
    return sites_of(inputs.loaded, kinds=("mlp",), layers=inputs.policy.fix.named_layers)


def _modes(inputs: Inputs, editable: EditableModel, settings: PerTextSettings, metrics: list[Metric]) -> list[Mode]:
    if inputs.policy.fix.mode != "ensemble":
        return [Mode(inputs.policy.fix.mode)] * len(inputs.texts)
    disturbance = predicted_disturbance(metrics)
    chosen = []
    for text in inputs.texts:
        # A text shorter than the usual prefix is opened at half its length, as for near-verbatim.
        own = replace(
            settings,
            prefix_tokens=min(settings.prefix_tokens, text.length // 2),
            allowed_run=inputs.policy.classes[text.class_name].max_verbatim_tokens or 0,
        )
        held_out = [with_shorter_prefix(inputs.loaded, text, own, length) for length in HELD_OUT]
        mode = choose_mode(editable, text, own, held_out=held_out, disturbance=disturbance)
        chosen.append(mode or Mode.NEXT_BEST)
    return chosen
