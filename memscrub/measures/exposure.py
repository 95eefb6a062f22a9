"""Exposure of a marked secret: how far the model prefers it to other values of its shape; knows no limits.

Carlini et al. 2019, "The Secret Sharer" (arXiv 1802.08232): of the space R of values that the secret could have had,
rank them by likelihood in the secret's own context; exposure is log2|R| - log2 rank bits. A model that knows nothing
of the secret gives about 1.4 bits on average whatever the size of R; one that knows it by heart gives log2|R|.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memscrub.errors import NumericalError
from memscrub.maths.secret_candidates import Kind, candidates
from memscrub.measures.passes import shared_prefix_forced
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, tokenize
from memscrub.texts.protected import ProtectedText

# With the secret itself 1,024 values: exposure is resolved up to 10 bits, and three digits are counted in full.
CANDIDATES = 1023
# A skew-normal fitted to fewer scores, or further than this from them, says nothing of their tail.
LEAST_FITTED = 100
REJECTED = 1.63  # Kolmogorov-Smirnov distance times the root of the number of scores, at 1%


@dataclass(frozen=True)
class Exposure:
    """How far the model prefers one marked secret to other values of its shape, everything before it given.

    `begin`, `end`: its token range, as in `TokenText.secrets`. `space_bits`: log2 of the number of values of the
    shape. `rank`: 1 is the likeliest of the secret and its `candidates`; equals count as likelier. `complete`: the
    candidates are the whole space. `log_probability`: natural logarithm, over the whole vocabulary, no top-k cut.
    `token_ranks`: each token's rank in the vocabulary, the true text before it given; here equals do not count.
    `extrapolated_bits`: exposure in the whole space by a skew-normal fitted to the candidates' scores; an estimate,
    None where the space was counted in full or the scores do not look skew-normal.
    """

    begin: int
    end: int
    kind: Kind
    space_bits: float
    candidates: int
    complete: bool
    rank: int
    log_probability: float
    token_ranks: tuple[int, ...]
    extrapolated_bits: float | None

    @property
    def bits(self) -> float:
        """Exposure: exact when `complete`, else among the sample, and then at most log2(candidates + 1)."""
        return math.log2(self.candidates + 1) - math.log2(self.rank)

    @property
    def at_least(self) -> bool:
        """No sampled candidate came close: exposure may be higher than `bits`, the sample cannot tell."""
        return not self.complete and self.rank == 1

    @property
    def top_k_reach(self) -> int:
        """The smallest k for which every token of the secret is among the k likeliest: top-k sampling reaches it."""
        return max(self.token_ranks)


@dataclass(frozen=True)
class SpanScore:
    """Of each token of a row from some index on: log-probability over the whole vocabulary, and rank (1: likeliest)."""

    log_p: Tensor = field(repr=False)
    ranks: Tensor = field(repr=False)


def exposures(
    loaded: LoadedModel, text: ProtectedText, *, count: int = CANDIDATES, seed: int = 0, batch_tokens: int = 8192
) -> tuple[Exposure | None, ...]:
    """The exposure of each marked secret of a text, in order, against at most `count` values of its shape.

    Other secrets of the text stay as they are: those before it are given. None where nothing of the secret can vary
    (a name or an e-mail made of words that the text before it holds), or where nothing predicts its first token. The
    choice of candidates depends on the seed, the text's id and the place only. Raises UsageError when the text is
    longer than the model reads; candidates that are, are left out.
    """
    tokenize(loaded, [text])  # the text itself must fit
    return tuple(_exposure(loaded, text, span, count, seed, batch_tokens) for span in text.secrets)


def _exposure(
    loaded: LoadedModel, text: ProtectedText, span: tuple[int, int], count: int, seed: int, batch_tokens: int
) -> Exposure | None:
    begin, end = span
    given = (text.prefix or "") + text.text[:begin]
    others = candidates(text.text[begin:end], count, random.Random(f"{seed}/{text.id}/{begin}"), given=given)
    true = _with_value(loaded, text, span, text.text[begin:end])
    if not others.values or not true.secrets:
        return None
    first, last = true.secrets[0]
    truth, rows = true.tokens[:last], []
    for value in others.values:
        other = _with_value(loaded, text, span, value)
        if other.secrets and len(other.tokens) <= loaded.max_positions:
            rows.append(other.tokens[: other.secrets[0][1]])
    # Another value may change how the text right before it is tokenised: likelihoods are compared from the first
    # token on that not all rows share.
    shared = _shared(truth, rows)
    since = min(first, shared)
    if since < 1:  # without a beginning-of-text token: nothing predicts the first token, by which values differ
        return None
    distinct = dict.fromkeys([truth, *rows])  # values that tokenise alike are scored once, so that they tie
    found = dict(zip(distinct, _span_scores(loaded, list(distinct), since, batch_tokens), strict=True))
    totals = torch.stack([found[row].log_p.sum() for row in [truth, *rows]])
    total, values = totals[0], totals[1:]
    score, inside = found[truth], slice(first - since, None)
    complete = others.complete and len(rows) == len(others.values)
    return Exposure(
        begin=first,
        end=last,
        kind=others.kind,
        space_bits=others.space_bits,
        candidates=len(rows),
        complete=complete,
        rank=1 + int((values >= total).sum()),
        log_probability=float(score.log_p[inside].sum()),
        token_ranks=tuple(int(rank) for rank in score.ranks[inside]),
        extrapolated_bits=None if complete else extrapolated_bits(values, float(total), others.space_bits),
    )


def _with_value(loaded: LoadedModel, text: ProtectedText, span: tuple[int, int], value: str) -> TokenText:
    """The text with that value for the secret, tokenised anew; the secret alone is marked."""
    begin, end = span
    changed = replace(text, text=text.text[:begin] + value + text.text[end:], secrets=((begin, begin + len(value)),))
    return tokenize(replace(loaded, max_positions=sys.maxsize), [changed])[0]


def _shared(truth: tuple[int, ...], rows: Sequence[tuple[int, ...]]) -> int:
    """Number of leading tokens that all rows share."""
    shared = len(truth)
    for row in rows:
        pairs = enumerate(zip(truth[:shared], row, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(shared, len(row)))
    return shared


def _span_scores(
    loaded: LoadedModel, rows: Sequence[tuple[int, ...]], first: int, batch_tokens: int
) -> list[SpanScore]:
    """Scores of the tokens of each row from index `first` on; all rows share the tokens before `first`, at least one.

    What all rows share is read once.
    """
    values = shared_prefix_forced(
        loaded, rows[0][:first], [row[first:] for row in rows], _log_p_and_rank, batch_tokens=batch_tokens
    )
    found = [SpanScore(log_p.double(), ranks) for log_p, ranks in values]
    if not all(bool(torch.isfinite(score.log_p).all()) for score in found):
        raise NumericalError("the model's output is not finite; nothing can be measured on this checkpoint.")
    return found


def _log_p_and_rank(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability `[n]` and rank `[n]` of the true tokens, from logits `[n, vocabulary]`."""
    target = logits.gather(-1, targets[:, None])
    return target[:, 0] - logits.logsumexp(-1), 1 + (logits > target).sum(-1)


