"""What each site's part of an edit adds to the disturbance measured on ordinary text, over what its metric predicted.

K-FAC takes activations and gradients as independent, and sites as independent of each other. Neither is so: where
text reads like a protected one, all sites push the same way, and the whole disturbs several times more than its parts
would alone (docs/lab-notes.md). Prices scaled by the measured factors move the edit to where it is cheap in truth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memscrub.edit.disturbance import Metric
from memscrub.edit.ordinary import Ordinary
from memscrub.models.tokens import batches
from memscrub.models.trace import by_module, traced

# A factor further from one than this says that the edit is beyond second order, not that the price is wrong.
LEAST, MOST = 0.1, 20.0


def price_factors(
    ordinary: Ordinary, metrics: Sequence[Metric], rows: Tensor, *, batch_tokens: int = 2048
) -> list[float]:
    """Measured over predicted disturbance of each site's part of the live edit, within `LEAST` and `MOST`.

    `rows` `[rows, width]` is ordinary text. Measured is the site's share of the KL, 1/2 <dKL/dW_l, D_l>: to second
    order the shares of all sites add up to the KL, what sites do together included. One for a site that the edit
    leaves alone. The experts of one block are measured together: each alone sees too little text.
    """
    editable = ordinary.editable
    shares = shares_of_kl(ordinary, rows, batch_tokens=batch_tokens)
    factors = [1.0] * len(editable.sites)
    for indices in by_module(editable.sites).values():
        predicted = sum(editable.price(n, metrics[n]) for n in indices)
        if predicted > 0:
            factor = min(max(sum(shares[n] for n in indices) / predicted, LEAST), MOST)
            for index in indices:
                factors[index] = factor
    return factors


def shares_of_kl(ordinary: Ordinary, rows: Tensor, *, batch_tokens: int = 2048) -> list[float]:
    """1/2 <dKL/dW_l, D_l> for every site l: what it has of the mean KL from the original to the live model on these
    rows `[rows, width]`, by one backward pass."""
    editable = ordinary.editable
    loaded, sites = editable.loaded, editable.sites
    shares = [0.0] * len(sites)
    for batch in batches([rows.shape[1]] * len(rows), loaded.batch_tokens(batch_tokens, gradients=True)):
        ids = rows[batch].to(loaded.device)
        with torch.inference_mode():
            original = ordinary.before(ids).softmax(-1)
        with traced(loaded, sites) as trace:
            logits = ordinary.after(ids)
            gradients, _ = trace.gradients_of(logits, logits.detach().softmax(-1) - original)
        for index, (site, seen, gradient) in enumerate(zip(sites, trace.seen, gradients, strict=True)):
            came = slice(None) if seen.tokens is None else seen.tokens
            moved = site.inputs(seen.values).float() @ site.part(editable.change(site)).T
            shares[index] += 0.5 * float((site.outputs(gradient.flatten(0, 1)[came]).float() * moved).sum())
    return [share / max(1, rows.numel()) for share in shares]
