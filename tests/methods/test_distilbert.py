"""DistilBERT's loss, adapted to the task: loops over floats, a hand-computed value, what must hold."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Needs, Outputs
from stillroom.methods.base import Context
from stillroom.methods.distilbert import DistilBERTSettings, LastStateDirection, build, cosine_loss

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def naive(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    """Return the mean of ``1 - cos`` over real tokens, from loops over numbers."""
    found = []
    for row in range(len(mask)):
        for p in range(mask.shape[1]):
            if mask[row, p]:
                s, t = student[row, p].tolist(), teacher[row, p].tolist()
                dot = sum(x * y for x, y in zip(s, t, strict=True))
                lengths = [math.sqrt(sum(x * x for x in v)) for v in (s, t)]
                found.append(1 - dot / (lengths[0] * lengths[1]))
    return sum(found) / len(found)


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_equals_loops(seed: int) -> None:
    s, t = random(2, 3, 4, seed=seed), random(2, 3, 4, seed=seed + 10)
    assert cosine_loss(s, t, MASK).item() == pytest.approx(naive(s, t, MASK), rel=1e-12)


def test_loss_by_hand() -> None:
    # Angles of 45, 90 and 180 degrees: (1 - 1/sqrt 2 + 1 + 2) / 3; the padded token is left out.
    s = torch.tensor([[[1.0, 1.0], [0.0, 2.0]], [[1.0, 0.0], [5.0, 5.0]]]).double()
    t = torch.tensor([[[3.0, 0.0], [1.0, 0.0]], [[-2.0, 0.0], [1.0, 0.0]]]).double()
    found = cosine_loss(s, t, torch.tensor([[1, 1], [1, 0]]))
    assert found.item() == pytest.approx((4 - 1 / math.sqrt(2)) / 3, rel=1e-12)


def test_gradient_is_right_and_the_teacher_gets_none() -> None:
    s, t = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cosine_loss(x, t, MASK), s)
    cosine_loss(s, t, MASK).backward()
    assert s.grad is not None and s.grad.abs().max() > 1e-3
    assert not s.grad[MASK == 0].any()
    assert t.grad is None


def test_only_directions_of_real_tokens_count() -> None:
    s, t = random(2, 3, 4), random(2, 3, 4, seed=1)
    want = cosine_loss(s, t, MASK).item()
    padding = (MASK == 0)[..., None]
    assert cosine_loss(s.masked_fill(padding, 7.0), t, MASK).item() == want
    assert cosine_loss(2 * s, t / 3, MASK).item() == pytest.approx(want, rel=1e-12)
    assert cosine_loss(s, 5 * s, MASK).item() == pytest.approx(0, abs=1e-12)


def test_shapes_that_would_broadcast_are_refused() -> None:
    """One row of the teacher would be compared with every row of the student."""
    with pytest.raises(ValueError, match="expected shapes"):
        cosine_loss(random(2, 3, 4), random(1, 3, 4), MASK)


@pytest.mark.parametrize("width", [3, 5])
def test_term_compares_the_last_states_projected_where_widths_differ(width: int) -> None:
    torch.manual_seed(0)
    term = LastStateDirection(Context("classification", 2, 8, 2, width, 4, 5)).double()
    assert (term.student_needs, term.teacher_needs) == (
        Needs(hidden_states=frozenset({2})),
        Needs(hidden_states=frozenset({4})),
    )
    s, t = random(2, 3, width), random(2, 3, 5, seed=1)
    inputs = Inputs(MASK, MASK, None)
    batch = Batch(inputs, inputs, torch.zeros(2), torch.arange(2))
    found = term(Outputs(torch.empty(0), {2: s}), Outputs(torch.empty(0), {4: t}), batch)
    assert (term.projection is None) == (width == 5)
    projected = s if term.projection is None else s @ term.projection.detach()
    assert found.item() == pytest.approx(naive(projected, t, MASK), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, {"soft": 5.0, "hard": 2.0, "cosine": 1.0}),
        ({"hard_weight": 0, "cosine_weight": 0, "soft_weight": 1}, {"soft": 1.0}),
    ],
)
def test_weights_are_those_of_the_equation(options: dict[str, Any], weights: dict[str, float]) -> None:
    plan = build(DistilBERTSettings(**options), Context("classification", 2, 8, 2, 3, 4, 5))
    (stage,) = plan.stages
    assert dict(stage.weights) == weights and set(plan.terms) == set(weights)
