"""RAIL-KD: teacher layers drawn at random, pooled, joined, and compared in one small space.

Haidar et al.: "RAIL-KD: RAndom Intermediate Layer Mapping for Knowledge Distillation", Findings of NAACL
2022, arXiv 2109.10164. As re-implemented by GLMKD and TKC002; `docs/methods/rail-kd.md` says what could
not be checked against the paper.

Shapes: B batch, u size of the space in which the models are compared.
"""

from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillroom.data.batching import Batch
from stillroom.encoder import Needs, Outputs, Pooling
from stillroom.errors import WrongInput
from stillroom.methods.base import Context, Method, Plan, Stage, Term
from stillroom.methods.prediction import HARD, SOFT, HardLabels, SoftLabels
from stillroom.ops.layer_map import LayerMap, resolve_layer_map
from stillroom.recipe import Settings


class RAILKDSettings(Settings):
    """Options of `rail-kd`. Defaults are GLMKD's, but where the card says otherwise."""

    hard_weight: Annotated[float, Field(ge=0)] = 1 / 3
    """Weight of the hard labels."""
    soft_weight: Annotated[float, Field(ge=0)] = 1 / 3
    """Weight of the soft labels."""
    layer_weight: Annotated[float, Field(gt=0)] = 1 / 3
    """Weight of the loss on intermediate layers."""
    temperature: Annotated[float, Field(gt=0)] = 10.0
    """T of the soft labels; the loss is multiplied by T squared."""
    form: Literal["glmkd", "tkc002"] = "glmkd"
    """All layers but the last and the squared distance, or all layers and the distance (TKC002's)."""
    layer_map: Literal["random"] | LayerMap = "random"
    """Teacher layers drawn at random, evenly spaced ones (`uniform`), or one for each student layer."""
    redraw: Literal["epoch"] | Annotated[int, Field(ge=1)] = "epoch"
    """When other layers are drawn: each epoch, or each so many batches."""
    embedding: bool = False
    """Whether the embedding outputs are compared too."""
    final: bool = False
    """Whether the last layers are compared too; `tkc002` has them."""
    pooling: Pooling = "mean"
    """Mean over real tokens, over padding as well (`unmasked_mean`, as released), or `cls`."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the batch: mean, or sum as GLMKD has it, whose weight grows with the batch."""
    projection_size: Annotated[int, Field(ge=1)] = 128
    """u, the size of the space in which the models are compared."""


def draw_layers(seed: int, number: int, *, count: int, among: int) -> tuple[int, ...]:
    """Return `count` different ones of the layers 1 to `among`, in order: a function of its arguments.

    Args:
        seed: The run's.
        number: Which draw of the run, from 0.
        count: How many layers.
        among: The last layer that may be drawn.

    Example:
        >>> draw_layers(0, 0, count=3, among=3)
        (1, 2, 3)
    """
    chance = np.random.Generator(np.random.Philox(key=[seed, number]))
    return tuple(sorted((1 + chance.choice(among, count, replace=False)).tolist()))


