"""The terms on the prediction layer that every method shares."""

from torch import Tensor

from stillroom.data.batching import Batch
from stillroom.data.tasks import Kind
from stillroom.encoder import Needs, Outputs
from stillroom.methods.base import Term
from stillroom.ops.prediction import hard_label_loss, soft_label_loss

HARD = "brings the student’s answers to the labels of the data"
SOFT = "brings the student’s answers to the teacher’s, probabilities softened by the temperature"
"""What the terms do, for readers of a report."""


class HardLabels(Term):
    """The task's own loss: `ops.prediction.hard_label_loss`."""

    mean_over = "labels"
    student_needs = Needs(logits=True)

    def __init__(self, kind: Kind):
        super().__init__()
        self.kind = kind

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss of the student's logits against the labels."""
        return hard_label_loss(student.logits, batch.labels, kind=self.kind)


class SoftLabels(Term):
    """The divergence from the teacher's soft labels: `ops.prediction.soft_label_loss`."""

    mean_over = "labels"
    student_needs = Needs(logits=True)
    teacher_needs = Needs(logits=True)

    def __init__(self, kind: Kind, temperature: float):
        super().__init__()
        self.kind = kind
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss of the student's logits against the teacher's."""
        return soft_label_loss(student.logits, teacher.logits, temperature=self.temperature, kind=self.kind)
