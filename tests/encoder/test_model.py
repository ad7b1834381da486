"""Encoders of every family: what is read of them, what is added, and the hash of their weights."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from stillroom.data.batching import Inputs
from stillroom.encoder import Encoder, Needs, Outputs, pool, weights_hash
from stillroom.errors import WrongInput
from tiny import inputs_for, logits_of, make_encoder, make_task

ALL = Needs(logits=True, hidden_states=frozenset({0, 1, 2, 3}), embeddings=True)
LOGITS = Needs(logits=True)


def test_hidden_states_are_indexed_as_the_models_own(model: Encoder) -> None:
    inputs = inputs_for(model)
    given = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    if inputs.token_type_ids is not None:
        given["token_type_ids"] = inputs.token_type_ids
    with torch.no_grad():
        want = model.model(**given, output_hidden_states=True)
        found = model(inputs, ALL)
    assert torch.equal(found.logits, want.logits)
    assert len(want.hidden_states) == 4 and found.hidden_states.keys() == {0, 1, 2, 3}
    for i, state in enumerate(want.hidden_states):
        assert torch.equal(found.hidden_states[i], state)
        assert state.shape == (*inputs.input_ids.shape, model.width)


def test_hidden_state_i_is_what_leaves_block_i(model: Encoder) -> None:
    """Off by one, a student of half the layers would learn from the layers between."""
    outputs: list[torch.Tensor] = []
    _, blocks = model.blocks()
    assert len(blocks) == model.depth == 3

    def keep(module: nn.Module, given: Any, made: Any) -> None:
        outputs.append(made[0] if isinstance(made, tuple) else made)

    handles = [block.register_forward_hook(keep) for block in blocks]
    with torch.no_grad():
        found = model(inputs_for(model), ALL)
    for handle in handles:
        handle.remove()
    # The last one may have gone through a final norm (ModernBERT).
    for i in (1, 2):
        assert torch.equal(found.hidden_states[i], outputs[i - 1])


def test_nothing_but_what_is_needed_is_kept(model: Encoder) -> None:
    inputs = inputs_for(model)
    found = model(inputs, Needs(logits=True, hidden_states=frozenset({2})))
    assert found.hidden_states.keys() == {2} and found.embeddings is None
    found = model(inputs, LOGITS)
    assert not found.hidden_states and found.embeddings is None


def test_pooled_states_are_hidden_states_over_real_tokens(model: Encoder) -> None:
    inputs = inputs_for(model)
    poolings: tuple[Any, ...] = ("mean", "cls", "unmasked_mean")
    needs = Needs(pooled_states=frozenset((how, i) for how in poolings for i in range(4)))
    with torch.no_grad():
        hidden = model(inputs, ALL).hidden_states
        found = model(inputs, needs)
    assert found.hidden_states == {} and len(found.pooled_states) == 12
    for i, states in hidden.items():
        for b, (row, mask) in enumerate(zip(states.double(), inputs.attention_mask, strict=True)):
            real = row[: int(mask.sum())]
            want = {"mean": real.mean(0), "cls": real[0], "unmasked_mean": row.mean(0)}
            for how in poolings:
                torch.testing.assert_close(found.pooled_states[how, i][b], want[how].float())


@pytest.mark.parametrize("width", [16, 24, 312])
def test_a_mean_over_tokens_is_the_same_bits_whatever_the_padding(width: int) -> None:
    """A recording pools rows in batches of other widths than training does."""
    states = torch.randn(3, 40, width, generator=torch.Generator().manual_seed(0))
    for tokens in range(5, 41):
        alone = pool(states[:, :tokens], torch.ones(3, tokens), "mean")
        for wide in {tokens + 1, tokens + 3, tokens + 8, 64} - {tokens}:
            padded = F.pad(states[:, :tokens], (0, 0, 0, wide - tokens), value=5.0)
            mask = F.pad(torch.ones(3, tokens), (0, wide - tokens))
            assert torch.equal(pool(padded, mask, "mean"), alone), (tokens, wide)


def test_pooled_states_are_computed_in_float32_under_bf16() -> None:
    model = make_encoder()
    inputs = inputs_for(model)
    needs = Needs(hidden_states=frozenset({2}), pooled_states=frozenset({("mean", 2)}))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(inputs, needs)
    state = found.hidden_states[2]
    pooled = found.pooled_states["mean", 2]
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, pool(state.float(), inputs.attention_mask, "mean"))
    pooled.sum().backward()
    assert model.words.grad is not None and bool(model.words.grad.any())


def test_embeddings_are_hidden_state_0_and_an_offset_is_added_to_them(model: Encoder) -> None:
    inputs = inputs_for(model)
    with torch.no_grad():
        clean = model(inputs, ALL)
        assert clean.embeddings is not None
        assert torch.equal(clean.embeddings, clean.hidden_states[0])
        offset = torch.randn(clean.embeddings.shape, generator=torch.Generator().manual_seed(0))
        moved = model(inputs, ALL, offset)
        assert torch.equal(moved.embeddings, clean.embeddings + offset)
        assert torch.equal(moved.hidden_states[0], moved.embeddings)
        assert not torch.allclose(moved.logits, clean.logits)
        nothing = model(inputs, LOGITS, torch.zeros_like(offset))
    assert torch.equal(nothing.logits, clean.logits)
    # And nothing of it stays behind.
    assert torch.equal(logits_of(model, inputs), clean.logits)


def test_gradient_of_the_embeddings_is_the_change_of_the_loss(model: Encoder) -> None:
    """Directional derivative in float64: what is differentiated is what the offset moves."""
    wide = Encoder(model.model.double(), model.tokenizer)
    try:
        inputs = inputs_for(wide)
        found = wide(inputs, Needs(logits=True, embeddings=True))
        (gradient,) = torch.autograd.grad(found.logits.square().sum(), found.embeddings)
        real = inputs.attention_mask == 1
        assert (gradient[real].norm(dim=-1) > 0).all()
        step = 1e-5 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).double()
        with torch.no_grad():
            up, down = (wide(inputs, LOGITS, sign * step).logits.square().sum() for sign in (1, -1))
        assert ((up - down) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=1e-4)
    finally:
        model.model.float()


def test_offset_comes_before_the_embedding_dropout(model: Encoder) -> None:
    dropout = model.embedding_dropout()
    assert isinstance(dropout, nn.Dropout)
    seen: list[torch.Tensor] = []
    handle = dropout.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    inputs = inputs_for(model)
    offset = torch.ones(*inputs.input_ids.shape, model.width)
    with torch.no_grad():
        clean = model(inputs, Needs(embeddings=True)).embeddings
        model(inputs, LOGITS, offset)
    handle.remove()
    assert torch.equal(seen[1], clean + offset)


def test_content_of_padding_changes_no_logit(model: Encoder) -> None:
    inputs = inputs_for(model)
    pads = inputs.attention_mask == 0
    assert pads.any()
    ids = inputs.input_ids.clone()
    ids[pads] = torch.randint(5, 20, (int(pads.sum()),), generator=torch.Generator().manual_seed(0))
    want = logits_of(model, inputs)
    found = logits_of(model, Inputs(ids, inputs.attention_mask, inputs.token_type_ids))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_width_of_padding_changes_no_logit(model: Encoder) -> None:
    inputs = inputs_for(model)
    wider = Inputs(
        *(
            None if x is None else nn.functional.pad(x, (0, 7))
            for x in (inputs.input_ids, inputs.attention_mask, inputs.token_type_ids)
        )
    )
    torch.testing.assert_close(logits_of(model, wider), logits_of(model, inputs), rtol=1e-5, atol=1e-6)


def test_the_second_text_of_a_pair_matters(model: Encoder) -> None:
    inputs = inputs_for(model, pair=True)
    assert (inputs.input_ids == 3).sum(1).tolist() == [2] * 6
    assert (inputs.token_type_ids is not None) == ("token_type_ids" in model.tokenizer.model_input_names)


def test_reads_as_many_positions_as_it_says(model: Encoder) -> None:
    """RoBERTa's positions start after the padding index: 514 in the configuration read 512 tokens."""
    width = model.positions
    assert width in (64, 66)
    inputs = Inputs(torch.full((1, width), 6), torch.ones(1, width, dtype=torch.int64), None)
    assert torch.isfinite(logits_of(model, inputs)).all()


