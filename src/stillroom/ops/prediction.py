"""Losses on the prediction layer: hard labels, and the teacher's soft labels.

Shapes: B batch, C classes. All compute in the dtype they are given; call them in float32.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stillroom.data.tasks import Kind


def hard_label_loss(logits_BC: Tensor, labels: Tensor, *, kind: Kind) -> Tensor:
    """Return the task's own loss, averaged over the batch.

    Classification: ``-mean_b log softmax(z_b)[y_b]`` in nats. Multi-label: the mean over rows of
    ``sum_c`` binary cross-entropy, in nats. Regression: ``mean_b (z_b - y_b)**2``.

    Args:
        logits_BC: Logits, shape ``(B, C)``, ``(B, 1)`` for regression; gradients flow here.
        labels: ``(B,)`` int64, ``(B,)`` float, or ``(B, C)`` float of zeros and ones.
        kind: What the labels mean.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If the shapes do not fit the kind.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> round(hard_label_loss(logits, torch.tensor([1]), kind="classification").item(), 4)
        0.6931
    """
    if kind == "classification":
        if logits_BC.ndim != 2 or labels.shape != logits_BC.shape[:1]:
            raise ValueError(_shapes("(B, C) and (B,)", logits_BC, labels))
        return F.cross_entropy(logits_BC, labels)
    if kind == "multi-label":
        if labels.shape != logits_BC.shape:
            raise ValueError(_shapes("(B, C) twice", logits_BC, labels))
        each = F.binary_cross_entropy_with_logits(logits_BC, labels, reduction="none")
        return each.sum(-1).mean()
    if logits_BC.shape != (*labels.shape, 1):
        raise ValueError(_shapes("(B, 1) and (B,)", logits_BC, labels))
    return F.mse_loss(logits_BC.squeeze(-1), labels)


def soft_label_loss(
    student_BC: Tensor, teacher_BC: Tensor, *, temperature: float, kind: Kind = "classification"
) -> Tensor:
    """Return the temperature-scaled divergence from teacher to student.

    Classification: ``T**2 * mean_b KL(softmax(teacher / T) || softmax(student / T))``, Hinton et
    al. (2015), sec. 2; ``T**2`` keeps the gradient on the scale of the hard-label loss.
    Multi-label: the same, summed over the labels' Bernoulli distributions. Regression has no
    distribution to soften: ``mean_b (student - teacher)**2``, and T is not used.

    Args:
        student_BC: Logits, shape ``(B, C)``; gradients flow here only.
        teacher_BC: Logits, shape ``(B, C)``; detached.
        temperature: T > 0, unitless; 1 leaves the logits as they are.
        kind: What the logits mean.

    Returns:
        Scalar in nats (squared label units for regression), averaged over the batch; 0 to rounding
        when both agree.

    Raises:
        ValueError: If the shapes differ or ``temperature`` is not positive and finite.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0]])
        >>> soft_label_loss(logits, logits, temperature=2.0).item()
        0.0
    """
    if student_BC.shape != teacher_BC.shape or student_BC.ndim != 2:
        raise ValueError(_shapes("(B, C) twice", student_BC, teacher_BC))
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, found {temperature}")
    teacher_BC = teacher_BC.detach()
    if kind == "regression":
        return F.mse_loss(student_BC, teacher_BC)
    s, t = student_BC / temperature, teacher_BC / temperature
    if kind == "multi-label":
        s, t = _as_softmax(s), _as_softmax(t)
    log_p, log_q = F.log_softmax(t, dim=-1), F.log_softmax(s, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).flatten(1).sum(1).mean()
    return temperature**2 * divergence


def output_divergence(
    student_BC: Tensor, teacher_BC: Tensor, *, form: Literal["kl", "ce"], kind: Kind = "classification"
) -> Tensor:
    """Return how far the student's distribution is from the teacher's, with gradients to both.

    ``kl``: ``mean_b KL(p_b || q_b)``; ``ce``: the cross-entropy ``mean_b -sum_c p_bc log q_bc``, which
    is KL plus the teacher's entropy. Temperature 1. For the student both have the same gradient; for
    whoever moves the teacher's logits they differ, even in sign. Multi-label sums over the labels'
    Bernoulli distributions; regression is ``mean_b (student - teacher)**2`` in both forms.

    Args:
        student_BC: Logits, shape ``(B, C)``.
        teacher_BC: Logits, shape ``(B, C)``; not detached.
        form: `kl` or `ce`.
        kind: What the logits mean.

    Returns:
        Scalar in nats (squared label units for regression), averaged over the batch.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> zero = torch.zeros(1, 2)
        >>> [round(output_divergence(zero, zero, form=form).item(), 4) for form in ("kl", "ce")]
        [0.0, 0.6931]
    """
    if student_BC.shape != teacher_BC.shape or student_BC.ndim != 2:
        raise ValueError(_shapes("(B, C) twice", student_BC, teacher_BC))
    if kind == "regression":
        return F.mse_loss(student_BC, teacher_BC)
    if kind == "multi-label":
        student_BC, teacher_BC = _as_softmax(student_BC), _as_softmax(teacher_BC)
    log_p, log_q = F.log_softmax(teacher_BC, dim=-1), F.log_softmax(student_BC, dim=-1)
    each = log_p.exp() * (log_p - log_q if form == "kl" else -log_q)
    return each.flatten(1).sum(1).mean()


def soft_cross_entropy(
    student_BC: Tensor,
    teacher_BC: Tensor,
    *,
    temperature: float,
    kind: Kind = "classification",
    mean_over_classes: bool = False,
) -> Tensor:
    """Return the temperature-scaled cross-entropy of the student under the teacher's soft labels.

    Classification: ``-T**2 * mean_b sum_c softmax(teacher / T) log softmax(student / T)``: the
    divergence of `soft_label_loss` plus the teacher's entropy, so with the same gradient. Multi-label:
    the same, summed over the labels' Bernoulli distributions. Regression:
    ``mean_b (student - teacher)**2``; neither T nor `mean_over_classes` is used.

    Args:
        student_BC: Logits, shape ``(B, C)``; gradients flow here only.
        teacher_BC: Logits, shape ``(B, C)``; detached.
        temperature: T > 0, unitless.
        kind: What the logits mean.
        mean_over_classes: Divide by C, as TinyBERT's and BERT-EMD's code does.

    Returns:
        Scalar in nats (squared label units for regression), averaged over the batch.

    Raises:
        ValueError: If the shapes differ or ``temperature`` is not positive and finite.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> round(soft_cross_entropy(logits, logits, temperature=1.0).item(), 4)
        0.6931
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, found {temperature}")
    teacher_BC = teacher_BC.detach()
    if kind == "regression":
        return output_divergence(student_BC, teacher_BC, form="ce", kind=kind)
    s, t = student_BC / temperature, teacher_BC / temperature
    found = temperature**2 * output_divergence(s, t, form="ce", kind=kind)
    return found / student_BC.shape[1] if mean_over_classes else found


def _as_softmax(logits: Tensor) -> Tensor:
    """Return logits of a softmax over two that is each label's Bernoulli distribution: (z, 0)."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def _shapes(expected: str, first: Tensor, second: Tensor) -> str:
    return f"expected shapes {expected}, found {tuple(first.shape)} and {tuple(second.shape)}"
