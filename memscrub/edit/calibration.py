"""What a site's part of an edit really costs, measured on ordinary text, over what its metric predicted.

K-FAC takes activations and gradients as independent and the text it was estimated on for all text. Where that is
wrong it is wrong by a factor per site: MLP sites came out four times dearer than predicted and query sites cheaper
(docs/lab-notes.md). Prices scaled by the measured factors move the edit to where it is cheap in truth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memscrub.edit.disturbance import Metric
from memscrub.edit.editable import EditableModel
from memscrub.models.kept_outputs import beginning_at, outputs_kept
from memscrub.models.originals import all_but
from memscrub.models.tokens import batches
from memscrub.models.trace import by_module, weights_swapped

# A factor further from one than this says that the edit is beyond second order, not that the price is wrong.
LEAST, MOST = 0.2, 10.0


def price_factors(
    editable: EditableModel, metrics: Sequence[Metric], rows: Tensor, *, batch_tokens: int = 2048
) -> list[float]:
    """Measured KL over predicted KL for each site's part of the live edit alone, within `LEAST` and `MOST`.

    `rows` `[rows, width]` is ordinary text. One for a site that the edit leaves alone. The experts of one block are
    measured together: each alone sees too little text, and a pass for each would take long.
    """
    loaded = editable.loaded
    modules = by_module(editable.sites)
    measured = dict.fromkeys(modules, 0.0)
    budget = loaded.batch_tokens(batch_tokens, gradients=True)
    with torch.inference_mode():
        for batch in batches([rows.shape[1]] * len(rows), budget):
            ids = rows[batch].to(loaded.device)
            with weights_swapped(loaded, editable.originals), outputs_kept(loaded) as kept:
                before = loaded.logits(ids)[:, :-1].log_softmax(-1)
            for module, indices in modules.items():
                layer = editable.sites[indices[0]].layer
                # Blocks before the module's are those of the original: they are not run again, nor swapped.
                idle = {s.tensor for s in editable.sites if s.layer < layer or s.module == module}
                with weights_swapped(loaded, all_but(editable.originals, idle)), beginning_at(loaded, layer, kept):
                    after = loaded.logits(ids)[:, :-1].log_softmax(-1)
                measured[module] += float((before.exp() * (before - after)).sum())
    count = max(1, rows[:, 1:].numel())
    factors = [1.0] * len(editable.sites)
    for module, indices in modules.items():
        predicted = sum(editable.price(n, metrics[n]) for n in indices)
        if predicted > 0:
            factor = min(max(measured[module] / count / predicted, LEAST), MOST)
            for index in indices:
                factors[index] = factor
    return factors
