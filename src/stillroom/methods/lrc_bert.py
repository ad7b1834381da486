"""LRC-BERT: contrastive distillation of intermediate layers by angles, perturbed, in two stages.

Fu et al.: "LRC-BERT: Latent-representation Contrastive Knowledge Distillation for Natural Language
Understanding", AAAI 2021, arXiv 2012.07335. Equations as re-implemented by GLMKD and BERT-gang;
`docs/methods/lrc-bert.md` says what could not be checked against the paper.

Shapes: L mapped layers, B rows, G rows of all processes (B in one process), S tokens, D student width,
E teacher width, K negatives.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillroom.data.batching import Batch
from stillroom.encoder import Needs, Outputs
from stillroom.errors import WrongInput
from stillroom.methods.base import Context, Method, Perturbation, Plan, Stage, Term
from stillroom.methods.prediction import HARD, SOFT, HardLabels, SoftLabels
from stillroom.ops.cos_nce import (
    cos_nce,
    cos_nce_of_cosines,
    other_rows,
    pooled_cos_nce,
    token_cosines,
)
from stillroom.ops.layer_map import LayerMap, resolve_layer_map
from stillroom.ops.projection import project, start_unturned
from stillroom.recipe import Settings


class LRCBertSettings(Settings):
    """Options of `lrc-bert`. Defaults are those of the two re-implementations where they agree.

    Only GLMKD perturbs, with a norm of each token: `perturbation_norm` of `tensor` is our own.
    """

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of COS-NCE (summed over layers), in both stages."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the soft labels, in the second stage."""
    gamma: Annotated[float, Field(ge=0)] = 3.0
    """Weight of the hard labels, in the second stage."""
    temperature: Annotated[float, Field(gt=0)] = 1.1
    """t of the soft labels; the loss is multiplied by t squared."""
    switch: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of the steps in the first stage, COS-NCE alone. 0 trains in one stage."""
    vector: Literal["token", "cls", "mean"] = "token"
    """What is compared: tokens at the same position (masked), the first token, or their mean."""
    layer_map: LayerMap = "uniform"
    """Teacher layer of each student layer, or `uniform`: every (teacher / student)-th, rounded up."""
    projection: Literal["per_layer", "shared"] = "per_layer"
    """One matrix from student to teacher width for each layer, or one for all."""
    negatives: Literal["in_batch", "bank"] = "in_batch"
    """The other rows of the batch, or rows drawn from a bank of all rows seen."""
    bank_negatives: Annotated[int, Field(ge=1)] = 15
    """K, the rows drawn for each anchor with `negatives: bank`."""
    label_aware: bool = False
    """Whether a negative must have another label than its anchor."""
    perturbation: Literal["both", "second", "off"] = "both"
    """Stages in which the step is taken on perturbed embeddings."""
    epsilon: Annotated[float, Field(gt=0)] = 1.0
    """Length of the perturbation."""
    perturbation_norm: Literal["tensor", "token"] = "tensor"
    """Whether the whole batch's gradient, or each token's, is scaled to epsilon."""


class CosNCE(Term):
    """COS-NCE over the mapped layers: batch mean of each layer, summed over layers."""

    bank: Tensor
    bank_labels: Tensor

    least_rows = 2

    def __init__(self, settings: LRCBertSettings, context: Context, layers: tuple[int, ...]):
        super().__init__()
        self.settings = settings
        self.same_tokens = settings.vector == "token"
        self.classification = context.kind == "classification"
        self.student_layers = tuple(range(1, len(layers) + 1))
        self.teacher_layers = layers
        self.student_needs, self.teacher_needs = self._needs(self.student_layers), self._needs(layers)
        matrices = 1 if settings.projection == "shared" else len(layers)
        projection = torch.empty(matrices, context.student_width, context.teacher_width)
        for matrix in projection:
            start_unturned(matrix, context.basis)
        self.projection = nn.Parameter(projection)
        if settings.negatives == "bank":
            bank = torch.zeros(context.rows, len(layers), context.teacher_width)
            self.register_buffer("bank", bank)
            self.register_buffer("bank_labels", torch.full((context.rows,), -1))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss; raises `ValueError` for a batch of one row, which has no negatives."""
        mask_BS, share = batch.student.attention_mask, batch.share
        if batch.rows < 2:
            raise ValueError("COS-NCE needs at least two rows in a batch, found one")
        # Pooling and projecting are both linear, so pooled states, the short tensors, are projected.
        states, goals = self._read(student, self.student_layers), self._read(teacher, self.teacher_layers)
        # One matrix for all layers makes one product of them, not one a layer.
        projection = self.projection[0] if len(self.projection) == 1 else self.projection
        states = project(states.flatten(1, -2), projection, bf16=self.bf16).view_as(goals)
        # Anchors are this process's rows, negatives all processes'.
        everyone = share.gather(goals, 1)
        if self.settings.negatives == "bank":
            negatives = self._draw(everyone, batch)
            each = [cos_nce(s, t, n) for s, t, n in zip(states, goals, negatives, strict=True)]
            return torch.stack(each).mean(1).sum()
        if self.settings.vector == "token":
            cosine_LBG = token_cosines(states, everyone, mask_BS, share.gather(mask_BS))
        elif self.settings.label_aware:
            cosine_LBG = F.normalize(states, dim=-1) @ F.normalize(everyone.detach(), dim=-1).mT
        else:
            return pooled_cos_nce(states, goals, None if share.whole else everyone).mean(1).sum()
        negative_BG = self._negatives(cosine_LBG[0], batch)
        return cos_nce_of_cosines(cosine_LBG, negative_BG, share.start).mean(1).sum()

    def _needs(self, layers: tuple[int, ...]) -> Needs:
        vector = self.settings.vector
        if vector == "token":
            return Needs(hidden_states=frozenset(layers))
        return Needs(pooled_states=frozenset((vector, layer) for layer in layers))

    def _read(self, outputs: Outputs, layers: tuple[int, ...]) -> Tensor:
        """Return the layers' states, ``(L, B, S, D)`` for tokens, else ``(L, B, D)``."""
        vector = self.settings.vector
        if vector == "token":
            return torch.stack([outputs.hidden_states[layer] for layer in layers])
        return torch.stack([outputs.pooled_states[vector, layer] for layer in layers])

    def _negatives(self, cosine_BG: Tensor, batch: Batch) -> Tensor:
        """Return ``(B, G)``: 1 where row b may be a negative of anchor a."""
        y = batch.labels
        if self.settings.label_aware:
            return (y[:, None] != batch.share.gather(y)[None, :]).float()
        return other_rows(cosine_BG, batch.share.start)

    @torch.no_grad()
    def _draw(self, goals_LGE: Tensor, batch: Batch) -> Tensor:
        """Put the batch into the bank and return K drawn rows for each anchor, ``(L, B, K, E)``.

        Every process draws for all rows, as one alone would, so that all banks and draws are one.
        """
        rows, labels = batch.share.gather(batch.row_ids), batch.share.gather(batch.labels)
        if not batch.augmented:
            self.bank[rows] = goals_LGE.transpose(0, 1)
            self.bank_labels[rows] = labels.long() if self.classification else 0
        allowed = (self.bank_labels >= 0).float().repeat(len(rows), 1)
        allowed[torch.arange(len(rows), device=rows.device), rows] = 0
        if self.settings.label_aware:
            other = (self.bank_labels[None] != labels[:, None]).float()
            # Early on every row seen may share the anchor's label: then any of them serves.
            none = (allowed * other).sum(1, keepdim=True) == 0
            allowed = torch.where(none, allowed, allowed * other)
        drawn = torch.multinomial(allowed, self.settings.bank_negatives, replacement=True)
        own = drawn.narrow(0, batch.share.start, len(batch.row_ids))
        return self.bank[own].permute(2, 0, 1, 3)


