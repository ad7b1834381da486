"""A pass without padding computes what the padded one does: states, logits and gradients.

The kernel itself needs a GPU (CUDA, compute capability 8.0, torch >= 2.10); there:

    pytest tests/encoder/test_unpadded.py -k cuda
    python benchmarks/packed.py

The first compares, the second times.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from stillroom.data.batching import Inputs, Layout
from stillroom.encoder import Encoder, Needs, Outputs, unpadded
from stillroom.evaluation.predict import predict
from stillroom.training.compiling import compiled_blocks
from stillroom.training.loop import train
from tiny import FAMILIES, make_batch_of, make_encoder, make_job, make_rows, make_task, make_tokens

PACKED = sorted(unpadded.FAMILIES & set(FAMILIES))
NEEDS = Needs(
    logits=True,
    hidden_states=frozenset({0, 1, 2, 3}),
    pooled_states=frozenset({("mean", 2), ("cls", 3)}),
)

needs_kernel = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))
    or unpadded.varlen_attn is None,
    reason="needs a GPU with flash attention, and torch >= 2.10",
)


def make_model(family: str, *, width: int = 16) -> Encoder:
    """Return a model with large scores, so that it matters who looks at whom, and short windows."""
    made = make_encoder(family, layers=3, width=width)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    if family == "modernbert":
        made.config.sliding_window = 2
        for block in made.blocks()[1]:
            if block.attn.sliding_window is not None:
                block.attn.sliding_window = 3
    return made


def inputs_of(model: Encoder, rows: int = 6) -> tuple[Inputs, Inputs]:
    """Return a batch of unequal rows, and the same with its layout."""
    padded = make_batch_of(make_rows(make_task(), rows), model).student
    return padded, replace(padded, layout=Layout.of(padded.attention_mask))


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets one number, the tokens, for each block that leaves the padding out."""
    calls: list[int] = []
    plain: Callable[..., Tensor] = unpadded._row_by_row

    def row_by_row(q: Tensor, *others: Any) -> Tensor:
        calls.append(len(q))
        return plain(q, *others)

    monkeypatch.setattr(unpadded, "_row_by_row", row_by_row)
    return calls


def objective(made: Outputs, mask_BS: Tensor) -> Tensor:
    """Return a number that depends on every value that is not padding, on each in another way."""
    total = made.logits.square().sum()
    for states in made.hidden_states.values():
        weights = torch.linspace(-1, 1, states.shape[-1], dtype=states.dtype, device=states.device)
        total = total + ((states * weights).tanh() * mask_BS[..., None]).sum()
    return total + sum(states.sin().sum() for states in made.pooled_states.values())


def gradients(model: Encoder, inputs: Inputs, offset: Tensor) -> tuple[Outputs, dict[str, Tensor]]:
    """Return what the model computes and the gradient of all it is made of, and of its embeddings."""
    model.zero_grad()
    offset = offset.clone().requires_grad_()
    made = model(inputs, NEEDS, offset)
    objective(made, inputs.attention_mask).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert offset.grad is not None
    return made, found | {"offset": offset.grad}


@pytest.mark.parametrize("family", PACKED)
def test_states_logits_and_gradients_are_those_of_the_padded_batch(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family).double()
    padded, packed = inputs_of(model)
    real = padded.attention_mask.bool()
    offset = 0.1 * torch.randn(*real.shape, model.width, dtype=torch.float64)
    calls = watch(monkeypatch)
    want, want_gradients = gradients(model, padded, offset)
    assert calls == [] and not real.all()
    found, found_gradients = gradients(model, packed, offset)
    assert calls == [int(real.sum())] * 3
    torch.testing.assert_close(found.logits, want.logits, rtol=1e-9, atol=1e-9)
    for index, states in want.hidden_states.items():
        got = found.hidden_states[index]
        assert got.shape == states.shape
        torch.testing.assert_close(got[real], states[real], rtol=1e-9, atol=1e-9)
    for index in (0, 1, 2):
        assert not found.hidden_states[index][~real].any()
    for key, pooled in want.pooled_states.items():
        torch.testing.assert_close(found.pooled_states[key], pooled, rtol=1e-6, atol=1e-6)
    assert found_gradients.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        # Pooled states are float32 at least: that is where their gradients are rounded.
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-7, atol=1e-7, msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in found_gradients.values())


