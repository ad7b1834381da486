"""How a projection starts."""

import pytest
import torch

from stillroom.ops.projection import start_unturned


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
def test_start_turns_nothing(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.full(shape, float("nan")))
    start_unturned(matrix)
    W = matrix.detach()
    product = W @ W.T if shape[0] <= shape[1] else W.T @ W
    torch.testing.assert_close(product, torch.eye(min(shape)), rtol=0, atol=1e-6)
    assert torch.equal(W, torch.eye(4)) == (shape == (4, 4))
