"""How a projection starts, and how it is multiplied."""

import pytest
import torch

from stillroom.ops.projection import project, start_unturned


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
def test_start_turns_nothing(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.full(shape, float("nan")))
    start_unturned(matrix)
    W = matrix.detach()
    product = W @ W.T if shape[0] <= shape[1] else W.T @ W
    torch.testing.assert_close(product, torch.eye(min(shape)), rtol=0, atol=1e-6)
    assert torch.equal(W, torch.eye(4)) == (shape == (4, 4))


@pytest.mark.parametrize("turned", [False, True])
def test_a_folded_students_states_are_projected_to_what_they_keep_of_the_teachers(turned: bool) -> None:
    torch.manual_seed(0)
    P = torch.linalg.qr(torch.randn(5, 3))[0]
    matrix = torch.empty((5, 3) if turned else (3, 5))
    start_unturned(matrix, P)
    W = matrix.T if turned else matrix
    kept = torch.randn(7, 3) @ P.T
    torch.testing.assert_close(kept @ P @ W, kept)
    assert ((torch.randn(7, 5) @ P @ W) @ (torch.eye(5) - P @ P.T)).abs().max() < 1e-6


def test_projecting_in_bf16_is_the_product_to_bf16_rounding_and_so_is_its_gradient() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 6, 5, requires_grad=True)
    matrix = torch.randn(2, 5, 7, requires_grad=True)
    goal = torch.randn(2, 6, 7)
    want, found = project(states, matrix, bf16=False), project(states, matrix, bf16=True)
    assert torch.equal(want, states @ matrix)
    assert found.dtype == torch.float32 and not torch.equal(found, want)
    # bf16 keeps 8 bits: a sum of 5 products is wrong by a few 2**-8 of them.
    torch.testing.assert_close(found, want, rtol=0.02, atol=0.05)
    ours = torch.autograd.grad((found * goal).sum(), (states, matrix))
    theirs = torch.autograd.grad((want * goal).sum(), (states, matrix))
    assert all(gradient.dtype == torch.float32 for gradient in ours)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.06)
