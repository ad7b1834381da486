"""Gradient perturbation of the student's embeddings."""

from typing import Literal

import torch
from torch import Tensor

_EPS = 1e-12


def perturbation(gradient_BSD: Tensor, *, epsilon: float, norm: Literal["token", "tensor"]) -> Tensor:
    """Return what is added to the embeddings: ``epsilon * G / max(||G||, 1e-12)``.

    Ascent along the gradient of the clean loss (LRC-BERT as re-implemented by GLMKD). The norm is
    taken per token over the hidden dimension, or over the whole tensor. A token without gradient
    does not move; if any number of ``G`` is not finite, nothing moves.

    Args:
        gradient_BSD: Gradient of the loss for the embeddings, shape ``(B, S, D)``; a constant.
        epsilon: Length of the step, in the embeddings' units.
        norm: `token` or `tensor`.

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
    offset = epsilon * wide / length.clamp(min=_EPS)
    # A tensor condition instead of `if`: no wait for the device inside the step.
    return torch.where(wide.isfinite().all(), offset, torch.zeros_like(offset)).to(gradient.dtype)
