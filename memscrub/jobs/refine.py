"""What an edited model still gives away where the first demands did not look: further demands for the next run.

Two places: the model's own continuations that come too close to a text, and the texts in other contexts. Measures
the live model; edits nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from memscrub.edit.breakpoints import Demand, violations
from memscrub.edit.contexts import in_context, kinds
from memscrub.edit.demands import continuation_demand
from memscrub.edit.joint import JointEdit
from memscrub.edit.linearise import states_of
from memscrub.jobs.scanning import Inputs
from memscrub.measures.ceilings import with_ceilings
from memscrub.measures.continuation import Continuation
from memscrub.measures.extraction import NOISE
from memscrub.measures.measure import measure
from memscrub.policy.sections import ClassLimits


@dataclass(frozen=True)
class Further:
    """Demands to add to an edit, and the break points that each holds from the start."""

    demands: tuple[Demand, ...] = field(default=(), repr=False)
    held: tuple[Mapping[int, float], ...] = field(default=(), repr=False)

    def __add__(self, other: Further) -> Further:
        return Further(self.demands + other.demands, self.held + other.held)


def near_verbatim(inputs: Inputs, edit: JointEdit) -> Further:
    """Demands in the model's own continuations that are nearer to their text than its class allows.

    The first demands of the edit are the texts' own, in order; a continuation breaks as its text does.
    """
    policy = with_ceilings(inputs.loaded, inputs.policy, inputs.controls)
    if all(limits.max_near_verbatim is None for limits in policy.classes.values()):
        return Further()
    said = measure(inputs.loaded, policy, inputs.texts).continuations
    found = [
        continuation_demand(each, edit.demands[each.opening.text])
        for each in said
        if _too_close(policy.classes[inputs.texts[each.opening.text].class_name], each)
    ]
    demands = tuple(demand for demand in found if demand.judged)  # letters alone may agree, and no token
    return Further(demands, tuple({} for _ in demands))


def _too_close(limits: ClassLimits, said: Continuation) -> bool:
    return limits.max_near_verbatim is not None and said.similarity > limits.max_near_verbatim


def other_contexts(inputs: Inputs, edit: JointEdit, ordinary: Tensor) -> Further:
    """Demands on texts that do not hold in the policy's other contexts, with their text's own break points.

    The first demands of the edit are the texts' own, in order. A context that has become a demand already is not
    asked for again. The same tokens break in every context, so their constraints are nearly parallel and cheap.
    """
    wanted = kinds(inputs.policy.fix.contexts)
    have = {demand.tokens for demand in edit.demands}
    found: list[Demand] = []
    held: list[Mapping[int, float]] = []
    for kind in wanted:
        for index, text in enumerate(inputs.texts):
            own = edit.demands[index]
            moved = in_context(inputs.loaded, text, own, kind, ordinary, seed=inputs.seed)
            if moved is None or moved.tokens in have:
                continue
            shift = len(moved.tokens) - len(own.tokens)
            found.append(moved)
            held.append({t + shift: m for t, m in edit.held[index].items() if t + shift >= moved.first})
    states = states_of(inputs.loaded, found, batch_tokens=inputs.policy.probe.batch_tokens)
    noise = NOISE[inputs.loaded.dtype]
    broken = [index for index, state in enumerate(states) if violations(found[index], state, noise)]
    return Further(tuple(found[index] for index in broken), tuple(held[index] for index in broken))
