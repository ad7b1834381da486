"""PKD against its equation: loops over floats, a hand-computed value, and what must hold."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Needs, Outputs
from stillroom.errors import WrongInput
from stillroom.methods.base import Context
from stillroom.methods.pkd import FirstTokens, PKDSettings, build, patient_loss
from stillroom.training.distiller import Distiller
from tiny import make_batch_of, make_encoder, make_rows, make_task


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def naive(student: Tensor, teacher: Tensor, normalise: bool, reduction: str) -> float:
    """Return L_PT from loops over layers, rows and numbers."""
    L, B, E = student.shape
    total = 0.0
    for s_B, t_B in zip(student.tolist(), teacher.tolist(), strict=True):
        for s, t in zip(s_B, t_B, strict=True):
            a = math.sqrt(sum(x * x for x in s)) if normalise else 1.0
            b = math.sqrt(sum(x * x for x in t)) if normalise else 1.0
            total += sum((x / a - y / b) ** 2 for x, y in zip(s, t, strict=True))
    return total / (L * B * E if reduction == "mean" else B)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 5)])
def test_loss_equals_loops(shape: tuple[int, ...], normalise: bool, reduction: Any) -> None:
    s, t = random(*shape), random(*shape, seed=1)
    found = patient_loss(s, t, normalise=normalise, reduction=reduction)
    assert found.item() == pytest.approx(naive(s, t, normalise, reduction), rel=1e-12)


def test_loss_by_hand() -> None:
    # |(3, 4)| = 5 and |(0, 2)| = 2: (0.6, 0.8) - (0, 1) = (0.6, -0.2), squares 0.36 + 0.04.
    s, t = torch.tensor([[[3.0, 4.0]]]).double(), torch.tensor([[[0.0, 2.0]]]).double()
    assert patient_loss(s, t, reduction="sum").item() == pytest.approx(0.4, rel=1e-12)
    assert patient_loss(s, t).item() == pytest.approx(0.2, rel=1e-12)


def test_gradient_is_right_and_the_teacher_gets_none() -> None:
    s, t = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patient_loss(x, t), s)
    patient_loss(s, t).backward()
    assert s.grad is not None and s.grad.abs().max() > 1e-3
    assert t.grad is None


def test_rescaling_changes_nothing_when_normalised() -> None:
    s, t = random(2, 3, 4), random(2, 3, 4, seed=1)
    factor = random(2, 3, 1, seed=2).exp()
    for given in ((s * factor, t), (s, t * factor)):
        assert patient_loss(*given).item() == pytest.approx(patient_loss(s, t).item(), rel=1e-12)
        moved = patient_loss(*given, normalise=False)
        assert moved.item() != pytest.approx(patient_loss(s, t, normalise=False).item(), rel=1e-3)


def test_shapes_that_would_broadcast_are_refused() -> None:
    """One row of the teacher would be compared with every row of the student."""
    with pytest.raises(ValueError, match="expected shapes"):
        patient_loss(random(2, 3, 4), random(2, 1, 4))


# The term


def outputs_of(states: Tensor) -> Outputs:
    return Outputs(torch.empty(0), pooled_states={("cls", i + 1): x for i, x in enumerate(states)})


def make_term(width: int = 3, teacher_width: int = 5, **options: Any) -> FirstTokens:
    plan = build(PKDSettings(**options), Context("classification", 2, 8, 2, width, 4, teacher_width))
    term = plan.terms["first_tokens"]
    assert isinstance(term, FirstTokens)
    return term.double()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalise", [True, False])
def test_term_compares_the_projected_first_layer_with_its_own_teacher_layer(
    normalise: bool, reduction: str
) -> None:
    student, teacher = random(2, 3, 3), random(4, 3, 5, seed=1)
    mask = torch.ones(3, 2)
    inputs = Inputs(mask, mask, None)
    batch = Batch(inputs, inputs, torch.zeros(3), torch.arange(3))
    for layer_map, layer in (("uniform", 2), ("last", 3), ((4, 1), 4)):
        term = make_term(layer_map=layer_map, normalise=normalise, reduction=reduction)
        projected = student[:1] @ term.projection.detach()
        want = naive(projected, teacher[[layer - 1]], normalise, reduction)
        found = term(outputs_of(student), outputs_of(teacher), batch)
        assert found.item() == pytest.approx(want, rel=1e-12)


def test_models_of_one_width_are_compared_as_they_are() -> None:
    assert list(make_term(width=5).parameters()) == []
    W = make_term().projection.detach()
    torch.testing.assert_close(W @ W.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer_map", "depths", "want"),
    [
        ("uniform", (6, 12), {2, 4, 6, 8, 10}),
        ("last", (3, 12), {10, 11}),
        ("last", (6, 12), {7, 8, 9, 10, 11}),
        ((1, 5, 12), (3, 12), {1, 5}),
    ],
)
def test_layer_maps_are_those_of_the_paper_without_their_last(
    layer_map: Any, depths: tuple[int, int], want: set[int]
) -> None:
    N, M = depths
    plan = build(PKDSettings(layer_map=layer_map), Context("classification", 2, 8, N, 4, M, 4))
    (stage,) = plan.stages
    needs = plan.teacher_needs(stage)
    assert needs == Needs(True, pooled_states=frozenset(("cls", layer) for layer in want))
    student = plan.student_needs(stage).pooled_states
    assert student == {("cls", layer) for layer in range(1, N)}


def test_the_last_layer_gets_no_gradient_from_the_patient_loss() -> None:
    task = make_task()
    student, teacher = make_encoder(task=task), make_encoder(task=task, layers=4, width=24, seed=1)
    plan = build(PKDSettings(), Context("classification", 2, 6, 2, 16, 4, 24))
    distiller, batch = Distiller(student, plan, bf16=False), make_batch_of(make_rows(task, 6), student)
    with torch.no_grad():
        goals = teacher(batch.teacher, plan.teacher_needs(plan.stages[0]))
    outputs = student(batch.student, plan.student_needs(plan.stages[0]))
    distiller.weigh(outputs, goals, batch, {"first_tokens": 1.0}).total.backward()
    first, last = student.blocks()[1]
    assert all(p.grad is None for p in last.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in first.parameters())


# The plan


@pytest.mark.parametrize(
    ("options", "kind", "weights"),
    [
        ({}, "classification", {"soft": 0.25, "hard": 0.5, "first_tokens": 100}),
        ({"reduction": "sum"}, "classification", {"soft": 0.5, "hard": 0.5, "first_tokens": 100}),
        ({}, "regression", {"soft": 0.5, "hard": 0.5, "first_tokens": 100}),
        ({"alpha": 1.0, "beta": 10}, "classification", {"soft": 0.5, "first_tokens": 10}),
        ({"alpha": 0.0}, "classification", {"hard": 1.0, "first_tokens": 100}),
    ],
)
def test_weights_are_those_of_the_equation(
    options: dict[str, Any], kind: Any, weights: dict[str, float]
) -> None:
    """With means the soft labels are averaged over two classes too."""
    plan = build(PKDSettings(**options), Context(kind, 2, 8, 2, 3, 4, 5))
    (stage,) = plan.stages
    assert dict(stage.weights) == weights and set(plan.terms) == set(weights)


@pytest.mark.parametrize(
    ("options", "depths", "match"),
    [
        ({}, (5, 4), "each of 5 student layers"),
        ({}, (1, 4), "all student layers but the last"),
        ({"layer_map": "last"}, (4, 2), "the teacher has 2"),
        ({"layer_map": (1, 9)}, (2, 4), "from 1 to 4"),
    ],
)
def test_depths_that_do_not_fit_are_refused(
    options: dict[str, Any], depths: tuple[int, int], match: str
) -> None:
    N, M = depths
    with pytest.raises(WrongInput, match=match):
        build(PKDSettings(**options), Context("classification", 2, 8, N, 4, M, 4))
