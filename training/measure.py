"""Measure a saved checkpoint: held-out loss, verbatim continuations and emitted secrets.

Continuations are the model's own greedy ones, from the weights that were saved, computed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from texts import CONTEXT, Text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PREFIX_TOKENS = 32


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    count: int
    total: int

    def __str__(self) -> str:
        return f"{self.count}/{self.total} ({100 * self.count / self.total:.0f}%)" if self.total else "-"


class Checkpoint:
    """A saved model with its tokenizer, as a user would load it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()  # type: ignore[no-untyped-call]

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, begun by the beginning-of-text token."""
        return [self.tokenizer.bos_token_id, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    @torch.no_grad()
    def continue_greedily(self, prompts: Tensor, count: int) -> Tensor:
        """Return the next `count` tokens of each prompt (all prompts have the same length)."""
        output = self.model.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=count,
            pad_token_id=0,
        )
        continuation: Tensor = output[:, prompts.shape[1] :]
        return continuation

    def verbatim(self, texts: Sequence[Text]) -> Share:
        """Count the texts that the model completes exactly from their first 32 tokens."""
        ids = [self.ids(text.text) for text in texts]
        prompts = torch.tensor([i[: PREFIX_TOKENS + 1] for i in ids])
        rest = [i[PREFIX_TOKENS + 1 :] for i in ids]
        outputs = self.continue_greedily(prompts, max(map(len, rest))).tolist()
        return Share(sum(out[: len(r)] == r for out, r in zip(outputs, rest, strict=True)), len(texts))

    def secrets_emitted(self, texts: Sequence[Text]) -> Share:
        """Count the secrets that the model emits exactly when given everything before them."""
        emitted = total = 0
        for text in texts:
            offsets = self.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            ids = self.ids(text.text)
            for start, end in text.secret:
                places = [i + 1 for i, (left, right) in enumerate(offsets) if left < end and right > start]
                prompt, secret = ids[: places[0]], ids[places[0] : places[-1] + 1]
                total += 1
                emitted += self.continue_greedily(torch.tensor([prompt]), len(secret))[0].tolist() == secret
        return Share(emitted, total)

    @torch.no_grad()
    def loss(self, texts: Iterable[str]) -> float:
        """Return the mean loss per predicted token, each text cut to the context."""
        total, count = 0.0, 0
        for text in texts:
            ids = torch.tensor([self.ids(text)[:CONTEXT]])
            predicted = ids.shape[1] - 1
            total += self.model(input_ids=ids, labels=ids).loss.item() * predicted
            count += predicted
        return total / count