def test_a_hook_is_gone_after_an_error() -> None:
    model = make_encoder()
    inputs = inputs_for(model)
    with pytest.raises(RuntimeError):
        model(inputs, LOGITS, torch.zeros(3, 5, 7))
    assert not model.embedding_dropout()._forward_pre_hooks


def test_embeddings_narrower_than_the_blocks() -> None:
    """ELECTRA's small models widen the embeddings after their dropout."""
    config = make_encoder("electra", layers=3).config
    config.embedding_size = 8
    model = Encoder(AutoModelForSequenceClassification.from_config(config).eval(), make_encoder().tokenizer)
    inputs = inputs_for(model)
    found = model(inputs, ALL)
    assert found.embeddings.shape[-1] == 8 and found.hidden_states[0].shape[-1] == 16
    moved = model(inputs, ALL, torch.ones_like(found.embeddings))
    assert not torch.allclose(moved.logits, found.logits)


def test_an_encoder_whose_embeddings_are_not_known_says_so() -> None:
    model = make_encoder()
    model.model.base_model.embeddings.extra = nn.Dropout()
    assert model.embedding_dropout() is None
    with pytest.raises(WrongInput, match="method.perturbation=off"):
        model(inputs_for(model), Needs(embeddings=True))
    assert model(inputs_for(model), LOGITS).logits.shape == (6, 2)


