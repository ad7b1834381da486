"""Dropout drops as torch's does, and attention with it attends as transformers' does."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillroom import encoder
from stillroom.encoder import Needs
from stillroom.training import dropout
from stillroom.training.dropout import attention, drop, quick_dropout
from tiny import FAMILIES, make_batch_of, make_encoder, make_rows, make_task


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_values_are_dropped_with_chance_p_and_the_mean_stays(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = drop(torch.ones(1000, 1001, dtype=dtype), p)
    kept = made != 0
    # 4.5 standard deviations of the mean of a million draws.
    margin = 4.5 * math.sqrt(p * (1 - p) / kept.numel())
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=margin)
    assert torch.unique(made[kept]).tolist() == pytest.approx(
        [1 / (1 - p)], rel=1e-4 if dtype.itemsize == 4 else 4e-3
    )


def test_the_least_chance_is_one_step_and_so_is_the_greatest() -> None:
    """Off by one, twice as many or none would be dropped: 61 of 4 million draws, 4.5 deviations are 35."""
    torch.manual_seed(0)
    ones = torch.ones(4_000_000)
    assert 26 < (drop(ones, 2**-16) == 0).sum() < 96
    assert 26 < (drop(ones, 1 - 2**-16) != 0).sum() < 96


def test_draws_are_independent_of_each_other() -> None:
    """Four values share a random number: were its bits not free, neighbours would fall together."""
    torch.manual_seed(0)
    kept = (drop(torch.ones(4_000_000), 0.5) != 0).double() - 0.5
    for distance in (1, 2, 3, 4, 5, 8):
        together = (kept[:-distance] * kept[distance:]).mean().item() * 4
        assert abs(together) < 4.5 / math.sqrt(len(kept))
    for place in kept.view(-1, 4).mean(0):
        assert abs(place.item()) < 4.5 * 0.5 / math.sqrt(1_000_000)


def test_the_gradient_flows_to_what_is_kept_and_with_its_factor() -> None:
    states = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    made = drop(states, 0.3)
    made.sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad * states.detach(), made.detach())
    assert 0 < (states.grad == 0).sum() < states.numel()


def test_nothing_and_everything() -> None:
    states = torch.randn(5)
    assert drop(states, 0.0) is states
    assert (drop(states, 1.0) == 0).all()


def test_a_seed_gives_the_same_numbers_again() -> None:
    state = torch.get_rng_state()
    first = drop(torch.ones(1001), 0.5)
    torch.set_rng_state(state)
    assert torch.equal(first, drop(torch.ones(1001), 0.5))
    assert not torch.equal(first, drop(torch.ones(1001), 0.5))


def _naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, factors: Tensor, scaling: float) -> Tensor:
    scores = q @ k.mT * scaling
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1) * factors
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize("kind", ["bool", "added", "none"])
@pytest.mark.parametrize("scaling", [None, 0.8])
@pytest.mark.parametrize("S", [5, 9, 15, 16])
def test_attention_is_that_of_the_equation_and_so_are_its_gradients(
    monkeypatch: pytest.MonkeyPatch, kind: str, scaling: float | None, S: int
) -> None:
    """Rows of 9 to 15 tokens are filled up inside the softmax, which must change nothing."""
    torch.manual_seed(0)
    B, H, D = 3, 2, 4
    q, k, v = (torch.randn(B, H, S, D, requires_grad=True) for _ in range(3))
    mask = torch.ones(B, 1, S, S, dtype=torch.bool)
    if kind != "none":
        mask[1, :, :, 3:] = mask[2, :, :, 4:] = False
    factors = (torch.rand(B, H, S, S) > 0.3) / 0.7
    monkeypatch.setattr(dropout, "_kept", lambda *_: factors)
    least = torch.finfo(torch.float32).min
    given = {"bool": mask, "added": torch.where(mask, 0.0, least), "none": None}[kind]
    found, _ = attention(nn.Module(), q, k, v, given, dropout=0.3, scaling=scaling, is_causal=False)
    want = _naive(*(t.double() for t in (q, k, v)), mask, factors.double(), scaling or 0.5)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    goal = torch.randn_like(found)
    ours = torch.autograd.grad((found * goal).sum(), (q, k, v))
    theirs = torch.autograd.grad((want * goal).sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other", ["causal", "causal by itself", "softcap", "position bias", "shared keys", "no dropout"]
)
def test_what_is_not_plain_attention_is_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Else a mask, a cap or a bias would be left out in training, in silence."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        encoder.attention, "sdpa_attention_forward", lambda *_, **named: seen.append(named) or (q, None)
    )
    q = torch.randn(2, 4, 5, 3)
    k = torch.randn(2, 2, 5, 3) if other == "shared keys" else q
    named: dict[str, Any] = {
        "causal": {"is_causal": True},
        "causal by itself": {"is_causal": None},
        "softcap": {"softcap": 5.0},
        "position bias": {"position_bias": torch.zeros(1)},
    }.get(other, {})
    module = nn.Module()
    module.is_causal = other == "causal by itself"  # type: ignore[assignment]
    attention(module, q, k, k, None, dropout=0.0 if other == "no dropout" else 0.2, **named)
    assert len(seen) == 1 and named.items() <= seen[0].items()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_dropout_every_family_computes_the_same_bits(family: str) -> None:
    student = make_encoder(family)
    batch = make_batch_of(make_rows(make_task(), 6), student)
    needs = Needs(logits=True, hidden_states=frozenset({1}))
    before = student(batch.student, needs)
    modules, implementation = list(student.modules()), student.config._attn_implementation
    with quick_dropout(student):
        within = student(batch.student, needs)
        torch.manual_seed(0)
        first, second = (student.train()(batch.student, needs).logits for _ in range(2))
    assert torch.equal(before.logits, within.logits)
    assert torch.equal(before.hidden_states[1], within.hidden_states[1])
    # ModernBERT's configuration has no dropout.
    assert torch.equal(first, second) == (family == "modernbert")
    assert list(student.modules()) == modules and all(m.training for m in modules)
    assert student.config._attn_implementation == implementation


def test_the_mean_over_many_passes_is_that_of_torchs_dropout() -> None:
    student = make_encoder().train()
    student.config.attention_probs_dropout_prob = 0.3
    batch = make_batch_of(make_rows(make_task(), 400), student)

    def mean() -> Tensor:
        torch.manual_seed(0)
        found = student(batch.student, Needs(hidden_states=frozenset({2}))).hidden_states[2].detach()
        return torch.stack([found.mean(), found.std(), found.abs().mean()])

    want = mean()
    with quick_dropout(student):
        found = mean()
    assert not torch.equal(found, want)
    torch.testing.assert_close(found, want, rtol=0.02, atol=0.005)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_stays_half_precision(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 2, 5, 4).to(dtype) for _ in range(3))
    torch.manual_seed(0)
    half, _ = attention(nn.Module(), q, k, v, None, dropout=0.2, is_causal=False)
    torch.manual_seed(0)
    whole, _ = attention(nn.Module(), *(t.float() for t in (q, k, v)), None, dropout=0.2, is_causal=False)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), whole, rtol=0.03, atol=0.03)
