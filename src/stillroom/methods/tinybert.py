"""TinyBERT: attention scores, hidden states and embeddings of a fixed layer map, then soft labels.

Jiao et al.: "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of EMNLP 2020,
arXiv 1909.10351. Task distillation as the authors' code; `docs/methods/tinybert.md` says what was not
checked against the paper.

Shapes: L mapped layers, B batch, H heads, S tokens, D student width, E teacher width, C classes.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillroom.data.batching import Batch
from stillroom.data.tasks import Kind
from stillroom.encoder import Needs, Outputs
from stillroom.methods.base import Context, Method, Plan, Stage, Term
from stillroom.methods.prediction import HARD, SOFT, HardLabels
from stillroom.ops.attention import visible
from stillroom.ops.layer_map import LayerMap, resolve_layer_map
from stillroom.ops.prediction import soft_cross_entropy
from stillroom.ops.projection import project, start_unturned
from stillroom.recipe import Settings


class TinyBERTSettings(Settings):
    """Options of `tinybert`. Defaults are those of the authors' code and its README."""

    switch: Annotated[float, Field(ge=0, le=1)] = 10 / 13
    """Share of the steps in the first stage, intermediate layers alone: the README's 10 epochs of 13."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """t of the soft labels; the loss is not multiplied by t squared."""
    layer_map: LayerMap = "uniform"
    """Teacher layer of each student layer, or `uniform`: every (teacher / student)-th, rounded up."""
    regression_target: Literal["label", "teacher"] = "label"
    """What the second stage follows where the task is a regression: labels, or the teacher's outputs."""
    padding: Literal["all", "masked"] = "all"
    """Whether padding counts in the means, as in the authors' code, or real tokens only."""


