"""Hard and soft label losses against naive float64 references, by hand, and where they must fail."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillroom.ops.prediction import hard_label_loss, soft_label_loss

KINDS = ("classification", "multi-label", "regression")


def logits_of(kind: str, *, seed: int = 0, rows: int = 4, width: int = 3, scale: float = 2.0) -> Tensor:
    width = 1 if kind == "regression" else width
    return torch.from_numpy(scale * np.random.default_rng(seed).standard_normal((rows, width)))


def labels_of(kind: str, *, seed: int = 0, rows: int = 4, width: int = 3) -> Tensor:
    chance = np.random.default_rng(seed)
    if kind == "classification":
        return torch.from_numpy(chance.integers(0, width, size=rows))
    if kind == "multi-label":
        return torch.from_numpy(chance.integers(0, 2, size=(rows, width)).astype(np.float64))
    return torch.from_numpy(chance.standard_normal(rows))


def _softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def _kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def naive_soft(student: Tensor, teacher: Tensor, T: float, kind: str) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        if kind == "regression":
            total += (s[0] - t[0]) ** 2
        elif kind == "classification":
            total += T**2 * _kl(_softmax([v / T for v in t]), _softmax([v / T for v in s]))
        else:
            for a, b in zip(s, t, strict=True):
                p, q = (1 / (1 + math.exp(-v / T)) for v in (b, a))
                total += T**2 * _kl([p, 1 - p], [q, 1 - q])
    return total / len(student)


def naive_hard(logits: Tensor, labels: Tensor, kind: str) -> float:
    total = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        if kind == "regression":
            total += (z[0] - y) ** 2
        elif kind == "classification":
            total -= math.log(_softmax(z)[y])
        else:
            for a, b in zip(z, y, strict=True):
                p = 1 / (1 + math.exp(-a))
                total -= b * math.log(p) + (1 - b) * math.log(1 - p)
    return total / len(logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.1, 4.0])
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (5, 3), (7, 6)])
def test_soft_labels_equal_a_naive_loop(kind: Any, temperature: float, rows: int, width: int) -> None:
    student = logits_of(kind, seed=rows, rows=rows, width=width)
    teacher = logits_of(kind, seed=rows + 50, rows=rows, width=width)
    found = soft_label_loss(student, teacher, temperature=temperature, kind=kind)
    assert found.item() == pytest.approx(naive_soft(student, teacher, temperature, kind), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (5, 3), (7, 6)])
def test_hard_labels_equal_a_naive_loop(kind: Any, rows: int, width: int) -> None:
    logits = logits_of(kind, seed=rows, rows=rows, width=width)
    labels = labels_of(kind, seed=rows, rows=rows, width=width)
    found = hard_label_loss(logits, labels, kind=kind)
    assert found.item() == pytest.approx(naive_hard(logits, labels, kind), rel=1e-12)


def test_soft_labels_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln(2) + 1/2 ln(2/3) = 1/2 ln(4/3).
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]])
    want = 0.5 * math.log(4 / 3)
    assert soft_label_loss(student, teacher, temperature=1.0).item() == pytest.approx(want)
    # Twice the logits at T = 2 are the same distributions; the loss has the factor T**2 = 4.
    doubled = soft_label_loss(2 * student, 2 * teacher, temperature=2.0)
    assert doubled.item() == pytest.approx(4 * want)
    # One label whose Bernoulli is 1/2 against 3/4, beside one that agrees: the same number, not half.
    teacher, student = torch.tensor([[0.0, 5.0]]), torch.tensor([[math.log(3.0), 5.0]])
    found = soft_label_loss(student, teacher, temperature=1.0, kind="multi-label")
    assert found.item() == pytest.approx(want, abs=1e-6)
    # (3 - 1)**2 and (0 - 1)**2, averaged.
    teacher, student = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [0.0]])
    found = soft_label_loss(student, teacher, temperature=7.0, kind="regression")
    assert found.item() == 2.5


def test_hard_labels_by_hand() -> None:
    # softmax(0, ln 3) = (1/4, 3/4).
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]])
    found = hard_label_loss(logits, torch.tensor([1, 0]), kind="classification")
    assert found.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    # Three labels at even odds cost ln 2 each: their sum, not their mean.
    found = hard_label_loss(torch.zeros(2, 3), torch.ones(2, 3), kind="multi-label")
    assert found.item() == pytest.approx(3 * math.log(2))
    found = hard_label_loss(torch.tensor([[3.0], [0.0]]), torch.tensor([1.0, 1.0]), kind="regression")
    assert found.item() == 2.5


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_right_and_flow_to_the_student_only(kind: Any) -> None:
    student, teacher = logits_of(kind).requires_grad_(), logits_of(kind, seed=1).requires_grad_()
    labels = labels_of(kind)
    loss = soft_label_loss(student, teacher, temperature=2.0, kind=kind)
    loss.backward()
    assert student.grad.abs().max() > 1e-3
    assert teacher.grad is None
    fixed = teacher.detach()
    assert torch.autograd.gradcheck(
        lambda s: soft_label_loss(s, fixed, temperature=2.0, kind=kind), student
    )
    assert torch.autograd.gradcheck(lambda s: hard_label_loss(s, labels, kind=kind), student)


def test_soft_labels_gradient_is_that_of_the_equation() -> None:
    """``T (q - p) / B``: of the order of the hard labels' gradient whatever T is."""
    student, teacher, T = logits_of("classification").requires_grad_(), logits_of("x", seed=1), 3.0
    soft_label_loss(student, teacher, temperature=T).backward()
    want = T * ((student / T).softmax(-1) - (teacher / T).softmax(-1)) / len(student)
    torch.testing.assert_close(student.grad, want.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_labels_are_least_where_both_agree(kind: Any) -> None:
    teacher = logits_of(kind)
    student = teacher.clone().requires_grad_()
    loss = soft_label_loss(student, teacher, temperature=1.7, kind=kind)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert student.grad.abs().max() < 1e-15
    for seed in range(20):
        other = teacher + 0.1 * logits_of(kind, seed=seed)
        assert soft_label_loss(other, teacher, temperature=1.7, kind=kind) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_the_batch_changes_nothing(kind: Any) -> None:
    student, teacher, labels = logits_of(kind), logits_of(kind, seed=1), labels_of(kind)
    order = torch.tensor([2, 0, 3, 1])
    found = soft_label_loss(student[order], teacher[order], temperature=2.0, kind=kind)
    torch.testing.assert_close(found, soft_label_loss(student, teacher, temperature=2.0, kind=kind))
    found = hard_label_loss(student[order], labels[order], kind=kind)
    torch.testing.assert_close(found, hard_label_loss(student, labels, kind=kind))


def test_a_constant_added_to_a_row_of_class_logits_changes_nothing() -> None:
    student, teacher = logits_of("classification"), logits_of("classification", seed=1)
    shift = torch.tensor([[10.0], [-3.0], [0.5], [100.0]])
    found = soft_label_loss(student + shift, teacher - shift, temperature=2.0)
    torch.testing.assert_close(found, soft_label_loss(student, teacher, temperature=2.0))


@pytest.mark.parametrize("kind", ["classification", "multi-label"])
def test_huge_logits_stay_finite(kind: Any) -> None:
    """A confident float32 teacher must not give NaN through log(0) or 0 * inf."""
    teacher = torch.tensor([[2000.0, -2000.0, 0.0]])
    student = -teacher.clone().requires_grad_()
    loss = soft_label_loss(student, teacher, temperature=1.0, kind=kind)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    labels = torch.tensor([1]) if kind == "classification" else torch.tensor([[0.0, 1.0, 1.0]])
    assert torch.isfinite(hard_label_loss(teacher, labels, kind=kind))


@pytest.mark.parametrize(
    ("logits", "labels", "kind"),
    [
        ((4, 3), (4, 1), "classification"),
        ((4, 3), (3,), "classification"),
        ((4,), (4,), "classification"),
        ((4, 3), (4,), "multi-label"),
        ((4, 3), (1, 3), "multi-label"),
        ((4, 1), (4, 1), "regression"),
        ((4,), (4,), "regression"),
        ((4, 2), (4,), "regression"),
        ((4, 1), (3,), "regression"),
    ],
)
def test_hard_labels_of_another_shape_are_refused(logits: Any, labels: Any, kind: Any) -> None:
    """``(B, 1)`` against ``(B,)`` broadcasts to ``(B, B)``: a plausible loss, and nothing is learnt."""
    given = torch.zeros(labels, dtype=torch.int64 if kind == "classification" else torch.float32)
    with pytest.raises(ValueError, match="expected shapes"):
        hard_label_loss(torch.zeros(logits), given, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("student", "teacher"), [((4, 1), (4, 3)), ((1, 3), (4, 3)), ((3,), (3,))])
def test_soft_labels_of_another_shape_are_refused(student: Any, teacher: Any, kind: Any) -> None:
    """One teacher row would be broadcast to the whole batch."""
    with pytest.raises(ValueError, match="expected shapes"):
        soft_label_loss(torch.zeros(student), torch.zeros(teacher), temperature=1.0, kind=kind)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    """A negative one turns the teacher upside down, an infinite one teaches nothing."""
    with pytest.raises(ValueError, match="positive and finite"):
        soft_label_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature=temperature)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_logits_are_not_hidden(kind: Any) -> None:
    """The loop stops at a loss that is not finite; it can only do so if the loss says so."""
    student, teacher = logits_of(kind), logits_of(kind, seed=1)
    student[0, 0] = math.nan
    assert soft_label_loss(student, teacher, temperature=1.0, kind=kind).isnan()
    assert hard_label_loss(student, labels_of(kind), kind=kind).isnan()
