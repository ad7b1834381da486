"""The live teacher computes what its encoder does, with what it reads prepared once."""

import pytest
import torch

from stillroom.encoder import Encoder, Needs
from stillroom.teacher import live
from stillroom.teacher.live import LiveTeacher
from tiny import FAMILIES, make_batch_of, make_encoder, make_generator, make_rows, make_task


def _cpu(encoder: Encoder, *, bf16: bool) -> LiveTeacher:
    return LiveTeacher(encoder, device=torch.device("cpu"), bf16=bf16)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_rounded_once_give_autocasts_bits(family: str) -> None:
    encoder = make_encoder(family)
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    batch = make_batch_of(make_rows(make_task(), 40), encoder)
    needs = Needs(logits=True, hidden_states=frozenset({0, 1, 2}))
    teacher = _cpu(encoder, bf16=True)
    found = [teacher(batch, needs) for _ in range(2)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = encoder(batch.teacher, needs).float()
    for each in found:
        assert torch.equal(each.logits, want.logits)
        assert all(torch.equal(each.hidden_states[i], want.hidden_states[i]) for i in range(3))
    # With a gradient to words, by weights that are rounded and no more. (On padding positions may differ.)
    words = encoder.words.detach()[batch.teacher.input_ids].requires_grad_()
    assert torch.equal(teacher.of_words(batch.teacher, needs, words).logits, want.logits)
    rounded = teacher._rounded
    assert rounded and all(p.dtype == torch.bfloat16 for p in rounded.values())
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.dtype == torch.float32


def test_a_table_that_a_decoder_shares_is_not_rounded_as_embeddings() -> None:
    encoder = make_generator()
    batch = make_batch_of(make_rows(make_task(), 40), encoder)
    needs = Needs(hidden_states=frozenset({0}))
    found = _cpu(encoder, bf16=True)(batch, needs).hidden_states[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = encoder(batch.teacher, needs).float().hidden_states[0]
    assert torch.equal(found, want)


def test_float32_rounds_nothing() -> None:
    assert _cpu(make_encoder(), bf16=False)._rounded == {}


def test_a_gradient_passes_through_weights_that_a_recording_rounded() -> None:
    encoder = make_encoder()
    teacher = _cpu(encoder, bf16=True)
    batch, needs = make_batch_of(make_rows(make_task(), 8), encoder), Needs(logits=True)
    # As a recording computes it.
    with torch.inference_mode():
        want = teacher(batch, needs).logits
    words = encoder.words.detach()[batch.teacher.input_ids].requires_grad_()
    found = teacher.of_words(batch.teacher, needs, words)
    assert torch.equal(found.logits, want)
    found.logits.square().sum().backward()
    assert words.grad is not None and words.grad.abs().sum() > 0


def test_a_processor_without_such_products_gets_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder()
    batch, needs = make_batch_of(make_rows(make_task(), 40), encoder), Needs(logits=True)
    usual = _cpu(encoder, bf16=True)(batch, needs).logits
    monkeypatch.setattr(live, "can_block", lambda _: False)
    assert torch.equal(_cpu(encoder, bf16=True)(batch, needs).logits, usual)
