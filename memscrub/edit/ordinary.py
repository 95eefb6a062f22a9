"""Ordinary text in the unedited model and in the live one.

Rows that are looked at again and again come to the same in the unedited model every time: that is kept, and a pass made
for something else can leave it. Knows no protected text and no limit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memscrub.edit.editable import EditableModel
from memscrub.models.below import MOST_BYTES, Text, texts_of
from memscrub.models.tokens import batches
from memscrub.models.trace import weights_swapped


@dataclass
class Ordinary:
    """Rows of ordinary text in a model that carries an edit. Features of the unedited model take `room` bytes at most;
    rows beyond that pass again."""

    editable: EditableModel
    room: int = MOST_BYTES
    _before: dict[Text, Tensor] = field(default_factory=dict, repr=False)

    def learn(self, ids: Tensor, again: Collection[Text]) -> Tensor:
        """`LoadedModel.features` of rows on the device `[rows, width]`, by a pass of the model while it is unedited;
        what rows in `again` come to is kept."""
        texts = texts_of(ids)
        features = self.editable.below.features(ids, texts, again)
        if self.editable.loaded.projects:  # else they are the logits themselves
            with torch.inference_mode(False):
                for text, row in zip(texts, features, strict=True):
                    if text in again:
                        self._keep(text, row.detach().clone())
        return features

    def before(self, ids: Tensor) -> Tensor:
        """Logits of the unedited model for rows on the device `[rows, width]`."""
        texts = texts_of(ids)
        if all(text in self._before for text in texts):
            features = torch.stack([self._before[text] for text in texts])
        else:
            with weights_swapped(self.editable.loaded, self.editable.originals):
                features = self.learn(ids, texts)
        return self.editable.loaded.unembed(features)

    def after(self, ids: Tensor) -> Tensor:
        """Logits of the live model, likewise."""
        return self.editable.below.logits(ids)

    def compared(self, rows: Tensor, batch_tokens: int = 2048) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of ids of these rows `[rows, width]`, and the log-probabilities `[rows, width, vocabulary]` at every
        position in the unedited and in the live model."""
        loaded = self.editable.loaded
        for batch in batches([rows.shape[1]] * len(rows), loaded.batch_tokens(batch_tokens, gradients=True)):
            ids = rows[batch].to(loaded.device)
            with torch.inference_mode():
                yield ids, self.before(ids).log_softmax(-1), self.after(ids).log_softmax(-1)

    def _keep(self, text: Text, features: Tensor) -> None:
        size = features.numel() * features.element_size()
        if text not in self._before and size <= self.room:
            self._before[text] = features
            self.room -= size