def test_rows_see_only_themselves_and_only_their_window() -> None:
    """One head of width 1, keys 0: each token gets the plain mean of the values that it sees."""
    values = torch.tensor([1.0, 2.0, 6.0, 10.0, 30.0])
    zeros, v = torch.zeros(1, 1, 5, 1), values.view(1, 1, 5, 1)
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)

    def mixed(window: int | None) -> list[float]:
        made, _ = unpadded._attend(
            torch.nn.Module(), zeros, zeros, v, None,
            cu_seq_lens_q=starts, max_length_q=3, sliding_window=window,
        )  # fmt: skip
        assert made.shape == (1, 5, 1, 1)
        return [round(x, 5) for x in made.flatten().tolist()]

    assert mixed(None) == [3.0, 3.0, 3.0, 20.0, 20.0]
    # Two of the window are the token itself and one neighbour on each side.
    assert mixed(2) == [1.5, 3.0, 4.0, 20.0, 20.0]


def test_scores_are_scaled_as_told() -> None:
    """Two keys, scores 0 and log 3 after scaling: weights 1/4 and 3/4."""
    q = torch.tensor([[[[1.0], [1.0]]]])
    k = torch.tensor([[[[0.0], [2 * math.log(3)]]]])
    v = torch.tensor([[[[0.0], [1.0]]]])
    starts = torch.tensor([0, 2], dtype=torch.int32)
    made, _ = unpadded._attend(
        torch.nn.Module(), q, k, v, None, cu_seq_lens_q=starts, max_length_q=2, scaling=0.5
    )
    assert made.flatten().tolist() == pytest.approx([0.75, 0.75])


def test_packing_and_back_leaves_real_tokens_and_zeros() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    layout = Layout.of(mask)
    assert layout is not None
    states = torch.randn(3, 3, 2)
    packed = layout.pack(states)
    assert torch.equal(packed[0], torch.stack([states[0, 0], states[0, 1], states[1, 0], *states[2]]))
    assert torch.equal(layout.unpack(packed), states * mask[..., None])
    assert Layout.of(torch.ones(2, 3)) is None


