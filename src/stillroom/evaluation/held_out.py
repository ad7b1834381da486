"""How far a student follows its teacher on held-out text: terms, perplexity, and the match of layers."""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from stillroom.data.batching import Batch
from stillroom.encoder import Encoder, Needs
from stillroom.methods.base import Plan
from stillroom.teacher.live import LiveTeacher
from stillroom.training.distiller import Distiller

_TOKENS = 4096
"""Most tokens on which layers are compared."""


def linear_cka(x_nD: Tensor, y_nE: Tensor) -> float:
    """Return the linear CKA of two sets of states of the same tokens, in [0, 1].

    ``|X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F)`` of centred X and Y: Kornblith et al. (2019), arXiv 1905.00414,
    eq. 3. It needs no projection between widths, and rotation and scale change nothing.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
        >>> round(linear_cka(x, 5 * x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])), 6)
        1.0
    """
    x, y = (states.double() - states.double().mean(0) for states in (x_nD, y_nE))
    both = (x.mT @ y).square().sum()
    alone = torch.linalg.norm(x.mT @ x) * torch.linalg.norm(y.mT @ y)
    return float(both / alone) if alone > 0 else 0.0


@torch.no_grad()
def follow(
    student: Encoder,
    teacher: LiveTeacher,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    bf16: bool,
    masked_lm: bool,
) -> dict[str, float]:
    """Return `loss`, each term unweighted, `perplexity` of hidden words, and `match_i` of student layer i.

    `match_i` is the linear CKA with the teacher's layer at the same share of the depth, rounded up; 0 is
    the embedding output.

    Args:
        student: Evaluated without dropout.
        teacher: The same.
        plan: Its last stage counts, without perturbation.
        batches: Held-out sequences, as they are compared.
        bf16: Whether to compute in bf16.
        masked_lm: Whether the term `hard` is the loss of a masked LM.
    """
    stage = replace(plan.stages[-1], perturb=False)
    distiller = Distiller(student, plan, bf16=bf16).to(next(student.parameters()).device).eval()
    totals: dict[str, Tensor] = {}
    count = 0
    matches: dict[str, float] = {}
    for batch in batches:
        if not matches:
            matches = _matches(student, teacher, batch, bf16=bf16)
        loss = distiller(batch, teacher(batch, plan.teacher_needs(stage)), stage)
        for name, value in {"loss": loss.total, **loss.terms}.items():
            totals[name] = totals.get(name, 0.0) + value.double() * len(batch.labels)
        count += len(batch.labels)
    found = {name: float(value) / count for name, value in totals.items()}
    if masked_lm and "hard" in found:
        # Beyond e^700 there is no number for it.
        found["perplexity"] = math.exp(min(found["hard"], 700.0))
    return found | matches


def _matches(student: Encoder, teacher: LiveTeacher, batch: Batch, *, bf16: bool) -> dict[str, float]:
    depth, other = student.depth, teacher.encoder.depth
    theirs = [-(-i * other // depth) for i in range(depth + 1)]
    rows = max(1, _TOKENS // batch.student.input_ids.shape[1])
    inputs = replace(
        batch.student,
        input_ids=batch.student.input_ids[:rows],
        attention_mask=batch.student.attention_mask[:rows],
        positions=None if batch.student.positions is None else batch.student.positions[:1],
    )
    part = replace(batch, student=inputs, teacher=inputs)
    with torch.autocast(batch.row_ids.device.type, torch.bfloat16, enabled=bf16):
        mine = student(inputs, Needs(hidden_states=frozenset(range(depth + 1)))).hidden_states
    goals = teacher(part, Needs(hidden_states=frozenset(theirs))).hidden_states
    mask = inputs.attention_mask.bool()
    return {f"match_{i}": linear_cka(mine[i][mask], goals[j][mask]) for i, j in enumerate(theirs)}
