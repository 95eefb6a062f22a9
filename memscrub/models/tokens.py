"""Texts as token ids: what the model is fed, where judging starts and which tokens are secrets; batches of them.

Knows the tokenizer, not the model's answers. Token ids reveal a text as surely as its words, so no `repr` shows
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memscrub.errors import CheckpointError, UsageError
from memscrub.models.model import LoadedModel
from memscrub.storage.untrusted_config import Encoding
from memscrub.texts.protected import Document, ProtectedText

PADDING = 0
# Tokens of a row of ordinary text.
ROW = 256


@dataclass(frozen=True, slots=True)
class TokenText:
    """A protected text as token ids.

    `tokens` starts with the prompt (beginning-of-text token and the entry's own `prefix`, both given freely);
    the text itself starts at index `start`. `secrets` are index ranges `[begin, end)` into `tokens`; `unjudged` counts
    marked secrets that have none, as nothing predicts them. `file` and `line` say where the text stands in its list,
    for texts from one.
    """

    id: str
    class_name: str
    tokens: tuple[int, ...] = field(repr=False)
    start: int
    secrets: tuple[tuple[int, int], ...] = ()
    file: str | None = None
    line: int | None = None
    unjudged: int = 0

    @property
    def length(self) -> int:
        """Number of tokens of the text itself."""
        return len(self.tokens) - self.start

    def first_judged(self, min_prefix_tokens: int) -> int:
        """Index of the first token that is judged: the adversary is given at least something."""
        return max(1, self.start + min_prefix_tokens)


def tokenize(loaded: LoadedModel, texts: Sequence[ProtectedText]) -> tuple[TokenText, ...]:
    """Token ids of protected texts; secrets become the tokens that overlap their characters.

    Raises UsageError when a text is longer than the model can read.
    """
    known: dict[int, int] = {}
    return tuple(_tokenize_one(loaded, text, known) for text in texts)


def _tokenize_one(loaded: LoadedModel, text: ProtectedText, known: dict[int, int]) -> TokenText:
    before = text.prefix or ""
    with Encoding():
        encoded = loaded.tokenizer(before + text.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    check_ids(loaded, ids)
    _check_known(loaded, text, ids)
    shift = len(loaded.prompt)
    # One object per token id in all texts, not one per token: 8 bytes a token instead of 40.
    tokens = loaded.prompt + tuple(known.setdefault(i, i) for i in ids)
    if len(tokens) > loaded.max_positions:
        raise UsageError(
            f"{text.file}:{text.line}: the text '{text.id}' has {len(tokens)} tokens, more than the"
            f" {loaded.max_positions} this model reads at once; split it into several entries."
        )
    start = next((i for i, (_, end) in enumerate(spans) if end > len(before)), len(ids))
    secrets = []
    for begin, end in text.secrets:
        inside = [i for i, (a, b) in enumerate(spans) if a < end + len(before) and b > begin + len(before) and a < b]
        if inside and inside[-1] + shift > 0:  # nothing predicts the very first token
            secrets.append((inside[0] + shift, inside[-1] + 1 + shift))
    unjudged = len(text.secrets) - len(secrets)
    return TokenText(text.id, text.class_name, tokens, start + shift, tuple(secrets), text.file, text.line, unjudged)


def _check_known(loaded: LoadedModel, text: ProtectedText, ids: Sequence[int]) -> None:
    # A tokenizer that is not the model's own makes every text look harmless.
    unknown = getattr(loaded.tokenizer, "unk_token_id", None)
    if not ids or 2 * sum(token == unknown for token in ids) > len(ids):
        raise UsageError(
            f"{text.file}:{text.line}: the checkpoint's tokenizer knows hardly anything of the text '{text.id}', so"
            " nothing can be measured; check that the tokenizer files belong to this checkpoint."
        )


def check_ids(loaded: LoadedModel, ids: Sequence[int]) -> None:
    """Raise CheckpointError for token ids that the model has no vectors for: its tokenizer is another model's."""
    largest = max((*ids, *loaded.prompt), default=0)
    if largest >= loaded.vocabulary:
        raise CheckpointError(
            f"the tokenizer gives the token id {largest}, but the model knows {loaded.vocabulary} tokens; check that"
            " the tokenizer files belong to this checkpoint."
        )


def decoded(loaded: LoadedModel, ids: Sequence[int]) -> str:
    """The characters of these tokens. Raises CheckpointError where the tokenizer fails at them."""
    with Encoding():
        return str(loaded.tokenizer.decode(list(ids)))


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Right-padded ids `[len(rows), longest]`; rows without any token make one column of padding."""
    width = max(1, *map(len, rows))
    return torch.tensor([list(row) + [PADDING] * (width - len(row)) for row in rows], dtype=torch.long)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices grouped so that each padded batch holds at most `budget` tokens (at least one text).

    Texts of similar length go together, in a deterministic order.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def blocks(loaded: LoadedModel, documents: Sequence[Document], *, limit: int | None = None) -> Tensor:
    """Documents end to end, cut into rows `[rows, width]` as in training; at most `limit` tokens.

    The rest that fills no row is dropped; less than one row in all makes one short row.
    """
    width = min(ROW, loaded.max_positions - len(loaded.prompt))
    stream: list[int] = []
    for document in documents:
        if limit is not None and len(stream) >= limit:
            break
        text = "\n\n" + document.text if stream else document.text
        with Encoding():
            stream += loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    check_ids(loaded, stream)
    stream = stream if limit is None else stream[: max(limit, 2)]
    width = min(width, max(1, len(stream)))
    count = len(stream) // width
    return torch.tensor(stream[: count * width], dtype=torch.long).view(count, width)


def prompted(loaded: LoadedModel, rows: Tensor) -> Tensor:
    """The same rows with each at the beginning of a text: behind the prompt."""
    prompt = torch.tensor([loaded.prompt] * len(rows), dtype=torch.long).view(len(rows), len(loaded.prompt))
    return torch.cat([prompt, rows], dim=1)
