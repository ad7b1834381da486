"""Angular EMD: COS-NCE of LRC-BERT as the ground cost of BERT-EMD's transport between layers.

A mixture of this project, of no paper: Fu et al. 2021, arXiv 2012.07335, gives the loss of a pair of
layers, the stages and the perturbation; Li et al. 2020, arXiv 2010.06133, which student layer learns
from which teacher layer.

Shapes: L student layers, M teacher layers, B rows, G rows of all processes (B in one process), S tokens,
D student width, E teacher width.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillroom.data.batching import Batch
from stillroom.encoder import Needs, Outputs
from stillroom.errors import WrongInput
from stillroom.methods.base import Context, Method, Perturbation, Plan, Stage, Term
from stillroom.methods.prediction import HARD, SOFT, HardLabels, SoftLabels
from stillroom.ops.cos_nce import cos_nce_of_cosines, other_rows, unit_tokens
from stillroom.ops.projection import project, start_unturned
from stillroom.ops.transport import LayerMasses, MassRule, MassUpdate
from stillroom.recipe import Settings


class AngularEMDSettings(Settings):
    """Options of `angular-emd`. Defaults are those of `lrc-bert` and `bert-emd`."""

    alpha: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the transport cost, in both stages."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the soft labels, in the second stage."""
    gamma: Annotated[float, Field(ge=0)] = 3.0
    """Weight of the hard labels, in the second stage."""
    temperature: Annotated[float, Field(gt=0)] = 1.1
    """t of the soft labels; the loss is multiplied by t squared."""
    switch: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of the steps in the first stage, the transport alone. 0 trains in one stage."""
    mass_rule: MassRule = "B"
    """Masses from costs: one softmax (`A1`), two (`A2`), or division (`B`)."""
    mass_temperature: Annotated[float, Field(gt=0)] = 1.0
    """T_emd, used by `A1` and `A2` only."""
    update_masses: bool = True
    """Whether the masses learn; off, every layer keeps the same mass."""
    floor: Annotated[float, Field(gt=0, lt=1)] = 1e-12
    """Least unit cost and least mass, as a share of the largest. The log says when it acts."""
    perturbation: Literal["both", "second", "off"] = "both"
    """Stages in which the step is taken on perturbed embeddings."""
    epsilon: Annotated[float, Field(gt=0)] = 1.0
    """Length of the perturbation."""
    perturbation_norm: Literal["token", "tensor"] = "tensor"
    """Whether each token's gradient, or the whole tensor's, is scaled to epsilon."""


def cos_nce_costs(
    student_LBSE: Tensor,
    teacher_MGSE: Tensor,
    mask_BS: Tensor,
    mask_GS: Tensor | None = None,
    *,
    first: int = 0,
) -> Tensor:
    """Return COS-NCE of every pair of layers, averaged over the batch, from one matrix product.

    ``D_ij = mean_a [2 - 1.5 c_aa + 0.5 mean_{b != a} c_ab]``, where ``c_ab`` is the mean cosine of row
    a in student layer i and row b in teacher layer j over the positions that are real in both.

    Args:
        student_LBSE: Student states in the teacher's width; gradients flow here.
        teacher_MGSE: Teacher states; detached.
        mask_BS: 1 on real tokens.
        mask_GS: The same of the teacher's rows, where they are more than the student's.
        first: Where the student's rows start among the teacher's.

    Returns:
        Shape ``(L, M)``, unitless, in [0, 4].

    Example:
        >>> states = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> cos_nce_costs(states[None], torch.stack([states, states.flip(0)]), torch.ones(2, 1)).tolist()
        [[0.5, 2.5]]
    """
    (L, B), (M, G) = student_LBSE.shape[:2], teacher_MGSE.shape[:2]
    mask_GS = mask_BS if mask_GS is None else mask_GS
    u, v = unit_tokens(student_LBSE, mask_BS), unit_tokens(teacher_MGSE.detach(), mask_GS)
    dots = u.flatten(2).flatten(0, 1) @ v.flatten(2).flatten(0, 1).T
    shared_BG = mask_BS.to(dots.dtype) @ mask_GS.to(dots.dtype).T
    cosine_LMBG = dots.view(L, B, M, G).transpose(1, 2) / shared_BG
    return cos_nce_of_cosines(cosine_LMBG, other_rows(shared_BG, first), first).mean(-1)


class AngularTransport(Term):
    """``L sum_ij F_ij D_ij`` over all layers, the flow solved anew for each batch.

    Masses sum to 1, so the factor L makes it LRC-BERT's sum over layers where each student layer
    learns from one teacher layer. Only D carries gradient.
    """

    same_tokens = True
    least_rows = 2

    def __init__(self, settings: AngularEMDSettings, context: Context):
        super().__init__()
        L, M = context.student_depth, context.teacher_depth
        self.student_needs = Needs(hidden_states=frozenset(range(1, L + 1)))
        self.teacher_needs = Needs(hidden_states=frozenset(range(1, M + 1)))
        projection = torch.empty(L, context.student_width, context.teacher_width)
        for matrix in projection:
            start_unturned(matrix, context.basis)
        self.projection = nn.Parameter(projection)
        update = MassUpdate(settings.mass_rule, settings.mass_temperature, settings.floor, coupled=False)
        self.masses = LayerMasses(("hidden_states",), L, M, update if settings.update_masses else None)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss; raises `ValueError` for a batch of one row, which has no negatives."""
        mask_BS, share = batch.student.attention_mask, batch.share
        if batch.rows < 2:
            raise ValueError("COS-NCE needs at least two rows in a batch, found one")
        states, goals = (
            torch.stack([outputs.hidden_states[i] for i in sorted(needs.hidden_states)])
            for outputs, needs in ((student, self.student_needs), (teacher, self.teacher_needs))
        )
        states = project(states.flatten(1, 2), self.projection, bf16=self.bf16)
        states = states.view(len(states), *mask_BS.shape, -1)
        goals, mask_GS = share.gather(goals, 1), share.gather(mask_BS)
        cost_LM = cos_nce_costs(states, goals, mask_BS, mask_GS, first=share.start)
        # One problem for all processes: its costs are means over the whole batch.
        whole = cost_LM if share.whole else share.total(share.of("rows") * cost_LM)
        flow_LM = self.masses.flows(whole[None], keep=not batch.augmented)[0]
        return len(states) * (flow_LM * cost_LM).sum()

    def after_step(self) -> None:
        """Give each layer its new mass."""
        self.masses.advance()

    def record(self) -> dict[str, Any]:
        """Return `ops.transport.LayerMasses.record` of `hidden_states`."""
        return self.masses.record()


