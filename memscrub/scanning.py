"""The scan: what does a checkpoint give away of the policy's texts? Reads, measures, reports; changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from memscrub.ceilings import with_ceilings
from memscrub.checkpoint import Checkpoint, open_checkpoint
from memscrub.measure import Progress, measure, silent
from memscrub.model import LoadedModel, load_model
from memscrub.policy import Policy, load_policy
from memscrub.protected import ProtectedList, load_controls, load_protected
from memscrub.records import (
    checkpoint_record,
    environment,
    judged,
    policy_record,
    protected_record,
    text_records,
    timestamp,
)
from memscrub.report import SCHEMA, Report, TextRecord
from memscrub.tokens import TokenText, tokenize
from memscrub.verdict import decide


@dataclass(frozen=True)
class Inputs:
    """Everything a run starts from: the checkpoint, opened and loaded, and the policy with its texts."""

    source: str
    ckpt: Checkpoint
    policy: Policy
    protected: ProtectedList
    loaded: LoadedModel = field(repr=False)
    texts: tuple[TokenText, ...]
    controls: tuple[TokenText, ...]
    seed: int


def open_inputs(
    checkpoint: str | Path,
    policy: str | Path | Policy,
    *,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
) -> Inputs:
    """Open and check everything a run needs before anything is measured. Raises UsageError and its kinds."""
    torch.manual_seed(seed)
    rules = policy if isinstance(policy, Policy) else load_policy(policy)
    protected, controls = load_protected(rules), load_controls(rules)
    ckpt = open_checkpoint(checkpoint)
    loaded = load_model(ckpt, device=device, dtype=dtype)
    return Inputs(
        source=str(checkpoint),
        ckpt=ckpt,
        policy=rules,
        protected=protected,
        loaded=loaded,
        texts=tokenize(loaded, protected.texts),
        controls=tokenize(loaded, controls.texts),
        seed=seed,
    )


def scan(
    checkpoint: str | Path,
    policy: str | Path | Policy,
    *,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> Report:
    """Measure what `checkpoint` gives away of the texts that `policy` protects.

    `checkpoint` is a local directory, a Hugging Face cache snapshot or a hub id. The report's verdict carries
    the exit code. Raises UsageError (and its kinds) for unusable input, IncompleteError when the run cannot end.
    """
    return scan_inputs(open_inputs(checkpoint, policy, device=device, dtype=dtype, seed=seed), progress=progress)


def scan_inputs(inputs: Inputs, *, progress: Progress = silent, kind: str = "scan") -> Report:
    """`scan` on inputs that are open already."""
    policy = with_ceilings(inputs.loaded, inputs.policy, inputs.controls)
    measured = measure(inputs.loaded, policy, inputs.texts, progress=progress)
    records = text_records(policy, inputs.texts, measured.measures)
    return Report(
        schema=SCHEMA,
        kind=kind,
        created=timestamp(),
        policy=policy_record(inputs.policy),
        protected=protected_record(inputs.policy, inputs.protected),
        input=checkpoint_record(inputs.source, inputs.ckpt),
        output=None,
        environment=environment(inputs.loaded, inputs.seed),
        texts=records,
        controls=control_records(inputs, policy),
        locality=None,
        neighbours=None,
        edit=None,
        verdict=decide(judged(records)),
    )


def control_records(inputs: Inputs, policy: Policy) -> tuple[TextRecord, ...]:
    """The control texts, measured and judged like protected ones; they tell guessing from memory."""
    measured = measure(inputs.loaded, policy, inputs.controls) if inputs.controls else None
    return () if measured is None else text_records(policy, inputs.controls, measured.measures)
