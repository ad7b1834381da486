"""The protocol: what a context reads off two encoders, and which stage a step has."""

import numpy as np
import pytest
import torch

from stillroom.methods.base import Context, Plan, Stage
from stillroom.methods.prediction import HardLabels
from tiny import make_encoder


def test_context_of_two_encoders_has_each_size_in_its_place() -> None:
    """Depth and width exchanged, or student and teacher, would build projections of another shape."""
    student, teacher = make_encoder(layers=2, width=16), make_encoder(layers=3, width=24)
    student.basis = torch.ones(24, 16)
    labels = np.array([0, 1, 1])
    found = Context.of(student, teacher, kind="classification", classes=2, rows=3, labels=labels)
    assert found == Context("classification", 2, 3, 2, 16, 3, 24, labels, student.basis)


def test_context_refuses_labels_of_other_rows() -> None:
    """A bank of all rows would be drawn from by the labels of others."""
    model = make_encoder()
    with pytest.raises(ValueError, match="each of 4 training rows, found 3"):
        Context.of(model, model, kind="classification", classes=2, rows=4, labels=np.arange(3))


@pytest.mark.parametrize(
    ("starts", "steps", "numbers"),
    [
        ((0.0, 0.8), 5, [1, 1, 1, 1, 2]),
        # A share that rounds to no step gets one all the same, at either end.
        ((0.0, 0.01), 3, [1, 2, 2]),
        ((0.0, 0.99), 3, [1, 1, 2]),
        ((0.0, 0.5, 0.6), 2, [1, 2]),
        # A stage that starts at 1 is never reached.
        ((0.0, 1.0), 3, [1, 1, 1]),
    ],
)
def test_each_stage_starts_at_its_share_of_the_steps(
    starts: tuple[float, ...], steps: int, numbers: list[int]
) -> None:
    stages = tuple(Stage(start, {"hard": 1.0}) for start in starts)
    plan = Plan({"hard": HardLabels("classification")}, stages)
    assert [plan.stage_at(step, steps)[0] for step in range(steps)] == numbers
    assert all(plan.stage_at(step, steps)[1] is stages[number - 1] for step, number in enumerate(numbers))
