"""COS-NCE: the angular contrastive loss of LRC-BERT, with teacher rows as positives and negatives.

Fu et al. 2021, arXiv 2012.07335, as re-implemented by GLMKD and BERT-gang;
`docs/methods/lrc-bert.md` says what could not be checked against the paper.

Shapes: L layers, B anchors, G teacher rows that are compared with each, S tokens, E teacher width, K
negatives. G is B, but where several processes share a batch: then each has its own anchors, and the
teacher's rows of all, among which its own start at `first`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return ``g(x, y) = 1 - x.y / (|x| |y|)``, formula (2), in [0, 2]; norms clamped at 1e-12.

    Args:
        x: Vectors along the last axis; gradients flow here.
        y: The same, of a shape that broadcasts with that of `x`; gradients flow here too.

    Returns:
        The shape of both without the last axis.

    Example:
        >>> others = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
        >>> angular_distance(torch.tensor([1.0, 0.0]), others).tolist()
        [0.0, 1.0, 2.0]
    """
    return 1 - (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1)


def cos_nce(student_BE: Tensor, teacher_BE: Tensor, negatives_BKE: Tensor) -> Tensor:
    """Return COS-NCE of each anchor, formula (1), in [0, 4].

    ``sum_i [2 - (g(n_i, s) - g(t, s))] / (2K) + g(t, s)``. The student is the anchor; the teacher's
    vector of the same row is the positive, its vectors of other rows are the negatives.

    Args:
        student_BE: Anchors, shape ``(B, E)``; gradients flow here.
        teacher_BE: Positives, shape ``(B, E)``; detached.
        negatives_BKE: Negatives of each anchor, shape ``(B, K, E)``; detached.

    Returns:
        Shape ``(B,)``, unitless.

    Raises:
        ValueError: If there are no negatives.

    Example:
        >>> s, t, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0]]])
        >>> cos_nce(s, t, n).tolist()
        [0.5]
    """
    K = negatives_BKE.shape[1]
    if K == 0:
        raise ValueError("COS-NCE needs at least one negative for each anchor, found none")
    positive_B = angular_distance(teacher_BE.detach(), student_BE)
    negative_BK = angular_distance(negatives_BKE.detach(), student_BE[:, None])
    return (2 - (negative_BK - positive_B[:, None])).sum(1) / (2 * K) + positive_B


def cos_nce_of_cosines(cosine_LBG: Tensor, negative_BG: Tensor, first: int = 0) -> Tensor:
    """Return COS-NCE of each anchor from all cosines: ``2 - 1.5 c_aa + 0.5 mean_b c_ab``.

    The closed form of formula (1). An anchor without any negative keeps its positive part, as if its
    negatives were orthogonal to it.

    Args:
        cosine_LBG: Cosine of anchor a and teacher row b, axes before them are kept; gradients flow here.
        negative_BG: 1 where row b is a negative of anchor a, else 0.
        first: Which column is the first anchor's own row.

    Returns:
        Shape ``(L, B)``.

    Example:
        >>> cosines = torch.tensor([[[1.0, 0.0], [1.0, -1.0]]])
        >>> cos_nce_of_cosines(cosines, torch.tensor([[0.0, 1.0], [1.0, 0.0]])).tolist()
        [[0.5, 4.0]]
    """
    positive_LB = cosine_LBG.diagonal(first, dim1=-2, dim2=-1)
    count_B = negative_BG.sum(-1).clamp(min=1)
    negative_LB = (cosine_LBG * negative_BG).sum(-1) / count_B
    return 2 - 1.5 * positive_LB + 0.5 * negative_LB


def other_rows(like_BG: Tensor, first: int = 0) -> Tensor:
    """Return 1 for every row but the anchor's own, in the shape, dtype and place of `like_BG`.

    Example:
        >>> other_rows(torch.zeros(1, 3), first=1).tolist()
        [[1.0, 0.0, 1.0]]
    """
    others_BG = torch.ones_like(like_BG)
    others_BG.diagonal(first).zero_()
    return others_BG


