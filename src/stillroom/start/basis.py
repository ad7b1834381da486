"""P, the basis on which a narrow student's states stand for its teacher's.

`principal_projection` chooses it before there is a student, `align` finds that of a checkpoint.

Shapes: n tokens, E teacher width, D student width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillroom.data.batching import Inputs
from stillroom.data.tokens import TokenisedRows
from stillroom.encoder import Encoder, Needs
from stillroom.start.text import NORM_TOKENS, joined, sample


def principal_projection(covariance_EE: Tensor, width: int) -> Tensor:
    """Return P, an orthonormal basis of the directions in which states vary most, ``(E, D)``.

    The first direction is the constant one, so that LayerNorm's centring commutes with P: the others
    are the leading eigenvectors of the covariance of centred states. Of all bases of that space which map
    the constant vector to the constant vector, P is the one nearest to the D axes that the space holds most
    of (orthogonal Procrustes): LayerNorm scales by axis.

    Args:
        covariance_EE: Of the teacher's hidden states, float64.
        width: D, at most E.

    Returns:
        Float64, ``P^T P = 1`` to rounding; the identity where D is E.

    Example:
        >>> P = principal_projection(torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.0])).double(), 3)
        >>> bool(((P.T @ P) - torch.eye(3)).abs().max() < 1e-12)
        True
    """
    E = len(covariance_EE)
    if width == E:
        return torch.eye(E, dtype=torch.float64, device=covariance_EE.device)
    one = covariance_EE.new_full((E, 1), E**-0.5)
    centring = torch.eye(E, dtype=torch.float64, device=one.device) - one @ one.T
    # Ascending: the constant direction, with eigenvalue 0, is among the first.
    V = torch.linalg.eigh(centring @ covariance_EE @ centring)[1][:, E - width + 1 :]
    V = torch.linalg.qr(centring @ V)[0]
    share_E = (one.square() + V.square().sum(1, keepdim=True)).flatten()
    axes = share_E.topk(width).indices.sort().values
    c = one.new_full((width, 1), width**-0.5)
    # A basis of what is orthogonal to c.
    C = torch.linalg.qr(torch.cat([c, torch.eye(width, dtype=c.dtype, device=c.device)], 1))[0][:, 1:]
    U, _, W = torch.linalg.svd(V[axes].T @ C, full_matrices=False)
    P: Tensor = one @ c.T + V @ (U @ W) @ C.T
    return P


def align(teacher: Encoder, student: Encoder, layers: Sequence[int], tokens: TokenisedRows) -> Tensor:
    """Return P that turns the student's hidden states nearest to the teacher's, ``(E, D)`` float32.

    ``P = argmin sum |t - P s|^2`` over orthonormal columns (orthogonal Procrustes): ``U W^T`` of the
    singular value decomposition ``U diag W^T`` of ``sum t s^T``. The sums go over tokens, the embedding
    output and the mapped layers, with t and s scaled to length 1. It has no seed.

    Args:
        teacher: Of width E.
        student: Of width D, at most E, with the teacher's tokenizer, on the same device.
        layers: The teacher's, from 1, that the student's blocks stand for.
        tokens: Training text.
    """
    inputs = joined(sample(tokens, NORM_TOKENS)).to(teacher.words.device)
    with torch.no_grad():
        s_PnD = _directions(student, inputs, range(student.depth + 1))
        t_PnE = _directions(teacher, inputs, (0, *layers))
    U, _, W = torch.linalg.svd(torch.einsum("pne,pnd->ed", t_PnE, s_PnD), full_matrices=False)
    P: Tensor = U @ W
    return P.float().cpu()


def _directions(model: Encoder, inputs: Inputs, places: Sequence[int]) -> Tensor:
    """Return the hidden states of real tokens, of length 1, ``(places, n, width)``."""
    states = model(inputs, Needs(hidden_states=frozenset(places))).hidden_states
    mask_BS = inputs.attention_mask.bool()
    found = torch.stack([states[place][mask_BS] for place in places]).double()
    return nn.functional.normalize(found, dim=-1)