@pytest.mark.parametrize(
    ("family", "needs"),
    [
        ("bert", NEEDS | Needs(attention_scores=frozenset({1}))),
        ("bert", NEEDS | Needs(values=frozenset({2}))),
        ("bert", NEEDS | Needs(padding=True)),
        ("bert", NEEDS | Needs(pooled_states=frozenset({("unmasked_mean", 1)}))),
        ("deberta-v2", NEEDS),
        ("mpnet", NEEDS),
    ],
)
def test_what_reads_padding_or_attention_is_computed_on_the_padded_batch(
    family: str, needs: Needs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    padded, packed = inputs_of(model)
    calls = watch(monkeypatch)
    with torch.no_grad():
        want, found = model(padded, needs), model(packed, needs)
    assert calls == []
    assert torch.equal(found.logits, want.logits)
    assert all(torch.equal(found.hidden_states[i], want.hidden_states[i]) for i in range(4))


def test_dropped_attention_weights_keep_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has no dropout: without the padded pass a student would train without it, silently."""
    model = make_model("bert")
    _, packed = inputs_of(model)
    calls = watch(monkeypatch)
    model.train()(packed, NEEDS)
    assert calls == []
    model.config.attention_probs_dropout_prob = 0.0
    model(packed, NEEDS)
    assert len(calls) == 3
    model.config.attention_probs_dropout_prob = 0.1
    model.eval()(packed, NEEDS)
    assert len(calls) == 6


def test_it_can_be_turned_off_and_a_compiled_student_keeps_its_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("bert")
    _, packed = inputs_of(model)
    calls = watch(monkeypatch)
    model.packed = False
    model(packed, NEEDS)
    model.packed = True
    monkeypatch.setattr(torch, "compile", lambda plain, **_: plain)
    with compiled_blocks(model):
        model(packed, NEEDS)
    assert calls == []
    model(packed, NEEDS)
    assert len(calls) == 3


def test_the_model_is_as_it_was_after_a_pass_and_after_one_that_fails() -> None:
    model = make_model("modernbert")
    padded, packed = inputs_of(model)
    assert model.config._attn_implementation == "sdpa"
    want = model(padded, NEEDS).logits
    model(packed, NEEDS)
    assert packed.layout is not None
    broken = replace(packed, layout=replace(packed.layout, places=packed.layout.places + 10**6))
    with pytest.raises((RuntimeError, IndexError)):
        model(broken, NEEDS)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(padded, NEEDS).logits, want)


def test_a_cpu_is_given_no_layout_by_itself() -> None:
    padded, packed = inputs_of(make_model("bert"))
    assert padded.to(torch.device("cpu")).layout is None
    assert packed.to(torch.device("cpu")).layout is not None


@needs_kernel
@pytest.mark.parametrize("family", PACKED)
def test_the_cuda_kernel_agrees_with_the_padded_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 the packed pass is as near to the padded one in float32 as the padded one in bf16 is."""
    model = make_model(family, width=32).cuda()
    on_cpu, _ = inputs_of(model, rows=40)
    inputs = on_cpu.to(torch.device("cuda"))
    assert inputs.layout is not None
    offset = torch.zeros(*inputs.input_ids.shape, model.width, device="cuda")
    calls: list[int] = []
    kernel = unpadded.varlen_attn
    monkeypatch.setattr(unpadded, "varlen_attn", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    exact, exact_gradients = gradients(model, inputs, offset)
    assert calls == [], "float32 has no kernel"
    padded, packed = {}, {}
    with torch.autocast("cuda", torch.bfloat16):
        padded["out"], padded["gradients"] = gradients(model, replace(inputs, layout=None), offset)
        assert calls == []
        packed["out"], packed["gradients"] = gradients(model, inputs, offset)
    assert len(calls) == 3
    real = inputs.attention_mask.bool()

    def errors(found: dict[str, Any]) -> dict[str, float]:
        off = {"logits": found["out"].logits.float() - exact.logits}
        for i, states in exact.hidden_states.items():
            off[f"hidden {i}"] = (found["out"].hidden_states[i].float() - states)[real]
        for name, gradient in exact_gradients.items():
            # Of vectors some are 0 but for rounding, as of attention's keys.
            if gradient.ndim > 1:
                off[name] = found["gradients"][name] - gradient
        return {name: value.norm().item() for name, value in off.items()}

    sizes = {"logits": exact.logits} | {f"hidden {i}": s[real] for i, s in exact.hidden_states.items()}
    sizes |= exact_gradients
    want, found = errors(padded), errors(packed)
    for name, error in found.items():
        assert error <= 2 * want[name] + 0.02 * sizes[name].norm().item(), (name, error, want[name])


@needs_kernel
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_packed_cuda_pass_waits_for_nothing() -> None:
    model = make_model("bert", width=32).cuda()
    on_cpu, _ = inputs_of(model, rows=40)
    inputs = on_cpu.to(torch.device("cuda"))
    assert inputs.layout is not None
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        model(inputs, NEEDS)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(inputs, NEEDS)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_kernel
def test_evaluation_on_cuda_gives_the_padded_logits() -> None:
    model = make_model("bert", width=32).cuda()
    rows = make_rows(make_task(), 60)
    tokens = make_tokens(rows, model)
    packed = predict(model, tokens, bf16=True)
    model.packed = False
    padded, exact = predict(model, tokens, bf16=True), predict(model, tokens, bf16=False)
    assert abs(packed - exact).max() <= 2 * abs(padded - exact).max() + 0.02 * abs(exact).max()


@pytest.mark.parametrize("packed", ["auto", "off"])
def test_the_recipe_turns_it_off(packed: str, tmp_path: Path) -> None:
    job = make_job(tmp_path, method="kd", packed=packed, epochs=0.2)
    train(job, Console(quiet=True))
    assert job.student.packed == (packed == "auto")
