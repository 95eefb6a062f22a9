"""The closed form: the least disturbing edit that meets the constraints, by exhaustive search and by KKT."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memscrub.edit import solver
from memscrub.edit.disturbance import Metric
from memscrub.edit.solver import JITTER, Linearised, Solution, complementary, least_disturbing_edit
from memscrub.errors import ExitCode, NumericalError


def metric(generator: torch.Generator, inputs: int, outputs: int) -> Metric:
    return Metric(*(torch.linalg.cholesky(positive_definite(generator, n)) for n in (inputs, outputs)))


def positive_definite(generator: torch.Generator, n: int) -> Tensor:
    root = torch.randn(n, n, generator=generator)
    return root @ root.T / n + 0.3 * torch.eye(n)


def problem(
    seed: int, constraints: int, shapes: tuple[tuple[int, int], ...]
) -> tuple[list[Linearised], list[Metric], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sites = [
        Linearised(torch.randn(constraints, f, generator=generator), torch.randn(constraints, d, generator=generator))
        for f, d in shapes
    ]
    metrics = [metric(generator, f, d) for f, d in shapes]
    return sites, metrics, torch.randn(constraints, generator=generator) - 0.5


def dense(solution: Solution) -> list[Tensor]:
    return [left.T @ right for left, right in zip(solution.left, solution.right, strict=True)]


def effect(sites: list[Linearised], edit: list[Tensor]) -> Tensor:
    """What the edit changes each constraint's functional by: sum_l g^T D a."""
    pairs = zip(sites, edit, strict=True)
    return torch.stack([((site.gradients @ d) * site.activations).sum(-1) for site, d in pairs]).sum(0)


def disturbance(metrics: list[Metric], edit: list[Tensor]) -> float:
    """1/2 sum_l tr(F D C D^T), by definition."""
    total = 0.0
    for each, d in zip(metrics, edit, strict=True):
        c, f = each.inputs @ each.inputs.T, each.outputs @ each.outputs.T
        total += 0.5 * float(torch.trace(f @ d @ c @ d.T))
    return total


def enumerated(sites: list[Linearised], metrics: list[Metric], bounds: Tensor, yields: Tensor | None = None) -> Tensor:
    """The minimiser as one vector, from the dense quadratic program: every active set is tried.

    min 1/2 x^T H x subject to A x <= b, where x is all entries of all edits; H and A are written out in full. With
    `yields` a constraint j may be missed by s_j, at the price of s_j^2 / (2 y_j K_jj); s comes last in x then.
    """
    blocks, rows = [], []
    for site, each in zip(sites, metrics, strict=True):
        c, f = each.inputs @ each.inputs.T, each.outputs @ each.outputs.T
        blocks.append(torch.kron(f, c).double())
        outer = site.gradients[:, :, None] * site.activations[:, None, :]
        rows.append(outer.flatten(1).double())
    h, a, b = torch.block_diag(*blocks), torch.cat(rows, dim=1), bounds.double()
    if yields is not None:
        k = (a @ torch.linalg.solve(h, a.T)).diagonal()
        h, a = torch.block_diag(h, torch.diag(1 / (yields.double() * k))), torch.cat([a, -torch.eye(len(a))], dim=1)
    n, size = a.shape
    best, best_cost = None, math.inf
    for count in range(n + 1):
        for active in map(list, itertools.combinations(range(n), count)):
            system = torch.zeros(size + count, size + count, dtype=torch.float64)
            system[:size, :size], system[:size, size:], system[size:, :size] = h, a[active].T, a[active]
            x = torch.linalg.solve(system, torch.cat([torch.zeros(size), b[active]]).double())[:size]
            cost = 0.5 * float(x @ h @ x)
            if bool((a @ x <= b + 1e-7).all()) and cost < best_cost:
                best, best_cost = x, cost
    assert best is not None
    return best


