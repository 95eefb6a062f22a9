"""The measures that a policy asks for beyond those it limits: membership, prefix sweep, exposure, near mass, alignment.

Runs them and makes records of them; no limit applies to any and none enters the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

from memscrub.maths.alignment import closeness
from memscrub.measures.continuation import Continuation, Opening, continue_greedily, openings
from memscrub.measures.exposure import Exposure, exposures
from memscrub.measures.extraction import Sampling
from memscrub.measures.measure import Progress, sampling_of, silent
from memscrub.measures.membership import Signals, separations, signals
from memscrub.measures.near_beam import NearMass, near_verbatim_mass
from memscrub.measures.passes import halving
from memscrub.measures.prefix_sweep import Variant, rates, sweep_prefixes
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, decoded
from memscrub.policy.document import Policy
from memscrub.policy.sections import Also
from memscrub.reports.records import (
    AlignmentRecord,
    DepthRecord,
    DepthsRecord,
    ExposureRecord,
    PrefixRecord,
    SeparationRecord,
)
from memscrub.reports.summary import rate
from memscrub.texts.protected import ProtectedText

# Prefixes after which continuations are aligned with the truth: short ones as a person types, and a page's worth.
ALIGNED_PREFIXES = (8, 16, 32, 64)
VARIANTS: tuple[Variant, ...] = ("before_suffix", "from_start")


@dataclass(frozen=True)
class _Asker:
    """What every measure needs: the model, the policy, the texts in both forms, and whom to tell how far it is."""

    loaded: LoadedModel
    policy: Policy
    protected: Sequence[ProtectedText]
    texts: Sequence[TokenText]
    controls: Sequence[TokenText]
    seed: int
    progress: Progress

    def told(self, stage: str, total: int) -> Callable[[int], None]:
        """A progress report for one stage."""
        return lambda done: self.progress(stage, done, total)

    def by_class(self) -> Mapping[str, list[int]]:
        """Indices of the texts by class."""
        groups: dict[str, list[int]] = {}
        for index, text in enumerate(self.texts):
            groups.setdefault(text.class_name, []).append(index)
        return groups


def measure_depths(
    loaded: LoadedModel,
    policy: Policy,
    protected: Sequence[ProtectedText],
    texts: Sequence[TokenText],
    controls: Sequence[TokenText] = (),
    *,
    also: Sequence[Also],
    seed: int = 0,
    progress: Progress = silent,
) -> DepthsRecord | None:
    """The measures `also` names, of every text; None when it names none. `protected` are the texts before tokens."""
    if not also:
        return None
    asker = _Asker(loaded, policy, protected, texts, controls, seed, progress)
    found = DepthsRecord(tuple(dict.fromkeys(also)), tuple(DepthRecord(text.id, text.class_name) for text in texts))
    for name in found.measures:
        found = _MEASURES[name](asker, found)
    return found


def _membership(asker: _Asker, found: DepthsRecord) -> DepthsRecord:
    tokens = asker.policy.probe.batch_tokens
    inside = signals(
        asker.loaded, asker.texts, batch_tokens=tokens, progress=asker.told("membership", len(asker.texts))
    )
    outside = signals(asker.loaded, asker.controls, batch_tokens=tokens) if asker.controls else []
    records = tuple(
        record if each is None else replace(record, **{f.name: getattr(each, f.name) for f in fields(each)})
        for record, each in zip(found.texts, inside, strict=True)
    )
    return replace(found, texts=records, separations=tuple(_separations(asker, inside, outside)))


def _separations(
    asker: _Asker, inside: Sequence[Signals | None], outside: Sequence[Signals | None]
) -> list[SeparationRecord]:
    found = []
    for name, members in asker.by_class().items():
        ours = [each for each in (inside[i] for i in members) if each is not None]
        pairs = zip(outside, asker.controls, strict=True)
        theirs = [each for each, text in pairs if each is not None and text.class_name == name]
        if ours and theirs:
            for each in separations(ours, theirs, seed=asker.seed):
                found.append(SeparationRecord(name, each.signal, each.auc, each.interval.low, each.interval.high))
    return found


def _prefix_sweep(asker: _Asker, found: DepthsRecord) -> DepthsRecord:
    """Both forms: what is memorized may come out only behind its true beginning, or from anywhere."""
    for number, variant in enumerate(VARIANTS):
        asker.progress("prefix sweep", number, len(VARIANTS))
        sweeps = sweep_prefixes(
            asker.loaded,
            asker.texts,
            suffix=asker.policy.probe.suffix_tokens,
            variant=variant,
            batch_tokens=asker.policy.probe.batch_tokens,
        )
        prefixes = [
            PrefixRecord(name, variant, each.prefix, rate(each.extracted, each.texts))
            for name, members in asker.by_class().items()
            for each in rates([sweeps[i] for i in members])
        ]
        records = [_with_shortest(r, s.shortest, variant) for r, s in zip(found.texts, sweeps, strict=True)]
        found = replace(found, texts=tuple(records), prefixes=(*found.prefixes, *prefixes))
    asker.progress("prefix sweep", len(VARIANTS), len(VARIANTS))
    return found


def _with_shortest(record: DepthRecord, shortest: int | None, variant: Variant) -> DepthRecord:
    if variant == "before_suffix":
        return replace(record, shortest_prefix=shortest)
    return replace(record, shortest_opening=shortest)


def _exposure(asker: _Asker, found: DepthsRecord) -> DepthsRecord:
    records, total = list(found.texts), len(asker.protected)
    for index, text in enumerate(asker.protected):
        asker.progress("exposure of secrets", index, total)
        each = exposures(asker.loaded, text, seed=asker.seed, batch_tokens=asker.policy.probe.batch_tokens)
        records[index] = replace(records[index], exposures=tuple(_exposure_record(e) for e in each if e is not None))
    asker.progress("exposure of secrets", total, total)
    return replace(found, texts=tuple(records))


def _exposure_record(each: Exposure) -> ExposureRecord:
    return ExposureRecord(
        begin=each.begin,
        end=each.end,
        kind=each.kind,
        bits=each.bits,
        at_least=each.at_least,
        space_bits=each.space_bits,
        candidates=each.candidates,
        complete=each.complete,
        rank=each.rank,
        top_k_reach=each.top_k_reach,
        extrapolated_bits=each.extrapolated_bits,
    )


def _near_mass(asker: _Asker, found: DepthsRecord) -> DepthsRecord:
    """Bounds for each text from its first offset: class by class, as classes differ in how they are sampled."""
    probe, records = asker.policy.probe, list(found.texts)
    for name, members in asker.by_class().items():
        starts = openings(
            [asker.texts[i] for i in members],
            asker.loaded.prompt,
            probe.offsets[:1],
            probe.near_verbatim_prefix,
            probe.near_verbatim_tokens,
        )
        limits = asker.policy.classes[name]
        masses: list[NearMass] = halving(
            partial(_masses, asker.loaded, starts, sampling_of(limits), asker.told("near-verbatim mass", len(starts))),
            probe.batch_tokens,
        )
        for start, mass in zip(starts, masses, strict=True):
            index = members[start.text]
            records[index] = replace(records[index], near_mass=(mass.lower, mass.upper))
    return replace(found, texts=tuple(records))


def _masses(
    loaded: LoadedModel, starts: Sequence[Opening], sampling: Sampling, told: Callable[[int], None], budget: int
) -> list[NearMass]:
    return near_verbatim_mass(loaded, starts, sampling, batch_tokens=budget, progress=told)


def _continuations(
    loaded: LoadedModel, starts: Sequence[Opening], told: Callable[[int], None], budget: int
) -> list[Continuation]:
    return continue_greedily(loaded, starts, batch_tokens=budget, progress=told)


def _alignment(asker: _Asker, found: DepthsRecord) -> DepthsRecord:
    """Each measure at its highest over offsets and prefix lengths: an adversary takes the best opening for each."""
    probe, records = asker.policy.probe, list(found.texts)
    for prefix in sorted({*ALIGNED_PREFIXES, probe.near_verbatim_prefix}):
        starts = openings(asker.texts, asker.loaded.prompt, probe.offsets, prefix, probe.near_verbatim_tokens)
        told = asker.told(f"continuations after {prefix} tokens", len(starts))
        said = halving(partial(_continuations, asker.loaded, starts, told), probe.batch_tokens)
        for each in said:
            near = closeness(each.tokens, each.opening.truth, lambda ids: decoded(asker.loaded, ids))
            index = each.opening.text
            now = AlignmentRecord(*(getattr(near, f.name) for f in fields(AlignmentRecord)))
            records[index] = replace(records[index], alignment=_highest(records[index].alignment, now))
    return replace(found, texts=tuple(records))


def _highest(before: AlignmentRecord | None, now: AlignmentRecord) -> AlignmentRecord:
    if before is None:
        return now
    return AlignmentRecord(*(max(getattr(before, f.name), getattr(now, f.name)) for f in fields(AlignmentRecord)))


_MEASURES: Mapping[str, Callable[[_Asker, DepthsRecord], DepthsRecord]] = {
    "membership": _membership,
    "prefix-sweep": _prefix_sweep,
    "exposure": _exposure,
    "near-mass": _near_mass,
    "alignment": _alignment,
}
