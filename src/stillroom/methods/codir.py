"""CoDIR: contrast of pooled intermediate states against a memory bank, beside soft and hard labels.

Sun et al.: "Contrastive Distillation on Intermediate Representations for Language Model
Compression", EMNLP 2020, arXiv 2009.14167. The loss as described in third-party summaries of the
paper; `nce_official` as released in intersun/CoDIR. `docs/methods/codir.md` says where they differ.

Shapes: B batch, K negatives, N training rows, L student and M teacher layers, d size of the space
in which they are compared.
"""

import math
from typing import Annotated, Literal

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
from stillroom.ops.info_nce import info_nce
from stillroom.processes import Share
from stillroom.recipe import Settings

_EPS_OFFICIAL = 1e-7


class CoDIRSettings(Settings):
    """Options of `codir`. Defaults are the paper's where summaries tell them, else the official code's."""

    alpha1: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the soft labels, beside 1 for the hard ones; the official beta of 0.5."""
    alpha2: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the contrastive term. No source tells one: tune it, tiny values included."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T of the soft labels; the loss is multiplied by T squared."""
    pooling: Pooling = "mean"
    """Mean over real tokens, `cls` (official), or `unmasked_mean`, which counts padding."""
    teacher_layers: Literal["all", "every_other"] = "all"
    """All of the teacher's layers, or 1, 3, 5, ... (official: the last one is never used)."""
    loss: Literal["infonce", "nce_official"] = "infonce"
    """InfoNCE with the newest positive, or the official NCE: positive from the bank, both directions."""
    direction: Literal["student_anchor", "teacher_anchor", "symmetric"] = "student_anchor"
    """Whose vector is the anchor with `infonce`; the candidates are the other's."""
    dimension: Annotated[int, Field(ge=1)] = 128
    """d, the size of the space in which student and teacher are compared."""
    tau: Annotated[float, Field(gt=0)] = 0.07
    """Temperature of the contrastive term."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """How much of a bank's old row is kept when its row is seen."""
    bank_negatives: Annotated[int, Field(ge=1)] = 100
    """K, the rows drawn for each anchor; fewer than there are to draw from."""
    negatives: Literal["different_label", "any"] = "different_label"
    """Rows of another label, or any other rows."""
    regression: Literal["off"] | Annotated[float, Field(ge=0)] = "off"
    """On regression: no contrastive term, or negatives whose score differs by more than this."""


def nce_official(scores_BK: Tensor, Z: Tensor, rows: int) -> Tensor:
    """Return the official NCE loss of one direction, in nats: batch mean, sum over candidates.

    ``P = scores / Z``, ``c = K/N``, then ``-mean_b [log(P_b0 / (P_b0 + c + eps)) +
    sum_k log(c / (P_bk + c + eps))]``, a ``P_b0`` of 0 replaced by 1e-7.

    Args:
        scores_BK: ``exp(cosine / tau)``, shape ``(B, 1 + K)``, positive first; gradients flow here.
        Z: The normaliser, a constant.
        rows: N, rows of the bank.

    Returns:
        Scalar.

    Example:
        >>> loss = nce_official(torch.ones(1, 2), torch.tensor(2.0), rows=2)
        >>> round(loss.item() / math.log(2), 4)
        2.0
    """
    P = scores_BK / Z
    positive_B, negative_BK = P[:, 0], P[:, 1:]
    positive_B = torch.where(positive_B == 0, _EPS_OFFICIAL, positive_B)
    c = negative_BK.shape[1] / rows
    found = (positive_B / (positive_B + c + _EPS_OFFICIAL)).log()
    refused = (c / (negative_BK + c + _EPS_OFFICIAL)).log().sum(1)
    return -(found + refused).mean()


