"""Augmented rows: masks, straight-through words, phases, and who is moved by which step."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillroom.data.batching import Inputs
from stillroom.methods.base import Augmentation
from stillroom.training.augmentation import gumbel_like, masked_positions, mixed_words, with_words

GOLDEN = {
    example["name"]: example
    for example in json.loads((Path(__file__).parents[1] / "golden/cilda.json").read_text())["examples"]
}
D2, D5 = GOLDEN["D2_gumbel_mix"], GOLDEN["D5_schedule"]


def rule(**given: Any) -> Augmentation:
    chosen: dict[str, Any] = {
        "generator": "tiny",
        "weights": {"soft": 1.0},
        "mask_probability": 0.3,
        "masks": "fresh",
        "generator_steps": 10,
        "student_steps": 100,
        "learning_rate": 5e-7,
        "student_mode": "eval",
    }
    return Augmentation(**{**chosen, **given})


def mixed_naively(ids: Tensor, mask: Tensor, scores: Tensor, table: Tensor) -> Tensor:
    """Return the mixed embeddings by the formula: a one-hot of every position, a product, a blend."""
    soft = torch.softmax(scores, -1)
    onehot = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(soft.dtype)
    straight = (onehot - soft).detach() + soft
    m = mask[..., None]
    return m * (straight @ table) + (1 - m) * table[ids]


def test_golden_gumbel_and_mixing() -> None:
    inputs, want = D2["inputs"], D2["expected"]
    logits = torch.tensor(inputs["logits"], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor(inputs["gumbel"], dtype=torch.float64)
    table = torch.tensor(inputs["embedding"], dtype=torch.float64)
    ids, mask = torch.tensor([inputs["ids"]]), torch.tensor(inputs["mask"])
    positions = mask.nonzero()[:, 0]
    scores = logits + noise
    assert scores.softmax(-1).tolist() == [pytest.approx(row, abs=1e-9) for row in want["soft"]]
    assert scores.argmax(-1).tolist() == want["argmax"]
    mixed = mixed_words(ids, positions, scores[positions], table)
    assert mixed[0].tolist() == want["mixed"]
    (gradient,) = torch.autograd.grad(mixed.sum(), logits)
    for found, row in zip(gradient, want["grad_sum_of_mixed"], strict=True):
        assert found.tolist() == pytest.approx(row, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_mixed_words_and_their_gradient_are_the_formula(seed: int) -> None:
    """The table is read once instead of multiplied by one-hots; a gradient to a wrong row trains noise."""
    torch.manual_seed(seed)
    table = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (3, 4))
    mask = (torch.rand(3, 4) < 0.5).double()
    scores = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 5, dtype=torch.float64)
    short = table.detach()[:9]
    want = mask[..., None] * mixed_naively(ids.clamp(max=8), mask, scores, short)
    want = want + (1 - mask[..., None]) * table.detach()[ids]
    positions = mask.flatten().nonzero()[:, 0]
    found = mixed_words(ids, positions, scores.flatten(0, 1)[positions], table)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    goals = [torch.autograd.grad((x * weight).sum(), scores)[0] for x in (want, found)]
    assert goals[0].abs().max() > 0.01
    torch.testing.assert_close(goals[1], goals[0], rtol=1e-12, atol=1e-12)
    # Words that are not masked are the table's rows to the last bit.
    kept = mask == 0
    assert torch.equal(found[kept], table.detach()[ids][kept])
    # In a generator step the tables stand still.
    assert not torch.autograd.grad((found * weight).sum(), table, allow_unused=True)[0]


def test_the_soft_path_passes_gradcheck() -> None:
    """The gradient of the straight-through words is that of softmax times table, checked by differences."""
    torch.manual_seed(0)
    table = torch.randn(7, 3, dtype=torch.float64)
    scores = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: s.softmax(-1) @ table, scores)
    weight = torch.randn(1, 4, 3, dtype=torch.float64)
    positions = torch.tensor([1, 3])
    mixed = mixed_words(torch.zeros(1, 4, dtype=torch.long), positions, scores, table)
    (found,) = torch.autograd.grad((mixed * weight).sum(), scores)
    soft = (scores.softmax(-1) @ table * weight[0, positions]).sum()
    torch.testing.assert_close(found, torch.autograd.grad(soft, scores)[0], rtol=1e-12, atol=1e-12)


def test_gumbel_noise_draws_words_by_their_probability() -> None:
    """argmax(logits + noise) is a draw from softmax(logits): the Gumbel-max theorem."""
    torch.manual_seed(0)
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1])).expand(200_000, 3)
    drawn = (logits + gumbel_like(logits)).argmax(-1)
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    # Three standard errors of a share near one half are 0.0034.
    assert share.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.004)


def test_golden_schedule() -> None:
    expected, parameters = D5["expected"], D5["parameters"]
    phases = rule(generator_steps=parameters["n_generator"], student_steps=parameters["n_student"])
    found = ["G" if phases.moves_generator(step) else "S" for step in D5["inputs"]["steps"]]
    assert found == expected["phases"]
    count = sum(phases.moves_generator(step) for step in range(1100))
    assert [count, 1100 - count] == expected["G_S_in_1100_steps"]
    for rows, want in zip(D5["inputs"]["train_sizes"], expected["G_S_in_first_epoch"], strict=True):
        steps = -(-rows // parameters["batch_size"])
        count = sum(phases.moves_generator(step) for step in range(steps))
        assert [count, steps - count] == want


SPECIAL = frozenset({0, 1, 2, 3, 4})


def make_inputs(rows: int = 40, width: int = 30) -> Inputs:
    ids = torch.randint(5, 30, (rows, width))
    lengths = torch.randint(4, width + 1, (rows, 1))
    mask = (torch.arange(width) < lengths).long()
    ids[:, 0], ids = 2, torch.where(mask == 1, ids, 0)
    ids[torch.arange(rows), lengths[:, 0] - 1] = 3
    return Inputs(ids, mask, None)


def masked(inputs: Inputs, rows: Tensor | None = None, **given: Any) -> Tensor:
    """Return the mask, `(B, S)`."""
    rows = torch.arange(len(inputs.input_ids)) if rows is None else rows
    chosen = {"special": SPECIAL, "probability": 0.3, "seed": 0, "draw": 0, **given}
    flat = torch.zeros(inputs.input_ids.numel(), dtype=torch.bool)
    flat[masked_positions(inputs, rows, **chosen)] = True
    return flat.view_as(inputs.input_ids)


def test_special_tokens_and_padding_are_never_masked() -> None:
    torch.manual_seed(0)
    inputs = make_inputs()
    # Padding may hold a word's id: the mask decides.
    noisy = Inputs(inputs.input_ids + 9 * (1 - inputs.attention_mask), inputs.attention_mask, None)
    words = (inputs.attention_mask == 1) & ~torch.isin(inputs.input_ids, torch.tensor(list(SPECIAL)))
    for draw in range(20):
        assert not (masked(noisy, draw=draw) & ~words).any()
    assert torch.equal(masked(inputs, probability=1.0), words)
    assert not masked(inputs, probability=0.0).any()


def test_each_word_is_masked_with_the_given_probability() -> None:
    torch.manual_seed(0)
    inputs = make_inputs()
    words = int(masked(inputs, probability=1.0).sum())
    found = sum(int(masked(inputs, draw=draw).sum()) for draw in range(100))
    # Four standard errors of 0.3 over about 66,000 draws.
    assert found / (100 * words) == pytest.approx(0.3, abs=0.008)


def test_masks_are_the_rows_own() -> None:
    """A mask that hung on the batch would change with batch size, order, or padding."""
    torch.manual_seed(0)
    inputs = make_inputs()
    whole = masked(inputs)
    part = Inputs(inputs.input_ids[5:9, :25], inputs.attention_mask[5:9, :25], None)
    assert torch.equal(masked(part, torch.arange(5, 9)), whole[5:9, :25])
    assert torch.equal(masked(inputs), whole)
    for other in ({"draw": 1}, {"seed": 1}):
        assert not torch.equal(masked(inputs, **other), whole)


def test_with_words_changes_what_it_is_told_to() -> None:
    inputs = make_inputs(rows=3, width=6)
    before = copy.deepcopy(inputs)
    changed = with_words(inputs, torch.tensor([1, 8]), torch.tensor([7, 9]))
    assert (changed.input_ids[0, 1], changed.input_ids[1, 2]) == (7, 9)
    assert torch.equal(inputs.input_ids, before.input_ids)
    flat = np.delete(changed.input_ids.numpy().ravel(), [1, 8])
    assert np.array_equal(flat, np.delete(before.input_ids.numpy().ravel(), [1, 8]))
    assert changed.attention_mask is inputs.attention_mask
