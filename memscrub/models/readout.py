"""What a write into the residual stream says to the vocabulary: unembedding rows seen through the final norm.

A write w moves the logits by W_U (gain * w) times a positive scale that the final norm takes from the whole
stream at that position. This module knows everything but that scale, which changes neither ranks nor signs. It
knows the model and its family's row of the architecture table, no texts and no edits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from memscrub.errors import ArchitectureError
from memscrub.models.architecture import Gain, Norm
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site

# The unembedding is converted to float32 this many rows at a time.
ROWS = 4096


@dataclass(frozen=True)
class Readout:
    """The unembedding as the residual stream sees it.

    `rows` `[vocabulary, d]` is the live unembedding; `gain` `[d]` the final norm's; a `centred` norm subtracts the
    mean first.
    """

    rows: Tensor = field(repr=False)
    gain: Tensor = field(repr=False)
    centred: bool

    def direction(self, token: int) -> Tensor:
        """The vector u `[d]` for which u·w is what the write w says to this token."""
        seen = self.rows[token].float() * self.gain
        return seen - seen.mean() if self.centred else seen

    def projections(self, writes: Tensor) -> Tensor:
        """What writes `[d, n]` say to each token, `[vocabulary, n]`: row t is direction(t)·w."""
        if self.centred:
            writes = writes - writes.mean(0, keepdim=True)
        writes = writes * self.gain[:, None]
        blocks = torch.split(self.rows, ROWS)
        return torch.cat([block.float() @ writes for block in blocks])


def readout(loaded: LoadedModel) -> Readout:
    """The readout of a model.

    Raises ArchitectureError when the family's row says nothing of the final norm, when the model lacks the norm
    the row names, or when something stands between that norm and the unembedding.
    """
    family = loaded.family
    if family.norm is None:
        raise ArchitectureError(
            f"memscrub's architecture table does not say which norm the family '{family.model_type}' has before its"
            " unembedding; the per-text solver needs it, the joint solver does not."
        )
    rows = loaded.model.get_output_embeddings().weight.data  # type: ignore[operator]
    gain = _gain(loaded, family.norm, family.norm.path)
    gain = torch.ones_like(rows[0], dtype=torch.float32) if gain is None else gain
    if len(gain) != rows.shape[1]:
        raise ArchitectureError(
            f"the norm '{family.norm.path}' has {len(gain)} coordinates and the unembedding reads {rows.shape[1]}:"
            " between them stands a projection that memscrub does not know."
        )
    return Readout(rows, gain, family.norm.centred)


def entry_gain(loaded: LoadedModel, site: Site) -> Tensor | None:
    """What an MLP site's write is multiplied with on its way into the residual stream, `[d]`; None for nothing.

    A norm behind the site also divides by the size of the whole write, which `locate.observe` counts towards the
    activations. Raises ArchitectureError when the model lacks what the family's row names.
    """
    family, gain = loaded.family, None
    if family.after_mlp is not None:
        gain = _gain(loaded, family.after_mlp, f"{family.blocks}.{site.layer}.{family.after_mlp.path}")
    if family.multiplier is not None:
        factor = getattr(loaded.model.config, family.multiplier, None)
        if not isinstance(factor, int | float):
            raise ArchitectureError(
                f"config.json has no number '{family.multiplier}', which the family '{family.model_type}' should have."
            )
        ones = torch.ones(len(loaded.weight(site)), device=loaded.device)
        gain = (ones if gain is None else gain) * float(factor)
    return gain


def _gain(loaded: LoadedModel, norm: Norm, path: str) -> Tensor | None:
    try:
        module = loaded.model.get_submodule(path)
    except AttributeError:
        raise ArchitectureError(
            f"the model has no module '{path}', which the family '{loaded.family.model_type}' should have."
        ) from None
    weight = getattr(module, "weight", None)
    if (weight is None) != (norm.gain is Gain.NONE):
        raise ArchitectureError(f"the norm '{path}' is not of the kind that memscrub's architecture table says it is.")
    if weight is None:
        return None
    gain: Tensor = weight.data.float()
    return 1.0 + gain if norm.gain is Gain.ONE_PLUS_WEIGHT else gain