def excluded_blocks(keys: np.ndarray, delta: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each row which stretch of the sorted rows is too close to be its negative.

    Args:
        keys: Labels or scores, shape ``(N,)``.
        delta: Rows whose keys differ by at most this are too close.

    Returns:
        The order that sorts the rows, and each row's stretch in it: start and length, ``(N,)`` each.

    Example:
        >>> order, start, length = excluded_blocks(np.array([1, 0, 1]))
        >>> order.tolist(), start.tolist(), length.tolist()
        ([1, 0, 2], [1, 0, 1], [2, 1, 2])
    """
    order = np.argsort(keys, kind="stable")
    start = np.searchsorted(keys[order], keys - delta, "left")
    return order, start, np.searchsorted(keys[order], keys + delta, "right") - start


def draws_needed(count: int, pool: int) -> int:
    """Return how many draws hold `count` different ones of `pool`, but for a chance below 1e-9.

    Mean, eight standard deviations and the tail of the slowest wait of collecting coupons.

    Args:
        count: How many different ones are wanted, at most `pool`.
        pool: How many there are, drawn uniformly with replacement.

    Example:
        >>> draws_needed(100, 100_000), draws_needed(100, 101)
        (127, 2309)
    """
    seen = np.arange(count)
    mean = float((pool / (pool - seen)).sum())
    deviation = math.sqrt((seen * pool / (pool - seen) ** 2).sum())
    return math.ceil(mean + 8 * deviation + 25 * pool / (pool - count + 1))


def draw_outside(start_B: Tensor, length_B: Tensor, rows: int, count: int, draws: int) -> Tensor:
    """Return `count` different positions of ``[0, rows)`` outside each row's stretch, uniformly.

    The first `count` different ones of `draws` draws: a draw in ``[0, rows - length)`` that is not
    below the stretch moves past it. Nothing waits for the device.

    Returns:
        Shape ``(B, count)``, int64.

    Raises:
        ValueError: If fewer draws than positions are asked for.

    Example:
        >>> draw_outside(torch.tensor([1]), torch.tensor([2]), 4, 2, 60).sort().values.tolist()
        [[0, 3]]
    """
    if draws < count:
        raise ValueError(f"expected at least {count} draws, found {draws}")
    device = start_B.device
    drawn = torch.randint(2**62, (len(start_B), draws), device=device) % (rows - length_B)[:, None]
    sorted_, place = drawn.sort(dim=1, stable=True)
    again = F.pad(sorted_[:, 1:] == sorted_[:, :-1], (1, 0))
    repeated = torch.zeros_like(again).scatter(1, place, again)
    first = repeated.to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    chosen = drawn.gather(1, first)
    return torch.where(chosen < start_B[:, None], chosen, chosen + length_B[:, None])


class PooledContrast(Term):
    """The contrastive term: one vector per row and model, told apart from those of other rows."""

    order: Tensor
    start: Tensor
    length: Tensor
    teacher_bank: Tensor
    student_bank: Tensor
    normalisers: Tensor

    def __init__(
        self, settings: CoDIRSettings, context: Context, blocks: tuple[np.ndarray, np.ndarray, np.ndarray]
    ):
        super().__init__()
        self.settings = settings
        step = 2 if settings.teacher_layers == "every_other" else 1
        self.student_layers = tuple(range(1, context.student_depth + 1))
        self.teacher_layers = tuple(range(1, context.teacher_depth + 1, step))
        self.student_needs, self.teacher_needs = (
            Needs(
                pooled_states=frozenset((settings.pooling, layer) for layer in layers),
                padding=settings.pooling == "unmasked_mean",
            )
            for layers in (self.student_layers, self.teacher_layers)
        )
        d = settings.dimension
        self.student_projection = nn.Linear(len(self.student_layers) * context.student_width, d)
        self.teacher_projection = nn.Linear(len(self.teacher_layers) * context.teacher_width, d)
        self.rows = len(blocks[0])
        for name, block in zip(("order", "start", "length"), blocks, strict=True):
            # They follow from the data, so a checkpoint need not hold them.
            self.register_buffer(name, torch.from_numpy(block.astype(np.int64)), persistent=False)
        self.draws = draws_needed(settings.bank_negatives, self.rows - int(blocks[2].max()))
        official = settings.loss == "nce_official"
        self.student_anchor = official or settings.direction != "teacher_anchor"
        self.teacher_anchor = official or settings.direction != "student_anchor"
        # Uniform with an expected squared norm of 1.
        a = math.sqrt(3 / d)
        if self.student_anchor:
            self.register_buffer("teacher_bank", torch.empty(self.rows, d).uniform_(-a, a))
        if self.teacher_anchor:
            self.register_buffer("student_bank", torch.empty(self.rows, d).uniform_(-a, a))
        if official:
            # Of both directions; 0 until the first batch sets them for good.
            self.register_buffer("normalisers", torch.zeros(2))
        self._pending: list[tuple[Batch, Tensor, Tensor]] = []

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss, averaged over the batch and, where there are two, over the directions.

        In training the batch's vectors are kept until `after_step` moves them into the banks.
        """
        s = self._vector(student, self.student_layers, self.student_projection)
        t = self._vector(teacher, self.teacher_layers, self.teacher_projection)
        # Every process draws for all rows, as one alone would, and takes its own.
        drawn = self.draw(batch.share.gather(batch.row_ids))
        negatives_BK = drawn.narrow(0, batch.share.start, len(batch.row_ids))
        if self.training and not batch.augmented:
            if self._pending and self._pending[-1][0] is batch:
                # The second pass of a perturbed step: one step moves a row once.
                self._pending.pop()
            self._pending.append((batch, s.detach(), t.detach()))
        if self.settings.loss == "nce_official":
            index_BK = torch.cat([batch.row_ids[:, None], negatives_BK], dim=1)
            return self._official(s, t, index_BK, batch.share)
        directions = []
        if self.student_anchor:
            directions.append(
                info_nce(s, t, self.teacher_bank[negatives_BK], temperature=self.settings.tau)
            )
        if self.teacher_anchor:
            directions.append(
                info_nce(t, s, self.student_bank[negatives_BK], temperature=self.settings.tau)
            )
        return torch.stack(directions).mean()

    def draw(self, row_ids: Tensor) -> Tensor:
        """Return K different rows for each of `row_ids` that may be its negatives, ``(B, K)``."""
        start, length = self.start[row_ids], self.length[row_ids]
        drawn = draw_outside(start, length, self.rows, self.settings.bank_negatives, self.draws)
        return self.order[drawn]

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the rows of this step's batches: ``M[y] <- normalize(m M[y] + (1 - m) z)``.

        Every process moves the rows of all, so that all banks are one.
        """
        m = self.settings.momentum
        for batch, *vectors in self._pending:
            rows, s, t = (batch.share.gather(x) for x in (batch.row_ids, *vectors))
            if self.student_anchor:
                self.teacher_bank[rows] = _unit(m * self.teacher_bank[rows] + (1 - m) * t)
            if self.teacher_anchor:
                self.student_bank[rows] = _unit(m * self.student_bank[rows] + (1 - m) * s)
        self._pending.clear()

    def _vector(self, outputs: Outputs, layers: tuple[int, ...], projection: nn.Linear) -> Tensor:
        """Return ``normalize(W concat_l(pooled state of layer l) + b)``, shape ``(B, d)``."""
        return _unit(projection(outputs.joined(self.settings.pooling, layers)))

    def _official(self, s: Tensor, t: Tensor, index_BK: Tensor, share: Share) -> Tensor:
        losses = []
        for i, (anchor, bank) in enumerate(((s, self.teacher_bank), (t, self.student_bank))):
            scores = (torch.einsum("bd,bkd->bk", anchor, bank[index_BK]) / self.settings.tau).exp()
            Z = self.normalisers[i]
            mean = share.total(scores.detach().mean() * share.of("rows"))
            Z = torch.where(Z > 0, Z, self.rows * mean)
            if self.training:
                with torch.no_grad():
                    self.normalisers[i] = Z
            losses.append(nce_official(scores, Z, self.rows))
        return torch.stack(losses).mean()


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1)


def build(settings: CoDIRSettings, context: Context) -> Plan:
    """Return one stage: ``hard + alpha1 soft + alpha2 contrast``.

    Raises:
        WrongInput: If there are too few rows to draw negatives from, or the labels have no classes.
    """
    weights = {"hard": 1.0, "soft": settings.alpha1, "contrast": settings.alpha2}
    if context.kind == "regression" and settings.regression == "off":
        weights["contrast"] = 0.0
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    terms: dict[str, Term] = {"hard": HardLabels(context.kind)}
    if "soft" in weights:
        terms["soft"] = SoftLabels(context.kind, settings.temperature)
    if "contrast" in weights:
        terms["contrast"] = PooledContrast(settings, context, _blocks(settings, context))
    return Plan(terms, (Stage(0.0, weights),))


def _blocks(settings: CoDIRSettings, context: Context) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `excluded_blocks` of the training rows, or raise `WrongInput` if they leave too few."""
    delta = 0.0
    if isinstance(settings.regression, float) and context.kind == "regression":
        delta, remedy = settings.regression, "Lower method.bank_negatives or method.regression"
    elif settings.negatives == "any":
        remedy = "Lower method.bank_negatives"
    elif context.kind == "multi-label":
        raise WrongInput(
            "method.negatives: different_label compares classes, and the task is multi-label: set it to "
            "any."
        )
    else:
        remedy = "Lower method.bank_negatives or set method.negatives=any"
    if context.labels is None:
        raise ValueError("codir draws rows by their labels: the context needs the training labels")
    by_row = settings.negatives == "any" and context.kind != "regression"
    keys = np.arange(context.rows) if by_row else context.labels
    blocks = excluded_blocks(keys, delta)
    K, worst = settings.bank_negatives, int(blocks[2].argmax())
    pool = context.rows - int(blocks[2][worst])
    if pool <= K:
        which = "each row" if by_row else f"a row of label {context.labels[worst]:g}"
        raise WrongInput(
            f"method.bank_negatives draws {K} negatives, and {which} has only {pool} of {context.rows} "
            f"training rows to draw from; there must be more than are drawn. {remedy}."
        )
    return blocks


class InBatchContrast(Term):
    """The contrastive term without labels: a row's vector told from those of the batch's other rows."""

    least_rows = 2

    def __init__(self, settings: CoDIRSettings, context: Context):
        super().__init__()
        self.settings = settings
        step = 2 if settings.teacher_layers == "every_other" else 1
        self.student_layers = tuple(range(1, context.student_depth + 1))
        self.teacher_layers = tuple(range(1, context.teacher_depth + 1, step))
        self.student_needs, self.teacher_needs = (
            Needs(pooled_states=frozenset((settings.pooling, layer) for layer in layers))
            for layers in (self.student_layers, self.teacher_layers)
        )
        d = settings.dimension
        self.student_projection = nn.Linear(len(self.student_layers) * context.student_width, d)
        self.teacher_projection = nn.Linear(len(self.teacher_layers) * context.teacher_width, d)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return InfoNCE averaged over the batch and, where there are two, over the directions."""
        s = self._vector(student, self.student_layers, self.student_projection)
        t = self._vector(teacher, self.teacher_layers, self.teacher_projection)
        way = self.settings.direction
        directions = []
        if way != "teacher_anchor":
            directions.append(self._contrast(s, t, batch.share))
        if way != "student_anchor":
            directions.append(self._contrast(t, s, batch.share))
        return torch.stack(directions).mean()

    def _contrast(self, anchor: Tensor, other: Tensor, share: Share) -> Tensor:
        # Row b's candidates are all processes' rows, its own the positive; the others get no gradient.
        everyone = share.gather(other.detach())
        place = share.start + torch.arange(len(anchor), device=anchor.device)
        own = place[:, None] == torch.arange(len(everyone), device=anchor.device)
        positive = anchor @ other.mT if share.whole else (anchor * other).sum(-1, keepdim=True)
        scores = torch.where(own, positive, anchor @ everyone.mT) / self.settings.tau
        return F.cross_entropy(scores, place)

    def _vector(self, outputs: Outputs, layers: tuple[int, ...], projection: nn.Linear) -> Tensor:
        """Return ``normalize(W concat_l(pooled state of layer l) + b)``, shape ``(B, d)``."""
        return _unit(projection(outputs.joined(self.settings.pooling, layers)))


def pretrain(settings: CoDIRSettings, context: Context) -> Plan:
    """Return ``hard + alpha1 soft + alpha2 contrast`` of a masked LM, negatives from the batch.

    Raises:
        WrongInput: If an option is of the memory bank or of labels.
    """
    if settings.loss != "infonce":
        raise WrongInput(
            "Pre-training contrasts the rows of a batch, without a memory bank: set method.loss=infonce."
        )
    weights = {"hard": 1.0, "soft": settings.alpha1, "contrast": settings.alpha2}
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    terms: dict[str, Term] = {
        "hard": HardLabels("classification"),
        "soft": SoftLabels("classification", settings.temperature),
        "contrast": InBatchContrast(settings, context),
    }
    return Plan({name: terms[name] for name in weights}, (Stage(0.0, weights),))


METHOD = Method(
    name="codir",
    title="CoDIR",
    paper="Sun et al. 2020, arXiv 2009.14167",
    summary="Contrast of pooled states of all layers against a memory bank of rows of another label.",
    status="loss as described in third-party summaries; official mode as released in intersun/CoDIR",
    settings=CoDIRSettings,
    build=build,
    terms={
        "contrast": "turns one vector of each row to the teacher’s of it, away from those of other rows",
        "soft": SOFT,
        "hard": HARD,
    },
    pretrain=pretrain,
    masked_lm=True,
    training={"epochs": 10, "warmup": 0.06, "weight_decay": 0.1},
)
