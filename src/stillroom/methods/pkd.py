"""PKD: the student's first tokens follow those of teacher layers, beside soft and hard labels.

Sun et al.: "Patient Knowledge Distillation for BERT Model Compression", EMNLP 2019, arXiv 1908.09355.
Equations as the authors' code; `docs/methods/pkd.md` says what was not checked against the paper.

Shapes: L compared layers, B batch, D student width, E teacher width.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillroom.data.batching import Batch
from stillroom.encoder import Needs, Outputs
from stillroom.errors import WrongInput
from stillroom.methods.base import Context, Method, Plan, Stage, Term
from stillroom.methods.prediction import HARD, SOFT, HardLabels, SoftLabels
from stillroom.ops.layer_map import LayerMap, resolve_layer_map
from stillroom.ops.projection import start_unturned
from stillroom.recipe import Settings


class PKDSettings(Settings):
    """Options of `pkd`. Defaults lie in the authors' grid, where GLMKD set them."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the soft labels; hard labels weigh one minus this."""
    beta: Annotated[float, Field(gt=0)] = 100.0
    """Weight of the patient loss on first tokens."""
    temperature: Annotated[float, Field(gt=0)] = 10.0
    """T of the soft labels; the loss is multiplied by T squared."""
    layer_map: LayerMap | Literal["last"] = "uniform"
    """Teacher layer of each student layer: `uniform` is PKD-Skip, `last` PKD-Last. Its end is unused."""
    normalise: bool = True
    """Whether first tokens are scaled to length 1 before they are compared."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over layers and width, and over the classes of the soft labels: means, as the code, or sums."""


def patient_loss(
    student_LBE: Tensor,
    teacher_LBE: Tensor,
    *,
    normalise: bool = True,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Return L_PT: how far the student's first tokens are from the teacher's.

    ``sum_m | h^S_m / |h^S_m| - h^T_I(m) / |h^T_I(m)| |^2``, averaged over the batch with `sum`, as the
    formula, or over layers and width too with `mean`, as the code. Norms are clamped at 1e-12.

    Args:
        student_LBE: First tokens of the compared layers; gradients flow here only.
        teacher_LBE: The same of the teacher; detached.
        normalise: Whether vectors are scaled to length 1.
        reduction: `mean` or `sum`.

    Returns:
        Scalar, unitless; at most 4 L with `sum` and `normalise`.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> s, t = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]])
        >>> [patient_loss(s, t, reduction=reduction).item() for reduction in ("mean", "sum")]
        [1.0, 2.0]
    """
    if student_LBE.shape != teacher_LBE.shape or student_LBE.ndim != 3:
        raise ValueError(
            f"expected shapes (L, B, E) twice, found {tuple(student_LBE.shape)} and "
            f"{tuple(teacher_LBE.shape)}"
        )
    teacher_LBE = teacher_LBE.detach()
    if normalise:
        student_LBE, teacher_LBE = (F.normalize(x, dim=-1) for x in (student_LBE, teacher_LBE))
    squares = (student_LBE - teacher_LBE).square()
    return squares.mean() if reduction == "mean" else squares.sum(-1).mean(1).sum()


class FirstTokens(Term):
    """L_PT of student layers 1 to N - 1; a student of another width is projected first."""

    projection: nn.Parameter | None

    def __init__(self, settings: PKDSettings, context: Context, layers: tuple[int, ...]):
        super().__init__()
        self.settings = settings
        self.student_layers, self.teacher_layers = tuple(range(1, len(layers) + 1)), layers
        self.student_needs, self.teacher_needs = (
            Needs(pooled_states=frozenset(("cls", layer) for layer in side))
            for side in (self.student_layers, self.teacher_layers)
        )
        self.projection = None
        if context.student_width != context.teacher_width:
            # No bias: rescaling a state would no longer leave its direction alone.
            self.projection = nn.Parameter(torch.empty(context.student_width, context.teacher_width))
            start_unturned(self.projection, context.basis)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss."""
        states = torch.stack([student.pooled_states["cls", layer] for layer in self.student_layers])
        goals = torch.stack([teacher.pooled_states["cls", layer] for layer in self.teacher_layers])
        if self.projection is not None:
            states = states @ self.projection
        reduction = self.settings.reduction
        return patient_loss(states, goals, normalise=self.settings.normalise, reduction=reduction)


def build(settings: PKDSettings, context: Context) -> Plan:
    """Return one stage: ``(1 - alpha) hard + alpha T^2 KL + beta L_PT``.

    Raises:
        WrongInput: If the layer map does not fit the depths, or leaves no layer to compare.
    """
    N, M = context.student_depth, context.teacher_depth
    if N < 2:
        raise WrongInput(
            f"pkd compares all student layers but the last, and the student has {N}: give it at least 2."
        )
    layer_map = settings.layer_map
    if layer_map == "last":
        if N > M:
            raise WrongInput(
                f"method.layer_map: last takes one teacher layer for each of {N} student layers, and the "
                f"teacher has {M}: give a student of at most {M} layers."
            )
        layer_map = tuple(range(M - N + 1, M + 1))
    layers = resolve_layer_map(layer_map, N, M)[:-1]
    # The code averages the soft labels over classes too; regression has none.
    means = settings.reduction == "mean" and context.kind != "regression"
    weights = {
        "soft": settings.alpha / (context.classes if means else 1),
        "hard": 1 - settings.alpha,
        "first_tokens": settings.beta,
    }
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    terms: dict[str, Term] = {
        "soft": SoftLabels(context.kind, settings.temperature),
        "hard": HardLabels(context.kind),
        "first_tokens": FirstTokens(settings, context, layers),
    }
    return Plan({name: terms[name] for name in weights}, (Stage(0.0, weights),))


METHOD = Method(
    name="pkd",
    title="PKD",
    paper="Sun et al. 2019, arXiv 1908.09355",
    summary="The normalised first token of each student layer follows a teacher layer's.",
    status="as the authors' code",
    settings=PKDSettings,
    build=build,
    terms={
        "first_tokens": "brings each layer’s state of the first token to that of a teacher layer",
        "soft": SOFT,
        "hard": HARD,
    },
    training={"epochs": 4, "batch_size": 32, "learning_rate": 2e-5},
)
