"""CILDA: MATE-KD whose generator also drives the intermediate layers of student and teacher apart.

Haidar et al.: "CILDA: Contrastive Data Augmentation using Intermediate Layer Knowledge Distillation",
COLING 2022, arXiv 2204.07674. As re-implemented by TKC002, on the official MATE-KD base;
`docs/methods/cilda.md` says what could not be checked against the paper.

Shapes: B batch, S tokens, u projection size.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillroom.data.batching import Batch
from stillroom.encoder import Needs, Outputs
from stillroom.errors import WrongInput
from stillroom.methods.augmentation import AugmentationSettings, Divergence, augmentation
from stillroom.methods.base import Context, Method, Plan, Stage, Term
from stillroom.methods.prediction import HARD, HardLabels


class CILDASettings(AugmentationSettings):
    """Options of `cilda`. Defaults are the third-party code's, but where the card says otherwise."""

    a1: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the divergence of the outputs in what the generator raises."""
    a2: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the contrastive loss in what the generator raises. 0 is MATE-KD."""
    alpha2: bool = False
    """Whether the contrastive loss is divided by ln B, its value where nothing is known."""
    objective: Literal["M3", "M4", "minILD"] = "M3"
    """The student's loss. `minILD` (M6) adds the contrastive loss, and is another method than CILDA."""
    pooling: Literal["cls", "mean"] = "cls"
    """What stands for a layer: its first token, or the mean over its real tokens."""
    teacher_layers: Literal["all", "random"] = "all"
    """All layers, or as many as the student has, drawn anew each time as RAIL-KD does."""
    anchor: Literal["teacher", "student", "symmetric"] = "teacher"
    """Whose row is matched with the other model's rows of the batch."""
    tau2: Annotated[float, Field(gt=0)] = 2.0
    """Temperature of the contrastive loss."""
    projection_size: Annotated[int, Field(ge=1)] = 128
    """u, the width in which the models are compared."""
    projections: Literal["frozen", "adv", "min"] = "min"
    """In generator steps: kept at random, trained to raise the contrastive loss, or to lower it."""


def in_batch_contrast(
    teacher_Bu: Tensor,
    student_Bu: Tensor,
    *,
    tau2: float,
    anchor: Literal["teacher", "student", "symmetric"] = "teacher",
) -> Tensor:
    """Return L_CRD of each row: how hard it is to tell its own student from those of other rows.

    ``-log [exp(cos(t_i, s_i) / tau2) / sum_j exp(cos(t_i, s_j) / tau2)]`` with the teacher as
    anchor, j over the batch; ``cos(s_i, t_j)`` with the student; the mean of both if symmetric.

    Args:
        teacher_Bu: Projected teacher, shape ``(B, u)``.
        student_Bu: Projected student, shape ``(B, u)``. Gradients flow to both.
        tau2: Temperature > 0, unitless.
        anchor: Whose row is matched.

    Returns:
        Shape ``(B,)``, in nats; ``ln B`` where all cosines are equal.

    Raises:
        ValueError: If the shapes differ, or there is one row, which has nothing to be told from.

    Example:
        >>> same = torch.ones(2, 3)
        >>> [round(x, 4) for x in in_batch_contrast(same, same, tau2=2.0).tolist()]
        [0.6931, 0.6931]
    """
    if teacher_Bu.shape != student_Bu.shape or teacher_Bu.ndim != 2:
        raise ValueError(
            f"expected shapes (B, u) twice, found {tuple(teacher_Bu.shape)} and {tuple(student_Bu.shape)}"
        )
    if len(teacher_Bu) < 2:
        raise ValueError("the contrastive loss needs at least two rows in a batch, found one")
    scores_BB = F.normalize(teacher_Bu, dim=-1) @ F.normalize(student_Bu, dim=-1).mT / tau2
    losses = []
    if anchor != "student":
        losses.append(-F.log_softmax(scores_BB, dim=1).diagonal())
    if anchor != "teacher":
        losses.append(-F.log_softmax(scores_BB, dim=0).diagonal())
    return torch.stack(losses).mean(0)


class _Projection(nn.Module):
    """A linear map to u, trained or kept at its random start."""

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, size: int, *, trained: bool):
        super().__init__()
        start = nn.Linear(width, size)
        for name, value in start.named_parameters():
            if trained:
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value.detach())

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