def extrapolated_bits(values: Tensor, score: float, space_bits: float) -> float | None:
    """Exposure of `score` in the whole space: -log2 of the share of values at least as likely, at most `space_bits`.

    The share is the tail of a skew-normal fitted to the sampled scores `[n]` by its first three moments (Carlini et
    al. 2019, section 4.3, fit it by likelihood). None for fewer than 100 scores, scores that are all equal, or a fit
    that the Kolmogorov-Smirnov distance rejects at 1% (candidates of different token counts may form heaps).
    """
    values = values.double().sort().values
    deviation = float(values.std(correction=0)) if len(values) >= LEAST_FITTED else 0.0
    if deviation == 0.0:
        return None
    normal = (values - values.mean()) / deviation
    skew = float((normal**3).mean().clamp(-0.95, 0.95))  # a skew-normal's skewness is below 0.996
    power = abs(skew) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * power / (power + ((4 - math.pi) / 2) ** (2 / 3))), skew)
    width = 1 / math.sqrt(1 - 2 * delta**2 / math.pi)
    place, alpha = -width * delta * math.sqrt(2 / math.pi), delta / math.sqrt(1 - delta**2)
    ranks = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    below = 1 - _log_tail((normal - place) / width, alpha).exp()
    distance = float(torch.maximum((below - ranks).abs(), (below - ranks + 1 / len(values)).abs()).max())
    if distance * math.sqrt(len(values)) > REJECTED:
        return None
    at = ((score - float(values.mean())) / deviation - place) / width
    tail = float(_log_tail(torch.tensor([at], dtype=torch.float64), alpha)[0])
    return min(max(-tail / math.log(2), 0.0), space_bits)


def _log_tail(points: Tensor, alpha: float) -> Tensor:
    """Log of the mass of a standard skew-normal above each of `points` `[n]`, density 2 phi(z) Phi(alpha z).

    Trapezoids over geometric steps behind each point, summed as logarithms: exact far out in the tail too.
    """
    grid = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-5, 1.7, 1200, dtype=torch.float64)])
    steps = torch.diff(grid)
    weights = torch.cat([steps[:1], steps[1:] + steps[:-1], steps[-1:]]) / 2
    z = points[:, None] + grid
    chance: Tensor = torch.special.log_ndtr(alpha * z)
    log_density = math.log(2) - 0.5 * z**2 - 0.5 * math.log(2 * math.pi) + chance
    return torch.logsumexp(log_density + weights.log(), -1).clamp(max=0.0)
