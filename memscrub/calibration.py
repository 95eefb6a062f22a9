"""What a site's part of an edit really costs, measured on ordinary text, over what its metric predicted.

K-FAC takes activations and gradients as independent and the text it was estimated on for all text. Where that is
wrong it is wrong by a factor per site: MLP sites came out four times dearer than predicted and query sites cheaper
(docs/lab-notes.md). Prices scaled by the measured factors move the edit to where it is cheap in truth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memscrub.disturbance import Metric
from memscrub.editable import EditableModel
from memscrub.tokens import batches
from memscrub.trace import weights_swapped

# A factor further from one than this says that the edit is beyond second order, not that the price is wrong.
LEAST, MOST = 0.2, 10.0


def price_factors(
    editable: EditableModel, metrics: Sequence[Metric], rows: Tensor, *, batch_tokens: int = 2048
) -> list[float]:
    """Measured KL over predicted KL for each site's part of the live edit alone, within `LEAST` and `MOST`.

    `rows` `[rows, width]` is ordinary text. One for a site that the edit leaves alone.
    """
    loaded = editable.loaded
    measured = [0.0] * len(editable.sites)
    budget = loaded.batch_tokens(batch_tokens, gradients=True)
    with torch.inference_mode():
        for batch in batches([rows.shape[1]] * len(rows), budget):
            ids = rows[batch].to(loaded.device)
            with weights_swapped(loaded, editable.originals):
                before = loaded.logits(ids)[:, :-1].log_softmax(-1)
            for index, site in enumerate(editable.sites):
                others = {name: value for name, value in editable.originals.items() if name != site.tensor}
                with weights_swapped(loaded, others):
                    after = loaded.logits(ids)[:, :-1].log_softmax(-1)
                measured[index] += float((before.exp() * (before - after)).sum())
    count = max(1, rows[:, 1:].numel())
    factors = []
    for site, metric, delta, total in zip(editable.sites, metrics, editable.deltas, measured, strict=True):
        predicted = metric.price(site.part(delta))
        factors.append(min(max(total / count / predicted, LEAST), MOST) if predicted > 0 else 1.0)
    return factors
