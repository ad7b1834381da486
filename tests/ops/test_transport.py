"""Transport between layers: the flow against linear programming, costs and gradient against loops."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from stillroom.ops.transport import (
    LayerMasses,
    MassRule,
    MassUpdate,
    exact_flow,
    masses_of,
    raise_to_floor,
    squared_distances,
    transport_cost,
    unit_costs,
)

RULES: tuple[MassRule, ...] = ("A1", "A2", "B")
SHAPES = [(1, 1), (1, 4), (2, 3), (4, 12), (6, 12), (5, 3)]


def problem(L: int, M: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return costs without ties and masses that sum to 1."""
    chance = np.random.default_rng(seed)
    student, teacher = (chance.uniform(0.1, 1, size=n) for n in (L, M))
    return chance.uniform(0.1, 1, size=(L, M)), student / student.sum(), teacher / teacher.sum()


def by_linear_programming(cost: np.ndarray, student: np.ndarray, teacher: np.ndarray) -> float:
    """Return the least cost, from the constraints written out."""
    L, M = cost.shape
    rows = [np.repeat(np.eye(L)[i], M) for i in range(L)]
    columns = [np.tile(np.eye(M)[j], L) for j in range(M)]
    found = linprog(cost.ravel(), A_eq=np.stack([*rows, *columns]), b_eq=np.concatenate([student, teacher]))
    assert found.status == 0
    return float(found.fun)


