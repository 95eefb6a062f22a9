"""Break points: the cheapest set, deep enough that every limit holds once they are where they should be."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memscrub.edit.breakpoints import (
    DEEPEST,
    Demand,
    Prices,
    TextState,
    cheapest_cover,
    extend,
    log_p_at,
    margin_for,
    violations,
)
from memscrub.measures.extraction import IMPOSSIBLE, Sampling

MARGIN = 0.3


@given(costs=st.lists(st.integers(0, 50), min_size=0, max_size=11), allowed=st.integers(0, 6))
def test_cheapest_cover_equals_exhaustive_search(costs: list[int], allowed: int) -> None:
    def covers(chosen: tuple[int, ...]) -> bool:
        edges = (-1, *chosen, len(costs))
        return all(after - before - 1 <= allowed for before, after in itertools.pairwise(edges))

    cover = tuple(cheapest_cover(costs, allowed))
    assert covers(cover)
    subsets = (
        chosen
        for count in range(len(costs) + 1)
        for chosen in itertools.combinations(range(len(costs)), count)
        if covers(chosen)
    )
    assert sum(costs[i] for i in cover) == min(sum(costs[i] for i in chosen) for chosen in subsets)


@given(margin=st.floats(-20, 20), rest=st.floats(0, 4), temperature=st.sampled_from([0.5, 0.7, 1.0, 1.5, 3.0]))
def test_margin_for_is_the_inverse_of_log_p_at(margin: float, rest: float, temperature: float) -> None:
    log_p = log_p_at(margin, rest, temperature)
    assume(log_p < -1e-6)  # closer to certainty the margin is lost in rounding
    assert margin_for(log_p, rest, temperature) == pytest.approx(margin, abs=1e-5)


@given(margin=st.floats(-20, 20), rest=st.floats(0, 4), temperature=st.floats(0.3, 3))
def test_log_p_at_is_the_logarithm_of_the_share_of_the_mass(margin: float, rest: float, temperature: float) -> None:
    own = math.exp(-margin / temperature)
    assert log_p_at(margin, rest, temperature) == pytest.approx(math.log(own / (own + math.exp(rest))), abs=1e-9)


# -- extend --------------------------------------------------------------------------------------------------


@st.composite
def states(draw: st.DrawFn, length: int, sampling: Sampling) -> TextState:
    """Scores that belong together: log_p follows from gap and rest, or the token is out of the top k."""
    gap, log_p, rest = [0.0], [0.0], [0.0]
    for _ in range(length - 1):
        g, r = draw(st.floats(-6, 9)), draw(st.floats(0, 3))
        outside = g < -2 and draw(st.booleans())
        gap.append(g)
        rest.append(r)
        log_p.append(IMPOSSIBLE if outside else log_p_at(-g, r, sampling.temperature))
    return TextState(gap, log_p, rest)


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    length, first = draw(st.integers(6, 24)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["run", "span", "window", "judged", "all"]))
    limit = math.log(draw(st.sampled_from([0.3, 1e-2, 1e-4])))
    begin = draw(st.integers(1, length - 2))
    end = draw(st.integers(begin + 1, length))
    judged = None
    if kind == "judged":
        cut = draw(st.integers(first, length - 1))
        judged = ((first, cut), (cut + 1, length)) if cut > first else ((cut + 1, length),)
    return Demand(
        tokens=tuple(range(length)),
        first=first,
        allowed_run=draw(st.integers(0, 6)) if kind in ("run", "judged", "all") else None,
        window=(draw(st.integers(1, 6)), limit) if kind in ("window", "all") else None,
        spans=((begin, end, draw(st.sampled_from([None, limit]))),) if kind in ("span", "all") else (),
        sampling=Sampling(40, draw(st.sampled_from([0.7, 1.0, 1.3]))),
        judged=judged,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Demand, TextState, Prices]:
    demand = draw(demands())
    state = draw(states(len(demand.tokens), demand.sampling))
    price = draw(st.lists(st.floats(1e-3, 10), min_size=len(demand.tokens), max_size=len(demand.tokens)))
    return demand, state, Prices(state.gap, price, draw(st.sampled_from([0.0, 0.5])))


def after(state: TextState, margins: dict[int, float], temperature: float) -> TextState:
    """The state in which every break has reached its margin, and all else is as before."""
    gap, log_p = list(state.gap), list(state.log_p)
    for token, margin in margins.items():
        gap[token] = min(gap[token], -margin)
        log_p[token] = min(log_p[token], log_p_at(margin, state.rest[token], temperature))
    return replace(state, gap=gap, log_p=log_p)


@settings(max_examples=400, deadline=None)
@given(case=cases(), threshold=st.sampled_from([0.0, 1e-3, 0.25]))
def test_once_every_break_reaches_its_margin_no_limit_is_violated(
    case: tuple[Demand, TextState, Prices], threshold: float
) -> None:
    demand, state, prices = case
    margins = extend(demand, state, prices, {}, MARGIN, threshold=threshold)
    assert violations(demand, after(state, margins, demand.sampling.temperature), threshold) == 0
    assert all(MARGIN <= margin <= DEEPEST for margin in margins.values())


@given(case=cases())
def test_a_state_without_violations_asks_for_no_run_breaks(case: tuple[Demand, TextState, Prices]) -> None:
    demand, state, prices = case
    demand = replace(demand, window=None, spans=())
    if violations(demand, state) == 0:
        assert extend(demand, state, prices, {}, MARGIN) == {}


@given(case=cases())
def test_no_token_is_broken_outside_what_is_judged(case: tuple[Demand, TextState, Prices]) -> None:
    demand, state, prices = case
    judged = {token for begin, end in demand.stretches() for token in range(begin, end)}
    judged |= {token for begin, end, _ in demand.spans for token in range(begin, end)}
    margins = extend(demand, state, prices, {}, MARGIN)
    assert set(margins) <= judged
    assert 0 not in margins


@given(case=cases(), held=st.dictionaries(st.integers(1, 5), st.floats(MARGIN, 5), max_size=3))
def test_held_breaks_are_never_dropped_nor_made_shallower(
    case: tuple[Demand, TextState, Prices], held: dict[int, float]
) -> None:
    demand, state, prices = case
    before = dict(held)
    margins = extend(demand, state, prices, held, MARGIN)
    assert held == before
    assert all(margins[token] >= margin for token, margin in held.items())


@given(case=cases())
def test_asking_again_before_the_edit_got_anywhere_asks_for_no_further_run_breaks(
    case: tuple[Demand, TextState, Prices],
) -> None:
    demand, state, prices = case
    demand = replace(demand, window=None, spans=tuple((a, b, None) for a, b, _ in demand.spans))
    margins = extend(demand, state, prices, {}, MARGIN)
    assert extend(demand, state, prices, margins, MARGIN) == margins


def uniform(length: int, gap: float) -> TextState:
    return TextState([0.0] + [gap] * (length - 1), [0.0] + [log_p_at(-gap, 0, 1)] * (length - 1), [0.0] * length)


def test_the_cheapest_tokens_of_a_run_are_broken() -> None:
    state = uniform(8, 2.0)
    price = [1.0, 9, 9, 0.1, 9, 9, 0.1, 9]
    demand = Demand(tuple(range(8)), first=1, allowed_run=3)
    assert extend(demand, state, Prices(state.gap, price), {}, MARGIN) == {3: MARGIN, 6: MARGIN}
    # A fixed price per break makes one break in the middle cheaper than two.
    assert extend(demand, state, Prices(state.gap, price, fixed=1000.0), {}, MARGIN) == {4: MARGIN}


def test_a_secret_is_broken_once_where_that_is_cheapest() -> None:
    state = uniform(8, 2.0)
    demand = Demand(tuple(range(8)), first=1, spans=((3, 6, None),))
    prices = Prices(state.gap, [1.0, 0.1, 0.1, 3, 2, 3, 0.1, 0.1])
    assert extend(demand, state, prices, {}, MARGIN) == {4: MARGIN}


def test_violations_counts_each_limit_that_does_not_hold() -> None:
    state = uniform(9, 1.0)
    demand = Demand(tuple(range(9)), first=1, allowed_run=3, window=(4, -9.0), spans=((2, 4, -9.0),))
    assert violations(demand, state) == 4
    assert violations(replace(demand, allowed_run=8), state) == 3
    assert violations(replace(demand, judged=((1, 3), (5, 8))), state) == 2  # both stretches are short enough


def test_a_gap_within_rounding_noise_counts_as_emitted_and_is_broken() -> None:
    state = uniform(5, -0.1)
    demand = Demand(tuple(range(5)), first=1, allowed_run=2)
    prices = Prices(state.gap, [1.0] * 5)
    assert violations(demand, state) == 0
    assert violations(demand, state, threshold=0.25) == 1
    assert extend(demand, state, prices, {}, MARGIN) == {}
    assert extend(demand, state, prices, {}, MARGIN, threshold=0.25)


def test_breaks_that_are_stuck_are_helped_by_others_once_patience_is_over() -> None:
    state = uniform(7, 2.0)
    demand = Demand(tuple(range(7)), first=1, allowed_run=3, spans=((4, 6, None),))
    prices = Prices(state.gap, [1, 1, 1, 0.1, 0.1, 1, 1])
    held = extend(demand, state, prices, {}, MARGIN)
    assert held == {4: MARGIN} or held == {3: MARGIN, 4: MARGIN}
    assert extend(demand, state, prices, held, MARGIN, patient=True) == held
    more = extend(demand, state, prices, held, MARGIN, patient=False)
    assert more.keys() > held.keys()
    assert 5 in more  # the secret's other token
