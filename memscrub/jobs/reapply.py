"""Narrow a policy to what a patch edited, for solving anew on a checkpoint that was trained further; runs nothing.

The values of a patch are worth nothing on other weights. Where it edited is: the same sites are tried first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from memscrub.models.architecture import Family, family_of
from memscrub.policy.document import Policy

# [fix] sites of a policy, and the kinds of matrices each of them edits; from few to many.
_SITES: tuple[tuple[str, frozenset[str]], ...] = (
    ("mlp", frozenset({"mlp"})),
    ("mlp+attention", frozenset({"mlp", "attention"})),
    ("mlp+attention+queries", frozenset({"mlp", "attention", "query"})),
)


def narrowed(policy: Policy, tensors: Sequence[str], config: Mapping[str, Any]) -> Policy | None:
    """`policy` with `[fix]` restricted to the layers and kinds of sites that `tensors` (stored names) are of.

    Never wider than `policy` itself. None where a name is not one of the family's sites, or nothing is in common:
    then there is nothing to narrow by. Limits, and what `policy.digest` says, stay.

    Raises:
        ArchitectureError: the family is not in the architecture table.
    """
    places = [_place(name, family_of(config)) for name in tensors]
    known = [place for place in places if place is not None]
    if not known or len(known) < len(places):
        return None
    kinds, layers = {kind for kind, _ in known}, {layer for _, layer in known}
    if policy.fix.named_layers is not None:
        layers &= set(policy.fix.named_layers)
    allowed = next(index for index, (name, _) in enumerate(_SITES) if name == policy.fix.sites)
    wanted = next(index for index, (_, edits) in enumerate(_SITES) if kinds <= edits)
    if not layers:
        return None
    fix = policy.fix.model_copy(update={"layers": tuple(sorted(layers)), "sites": _SITES[min(allowed, wanted)][0]})
    return policy.model_copy(update={"fix": fix})


def _place(name: str, family: Family) -> tuple[str, int] | None:
    """Kind and layer of a stored weight; its name may lack the outermost modules, as GPT-2's on the hub do."""
    blocks = re.escape(family.blocks.rpartition(".")[2])
    endings = [(kind, f"{path}.weight") for kind, path in _paths(family)]
    endings += [("mlp", ending) for ending in (() if family.experts is None else family.experts.stored)]
    for kind, ending in endings:
        pattern = re.escape(ending).replace(re.escape("{expert}"), r"\d+")
        if found := re.fullmatch(rf"(?:.*\.)?{blocks}\.(\d+)\.{pattern}", name):
            return kind, int(found[1])
    return None


def _paths(family: Family) -> list[tuple[str, str]]:
    paths = [("mlp", family.mlp), ("attention", family.attention), ("query", family.query)]
    if family.experts is not None and family.experts.shared is not None:
        paths.append(("mlp", family.experts.shared))
    return paths