def build(settings: AngularEMDSettings, context: Context) -> Plan:
    """Return the transport alone up to the switch, then soft and hard labels too; perturbed as set.

    Raises:
        WrongInput: If no stage would train the classification head.
    """
    labels = {"soft": settings.beta, "hard": settings.gamma}
    labels = {name: weight for name, weight in labels.items() if weight > 0}
    if not labels or settings.switch == 1:
        raise WrongInput(
            "The classification head would never be trained: set method.beta or method.gamma above 0 "
            "and method.switch below 1."
        )
    terms: dict[str, Term] = {"layers": AngularTransport(settings, context)}
    if "soft" in labels:
        terms["soft"] = SoftLabels(context.kind, settings.temperature)
    if "hard" in labels:
        terms["hard"] = HardLabels(context.kind)
    alone = {"layers": settings.alpha}
    stages = [Stage(settings.switch, alone | labels, perturb=settings.perturbation != "off")]
    if settings.switch > 0:
        stages.insert(0, Stage(0.0, alone, perturb=settings.perturbation == "both"))
    perturbation = Perturbation(settings.epsilon, settings.perturbation_norm)
    return Plan(terms, tuple(stages), perturbation)


METHOD = Method(
    name="angular-emd",
    title="Angular EMD",
    paper="",
    summary="Experimental: LRC-BERT's angular loss, with teacher layers found by optimal transport.",
    status="experimental",
    settings=AngularEMDSettings,
    build=build,
    terms={
        "layers": "turns the student’s states to those of teacher layers, matched at the least cost (EMD)",
        "soft": SOFT,
        "hard": HARD,
    },
    training={"epochs": 18, "batch_size": 16},
)