def pooled_cos_nce(student_LBE: Tensor, teacher_LBE: Tensor, all_LGE: Tensor | None = None) -> Tensor:
    """Return COS-NCE of each anchor, all other rows its negatives, in O(B E) through their sum.

    Args:
        student_LBE: One vector per row and layer; gradients flow here.
        teacher_LBE: The same of the teacher; detached.
        all_LGE: The teacher's vectors of all rows, the anchors' among them, where there are more.

    Returns:
        Shape ``(L, B)``; equal to formula (1) to rounding.

    Example:
        >>> student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        >>> teacher = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
        >>> pooled_cos_nce(student, teacher).tolist()
        [[0.5, 2.5]]
    """
    s = F.normalize(student_LBE, dim=-1)
    t = F.normalize(teacher_LBE.detach(), dim=-1)
    everyone = t if all_LGE is None else F.normalize(all_LGE.detach(), dim=-1)
    positive_LB = (s * t).sum(-1)
    all_LB = (s * everyone.sum(1, keepdim=True)).sum(-1)
    return 2 - 1.5 * positive_LB + 0.5 * (all_LB - positive_LB) / (everyone.shape[1] - 1)


def token_cosines(
    student_LBSE: Tensor, teacher_LGSE: Tensor, mask_BS: Tensor, mask_GS: Tensor | None = None
) -> Tensor:
    """Return the mean cosine of tokens at the same position, for every pair of rows.

    ``c_ab = sum_p m_ap m_bp cos(s_ap, t_bp) / sum_p m_ap m_bp``: a position counts where it is a
    real token in both rows. One matrix product over flattened positions, no (B, B, S) tensor.

    Args:
        student_LBSE: Projected student states; gradients flow here.
        teacher_LGSE: Teacher states; detached.
        mask_BS: 1 on real tokens; every row has one at position 0.
        mask_GS: The same of the teacher's rows, where they are not the student's.

    Returns:
        Shape ``(L, B, G)``, anchors in rows, teacher rows in columns.

    Example:
        >>> student = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [9.0, 9.0]]]])
        >>> teacher = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [9.0, 9.0]]]])
        >>> token_cosines(student, teacher, torch.tensor([[1, 1], [1, 0]])).tolist()
        [[[0.5, 0.0], [1.0, 0.0]]]
    """
    mask_GS = mask_BS if mask_GS is None else mask_GS
    u, v = unit_tokens(student_LBSE, mask_BS), unit_tokens(teacher_LGSE.detach(), mask_GS)
    dots: Tensor = u.flatten(2) @ v.flatten(2).mT
    return dots / (mask_BS.to(u.dtype) @ mask_GS.to(u.dtype).T)


def unit_tokens(states_LBSE: Tensor, mask_BS: Tensor) -> Tensor:
    """Return each real token's state at length 1, and 0 on padding; norms clamped at 1e-12.

    Args:
        states_LBSE: Token states, finite on padding too; gradients flow here.
        mask_BS: 1 on real tokens.

    Returns:
        The shape of the states.

    Example:
        >>> unit_tokens(torch.tensor([[[[0.0, 4.0], [9.0, 9.0]]]]), torch.tensor([[1, 0]])).tolist()
        [[[[0.0, 1.0], [0.0, 0.0]]]]
    """
    lengths_LBS = torch.linalg.vector_norm(states_LBSE, dim=-1).clamp(min=1e-12)
    # One product instead of two: mask and length are both numbers per token.
    scale_LBS = mask_BS.to(states_LBSE.dtype) / lengths_LBS
    found: Tensor = _Scale.apply(states_LBSE, scale_LBS.detach())  # type: ignore[no-untyped-call]
    return found


class _Scale(torch.autograd.Function):
    """``x / |x|`` on tokens of scale ``1 / |x|``, with ``(g - u (u.g)) / |x|`` for a gradient, u the unit.

    What autograd makes of the norm and the product reads and writes these wide tensors twice as often.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, scale: Tensor) -> Tensor:
        units = states * scale[..., None]
        ctx.save_for_backward(units, scale)
        return units

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        units, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(units, gradient)[..., None]
        return torch.addcmul(gradient, units, along, value=-1).mul_(scale[..., None]), None
