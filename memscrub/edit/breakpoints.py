"""Which tokens of a text to break, and how deep: the cheapest set that makes the policy's limits hold.

Three kinds of limit ask for breaks: no greedy run longer than a limit (dynamic programming over the runs), no
secret span emitted whole (one break in it), and no window or span likelier than a limit under sampling
(breaks are made deeper, or more of them). Pure functions on one text's scores; knows no model.

A position's `price` is what one squared logit of movement costs in disturbance; moving the gap g to -m costs
price * (g + m)^2 (see `linearise.prices`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from memscrub.edit.modes import Mode
from memscrub.measures.extraction import IMPOSSIBLE, Sampling

# Sampling limits are aimed at with this much to spare (nats), for the error of linearisation.
SPARE = 0.5
# A deficit of log-probability is shared out in this many portions, each where it is cheapest then.
PORTIONS = 4
# No break is made deeper than this (logits): what it cannot reach, further positions must.
DEEPEST = 14.0


@dataclass(frozen=True)
class Demand:
    """What must not hold in one token sequence: the policy's limits on one text, in one context.

    `first` is the index of the first judged token. `allowed_run`: no longer greedy run. `window`: (width,
    highest log-probability of any window of that width). `spans`: (begin, end, highest log-probability or None);
    a span must not be emitted whole by greedy decoding either. `judged`: positions outside it are not looked at.
    """

    tokens: tuple[int, ...] = field(repr=False)
    first: int
    allowed_run: int | None = None
    window: tuple[int, float] | None = None
    spans: tuple[tuple[int, int, float | None], ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    judged: tuple[tuple[int, int], ...] | None = None
    mode: Mode = Mode.NEXT_BEST
    rival: int | None = None  # the token that takes the place of broken ones, where the mode fixes it

    def stretches(self) -> Sequence[tuple[int, int]]:
        """The index ranges `[begin, end)` in which runs and windows are judged."""
        return ((self.first, len(self.tokens)),) if self.judged is None else self.judged


@dataclass(frozen=True)
class TextState:
    """One text's scores as plain lists, indexed by token; entry 0 (never predicted) is filled with zeros."""

    gap: Sequence[float]
    log_p: Sequence[float]
    rest: Sequence[float]


@dataclass(frozen=True)
class Prices:
    """What movement costs at each token: `fixed + price[t] * (gap[t] + m)^2`, `gap` being the unedited model's.

    `fixed` keeps the number of breaks down where they would cost next to nothing.
    """

    gap: Sequence[float]
    price: Sequence[float]
    fixed: float = 0.0

    def cost(self, token: int, margin: float) -> float:
        """Disturbance of bringing the gap of this token to -margin."""
        return self.fixed + self.price[token] * max(0.0, self.gap[token] + margin) ** 2


def violations(demand: Demand, state: TextState, threshold: float = 0.0) -> int:
    """Number of limits of this demand that do not hold in this state; a gap above -threshold counts as emitted."""
    count = 0
    emitted = [value > -threshold for value in state.gap]
    if demand.allowed_run is not None:
        count += len(_long_runs(demand, emitted, demand.allowed_run))
    for begin, end, limit in demand.spans:
        count += all(emitted[begin:end])
        count += limit is not None and sum(state.log_p[begin:end]) > limit
    if demand.window is not None:
        width, limit = demand.window
        count += any(total > limit for _, total in _window_sums(demand, state.log_p, width))
    return count


def extend(
    demand: Demand,
    state: TextState,
    prices: Prices,
    held: Mapping[int, float],
    margin: float,
    *,
    patient: bool = True,
    threshold: float = 0.0,
) -> dict[int, float]:
    """The break points `{token: margin}` for the next solve: those held, and what the limits still ask for.

    While `patient`, held points count as broken even where the edit has not got there yet: a damped solve is on
    its way. After that, points that still stand are stuck, and others are chosen to do their work.
    A gap above -threshold counts as emitted, as in `violations`.
    """
    margins = dict(held)
    standing = [value > -threshold and not (patient and token in held) for token, value in enumerate(state.gap)]
    if demand.allowed_run is not None:
        for begin, end in _long_runs(demand, standing, demand.allowed_run):
            costs = [math.inf if token in held else prices.cost(token, margin) for token in range(begin, end)]
            if all(map(math.isinf, costs)):
                continue
            for position in cheapest_cover(costs, demand.allowed_run):
                margins.setdefault(begin + position, margin)
    for begin, end, limit in demand.spans:
        if all(standing[begin:end]):
            free = [token for token in range(begin, end) if token not in held] or list(range(begin, end))
            margins.setdefault(min(free, key=lambda token: prices.cost(token, margin)), margin)
        if limit is not None:
            temperature = demand.sampling.temperature
            _deepen(range(begin, end), limit - SPARE, state, prices, margins, margin, temperature)
    if demand.window is not None:
        _deepen_windows(demand, state, prices, margins, margin)
    return margins