def layer_squares(student_L: Tensor, teacher_L: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return ``sum_m MSE(S_m, T_m)``, each mean over all elements of a layer, or over counted ones.

    Args:
        student_L: One tensor per layer, shape ``(L, ...)``; gradients flow here only.
        teacher_L: The same of the mapped teacher layers; detached.
        counted: 1 on elements that count, of a shape that expands to a layer's; None counts all.

    Returns:
        Scalar, in squared units of what is compared.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> s, t = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
        >>> layer_squares(s, t).item(), layer_squares(s, t, torch.tensor([1.0, 0.0])).item()
        (7.5, 10.0)
    """
    if student_L.shape != teacher_L.shape:
        raise ValueError(
            f"expected one shape twice, found {tuple(student_L.shape)} and {tuple(teacher_L.shape)}"
        )
    squares = (student_L - teacher_L.detach()).square()
    if counted is None:
        return squares.flatten(1).mean(1).sum()
    counted = counted.expand_as(squares[0])
    return (squares * counted).sum() / counted.sum()


class AttentionScores(Term):
    """``L_attn = sum_m MSE(A^S_m, A^T_g(m))`` of scores before the softmax, 0 where a key is masked."""

    same_tokens = True
    same_heads = True

    def __init__(self, settings: TinyBERTSettings, layers: tuple[int, ...]):
        super().__init__()
        self.masked = settings.padding == "masked"
        self.mean_over = "token pairs" if self.masked else "rows"
        self.student_layers, self.teacher_layers = tuple(range(1, len(layers) + 1)), layers
        padding = not self.masked
        self.student_needs = Needs(attention_scores=frozenset(self.student_layers), padding=padding)
        self.teacher_needs = Needs(attention_scores=frozenset(layers), padding=padding)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss."""
        scores = visible(_stack(student.attention_scores, self.student_layers))
        goals = visible(_stack(teacher.attention_scores, self.teacher_layers))
        counted = None
        if self.masked:
            mask_BS = batch.student.attention_mask.to(scores.dtype)
            counted = (mask_BS[:, :, None] * mask_BS[:, None])[:, None]
        return layer_squares(scores, goals, counted)


class HiddenStates(Term):
    """``L_hidn + L_embd = sum_m MSE(H^S_m W + b, H^T_g(m))``, m from 0, the embedding output; one W."""

    same_tokens = True

    def __init__(self, settings: TinyBERTSettings, context: Context, layers: tuple[int, ...]):
        super().__init__()
        self.masked = settings.padding == "masked"
        self.mean_over = "tokens" if self.masked else "rows"
        self.student_layers, self.teacher_layers = tuple(range(len(layers) + 1)), (0, *layers)
        padding = not self.masked
        self.student_needs = Needs(hidden_states=frozenset(self.student_layers), padding=padding)
        self.teacher_needs = Needs(hidden_states=frozenset(self.teacher_layers), padding=padding)
        self.projection = nn.Linear(context.student_width, context.teacher_width)
        nn.init.zeros_(self.projection.bias)
        start_unturned(self.projection.weight, context.basis)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss."""
        states = _stack(student.hidden_states, self.student_layers)
        states = project(states, self.projection.weight.T, bf16=self.bf16) + self.projection.bias
        goals = _stack(teacher.hidden_states, self.teacher_layers)
        mask_BS1 = batch.student.attention_mask.to(states.dtype)[..., None]
        return layer_squares(states, goals, mask_BS1 if self.masked else None)


class Prediction(Term):
    """``L_pred``: soft cross-entropy, mean over rows and classes, without the factor t squared."""

    student_needs = Needs(logits=True)
    teacher_needs = Needs(logits=True)

    def __init__(self, kind: Kind, temperature: float):
        super().__init__()
        self.kind = kind
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss of the student's logits against the teacher's."""
        T = self.temperature
        loss = soft_cross_entropy(
            student.logits, teacher.logits, temperature=T, kind=self.kind, mean_over_classes=True
        )
        return loss if self.kind == "regression" else loss / T**2


def _stack(tensors: Any, layers: tuple[int, ...]) -> Tensor:
    return torch.stack([tensors[layer] for layer in layers])


def build(settings: TinyBERTSettings, context: Context) -> Plan:
    """Return ``L_attn + L_hidn + L_embd`` up to the switch, then the prediction loss alone.

    Raises:
        WrongInput: If the layer map does not fit the depths.
    """
    terms: dict[str, Term] = {}
    stages = []
    if settings.switch > 0:
        layers = resolve_layer_map(settings.layer_map, context.student_depth, context.teacher_depth)
        terms["attention"] = AttentionScores(settings, layers)
        terms["hidden_states"] = HiddenStates(settings, context, layers)
        stages.append(Stage(0.0, {"attention": 1.0, "hidden_states": 1.0}))
    if settings.switch < 1:
        follows_labels = context.kind == "regression" and settings.regression_target == "label"
        name = "hard" if follows_labels else "soft"
        terms[name] = (
            HardLabels(context.kind) if follows_labels else Prediction(context.kind, settings.temperature)
        )
        stages.append(Stage(settings.switch, {name: 1.0}))
    return Plan(terms, tuple(stages))


def pretrain(settings: TinyBERTSettings, context: Context) -> Plan:
    """Return general distillation: the first stage alone, on text without labels."""
    return build(settings.model_copy(update={"switch": 1.0}), context)


METHOD = Method(
    name="tinybert",
    title="TinyBERT",
    paper="Jiao et al. 2020, arXiv 1909.10351",
    summary="Attention scores, hidden states and embeddings of a fixed layer map, then soft labels.",
    status="task distillation as the authors' code, in one run",
    settings=TinyBERTSettings,
    build=build,
    terms={
        "attention": "brings each layer’s attention scores to those of a teacher layer",
        "hidden_states": "brings embeddings and each layer’s states to those of a teacher layer",
        "soft": SOFT,
        "hard": HARD,
    },
    pretrain=pretrain,
    training={"epochs": 13, "batch_size": 32, "learning_rate": 5e-5},
)
