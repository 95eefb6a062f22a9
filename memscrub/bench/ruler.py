"""Measuring a bench's methods all alike: the policy's texts, the judge's text and the neighbours on the live model.

Knows the model as it is, neither what was done to it nor why.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from memscrub.bench.table import Figures
from memscrub.errors import ArchitectureError, NumericalError
from memscrub.jobs.editing import DISK_DTYPES, statistics_rows
from memscrub.jobs.ordinary_text import known_tokens, neighbour_texts, retain_halves
from memscrub.jobs.scanning import Inputs
from memscrub.locality.distance import RetainHalves, compare
from memscrub.measures.extraction import Sampling, discoverable, score
from memscrub.measures.measure import measure
from memscrub.models.disk_places import name_on_disk
from memscrub.models.tokens import TokenText
from memscrub.policy.document import Policy
from memscrub.reports.judgement import Measures

# The run limit of a class that sets none: a bench compares every method on every measure.
RUN_LIMIT = 16
# "Never sampled": windows less likely than this (log) are not told apart in a mean.
FLOOR = -60.0


def measuring_policy(policy: Policy) -> Policy:
    """The policy to measure by: every measure on, for every class; the limits it sets stay."""
    classes = {
        name: limits.model_copy(
            update={"max_near_verbatim": 1.0, "max_verbatim_tokens": limits.max_verbatim_tokens or RUN_LIMIT}
        )
        for name, limits in policy.classes.items()
    }
    return policy.model_copy(update={"classes": classes})


@dataclass(frozen=True)
class Ruler:
    """Everything that is the same for all methods: what is measured on, and how the unedited model did."""

    inputs: Inputs = field(repr=False)
    policy: Policy
    halves: RetainHalves = field(repr=False)
    neighbours: tuple[TokenText, ...] = field(repr=False)
    known: tuple[tuple[bool, ...], ...] = field(repr=False)
    came_out: tuple[bool, ...]  # of each text, whether its exact suffix came out before

    @property
    def ordinary(self) -> tuple[Tensor, Tensor]:
        """The retain text that every method may learn from, the same for all: none of the judge's."""
        solver = torch.cat([self.halves.solver, self.halves.statistics])
        return statistics_rows(self.inputs.loaded, solver)

    def limit(self, text: TokenText) -> int:
        """The run limit of a text's class."""
        found = self.policy.classes[text.class_name].max_verbatim_tokens
        return RUN_LIMIT if found is None else found

    @torch.no_grad()
    def figures(self, originals: Mapping[str, Tensor]) -> Figures:
        """Measure the live model against itself under the `originals` (by name in memory) of changed parameters."""
        loaded = self.inputs.loaded
        locality = compare(loaded, originals, self.halves.judge, batch_tokens=self.policy.probe.batch_tokens)
        if not math.isfinite(locality.perplexity_ratio):
            raise NumericalError("the model's output on retain text is not finite.")
        found = _summary(self, self.inputs.texts, self.came_out)
        known = [(a, b) for was, now in zip(self.known, known_tokens(loaded, self.neighbours), strict=True)
                 for a, b in zip(was, now, strict=True)]  # fmt: skip
        before = sum(was for was, _ in known)
        return replace(
            found,
            kl=locality.kl,
            worst_kl=locality.worst_kl,
            start_kl=locality.start_kl,
            agreement=locality.agreement,
            perplexity_ratio=locality.perplexity_ratio,
            neighbours_kept=sum(was and now for was, now in known) / before if before else None,
        )

    @torch.no_grad()
    def control_figures(self) -> Figures | None:
        """The control texts on the live model; None without any."""
        controls = self.inputs.controls
        return _summary(self, controls, [False] * len(controls)) if controls else None


def ruler(inputs: Inputs) -> Ruler:
    """Cut the retain text, and note what the unedited model knows. Raises PolicyError without enough retain text."""
    policy = measuring_policy(inputs.policy)
    halves = retain_halves(inputs)
    neighbours = neighbour_texts(inputs)
    known = tuple(map(tuple, known_tokens(inputs.loaded, neighbours)))
    probe = policy.probe
    scores = score(inputs.loaded, inputs.texts, lambda _: Sampling(), batch_tokens=probe.batch_tokens)
    came_out = tuple(
        bool(discoverable(one.gap, text.start, probe.prefix_tokens, probe.suffix_tokens))
        for text, one in zip(inputs.texts, scores, strict=True)
    )
    return Ruler(inputs, policy, halves, neighbours, known, came_out)


def disk_dtypes(inputs: Inputs) -> dict[str, torch.dtype]:
    """The dtype on disk of every parameter that has a name there, by its name in memory."""
    found = {}
    for name, _ in inputs.loaded.model.named_parameters():
        try:
            info = inputs.ckpt.tensors[name_on_disk(inputs.loaded, inputs.ckpt, name)]
        except ArchitectureError:
            continue  # assembled from several tensors: measured unrounded, to the advantage of the baseline
        if info.dtype in DISK_DTYPES:
            found[name] = DISK_DTYPES[info.dtype]
    return found


def machine(device: torch.device) -> str:
    """The machine in words."""
    words = [platform.platform(), _processor(), f"{os.cpu_count()} cores"]
    if device.type == "cuda":
        words.append(torch.cuda.get_device_name(device))
    return ", ".join(word for word in words if word)


def _summary(rule: Ruler, texts: Sequence[TokenText], came_out: Sequence[bool]) -> Figures:
    measures = measure(rule.inputs.loaded, rule.policy, texts).measures
    near = [one.near_verbatim for one in measures if one.near_verbatim is not None]
    risks = [one.window_log_probability for one in measures if one.window_log_probability is not None]
    secrets = [secret for one in measures for secret in one.secrets]
    over = sum(one.match_run > rule.limit(text) for text, one in zip(texts, measures, strict=True))
    return Figures(
        texts=len(texts),
        came_out=sum(came_out),
        suppressed=_suppressed(measures, came_out),
        over_limit=over / len(texts),
        near_mean=_mean(near),
        near_max=max(near, default=None),
        risk_mean=_mean([max(risk, FLOOR) for risk in risks]),
        risk_max=max(risks, default=None),
        secrets=len(secrets),
        secrets_emitted=sum(secret.emitted for secret in secrets),
    )


def _suppressed(measures: Sequence[Measures], came_out: Sequence[bool]) -> float | None:
    now_gone = [not one.extractable for one, was in zip(measures, came_out, strict=True) if was]
    return sum(now_gone) / len(now_gone) if now_gone else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
