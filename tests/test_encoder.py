"""Encoders of every family: what is read of them, what is added, saved, loaded and refused."""

import importlib.machinery
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from stillroom import durable, encoder
from stillroom.data.batching import Inputs
from stillroom.encoder import Encoder, Needs, Outputs, load, locate, pool, weights_hash
from stillroom.errors import WrongInput
from tiny import FAMILIES, make_batch_of, make_encoder, make_rows, make_task, save_encoder

ALL = Needs(logits=True, hidden_states=frozenset({0, 1, 2, 3}), embeddings=True)
LOGITS = Needs(logits=True)


def inputs_for(model: Encoder, count: int = 6, *, pair: bool = False) -> Inputs:
    return make_batch_of(make_rows(make_task(pair=pair), count), model).student


def logits_of(model: Encoder, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs, LOGITS).logits


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Encoder:
    return make_encoder(request.param, layers=3)


# What is read


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


# Attention

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


# Saving and loading


@pytest.mark.parametrize("kind", ["classification", "regression", "multi-label"])
def test_what_is_saved_is_what_transformers_loads(tmp_path: Path, model: Encoder, kind: Any) -> None:
    task = make_task(kind)
    saved = make_encoder(model.config.model_type, layers=3, task=task)
    saved.save(tmp_path / "m")
    inputs, want = inputs_for(saved), logits_of(saved, inputs_for(saved))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    # Weights in a mapped file lie at another alignment, which may move the last bit.
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(logits_of(Encoder(plain.eval(), tokenizer), inputs), want, **close)
    text = "The film was not good"
    assert tokenizer(text)["input_ids"] == saved.tokenizer(text)["input_ids"]
    assert tokenizer.model_input_names == saved.tokenizer.model_input_names

    loaded = load(str(tmp_path / "m"))
    torch.testing.assert_close(logits_of(loaded, inputs), want, **close)
    assert weights_hash(loaded.model) == weights_hash(saved.model)
    assert loaded.labels == saved.labels and not loaded.model.training
    assert durable.damage(tmp_path / "m") is None
    assert {path.suffix for path in (tmp_path / "m").iterdir()} == {".json", ".safetensors"}


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    make_encoder(seed=0).save(tmp_path / "m")
    other = make_encoder(seed=1)
    other.save(tmp_path / "m")
    assert weights_hash(load(str(tmp_path / "m")).model) == weights_hash(other.model)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def save_body(folder: Path, family: str = "bert") -> Encoder:
    """Save a pretrained encoder without a classification head."""
    model = make_encoder(family)
    model.model.base_model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_encoder_gets_a_fresh_head_only_if_asked(tmp_path: Path, family: str) -> None:
    body = save_body(tmp_path / "m", family)
    with pytest.raises(WrongInput, match="no trained classification head.*stillroom finetune"):
        load(str(tmp_path / "m"))
    task = make_task("multi-label")
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(load(str(tmp_path / "m"), task, fresh_head=True))
    assert made[0].labels == ("x", "y", "z") and made[0].config.problem_type.startswith("multi")
    hashes = [weights_hash(each.model) for each in made]
    assert hashes[0] == hashes[1] != hashes[2]
    for name, value in body.model.base_model.state_dict().items():
        assert torch.equal(made[0].model.base_model.state_dict()[name], value) or "pooler" in name


