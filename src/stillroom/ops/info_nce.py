"""InfoNCE: which of several candidates belongs to the anchor.

Shapes: B batch, K negatives, D width. Computes in the dtype it is given; call it in float32.
"""

import torch
from torch import Tensor


def info_nce(
    anchor_BD: Tensor, positive_BD: Tensor, negatives_BKD: Tensor, *, temperature: float
) -> Tensor:
    """Return InfoNCE of each anchor: the log-softmax of its positive among 1 + K candidates.

    ``-log( exp(a.p / tau) / (exp(a.p / tau) + sum_k exp(a.n_k / tau)) )``: van den Oord et al.
    (2018), arXiv 1807.03748. Dot products are taken as they are: give unit vectors for cosines.

    Args:
        anchor_BD: Anchors, shape ``(B, D)``; gradients flow here.
        positive_BD: The positive of each anchor, shape ``(B, D)``; gradients flow here.
        negatives_BKD: Negatives of each anchor, shape ``(B, K, D)``; detached.
        temperature: tau > 0, unitless.

    Returns:
        Shape ``(B,)`` in nats, at least 0; ``ln(K + 1)`` where all scores are equal.

    Raises:
        ValueError: If the shapes do not fit, there are no negatives, or tau is not positive.

    Example:
        >>> a, p, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[[0.0, 1.0]]])
        >>> round(info_nce(a, p, n, temperature=1.0).item(), 4)
        0.6931
    """
    B, D = anchor_BD.shape
    if positive_BD.shape != (B, D) or negatives_BKD.ndim != 3 or negatives_BKD.shape[::2] != (B, D):
        found = [tuple(given.shape) for given in (anchor_BD, positive_BD, negatives_BKD)]
        raise ValueError(f"expected shapes (B, D), (B, D) and (B, K, D), found {found}")
    if negatives_BKD.shape[1] == 0:
        raise ValueError("InfoNCE needs at least one negative for each anchor, found none")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    positive_B1 = (anchor_BD * positive_BD).sum(-1, keepdim=True)
    negative_BK = torch.einsum("bd,bkd->bk", anchor_BD, negatives_BKD.detach())
    scores = torch.cat([positive_B1, negative_BK], dim=1) / temperature
    return -scores.log_softmax(1)[:, 0]
