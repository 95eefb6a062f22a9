"""The edit as a policy asks for it: every solver, mode and set of sites, from the policy file to live weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from editing_world import ALLOWED, laid_out, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from models import changed, snapshot
from torch import Tensor

from memscrub.edit.breakpoints import Demand, TextState, violations
from memscrub.edit.contexts import Context, in_context
from memscrub.edit.demands import AGREEING, continuation_demand, demand_of
from memscrub.edit.guards import HEAVY, Guard, find_guards
from memscrub.edit.linearise import states_of
from memscrub.edit.modes import Mode
from memscrub.edit.ordinary import Ordinary
from memscrub.errors import UsageError
from memscrub.jobs import joint_editing
from memscrub.jobs.editing import Edit, make_edit
from memscrub.jobs.ordinary_text import known_tokens, neighbour_texts, retain_halves
from memscrub.jobs.scanning import Inputs
from memscrub.locality.distance import Compared
from memscrub.locality.room import without_room
from memscrub.measures.ceilings import with_ceilings
from memscrub.measures.continuation import Continuation, Opening
from memscrub.measures.measure import measure
from memscrub.policy.sections import Locality as Limits

CONTEXTS: tuple[Context, ...] = ("unrelated", "perturbed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laid_out(tmp_path_factory.mktemp("editing"))


def longest(inputs: Inputs) -> int:
    return max(each.match_run for each in measure(inputs.loaded, inputs.policy, inputs.texts).measures)


def edit_of(inputs: Inputs) -> Edit:
    return make_edit(inputs, retain_halves(inputs))


@pytest.mark.parametrize(
    "fix",
    [
        'mode = "next-best"',
        'mode = "suppress"',
        'mode = "redact"\nmarker = "w07"',
        'mode = "ensemble"\nmarker = "w07"',
        'sites = "mlp"',
        'sites = "mlp"\nfallback = "none"\nlayers = [1]',
        'sites = "mlp+attention"',
    ],
)
@pytest.mark.usefixtures("room")
def test_the_joint_solver_takes_the_texts_out_and_says_what_it_did(folder: Path, fix: str) -> None:
    inputs = opened(folder, fix)
    before = snapshot(inputs.loaded)
    assert longest(inputs) > 3 * ALLOWED
    edit = edit_of(inputs)
    assert edit.made.outcome.unmet == ()
    assert longest(inputs) <= ALLOWED
    assert edit.made.no_room == ()
    assert set(edit.tensors()) == changed(inputs.loaded, before)
    if 'sites = "mlp"' in fix:
        assert all("down_proj" in name for name in edit.tensors())
    edit.editable.restore()
    assert changed(inputs.loaded, before) == set()


@pytest.mark.usefixtures("room")
def test_guards_are_looked_for_twice_in_the_solvers_half_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = opened(folder, "rounds = 12")
    halves = retain_halves(inputs)
    found: list[list[Guard]] = []
    looked_at: list[Tensor] = []
    asked: list[Tensor] = []

    def spied(ordinary: Ordinary, rows: Tensor, **more: Any) -> list[Guard]:
        assert set(map(tuple, rows.tolist())) <= set(map(tuple, halves.solver.tolist()))
        looked_at.append(rows)
        assert more["known"] == [guard for earlier in found for guard in earlier]
        found.append(find_guards(ordinary, rows, **more))
        return found[-1]

    def room(compared: Callable[[Tensor], Compared], rows: Tensor, limits: Limits, *, surely: bool) -> tuple[str, ...]:
        asked.append(rows)
        assert surely  # no text is waived
        return without_room(compared, rows, limits, surely=surely)

    monkeypatch.setattr(joint_editing, "find_guards", spied)
    monkeypatch.setattr(joint_editing, "without_room", room)
    told: list[tuple[str, int, int]] = []
    edit = make_edit(inputs, halves, progress=lambda *each: told.append(each))
    assert not edit.made.outcome.unmet
    assert len(found) == 2
    assert found[0]  # a model this tiny is full, and gives something else away for every text that goes
    guarded, rest = (set(map(tuple, rows.tolist())) for rows in (looked_at[0], asked[-1]))
    assert guarded and rest and guarded | rest == set(map(tuple, halves.solver.tolist()))
    assert not guarded & rest  # what guards favour is not asked whether there is room
    assert ("ordinary text to guard", len(looked_at[0]), len(looked_at[0])) in told


@pytest.mark.usefixtures("room")
def test_whether_there_is_room_is_asked_of_few_rows_from_all_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = opened(folder)
    halves = retain_halves(inputs)
    asked: list[list[int]] = []

    def room(compared: Callable[[Tensor], Compared], rows: Tensor, limits: Limits, *, surely: bool) -> tuple[str, ...]:
        asked.append([halves.solver.tolist().index(row) for row in rows.tolist()])
        return without_room(compared, rows, limits, surely=surely)

    monkeypatch.setattr(joint_editing, "without_room", room)
    monkeypatch.setattr(joint_editing, "ROOM_ROWS", 2)
    make_edit(inputs, halves)
    (one, other) = asked[-1]
    assert other - one >= len(halves.solver) // 4


@pytest.mark.usefixtures("room")
def test_guards_keep_what_the_model_was_sure_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = opened(folder, "rounds = 12")
    halves = retain_halves(inputs)
    guarded: list[Tensor] = []

    def spied(ordinary: Ordinary, rows: Tensor, **more: Any) -> list[Guard]:
        guarded.append(rows)
        return find_guards(ordinary, rows, **more)

    def log_p() -> Tensor:
        with torch.inference_mode():
            return inputs.loaded.logits(guarded[0]).log_softmax(-1)

    edited = []
    for find in (spied, lambda *those, **more: []):
        monkeypatch.setattr(joint_editing, "find_guards", find)
        edit = make_edit(inputs, halves)
        edited.append(log_p())
        edit.editable.restore()
    before = log_p()
    gaps = before.topk(2).values
    with_guards, without = ((before.exp() * (before - after)).sum(-1) for after in edited)
    held = (without >= HEAVY) & (gaps[..., 0] - gaps[..., 1] > 1.0)
    assert int(held.sum()) > 10
    # A model this tiny has no room to hold them all (`test_guards` has one that does).
    assert with_guards[held].mean() < 0.9 * without[held].mean()


def test_where_nothing_is_to_be_broken_ordinary_text_is_not_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = opened(folder, "")
    for name in ("find_guards", "price_factors"):
        monkeypatch.setattr(joint_editing, name, lambda *those, **more: pytest.fail("ordinary text was looked at"))
    before = snapshot(inputs.loaded)
    edit_of(replace(inputs, texts=()))
    assert changed(inputs.loaded, before) == set()


@pytest.mark.parametrize("mode", ["next-best", "ensemble"])
@pytest.mark.usefixtures("room")
def test_the_per_text_solver_edits_located_mlp_neurons_only(folder: Path, mode: str) -> None:
    inputs = opened(folder, f'solver = "per-text"\nmode = "{mode}"\nmarker = "w07"\nmargin = 1.0\nneurons = 12')
    before, ran = snapshot(inputs.loaded), longest(inputs)
    edit = edit_of(inputs)
    assert changed(inputs.loaded, before)
    assert all("down_proj" in name for name in changed(inputs.loaded, before))
    assert longest(inputs) < ran
    assert len(edit.made.outcome.unmet) == sum(
        each.match_run > ALLOWED for each in measure(inputs.loaded, inputs.policy, inputs.texts).measures
    )
    edit.editable.restore()
    assert changed(inputs.loaded, before) == set()


def test_a_mode_whose_token_this_tokenizer_lacks_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="end-of-text token"):
        edit_of(opened(folder, 'mode = "eos"'))


@pytest.mark.usefixtures("room")
def test_texts_hold_in_the_contexts_that_the_policy_names(folder: Path) -> None:
    inputs = opened(folder, 'contexts = ["start", "unrelated", "perturbed"]')
    halves = retain_halves(inputs)
    edit = make_edit(inputs, halves)
    assert longest(inputs) <= ALLOWED
    limits, probe = inputs.policy.classes["c"], inputs.policy.probe
    moved = [
        in_context(inputs.loaded, text, demand_of(text, limits, probe), kind, halves.solver, seed=inputs.seed)
        for kind in CONTEXTS
        for text in inputs.texts
    ]
    demands = [demand for demand in moved if demand is not None]
    assert len(demands) == 6
    states = states_of(inputs.loaded, demands, batch_tokens=500)
    assert sum(bool(violations(d, s)) for d, s in zip(demands, states, strict=True)) == 0
    edit.editable.restore()


@pytest.mark.usefixtures("room")
def test_like_controls_makes_no_window_likelier_than_the_controls_are(folder: Path) -> None:
    inputs = opened(folder, "margin = 0.3", "like_controls = true")
    ceilings = with_ceilings(inputs.loaded, inputs.policy, inputs.controls)
    limit = ceilings.classes["c"].max_sampling_probability
    assert limit is not None and limit < 1e-3
    before = measure(inputs.loaded, ceilings, inputs.texts).measures
    edit = edit_of(inputs)
    after = measure(inputs.loaded, ceilings, inputs.texts).measures
    assert edit.made.outcome.unmet == ()
    assert min(m.window_log_probability or 0.0 for m in before) > math.log(limit)
    assert max(m.window_log_probability or 0.0 for m in after) <= math.log(limit)
    assert all((b.near_verbatim or 0.0) > (a.near_verbatim or 0.0) for b, a in zip(before, after, strict=True))
    edit.editable.restore()


TRUTH = tuple(range(40))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([1, 1, 1, 0]), min_size=len(TRUTH), max_size=len(TRUTH)), st.integers(1, 12))
def test_a_continuation_that_is_too_close_always_has_something_to_break(agreeing: list[int], every: int) -> None:
    said = tuple(t if own and t % every else 100 + t for t, own in zip(TRUTH, agreeing, strict=True))
    opening = Opening(0, 0, (50, 51), TRUTH)
    own = Demand((50, 51, *TRUTH), first=1, allowed_run=8, mode=Mode.EOS, rival=60)
    found = continuation_demand(Continuation(opening, said, 0.5), own)
    assert (found.mode, found.rival, found.tokens) == (Mode.EOS, 60, (50, 51, *said))
    same = sum(a == b for a, b in zip(said, TRUTH, strict=True))
    emitted = TextState([1.0] * 42, [0.0] * 42, [0.0] * 42)  # the model said all of it
    if not same:
        assert found.judged == ()
        return
    assert violations(found, emitted) > 0
    assert found.allowed_run is not None and found.allowed_run <= AGREEING
    assert all(2 <= begin < end <= 42 for begin, end in found.judged or ())


def test_neighbours_are_read_whole_and_known_by_token(folder: Path) -> None:
    inputs = opened(folder, "margin = 0.3")
    texts = neighbour_texts(inputs)
    known = known_tokens(inputs.loaded, texts)
    assert len(texts) == 30
    assert all(len(each) == len(text.tokens) - 1 for each, text in zip(known, texts, strict=True))
    assert 0 < sum(map(sum, known)) < sum(map(len, known))


def test_where_not_all_texts_fit_those_that_cost_least_are_edited_and_the_reason_is_told(folder: Path) -> None:
    inputs = opened(folder, 'sites = "mlp"\nfallback = "none"\nlayers = [1]')
    before = snapshot(inputs.loaded)
    edit = edit_of(inputs)
    (reason,) = edit.made.no_room
    assert "agreement" in reason and "allowed 0.9" in reason
    assert edit.made.stages[0] == "mlp" and edit.made.stages[-1].endswith("for want of room")
    runs = [each.match_run for each in measure(inputs.loaded, inputs.policy, inputs.texts).measures]
    assert edit.made.outcome.unmet == tuple(i for i, run in enumerate(runs) if run > ALLOWED)
    assert 0 < len(edit.made.outcome.unmet) < len(runs)
    edit.editable.restore()
    assert changed(inputs.loaded, before) == set()


def test_where_not_all_texts_fit_those_that_are_waived_are_given_up_first(folder: Path) -> None:
    fix = 'sites = "mlp"\nfallback = "none"\nlayers = [1]'
    inputs = opened(folder, fix)
    edit = edit_of(inputs)
    given_up = set(edit.made.outcome.unmet)
    edit.editable.restore()
    kept = sorted(set(range(len(inputs.texts))) - given_up)
    waived = kept[: len(given_up)]  # others, as many
    waiver = '[[waiver]]\nid = "{}"\nexpires = 2999-12-31\nreason = "licensed"\n'
    more = "\n" + "".join(waiver.format(inputs.texts[index].id) for index in waived)
    again = opened(folder, fix + more)
    made = edit_of(again).made
    count = len(inputs.texts)
    assert made.stages[1] == f"{count - len(waived)} of {count} texts, for want of room"
    assert set(made.outcome.unmet) >= set(waived)
    assert not set(made.outcome.unmet) >= given_up
