"""MiniLMv2: relations of queries, keys and values of one teacher layer, then fine-tuning.

Wang et al.: "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
Transformers", Findings of ACL 2021, arXiv 2012.15828. As re-implemented by GLMKD;
`docs/methods/minilmv2.md` says what could not be checked, and how pre-training became a first stage.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from stillroom.data.batching import Batch
from stillroom.encoder import Needs, Outputs
from stillroom.errors import WrongInput
from stillroom.methods.base import Context, Method, Plan, Stage, Term
from stillroom.methods.prediction import HARD, SOFT, HardLabels, SoftLabels
from stillroom.ops.attention import relation_divergence, relation_scores
from stillroom.recipe import Settings

_RELATIONS = {"query_relation": "queries", "key_relation": "keys", "value_relation": "values"}
"""Terms by name, and what of a block each compares."""


class MiniLMv2Settings(Settings):
    """Options of `minilmv2`. The paper distils in pre-training: how the stages are split is ours."""

    relation_heads: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Into how many heads queries, keys and values are cut: 48 for a base teacher, 64 for a large one.
    `auto`: the most up to 48 that divide both widths."""
    teacher_layer: Literal["last"] | Annotated[int, Field(ge=1)] = "last"
    """The teacher layer that the student's last layer follows; upper-middle for a large teacher."""
    switch: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the steps in the first stage, the relations alone; then the labels alone."""
    soft_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the soft labels in the second stage; hard labels weigh one minus this."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T of the soft labels; the loss is multiplied by T squared."""


class Relation(Term):
    """``mean KL(R^T || R^S)``, ``R = softmax(X X^T / sqrt(d_r))``, X queries, keys or values.

    Heads are cut anew, so the models need not have equally many.
    """

    same_tokens = True
    mean_over = "tokens"

    def __init__(self, vectors: str, heads: int, layers: tuple[int, int]):
        super().__init__()
        self.vectors = vectors
        self.heads = heads
        self.student_layer, self.teacher_layer = layers
        self.student_needs, self.teacher_needs = (_needs(vectors, i) for i in layers)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss."""
        scores = relation_scores(getattr(student, self.vectors)[self.student_layer], self.heads)
        goals = relation_scores(getattr(teacher, self.vectors)[self.teacher_layer], self.heads)
        return relation_divergence(scores, goals, batch.student.attention_mask)


def _needs(vectors: str, layer: int) -> Needs:
    given: dict[str, Any] = {vectors: frozenset({layer})}
    return Needs(**given)


def build(settings: MiniLMv2Settings, context: Context) -> Plan:
    """Return the three relations up to the switch, then ``(1 - soft_weight) hard + soft_weight soft``.

    Raises:
        WrongInput: If the widths cannot be cut into so many heads, or the teacher has no such layer.
    """
    widths = (context.student_width, context.teacher_width)
    fitting = [n for n in range(1, min(widths) + 1) if not any(width % n for width in widths)]
    heads = settings.relation_heads
    if heads == "auto":
        heads = max(n for n in fitting if n <= 48)
    if heads not in fitting:
        raise WrongInput(
            f"method.relation_heads should divide the student's width, {widths[0]}, and the teacher's, "
            f"{widths[1]}, found {heads}: set it to one of {', '.join(map(str, fitting))}."
        )
    depth = context.teacher_depth
    layer = depth if settings.teacher_layer == "last" else settings.teacher_layer
    if layer > depth:
        raise WrongInput(f"method.teacher_layer should be last or from 1 to {depth}, found {layer}.")
    labels = {"hard": 1 - settings.soft_weight, "soft": settings.soft_weight}
    labels = {name: weight for name, weight in labels.items() if weight > 0}
    terms: dict[str, Term] = {
        "hard": HardLabels(context.kind),
        "soft": SoftLabels(context.kind, settings.temperature),
    }
    terms = {name: terms[name] for name in labels}
    for name, vectors in _RELATIONS.items():
        terms[name] = Relation(vectors, heads, (context.student_depth, layer))
    relations = dict.fromkeys(_RELATIONS, 1.0)
    return Plan(terms, (Stage(0.0, relations), Stage(settings.switch, labels)))


def pretrain(settings: MiniLMv2Settings, context: Context) -> Plan:
    """Return the relations alone, on text without labels: the paper's own use."""
    plan = build(settings, context)
    relations = plan.stages[0]
    return Plan({name: plan.terms[name] for name in relations.weights}, (relations,))


METHOD = Method(
    name="minilmv2",
    title="MiniLMv2",
    paper="Wang et al. 2021, arXiv 2012.15828",
    summary="Relations of queries, keys and values of one teacher layer, then fine-tuning.",
    status="as re-implemented by GLMKD, pre-training as a first stage on the task",
    settings=MiniLMv2Settings,
    build=build,
    terms={
        "query_relation": "brings products of the last layer’s queries to those of a teacher layer",
        "key_relation": "brings products of the last layer’s keys to those of a teacher layer",
        "value_relation": "brings products of the last layer’s values to those of a teacher layer",
        "soft": SOFT,
        "hard": HARD,
    },
    pretrain=pretrain,
)
