"""How a projection from student to teacher width starts."""

from torch import Tensor, nn


def start_unturned(matrix: Tensor) -> None:
    """Fill a projection so that it turns nothing: identity where the widths agree, else orthogonal.

    A random start would undo what a student that copies teacher layers already knows.

    Args:
        matrix: Two axes, the widths in either order. Filled in place; the longer side gets
            orthonormal vectors of the shorter side's number.

    Example:
        >>> import torch
        >>> matrix = torch.empty(2, 2)
        >>> start_unturned(matrix)
        >>> matrix.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if matrix.shape[0] == matrix.shape[1]:
        nn.init.eye_(matrix)
    else:
        nn.init.orthogonal_(matrix)
