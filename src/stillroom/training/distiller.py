"""Student and terms in one module, so that one forward pass returns the loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Augmented:
    """A batch with other words in it, and what the teacher computed on it."""

    batch: Batch
    teacher: Outputs


class Distiller(nn.Module):
    """What is trained: the student and the parameters of the plan's terms."""

    def __init__(self, student: Encoder, plan: Plan, *, bf16: bool):
        super().__init__()
        self.student = student
        self.terms = nn.ModuleDict(dict(plan.terms))
        for term in plan.terms.values():
            term.bf16 = bf16
        self._plan = plan
        self._bf16 = bf16

    def forward(
        self, batch: Batch, teacher: Outputs, stage: Stage, augmented: Augmented | None = None
    ) -> Loss:
        """Return the stage's loss on a batch, on perturbed embeddings where the stage says so.

        The perturbation's first pass computes the gradient of the embeddings and of nothing else;
        the teacher's outputs serve both passes. Terms on augmented rows are added, under
        `augmented_NAME`.
        """
        with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=self._bf16):
            needs = self._plan.student_needs(stage)
            offset = None
            share = batch.share
            if stage.perturb and self._plan.perturbation is not None:
                with share.own_random(0):
                    clean = self.student(batch.student, needs | Needs(embeddings=True))
                loss = self.weigh(clean, teacher, batch, stage.weights)
                # Autocast would reach into the backward pass and round the terms' gradients too.
                with torch.autocast(batch.labels.device.type, enabled=False):
                    (gradient,) = torch.autograd.grad(loss.total, clean.embeddings)
                rule = self._plan.perturbation
                offset = perturbation(gradient, epsilon=rule.epsilon, norm=rule.norm, share=share)
            with share.own_random(1):
                student = self.student(batch.student, needs, offset)
            loss = self.weigh(student, teacher, batch, stage.weights)
            if augmented is None:
                return loss
            needs, _ = self._plan.augmented_needs(stage.augmented)
            with share.own_random(2):
                student = self.student(augmented.batch.student, needs)
            more = self.weigh(student, augmented.teacher, augmented.batch, stage.augmented)
            named = {f"augmented_{name}": value for name, value in more.terms.items()}
            return Loss(loss.total + more.total, loss.terms | named)

    def after_step(self, stage: Stage) -> None:
        """Let the stage's terms update what no gradient moves."""
        for name in dict.fromkeys((*stage.weights, *stage.augmented)):
            self._plan.terms[name].after_step()

    def record(self, stage: Stage) -> dict[str, Any]:
        """Return what the stage's terms have to say of the last step, by name of the term."""
        names = dict.fromkeys((*stage.weights, *stage.augmented))
        found = {name: self._plan.terms[name].record() for name in names}
        return {name: values for name, values in found.items() if values}

    def weigh(self, student: Outputs, teacher: Outputs, batch: Batch, weights: Mapping[str, float]) -> Loss:
        """Return the weighted sum of terms on what student and teacher computed.

        Of a batch that several processes share, this is what this process's rows add to it.
        """
        student = student.float()
        # Cosines and small norms are wrong in half precision: terms compute in float32.
        with torch.autocast(batch.labels.device.type, enabled=False):
            terms = {name: self.terms[name](student, teacher, batch) for name in weights}
        if not batch.share.whole:
            terms = {n: v * batch.share.of(self._plan.terms[n].mean_over) for n, v in terms.items()}
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return Loss(total, {name: value.detach() for name, value in terms.items()})
