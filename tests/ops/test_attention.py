"""Relations between tokens: loops over floats, hand-computed values, masks, failure modes."""

import math

import pytest
import torch
from torch import Tensor

from stillroom.ops.attention import relation_divergence, relation_scores

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def naive(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    """Return the mean KL from loops over rows, heads, queries and keys that are real tokens."""
    total, count = 0.0, 0
    B, H, S, _ = student.shape
    for row in range(B):
        real = [p for p in range(S) if mask[row, p]]
        for head in range(H):
            for query in real:
                s, t = ([x[row, head, query, key].item() for key in real] for x in (student, teacher))
                q = [math.exp(x) / sum(map(math.exp, s)) for x in s]
                p = [math.exp(x) / sum(map(math.exp, t)) for x in t]
                total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                count += 1
    return total / count


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("heads", [1, 3])
def test_divergence_equals_loops(heads: int, seed: int) -> None:
    s, t = random(2, heads, 4, 4, seed=seed), random(2, heads, 4, 4, seed=seed + 10)
    assert relation_divergence(s, t, MASK).item() == pytest.approx(naive(s, t, MASK), rel=1e-12)


def test_divergence_by_hand() -> None:
    # First query: p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3. Second: 0.
    s = torch.tensor([[[[0.0, math.log(3)], [0.0, 0.0]]]], dtype=torch.float64)
    t = torch.zeros(1, 1, 2, 2).double()
    found = relation_divergence(s, t, torch.ones(1, 2))
    assert found.item() == pytest.approx(math.log(4 / 3) / 4, rel=1e-12)


def test_gradient_is_right_and_the_teacher_gets_none() -> None:
    s, t = random(2, 2, 4, 4).requires_grad_(), random(2, 2, 4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relation_divergence(x, t, MASK), s)
    relation_divergence(s, t, MASK).backward()
    assert s.grad is not None and s.grad.abs().max() > 1e-3
    assert not s.grad[1, :, 2:].any() and not s.grad[1, :, :, 2:].any()
    assert t.grad is None


def test_equal_relations_give_zero_and_constants_change_nothing() -> None:
    s, t = random(2, 2, 4, 4), random(2, 2, 4, 4, seed=1)
    assert relation_divergence(s, s, MASK).item() == 0
    moved = s + random(2, 2, 4, 1, seed=2)
    want = relation_divergence(s, t, MASK).item()
    assert relation_divergence(moved, t, MASK).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_counts_for_nothing_however_it_is_masked(dtype: torch.dtype) -> None:
    """Padded keys in a softmax would take probability; padded queries in a mean would dilute it."""
    s, t = random(2, 2, 4, 4).to(dtype), random(2, 2, 4, 4, seed=1).to(dtype)
    want = relation_divergence(s, t, MASK).item()
    padding = (MASK == 0)[:, None, None]
    least = torch.finfo(torch.float32).min
    for value in (0.0, -1e4, least, 50.0):
        for fill in (padding, padding | padding.mT):
            assert relation_divergence(s.masked_fill(fill, value), t, MASK).item() == want
            assert relation_divergence(s, t.masked_fill(fill, value), MASK).item() == want
    wider = [torch.nn.functional.pad(x, (0, 3, 0, 3), value=2.0) for x in (s, t)]
    found = relation_divergence(wider[0], wider[1], torch.nn.functional.pad(MASK, (0, 3)))
    assert found.item() == pytest.approx(want, rel=1e-6)


def test_a_key_that_one_model_hides_counts_for_neither() -> None:
    """A local window beside a global one: a divergence from a probability of zero has no end."""
    s, t = random(1, 1, 3, 3), random(1, 1, 3, 3, seed=1)
    window = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]]).bool()
    least = torch.finfo(torch.float32).min
    hidden = [x.masked_fill(window, least) for x in (s, t)]
    pairs = [(hidden[0], t), (s, hidden[1]), (hidden[0], hidden[1])]
    found = [relation_divergence(*pair, torch.ones(1, 3)).item() for pair in pairs]
    assert found[0] == found[1] == found[2] and 0 < found[0] < 10


def test_other_numbers_of_heads_are_refused() -> None:
    """One head of the teacher would be compared with every head of the student."""
    with pytest.raises(ValueError, match="expected shapes"):
        relation_divergence(random(2, 2, 4, 4), random(2, 1, 4, 4), MASK)


# Scores of a relation


@pytest.mark.parametrize("heads", [None, 1, 2, 3, 6])
def test_relation_equals_loops_over_regrouped_heads(heads: int | None) -> None:
    x = random(2, 2, 3, 3)
    found = relation_scores(x, heads)
    R = heads or 2
    assert found.shape == (2, R, 3, 3)
    d = 6 // R
    for row in range(2):
        # All heads of a token, end to end.
        tokens = [[v for head in range(2) for v in x[row, head, p].tolist()] for p in range(3)]
        for r in range(R):
            for i in range(3):
                for j in range(3):
                    pair = zip(tokens[i][r * d : r * d + d], tokens[j][r * d : r * d + d], strict=True)
                    want = sum(a * b for a, b in pair) / math.sqrt(d)
                    assert found[row, r, i, j].item() == pytest.approx(want, rel=1e-12)


def test_regrouping_to_the_models_own_heads_changes_nothing() -> None:
    x = random(2, 2, 3, 4)
    assert torch.equal(relation_scores(x, 2), relation_scores(x))


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="4 relation heads divide, found 6"):
        relation_scores(random(1, 2, 3, 3), 4)
