"""Attention of every family that shows it: scores, queries, keys and values, and nothing else changed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from stillroom.data.batching import Inputs
from stillroom.encoder import Encoder, Needs, attention, quick_attention
from stillroom.errors import WrongInput
from tiny import FAMILIES, inputs_for, logits_of, make_encoder

ALL = Needs(logits=True, hidden_states=frozenset({0, 1, 2, 3}), embeddings=True)
LOGITS = Needs(logits=True)
BYPASS = ("deberta-v2", "mpnet")
SHOWN = tuple(family for family in FAMILIES if family not in BYPASS)
BLOCKS = frozenset({1, 2, 3})
ATTENTION = Needs(logits=True, attention_scores=BLOCKS, queries=BLOCKS, keys=BLOCKS, values=BLOCKS)


def make_shown(family: str) -> Encoder:
    """Return an encoder of three blocks; the second and third of ModernBERT look 2 tokens around."""
    made = make_encoder(family, layers=3)
    if family != "modernbert":
        return made
    made.config.local_attention = 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(made.config)
    return Encoder(model.float().eval(), made.tokenizer)


@pytest.fixture(scope="module", params=SHOWN)
def shown(request: pytest.FixtureRequest) -> Encoder:
    return make_shown(request.param)


def eager_scores(model: Encoder, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return what transformers' eager attention gives to its softmax, block by block."""
    seen: list[torch.Tensor] = []
    softmax = nn.functional.softmax

    def spy(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(scores)
        return softmax(scores, *args, **kwargs)

    before = model.config._attn_implementation
    model.model.set_attn_implementation("eager")
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "softmax", spy)
        logits_of(model, inputs)
    model.model.set_attn_implementation(before)
    return seen


def without_padding(model: Encoder) -> Inputs:
    ids = inputs_for(model).input_ids[:2, :5]
    assert (ids != 0).all()
    return Inputs(ids, torch.ones_like(ids), None)


@pytest.mark.parametrize("padded", [True, False])
def test_attention_scores_are_those_of_eager_attention(
    shown: Encoder, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_for(shown) if padded else without_padding(shown)
    assert bool((inputs.attention_mask == 0).any()) == padded
    want = eager_scores(shown, inputs, monkeypatch)
    with torch.no_grad():
        found = shown(inputs, ATTENTION)
    B, S = inputs.input_ids.shape
    assert len(want) == 3 and found.attention_scores.keys() == BLOCKS
    for block, scores in enumerate(want, start=1):
        assert scores.shape == (B, 2, S, S)
        torch.testing.assert_close(found.attention_scores[block], scores, rtol=1e-5, atol=1e-6)


def test_queries_keys_and_values_are_the_blocks_own(shown: Encoder) -> None:
    """Scores follow from queries and keys, and the block's output from scores and values."""
    inputs = inputs_for(shown)
    outputs: list[torch.Tensor] = []
    _, blocks = shown.blocks()
    names = {"distilbert": "attention.out_lin", "modernbert": "attn.Wo"}
    name = names.get(shown.config.model_type, "attention.output.dense")
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, given: outputs.append(given[0]))
        for block in blocks
    ]
    with torch.no_grad():
        found = shown(inputs, ATTENTION)
    for handle in handles:
        handle.remove()
    B, S = inputs.input_ids.shape
    real = inputs.attention_mask[:, None, None, :] == 1
    for block in BLOCKS:
        q, k, v = found.queries[block], found.keys[block], found.values[block]
        assert q.shape == k.shape == v.shape == (B, 2, S, 8)
        scores = found.attention_scores[block]
        open_ = real & (scores > -1e30)
        want = torch.einsum("bhqd,bhkd->bhqk", q, k) / 8**0.5
        torch.testing.assert_close(scores[open_], want[open_], rtol=1e-5, atol=1e-6)
        mixed = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v).reshape(B, S, 16)
        kept = inputs.attention_mask == 1
        torch.testing.assert_close(mixed[kept], outputs[block - 1][kept], rtol=1e-4, atol=1e-6)


def test_no_query_looks_at_padding_nor_beyond_a_local_window(shown: Encoder) -> None:
    inputs = inputs_for(shown)
    with torch.no_grad():
        found = shown(inputs, ATTENTION)
    S = inputs.input_ids.shape[1]
    position = torch.arange(S)
    near = (position[:, None] - position).abs() <= 2
    assert not near.all()
    for block in BLOCKS:
        allowed = (inputs.attention_mask == 1)[:, None, None, :].expand(-1, 2, S, S)
        if shown.config.model_type == "modernbert" and block > 1:
            allowed = allowed & near
        scores = found.attention_scores[block]
        assert torch.equal(scores > -1e4, allowed)
        assert torch.isfinite(scores).all()


def test_reading_attention_changes_no_bit_of_the_rest(shown: Encoder) -> None:
    inputs = inputs_for(shown)
    with torch.no_grad():
        plain = shown(inputs, ALL)
        found = shown(inputs, ALL | ATTENTION)
        assert torch.equal(found.logits, plain.logits)
        assert all(torch.equal(found.hidden_states[i], plain.hidden_states[i]) for i in range(4))
        assert shown.config._attn_implementation == "sdpa"
    assert not plain.attention_scores and not plain.queries and not plain.keys and not plain.values