def build(settings: LRCBertSettings, context: Context) -> Plan:
    """Return COS-NCE alone up to the switch, then all three losses; perturbed as set.

    Raises:
        WrongInput: If options do not go together, or the layer map does not fit the depths.
    """
    if settings.label_aware and context.kind != "classification":
        raise WrongInput(
            f"method.label_aware compares classes, and the task is {context.kind}: set it to false."
        )
    if settings.negatives == "bank" and settings.vector == "token":
        raise WrongInput(
            "method.negatives: bank keeps one vector per row: set method.vector to cls or mean."
        )
    second = {"cos_nce": settings.alpha, "soft": settings.beta, "hard": settings.gamma}
    second = {name: weight for name, weight in second.items() if weight > 0}
    if not second:
        raise WrongInput("method.alpha, beta and gamma are all 0: there is nothing to train on.")
    if settings.switch < 1 and second.keys() == {"cos_nce"}:
        raise WrongInput(
            "The classification head would never be trained: set method.beta or method.gamma above 0, or "
            "method.switch=1 for a student of states alone."
        )
    terms: dict[str, Term] = {}
    if "cos_nce" in second:
        layers = resolve_layer_map(settings.layer_map, context.student_depth, context.teacher_depth)
        terms["cos_nce"] = CosNCE(settings, context, layers)
    if "soft" in second:
        terms["soft"] = SoftLabels(context.kind, settings.temperature)
    if "hard" in second:
        terms["hard"] = HardLabels(context.kind)
    stages = [Stage(0.0, second, perturb=settings.perturbation != "off")]
    if settings.switch > 0 and "cos_nce" in second:
        # Without COS-NCE there is nothing to do in the first stage, so there is one stage.
        first = Stage(0.0, {"cos_nce": settings.alpha}, perturb=settings.perturbation == "both")
        stages = [first]
        if settings.switch < 1:
            stages.append(Stage(settings.switch, second, perturb=settings.perturbation != "off"))
    perturbation = Perturbation(settings.epsilon, settings.perturbation_norm)
    return Plan(terms, tuple(stages), perturbation)


def pretrain(settings: LRCBertSettings, context: Context) -> Plan:
    """Return COS-NCE alone, on text without labels, perturbed if `perturbation` is `both`.

    Raises:
        WrongInput: If an option needs labels, or keeps something of every sequence.
    """
    if settings.label_aware or settings.negatives == "bank" or not settings.alpha:
        raise WrongInput(
            "Pre-training has no labels, and its negatives are the other sequences of the batch: set "
            "method.label_aware=false, method.negatives=in_batch, and method.alpha above 0."
        )
    return build(settings.model_copy(update={"switch": 1.0, "beta": 0.0, "gamma": 0.0}), context)


METHOD = Method(
    name="lrc-bert",
    title="LRC-BERT",
    paper="Fu et al. 2021, arXiv 2012.07335",
    summary="Angular contrastive loss on intermediate layers, perturbed embeddings, two stages.",
    status="as re-implemented by GLMKD and BERT-gang, but for the norm of the perturbation",
    settings=LRCBertSettings,
    build=build,
    terms={
        "cos_nce": "turns the student’s states to the teacher’s of the same row, away from other rows’",
        "soft": SOFT,
        "hard": HARD,
    },
    pretrain=pretrain,
    training={"epochs": 18, "batch_size": 16},
)
