"""DistilBERT: soft labels, and a last hidden state that points where the teacher's does.

Sanh et al.: "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter", 2019,
arXiv 1910.01108. A pre-training loss, adapted to the task: its masked-LM part gives way to the hard
labels. Weights as the authors' code; `docs/methods/distilbert.md` says what was not checked.

Shapes: B batch, S tokens, D student width, E teacher width.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from stillroom.data.batching import Batch
from stillroom.encoder import Needs, Outputs
from stillroom.methods.base import Context, Method, Plan, Stage, Term
from stillroom.methods.prediction import HARD, SOFT, HardLabels, SoftLabels
from stillroom.ops.cos_nce import angular_distance
from stillroom.ops.projection import project, start_unturned
from stillroom.recipe import Settings


class DistilBERTSettings(Settings):
    """Options of `distilbert`. Defaults are the authors' for pre-training."""

    soft_weight: Annotated[float, Field(gt=0)] = 5.0
    """Weight of the soft labels."""
    hard_weight: Annotated[float, Field(ge=0)] = 2.0
    """Weight of the hard labels, where pre-training has the masked-LM loss."""
    cosine_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the angle between the last hidden states."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T of the soft labels; the loss is multiplied by T squared."""


def cosine_loss(student_BSE: Tensor, teacher_BSE: Tensor, mask_BS: Tensor) -> Tensor:
    """Return ``mean (1 - cos(h^S, h^T))`` over the real tokens of the batch, in [0, 2].

    Args:
        student_BSE: Token states in the teacher's width; gradients flow here only.
        teacher_BSE: Token states; detached.
        mask_BS: 1 on real tokens.

    Returns:
        Scalar, unitless.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> s, t = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> cosine_loss(s, t, torch.tensor([[1, 1]])).item()
        0.5
    """
    if student_BSE.shape != teacher_BSE.shape or student_BSE.shape[:-1] != mask_BS.shape:
        found = [tuple(given.shape) for given in (student_BSE, teacher_BSE, mask_BS)]
        raise ValueError(f"expected shapes (B, S, E) twice and (B, S), found {found}")
    distance_BS = angular_distance(student_BSE, teacher_BSE.detach())
    weight_BS = mask_BS.to(distance_BS.dtype)
    return (distance_BS * weight_BS).sum() / weight_BS.sum()


class LastStateDirection(Term):
    """The cosine loss of the last hidden states; a student of another width is projected first."""

    same_tokens = True
    mean_over = "tokens"
    projection: nn.Parameter | None

    def __init__(self, context: Context):
        super().__init__()
        self.student_layer, self.teacher_layer = context.student_depth, context.teacher_depth
        self.student_needs = Needs(hidden_states=frozenset({self.student_layer}))
        self.teacher_needs = Needs(hidden_states=frozenset({self.teacher_layer}))
        self.projection = None
        if context.student_width != context.teacher_width:
            self.projection = nn.Parameter(torch.empty(context.student_width, context.teacher_width))
            start_unturned(self.projection, context.basis)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss."""
        states = student.hidden_states[self.student_layer]
        if self.projection is not None:
            states = project(states, self.projection, bf16=self.bf16)
        return cosine_loss(states, teacher.hidden_states[self.teacher_layer], batch.student.attention_mask)


def build(settings: DistilBERTSettings, context: Context) -> Plan:
    """Return one stage: ``5 T^2 KL(teacher || student) + 2 hard + 1 (1 - cos)`` with the defaults."""
    weights = {
        "soft": settings.soft_weight,
        "hard": settings.hard_weight,
        "cosine": settings.cosine_weight,
    }
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    terms: dict[str, Term] = {
        "soft": SoftLabels(context.kind, settings.temperature),
        "hard": HardLabels(context.kind),
        "cosine": LastStateDirection(context),
    }
    return Plan({name: terms[name] for name in weights}, (Stage(0.0, weights),))


METHOD = Method(
    name="distilbert",
    title="DistilBERT",
    paper="Sanh et al. 2019, arXiv 1910.01108",
    summary="Soft labels, and the direction of the last hidden state, adapted to task distillation.",
    status="pre-training loss adapted to the task: hard labels for the masked LM",
    settings=DistilBERTSettings,
    build=build,
    terms={"cosine": "turns the student’s last hidden states to the teacher’s", "soft": SOFT, "hard": HARD},
    # Logits of a masked LM, and the hidden words as its hard labels: the paper's own use.
    pretrain=build,
    masked_lm=True,
)
