"""Student and terms in one module, so that one forward pass returns the loss."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillroom.data.batching import Batch
from stillroom.encoder import Encoder, Needs, Outputs
from stillroom.methods.base import Plan, Stage
from stillroom.training.perturbation import perturbation


@dataclass(frozen=True)
class Loss:
    """The weighted total, which carries the gradient, and each term unweighted and detached."""

    total: Tensor
    terms: dict[str, Tensor]


class Distiller(nn.Module):
    """What is trained: the student and the parameters of the plan's terms."""

    def __init__(self, student: Encoder, plan: Plan, *, bf16: bool):
        super().__init__()
        self.student = student
        self.terms = nn.ModuleDict(dict(plan.terms))
        self._plan = plan
        self._bf16 = bf16

    def forward(self, batch: Batch, teacher: Outputs, stage: Stage) -> Loss:
        """Return the stage's loss on a batch, on perturbed embeddings where the stage says so.

        The perturbation's first pass computes the gradient of the embeddings and of nothing else;
        the teacher's outputs serve both passes.
        """
        with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=self._bf16):
            needs = self._plan.student_needs(stage)
            offset = None
            if stage.perturb and self._plan.perturbation is not None:
                clean = self.student(batch.student, needs | Needs(embeddings=True))
                loss = self._loss(clean, teacher, batch, stage)
                # Autocast would reach into the backward pass and round the terms' gradients too.
                with torch.autocast(batch.labels.device.type, enabled=False):
                    (gradient,) = torch.autograd.grad(loss.total, clean.embeddings)
                rule = self._plan.perturbation
                offset = perturbation(gradient, epsilon=rule.epsilon, norm=rule.norm)
            return self._loss(self.student(batch.student, needs, offset), teacher, batch, stage)

    def after_step(self, stage: Stage) -> None:
        """Let the stage's terms update what no gradient moves."""
        for name in stage.weights:
            self._plan.terms[name].after_step()

    def _loss(self, student: Outputs, teacher: Outputs, batch: Batch, stage: Stage) -> Loss:
        student = student.float()
        # Cosines and small norms are wrong in half precision: terms compute in float32.
        with torch.autocast(batch.labels.device.type, enabled=False):
            terms = {name: self.terms[name](student, teacher, batch) for name in stage.weights}
        total = torch.stack([stage.weights[name] * value for name, value in terms.items()]).sum()
        return Loss(total, {name: value.detach() for name, value in terms.items()})
