"""Reading a corpus with a model: windows in lots, and what of each lot greedy decoding emits; knows neither journals
nor lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from memscrub.errors import NumericalError
from memscrub.measures.passes import teacher_forced
from memscrub.mining.journal import LotFound
from memscrub.mining.stretches import Stretch, strongest
from memscrub.mining.windows import Encoder, Row, Windows, grown, rows_of, runs_of, stretches_of
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, check_ids, tokenize
from memscrub.texts.corpora import CorpusFile, FileEnd, read_file
from memscrub.texts.protected import ProtectedText

# Tokens of a lot: what is read ahead, sorted by length and written down together.
_LOT = 32768
_LOT_BATCHES = 16


@dataclass(frozen=True)
class Reading:
    """A model and how it is to read: windows, the column of the texts, tokens of a batch."""

    loaded: LoadedModel
    windows: Windows
    column: str
    batch_tokens: int

    @cached_property
    def encode(self) -> Encoder:
        """The tokenizer, for the thread that reads ahead and for the model's."""
        return Encoder(self.loaded.tokenizer)


@dataclass(frozen=True)
class Lot:
    """Windows that are read together, each with the number of its file; `controls`: they are of control texts.

    Reading stands behind piece `pieces` of file `file` after them. `tokens`: new ones of the corpus. `ends`: files
    that were read to their end meanwhile. `read`: bytes of all files so far.
    """

    rows: tuple[tuple[int, Row], ...] = field(repr=False)
    controls: bool
    file: int
    pieces: int
    tokens: int
    ends: Mapping[int, FileEnd]
    read: int


def lots_of(reading: Reading, files: Sequence[CorpusFile], controls: int, start: tuple[int, int]) -> Iterator[Lot]:
    """The windows of all files, in lots; from a place on where a lot ended, they are the same as from the beginning.

    So a run that goes on from there feeds the model the same batches, and gets the same answers to the last bit.
    """
    size = max(_LOT, _LOT_BATCHES * reading.loaded.batch_tokens(reading.batch_tokens))
    before = 0
    rows: list[tuple[int, Row]] = []
    ends: dict[int, FileEnd] = {}
    tokens = fed = 0
    for number, file in enumerate(files):
        pieces = 0
        parts = read_file(file, column=reading.column, overlap=reading.windows.repeated) if number >= start[0] else ()
        for part in parts:
            if isinstance(part, FileEnd):
                ends[number] = part
                continue
            pieces += 1
            if (number, pieces) <= start:
                continue
            new, count = rows_of(part, reading.windows, reading.loaded.prompt, reading.encode)
            rows += [(number, row) for row in new]
            tokens += count
            fed += sum(len(row.tokens) for row in new)
            if fed >= size:
                yield Lot(tuple(rows), number < controls, number, pieces, tokens, ends, before + part.read)
                rows, ends, tokens, fed = [], {}, 0, 0
        before += file.size
        # Controls and corpus are counted apart, so they share no lot.
        if number + 1 in (controls, len(files)) and (rows or ends):
            yield Lot(tuple(rows), number < controls, number + 1, 0, tokens, ends, before)
            rows, ends, tokens, fed = [], {}, 0, 0


def found_in(reading: Reading, lot: Lot) -> LotFound:
    """What the model gives away in a lot, runs that reach a window's end followed to theirs."""
    loaded, windows, budget = reading.loaded, reading.windows, reading.batch_tokens
    rows = [row for _, row in lot.rows]
    for row in rows:
        check_ids(loaded, row.tokens)
    pieces: dict[int, list[Stretch]] = {}
    longer: list[tuple[int, Row]] = []
    candidates = 0
    for (file, row), emitted in zip(lot.rows, _emitted(loaded, rows, budget), strict=True):
        if not (runs := runs_of(row, emitted, windows.run)):
            continue
        candidates += len(runs)
        pieces.setdefault(id(row.piece), []).extend(stretches_of(row, runs, file, windows.lead))
        if runs[-1][1] == row.stop and (follow := grown(row, runs[-1][0], windows, reading.encode)) is not None:
            longer.append((file, follow))
    followed = [row for _, row in longer]
    for (file, row), emitted in zip(longer, _emitted(loaded, followed, budget), strict=True):
        runs = runs_of(row, emitted, windows.run)
        pieces[id(row.piece)].extend(stretches_of(row, runs, file, windows.lead))
    merged = [stretch for stretches in pieces.values() for stretch in strongest(stretches)]
    counts = {
        "tokens": lot.tokens,
        "windows": len(rows) + len(longer),
        "fed": sum(len(row.tokens) for row in (*rows, *followed)),
        "candidates": candidates,
        "merged": len(merged),
    }
    telling = tuple(stretch for stretch in merged if not stretch.trivial)
    return LotFound(lot.controls, lot.file, lot.pieces, counts, lot.ends, telling)


@dataclass(frozen=True)
class _Greedy:
    """Reads off logits `[n, vocabulary]` whether greedy decoding emits the true token: 1, 0, or NaN."""

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor]:
        best, said = logits.max(-1)
        return (torch.where(torch.isfinite(best), (said == targets).float(), torch.nan),)


def _emitted(loaded: LoadedModel, rows: Sequence[Row | TokenText], batch_tokens: int) -> Iterator[list[bool]]:
    """Per row, whether each token from its first judged one on comes out, the true text before it given."""
    found = teacher_forced(
        loaded,
        rows,
        lambda row: _Greedy(),
        first_of=lambda row: row.judged if isinstance(row, Row) else row.first_judged(1),
        batch_tokens=batch_tokens,
    )
    for (values,) in found:
        if bool(values.isnan().any()):
            raise NumericalError("the model's output is not finite; nothing can be measured on this checkpoint.")
        yield values.bool().tolist()


def longest_runs(loaded: LoadedModel, forms: Sequence[tuple[str, str]], batch_tokens: int) -> list[int | None]:
    """Longest run of every (prefix, text), tokenized and judged as a scan would; None where it is too long."""
    texts: dict[int, TokenText] = {}
    whole = replace(loaded, max_positions=2**30)  # too long is an answer here, no error
    for i, (prefix, text) in enumerate(forms):
        entry = ProtectedText("mined", text, "", (), source=None, prefix=prefix or None, file="", line=1)
        (tokens,) = tokenize(whole, [entry])
        if len(tokens.tokens) <= loaded.max_positions:
            texts[i] = tokens
    found: list[int | None] = [None] * len(forms)
    for i, emitted in zip(texts, _emitted(loaded, list(texts.values()), batch_tokens), strict=True):
        longest = current = 0
        for said in emitted:
            current = current + 1 if said else 0
            longest = max(longest, current)
        found[i] = longest
    return found
