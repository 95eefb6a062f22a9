"""The sites of a loaded model, found by its family's row of the architecture table; knows no checkpoint on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from memscrub.errors import ArchitectureError, UsageError
from memscrub.models.architecture import Experts, Layout
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site


def sites_of(
    loaded: LoadedModel, *, kinds: Sequence[str] = ("mlp", "attention"), layers: Sequence[int] | None = None
) -> tuple[Site, ...]:
    """The sites of these kinds in these layers (all by default), in order of kind and layer.

    Raises ArchitectureError when a block lacks a module its family should have, so that no layer is skipped
    silently, and UsageError for a layer the model does not have.
    """
    family, count = loaded.family, layer_count(loaded)
    wanted = range(count) if layers is None else layers
    if missing := [layer for layer in wanted if layer >= count]:
        raise UsageError(f"[fix] layers names layer {missing[0]}, but this model has layers 0 to {count - 1}.")
    found: list[Site] = []
    for kind in kinds:
        path = {"mlp": family.mlp, "attention": family.attention, "query": family.query}[kind]
        for layer in wanted:
            block = f"{family.blocks}.{layer}"
            if kind == "mlp" and family.experts is not None and _has(loaded, f"{block}.{family.experts.path}"):
                found += _expert_sites(loaded, family.experts, block, layer)
                continue
            _module(loaded, f"{block}.{path}")
            site = Site(f"{block}.{path}", kind, layer, family.orientation)
            if kind == "query" and family.layout is not Layout.ALONE:
                output = replace(site, name=f"{block}.{family.attention}")
                _module(loaded, output.name)
                sizes = loaded.weight(output).shape[1], loaded.weight(site).shape[0]
                site = replace(site, rows=_query_rows(loaded, family.layout, *sizes))
            found.append(site)
    return tuple(found)


def layer_count(loaded: LoadedModel) -> int:
    """How many blocks the model has. Raises ArchitectureError where they are not at their family's place."""
    family = loaded.family
    try:
        blocks = loaded.model.get_submodule(family.blocks)
    except AttributeError:
        raise ArchitectureError(
            f"the model has no module '{family.blocks}', which the family '{family.model_type}' should have."
        ) from None
    assert isinstance(blocks, nn.ModuleList)
    return len(blocks)


def _expert_sites(loaded: LoadedModel, experts: Experts, block: str, layer: int) -> list[Site]:
    """The sites of a mixture-of-experts block: what every token passes through, then each routed expert."""
    found = []
    if experts.shared is not None:
        _module(loaded, f"{block}.{experts.shared}")
        found.append(Site(f"{block}.{experts.shared}", "mlp", layer, loaded.family.orientation))
    name = f"{block}.{experts.path}"
    matrices = getattr(_module(loaded, name), "down_proj", None)
    if not isinstance(matrices, Tensor) or matrices.ndim != 3:
        raise ArchitectureError(f"'{name}' does not hold the matrices of its experts as memscrub expects them.")
    found += [Site(f"{name}.{n}", "mlp", layer, experts.orientation, expert=n) for n in range(len(matrices))]
    return found


def _has(loaded: LoadedModel, name: str) -> bool:
    try:
        loaded.model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _module(loaded: LoadedModel, name: str) -> nn.Module:
    try:
        return loaded.model.get_submodule(name)
    except AttributeError:
        raise ArchitectureError(
            f"the model has no module '{name}', which the family '{loaded.family.model_type}' should have;"
            " nothing was edited."
        ) from None


def _query_rows(loaded: LoadedModel, layout: Layout, size: int, fused: int) -> tuple[int, ...]:
    """The coordinates of the queries, `size` in all, in the output of a projection with `fused` coordinates."""
    if layout is Layout.FIRST:
        return tuple(range(size))
    width = size // head_count(loaded)
    # Besides the queries there are a key and a value for each head, or for each group of heads that share them.
    groups = (fused - size) // (2 * width)
    queries = size // groups
    return tuple((queries + 2 * width) * group + i for group in range(groups) for i in range(queries))


def head_count(loaded: LoadedModel) -> int:
    """Number of attention heads of one layer."""
    heads = getattr(loaded.model.config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        raise ArchitectureError("config.json does not say how many attention heads the model has.")
    return heads
