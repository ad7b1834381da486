"""Gradient perturbation of the student's embeddings."""

from typing import Literal

import torch
from torch import Tensor

from stillroom.processes import Share

_ALL = Share()


def perturbation(
    gradient_BSD: Tensor, *, epsilon: float, norm: Literal["token", "tensor"], share: Share = _ALL
) -> Tensor:
    """Return what is added to the embeddings: ``epsilon * G / max(||G||, 1e-12)``.

    Ascent along the gradient of the clean loss (LRC-BERT as re-implemented by GLMKD). The norm is
    taken per token over the hidden dimension, or over the whole tensor. A token without gradient
    does not move; if any number of ``G`` is not finite, nothing moves.

    Args:
        gradient_BSD: Gradient of the loss for the embeddings, shape ``(B, S, D)``; a constant.
        epsilon: Length of the step, in the embeddings' units.
        norm: `token` or `tensor`.
        share: Which part of a batch that several processes share this is: the tensor is the whole batch's.

    Returns:
        Same shape and dtype, detached.

    Example:
        >>> perturbation(torch.tensor([[[3.0, 4.0]]]), epsilon=1.0, norm="token").tolist()
        [[[0.6000000238418579, 0.800000011920929]]]
    """
    gradient = gradient_BSD.detach()
    # bf16 cannot hold 1e-12 beside squares, and a norm of halves overflows.
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    length = wide.norm(dim=-1, keepdim=True) if norm == "token" else wide.norm()
    wrong = ~wide.isfinite().all()
    if not share.whole:
        squares, wrong = share.total(torch.stack([wide.square().sum(), wrong.to(wide.dtype)]))
        length = length if norm == "token" else squares.sqrt()
    offset = epsilon * wide / length.clamp(min=1e-12)
    # A tensor condition instead of `if`: no wait for the device inside the step.
    return torch.where(wrong.bool(), torch.zeros_like(offset), offset).to(gradient.dtype)