def test_an_encoder_of_one_shared_block_says_so() -> None:
    config = AutoConfig.for_model(
        "albert", hidden_size=16, embedding_size=8, num_hidden_layers=3, num_attention_heads=2
    )
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(WrongInput, match="no list of 3 blocks"):
        Encoder(model, make_encoder().tokenizer).blocks()


def test_needs_are_summed() -> None:
    first = Needs(hidden_states=frozenset({1, 3}))
    second = Needs(logits=True, hidden_states=frozenset({2, 3}))
    assert first | second == Needs(True, frozenset({1, 2, 3}), False)
    assert Needs(embeddings=True) | Needs() == Needs(embeddings=True)
    one, two = frozenset({1}), frozenset({2})
    first = Needs(attention_scores=one, queries=one, keys=one, values=one)
    second = Needs(attention_scores=two, queries=two, keys=two, values=two)
    both = frozenset({1, 2})
    assert first | second == Needs(attention_scores=both, queries=both, keys=both, values=both)
    mean, cls = frozenset({("mean", 1)}), frozenset({("cls", 2)})
    assert Needs(pooled_states=mean) | Needs(pooled_states=cls) == Needs(pooled_states=mean | cls)
    assert Needs(hidden_states=frozenset({3}), pooled_states=mean | cls).states == {1, 2, 3}
    for name in ("attention_scores", "queries", "keys", "values"):
        assert Needs(**{name: two}).attention == two
    assert not ALL.attention


def test_outputs_in_float32() -> None:
    half = torch.ones(1, 2, dtype=torch.bfloat16)
    found = Outputs(half, {2: half}, None, {1: half}, {3: half}, {4: half}, {5: half}).float()
    assert found.logits.dtype == found.hidden_states[2].dtype == torch.float32
    assert found.attention_scores[1].dtype == found.queries[3].dtype == torch.float32
    assert found.keys[4].dtype == found.values[5].dtype == torch.float32
    assert found.attention_scores.keys() == {1} and found.queries.keys() == {3}
    assert found.keys.keys() == {4} and found.values.keys() == {5}
    pooled = Outputs(half, pooled_states={("mean", 1): half}).float().pooled_states
    assert pooled["mean", 1].dtype == torch.float32


def test_labels_stand_in_the_order_of_the_logits() -> None:
    assert make_encoder(task=make_task("multi-label")).labels == ("x", "y", "z")
    assert make_encoder(task=make_task("regression")).labels == ("score",)


def test_hash_knows_names_types_shapes_and_every_bit() -> None:
    def hash_of(**values: torch.Tensor) -> str:
        holder = nn.Module()
        for name, value in values.items():
            holder.register_buffer(name, value)
        return weights_hash(holder)

    one = torch.tensor([1.0, 2.0])
    different = [
        hash_of(a=one),
        hash_of(b=one),
        hash_of(a=one[None]),
        hash_of(a=one.double()),
        hash_of(a=torch.tensor([1.0, torch.nextafter(one[1], one[0])])),
        hash_of(a=torch.tensor([0.0, 2.0])),
        hash_of(a=torch.tensor([-0.0, 2.0])),
        hash_of(a=torch.tensor(1.0)),
        hash_of(a=one, b=one),
    ]
    assert len(set(different)) == len(different)
    assert hash_of(a=one, b=torch.zeros(3)) == hash_of(b=torch.zeros(3), a=one.clone())
    turned = torch.arange(6.0).view(2, 3).T
    assert hash_of(a=turned) == hash_of(a=turned.contiguous())