def test_dropout_of_attention_is_the_same_with_and_without_reading(shown: Encoder) -> None:
    """Else a run that reads attention could not be compared with one that does not."""
    made = []
    shown.train()
    try:
        for needs in (LOGITS, ATTENTION):
            torch.manual_seed(0)
            made.append(shown(inputs_for(shown), needs).logits)
    finally:
        shown.eval()
    assert torch.equal(made[0], made[1])


def test_only_the_blocks_that_are_asked_for_are_kept(shown: Encoder) -> None:
    needs = Needs(attention_scores=frozenset({3}), values=frozenset({2}))
    found = shown(inputs_for(shown), needs)
    assert found.attention_scores.keys() == {3} and found.values.keys() == {2}
    assert not found.queries and not found.keys


def test_gradient_flows_through_what_is_read(shown: Encoder) -> None:
    for name in ("attention_scores", "queries", "keys", "values"):
        shown.zero_grad()
        found = shown(inputs_for(shown), Needs(**{name: frozenset({2})}))
        getattr(found, name)[2].clamp(min=-100).square().sum().backward()
        _, blocks = shown.blocks()
        assert any(p.grad is not None and bool(p.grad.any()) for p in blocks[0].parameters())
        assert all(p.grad is None or not p.grad.any() for p in blocks[2].parameters())
    shown.zero_grad()


def test_under_bf16_scores_stay_finite_and_become_float32(shown: Encoder) -> None:
    inputs = inputs_for(shown)
    with torch.no_grad():
        want = shown(inputs, ATTENTION).attention_scores
        with torch.autocast("cpu", torch.bfloat16):
            found = shown(inputs, ATTENTION).float().attention_scores
    for block in BLOCKS:
        assert found[block].dtype == torch.float32 and torch.isfinite(found[block]).all()
        assert torch.equal(found[block] > -1e4, want[block] > -1e4)
        torch.testing.assert_close(
            found[block].clamp(min=-100), want[block].clamp(min=-100), rtol=0.05, atol=0.05
        )


@pytest.mark.parametrize("family", BYPASS)
def test_a_family_that_does_not_show_its_attention_says_so(family: str) -> None:
    """Without the check its terms would find no scores, or those of another pass."""
    model = make_encoder(family, layers=3)
    inputs = inputs_for(model)
    before = model.config._attn_implementation
    for name in ("attention_scores", "queries", "keys", "values"):
        with pytest.raises(WrongInput, match="not through transformers' attention interface"):
            model(inputs, Needs(**{name: frozenset({1})}))
    assert model.config._attn_implementation == before
    assert torch.isfinite(logits_of(model, inputs)).all()


def test_attention_is_as_it_was_after_an_error() -> None:
    model = make_encoder()
    inputs = inputs_for(model)
    wrong = Inputs(inputs.input_ids + 1000, inputs.attention_mask, None)
    with pytest.raises(IndexError):
        model(wrong, ATTENTION)
    assert model.config._attn_implementation == "sdpa"
    assert not model(inputs, LOGITS).attention_scores


def _states(S: int, dtype: torch.dtype, *, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, S, 4, dtype=dtype, requires_grad=gradient) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("kind", ["bool", "added", "none"])
@pytest.mark.parametrize("scaling", [None, 0.8])
@pytest.mark.parametrize("S", [5, 9, 15, 16])
def test_quick_attention_is_that_of_the_equation_and_so_are_its_gradients(
    monkeypatch: pytest.MonkeyPatch, kind: str, scaling: float | None, S: int
) -> None:
    monkeypatch.delattr(attention, "sdpa_attention_forward")
    q, k, v = _states(S, torch.float64, gradient=True)
    mask = torch.ones(3, 1, S, S, dtype=torch.bool)
    if kind != "none":
        mask[1, :, :, 3:] = mask[2, :, :, 4:] = False
    least = torch.finfo(torch.float64).min
    added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, least)
    given = {"bool": mask, "added": added, "none": None}[kind]
    found, _ = quick_attention(nn.Module(), q, k, v, given, scaling=scaling)
    weights = (q @ k.mT * (scaling or 0.5)).masked_fill(~mask, -math.inf).softmax(-1)
    want = (weights @ v).transpose(1, 2)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    goal = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((made * goal).sum(), (q, k, v)) for made in (found, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "ours"), [("bf16", True), ("gradient", True), ("float32", False), ("many", False)]
)
def test_attention_is_plain_where_that_is_quicker_and_fits(
    monkeypatch: pytest.MonkeyPatch, case: str, ours: bool
) -> None:
    """In float32 without a gradient the bits are torch's, on which the recorded teacher counts."""
    q, k, v = _states(6, torch.bfloat16 if case == "bf16" else torch.float32, gradient=case == "gradient")
    if case == "many":
        q, k, v = _states(6, torch.bfloat16, gradient=True)
        monkeypatch.setattr(attention, "_MOST", 3 * 2 * 6 * 6 - 1)
    want, _ = attention.sdpa_attention_forward(nn.Module(), q, k, v, None, is_causal=False)
    theirs: list[Any] = []
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *_, **named: theirs.append(named) or (want, None)
    )
    found, _ = quick_attention(nn.Module(), q, k, v, None, is_causal=False)
    assert (not theirs) == ours and found.shape == want.shape and found.dtype == want.dtype
    torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", SHOWN)
def test_a_pass_in_float32_without_a_gradient_has_the_bits_of_transformers(family: str) -> None:
    model = make_shown(family)
    inputs = inputs_for(model)
    with torch.no_grad():
        want = model.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
        assert torch.equal(model(inputs, LOGITS).logits, want)
    assert model.config._attn_implementation == "sdpa"
