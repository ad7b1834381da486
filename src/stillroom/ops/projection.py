"""How a projection from student to teacher width starts, and how it is multiplied."""

import torch
from torch import Tensor, nn


def start_unturned(matrix: Tensor, basis_ED: Tensor | None = None) -> None:
    """Fill a projection so that it turns nothing: identity where the widths agree, else orthonormal.

    A random start would undo what a student that starts from its teacher already knows. Of one that was
    folded the vectors are its basis: its state ``P^T h`` is then projected to ``P P^T h``, the part of the
    teacher's state that it keeps. Without a basis they are drawn at random.

    Args:
        matrix: Two axes, the widths in either order. Filled in place.
        basis_ED: P, teacher width by student width, with orthonormal columns, where one is known.

    Example:
        >>> matrix = torch.empty(2, 2)
        >>> start_unturned(matrix)
        >>> matrix.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if matrix.shape[0] == matrix.shape[1]:
        nn.init.eye_(matrix)
    elif basis_ED is not None:
        with torch.no_grad():
            matrix.copy_(basis_ED if matrix.shape == basis_ED.shape else basis_ED.T)
    else:
        nn.init.orthogonal_(matrix)


def project(states: Tensor, matrix: Tensor, *, bf16: bool) -> Tensor:
    """Return ``states @ matrix`` in the dtype of the states, multiplied in it or in bf16.

    Where the loop computes in bf16, so does the projection: it is one more linear layer on states that
    bf16 products made, and as large as a block of a small student. What is compared with its result is
    float32. Gradients flow to both, and are multiplied in bf16 as well.

    Args:
        states: Shape ``(..., S, D)``, float32.
        matrix: Shape ``(..., D, E)``, float32.
        bf16: Whether to round both to bf16 before, and the result after the product.

    Returns:
        Shape ``(..., S, E)``.

    Example:
        >>> import torch
        >>> project(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.5]]), bf16=True).tolist()
        [[4.0]]
    """
    if not bf16:
        return states @ matrix
    return (states.bfloat16() @ matrix.bfloat16()).to(states.dtype)
