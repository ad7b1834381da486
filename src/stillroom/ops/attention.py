"""What is compared of attention: scores before the softmax, and relations between tokens.

Shapes: B batch, H heads, S tokens, d width of a head, R relation heads. All compute in the dtype they
are given; call them in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MASKED = -100.0
"""Scores up to this are masked keys, in any dtype's way of masking."""

_HIDDEN = -1e30
"""Scores up to this are keys that a model does not look at, as `encoder` masks them."""


def visible(scores: Tensor) -> Tensor:
    """Return attention scores with 0 where a key is masked: ``c(x) = 0 if x <= -100 else x``.

    As TinyBERT's and BERT-EMD's own code does before it compares scores.

    Args:
        scores: Before the softmax, any shape and dtype; gradients flow where nothing is masked.

    Returns:
        Same shape and dtype.

    Example:
        >>> visible(torch.tensor([1.5, -1e4])).tolist()
        [1.5, 0.0]
    """
    return scores.masked_fill(scores <= _MASKED, 0)


def relation_scores(vectors_BHSd: Tensor, heads: int | None = None) -> Tensor:
    """Return ``X X^T / sqrt(d)``: how the tokens of a row relate by their queries, keys or values.

    Args:
        vectors_BHSd: Queries, keys or values, one vector for each token and head.
        heads: R, into how many relation heads all heads' vectors, end to end, are cut again; the
            model's own heads if None.

    Returns:
        Scores before the softmax, shape ``(B, R, S, S)``; padding is not masked in them.

    Raises:
        ValueError: If the width is no multiple of R.

    Example:
        >>> vectors = torch.tensor([[[[2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]]])
        >>> relation_scores(vectors).tolist()
        [[[[2.0, 1.0], [1.0, 1.0]]]]
    """
    if heads is not None:
        B, H, S, d = vectors_BHSd.shape
        if H * d % heads:
            raise ValueError(f"expected a width that {heads} relation heads divide, found {H * d}")
        vectors_BHSd = vectors_BHSd.transpose(1, 2).reshape(B, S, heads, -1).transpose(1, 2)
    scores: Tensor = vectors_BHSd @ vectors_BHSd.mT / math.sqrt(vectors_BHSd.shape[-1])
    return scores


def relation_divergence(student_BHSS: Tensor, teacher_BHSS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return ``mean KL(softmax(teacher) || softmax(student))`` over heads and real queries.

    The loss of MiniLM (arXiv 2002.10957) and MiniLMv2 (arXiv 2012.15828), as re-implemented by
    GLMKD. Keys that are padding, or that either model hides, are masked before the softmax; queries
    that are padding are left out of the mean, in which each real token of the batch counts alike.

    Args:
        student_BHSS: Scores before the softmax, queries in rows; gradients flow here only.
        teacher_BHSS: The same of the teacher; detached.
        mask_BS: 1 on real tokens.

    Returns:
        Scalar in nats, at least 0; 0 to rounding when both relations agree.

    Raises:
        ValueError: If the shapes differ: the models have not equally many heads or tokens.

    Example:
        >>> scores = torch.tensor([[[[0.0, 1.0], [2.0, 0.0]]]])
        >>> relation_divergence(scores, scores + 5, torch.ones(1, 2)).item()
        0.0
    """
    if student_BHSS.shape != teacher_BHSS.shape or student_BHSS.ndim != 4:
        raise ValueError(
            f"expected shapes (B, H, S, S) twice, found {tuple(student_BHSS.shape)} and "
            f"{tuple(teacher_BHSS.shape)}"
        )
    teacher_BHSS = teacher_BHSS.detach()
    hidden = (mask_BS == 0)[:, None, None] | (student_BHSS <= _HIDDEN) | (teacher_BHSS <= _HIDDEN)
    # The least number and not minus infinity: the difference of two infinities is no number.
    least = torch.finfo(student_BHSS.dtype).min
    log_p = F.log_softmax(teacher_BHSS.masked_fill(hidden, least), dim=-1)
    log_q = F.log_softmax(student_BHSS.masked_fill(hidden, least), dim=-1)
    each_BHS = (log_p.exp() * (log_p - log_q)).sum(-1)
    weight_BS = mask_BS.to(each_BHS.dtype)
    return (each_BHS.mean(1) * weight_BS).sum() / weight_BS.sum()