@pytest.mark.parametrize("shapes", [((4, 3),), ((5, 3), (2, 3), (3, 4))], ids=["one site", "three sites"])
@pytest.mark.parametrize("seed", range(6))
def test_the_closed_form_is_the_least_disturbing_edit_that_meets_the_constraints(
    seed: int, shapes: tuple[tuple[int, int], ...]
) -> None:
    sites, metrics, bounds = problem(seed, 5, shapes)
    solution = least_disturbing_edit(sites, metrics, bounds)
    edit = dense(solution)
    expected = enumerated(sites, metrics, bounds)
    found = torch.cat([d.flatten() for d in edit]).double()
    assert float((found - expected).norm() / expected.norm().clamp(min=1e-9)) < 5e-3
    assert bool((effect(sites, edit) <= bounds + 5e-3).all())
    assert solution.cost == pytest.approx(disturbance(metrics, edit), rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_what_gives_way_is_the_least_of_disturbance_and_of_what_is_missed(seed: int) -> None:
    sites, metrics, bounds = problem(seed, 5, ((5, 3), (2, 3)))
    yields = torch.tensor([0.1, 0.5, 2.0, 0.1, 0.5])
    edit = dense(least_disturbing_edit(sites, metrics, bounds, yields))
    expected = enumerated(sites, metrics, bounds, yields)[: -len(bounds)]
    found = torch.cat([d.flatten() for d in edit]).double()
    assert float((found - expected).norm() / expected.norm()) < 5e-3
    held = dense(least_disturbing_edit(sites, metrics, bounds))
    assert disturbance(metrics, edit) < disturbance(metrics, held)
    assert bool((effect(sites, edit) > bounds + 1e-3).any())


def test_of_two_that_contradict_each_other_the_one_that_gives_way_is_missed() -> None:
    sites, metrics, _ = problem(3, 1, ((4, 3),))
    both = [Linearised(torch.cat([s.activations] * 2), torch.cat([s.gradients, -s.gradients])) for s in sites]
    edit = dense(least_disturbing_edit(both, metrics, torch.tensor([-2.0, 0.0]), torch.tensor([0.0, 0.1])))
    assert float(effect(sites, edit)) == pytest.approx(-2.0, rel=1e-2)


def test_no_other_edit_that_meets_the_constraints_disturbs_less() -> None:
    sites, metrics, bounds = problem(11, 4, ((6, 5), (4, 5)))
    edit = dense(least_disturbing_edit(sites, metrics, bounds))
    cost, reached = disturbance(metrics, edit), effect(sites, edit)
    generator = torch.Generator().manual_seed(0)
    feasible = 0
    for _ in range(2000):
        other = [d + 0.3 * torch.randn(d.shape, generator=generator) for d in edit]
        if bool((effect(sites, other) <= reached.maximum(bounds)).all()):
            feasible += 1
            assert disturbance(metrics, other) >= cost
    assert feasible > 20


def test_one_constraint_is_met_exactly_by_a_rank_one_edit() -> None:
    sites, metrics, _ = problem(3, 1, ((4, 3),))
    solution = least_disturbing_edit(sites, metrics, torch.tensor([-2.0]))
    assert solution.active == 1
    assert int(torch.linalg.matrix_rank(dense(solution)[0])) == 1
    assert float(effect(sites, dense(solution))) == pytest.approx(-2.0, rel=2 * JITTER)


def test_constraints_that_hold_by_themselves_leave_the_model_alone() -> None:
    sites, metrics, bounds = problem(4, 6, ((4, 3), (3, 3)))
    solution = least_disturbing_edit(sites, metrics, bounds.abs())
    assert (solution.active, solution.cost) == (0, 0.0)
    assert all(not d.any() for d in dense(solution))


def test_a_constraint_stated_twice_changes_nothing() -> None:
    sites, metrics, bounds = problem(5, 4, ((4, 3),))
    twice = [Linearised(torch.cat([s.activations] * 2), torch.cat([s.gradients] * 2)) for s in sites]
    once, doubled = (
        least_disturbing_edit(sites, metrics, bounds),
        least_disturbing_edit(twice, metrics, torch.cat([bounds, bounds])),
    )
    torch.testing.assert_close(dense(once), dense(doubled), atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["bounds", "activations", "gradients", "inputs", "outputs"])
def test_what_is_not_finite_is_an_error_and_no_edit(where: str, value: float) -> None:
    sites, metrics, bounds = problem(6, 3, ((4, 3), (4, 3)))
    target = {
        "bounds": bounds,
        "activations": sites[1].activations[2],
        "gradients": sites[0].gradients[1],
        "inputs": metrics[0].inputs[2],
        "outputs": metrics[1].outputs[2],
    }[where]
    target[0] = math.nan if where in ("inputs", "outputs") else value
    with pytest.raises(NumericalError) as caught:
        least_disturbing_edit(sites, metrics, bounds)
    assert caught.value.exit_code == ExitCode.INCOMPLETE


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_constraints_that_join_a_few_at_a_time_come_to_the_same_edit(
    seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, metrics, bounds = problem(seed, 24, ((9, 7), (6, 7)))
    generator = torch.Generator().manual_seed(seed)
    yields = (torch.rand(24, generator=generator) < 0.5) * 0.2
    whole = least_disturbing_edit(sites, metrics, bounds, yields)
    monkeypatch.setattr(solver, "_AT_ONCE", at_once)
    monkeypatch.setattr(solver, "_SHARE", 0.0)
    monkeypatch.setattr(solver, "_MOST", 1.0)
    joined: list[int] = []
    real = solver._System.add

    def counted(self: solver._System, more: Tensor) -> None:
        joined.append(len(more))
        real(self, more)

    monkeypatch.setattr(solver._System, "add", counted)
    bit_by_bit = least_disturbing_edit(sites, metrics, bounds, yields)
    assert len(joined) > 24 // at_once // 3 and max(joined) <= at_once
    assert bit_by_bit.active == whole.active
    assert bit_by_bit.cost == pytest.approx(whole.cost, rel=1e-4)
    for one, other in zip(dense(bit_by_bit), dense(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_holds_once_others_do_is_not_solved_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sites, metrics, _ = problem(0, 8, ((12, 10),))
    often = [Linearised(site.activations.repeat(125, 1), site.gradients.repeat(125, 1)) for site in sites]
    bounds = -torch.linspace(2.0, 1.0, 1000)  # those of every direction from the hardest to the easiest
    solved = 0
    real = Metric.solve_inputs

    def counted(self: Metric, activations: Tensor) -> Tensor:
        nonlocal solved
        solved += len(activations)
        return real(self, activations)

    monkeypatch.setattr(Metric, "solve_inputs", counted)
    found = least_disturbing_edit(often, metrics, bounds)
    assert 0 < solved < 300
    assert bool((effect(often, dense(found)) <= bounds + 1e-3).all())


def test_no_constraints_no_edit() -> None:
    sites, metrics, bounds = problem(7, 0, ((4, 3),))
    solution = least_disturbing_edit(sites, metrics, bounds)
    assert (solution.active, solution.cost, dense(solution)[0].shape) == (0, 0.0, (3, 4))


# -- the complementarity problem -----------------------------------------------------------------------------


@st.composite
def kernels(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Random positive semidefinite kernels: of any rank, any scale, with repeated constraints."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    n, rank = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    root = torch.randn(n, rank, generator=generator)
    bounds = torch.randn(n, generator=generator) + draw(st.sampled_from([-1.0, 0.0, 1.0]))
    if n > 1 and draw(st.booleans()):
        copies = torch.randint(n, (n // 2 + 1,), generator=generator)
        root, bounds = torch.cat([root, root[copies]]), torch.cat([bounds, bounds[copies]])
    if draw(st.booleans()):
        scale = 10.0 ** torch.empty(len(root)).uniform_(-3, 3, generator=generator)
        root, bounds = root * scale[:, None], bounds * scale
    return (root @ root.T), bounds


@settings(max_examples=150, deadline=None)
@given(case=kernels())
def test_multipliers_satisfy_the_optimality_conditions(case: tuple[Tensor, Tensor]) -> None:
    kernel, bounds = case
    multipliers = complementary(kernel, bounds)
    # In the scaled variables that the jitter is defined for.
    scale = kernel.diagonal().double().rsqrt()
    scaled = kernel.double() * scale[:, None] * scale[None, :] + JITTER * torch.eye(len(bounds))
    values = multipliers / scale
    slack = scaled @ values + bounds.double() * scale
    size = 1 + float(values.max())
    assert bool((multipliers >= 0).all())
    assert bool((slack >= -1e-7 * size).all())
    assert float((values * slack).abs().max()) < 1e-7 * size**2


@settings(max_examples=60, deadline=None)
@given(case=kernels())
def test_slack_bounds_give_no_multipliers(case: tuple[Tensor, Tensor]) -> None:
    kernel, bounds = case
    assert not complementary(kernel, bounds.abs()).any()


def test_a_constraint_that_no_output_vector_can_move_does_not_spoil_the_others() -> None:
    kernel = torch.diag(torch.tensor([4.0, 0.0, 1.0]))
    multipliers = complementary(kernel, torch.tensor([-8.0, 1.0, -1.0]))
    torch.testing.assert_close(multipliers, torch.tensor([2.0, 0.0, 1.0]).double(), rtol=2 * JITTER, atol=0)


@pytest.mark.parametrize("seed", range(8))
def test_constraints_that_just_touch_do_not_change_sides_for_ever(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sites, metrics, _ = problem(seed, 240, ((40, 24), (32, 40)))
    generator = torch.Generator().manual_seed(seed)
    kernel = sum(
        ((s.activations @ m.solve_inputs(s.activations).T) * (s.gradients @ m.solve_outputs(s.gradients).T)).double()
        for s, m in zip(sites, metrics, strict=True)
    )
    assert isinstance(kernel, Tensor)
    multipliers = torch.rand(240, generator=generator).double() * (torch.rand(240, generator=generator) < 0.5)
    scale = kernel.diagonal().rsqrt()
    jitter = JITTER * multipliers / scale**2
    bounds = -(kernel @ multipliers + jitter)  # all slacks are zero, of those that do not press too
    solved: list[int] = []
    real = solver._solve_on

    def counted(*given: Tensor) -> Tensor:
        solved.append(1)
        return real(*given)

    monkeypatch.setattr(solver, "_solve_on", counted)
    found = least_disturbing_edit(sites, metrics, bounds.float())
    assert len(solved) < 60
    assert found.active <= 240
    assert bool((effect(sites, dense(found)) <= bounds.float() + 2e-3 * bounds.abs().max().float()).all())