class IntermediateContrast(Term):
    """L_CRD over the layers of both models, pooled, concatenated and projected; mean over the batch."""

    least_rows = 2

    def __init__(self, settings: CILDASettings, context: Context):
        super().__init__()
        self.settings = settings
        self.depths = context.student_depth, context.teacher_depth
        read = context.student_depth if settings.teacher_layers == "random" else context.teacher_depth
        self.student_needs, self.teacher_needs = (
            Needs(pooled_states=frozenset((settings.pooling, i) for i in range(1, depth + 1)))
            for depth in self.depths
        )
        trained = settings.projections != "frozen"
        size = settings.projection_size
        self.student = _Projection(context.student_depth * context.student_width, size, trained=trained)
        self.teacher = _Projection(read * context.teacher_width, size, trained=trained)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss; raises `ValueError` for a batch of one row."""
        depth, layers = self.depths[0], list(range(1, self.depths[1] + 1))
        if self.settings.teacher_layers == "random":
            layers = sorted((1 + torch.randperm(len(layers))[:depth]).tolist())
        z_S = self.student(student.joined(self.settings.pooling, range(1, depth + 1)))
        z_T = self.teacher(teacher.joined(self.settings.pooling, layers))
        # Each row is told from those of all processes, which learn from that too.
        z_T, z_S = batch.share.gather(z_T), batch.share.gather(z_S)
        each = in_batch_contrast(z_T, z_S, tau2=self.settings.tau2, anchor=self.settings.anchor)
        own = each.narrow(0, batch.share.start, len(batch.row_ids))
        return own.mean() / (math.log(len(each)) if self.settings.alpha2 else 1.0)


_STUDENT: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "M3": ({"hard": 1 / 3, "soft": 1 / 3}, {"soft": 1 / 3}),
    "M4": ({"hard": 1 / 3, "soft": 1 / 3}, {"hard": 2 / 9, "soft": 1 / 9}),
    "minILD": (
        {"hard": 2 / 9, "soft": 2 / 9, "contrast": 2 / 9},
        {"hard": 1 / 6, "soft": 1 / 12, "contrast": 1 / 12},
    ),
}
"""Weights of the student's objective on the rows as they are, and on augmented rows."""


def build(settings: CILDASettings, context: Context) -> Plan:
    """Return one stage of the student's objective; the generator raises ``a1 D(X') + a2 L_CRD(X')``.

    Raises:
        WrongInput: If no generator is given, it has nothing to raise, or the layers are too few.
    """
    if settings.a1 == settings.a2 == 0:
        raise WrongInput("method.a1 and a2 are both 0: the generator has nothing to raise.")
    if settings.teacher_layers == "random" and context.teacher_depth < context.student_depth:
        raise WrongInput(
            f"method.teacher_layers: random draws as many teacher layers as the student has "
            f"({context.student_depth}), and the teacher has {context.teacher_depth}: set it to all."
        )
    original, augmented = _STUDENT[settings.objective]
    raised = {"soft": settings.a1, "contrast": settings.a2}
    raised = {name: weight for name, weight in raised.items() if weight > 0}
    terms: dict[str, Term] = {
        "hard": HardLabels(context.kind),
        "soft": Divergence(context.kind, settings.adv_div),
    }
    if "contrast" in {*original, *raised}:
        terms["contrast"] = IntermediateContrast(settings, context)
    rule = augmentation(settings, "cilda", raised, settings.projections)
    return Plan(terms, (Stage(0.0, original, augmented=augmented),), augmentation=rule)


METHOD = Method(
    name="cilda",
    title="CILDA",
    paper="Haidar et al. 2022, arXiv 2204.07674",
    summary="MATE-KD whose generator also raises a contrastive loss on intermediate layers.",
    status="as re-implemented by TKC002, on the official MATE-KD base",
    settings=CILDASettings,
    build=build,
    terms={
        "contrast": "turns one vector of each row to the teacher’s of it, away from those of other rows",
        "soft": "brings the student’s answers to the teacher’s",
        "hard": HARD,
    },
    training={"epochs": 20, "learning_rate": 2e-5, "weight_decay": 0.0, "max_grad_norm": 5.0},
)
