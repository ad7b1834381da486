"""BERT-EMD: every student layer may learn from every teacher layer, by optimal transport.

Li et al.: "BERT-EMD: Many-to-Many Layer Mapping for BERT Compression with Earth Mover's Distance",
EMNLP 2020, arXiv 2010.06133. Equations as the authors' code; `docs/methods/bert-emd.md` says which
revision, and what could not be checked against the paper.

Shapes: L student layers, M teacher layers, B batch, H heads, S tokens, D student width, E teacher
width, C classes.
"""

import math
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
from stillroom.ops.prediction import soft_cross_entropy
from stillroom.ops.projection import project, start_unturned
from stillroom.ops.transport import (
    LayerMasses,
    MassRule,
    MassUpdate,
    squared_distances,
    transport_cost,
)
from stillroom.recipe import Settings


class BertEMDSettings(Settings):
    """Options of `bert-emd`. Defaults are those of the authors' code of today."""

    beta: Annotated[float, Field(gt=0)] = 0.01
    """Weight of all intermediate losses: the two transport costs and the embedding loss."""
    theta: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the two transport costs against the embedding loss."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Weight of the soft labels; hard labels weigh one minus this, so by default nothing."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T of the soft labels; the loss is multiplied by T squared."""
    reduction: Literal["official", "per_sample"] = "official"
    """Whether the soft loss is averaged over rows and classes, or over rows only."""
    mass_rule: MassRule = "B"
    """Masses from costs: one softmax (`A1`), two (`A2`, the paper's experiments), or division (`B`)."""
    mass_temperature: Annotated[float, Field(gt=0)] = 1.0
    """T_emd, used by `A1` and `A2` only."""
    coupling: Literal["coupled", "separate"] = "coupled"
    """Whether both problems share the mean of their new masses, or each keeps its own."""
    update_masses: bool = True
    """Whether the masses learn; off, every layer keeps the same mass."""
    floor: Annotated[float, Field(gt=0, lt=1)] = 1e-12
    """Least unit cost and least mass, as a share of the largest. The log says when it acts."""
    padding: Literal["all", "masked"] = "all"
    """Whether padding counts in the distances, as in the authors' code, or real tokens only."""


class LayerTransport(Term):
    """``theta (sum F^A D^A + sum F^H D^H) + L_emb``, flows solved anew for each batch.

    ``D^A_ij`` is the mean squared difference of visible attention scores, ``D^H_ij`` of hidden states
    after one linear map with bias, which the embeddings share. Means are over all elements, or over
    those of real tokens. Only D carries gradient; F and the masses are constants.
    """

    same_tokens = True
    same_heads = True
    mean_over = "nothing"

    def __init__(self, settings: BertEMDSettings, context: Context):
        super().__init__()
        L, M = context.student_depth, context.teacher_depth
        self.theta, self.masked = settings.theta, settings.padding == "masked"
        padding = Needs(padding=not self.masked)
        self.student_needs, self.teacher_needs = _every_layer(L) | padding, _every_layer(M) | padding
        self.projection = nn.Linear(context.student_width, context.teacher_width)
        nn.init.zeros_(self.projection.bias)
        start_unturned(self.projection.weight, context.basis)
        update = MassUpdate(
            settings.mass_rule,
            settings.mass_temperature,
            settings.floor,
            settings.coupling == "coupled",
        )
        problems = ("attention", "hidden_states")
        self.masses = LayerMasses(problems, L, M, update if settings.update_masses else None)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss; the flows, and the masses that will follow, are kept for `after_step`."""
        scores = visible(_stack(student.attention_scores))
        score_goals = visible(_stack(teacher.attention_scores)).detach()
        states = _stack(student.hidden_states)
        states = project(states, self.projection.weight.T, bf16=self.bf16) + self.projection.bias
        goals = _stack(teacher.hidden_states).detach()
        score_count: Tensor | float = scores[0].numel()
        state_count: Tensor | float = goals[0].numel()
        if self.masked:
            mask_BS = batch.student.attention_mask.to(goals.dtype)
            token = mask_BS[..., None]
            pair = (mask_BS[:, :, None] * mask_BS[:, None])[:, None]
            scores, score_goals = scores * pair, score_goals * pair
            states, goals = states * token, goals * token
            score_count, state_count = scores.shape[2] * pair.sum(), goals.shape[-1] * token.sum()
        share = batch.share
        if not share.whole:
            # Costs are means over all processes' rows, so this one's are its part of them.
            score_count = _whole(score_count, share.of("token pairs" if self.masked else "rows"))
            state_count = _whole(state_count, share.of("tokens" if self.masked else "rows"))
        embedding = (states[0] - goals[0]).square().sum() / state_count
        states, goals = states[1:], goals[1:]
        score_squares = squared_distances(scores, score_goals)
        state_squares = squared_distances(states, goals)
        costs = torch.stack([score_squares / score_count, state_squares / state_count])
        flow = self.masses.flows(share.total(costs), keep=not batch.augmented)
        attention = transport_cost(scores, score_goals, flow[0], score_squares) / score_count
        hidden = transport_cost(states, goals, flow[1], state_squares) / state_count
        loss: Tensor = self.theta * (attention + hidden) + embedding
        return loss

    def after_step(self) -> None:
        """Give each layer its new mass."""
        self.masses.advance()

    def record(self) -> dict[str, Any]:
        """Return `ops.transport.LayerMasses.record` of `attention` and `hidden_states`."""
        return self.masses.record()


def _whole(count: Tensor | float, part: float) -> Tensor | float:
    """Return the count of which `count` is this part; infinite where it is none, so that it adds 0."""
    return count / part if part else math.inf


def _every_layer(depth: int) -> Needs:
    blocks = frozenset(range(1, depth + 1))
    return Needs(hidden_states=blocks | {0}, attention_scores=blocks)


def _stack(layers: Any) -> Tensor:
    return torch.stack([layers[i] for i in sorted(layers)])


class SoftCrossEntropy(Term):
    """The soft labels' cross-entropy: `ops.prediction.soft_cross_entropy`."""

    student_needs = Needs(logits=True)
    teacher_needs = Needs(logits=True)

    def __init__(self, kind: Kind, settings: BertEMDSettings):
        super().__init__()
        self.kind = kind
        self.temperature = settings.temperature
        self.over_classes = settings.reduction == "official"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss of the student's logits against the teacher's."""
        return soft_cross_entropy(
            student.logits,
            teacher.logits,
            temperature=self.temperature,
            kind=self.kind,
            mean_over_classes=self.over_classes,
        )


def build(settings: BertEMDSettings, context: Context) -> Plan:
    """Return one stage: ``beta (theta (L_att + L_hid) + L_emb) + alpha L_kd + (1 - alpha) L_hard``."""
    # In this order the losses on the logits are under way when the transport waits for the host.
    terms: dict[str, tuple[float, Term]] = {
        "soft": (settings.alpha, SoftCrossEntropy(context.kind, settings)),
        "hard": (1 - settings.alpha, HardLabels(context.kind)),
        "layers": (settings.beta, LayerTransport(settings, context)),
    }
    used = {name: pair for name, pair in terms.items() if pair[0] > 0}
    weights = {name: weight for name, (weight, _) in used.items()}
    return Plan({name: term for name, (_, term) in used.items()}, (Stage(0.0, weights),))


METHOD = Method(
    name="bert-emd",
    title="BERT-EMD",
    paper="Li et al. 2020, arXiv 2010.06133",
    summary="Every student layer learns from every teacher layer, by an exact optimal transport a step.",
    status="as the authors' code",
    settings=BertEMDSettings,
    build=build,
    terms={
        "layers": "brings attention and states to those of teacher layers, matched at the least cost (EMD)",
        "soft": SOFT,
        "hard": HARD,
    },
    training={"epochs": 10, "batch_size": 32, "learning_rate": 3e-5},
)
