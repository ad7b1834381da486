"""Batches: every row once, in an order that only seed and epoch decide, within the limits."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from stillroom.data.batching import (
    Inputs,
    epoch_batches,
    make_batch,
    pad,
    padding_share,
    sequential_batches,
)
from stillroom.data.tokens import TokenisedRows
from tiny import make_encoder, make_rows, make_task, make_tokens

CASES = [
    # rows, longest, batch_size, max_tokens
    (2, 5, 16, 64),
    (33, 128, 16, 8192),
    (500, 128, 32, 2048),
    (1000, 40, 7, 300),
    (801, 30, 16, 8192),
    (801, 128, 16, 256),
    (1601, 128, 16, 1000),
    (101, 1, 3, 64),
    (151, 12, 3, 24),
]


def lengths_of(rows: int, longest: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, longest + 1, size=rows)


def batches_of(lengths: np.ndarray, batch_size: int, max_tokens: int, **given: Any) -> list[np.ndarray]:
    seeds = {"seed": 0, "epoch": 0, **given}
    return epoch_batches(lengths, batch_size=batch_size, max_tokens=max_tokens, **seeds)


@pytest.mark.parametrize(("rows", "longest", "batch_size", "max_tokens"), CASES)
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_row_comes_once_within_the_limits_and_none_alone(
    rows: int, longest: int, batch_size: int, max_tokens: int, epoch: int
) -> None:
    lengths = lengths_of(rows, longest)
    batches = batches_of(lengths, batch_size, max_tokens, epoch=epoch)
    assert sorted(np.concatenate(batches)) == list(range(rows))
    for batch in batches:
        # One row alone has no negatives: COS-NCE would stop the run there.
        assert 2 <= len(batch) <= batch_size
        assert len(batch) * lengths[batch].max() <= max_tokens


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_alone_whatever_the_number_of_rows(seed: int) -> None:
    chance = np.random.default_rng(seed)
    for _ in range(40):
        rows, batch_size = int(chance.integers(2, 700)), int(chance.integers(3, 12))
        max_tokens = int(chance.integers(3 * 64, 1000))
        lengths = lengths_of(rows, 64, seed=rows)
        batches = batches_of(lengths, batch_size, max_tokens, seed=seed)
        assert min(len(batch) for batch in batches) >= 2, (rows, batch_size, max_tokens)
        assert sum(len(batch) for batch in batches) == rows


@pytest.mark.parametrize(
    ("lengths", "batch_size", "max_tokens", "sizes"),
    [
        ([5], 16, 64, [1]),
        ([5, 5, 5], 1, 64, [1, 1, 1]),
        # An odd number of rows where two fill a batch.
        ([5, 5, 5], 2, 64, [1, 2]),
        # A row as long as all the tokens there are, and one that is longer still.
        ([5, 5, 64, 100], 16, 64, [1, 1, 2]),
    ],
)
def test_a_row_is_alone_where_the_limits_leave_no_other_way(
    lengths: list[int], batch_size: int, max_tokens: int, sizes: list[int]
) -> None:
    batches = batches_of(np.array(lengths), batch_size, max_tokens)
    assert sorted(len(batch) for batch in batches) == sizes


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    lengths = lengths_of(300, 50)

    def order(**given: int) -> list[list[int]]:
        return [batch.tolist() for batch in batches_of(lengths, 16, 2048, **given)]

    np.random.seed(1)
    first = order(seed=3, epoch=5)
    np.random.seed(2)
    before = lengths.copy()
    assert order(seed=3, epoch=5) == first
    assert (lengths == before).all()
    assert order(seed=3, epoch=6) != first
    assert order(seed=4, epoch=5) != first
    # Seed and epoch are two numbers, not their sum.
    assert order(seed=5, epoch=3) != first


def test_rows_meet_other_rows_in_other_epochs() -> None:
    lengths = np.full(64, 10)
    company = [
        {frozenset(batch.tolist()) for batch in batches_of(lengths, 8, 999, epoch=epoch)}
        for epoch in (0, 1)
    ]
    assert not company[0] & company[1]


def test_batches_of_like_length_hold_little_padding() -> None:
    lengths = lengths_of(3200, 128)
    share = padding_share(lengths, batches_of(lengths, 32, 10**6))
    shuffled = np.random.default_rng(0).permutation(3200)
    plain = padding_share(lengths, np.split(shuffled, 100))
    assert share < 0.05 < 0.3 < plain


def test_short_and_long_batches_come_mixed() -> None:
    """Sorted batches would teach the short rows first in every epoch."""
    lengths = lengths_of(3200, 128)
    longest = [lengths[batch].max() for batch in batches_of(lengths, 32, 10**6)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.4


def test_padding_share_by_hand() -> None:
    # (2 x 4) + (1 x 3) = 11 tokens are computed, 2 + 4 + 3 = 9 are real.
    found = padding_share(np.array([2, 4, 3]), [np.array([0, 1]), np.array([2])])
    assert found == pytest.approx(2 / 11)


@pytest.mark.parametrize(("rows", "longest", "batch_size", "max_tokens"), [*CASES, (1, 5, 4, 64)])
def test_sequential_batches_hold_every_row_once_longest_first(
    rows: int, longest: int, batch_size: int, max_tokens: int
) -> None:
    lengths = lengths_of(rows, longest)
    batches = list(sequential_batches(lengths, batch_size=batch_size, max_tokens=max_tokens))
    assert sorted(np.concatenate(batches)) == list(range(rows))
    tops = [lengths[batch].max() for batch in batches]
    # The largest batch comes first, so that memory runs out at once or never.
    assert tops == sorted(tops, reverse=True)
    assert all(len(batch) <= batch_size for batch in batches)
    assert all(len(b) * lengths[b].max() <= max_tokens for b in batches if len(b) > 1)


def rows_of(*rows: list[int], types: bool = True, pad_id: int = 9) -> TokenisedRows:
    lengths = np.array([len(row) for row in rows])
    flat = np.concatenate([np.array(row) for row in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    return TokenisedRows(flat, flat % 2 if types else None, offsets, lengths, pad_id, 0)


def test_padding() -> None:
    tokens = rows_of([1, 2, 3], [4], [5, 6])
    found = pad(tokens, np.array([2, 0]))
    assert found.input_ids.tolist() == [[5, 6, 9], [1, 2, 3]]
    assert found.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert found.token_type_ids is not None
    assert found.token_type_ids.tolist() == [[1, 0, 0], [1, 0, 1]]
    for tensor in (found.input_ids, found.attention_mask, found.token_type_ids):
        assert tensor.dtype == torch.int64
    # As wide as the longest row that is in it, not the longest there is.
    assert pad(tokens, np.array([1])).input_ids.tolist() == [[4]]


def test_no_types_where_the_tokenizer_makes_none() -> None:
    assert pad(rows_of([1, 2], [3], types=False), np.array([0, 1])).token_type_ids is None


@pytest.mark.parametrize("kind", ["classification", "regression", "multi-label"])
def test_a_batch_holds_the_rows_labels_and_numbers(kind: Any) -> None:
    rows = make_rows(make_task(kind), 10)
    tokens = make_tokens(rows, make_encoder())
    index = np.array([7, 2, 9])
    batch = make_batch(index, rows, tokens)
    assert batch.row_ids.tolist() == [7, 2, 9] and batch.row_ids.dtype == torch.int64
    assert batch.labels.tolist() == rows.labels[index].tolist()
    assert batch.labels.dtype == (torch.int64 if kind == "classification" else torch.float32)
    assert batch.teacher is batch.student
    for row, ids, mask in zip(index, batch.student.input_ids, batch.student.attention_mask, strict=True):
        start, length = tokens.offsets[row], tokens.lengths[row]
        assert ids[mask == 1].tolist() == tokens.ids[start : start + length].tolist()


def test_a_teacher_with_other_tokens_gets_its_own() -> None:
    rows = make_rows(make_task(), 4)
    tokens = make_tokens(rows, make_encoder())
    other = replace(tokens, ids=tokens.ids + 100)
    batch = make_batch(np.arange(4), rows, tokens, other)
    real = batch.student.attention_mask == 1
    assert torch.equal(batch.teacher.input_ids[real], batch.student.input_ids[real] + 100)
    assert make_batch(np.arange(4), rows, tokens, tokens).teacher is not None
    moved = batch.to(torch.device("cpu"))
    assert moved.teacher is not moved.student
    alike = make_batch(np.arange(4), rows, tokens, tokens).to(torch.device("cpu"))
    assert alike.teacher is alike.student


@pytest.mark.parametrize("part", ["input_ids", "attention_mask", "token_type_ids"])
def test_moving_inputs_moves_every_part(part: str) -> None:
    inputs = Inputs(*(torch.zeros(1, 2, dtype=torch.int64) for _ in range(3)))
    assert getattr(inputs.to(torch.device("meta")), part).device.type == "meta"
    without = Inputs(inputs.input_ids, inputs.attention_mask, None)
    assert without.to(torch.device("meta")).token_type_ids is None
