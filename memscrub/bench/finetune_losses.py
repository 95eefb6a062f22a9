"""The losses of the fine-tuning baselines: their formulas, and the two terms (forget, keep) on a live model with
their gradients; knows no recipe, no optimizer and nothing of what is done with the gradients.

All logarithms are natural. A term accumulates its gradients in passes that fit the memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from memscrub.errors import UsageError
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, batches, pad

# Tokens of one forward and backward pass.
BATCH_TOKENS = 2048
# Log-probabilities of the original model on retain rows are kept for the next epoch up to this many bytes.
KEPT_BYTES = 512 * 2**20


def text_log_p(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """Log-probability of each text's counted tokens, summed, `[texts]`.

    `logits` `[texts, length, vocabulary]` and `ids` `[texts, length]` are aligned; `counted` `[texts, length]` says
    which tokens count. The first token is never counted: nothing predicts it.
    """
    each = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return -each.masked_fill(~counted[:, 1:], 0.0).sum(-1)


def npo_loss(log_p: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Negative preference optimization, (2/beta) mean log(1 + (pi / pi_ref)^beta), a scalar of at least 0.

    `log_p` and `reference` `[texts]` are the log-probabilities log pi and log pi_ref of whole texts under the
    tuned and the original model (Zhang et al. 2024, arXiv 2404.05868, eq. 3).
    """
    return functional.softplus(beta * (log_p - reference)).mean() * (2 / beta)


def ascent_loss(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Gradient ascent on the forget loss: mean log-probability per token, averaged over texts; no lower bound.

    `log_p` and `tokens` `[texts]` are each text's log-probability and number of counted tokens (Jang et al. 2023,
    arXiv 2210.01504; the first term of the contrastive objective of Stoehr et al. 2024, arXiv 2403.19851, eq. 3).
    """
    return (log_p / tokens).mean()


def divergence(original: Tensor, current: Tensor) -> Tensor:
    """KL(original || current) in nats at each position, from log-probabilities `[..., vocabulary]`."""
    return (original.exp() * (original - current)).sum(-1)


def largest_share(gradients: Sequence[Tensor], share: float) -> list[Tensor]:
    """Masks, shaped like the gradients, of the `share` of all their entries that are largest in absolute value.

    The count is rounded down but is at least one (Stoehr et al. 2024, section 5.3: "within the maximum 0.1% of all
    absolute gradient values").
    """
    flat = torch.cat([gradient.abs().flatten() for gradient in gradients])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(max(1, int(share * len(flat)))).indices] = True
    parts = torch.split(chosen, [gradient.numel() for gradient in gradients])
    return [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]


class ForgetTerm:
    """What makes the texts less likely: NPO where `beta` is given, else gradient ascent.

    NPO's reference log-probabilities are taken once, from the weights at the time of construction. Texts without a
    token at or after `first_judged(min_prefix_tokens)` are left out; raises UsageError when none is left.
    """

    def __init__(
        self, loaded: LoadedModel, texts: Sequence[TokenText], *, min_prefix_tokens: int, beta: float | None
    ) -> None:
        pairs = [(text.tokens, text.first_judged(min_prefix_tokens)) for text in texts]
        self.texts = [(tokens, first) for tokens, first in pairs if first < len(tokens)]
        if not self.texts:
            raise UsageError("no text is long enough to have a token that could be unlearned.")
        self.loaded, self.beta = loaded, beta
        self.budget = loaded.batch_tokens(BATCH_TOKENS, gradients=True)
        self.reference = None if beta is None else self.log_p()

    def backward(self, chosen: Sequence[int]) -> float:
        """The loss of these texts (by number), a mean over them; its gradients are added to the parameters'."""
        total = 0.0
        for rows in self._passes(chosen):
            log_p, tokens = self._log_p(rows)
            if self.reference is None or self.beta is None:
                loss = ascent_loss(log_p, tokens)
            else:
                loss = npo_loss(log_p, self.reference[rows], self.beta)
            total += _backward(loss * (len(rows) / len(chosen)))
        return total

    def log_p(self) -> Tensor:
        """Log-probability of every text under the weights as they are now, `[texts]`."""
        found = torch.zeros(len(self.texts), device=self.loaded.device)
        with torch.no_grad():
            for rows in self._passes(range(len(self.texts))):
                found[rows] = self._log_p(rows)[0]
        return found

    def _log_p(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probability and number of the counted tokens of these texts, both `[texts]`."""
        ids = pad([self.texts[i][0] for i in rows]).to(self.loaded.device)
        first = torch.tensor([self.texts[i][1] for i in rows], device=ids.device)
        end = torch.tensor([len(self.texts[i][0]) for i in rows], device=ids.device)
        place = torch.arange(ids.shape[1], device=ids.device)
        counted = (place >= first[:, None]) & (place < end[:, None])
        return text_log_p(self.loaded.logits(ids), ids, counted), end - first

    def _passes(self, chosen: Sequence[int]) -> Iterator[list[int]]:
        for batch in batches([len(self.texts[i][0]) for i in chosen], self.budget):
            yield [chosen[i] for i in batch]


class KeepTerm:
    """What holds the model where it was: `weight` times the mean KL(original || current) per retain token.

    The original is a frozen copy of the model at the time of construction. `retain` holds tensors of token ids
    `[rows, width]`, one for each kind of retain text.
    """

    def __init__(self, loaded: LoadedModel, retain: Sequence[Tensor], weight: float) -> None:
        self.loaded, self.retain, self.weight = loaded, retain, weight
        self.original = replace(loaded, model=copy.deepcopy(loaded.model).requires_grad_(False))
        self.budget = loaded.batch_tokens(BATCH_TOKENS, gradients=True)
        self.room = KEPT_BYTES
        self.kept: dict[tuple[int, int], Tensor] = {}

    def backward(self, chosen: Sequence[Sequence[int]]) -> float:
        """The term on these rows of each kind; its gradients are added to the parameters'."""
        tokens = sum(len(rows) * (part.shape[1] - 1) for part, rows in zip(self.retain, chosen, strict=True))
        total = 0.0
        for kind, (part, rows) in enumerate(zip(self.retain, chosen, strict=True)):
            for batch in batches([part.shape[1]] * len(rows), self.budget):
                some = [rows[i] for i in batch]
                before = self.before(kind, some)
                after = self.loaded.logits(part[some])[:, :-1].log_softmax(-1)
                total += _backward(divergence(before, after).sum() * (self.weight / tokens))
        return total

    def before(self, kind: int, rows: Sequence[int]) -> Tensor:
        """The original's log-probabilities of the next token, `[rows, width - 1, vocabulary]`.

        What was computed once is remembered as far as `KEPT_BYTES` reach.
        """
        missing = [row for row in dict.fromkeys(rows) if (kind, row) not in self.kept]
        new: dict[int, Tensor] = {}
        if missing:
            # Not inference_mode: autograd has to save these for the backward pass.
            with torch.no_grad():
                found = self.original.logits(self.retain[kind][missing])[:, :-1].log_softmax(-1)
            new = dict(zip(missing, found, strict=True))
        for row, value in new.items():
            size = value.numel() * value.element_size()
            if size <= self.room:
                self.kept[kind, row], self.room = value.clone(), self.room - size
        return torch.stack([new[row] if row in new else self.kept[kind, row] for row in rows])


def _backward(loss: Tensor) -> float:
    torch.autograd.backward(loss)
    return float(loss.detach())