def test_a_head_of_another_width_is_made_anew_only_if_asked(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    three = load(str(tmp_path / "m"), make_task("multi-label"), fresh_head=True)
    assert logits_of(three, inputs_for(three)).shape == (6, 3)
    edit_config(tmp_path / "m", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    with pytest.raises(WrongInput, match=r"no trained classification head \(classifier"):
        load(str(tmp_path / "m"))


def test_a_fresh_head_needs_a_task(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    with pytest.raises((ValueError, WrongInput), match="needs a task"):
        load(str(tmp_path / "m"), fresh_head=True)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def drop_weights(folder: Path, *, containing: str) -> None:
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if containing not in name}
    save_file(kept, path, metadata={"format": "pt"})


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (lambda m: os.truncate(m / "model.safetensors", 1500), "damaged.*Copy the model"),
    "weights cut in the header": (lambda m: os.truncate(m / "model.safetensors", 5), "damaged"),
    "weights empty": (lambda m: os.truncate(m / "model.safetensors", 0), "damaged"),
    "weights of zeros": (lambda m: (m / "model.safetensors").write_bytes(bytes(4000)), "damaged"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "model.safetensors"),
    "weights missing": (lambda m: drop_weights(m, containing="layer.1."), "lacks weights.*layer.1."),
    "head missing": (lambda m: drop_weights(m, containing="classifier"), "no trained classification head"),
    "no configuration": (lambda m: (m / "config.json").unlink(), "model_type"),
    "half a configuration": (lambda m: os.truncate(m / "config.json", 60), "config"),
    "a list for a configuration": (lambda m: (m / "config.json").write_text("[]"), "config.json"),
    "another family": (lambda m: edit_config(m, model_type="roberta"), "lacks weights"),
    "no encoder": (lambda m: edit_config(m, model_type="t5"), "cannot be loaded|lacks weights"),
    "unknown family": (lambda m: edit_config(m, model_type="nope"), "nope"),
    "text for a number": (lambda m: edit_config(m, hidden_size="wide"), "hidden_size"),
    "heads that do not divide": (lambda m: edit_config(m, num_attention_heads=3), "heads"),
    "another width": (lambda m: edit_config(m, hidden_size=20), "lacks weights"),
    "more blocks": (lambda m: edit_config(m, num_hidden_layers=3), "lacks weights.*layer.2."),
    "fewer blocks": (
        lambda m: edit_config(m, num_hidden_layers=1),
        "blocks that its config.*layer.1.",
    ),
    "half a tokenizer": (lambda m: os.truncate(m / "tokenizer.json", 300), "damaged|cannot be loaded"),
    "no tokenizer": (remove_tokenizer, "no tokenizer files"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_model_is_refused_by_name(tmp_path: Path, how: str) -> None:
    folder = save_encoder(tmp_path / "the-model")
    load(str(folder))
    damage, match = DAMAGES[how]
    damage(folder)
    with pytest.raises(WrongInput, match=f"(?s){match}") as caught:
        load(str(folder))
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code == 2


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("sound", [True, False])
def test_pickled_weights_are_refused_unread(tmp_path: Path, sound: bool) -> None:
    folder, mark = save_encoder(tmp_path / "m"), tmp_path / "unpickled"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sound:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(mark)))
    with pytest.raises(WrongInput, match="model.safetensors"):
        load(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("model_type", ["bert", "of-their-own"])
def test_code_that_lies_beside_a_model_is_not_run(tmp_path: Path, model_type: str) -> None:
    folder, mark = save_encoder(tmp_path / "m"), tmp_path / "run"
    code = f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n"
    (folder / "theirs.py").write_text(code)
    auto_map = {
        "AutoConfig": "theirs.C",
        "AutoModelForSequenceClassification": "theirs.M",
        "AutoTokenizer": ["theirs.T", "theirs.T"],
    }
    edit_config(folder, model_type=model_type, auto_map=auto_map)
    if model_type == "bert":
        # A family that transformers has itself is read with transformers' own code.
        assert type(load(str(folder)).model).__module__.startswith("transformers.")
    else:
        with pytest.raises(WrongInput, match="custom code"):
            load(str(folder))
    assert not mark.exists()


def test_tokenizers_that_are_slow_or_cannot_pad_are_refused() -> None:
    with pytest.raises(WrongInput, match="m has no fast tokenizer"):
        encoder.require_fast(SimpleNamespace(is_fast=False), "m")
    tokenizer = make_encoder().tokenizer
    encoder.require_fast(tokenizer, "m")
    tokenizer.pad_token = None
    with pytest.raises(WrongInput, match="tokenizer of m has no padding token"):
        encoder.require_fast(tokenizer, "m")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "~/model"])
def test_a_path_where_nothing_is_is_refused(name: str) -> None:
    """Not asked of the hub, which would answer that there is no such repository."""
    with pytest.raises(WrongInput, match="Expected a model folder"):
        locate(name)


def test_a_file_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").write_text("")
    with pytest.raises(WrongInput, match="Expected a model folder"):
        locate("model")


def test_a_hub_id_that_cannot_be_reached_is_refused() -> None:
    assert locate("someone/something") == "someone/something"
    with pytest.raises(WrongInput, match="someone/something cannot be loaded"):
        load("someone/something")


def test_loading_leaves_transformers_as_loud_as_it_was(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "m")
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    load(str(folder))
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before


# The packaged model


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """Pretend that the package of minilm-l6 lies in `folder`, or is not installed."""
    found = None
    if content is not None:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").write_bytes(content)
        found = importlib.machinery.ModuleSpec("p", None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: found)


def test_minilm_is_the_package_only_if_it_is_the_known_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, monkeypatch, b"another model")
    found = durable.sha256_of_file(tmp_path / "model" / "model.safetensors")
    known = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    with pytest.raises(WrongInput, match=f"expected SHA-256 {known}, found {found}"):
        locate("minilm-l6")
    monkeypatch.setattr(encoder, "_MINILM_SHA256", found)
    assert locate("minilm-l6") == str(tmp_path / "model")


def test_minilm_is_the_hub_id_where_the_package_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, monkeypatch, None)
    assert locate("minilm-l6") == "sentence-transformers/all-MiniLM-L6-v2"


# The hash


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