def rail_loss(
    student_Bu: Tensor,
    teacher_Bu: Tensor,
    *,
    squared: bool = True,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Return how far the directions of the projected models are apart, over the batch.

    ``| z^S / |z^S| - z^T / |z^T| |^2``, or its root. Norms are clamped at 1e-12.

    Args:
        student_Bu: Projected student, shape ``(B, u)``; gradients flow to both.
        teacher_Bu: Projected teacher, shape ``(B, u)``.
        squared: GLMKD's form; TKC002 takes the root.
        reduction: `mean` or `sum` over rows.

    Returns:
        Scalar, unitless; a row adds at most 4, or 2 without the square.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> s, t = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
        >>> rail_loss(s, t).item()
        2.0
    """
    if student_Bu.shape != teacher_Bu.shape or student_Bu.ndim != 2:
        raise ValueError(
            f"expected shapes (B, u) twice, found {tuple(student_Bu.shape)} and {tuple(teacher_Bu.shape)}"
        )
    difference = F.normalize(student_Bu, dim=-1) - F.normalize(teacher_Bu, dim=-1)
    distance_B = difference.square().sum(-1) if squared else torch.linalg.vector_norm(difference, dim=-1)
    return distance_B.mean() if reduction == "mean" else distance_B.sum()


class RandomLayers(Term):
    """The loss on intermediate layers: pooled, end to end, each model by one map to u.

    Which layers are drawn follows from a seed and from how many rows, or batches, were trained on.
    """

    def __init__(self, settings: RAILKDSettings, context: Context):
        super().__init__()
        self.settings = settings
        self.mean_over = "rows" if settings.reduction == "mean" else "nothing"
        N, M = context.student_depth, context.teacher_depth
        inner = settings.form == "glmkd"
        self.count, self.among = (N - 1, M - 1) if inner else (N, M)
        self.fixed: tuple[int, ...] | None = None
        if settings.layer_map != "random":
            self.fixed = resolve_layer_map(settings.layer_map, N, M)[: self.count]
        before, after = (0,) * settings.embedding, settings.final
        self.student_layers = (*before, *range(1, self.count + 1), *((N,) * after))
        self._before, self._after = before, (M,) * after
        drawable = range(1, self.among + 1) if self.fixed is None else self.fixed
        self.student_needs, self.teacher_needs = (
            Needs(
                pooled_states=frozenset((settings.pooling, layer) for layer in layers),
                padding=settings.pooling == "unmasked_mean",
            )
            for layers in (self.student_layers, (*before, *drawable, *self._after))
        )
        read, u = len(self.student_layers), settings.projection_size
        self.student_projection = nn.Linear(read * context.student_width, u)
        self.teacher_projection = nn.Linear(read * context.teacher_width, u)
        self._seed = int(torch.randint(2**31, ()))
        self._every = context.rows if settings.redraw == "epoch" else settings.redraw
        self._seen = 0
        self._rows: Tensor | None = None
        self._layers: tuple[int, ...] = ()

    def teacher_layers(self) -> tuple[int, ...]:
        """Return the teacher layers of now: sorted and different."""
        drawn = self.fixed
        if drawn is None:
            number = self._seen // self._every
            drawn = draw_layers(self._seed, number, count=self.count, among=self.among)
        return (*self._before, *drawn, *self._after)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss; in training the batch counts towards the next draw.

        Once: the same rows again in a step, perturbed or augmented, keep their layers.
        """
        if not self.training:
            layers = self.teacher_layers()
        elif batch.row_ids is self._rows:
            layers = self._layers
        else:
            layers = self._layers = self.teacher_layers()
            self._rows = batch.row_ids
            # Each row is seen once an epoch, so the rows seen tell the epoch.
            self._seen += batch.rows if self.settings.redraw == "epoch" else 1
        pooling = self.settings.pooling
        z_S = self.student_projection(student.joined(pooling, self.student_layers))
        z_T = self.teacher_projection(teacher.joined(pooling, layers))
        squared = self.settings.form == "glmkd"
        return rail_loss(z_S, z_T, squared=squared, reduction=self.settings.reduction)

    def after_step(self) -> None:
        """Forget which rows were counted."""
        self._rows = None

    def get_extra_state(self) -> Tensor:
        """Return seed and count for the checkpoint: on the CPU, so that no step waits for a device."""
        return torch.tensor([self._seed, self._seen])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where a checkpoint stands."""
        self._seed, self._seen = state.tolist()

    def record(self) -> dict[str, Any]:
        """Return the teacher layers that the last training batch was compared with."""
        return {"teacher_layers": list(self._layers or self.teacher_layers())}


def build(settings: RAILKDSettings, context: Context) -> Plan:
    """Return one stage: ``1/3 hard + 1/3 T^2 KL + 1/3 L_RAIL`` with the defaults.

    Raises:
        WrongInput: If the depths leave too few layers, no term trains the head, or options do not go
            together.
    """
    N, M = context.student_depth, context.teacher_depth
    if settings.form == "glmkd" and N < 2:
        raise WrongInput(
            f"method.form: glmkd compares all student layers but the last, and the student has {N}: give "
            "it at least 2, or set method.form=tkc002."
        )
    if N > M:
        raise WrongInput(
            f"rail-kd draws a teacher layer for each student layer, and the student has {N} layers, the "
            f"teacher {M}: give a student of at most {M} layers."
        )
    if settings.form == "tkc002" and settings.final:
        raise WrongInput("method.form: tkc002 compares the last layers already: set method.final=false.")
    if settings.hard_weight == settings.soft_weight == 0:
        raise WrongInput(
            "The classification head would never be trained: set method.hard_weight or "
            "method.soft_weight above 0."
        )
    weights = {
        "hard": settings.hard_weight,
        "soft": settings.soft_weight,
        "layers": settings.layer_weight,
    }
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    terms: dict[str, Term] = {
        "hard": HardLabels(context.kind),
        "soft": SoftLabels(context.kind, settings.temperature),
        "layers": RandomLayers(settings, context),
    }
    return Plan({name: terms[name] for name in weights}, (Stage(0.0, weights),))


METHOD = Method(
    name="rail-kd",
    title="RAIL-KD",
    paper="Haidar et al. 2022, arXiv 2109.10164",
    summary="Pooled states of teacher layers that are drawn anew each epoch, in one small space.",
    status="as re-implemented by GLMKD and TKC002",
    settings=RAILKDSettings,
    build=build,
    terms={
        "layers": "brings pooled states to those of teacher layers that are drawn at random",
        "soft": SOFT,
        "hard": HARD,
    },
)