def planned_cost(demand: Demand, state: TextState, prices: Prices, margin: float, threshold: float = 0.0) -> float:
    """What the break points that this demand asks for would disturb, each by itself."""
    points = extend(demand, state, prices, {}, margin, threshold=threshold)
    return sum(prices.cost(token, depth) - prices.fixed for token, depth in points.items())


def cheapest_cover(costs: Sequence[float], allowed: int) -> list[int]:
    """The cheapest positions to break so that no more than `allowed` unbroken ones stand in a row.

    Dynamic programming over the last break: best(i) = cost(i) + min of best(j) over the allowed + 1 positions
    before i. Needs at least `allowed` + 1 positions to have anything to do.
    """
    n = len(costs)
    if n <= allowed:
        return []
    best, back = [0.0] + [math.inf] * n, [0] * (n + 1)
    for i in range(1, n + 1):
        back[i] = min(range(max(0, i - allowed - 1), i), key=best.__getitem__)
        best[i] = best[back[i]] + costs[i - 1]
    i = min(range(n - allowed, n + 1), key=best.__getitem__)
    cover = []
    while i > 0:
        cover.append(i - 1)
        i = back[i]
    return cover[::-1]


def log_p_at(margin: float, rest: float, temperature: float) -> float:
    """Log-probability of a token whose gap is -margin, where the others hold `rest` (see `Scores.rest`)."""
    gap = -margin / temperature
    return gap - max(gap, rest) - math.log1p(math.exp(-abs(gap - rest)))


def margin_for(log_p: float, rest: float, temperature: float) -> float:
    """The margin at which a token has this log-probability; the inverse of `log_p_at`."""
    return -temperature * (rest + log_p - math.log(-math.expm1(min(log_p, -1e-12))))


def _long_runs(demand: Demand, emitted: Sequence[bool], allowed: int) -> list[tuple[int, int]]:
    runs = []
    for begin, end in demand.stretches():
        start = begin
        for token in range(begin, end + 1):
            if token == end or not emitted[token]:
                if token - start > allowed:
                    runs.append((start, token))
                start = token + 1
    return runs


def _window_sums(demand: Demand, log_p: Sequence[float], width: int) -> list[tuple[int, float]]:
    sums = []
    for begin, end in demand.stretches():
        if end - begin >= width:
            total = sum(log_p[begin : begin + width])
            sums.append((begin, total))
            for token in range(begin + width, end):
                total += log_p[token] - log_p[token - width]
                sums.append((token - width + 1, total))
    return sums


def _expected(token: int, state: TextState, margins: Mapping[int, float], temperature: float) -> float:
    """The log-probability a token will have once the held margins are reached."""
    now = state.log_p[token]
    if token not in margins:
        return now
    return min(now, log_p_at(margins[token], state.rest[token], temperature))


def _deepen(
    region: Sequence[int],
    limit: float,
    state: TextState,
    prices: Prices,
    margins: dict[int, float],
    margin: float,
    temperature: float,
) -> None:
    """Deepen or add breaks in the region until its expected log-probability is at most `limit`."""
    expected = {token: _expected(token, state, margins, temperature) for token in region}
    for portion in range(PORTIONS, 0, -1):
        deficit = sum(expected.values()) - limit
        if deficit <= 0 or limit <= IMPOSSIBLE:
            return
        best: tuple[float, int, float] | None = None
        for token in region:
            wanted = margin_for(expected[token] - deficit / portion, state.rest[token], temperature)
            deeper = max(wanted, margins.get(token, margin))
            if deeper > DEEPEST:
                continue
            before = prices.cost(token, margins[token]) if token in margins else 0.0
            extra = prices.cost(token, deeper) - before
            if best is None or extra < best[0]:
                best = (extra, token, deeper)
        if best is None:
            continue
        _, token, margins[token] = best
        expected[token] = _expected(token, state, margins, temperature)


def _deepen_windows(demand: Demand, state: TextState, prices: Prices, margins: dict[int, float], margin: float) -> None:
    assert demand.window is not None
    width, limit = demand.window
    temperature = demand.sampling.temperature
    expected = [_expected(token, state, margins, temperature) for token in range(len(demand.tokens))]
    # Worst window first; its breaks also serve the windows that overlap it.
    for _ in range(2 * len(demand.tokens) // width + 2):
        sums = _window_sums(demand, expected, width)
        if not sums:
            return
        begin, total = max(sums, key=lambda pair: pair[1])
        if total <= limit - SPARE:
            return
        region = range(begin, begin + width)
        _deepen(region, limit - SPARE, state, prices, margins, margin, temperature)
        for token in region:
            expected[token] = _expected(token, state, margins, temperature)