@pytest.mark.parametrize(("L", "M"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_flow_is_the_optimum_of_the_linear_program(L: int, M: int, seed: int) -> None:
    cost, student, teacher = problem(L, M, seed)
    flow = exact_flow(cost, student, teacher)
    assert flow.dtype == np.float64 and (flow >= 0).all()
    np.testing.assert_allclose(flow.sum(1), student, rtol=0, atol=1e-14)
    np.testing.assert_allclose(flow.sum(0), teacher, rtol=0, atol=1e-14)
    assert (flow > 0).sum() <= L + M - 1
    assert (flow * cost).sum() == pytest.approx(by_linear_programming(cost, student, teacher), rel=1e-9)


@pytest.mark.parametrize(("L", "M"), [(1, 3), (2, 4), (4, 12), (6, 12)])
def test_equal_masses_make_it_an_assignment(L: int, M: int) -> None:
    cost, _, _ = problem(L, M)
    flow = exact_flow(cost, np.ones(L), np.ones(M))
    repeated = np.repeat(cost, M // L, axis=0)
    rows, columns = linear_sum_assignment(repeated)
    assert (flow * cost).sum() == pytest.approx(repeated[rows, columns].sum() / M, rel=1e-12)
    assert ((flow > 1e-12).sum(1) == M // L).all()


def test_masses_are_scaled_to_sum_to_1() -> None:
    cost, student, teacher = problem(3, 5)
    np.testing.assert_allclose(
        exact_flow(cost, 7 * student, 0.1 * teacher), exact_flow(cost, student, teacher), atol=1e-15
    )


def pairs(function: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    return torch.stack([torch.stack([function(s, t) for t in teacher]) for s in student])


def layers(L: int, M: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(n, 2, 3, 4, generator=generator, dtype=torch.float64) for n in (L, M))
    student, teacher = made
    return student.requires_grad_(), teacher


@pytest.mark.parametrize(("L", "M"), SHAPES)
def test_distances_and_their_gradient_equal_loops_over_pairs(L: int, M: int) -> None:
    student, teacher = layers(L, M)
    squares = squared_distances(student, teacher)
    want = pairs(lambda s, t: (s - t).square().sum(), student, teacher)
    torch.testing.assert_close(squares, want.detach(), rtol=1e-12, atol=1e-12)
    assert not squares.requires_grad
    flow = torch.from_numpy(exact_flow(*problem(L, M)))
    (naive,) = torch.autograd.grad(3 * (flow * want).sum(), student)
    loss = 3 * transport_cost(student, teacher, flow, squares)
    (found,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(3 * (flow * want).sum().item(), rel=1e-12)
    torch.testing.assert_close(found, naive, rtol=1e-12, atol=1e-12)
    assert found.abs().max() > 0.01


def test_gradient_is_that_of_the_loss() -> None:
    student, teacher = layers(2, 3)
    flow = torch.from_numpy(exact_flow(*problem(2, 3)))
    teacher.requires_grad_()

    def loss(s: Tensor) -> Tensor:
        return transport_cost(s, teacher, flow, squared_distances(s, teacher))

    assert torch.autograd.gradcheck(loss, (student,))
    loss(student).backward()
    assert teacher.grad is None


def test_gradient_is_that_of_the_transport_problem() -> None:
    """The flow is a constant for autograd; solving again at moved states gives the same slope."""
    student, teacher = layers(2, 3)
    _, w, v = problem(2, 3)

    def value(s: Tensor) -> float:
        cost = squared_distances(s, teacher).numpy()
        return float((exact_flow(cost, w, v) * cost).sum())

    squares = squared_distances(student, teacher)
    flow = torch.from_numpy(exact_flow(squares.numpy(), w, v))
    (gradient,) = torch.autograd.grad(transport_cost(student, teacher, flow, squares), student)
    step = torch.randn(student.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        slope = (value(student + 1e-6 * step) - value(student - 1e-6 * step)) / 2e-6
    assert slope == pytest.approx((gradient * step).sum().item(), rel=1e-7)


@pytest.mark.parametrize("shape", [(3, 5), (4_096,), (2, 4_097), (32, 64, 768)])
def test_nearly_equal_layers_of_any_size_have_the_distance_of_float64(shape: tuple[int, ...]) -> None:
    """Sums of a million numbers in float32 lost up to a third of a distance that small."""
    chance = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, *shape, generator=chance)
    student = teacher[[0, 2]] + 0.05 * torch.randn(2, *shape, generator=chance)
    apart = student[:, None].double() - teacher.double()
    want = apart.flatten(2).square().sum(2)
    assert want[0, 0] < 0.01 * teacher[0].square().sum()
    found = squared_distances(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=2e-4, atol=0)


def test_equal_layers_never_cost_less_than_nothing() -> None:
    """Rounding of the product would make it negative, and a negative mass would follow."""
    states = 100 + torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    squares = squared_distances(states, states)
    assert (squares >= 0).all() and (squares.diagonal() < 1e-5 * states.square().sum(1)).all()


def test_what_is_kept_for_the_backward_pass_is_the_two_stacks_and_the_flow() -> None:
    student, teacher = layers(4, 6)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    squares = squared_distances(student, teacher)
    flow = torch.from_numpy(exact_flow(*problem(4, 6)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        transport_cost(student, teacher, flow, squares)
    assert sorted(t.numel() for t in kept) == sorted(t.numel() for t in (student, teacher, flow))


# Masses


def test_unit_costs_by_hand() -> None:
    flow, cost = np.array([[0.25, 0.25], [0.0, 0.5]]), np.array([[1.0, 2.0], [9.0, 4.0]])
    assert unit_costs(flow, cost, np.array([0.5, 0.5]), axis=1).tolist() == [1.5, 4.0]
    assert unit_costs(flow, cost, np.array([0.25, 0.75]), axis=0).tolist() == [1.0, 2.5 / 0.75]


@pytest.mark.parametrize("rule", RULES)
def test_cheaper_layers_get_more_mass_whatever_the_scale(rule: MassRule) -> None:
    u = np.array([0.3, 0.1, 0.2])
    masses = masses_of(u, rule=rule, temperature=2.0)
    assert masses.sum() == pytest.approx(1, abs=1e-15)
    assert masses[1] > masses[2] > masses[0] > 0
    np.testing.assert_allclose(masses_of(1e-6 * u, rule=rule, temperature=2.0), masses, rtol=1e-12)


def test_temperature_flattens_the_softmax_and_does_nothing_to_division() -> None:
    u = np.array([0.3, 0.1])
    sharp, flat = (masses_of(u, rule="A1", temperature=t) for t in (1.0, 10.0))
    assert sharp[1] > flat[1] > 0.5
    assert (masses_of(u, rule="B", temperature=1.0) == masses_of(u, rule="B", temperature=9.0)).all()


def test_floor_acts_on_nothing_but_what_is_below_it() -> None:
    values = np.array([1.0, 0.5])
    raised, acted = raise_to_floor(values, 0.1)
    assert (raised == values).all() and not acted
    raised, acted = raise_to_floor(np.zeros(3), 0.1)
    assert raised.tolist() == [1.0, 1.0, 1.0] and acted


def masses_after(
    costs: np.ndarray, *, rule: MassRule = "B", coupled: bool = False, steps: int = 1, **options: Any
) -> LayerMasses:
    P, L, M = costs.shape
    update = MassUpdate(rule, options.pop("temperature", 1.0), options.pop("floor", 1e-12), coupled)
    masses = LayerMasses([f"p{i}" for i in range(P)], L, M, update).double()
    for _ in range(steps):
        masses.flows(torch.from_numpy(costs))
        masses.advance()
    return masses


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("case", ["one layer fits", "all fit", "one by one", "huge", "tiny"])
def test_masses_stay_positive_and_sum_to_1(rule: MassRule, coupled: bool, case: str) -> None:
    """Of a layer that fits perfectly the authors' code makes 0/0 in the next step."""
    costs = np.random.default_rng(0).uniform(0.1, 1, size=(2, 3, 5))
    if case == "one layer fits":
        costs[:, 1, 2] = 0
        costs[:, 0] = 0
    elif case == "all fit":
        costs[:] = 0
    elif case == "one by one":
        costs = costs[:, :1, :1]
    else:
        costs *= 1e30 if case == "huge" else 1e-30
    masses = masses_after(costs, rule=rule, coupled=coupled, steps=4)
    for side in (masses.student, masses.teacher):
        assert torch.isfinite(side).all() and (side > 0).all()
        torch.testing.assert_close(side.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_scale_of_the_costs_changes_neither_flow_nor_masses(rule: MassRule) -> None:
    costs = np.random.default_rng(0).uniform(0.1, 1, size=(2, 3, 5))
    one, other = (masses_after(scale * costs, rule=rule, steps=3) for scale in (1.0, 1e4))
    torch.testing.assert_close(one.student, other.student, rtol=1e-9, atol=0)
    torch.testing.assert_close(one.teacher, other.teacher, rtol=1e-9, atol=0)


def test_float32_masses_follow_float64_ones() -> None:
    costs = np.random.default_rng(0).uniform(0.1, 1, size=(2, 4, 12))
    wide = masses_after(costs, steps=3)
    narrow = LayerMasses(("a", "b"), 4, 12, MassUpdate("B", 1.0, 1e-12, False))
    for _ in range(3):
        flow = narrow.flows(torch.from_numpy(costs).float())
        narrow.advance()
    assert flow.dtype == narrow.student.dtype == torch.float32
    torch.testing.assert_close(narrow.student.double(), wide.student, rtol=1e-5, atol=0)


def test_masses_change_in_advance_only_and_by_training_passes_only() -> None:
    costs = torch.from_numpy(np.random.default_rng(0).uniform(0.1, 1, size=(1, 2, 3)))
    masses = LayerMasses(("p",), 2, 3, MassUpdate("B", 1.0, 1e-12, True)).double()
    start = masses.student.clone()
    masses.eval().flows(costs)
    masses.advance()
    assert torch.equal(masses.student, start) and masses.record() == {}
    masses.train().flows(costs)
    assert torch.equal(masses.student, start)
    masses.advance()
    after = masses.student.clone()
    assert not torch.equal(after, start)
    # Once taken over, there is nothing to take over.
    masses.advance()
    assert torch.equal(masses.student, after)


def test_without_update_masses_stay_equal() -> None:
    costs = torch.from_numpy(np.random.default_rng(0).uniform(0.1, 1, size=(1, 2, 4)))
    masses = LayerMasses(("p",), 2, 4, None)
    flow = masses.flows(costs)
    masses.advance()
    assert masses.student.tolist() == [[0.5, 0.5]] and masses.teacher.tolist() == [[0.25] * 4]
    torch.testing.assert_close(flow.sum(2), torch.full((1, 2), 0.5, dtype=torch.float64))


def test_costs_that_are_not_finite_give_a_loss_that_says_so_and_change_no_mass() -> None:
    """POT would search for ever, or return a flow of zeros and a loss of 0."""
    masses = LayerMasses(("p",), 2, 3, MassUpdate("B", 1.0, 1e-12, True))
    for value in (float("nan"), float("inf")):
        costs = torch.ones(1, 2, 3)
        costs[0, 1, 1] = value
        flow = masses.flows(costs)
        assert torch.isfinite(flow).all() and not torch.isfinite((flow * costs).sum())
        masses.advance()
        assert masses.student.tolist() == [[0.5, 0.5]]


def test_record_is_what_was_solved() -> None:
    costs = np.random.default_rng(0).uniform(0.1, 1, size=(2, 2, 3))
    masses = masses_after(costs, steps=2)
    for p in range(2):
        found = masses.record()[f"p{p}"]
        flow = np.array(found["flow"])
        assert flow.shape == (2, 3)
        np.testing.assert_allclose(flow.sum(1), found["student_masses"], atol=1e-5)
        np.testing.assert_allclose(flow.sum(0), found["teacher_masses"], atol=1e-5)
        np.testing.assert_allclose(found["cost"], costs[p], rtol=1e-5)
        assert found["emd"] == pytest.approx((flow * costs[p]).sum(), rel=1e-4)
        assert found["floored"] is False
    costs[0, 0] = 0
    assert [each["floored"] for each in masses_after(costs).record().values()] == [True, False]
    assert masses_after(costs, floor=0.9).record()["p1"]["floored"] is True


def test_one_copy_to_the_host_for_all_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self.numel()) or cpu(self))
    masses = LayerMasses(("a", "b"), 2, 3, MassUpdate("B", 1.0, 1e-12, True))
    masses.flows(torch.rand(2, 2, 3))
    assert copies == [2 * 2 * 3 + 2 * 2 + 2 * 3]
