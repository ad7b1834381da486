"""MiniLM: the last layer's attention and value relation, then fine-tuning.

Wang et al.: "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
Transformers", NeurIPS 2020, arXiv 2002.10957. As re-implemented by GLMKD, but for its double softmax;
`docs/methods/minilm.md` says what could not be checked, and how pre-training became a first stage.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from stillroom.data.batching import Batch
from stillroom.encoder import Needs, Outputs
from stillroom.methods.base import Context, Method, Plan, Stage, Term
from stillroom.methods.prediction import HARD, SOFT, HardLabels, SoftLabels
from stillroom.ops.attention import relation_divergence, relation_scores
from stillroom.recipe import Settings


class MiniLMSettings(Settings):
    """Options of `minilm`. The paper distils in pre-training: how the stages are split is ours."""

    switch: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the steps in the first stage, the relations alone; then the labels alone."""
    soft_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the soft labels in the second stage; hard labels weigh one minus this."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T of the soft labels; the loss is multiplied by T squared."""


class AttentionDistribution(Term):
    """``mean KL(Att^T || Att^S)`` of the last layers: `ops.attention.relation_divergence` of scores."""

    same_tokens = True
    same_heads = True
    mean_over = "tokens"

    def __init__(self, context: Context):
        super().__init__()
        self.student_layer, self.teacher_layer = context.student_depth, context.teacher_depth
        self.student_needs = Needs(attention_scores=frozenset({self.student_layer}))
        self.teacher_needs = Needs(attention_scores=frozenset({self.teacher_layer}))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss."""
        scores = student.attention_scores[self.student_layer]
        goals = teacher.attention_scores[self.teacher_layer]
        return relation_divergence(scores, goals, batch.student.attention_mask)


class ValueRelation(Term):
    """``mean KL(VR^T || VR^S)`` of the last layers, ``VR = softmax(V V^T / sqrt(d_k))``."""

    same_tokens = True
    same_heads = True
    mean_over = "tokens"

    def __init__(self, context: Context):
        super().__init__()
        self.student_layer, self.teacher_layer = context.student_depth, context.teacher_depth
        self.student_needs = Needs(values=frozenset({self.student_layer}))
        self.teacher_needs = Needs(values=frozenset({self.teacher_layer}))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss."""
        scores = relation_scores(student.values[self.student_layer])
        goals = relation_scores(teacher.values[self.teacher_layer])
        return relation_divergence(scores, goals, batch.student.attention_mask)


def build(settings: MiniLMSettings, context: Context) -> Plan:
    """Return the two relations up to the switch, then ``(1 - soft_weight) hard + soft_weight soft``."""
    labels = {"hard": 1 - settings.soft_weight, "soft": settings.soft_weight}
    labels = {name: weight for name, weight in labels.items() if weight > 0}
    terms: dict[str, Term] = {
        "attention": AttentionDistribution(context),
        "value_relation": ValueRelation(context),
        "hard": HardLabels(context.kind),
        "soft": SoftLabels(context.kind, settings.temperature),
    }
    relations = {"attention": 1.0, "value_relation": 1.0}
    used = {name: terms[name] for name in (*relations, *labels)}
    return Plan(used, (Stage(0.0, relations), Stage(settings.switch, labels)))


def pretrain(settings: MiniLMSettings, context: Context) -> Plan:
    """Return the relations alone, on text without labels: the paper's own use."""
    plan = build(settings, context)
    relations = plan.stages[0]
    return Plan({name: plan.terms[name] for name in relations.weights}, (relations,))


METHOD = Method(
    name="minilm",
    title="MiniLM",
    paper="Wang et al. 2020, arXiv 2002.10957",
    summary="Attention and value relation of the last layer, then fine-tuning.",
    status="as re-implemented by GLMKD, pre-training as a first stage on the task",
    settings=MiniLMSettings,
    build=build,
    terms={
        "attention": "brings the last layer’s attention to the teacher’s",
        "value_relation": "brings products of the last layer’s values to the teacher’s",
        "soft": SOFT,
        "hard": HARD,
    },
    pretrain=pretrain,
)
